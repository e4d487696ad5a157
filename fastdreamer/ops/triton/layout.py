"""Where packed weights, tapes and their gradients lie; see :mod:`fastdreamer.ops.triton.device`.

Everything here is a number or a name and hashable, so that it can be the key of a program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from fastdreamer.ops.cells import BlockGRUParams, GRUParams, LateGRUParams, Recurrence
from fastdreamer.ops.layers import MLPParams, Norm
from fastdreamer.ops.params import (
    STDS,
    Branches,
    Categorical,
    Readout,
    RSSMParams,
    StdTransform,
)

OF_SUM = ("silu", "gelu", "gelu_tanh", "mish")
"""Activations whose slope is computed from a layer's sum, not its value."""


def pad(n: int) -> int:
    """The next multiple of 16: the least size of a matrix instruction, and 32 bytes of bfloat16."""
    return -(-n // 16) * 16


class Std(NamedTuple):
    """How a sum becomes a standard deviation; see ``device.std_of``."""

    kind: str
    scale: float
    slope: float
    offset: float
    least: float
    floor: float

    @property
    def scalars(self) -> dict[str, float]:
        return {
            "scale": self.scale,
            "slope": self.slope,
            "offset": self.offset,
            "least": self.least,
            "floor": self.floor,
        }

    @property
    def constants(self) -> dict[str, object]:
        return {"STD": self.kind}


class Classes(NamedTuple):
    """Of each categorical, and how much of the uniform distribution is mixed in."""

    count: int
    unimix: float
    gumbel: bool = False  # Gumbel-softmax samples

    def noise(self, size: int) -> int:
        """Numbers that a sample of so many takes, as ``params.noise_size``."""
        return size if self.gumbel else size // self.count

    @property
    def scalars(self) -> dict[str, float]:
        return NO_STD.scalars

    @property
    def constants(self) -> dict[str, object]:
        return {"STD": "logits"}


class Read(NamedTuple):
    """How a head's outputs become one number."""

    bins: bool
    squashed: bool

    @staticmethod
    def of(readout: Readout, head: MLPParams | None) -> Read | None:
        """None where its only output is the number."""
        bins, squashed = readout
        if head is None or (bins is None and not squashed and head.outputs == 1):
            return None
        return Read(bins is not None, squashed)


NO_STD = Std("softplus", 0.0, 0.0, 0.0, 0.0, 0.0)


class NormShape(NamedTuple):
    """A norm without its tensors."""

    kind: str
    weight: bool
    bias: bool
    eps: float

    @staticmethod
    def of(norm: Norm | None) -> NormShape | None:
        if norm is None:
            return None
        kind, weight, bias, eps = norm
        return NormShape(kind, weight is not None, bias is not None, float(eps))


def norm_columns(width: int) -> int:
    """Of a packed norm: gains, shifts, and the numbers of ``device.moments``."""
    return 2 * width + 16


class Places(NamedTuple):
    """Where an MLP's columns are in tapes and ``grads``, counted from the first hidden layer's."""

    tape: int  # columns of a row
    grads: int
    sums: int  # of the hidden layers' sums in the tape, where it has them
    stats: int  # of what norms computed of those
    outer: int  # in grads, of the gradients behind norms

    def constants(self, prefix: str, *, sums: bool) -> dict[str, int]:
        """What kernels want to know; with ``sums`` 0 where they are not written or read."""
        return {
            f"{prefix}PRE": self.sums if sums else 0,
            f"{prefix}STATS": self.stats,
            f"{prefix}OUTER": self.outer,
        }


class MlpShape(NamedTuple):
    """An MLP whose input comes in one or two pieces; its hidden layers share one padded width."""

    pieces: tuple[int, int]  # columns of each piece; the second may be 0
    begins: tuple[int, int]  # where they begin in the first weight
    columns: int  # of the first weight
    widths: tuple[int, ...]  # of every layer but the last
    out: int  # of the last layer, 0: there is none and the hidden layers are the output
    groups: int  # 2 where the output is [mean, std], each padded by itself
    act: str
    biased: tuple[bool, ...]  # of every layer
    norms: tuple[NormShape | None, ...] = ()  # of every hidden layer; () is none
    least: int = 0  # padded columns of a group of the output, at least

    @property
    def layers(self) -> int:
        return len(self.widths)

    @property
    def width(self) -> int:
        return pad(max(self.widths, default=1))

    @property
    def padded(self) -> tuple[int, int]:
        return pad(self.pieces[0]), pad(self.pieces[1])

    @property
    def depth(self) -> int:
        return sum(self.padded)

    @property
    def n(self) -> int:
        return self.out // self.groups

    @property
    def n_padded(self) -> int:
        return max(pad(self.n), self.least)

    @property
    def total(self) -> int:
        """Padded columns of the output."""
        return self.groups * self.n_padded

    @property
    def sums(self) -> bool:
        """Whether tapes keep the hidden layers' sums beside what became of them."""
        return self.layers > 0 and (self.act in OF_SUM or bool(self.norms))

    @property
    def hidden(self) -> int:
        """Columns of all hidden layers."""
        return self.layers * self.width

    @property
    def stats(self) -> int:
        """Columns of the tape for what norms computed, see ``device.keep_moments``."""
        return pad(4 * self.layers) if self.norms else 0

    @property
    def places(self) -> Places:
        """Of an MLP by itself."""
        sums = self.hidden + (self.total if self.groups == 2 else 0)
        stats = sums + (self.hidden if self.sums else 0)
        tape = max(stats + self.stats, 16)  # never empty
        return Places(tape, self.grads, sums, stats, self.hidden + self.total)

    @property
    def tape(self) -> int:
        return self.places.tape

    @property
    def grads(self) -> int:
        return self.hidden + self.total + self.outer

    @property
    def outer(self) -> int:
        """Columns of gradients behind norms."""
        return self.hidden if self.norms else 0

    def writes_sums(self, save: bool) -> bool:
        """Whether a kernel does, which norms then read."""
        return bool(self.norms) or (self.sums and save)

    @property
    def first_output(self) -> int:
        """Padded columns of the first layer's output."""
        return self.width if self.layers else self.total

    def layer(self, i: int) -> Layer:
        """Layer i; ``layers`` is the last one."""
        first, last = i == 0, i == self.layers
        pieces, begins = self.pieces, self.begins
        padded, columns = self.padded, self.columns
        if not first:
            columns = self.widths[i - 1]
            pieces, begins, padded = (columns, 0), (0, 0), (self.width, 0)
        before = (self.depth + (i - 1) * self.width) * self.width if i else 0
        return Layer(
            pieces, begins, padded, columns,
            self.n if last else self.widths[i],
            self.n_padded if last else self.width,
            self.groups if last else 1,
            before, i * self.width, self.biased[i],
        )  # fmt: skip

    def all_layers(self) -> list[Layer]:
        return [self.layer(i) for i in range(self.layers + (self.out > 0))]

    @property
    def weights(self) -> int:
        """Elements of the packed weights."""
        last = self.all_layers()[-1]
        return last.at + sum(last.padded) * last.groups * last.n_padded

    @property
    def biases(self) -> int:
        return self.hidden + self.total

    @property
    def packed_norms(self) -> int:
        """Elements of the packed norms."""
        return self.layers * norm_columns(self.width) if self.norms else 0

    def constants(self, *, save: bool = True) -> dict[str, object]:
        """What the kernels of ``mlp.py`` want to know."""
        return {
            "K1": self.pieces[0], "K1P": self.padded[0], "K2": self.pieces[1],
            "K2P": self.padded[1], "W": self.width, "LAYERS": self.layers, "N": self.n,
            "NP": self.n_padded, "TAPE": self.tape, "ACT": self.act, "TOTAL": self.total,
            **self.places.constants("", sums=self.writes_sums(save)),
        }  # fmt: skip


class Layer(NamedTuple):
    """One weight and its place in the packed ones."""

    pieces: tuple[int, int]
    begins: tuple[int, int]
    padded: tuple[int, int]
    columns: int  # of the weight
    n: int  # rows of a group
    n_padded: int
    groups: int
    at: int  # first element of the packed weights
    bias_at: int
    biased: bool


def mlp_shape(
    params: MLPParams,
    pieces: tuple[int, int],
    begins: tuple[int, int] | None = None,
    *,
    groups: int = 1,
    hidden_only: bool = False,
) -> MlpShape:
    """The shape of an MLP's parameters.

    Args:
        params: the layers.
        pieces: columns of each piece of the input.
        begins: where the pieces begin in the first weight; None: one behind the other.
        groups: 2 where the output is [mean, std].
        hidden_only: whether the activation follows the last layer, too.
    """
    sizes = tuple(len(weight) for weight in params.weights)
    widths, out = (sizes, 0) if hidden_only else (sizes[:-1], sizes[-1])
    columns = params.weights[0].shape[1]
    begins = (0, pieces[0]) if begins is None else begins
    biased = tuple(bias is not None for bias in params.biases)
    norms = tuple(NormShape.of(norm) for norm in params.norms)
    norms = norms if any(norms) else ()
    return MlpShape(pieces, begins, columns, widths, out, groups, params.activation, biased, norms)


class LateShape(NamedTuple):
    """A GRU whose reset is inside its candidate."""

    biased: bool
    norm: NormShape | None
    deter_first: bool
    gates: str  # the order of the rows: r, c, u
    update_bias: float

    @staticmethod
    def of(params: Recurrence) -> LateShape | None:
        """None of torch's GRU."""
        if not isinstance(params, LateGRUParams):
            return None
        _, bias, norm, deter_first, gates, update_bias = params
        norm = NormShape.of(norm)
        return LateShape(bias is not None, norm, deter_first, gates, float(update_bias))

    @property
    def constants(self) -> dict[str, object]:
        return {letter.upper(): i for i, letter in enumerate(self.gates)} | {
            "LATE": True,
            "UPDATE_BIAS": self.update_bias,
        }


_TORCH_GRU = {"R": 0, "C": 0, "U": 0, "LATE": False, "UPDATE_BIAS": 0.0}


class StepShape(NamedTuple):
    """The dynamics with their prior or posterior."""

    A: int
    D: int
    S: int
    inp: MlpShape  # stoch, action -> hidden layers
    late: LateShape | None  # None: torch's GRU
    latent: MlpShape  # deter -> mean, std, or logits
    std: Std | Classes
    resets: tuple[bool, bool, bool]  # whether the start of an episode zeroes deter, stoch, action
    bound: bool  # whether actions are bounded before the step takes them

    @property
    def classes(self) -> int:
        """Of each categorical latent; 0: they are Gaussian."""
        return self.std.count if isinstance(self.std, Classes) else 0

    @property
    def noise(self) -> int:
        """Numbers that a sample takes."""
        return self.std.noise(self.S) if self.classes else self.S

    @property
    def moments(self) -> tuple[str, ...]:
        """What says how the latents are distributed, [rows, S] each."""
        return ("logits",) if self.classes else ("mean", "std")

    @property
    def d_padded(self) -> int:
        return pad(self.D)

    @property
    def normed(self) -> bool:
        """Whether something in it has a norm."""
        return bool(self.inp.norms or self.latent.norms or self.late)

    @property
    def gates(self) -> int:
        """The first column of the GRU in tape and grads."""
        return self.inp.hidden

    @property
    def gate_columns(self) -> int:
        """Columns of the GRU in tape and grads, and its biases."""
        return (3 if self.late else 4) * self.d_padded

    @property
    def latents(self) -> int:
        """The first column of the latent's hidden layers."""
        return self.gates + self.gate_columns

    @property
    def ih_at(self) -> int:
        """Where the packed W_ih begins."""
        return self.inp.weights

    @property
    def hh_at(self) -> int:
        return self.ih_at + self.inp.width * 3 * self.d_padded

    @property
    def latent_at(self) -> int:
        return self.hh_at + self.d_padded * 3 * self.d_padded

    @property
    def weights(self) -> int:
        return self.latent_at + self.latent.weights

    @property
    def gru_bias_at(self) -> int:
        return self.inp.biases

    @property
    def latent_bias_at(self) -> int:
        return self.gru_bias_at + self.gate_columns

    @property
    def biases(self) -> int:
        return self.latent_bias_at + self.latent.biases

    @property
    def _places(self) -> tuple[Places, Places, Places]:
        """Of the input layers, the GRU and the latent's, each counted from its own first column."""
        inp, latent = self.inp, self.latent
        i_sums = self.latents + latent.hidden + (0 if self.classes else latent.n_padded)
        l_sums = i_sums + (inp.hidden if inp.sums else 0)
        i_stats = l_sums + (latent.hidden if latent.sums else 0)
        l_stats = i_stats + inp.stats
        g_stats = l_stats + latent.stats
        tape = g_stats + (pad(4) if self.late else 0)
        l_outer = latent.hidden + latent.total
        i_outer = self.latents + latent.grads
        g_outer = i_outer + inp.outer
        grads = g_outer + (self.gate_columns if self.late else 0)
        first, before = self.gates, self.latents
        return (
            Places(tape, grads, i_sums, i_stats, i_outer),
            Places(tape, grads, 0, g_stats - first, g_outer - first),
            Places(tape, grads, l_sums - before, l_stats - before, l_outer),
        )

    @property
    def inp_places(self) -> Places:
        return self._places[0]

    @property
    def gru_places(self) -> Places:
        return self._places[1]

    @property
    def latent_places(self) -> Places:
        return self._places[2]

    @property
    def tape(self) -> int:
        return self.inp_places.tape

    @property
    def grads(self) -> int:
        return self.inp_places.grads

    def constants(self, *, save: bool = True) -> dict[str, object]:
        """What the kernels of ``cells.py`` want to know."""
        inp, latent = self.inp, self.latent
        return {
            "A": self.A, "D": self.D, "S": self.S, "AP": pad(self.A), "DP": self.d_padded,
            "SP": pad(self.S), "IW": inp.width, "IL": inp.layers, "LW": latent.width,
            "LL": latent.layers, "I_ACT": inp.act, "L_ACT": latent.act,
            **self.inp_places.constants("I_", sums=inp.writes_sums(save)),
            **self.gru_places.constants("G_", sums=True),
            **(self.late.constants if self.late else _TORCH_GRU),
            **self.latent_places.constants("L_", sums=latent.writes_sums(save)),
            "TAPE": self.tape, **self.std.constants,
            **dict(zip(("RESET_D", "RESET_S", "RESET_A"), self.resets, strict=True)),
        }  # fmt: skip


class Piece(NamedTuple):
    """Of what a layer of ``blocks.py`` takes."""

    size: int  # columns
    padded: int
    begin: int  # where it begins in a block's weight
    at: int  # and in the packed one


class LinearShape(NamedTuple):
    """A layer of the kernels of ``blocks.py``, perhaps block-diagonal.

    It takes a piece that every block has a part of to itself, and pieces that all blocks see. Its
    tape has the sums, then the values where an activation follows, then what a norm computed; its
    ``grads`` have gradients by sums, then those behind a norm.
    """

    name: str  # of its parameters, "{}" for weight, bias or norm
    groups: int  # blocks
    gates: int  # parts of a block's output, each padded by itself
    n: int  # columns of such a part
    own: Piece  # a block's own; of size 0: there is none
    shared: tuple[Piece, ...]  # those that all blocks see, at most three
    dense: bool  # whether the weight is [out, in], else [groups, in, out]
    biased: bool
    norm: NormShape | None  # over all columns of all blocks
    act: str  # what follows; "" nothing
    chained: bool  # whether its own piece is the layer before it, not deter

    @property
    def n_padded(self) -> int:
        return pad(self.n)

    @property
    def total(self) -> int:
        """Padded columns of a block's output."""
        return self.gates * self.n_padded

    @property
    def width(self) -> int:
        """Of all blocks."""
        return self.groups * self.total

    @property
    def pieces(self) -> list[Piece]:
        """Those that there are, own first."""
        return [piece for piece in (self.own, *self.shared) if piece.size]

    @property
    def columns(self) -> int:
        """Inputs of a block."""
        return sum(piece.size for piece in self.pieces)

    @property
    def depth(self) -> int:
        """Padded."""
        return sum(piece.padded for piece in self.pieces)

    @property
    def weights(self) -> int:
        """Elements of the packed weight."""
        return self.depth * self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        out = self.gates * self.n
        return (out, self.columns) if self.dense else (self.groups, self.columns, out)

    @property
    def strides(self) -> dict[str, int]:
        """Elements from one block, input and output of the weight to the next."""
        if self.dense:
            return {"SG": 0, "SK": 1, "SN": self.columns}
        out = self.gates * self.n
        return {"SG": self.columns * out, "SK": out, "SN": 1}

    @property
    def value(self) -> int:
        """The first column of the values in its tape."""
        return self.width

    @property
    def stats(self) -> int:
        """The first column of what a norm computed."""
        return self.width * (2 if self.act else 1)

    @property
    def tape(self) -> int:
        return self.stats + (pad(4) if self.norm else 0)

    @property
    def outer(self) -> int:
        """The first column in ``grads`` of gradients by the values, where they are kept."""
        return self.width if self.norm else 0

    @property
    def grads(self) -> int:
        return self.outer + self.width

    @property
    def constants(self) -> dict[str, int]:
        """Of the output, as the kernels want to know."""
        return {"N": self.n, "NP": self.n_padded, "GATES": self.gates}


class Features(NamedTuple):
    """Hidden layers whose last is among what a recurrence takes."""

    name: str  # of their parameters
    of: tuple[str, ...]  # what they take
    shape: MlpShape

    @property
    def value(self) -> int:
        """The first column of the last layer."""
        return self.shape.hidden - self.shape.width

    @property
    def outer(self) -> int:
        """The first column in ``grads`` of gradients by the last layer's values."""
        return self.value + (self.shape.hidden if self.shape.norms else 0)


class StagedShape(NamedTuple):
    """The dynamics as several kernels one behind the other, see ``staged.py``.

    Rows of the tape and of ``grads`` have what each stage has: the features, the recurrence's
    layers, the latent's.
    """

    A: int
    D: int
    S: int
    features: tuple[Features, ...]  # in the order in which the recurrence's weight takes them
    layers: tuple[LinearShape, ...]  # of the recurrence; of torch's GRU that of x and that of h
    gates: str  # the order of the last one's outputs: r, c, u; of torch's GRU that is "ruc"
    update_bias: float
    latent: MlpShape  # deter -> mean, std, or logits
    std: Std | Classes
    resets: tuple[bool, bool, bool]  # of deter, stoch, action: zeroed before a step takes them
    bound: bool

    # the same of a StepShape
    classes = StepShape.classes
    noise = StepShape.noise
    moments = StepShape.moments

    @property
    def torch(self) -> bool:
        """Whether the recurrence is torch's GRU."""
        return not self.layers[0].own.size

    @property
    def _stages(self) -> list[Features | LinearShape]:
        return [*self.features, *self.layers]

    @property
    def tapes(self) -> list[int]:
        """The first column of each stage, the latent's last."""
        return _begins(_of(stage).tape for stage in self._stages)

    @property
    def places(self) -> list[int]:
        """The same in ``grads``."""
        return _begins(_of(stage).grads for stage in self._stages)

    @property
    def tape(self) -> int:
        """Columns of a row."""
        return self.tapes[-1] + self.latent.tape

    @property
    def grads(self) -> int:
        return self.latents + self.latent.grads

    @property
    def latents(self) -> int:
        """The first column of the latent's hidden layers in ``grads``."""
        return self.places[-1]


def _of(stage: Features | LinearShape) -> MlpShape | LinearShape:
    return stage.shape if isinstance(stage, Features) else stage


def _begins(sizes: Iterable[int], first: int = 0) -> list[int]:
    """Where things of these sizes begin that lie one behind the other, and where they end."""
    return list(accumulate(sizes, initial=first))


def _features(params: RSSMParams, S: int, A: int) -> tuple[Features, ...]:
    """What x is made of, in the order of the recurrence's columns."""
    inp = params.inp
    if not isinstance(inp, Branches):
        begins = (A, 0) if params.action_first else (0, S)
        shape = mlp_shape(inp, (S, A), begins, hidden_only=True)
        return (Features("inp", ("stoch", "action"), shape),)
    found = [
        Features(f"inp.{name}", (name,), mlp_shape(branch, (size, 0), hidden_only=True))
        for name, branch, size in (("stoch", inp.stoch, S), ("action", inp.action, A))
    ]
    return tuple(found[::-1] if params.action_first else found)


def _staged_shape(params: RSSMParams, latent: MlpShape, resets: Sequence[bool]) -> StagedShape:
    dims, gru = params.dims(), params.gru
    A, D, S = dims["A"], dims["D"], dims["S"]
    features = _features(params, S, A)
    if isinstance(gru, BlockGRUParams):
        of_h = Features("gru.hidden", ("deter",), mlp_shape(gru.hidden, (D, 0), hidden_only=True))
        features = (of_h, *features) if gru.deter_first else (*features, of_h)
    return StagedShape(
        *(A, D, S, features, _recurrence(gru, D, features)),
        *_gates(gru),
        *(latent, make_std(params.latent), tuple(resets), params.bound_action),
    )


def _gates(gru: Recurrence) -> tuple[str, float]:
    """Their order, and the bias of the update."""
    if isinstance(gru, GRUParams):
        return "ruc", 0.0
    return getattr(gru, "gates", "rcu"), float(gru.update_bias)


def _recurrence(gru: Recurrence, D: int, features: Sequence[Features]) -> tuple[LinearShape, ...]:
    sizes = [(part.shape.widths[-1], part.shape.width) for part in features]
    if isinstance(gru, GRUParams):
        more = True, True, None, "", False
        x, h = _pieces(0, 0, 0, sizes), _pieces(D, 0, 0, ())
        return (
            LinearShape("gru.{}_ih", 1, 3, D, *x, *more),
            LinearShape("gru.{}_hh", 1, 3, D, *h, *more),
        )
    if isinstance(gru, LateGRUParams):
        begins = (0, D) if gru.deter_first else (sum(size for size, _ in sizes), 0)
        more = gru.bias is not None, NormShape.of(gru.norm), "", False
        return (LinearShape("gru.{}", 1, 3, D, *_pieces(D, *begins, sizes), True, *more),)
    G, last = len(gru.blocks.weights[0]), len(gru.blocks.weights) - 1
    units, layers = D // G, []
    for i, bias in enumerate(gru.blocks.biases):
        pieces = _pieces(units, 0, units, () if i else sizes)
        norm = gru.blocks.norms[i] if gru.blocks.norms and i < last else None
        more = bias is not None, NormShape.of(norm), gru.blocks.activation if i < last else ""
        gates = 1 if i < last else 3
        layers.append(
            LinearShape(f"gru.blocks.{{}}{i}", G, gates, units, *pieces, False, *more, i > 0)
        )
    return tuple(layers)


def _pieces(
    own: int, begin: int, behind: int, sizes: Sequence[tuple[int, int]]
) -> tuple[Piece, tuple[Piece, ...]]:
    """Of so many own columns that begin there, and of others with their padding from behind on."""
    first = Piece(own, pad(own), begin, 0)
    begins = _begins((size for size, _ in sizes), behind)
    at = _begins((padded for _, padded in sizes), first.padded)
    return first, tuple(
        Piece(*both, *where) for both, *where in zip(sizes, begins, at, strict=False)
    )


def step_shape(
    params: RSSMParams,
    *,
    posterior: bool = False,
    resets: tuple[bool, bool, bool] = (False, False, False),
) -> StepShape | StagedShape:
    """The shape of the dynamics with the prior, or with the posterior's part of the belief."""
    dims = params.dims()
    A, D, S = dims["A"], dims["D"], dims["S"]
    latent = params.post if posterior else params.prior
    behind = dims["E"] if posterior and params.embed_first else 0
    latent_shape = mlp_shape(latent, (D, 0), (behind, 0), groups=_groups(params))
    if isinstance(params.inp, Branches) or isinstance(params.gru, BlockGRUParams):
        return _staged_shape(params, latent_shape, resets)
    return StepShape(
        *(A, D, S),
        mlp_shape(params.inp, (S, A), (A, 0) if params.action_first else (0, S), hidden_only=True),
        LateShape.of(params.gru),
        latent_shape,
        make_std(params.latent),
        resets,
        params.bound_action,
    )


def embed_shape(params: RSSMParams) -> MlpShape:
    """The embedding's part of the posterior's first layer, a layer by itself without activation."""
    dims = params.dims()
    first = step_shape(params, posterior=True).latent.layer(0)
    columns = params.post.weights[0].shape[1]
    out = first.n * first.groups
    return MlpShape(
        (dims["E"], 0),
        (0 if params.embed_first else dims["D"], 0),
        columns,
        (),
        out,
        first.groups,
        "relu",
        (False,),
        least=first.n_padded,
    )


def prior_shape(params: RSSMParams) -> MlpShape:
    return mlp_shape(params.prior, (params.dims()["D"], 0), groups=_groups(params))


def _groups(params: RSSMParams) -> int:
    """Of the outputs of prior and posterior: mean and std, or logits alone."""
    return 1 if isinstance(params.latent, Categorical) else 2


def feat_shape(
    params: MLPParams, D: int, S: int, *, groups: int = 1, stoch_first: bool = False
) -> MlpShape:
    """The shape of a head on deter and stoch, which its weight takes in either order."""
    return mlp_shape(params, (D, S), (S, 0) if stoch_first else (0, D), groups=groups)


def make_std(transform: StdTransform | Categorical) -> Std | Classes:
    if isinstance(transform, Categorical):
        return Classes(transform.classes, float(transform.unimix), transform.gumbel)
    if transform.kind not in STDS:
        raise ValueError(f"std must be {', '.join(STDS)}, got {transform.kind!r}")
    return Std(transform.kind, *(float(x) for x in transform[1:]))
