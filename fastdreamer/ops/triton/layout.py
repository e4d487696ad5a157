"""Where packed weights, tapes and their gradients lie; see :mod:`fastdreamer.ops.triton.device`.

Everything here is a number or a name and hashable, so that it can be the key of a program.
"""

from __future__ import annotations

from typing import NamedTuple

from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import STDS, RSSMParams, StdTransform


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


NO_STD = Std("softplus", 0.0, 0.0, 0.0, 0.0, 0.0)


class MlpShape(NamedTuple):
    """An MLP whose input comes in one or two pieces; its hidden layers share one padded width."""

    pieces: tuple[int, int]  # columns of each piece; the second may be 0
    begins: tuple[int, int]  # where they begin in the first weight
    columns: int  # of the first weight
    widths: tuple[int, ...]  # of every layer but the last
    out: int  # of the last layer, 0: there is none and the hidden layers are the output
    groups: int  # 2 where the output is [mean, std], each padded by itself
    act: str
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
    def silu(self) -> bool:
        return self.act == "silu" and self.layers > 0

    @property
    def hidden(self) -> int:
        """Columns of all hidden layers."""
        return self.layers * self.width

    @property
    def tape(self) -> int:
        return max(self.pre + (self.hidden if self.silu else 0), 16)  # never empty

    @property
    def pre(self) -> int:
        """Where a tape has the hidden layers' sums, if it has them."""
        return self.hidden + (self.total if self.groups == 2 else 0)

    @property
    def grads(self) -> int:
        return self.hidden + self.total

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
            before, i * self.width,
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

    def constants(self, *, save: bool = True) -> dict[str, object]:
        """What the kernels of ``mlp.py`` want to know."""
        return {
            "K1": self.pieces[0], "K1P": self.padded[0], "K2": self.pieces[1],
            "K2P": self.padded[1], "W": self.width, "LAYERS": self.layers, "N": self.n,
            "NP": self.n_padded, "TAPE": self.tape, "ACT": self.act,
            "PRE": self.pre if self.silu and save else 0, "TOTAL": self.total,
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
    sizes = tuple(len(bias) for bias in params.biases)
    widths, out = (sizes, 0) if hidden_only else (sizes[:-1], sizes[-1])
    columns = params.weights[0].shape[1]
    begins = (0, pieces[0]) if begins is None else begins
    return MlpShape(pieces, begins, columns, widths, out, groups, params.activation)


class StepShape(NamedTuple):
    """The dynamics with their prior or posterior."""

    A: int
    D: int
    S: int
    inp: MlpShape  # stoch, action -> hidden layers
    latent: MlpShape  # deter -> mean, std
    std: Std
    resets: tuple[bool, bool, bool]  # whether the start of an episode zeroes deter, stoch, action

    @property
    def d_padded(self) -> int:
        return pad(self.D)

    @property
    def gates(self) -> int:
        """The first column of the GRU in tape and grads."""
        return self.inp.hidden

    @property
    def latents(self) -> int:
        """The first column of the latent's hidden layers."""
        return self.gates + 4 * self.d_padded

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
        return self.gru_bias_at + 4 * self.d_padded

    @property
    def biases(self) -> int:
        return self.latent_bias_at + self.latent.biases

    @property
    def _sums(self) -> int:
        return self.latents + self.latent.hidden + self.latent.n_padded

    @property
    def tape(self) -> int:
        return (
            self._sums
            + (self.inp.hidden if self.inp.silu else 0)
            + (self.latent.hidden if self.latent.silu else 0)
        )

    @property
    def grads(self) -> int:
        return self.latents + self.latent.grads

    def constants(self, *, save: bool = True) -> dict[str, object]:
        """What the kernels of ``cells.py`` want to know."""
        inp, latent, sums = self.inp, self.latent, self._sums
        l_sums = sums + (inp.hidden if inp.silu else 0) - self.latents
        return {
            "A": self.A, "D": self.D, "S": self.S, "AP": pad(self.A), "DP": self.d_padded,
            "SP": pad(self.S), "IW": inp.width, "IL": inp.layers, "LW": latent.width,
            "LL": latent.layers, "I_ACT": inp.act, "L_ACT": latent.act,
            "I_PRE": sums if inp.silu and save else 0,
            "L_PRE": l_sums if latent.silu and save else 0,
            "TAPE": self.tape, **self.std.constants,
            **dict(zip(("RESET_D", "RESET_S", "RESET_A"), self.resets, strict=True)),
        }  # fmt: skip


def step_shape(
    params: RSSMParams,
    *,
    posterior: bool = False,
    resets: tuple[bool, bool, bool] = (False, False, False),
) -> StepShape:
    """The shape of the dynamics with the prior, or with the posterior's part of the belief."""
    dims = params.dims()
    A, D, S = dims["A"], dims["D"], dims["S"]
    latent = params.post if posterior else params.prior
    behind = dims["E"] if posterior and params.embed_first else 0
    return StepShape(
        *(A, D, S),
        mlp_shape(params.inp, (S, A), (A, 0) if params.action_first else (0, S), hidden_only=True),
        mlp_shape(latent, (D, 0), (behind, 0), groups=2),
        make_std(params.latent),
        resets,
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
        first.n_padded,
    )


def prior_shape(params: RSSMParams) -> MlpShape:
    return mlp_shape(params.prior, (params.dims()["D"], 0), groups=2)


def feat_shape(
    params: MLPParams, D: int, S: int, *, groups: int = 1, stoch_first: bool = False
) -> MlpShape:
    """The shape of a head on deter and stoch, which its weight takes in either order."""
    return mlp_shape(params, (D, S), (S, 0) if stoch_first else (0, D), groups=groups)


def make_std(transform: StdTransform) -> Std:
    if transform.kind not in STDS:
        raise ValueError(f"std must be {', '.join(STDS)}, got {transform.kind!r}")
    return Std(transform.kind, *(float(x) for x in transform[1:]))
