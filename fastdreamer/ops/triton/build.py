"""Pieces that the programs of the ops are built from: packing, forward, backward, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.cells import BlockGRUParams, GRUParams, Recurrence
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import Branches, ReturnParams
from fastdreamer.ops.triton import before, categorical, cells, mlp, readout, tiles, weights
from fastdreamer.ops.triton.layout import (
    NO_STD,
    Classes,
    MlpShape,
    NormShape,
    Places,
    Read,
    Std,
    StepShape,
    norm_columns,
)
from fastdreamer.ops.triton.program import Affine, Arg, Kernel, Launch, Loop, Program, Slot

COPY_BLOCK = 1024
PACK_BLOCK = 32
FILL = 264  # programs that fill a large GPU twice
NORM_BLOCK = 16, 64  # rows and columns of a block of the norms' gradients


class Weights(NamedTuple):
    """Packed parameters of one part of a program."""

    weights: Arg
    biases: Arg | None  # transposed weights have none
    norms: dict[str, Arg | None]  # by the kernels' names of them


class Action(NamedTuple):
    """What makes an actor of an MLP."""

    bound: float  # c of the mean c·tanh(x / c), inf: the mean as it is
    std: Std
    squash: str = "tanh"


class Precision(NamedTuple):
    """Of the products' operands and the tapes, and for which GPU the tiles are."""

    bf16: bool
    arch: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


class Builder:
    """A program in the making: slots and launches in order.

    Args:
        name: of the program.
        precision: of its products.
    """

    def __init__(self, name: str, precision: Precision) -> None:
        self.name, self.precision = name, precision
        self.slots: dict[str, Slot] = {}
        self.body: list[Launch | Loop] = []
        self._bodies: list[list[Launch | Loop]] = [self.body]

    def program(self) -> Program:
        return Program(self.name, list(self.slots.values()), self.body)

    # slots and launches ------------------------------------------------------------------------

    def slot(
        self,
        name: str,
        shape: Sequence[int],
        kind: str = "input",
        dtype: torch.dtype = torch.float32,
    ) -> Slot:
        """Add a slot, or return the one of that name."""
        if name not in self.slots:
            self.slots[name] = Slot(name, tuple(shape), dtype, kind)
        return self.slots[name]

    def operands(self, name: str, shape: Sequence[int], kind: str = "input") -> Slot:
        """A slot in the precision of the products."""
        return self.slot(name, shape, kind, self.precision.dtype)

    def launch(
        self,
        fn: Any,
        grid: Sequence[int],
        args: dict[str, Any],
        constants: dict[str, Any],
        tile: tiles.Tile | None = None,
        *,
        fuse: bool = True,
    ) -> None:
        """Launch a kernel; arguments that are None are None at compile time.

        ``fuse``: whether a · b + c may be rounded once.
        """
        constants = {k: v for k, v in constants.items() if k in fn.arg_names}
        constants |= {k: None for k, v in args.items() if v is None}
        args = {k: v for k, v in args.items() if v is not None}
        options: dict[str, Any] = {"enable_fp_fusion": fuse}
        if tile is not None:
            options |= {
                "num_warps": tile.warps,
                "num_stages": tile.stages,
                "maxnreg": tile.registers,
            }
        self.add(Launch(Kernel(fn, constants, **options), grid, args))

    def add(self, launch: Launch) -> None:
        self._bodies[-1].append(launch)

    def loop(self, name: str, count: int) -> _LoopScope:
        """``with builder.loop("t", H):`` launches inside go into the loop."""
        return _LoopScope(self, name, count)

    def _tile(self, kind: tiles.Kind, rows: int, *, normed: bool = False) -> tiles.Tile:
        return tiles.choose(kind, rows, **self.precision._asdict(), normed=normed)

    def copy(
        self,
        source: Slot | Arg | None,
        target: Slot | Arg,
        rows: int,
        width: int,
        *,
        repeat: int = 1,
        value: float = 0.0,
        add: bool = False,
    ) -> None:
        """Copy (or add) rows, each ``repeat`` times; without a source, set all to ``value``."""
        size = rows * repeat * width
        self.launch(
            weights.copy_kernel,
            (-(-size // COPY_BLOCK),),
            {"source": source, "target": target, "size": size, "value": value},
            {"WIDTH": width, "REPEAT": repeat, "ADD": add, "BLOCK": COPY_BLOCK},
        )

    def bound(self, action: Arg, grad: Arg | None, out: Arg, size: int) -> None:
        """Bound actions, or add what the gradient by bounded ones is by them."""
        self.launch(
            before.bound_kernel,
            (-(-size // before.BLOCK),),
            {"action": action, "grad": grad, "out": out, "size": size},
            {"BLOCK": before.BLOCK},
        )

    def bounded(self, action: Slot) -> Slot:
        """Bounded actions in scratch of their own."""
        out = self.slot(f"bounded.{action.name}", action.shape, "scratch")
        self.bound(action.at(0), None, out.at(0), action.numel)
        return out

    # parameters --------------------------------------------------------------------------------

    def mlp_slots(self, name: str, shape: MlpShape) -> list[tuple[Slot, Slot | None]]:
        """Of the inputs that :func:`named` fills: weight and bias of each layer."""
        slots = []
        for i, layer in enumerate(shape.all_layers()):
            rows = layer.groups * layer.n
            weight = self.slot(f"{name}.weight{i}", (rows, layer.columns))
            slots.append((weight, self.slot(f"{name}.bias{i}", (rows,)) if layer.biased else None))
        return slots

    def pack_mlp(self, name: str, shape: MlpShape, *, transposed: bool = False) -> Weights:
        """Pack an MLP into scratch of its own, for the forward or the backward kernels."""
        packed = self.operands(f"{name}.packed", (shape.weights,), "scratch")
        biases = None
        if not transposed:
            biases = self.slot(f"{name}.biases", (shape.biases,), "scratch").at(0)
        self._pack_layers(name, shape, packed, 0, biases and biases.slot, 0)
        return Weights(packed.at(0), biases, {"norms": self._pack_norms(name, shape)})

    def pack_step(
        self, name: str, shape: StepShape, latent: str, *, transposed: bool = False
    ) -> Weights:
        """Pack the dynamics; ``latent`` names the parameters of prior or posterior."""
        packed = self.operands(f"{name}.packed", (shape.weights,), "scratch")
        biases = None if transposed else self.slot(f"{name}.biases", (shape.biases,), "scratch")
        self._pack_layers("inp", shape.inp, packed, 0, biases, 0)
        self._pack_gru(shape, packed, biases)
        self._pack_layers(
            latent, shape.latent, packed, shape.latent_at, biases, shape.latent_bias_at
        )
        norms = {
            "i_norms": self._pack_norms("inp", shape.inp),
            "g_norm": self._pack_gate_norm(shape),
            "l_norms": self._pack_norms(latent, shape.latent),
        }
        return Weights(packed.at(0), biases and biases.at(0), norms)

    def pack_embed(self, shape: MlpShape, *, transposed: bool = False) -> Weights:
        """Pack the embedding's columns of the posterior's first weight; the bias is the step's."""
        packed = self.operands("embed.packed", (shape.weights,), "scratch")
        weight = self.slot("post.weight0", (shape.out, shape.columns))
        layer = shape.layer(0)
        self._pack(
            weight, None, packed.at(0), None, transposed,
            layer.columns, layer.begins, layer.pieces, layer.padded,
            layer.n, layer.n_padded, layer.groups,
        )  # fmt: skip
        norms = {"norms": None}
        if transposed:
            return Weights(packed.at(0), None, norms)
        biases = self.slot("embed.biases", (shape.biases,), "scratch")
        self.copy(None, biases, 1, shape.biases)
        return Weights(packed.at(0), biases.at(0), norms)

    def _pack_gru(self, shape: StepShape, packed: Slot, biases: Slot | None) -> None:
        hidden, D, DP = shape.inp.widths[-1], shape.D, shape.d_padded
        target = biases and biases.at(shape.gru_bias_at)
        sides = (
            (hidden, shape.inp.width, packed.at(shape.ih_at)),
            (D, DP, packed.at(shape.hh_at)),
        )
        if shape.late:
            weight = self.slot("gru.weight", (3 * D, hidden + D))
            bias = self.slot("gru.bias", (3 * D,)) if shape.late.biased else None
            for (columns, padded, at), begin in zip(sides, _begins(shape), strict=True):
                self._pack(
                    weight, bias, at, target, biases is None,
                    hidden + D, (begin, 0), (columns, 0), (padded, 0), D, DP, 3,
                )  # fmt: skip
                bias = target = None  # the first has it
            return
        for (columns, padded, at), side in zip(sides, ("ih", "hh"), strict=True):
            self._pack(
                self.slot(f"gru.weight_{side}", (3 * D, columns)), None, at, None, biases is None,
                columns, (0, 0), (columns, 0), (padded, 0), D, DP, 3,
            )  # fmt: skip
        if biases is not None:
            bias_ih, bias_hh = (self.slot(f"gru.bias_{side}", (3 * D,)) for side in ("ih", "hh"))
            self.launch(
                weights.pack_gru_bias_kernel,
                (-(-4 * DP // COPY_BLOCK),),
                {"bias_ih": bias_ih, "bias_hh": bias_hh, "biases": target},
                {"D": D, "DP": DP, "BLOCK": COPY_BLOCK},
            )

    def _pack_gate_norm(self, shape: StepShape) -> Arg | None:
        """That of a late GRU's gates, with or without a norm."""
        if shape.late is None:
            return None
        packed = self.slot("gru.norms", (norm_columns(shape.gate_columns),), "scratch").at(0)
        self._pack_norm("gru.norm", shape.late.norm, packed, shape.D, shape.d_padded, groups=3)
        return packed

    def norm_slots(self, name: str, norm: NormShape, size: int) -> tuple[Slot | None, Slot | None]:
        """Of the same inputs: weight and bias of a norm."""
        given = ("weight", norm.weight), ("bias", norm.bias)
        return tuple(self.slot(f"{name}.{part}", (size,)) if has else None for part, has in given)

    def _pack_norms(self, name: str, shape: MlpShape) -> Arg | None:
        """The norms of an MLP, each layer's behind the other's; None without."""
        if not shape.norms:
            return None
        packed = self.slot(f"{name}.norms", (shape.packed_norms,), "scratch")
        each = norm_columns(shape.width)
        for i, norm in enumerate(shape.norms):
            at = packed.at(i * each)
            self._pack_norm(f"{name}.norm{i}", norm, at, shape.widths[i], shape.width)
        return packed.at(0)

    def _pack_norm(
        self, name: str, norm: NormShape | None, packed: Arg, n: int, n_padded: int, groups: int = 1
    ) -> None:
        weight, bias = (None, None) if norm is None else self.norm_slots(name, norm, groups * n)
        self.launch(
            weights.pack_norm_kernel,
            (-(-norm_columns(groups * n_padded) // COPY_BLOCK),),
            {
                "weight": weight, "bias": bias, "packed": packed,
                "eps": norm.eps if norm else 0.0,
                "centred": 1.0 if norm and norm.kind == "layer" else 0.0,
                "normed": 1.0 if norm else 0.0,
            },
            {"N": n, "NP": n_padded, "GROUPS": groups, "BLOCK": COPY_BLOCK},
        )  # fmt: skip

    def _pack_layers(self, name, shape, packed, at, biases, bias_at) -> None:
        slots = self.mlp_slots(name, shape)
        for layer, (weight, bias) in zip(shape.all_layers(), slots, strict=True):
            target = biases and biases.at(bias_at + layer.bias_at)
            self._pack(
                weight, bias, packed.at(at + layer.at), target, biases is None,
                layer.columns, layer.begins, layer.pieces, layer.padded,
                layer.n, layer.n_padded, layer.groups,
            )  # fmt: skip

    def _pack(
        self, weight, bias, packed, biases, transposed, columns, begins, pieces, padded, n, np, g
    ) -> None:
        self.launch(
            weights.pack_kernel,
            (-(-sum(padded) // PACK_BLOCK), -(-g * np // PACK_BLOCK)),
            {
                "weight": weight,
                "bias": bias if biases is not None else None,
                "packed": None if transposed else packed,
                "transposed": packed if transposed else None,
                "biases": biases,
            },
            {
                "IN": columns, "FIRST1": begins[0], "K1": pieces[0], "K1P": padded[0],
                "FIRST2": begins[1], "K2": pieces[1], "K2P": padded[1], "N": n, "NP": np,
                "GROUPS": g, "BLOCK_K": PACK_BLOCK, "BLOCK_N": PACK_BLOCK,
            },
        )  # fmt: skip

    # MLPs --------------------------------------------------------------------------------------

    def mlp_forward(
        self,
        shape: MlpShape,
        packed: Weights,
        x: tuple[Arg, Arg | None],
        out: Arg,
        tape: Arg,
        rows: int,
        *,
        save: bool,
        columns: int | None = None,
        tape_width: int | None = None,
        extra: Arg | None = None,
        head: str = "plain",
        std: Arg | None = None,
        noise: Arg | None = None,
        action: Action | None = None,
        normal: Std = NO_STD,
    ) -> None:
        tile = self._tile("mlp", rows, normed=bool(shape.norms))
        bound, normal, squash = action or (float("inf"), normal, "tanh")
        bounded = bound != float("inf")
        self.launch(
            mlp.forward_kernel,
            (-(-rows // tile.rows),),
            {
                "weights": packed.weights, "biases": packed.biases, **packed.norms,
                "x1": x[0], "x2": x[1], "extra": extra,
                "noise": noise, "out": out, "std": std, "tape": tape, "rows": rows,
                "bound": bound if bounded else 1.0, **normal.scalars,
            },
            {
                **shape.constants(save=save), **normal.constants,
                "TAPE": tape_width or shape.tape, "HEAD": head,
                "OUT": columns or shape.n,
                "BOUNDED": bounded, "SQUASH": squash, "SAVE": save, **_blocks(tile, shape),
            },
            tile,
        )  # fmt: skip

    def mlp_backward(
        self,
        shape: MlpShape,
        packed: Weights,
        d_out: Arg | None,
        tape: Arg,
        grads: Arg,
        rows: int,
        *,
        d_x: tuple[Arg | None, Arg | None] = (None, None),
        tape_width: int | None = None,
        grads_width: int | None = None,
        head: str = "plain",
        d_std: Arg | None = None,
        noise: Arg | None = None,
        drawn: Arg | None = None,
        action: Action | None = None,
        normal: Std = NO_STD,
    ) -> None:
        tile = self._tile("mlp_backward", rows, normed=bool(shape.norms))
        bound, normal, squash = action or (float("inf"), normal, "tanh")
        bounded = bound != float("inf")
        self.launch(
            mlp.backward_kernel,
            (-(-rows // tile.rows),),
            {
                "weights": packed.weights, **packed.norms,
                "noise": noise, "action": drawn, "d_out": d_out,
                "d_std": d_std, "tape": tape, "grads": grads, "d_x1": d_x[0], "d_x2": d_x[1],
                "rows": rows, "bound": bound if bounded else 1.0, **normal.scalars,
            },
            {
                **shape.constants(), **normal.constants, "TAPE": tape_width or shape.tape,
                "GRADS": grads_width or shape.grads, "HEAD": head,
                "BOUNDED": bounded, "SQUASH": squash, **_blocks(tile, shape),
            },
            tile,
        )  # fmt: skip

    def head_forward(
        self,
        shape: MlpShape,
        packed: Weights,
        x: tuple[Arg, Arg | None],
        out: Slot,
        tape: Slot,
        rows: int,
        *,
        save: bool,
        read: Read | None,
        bins: str,
    ) -> None:
        """The numbers of a head, ``out`` [rows]; with ``read`` of its outputs ``out.raw``.

        ``bins`` names the input that has them, where there are any.
        """
        if read is None:
            self.mlp_forward(shape, packed, x, out.at(0), tape.at(0), rows, save=save)
            return
        raw = self.slot(f"{out.name}.raw", (rows, shape.n), "output" if save else "scratch")
        self.mlp_forward(shape, packed, x, raw.at(0), tape.at(0), rows, save=save)
        self._read_out(readout.forward_kernel, read, bins, shape.n, rows, raw=raw, out=out)

    def head_backward(
        self,
        shape: MlpShape,
        packed: Weights,
        of: str,
        d_out: Slot,
        tape: Slot,
        grads: Slot,
        rows: int,
        *,
        d_x: tuple[Arg | None, Arg | None] = (None, None),
        read: Read | None,
        bins: str,
    ) -> None:
        """``of`` is the name of what was ``out``."""
        if read is not None:
            size = rows, shape.n
            raw, d_raw = self.slot(f"{of}.raw", size), self.slot(f"d_{of}.raw", size, "scratch")
            self._read_out(
                readout.backward_kernel, read, bins, shape.n, rows,
                raw=raw, d_out=d_out, d_raw=d_raw,
            )  # fmt: skip
            d_out = d_raw
        self.mlp_backward(shape, packed, d_out.at(0), tape.at(0), grads.at(0), rows, d_x=d_x)

    def _read_out(self, kernel, read: Read, bins: str, n: int, rows: int, **slots: Slot) -> None:
        padded = power_of_two(n)
        block = max(1, readout.BLOCK // padded)
        self.launch(
            kernel,
            (-(-rows // block),),
            {**slots, "bins": self.slot(bins, (n,)) if read.bins else None, "rows": rows},
            {"N": n, "NP": padded, "SQUASHED": read.squashed, "BR": block},
            fuse=False,
        )

    def mlp_gradients(
        self,
        name: str,
        shape: MlpShape,
        x: Sequence[tuple[Arg, int, Arg | None]],
        tape: Arg,
        grads: Arg,
        rows: int,
        *,
        places: Places | None = None,
        more: tuple[Arg, int, int, int, None] | None = None,
    ) -> None:
        """Outputs ``d_`` and the parameter's name for each of an MLP's parameters.

        ``x`` holds each piece of the input, its columns and the rows that were zeroed; ``tape`` and
        ``grads`` begin at the MLP's hidden layers, ``places`` says where they have what, None: as
        those of the MLP by itself. ``more`` is a further piece of the input, as in
        :meth:`gradient`.
        """
        places = places or shape.places
        for i, layer in enumerate(shape.all_layers()):
            if i == 0:
                pieces = [
                    (arg, width, size, begin, first)
                    for (arg, width, first), size, begin in zip(
                        x, layer.pieces, layer.begins, strict=False
                    )
                ] + ([more] if more else [])
            else:
                below = moved(tape, (i - 1) * shape.width)
                pieces = [(below, places.tape, layer.columns, 0, None)]
            self.gradient(
                f"{name}.weight{i}", f"{name}.bias{i}" if layer.biased else None,
                moved(grads, i * shape.width), places.grads, pieces, rows,
                columns=layer.columns, n=layer.n, n_padded=layer.n_padded, groups=layer.groups,
            )  # fmt: skip
        for i, norm in enumerate(shape.norms):
            self.norm_gradient(
                f"{name}.norm{i}", norm, tape, grads, places, rows,
                index=i, n=shape.widths[i], n_padded=shape.width,
            )  # fmt: skip

    def norm_gradient(
        self,
        name: str,
        norm: NormShape | None,
        tape: Arg,
        grads: Arg,
        places: Places,
        rows: int,
        *,
        index: int,
        n: int,
        n_padded: int,
        groups: int = 1,
    ) -> None:
        """Outputs for the parameters of the norm number ``index`` of those that ``places`` has."""
        if norm is None or not (norm.weight or norm.bias):
            return
        depth, columns = NORM_BLOCK
        tiles_out = -(-groups * n // columns)
        splits, share = self._splits(rows, depth, tiles_out)
        of_weight, of_bias = (
            self._parts(f"{name}.{part}", (groups * n,), splits) if has else (None, None)
            for part, has in (("weight", norm.weight), ("bias", norm.bias))
        )
        self.launch(
            weights.norm_gradient_kernel,
            (tiles_out, splits),
            {
                "outer": moved(grads, places.outer + index * n_padded),
                "sums": moved(tape, places.sums + index * n_padded),
                "stats": moved(tape, places.stats + 4 * index),
                "d_weight": of_weight[0], "d_bias": of_bias[0], "rows": rows, "share": share,
            },
            {
                "GRADS": places.grads, "TAPE": places.tape, "N": n, "NP": n_padded,
                "GROUPS": groups, "BO": columns, "BR": depth,
            },
        )  # fmt: skip
        self._sum_parts(of_weight, of_bias, splits=splits)

    def begin_gradient(self, name: str, first: Arg, d_out: Arg, rows: int, size: int) -> None:
        """The output for the input ``name``, what episodes begin with; a sum in a fixed order."""
        tiles_out = -(-size // before.COLUMNS)
        splits, share = self._splits(rows, before.ROWS, tiles_out)
        found = parts, _ = self._parts(name, (1, size), splits)
        self.launch(
            before.begin_gradient_kernel,
            (tiles_out, splits),
            {"first": first, "d_out": d_out, "d_begin": parts, "rows": rows, "share": share},
            {"WIDTH": size, "ROWS": before.ROWS, "COLUMNS": before.COLUMNS},
        )
        self._sum_parts(found, splits=splits)

    @staticmethod
    def _splits(rows: int, depth: int, programs: int) -> tuple[int, int]:
        """Into how many splits a sum over rows is divided, and the rows of each.

        ``depth`` is of a block of rows, ``programs`` how many there are without splits.
        """
        splits = max(1, min(-(-rows // (8 * depth)), FILL // programs))
        share = -(-rows // (splits * depth)) * depth
        return -(-rows // share), share

    def _parts(self, name: str, shape: tuple[int, ...], splits: int) -> tuple[Slot, Slot]:
        """Where splits of a gradient go, and the output itself: both are one without splits."""
        total = self.slot(f"d_{name}", shape, "output")
        if splits == 1:
            return total, total
        return self.slot(f"{name}.parts", (splits, *shape), "scratch"), total

    def _sum_parts(self, *gradients: tuple[Slot | None, Slot | None], splits: int) -> None:
        for parts, total in gradients if splits > 1 else ():
            if total is not None:
                self.launch(
                    weights.sum_kernel,
                    (-(-total.numel // COPY_BLOCK),),
                    {"parts": parts, "total": total, "size": total.numel},
                    {"SPLITS": splits, "BLOCK": COPY_BLOCK},
                )

    def gradient(
        self,
        weight: str,
        bias: str | None,
        grads: Arg,
        grads_width: int,
        pieces: Sequence[tuple[Arg, int, int, int, Arg | None]],
        rows: int,
        *,
        columns: int,
        n: int,
        n_padded: int,
        groups: int,
        last: int = 0,
    ) -> None:
        """The gradient of one weight and its bias, summed over rows in a fixed order.

        A piece of the input: where it is, its width, the columns used, where in the weight they
        begin, and which rows were zeroed.
        """
        tile = self._tile("gradient", rows)
        out_tiles = groups * -(-n // tile.columns)
        in_tiles = max(-(-size // tile.depth) for _, _, size, *_ in pieces)
        splits, share = self._splits(rows, tile.rows, out_tiles * in_tiles)
        of_weight = w_parts, _ = self._parts(weight, (groups * n, columns), splits)
        of_bias = b_parts, _ = self._parts(bias, (groups * n,), splits) if bias else (None, None)
        for i, (x, width, size, begin, first) in enumerate(pieces):
            self.launch(
                weights.gradient_kernel,
                (out_tiles, -(-size // tile.depth), splits),
                {
                    "grads": grads, "x": x, "first": first, "d_weight": w_parts.at(begin),
                    "d_bias": None if i or b_parts is None else b_parts.at(0),
                    "rows": rows, "share": share,
                },
                {
                    "GRADS": grads_width, "XS": width, "K": size, "IN": columns, "N": n,
                    "NP": n_padded, "GROUPS": groups, "LAST": last,
                    "BO": tile.columns, "BI": tile.depth, "BR": tile.rows,
                },
                tile,
            )  # fmt: skip
        self._sum_parts(of_weight, of_bias, splits=splits)

    # steps -------------------------------------------------------------------------------------

    def step_forward(
        self, shape: StepShape, packed: Weights, args: dict[str, Any], rows: int, *, save: bool
    ) -> None:
        """A step of the dynamics; ``args`` are the tensors of ``cells.forward_kernel``.

        Where the latents are categorical ``logits`` are in the place of mean and std.
        """
        tile = self._tile("step", rows, normed=shape.normed)
        optional = dict.fromkeys(("first", "extra", "mean", "std"))
        drawn: dict[str, Any] = {}
        if shape.classes:
            drawn = {name: args[name] for name in ("logits", "noise", "new_stoch")}
            args = {name: arg for name, arg in args.items() if name not in drawn}
            optional |= {"mean": drawn["logits"], "noise": None, "new_stoch": None}
        self.launch(
            cells.forward_kernel,
            (-(-rows // tile.rows),),
            {
                "weights": packed.weights, "biases": packed.biases, **packed.norms,
                **optional, **args,
                "rows": rows, **shape.std.scalars,
            },
            {**shape.constants(save=save), "SAVE": save, **_step_blocks(tile, shape)},
            tile,
        )  # fmt: skip
        if drawn:
            self.sample(shape.std, *drawn.values(), rows * shape.S)

    def step_backward(
        self, shape: StepShape, packed: Weights, args: dict[str, Any], rows: int
    ) -> None:
        """Its gradient; ``args`` are the tensors of ``cells.backward_kernel``.

        Of categorical latents ``logits``, the ``noise`` of Gumbel-softmax samples, what reaches the
        logits beside the samples, ``d_logits``, and ``all_logits``, where all that does is written.
        """
        tile = self._tile("step_backward", rows, normed=shape.normed)
        optional = dict.fromkeys(("first", "d_mean", "d_std"))
        if shape.classes:
            names = "logits", "noise", "d_new_stoch", "d_logits", "all_logits"
            drawn = [args[name] for name in names]
            args = {name: arg for name, arg in args.items() if name not in names}
            self.sample_backward(shape.std, *drawn, rows * shape.S)
            optional |= {"d_mean": drawn[-1], "d_new_stoch": None, "noise": None}
        self.launch(
            cells.backward_kernel,
            (-(-rows // tile.rows),),
            {
                "weights": packed.weights, **packed.norms, **optional, **args,
                "rows": rows, **shape.std.scalars,
            },
            {**shape.constants(), "GRADS": shape.grads, **_step_blocks(tile, shape)},
            tile,
        )  # fmt: skip

    def sampling(
        self, shape: StepShape, noise: str, logits: str, lead: tuple[int, int]
    ) -> Callable[[Affine], dict[str, Any]]:
        """What :meth:`step_backward` is told of the samples of each row of [steps, rows].

        Args:
            noise, logits: the slots that have the noise, and the logits of categorical latents.
            lead: steps and rows.
        """
        by_noise = not shape.classes or shape.std.gumbel
        drawn = self.slot(noise, (*lead, shape.S)) if by_noise else None
        if not shape.classes:
            return lambda row: {"noise": drawn.at(row * shape.S)}
        found = self.slot(logits, (*lead, shape.S))
        room = self.slot(f"all.{logits}", (lead[1], shape.S), "scratch")
        return lambda row: {
            "logits": found.at(row * shape.S), "noise": drawn and drawn.at(row * shape.S),
            "all_logits": room.at(0),
        }  # fmt: skip

    def sample(self, latent: Classes, logits: Arg, noise: Arg, sample: Arg, size: int) -> None:
        """One-hot vectors of the logits, both of ``size`` numbers."""
        items, blocks = _categoricals(latent, size)
        self.launch(
            categorical.gumbel_sample_kernel if latent.gumbel else categorical.sample_kernel,
            (-(-items // blocks["BI"]),),
            {
                "logits": logits, "noise": noise, "sample": sample, "items": items,
                "keep": 1.0 - latent.unimix, "each": latent.unimix / latent.count,
            },
            blocks,
        )  # fmt: skip

    def sample_backward(
        self,
        latent: Classes,
        logits: Arg,
        noise: Arg | None,
        d_sample: Arg,
        d_more: Arg | None,
        d_logits: Arg,
        size: int,
    ) -> None:
        """Write what reaches the logits by the samples and, where it is given, beside them.

        Gumbel-softmax samples alone have ``noise``.
        """
        items, blocks = _categoricals(latent, size)
        args = {
            "logits": logits, "d_sample": d_sample, "d_more": d_more, "d_logits": d_logits,
            "items": items, "keep": 1.0 - latent.unimix,
        }  # fmt: skip
        kernel = categorical.backward_kernel
        if latent.gumbel:
            kernel = categorical.gumbel_backward_kernel
            args |= {"noise": noise, "each": latent.unimix / latent.count}
        self.launch(kernel, (-(-items // blocks["BI"]),), args, blocks)

    def step_gradients(
        self,
        shape: StepShape,
        latent: str,
        deter: Arg,  # [rows, D] before the step
        stoch: Arg,
        action: Arg,
        new_deter: Arg,  # [rows, D] behind it
        tape: Arg,
        grads: Arg,
        rows: int,
        *,
        first: Arg | None = None,
        more: tuple[Arg, int, int, int, None] | None = None,
    ) -> None:
        """Outputs for the parameters of the dynamics and of ``latent``."""
        T, G, D, DP = shape.tape, shape.grads, shape.D, shape.d_padded
        of_deter, of_stoch, of_action = (first if zeroed else None for zeroed in shape.resets)
        self.mlp_gradients(
            "inp", shape.inp, [(stoch, shape.S, of_stoch), (action, shape.A, of_action)],
            tape, grads, rows, places=shape.inp_places,
        )  # fmt: skip
        gates = moved(grads, shape.gates)
        x = moved(tape, (shape.inp.layers - 1) * shape.inp.width)
        hidden = shape.inp.widths[-1]
        sides = (x, T, hidden, 0, None), (deter, D, D, 0, of_deter)
        of_gates: dict[str, Any] = {"n": D, "n_padded": DP, "groups": 3}
        if shape.late:
            pieces = [
                (*piece[:3], begin, piece[4])
                for piece, begin in zip(sides, _begins(shape), strict=True)
            ]
            bias = "gru.bias" if shape.late.biased else None
            self.gradient(
                "gru.weight", bias, gates, G, pieces, rows, columns=hidden + D, **of_gates
            )
            self.norm_gradient(
                "gru.norm", shape.late.norm, moved(tape, shape.gates), gates, shape.gru_places,
                rows, index=0, **of_gates,
            )  # fmt: skip
        else:
            for side, piece, last in zip(("ih", "hh"), sides, (0, DP), strict=True):
                self.gradient(
                    f"gru.weight_{side}", f"gru.bias_{side}", gates, G, [piece], rows,
                    columns=piece[2], last=last, **of_gates,
                )  # fmt: skip
        self.mlp_gradients(
            latent, shape.latent, [(new_deter, D, None)], moved(tape, shape.latents),
            moved(grads, shape.latents), rows, places=shape.latent_places, more=more,
        )  # fmt: skip


class _LoopScope:
    def __init__(self, builder: Builder, name: str, count: int) -> None:
        self.builder, self.name, self.count = builder, name, count
        self.index = Affine()

    def __enter__(self) -> Affine:
        from fastdreamer.ops.triton.program import index

        self.builder._bodies.append([])
        return index(self.name)

    def __exit__(self, *raised: Any) -> None:
        body = self.builder._bodies.pop()
        self.builder._bodies[-1].append(Loop(self.name, self.count, body))


def power_of_two(n: int) -> int:
    """The least that is at least n and 2."""
    return 1 << max(n - 1, 1).bit_length()


def _categoricals(latent: Classes, size: int) -> tuple[int, dict[str, int]]:
    """How many there are, and the blocks of their kernels."""
    padded = power_of_two(latent.count)
    block = max(1, categorical.BLOCK // padded)
    return size // latent.count, {"K": latent.count, "KP": padded, "BI": block}


def _begins(shape: StepShape) -> tuple[int, int]:
    """The columns of a late GRU's weight where those of x and of h begin."""
    return (shape.D, 0) if shape.late.deter_first else (0, shape.inp.widths[-1])


def moved(pointer: Arg, columns: int) -> Arg:
    return pointer._replace(offset=pointer.offset + columns)


def _blocks(tile: tiles.Tile, shape: MlpShape) -> dict[str, int]:
    out = tile.out(max(shape.n_padded, shape.padded[1]))
    return {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BO": out}


def _step_blocks(tile: tiles.Tile, shape: StepShape) -> dict[str, int]:
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BG": tile.gates,
        "BS": tile.out(shape.latent.n_padded),
    }  # fmt: skip


def named(name: str, params: MLPParams | Branches) -> dict[str, Tensor]:
    """An MLP's parameters by the names of a program's inputs."""
    if isinstance(params, Branches):
        return {**named(f"{name}.stoch", params.stoch), **named(f"{name}.action", params.action)}
    found: dict[str, Tensor | None] = {}
    for i, pair in enumerate(zip(params.weights, params.biases, strict=True)):
        found |= zip((f"{name}.weight{i}", f"{name}.bias{i}"), pair, strict=True)
    for i, norm in enumerate(params.norms):
        if norm is not None:
            found |= {f"{name}.norm{i}.weight": norm.weight, f"{name}.norm{i}.bias": norm.bias}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def gru_named(params: Recurrence) -> dict[str, Tensor]:
    """The same of a recurrence."""
    if isinstance(params, BlockGRUParams):
        return {**named("gru.hidden", params.hidden), **named("gru.blocks", params.blocks)}
    if isinstance(params, GRUParams):
        return {f"gru.{key}": value for key, value in params._asdict().items()}
    found = {"weight": params.weight, "bias": params.bias}
    if params.norm is not None:
        found |= {"norm.weight": params.norm.weight, "norm.bias": params.norm.bias}
    return {f"gru.{key}": value for key, value in found.items() if value is not None}


def bins_of(returns: ReturnParams) -> dict[str, Tensor]:
    """The bins of the heads that have some, likewise."""
    given = {"reward.bins": returns.reward_as.bins, "value.bins": returns.value_as.bins}
    like = returns.reward.weights[0]
    return {name: bins.to(like) for name, bins in given.items() if bins is not None}


def autocast_bf16(device: torch.device) -> bool:
    """Whether the call is under autocast to bfloat16, which the kernels take as their precision."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def first_order(backward: Callable) -> Callable:
    """Decorate a node's backward pass, which autograd cannot differentiate again."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # only where gradients are to have gradients
            raise RuntimeError("triton gradients have none of their own: choose backend='eager'")
        return backward(ctx, *grads)

    return checked
