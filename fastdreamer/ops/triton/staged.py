"""Steps of the dynamics that are several kernels one behind the other.

Block-diagonal weights are for models whose weights are too many for one program to read at every
step, and layers of stoch and action apart make no chain of layers, which is what ``cells.py`` has
one kernel for. Such a step is taken in stages, each over all multiprocessors: the features of
stoch, action and h (kernels of ``mlp.py``), the recurrence's layers and its gates (``blocks.py``),
the latent's layers, its sample. Nothing in it asks where episodes begin: what is zeroed or replaced
there is so before the step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastdreamer.ops.triton import blocks, build, mlp, normal
from fastdreamer.ops.triton.build import Weights, moved
from fastdreamer.ops.triton.layout import (
    OF_SUM,
    Features,
    LinearShape,
    MlpShape,
    Piece,
    Places,
    StagedShape,
    StepShape,
    norm_columns,
)
from fastdreamer.ops.triton.program import Arg

_SHARED = "x1", "x2", "x3"  # of blocks.forward_kernel


class StagedWeights(NamedTuple):
    """Packed parameters of each stage."""

    features: tuple[Weights, ...]
    layers: tuple[Weights, ...]  # their norms are "norm" alone
    latent: Weights


class _Row(NamedTuple):
    """Where each stage begins in a row of a tape or of ``grads``."""

    features: list[Arg]
    layers: list[Arg]
    latent: Arg

    @staticmethod
    def of(shape: StagedShape, row: Arg, columns: list[int]) -> _Row:
        at, count = [moved(row, column) for column in columns], len(shape.features)
        return _Row(at[:count], at[count:-1], at[-1])


class _Input(NamedTuple):
    """A piece of a layer's input, or the gradient by it."""

    piece: Piece
    x: Arg
    width: int  # columns of a row
    read: int  # columns of a block, padding included where there is any
    apart: int  # columns from one block's to the next's, 0: all see the same


def _inputs(shape: StagedShape, i: int, deter: Arg, row: _Row, width: int, of: str) -> list[_Input]:
    """Of layer ``i`` in rows of that width: its values, or with "outer" the gradients by them."""
    layer, found = shape.layers[i], []
    if layer.chained:
        below, padded = shape.layers[i - 1], layer.own.padded
        x = moved(row.layers[i - 1], getattr(below, of))
        found.append(_Input(layer.own, x, width, padded, padded))
    elif layer.own.size:
        found.append(_Input(layer.own, deter, shape.D, layer.own.size, layer.own.size))
    parts = zip(layer.shared, shape.features, row.features, strict=False)
    for piece, part, at in parts:
        found.append(_Input(piece, moved(at, getattr(part, of)), width, piece.padded, 0))
    return found


class Builder(build.Builder):
    """One that knows of steps in stages, too; of other steps it does what its base does."""

    # parameters --------------------------------------------------------------------------------

    def pack_step(
        self, name: str, shape: StepShape | StagedShape, latent: str, *, transposed: bool = False
    ) -> Weights | StagedWeights:
        if not isinstance(shape, StagedShape):
            return super().pack_step(name, shape, latent, transposed=transposed)
        features = [
            self.pack_mlp(part.name, part.shape, transposed=transposed) for part in shape.features
        ]
        layers = [self._pack_layer(layer, transposed) for layer in shape.layers]
        of_latent = self.pack_mlp(latent, shape.latent, transposed=transposed)
        return StagedWeights(tuple(features), tuple(layers), of_latent)

    def _pack_layer(self, layer: LinearShape, transposed: bool) -> Weights:
        name, block = layer.name.format, build.PACK_BLOCK
        weight = self.slot(name("weight"), layer.shape)
        bias = None
        if layer.biased and not transposed:
            bias = self.slot(name("bias"), (layer.groups * layer.gates * layer.n,))
        packed = self.operands(name("packed"), (layer.weights,), "scratch")
        biases = None if transposed else self.slot(name("biases"), (layer.width,), "scratch")
        strides, target = layer.strides, biases
        for piece in layer.pieces:
            at = packed.at(piece.at * (1 if transposed else layer.total))
            self.launch(
                blocks.pack_kernel,
                (-(-piece.padded // block), -(-layer.total // block), layer.groups),
                {
                    "weight": weight.at(piece.begin * strides["SK"]),
                    "bias": bias,
                    "packed": None if transposed else at,
                    "transposed": at if transposed else None,
                    "biases": target,
                },
                {
                    **strides, **layer.constants, "K": piece.size, "K_PADDED": piece.padded,
                    "KP": layer.depth, "BLOCK_K": block, "BLOCK_N": block,
                },
            )  # fmt: skip
            bias = target = None  # the first has it
        norm = None
        if layer.norm is not None:
            groups = layer.groups * layer.gates
            norm = self.slot(name("norms"), (norm_columns(layer.width),), "scratch").at(0)
            self._pack_norm(name("norm"), layer.norm, norm, layer.n, layer.n_padded, groups)
        return Weights(packed.at(0), biases and biases.at(0), {"norm": norm})

    # forward -----------------------------------------------------------------------------------

    def step_forward(
        self,
        shape: StepShape | StagedShape,
        packed: Weights | StagedWeights,
        args: dict[str, Any],
        rows: int,
        *,
        save: bool,
    ) -> None:
        """See the base; there are no ``first`` rows."""
        if not isinstance(shape, StagedShape):
            super().step_forward(shape, packed, args, rows, save=save)
            return
        tape = _Row.of(shape, args["tape"], shape.tapes)
        for part, weights, at in zip(shape.features, packed.features, tape.features, strict=True):
            x = (*(args[name] for name in part.of), None)[:2]
            self.mlp_forward(part.shape, weights, x, at, at, rows, save=save, tape_width=shape.tape)
        for i, (layer, weights) in enumerate(zip(shape.layers, packed.layers, strict=True)):
            self._layer_forward(shape, i, weights, args["deter"], tape, rows)
            if layer.act:
                self._activation(shape.tape, layer, weights, tape.layers[i], rows)
        self.launch(
            blocks.gates_kernel,
            (rows,),
            {
                **_gate_args(shape, packed.layers[-1], tape),
                "deter": args["deter"], "new_deter": args["new_deter"],
            },
            {**_gate_constants(shape), "TAPE": shape.tape, "BN": _columns(shape.D)},
        )  # fmt: skip
        self._latent_forward(shape, packed.latent, args, tape.latent, rows, save=save)

    def _layer_forward(
        self, shape: StagedShape, i: int, weights: Weights, deter: Arg, tape: _Row, rows: int
    ) -> None:
        layer, tile = shape.layers[i], self._tile("layer", rows)
        inputs = _inputs(shape, i, deter, tape, shape.tape, "value")
        own = inputs.pop(0) if layer.own.size else _Input(layer.own, None, 0, 0, 0)
        sizes = dict.fromkeys(("P1", "P2", "P3", "K1", "K2", "K3"), 0)
        for j, given in enumerate(inputs, 1):
            sizes |= {f"P{j}": given.piece.at, f"K{j}": given.read}
        self.launch(
            blocks.forward_kernel,
            (-(-rows // tile.rows), layer.groups * -(-layer.total // tile.columns)),
            {
                "weights": weights.weights, "biases": weights.biases, "own": own.x,
                **dict.fromkeys(_SHARED),
                **{name: given.x for name, given in zip(_SHARED, inputs, strict=False)},
                "sums": tape.layers[i], "rows": rows,
            },
            {
                **sizes, "OWN": own.read, "XS": own.width, "APART": own.apart, "KP": layer.depth,
                "TOTAL": layer.total, "TAPE": shape.tape, **_tile_constants(tile),
            },
            tile,
        )  # fmt: skip

    def _activation(
        self, width: int, layer: LinearShape, weights: Weights, tape: Arg, rows: int
    ) -> None:
        norm = weights.norms["norm"]
        self.launch(
            blocks.activation_kernel,
            (rows,),
            {
                "sums": tape, "value": moved(tape, layer.value), "norm": norm,
                "stats": norm and moved(tape, layer.stats),
            },
            {
                "W": layer.width, "NP": layer.n_padded, "TAPE": width, "ACT": layer.act,
                "BN": _columns(layer.width),
            },
        )  # fmt: skip

    def _latent_forward(
        self,
        shape: StagedShape,
        packed: Weights,
        args: dict[str, Any],
        tape: Arg,
        rows: int,
        *,
        save: bool,
    ) -> None:
        size = rows * shape.S
        moments = [
            args.get(name) or self.slot(f"latent.{name}", (rows, shape.S), "scratch").at(0)
            for name in shape.moments
        ]
        self.mlp_forward(
            shape.latent, packed, (args["new_deter"], None), moments[0], tape, rows, save=save,
            tape_width=shape.tape, extra=args.get("extra"), **_head(shape, std=moments[1:]),
        )  # fmt: skip
        if shape.classes:
            self.sample(shape.std, *moments, args["noise"], args["new_stoch"], size)
            return
        self.launch(
            normal.sample_kernel,
            (-(-size // normal.BLOCK),),
            {
                "mean": moments[0], "std": moments[1], "noise": args["noise"],
                "sample": args["new_stoch"], "size": size,
            },
            {"BLOCK": normal.BLOCK},
        )  # fmt: skip

    # backward ----------------------------------------------------------------------------------

    def step_backward(
        self,
        shape: StepShape | StagedShape,
        packed: Weights | StagedWeights,
        args: dict[str, Any],
        rows: int,
    ) -> None:
        """See the base; what reaches the latent is added to ``d_new_deter``."""
        if not isinstance(shape, StagedShape):
            super().step_backward(shape, packed, args, rows)
            return
        tape = _Row.of(shape, args["tape"], shape.tapes)
        grads = _Row.of(shape, args["grads"], shape.places)
        self._latent_backward(shape, packed.latent, args, tape.latent, grads.latent, rows)
        layer = shape.layers[-1]
        self.launch(
            blocks.gates_backward_kernel,
            (rows,),
            {
                **_gate_args(shape, packed.layers[-1], tape),
                **{name: args[name] for name in ("deter", "d_new_deter", "d_deter")},
                "outer": moved(grads.layers[-1], layer.outer) if layer.norm else None,
                "inner": grads.layers[0 if shape.torch else -1],
                "inner_h": grads.layers[1] if shape.torch else None,
            },
            {
                **_gate_constants(shape), "TAPE": shape.tape, "GRADS": shape.grads,
                "BN": _columns(layer.width // 3),
            },
        )  # fmt: skip
        for i in reversed(range(len(shape.layers))):
            layer, of_layer = shape.layers[i], packed.layers[i]
            if layer.act:
                sums, values = tape.layers[i], moved(tape.layers[i], layer.value)
                self._activation_backward(
                    shape, layer.act, (layer.width, layer.n_padded),
                    sums if layer.norm or layer.act in OF_SUM else values,
                    of_layer.norms["norm"], layer.norm and moved(sums, layer.stats),
                    moved(grads.layers[i], layer.outer), grads.layers[i], rows,
                )  # fmt: skip
            for given in _inputs(shape, i, args["d_deter"], grads, shape.grads, "outer"):
                self._layer_backward(shape, layer, of_layer, given, grads.layers[i], rows)
        parts = zip(shape.features, packed.features, tape.features, grads.features, strict=True)
        for part, weights, of_tape, of_grads in parts:
            d_x = (*(args[f"d_{name}"] for name in part.of), None)[:2]
            self._features_backward(shape, part, weights, of_tape, of_grads, d_x, rows)

    def _latent_backward(
        self,
        shape: StagedShape,
        packed: Weights,
        args: dict[str, Any],
        tape: Arg,
        grads: Arg,
        rows: int,
    ) -> None:
        size = rows * shape.S
        d_moments = [args[f"d_{name}"] for name in shape.moments]
        if shape.classes:
            reached = [args["all_logits"]]
            drawn = (args[name] for name in ("logits", "noise", "d_new_stoch"))
            self.sample_backward(shape.std, *drawn, *d_moments, *reached, size)
        else:
            reached = [
                self.slot(f"d_latent.{name}", (rows, shape.S), "scratch").at(0)
                for name in shape.moments
            ]
            self.launch(
                normal.backward_kernel,
                (-(-size // normal.BLOCK),),
                {
                    "noise": args["noise"], "d_sample": args["d_new_stoch"],
                    "d_mean": d_moments[0], "d_std": d_moments[1],
                    "all_mean": reached[0], "all_std": reached[1], "size": size,
                },
                {"BLOCK": normal.BLOCK},
            )  # fmt: skip
        self.mlp_backward(
            shape.latent, packed, reached[0], tape, grads, rows, d_x=(args["d_new_deter"], None),
            tape_width=shape.tape, grads_width=shape.grads, **_head(shape, d_std=reached[1:]),
        )  # fmt: skip

    def _activation_backward(
        self,
        shape: StagedShape,
        act: str,
        widths: tuple[int, int],  # of the layer and of a block
        at_slope: Arg,
        norm: Arg | None,
        stats: Arg | None,
        outer: Arg,
        inner: Arg,
        rows: int,
    ) -> None:
        self.launch(
            blocks.activation_backward_kernel,
            (rows,),
            {
                "at_slope": at_slope, "norm": norm, "stats": stats, "outer": outer, "inner": inner,
            },
            {
                "W": widths[0], "NP": widths[1], "TAPE": shape.tape, "GRADS": shape.grads,
                "ACT": act, "BN": _columns(widths[0]),
            },
        )  # fmt: skip

    def _layer_backward(
        self,
        shape: StagedShape,
        layer: LinearShape,
        packed: Weights,
        d: _Input,
        grads: Arg,
        rows: int,
    ) -> None:
        """The gradient by a piece of the input; that by deter is added to what is there."""
        tile = self._tile("layer_backward", rows)
        own = d.piece is layer.own
        self.launch(
            blocks.backward_kernel,
            (-(-rows // tile.rows), (layer.groups if own else 1) * -(-d.read // tile.columns)),
            {
                "weights": moved(packed.weights, d.piece.at), "grads": grads, "d_x": d.x,
                "rows": rows,
            },
            {
                "GROUPS": 1 if own else layer.groups, "K": d.read, "KP": layer.depth,
                "XS": d.width, "APART": d.apart, "TOTAL": layer.total, "GRADS": shape.grads,
                "ADD": own and not layer.chained, **_tile_constants(tile),
            },
            tile,
        )  # fmt: skip

    def _features_backward(
        self,
        shape: StagedShape,
        part: Features,
        packed: Weights,
        tape: Arg,
        grads: Arg,
        d_x: tuple[Arg, Arg | None],
        rows: int,
    ) -> None:
        """From the gradient by the last layer's values down; the layers below are an MLP's."""
        layers, width, norms = part.shape.layers, part.shape.width, packed.norms["norms"]
        places, last = part.shape.places, layers - 1
        sums = places.sums if part.shape.sums else 0
        self._activation_backward(
            shape, part.shape.act, (width, width), moved(tape, part.value + sums),
            norms and moved(norms, last * norm_columns(width)),
            norms and moved(tape, places.stats + 4 * last),
            moved(grads, part.outer), moved(grads, part.value), rows,
        )  # fmt: skip
        tile = self._tile("mlp_backward", rows, normed=bool(norms))
        absent = "noise", "action", "d_out", "d_std"
        self.launch(
            mlp.backward_kernel,
            (-(-rows // tile.rows),),
            {
                "weights": packed.weights, "norms": norms, **dict.fromkeys(absent),
                "tape": tape, "grads": grads, "d_x1": d_x[0], "d_x2": d_x[1], "rows": rows,
                "bound": 1.0, **build.NO_STD.scalars,
            },
            {
                **part.shape.constants(), **build.NO_STD.constants, "TAPE": shape.tape,
                "GRADS": shape.grads, "LAYERS": last, "N": width, "NP": width, "TOTAL": width,
                "HEAD": "ready", "BOUNDED": False, "SQUASH": "tanh",
                **_tile_constants(tile), "BO": tile.out(part.shape.padded[1]),
            },
            tile,
        )  # fmt: skip

    # gradients of weights ----------------------------------------------------------------------

    def step_gradients(
        self,
        shape: StepShape | StagedShape,
        latent: str,
        deter: Arg,
        stoch: Arg,
        action: Arg,
        new_deter: Arg,
        tape: Arg,
        grads: Arg,
        rows: int,
        *,
        first: Arg | None = None,
        more: tuple[Arg, int, int, int, None] | None = None,
    ) -> None:
        """See the base; deter, stoch and action are what the steps took, ``first`` is not asked."""
        if not isinstance(shape, StagedShape):
            super().step_gradients(
                shape, latent, deter, stoch, action, new_deter, tape, grads, rows,
                first=first, more=more,
            )  # fmt: skip
            return
        of_tape = _Row.of(shape, tape, shape.tapes)
        of_grads = _Row.of(shape, grads, shape.places)
        given = {
            "deter": (deter, shape.D, None), "stoch": (stoch, shape.S, None),
            "action": (action, shape.A, None),
        }  # fmt: skip
        for part, *at in zip(shape.features, of_tape.features, of_grads.features, strict=True):
            self.mlp_gradients(
                part.name, part.shape, [given[name] for name in part.of], *at, rows,
                places=_within(shape, part.shape),
            )  # fmt: skip
        for i, layer in enumerate(shape.layers):
            inputs = _inputs(shape, i, deter, of_tape, shape.tape, "value")
            at = of_tape.layers[i], of_grads.layers[i]
            self._layer_gradients(shape, layer, inputs, *at, rows)
        self.mlp_gradients(
            latent, shape.latent, [(new_deter, shape.D, None)], of_tape.latent, of_grads.latent,
            rows, places=_within(shape, shape.latent), more=more,
        )  # fmt: skip

    def _layer_gradients(
        self,
        shape: StagedShape,
        layer: LinearShape,
        inputs: list[_Input],
        tape: Arg,
        grads: Arg,
        rows: int,
    ) -> None:
        name, tile = layer.name.format, self._tile("gradient", rows)
        out_tiles = layer.groups * layer.gates * -(-layer.n // tile.columns)
        in_tiles = max(-(-given.piece.size // tile.depth) for given in inputs)
        splits, share = self._splits(rows, tile.rows, out_tiles * in_tiles)
        of_weight = w_parts, _ = self._parts(name("weight"), layer.shape, splits)
        of_bias = b_parts, _ = (None, None)
        if layer.biased:
            size = layer.groups * layer.gates * layer.n
            of_bias = b_parts, _ = self._parts(name("bias"), (size,), splits)
        for i, given in enumerate(inputs):
            self.launch(
                blocks.gradient_kernel,
                (out_tiles, -(-given.piece.size // tile.depth), splits),
                {
                    "grads": grads, "x": given.x,
                    "d_weight": w_parts.at(given.piece.begin * layer.strides["SK"]),
                    "d_bias": None if i or b_parts is None else b_parts.at(0),
                    "rows": rows, "share": share,
                },
                {
                    "GRADS": shape.grads, "XS": given.width, "APART": given.apart,
                    "K": given.piece.size, "SIZE": w_parts.numel // splits, **layer.strides,
                    **layer.constants, "GROUPS": layer.groups,
                    "BO": tile.columns, "BI": tile.depth, "BR": tile.rows,
                },
                tile,
            )  # fmt: skip
        self._sum_parts(of_weight, of_bias, splits=splits)
        self.norm_gradient(
            name("norm"), layer.norm, tape, grads,
            Places(shape.tape, shape.grads, 0, layer.stats, layer.outer), rows,
            index=0, n=layer.n, n_padded=layer.n_padded, groups=layer.groups * layer.gates,
        )  # fmt: skip


def _within(shape: StagedShape, mlp_shape: MlpShape) -> Places:
    """Where an MLP has what in rows that have more."""
    return mlp_shape.places._replace(tape=shape.tape, grads=shape.grads)


def _head(shape: StagedShape, **std: list[Arg]) -> dict[str, Any]:
    """What the kernels of the latent make of their sums."""
    (name, moments) = next(iter(std.items()))
    return {"head": "normal", name: moments[0], "normal": shape.std} if moments else {}


def _gate_args(shape: StagedShape, packed: Weights, tape: _Row) -> dict[str, Arg | None]:
    layer, norm = shape.layers[-1], packed.norms["norm"]
    return {
        "sums": tape.layers[0 if shape.torch else -1],
        "of_h": tape.layers[1] if shape.torch else None,
        "norm": norm, "stats": norm and moved(tape.layers[-1], layer.stats),
    }  # fmt: skip


def _gate_constants(shape: StagedShape) -> dict[str, Any]:
    layer = shape.layers[-1]
    return {letter.upper(): i for i, letter in enumerate(shape.gates)} | {
        "D": shape.D, "UNITS": layer.n, "NP": layer.n_padded, "W": layer.width,
        "UPDATE_BIAS": shape.update_bias,
    }  # fmt: skip


def _tile_constants(tile: build.tiles.Tile) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth}


def _columns(width: int) -> int:
    """Of a block of a row so wide: a power of two."""
    return min(blocks.COLUMNS, max(blocks.THREADS, build.power_of_two(width)))
