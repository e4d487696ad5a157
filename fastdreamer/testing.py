"""Inputs and the measure of error that tests and benchmarks share.

The rule: the truth is the eager body in float64. The error of a backend's float32 result may be
a few times what roundings come to over the depth of its sums, which is computed and depends on no
library (:class:`Exact`), or twice that of eager float32 where that is more; the error of a bfloat16
run may be at most twice that of eager under autocast.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_map_only,
    tree_unflatten,
)

from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.cells import GRUParams
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import (
    ActorParams,
    Categorical,
    DecoderParams,
    EncoderParams,
    OneHot,
    ReturnParams,
    RSSMParams,
    State,
    StdTransform,
    noise_of,
    noise_size,
)


class Limit(NamedTuple):
    """What an error in bfloat16 may be: ``factor`` × eager's + ``rounding`` × eps × norm."""

    factor: float
    rounding: float
    reason: str
    sums: float | None = None  # rounding of the biases' gradients, where it is another


ROUNDING = 6.0
"""What an error in float32 may be: so many times the root mean square of what roundings come to.

One result may be a single number, and of thousands of those the worst is off by four times the root
mean square, normally. Measured over the native tests' sizes and the report's: at most 2.5 times it
on every instruction set (2.4 a bias's gradient, of one element; 1.1 the outputs), of eager 1.0. The
faults that the tests seed (a term of one dot product or a bias left out, one layer in bfloat16, two
gates exchanged) are at least 100 times it.
"""
FACTOR = 2.0
"""Or so many times eager's error, where that is more."""

_RECURRENT_BF16 = Limit(
    2.0,
    1 / 16,
    "as many roundings to bfloat16 as autocast or fewer (the errors' median ratio is 0.7); the "
    "rest is luck where a result has few elements (measured: 0.03)",
    sums=1 / 8,  # a single number, Σ over H·B rows (measured: 0.09)
)
BF16_LIMITS = dict.fromkeys(
    (
        "rssm_step",
        "observe",
        "decide",
        "imagine",
        "open_loop",
        "cem",
        "encode",
        "decode",
        "decode_error",
    ),
    _RECURRENT_BF16,
)
"""Those of a backend's bfloat16 against eager under autocast to bfloat16."""

NATIVE_BF16_LIMIT = Limit(
    2.0,
    0.0,
    "no larger than autocast's at the report's sizes, where every result has a limit of 1.0 "
    "(measured: 0.9); of smaller models some results are luck (measured: 1.5)",
    # of few elements (measured: 0.07 for one that eager has exact by luck)
    sums=1 / 8,
)
"""That of the native core's bfloat16, which is narrower."""


def lambda_return_inputs(H: int, B: int, *, lam: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Return arguments of ``lambda_return``: [H, B] float64 tensors of float32 numbers.

    Rewards in [0, 1], values of either sign about ten times larger, discount 0.99 and 0 (the end
    of an episode) for one in ten.
    """
    generator = torch.Generator().manual_seed(seed + 1000 * H + B)
    ends = torch.rand(H, B, generator=generator) < 0.1
    inputs = {
        "reward": torch.rand(H, B, generator=generator),
        "next_value": 10 * torch.randn(H, B, generator=generator),
        "discount": torch.where(ends, 0.0, 0.99),
    }
    return {name: tensor.double() for name, tensor in inputs.items()} | {"lam": lam}


class Sizes(NamedTuple):
    """Sizes of a recurrent model and its heads; letters as in :mod:`fastdreamer.ops`."""

    A: int
    D: int
    S: int
    E: int
    hidden: int  # of the RSSM's prior and posterior layers
    units: int  # of the actor and the heads
    reward_layers: int  # hidden layers
    critic_layers: int
    actor_layers: int
    activation: str
    input_hidden: int | None = None  # of the RSSM's input layer; None: as ``hidden``


REPORT = Sizes(6, 200, 30, 1024, 400, 400, 2, 3, 4, "elu")
"""Walker from pixels, as in the report, but for an input layer as wide as the prior's: what the
published times are of."""


def make_params(
    sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[RSSMParams, ActorParams, ReturnParams]:
    """Return parameters as ``torch.nn`` initialises them, a function of the seed alone.

    Args:
        sizes: of the model and its heads.
        seed: of the generator.
        dtype: of the tensors; their values are float32 numbers whatever it is.

    Returns:
        The RSSM, the actor, and the heads with a target critic unlike the critic; γ 0.99, λ 0.95.
        None of the tensors asks for gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    A, D, S, E, hidden, units, *layers, activation, input_hidden = sizes
    input_hidden = input_hidden or hidden
    feat = D + S

    def uniform(fan: int, *shape: int) -> Tensor:
        return ((2 * torch.rand(*shape, generator=generator) - 1) / fan**0.5).to(dtype)

    def mlp(*widths: int) -> MLPParams:
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        weights = tuple(uniform(fan, out, fan) for fan, out in pairs)
        return MLPParams(weights, tuple(uniform(fan, out) for fan, out in pairs), activation)

    shapes = (3 * D, input_hidden), (3 * D, D), (3 * D,), (3 * D,)
    rssm = RSSMParams(
        inp=mlp(S + A, input_hidden),
        gru=GRUParams(*(uniform(D, *shape) for shape in shapes)),
        prior=mlp(D, hidden, 2 * S),
        post=mlp(D + E, hidden, 2 * S),
        latent=StdTransform(min=0.1),
    )
    reward, critic, actor = ([units] * n for n in layers)
    std = StdTransform(offset=5.0, min=1e-4)
    policy = ActorParams(mlp(feat, *actor, 2 * A), mean_scale=5.0, std=std)
    heads = mlp(feat, *reward, 1), mlp(feat, *critic, 1), mlp(feat, *critic, 1)
    return rssm, policy, ReturnParams(*heads, gamma=0.99, lam=0.95)


class _Draw:
    """Seeded inputs of the recurrent ops; float32 numbers in any dtype."""

    def __init__(self, sizes: Sizes, seed: int, dtype: torch.dtype) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.generator = torch.Generator().manual_seed(1 + seed)
        self.params, self.actor, self.returns = make_params(sizes, seed, dtype)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        # float32 until the last step, so that every dtype gets the same numbers
        return (low + (high - low) * torch.rand(*shape, generator=self.generator)).to(self.dtype)

    def state(self, B: int) -> State:
        return State(self.uniform(-1, 1, B, self.sizes.D), self.randn(B, self.sizes.S))

    def action(self, *lead: int) -> Tensor:
        return self.uniform(-1, 1, *lead, self.sizes.A)


def rssm_step_inputs(
    sizes: Sizes, B: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return arguments of ``rssm_step`` by name."""
    draw = _Draw(sizes, seed, dtype)
    return {
        "params": draw.params,
        "state": draw.state(B),
        "action": draw.action(B),
        "noise": draw.randn(B, sizes.S),
    }


def observe_inputs(
    sizes: Sizes, T: int, B: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return arguments of ``observe`` by name.

    An episode begins at one step in ten, and at step T // 2 of row 0 where there is one before.
    """
    draw = _Draw(sizes, seed, dtype)
    is_first = draw.uniform(0, 1, T, B) < 0.1
    is_first[T // 2, 0] |= T > 1
    return {
        "params": draw.params,
        "start": draw.state(B),
        "embed": draw.randn(T, B, sizes.E),
        "action": draw.action(T, B),
        "is_first": is_first,
        "noise": draw.randn(T, B, sizes.S),
    }


def decide_inputs(
    sizes: Sizes,
    B: int,
    *,
    sees: Literal["embed", "vector", "both"] = "embed",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return arguments of ``decide`` by name.

    ``sees``: an embedding [B, E]; a vector of 4 numbers, embedded by 2 layers of ``units``; both,
    where the embedding is the rest of E.
    """
    draw = _Draw(sizes, seed, dtype)
    inputs = {
        "params": draw.params,
        "actor": draw.actor,
        "state": draw.state(B),
        "action": draw.action(B),
        "state_noise": draw.randn(B, sizes.S),
        "action_noise": draw.randn(B, sizes.A),
        "encoder": None,
        "vector": None,
    }
    columns = sizes.E
    if sees != "embed":
        units = sizes.units if sees == "both" else sizes.E
        shapes = (units, 4), (units, units)
        inputs["encoder"] = MLPParams(
            tuple(draw.uniform(-1, 1, *shape) / shape[1] ** 0.5 for shape in shapes),
            tuple(draw.uniform(-1, 1, units) / 2 for _ in shapes),
            sizes.activation,
        )
        inputs["vector"] = 10 * draw.randn(B, 4)
        columns -= units
    return inputs | {"embed": draw.randn(B, columns) if columns else None}


def imagine_inputs(
    sizes: Sizes,
    H: int,
    B: int,
    *,
    heads: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return arguments of ``imagine`` by name, ``returns`` among them if ``heads``."""
    draw = _Draw(sizes, seed, dtype)
    inputs = {
        "params": draw.params,
        "actor": draw.actor,
        "start": draw.state(B),
        "state_noise": draw.randn(H, B, sizes.S),
        "action_noise": draw.randn(H, B, sizes.A),
    }
    return inputs | {"returns": draw.returns} if heads else inputs


def open_loop_inputs(
    sizes: Sizes, H: int, B: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return arguments of ``open_loop`` by name."""
    draw = _Draw(sizes, seed, dtype)
    return {
        "params": draw.params,
        "start": draw.state(B),
        "action": draw.action(H, B),
        "noise": draw.randn(H, B, sizes.S),
    }


def cem_inputs(
    sizes: Sizes,
    H: int,
    B: int,
    N: int,
    I: int,  # noqa: E741
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return arguments of ``cem`` by name: λ-returns, one candidate in five elite."""
    draw = _Draw(sizes, seed, dtype)
    return {
        "params": draw.params,
        "returns": draw.returns,
        "start": draw.state(B),
        "mean": draw.action(H, B) / 2,
        "std": draw.uniform(0.5, 1, H, B, sizes.A),
        "action_noise": draw.randn(I, H, B, N, sizes.A),
        "state_noise": draw.randn(I, H, B, N, sizes.S),
        "num_elites": max(1, N // 5),
        "score": "lambda_return",
    }


def categorical(inputs: Mapping[str, Any], latent: Categorical, *, seed: int = 0) -> dict[str, Any]:
    """Return arguments of a recurrent op with categorical latents instead of Gaussian.

    The S of the sizes is split into categoricals, whose logits are what were the means. The states
    given are one-hot, the noise is uniform in [0, 1), of Gumbel-softmax samples Gumbel: see
    :func:`away_from_borders`.
    """
    inputs = dict(inputs)
    generator = torch.Generator().manual_seed(2 + seed)
    params = inputs["params"]
    S, K = params.dims()["S"], latent.classes

    def logits(mlp: MLPParams) -> MLPParams:
        return mlp._replace(weights=(*mlp.weights[:-1], mlp.weights[-1][:S].clone()),
                            biases=(*mlp.biases[:-1], mlp.biases[-1][:S].clone()))  # fmt: skip

    post = params.post and logits(params.post)
    inputs["params"] = params._replace(prior=logits(params.prior), post=post, latent=latent)
    state = "start" if "start" in inputs else "state"
    deter, stoch = inputs[state]
    classes = torch.randint(K, (len(stoch), S // K), generator=generator)
    inputs[state] = State(deter, torch.nn.functional.one_hot(classes, K).flatten(-2).to(stoch))
    noise = "noise" if "noise" in inputs else "state_noise"
    draw, size = noise_of(latent)[1], noise_size(latent, S)
    drawn = draw((*inputs[noise].shape[:-1], size), generator=generator)
    return inputs | {noise: drawn.to(stoch)}


def away_from_borders(op: Callable, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with noise in the middle of what draws the class that it draws.

    Or the likeliest, if that is an improbable one: roundings are not to draw another. A Gumbel-
    softmax sample's class gets 1 more than it had. Found by a run in float64.
    """
    double = tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, dict(inputs)
    )
    noises = [name for name, t in double.items() if name.endswith("noise") and t is not None]
    double |= {name: double[name].clone() for name in noises}
    with torch.no_grad(), mock.patch.object(OneHot, "sample", _moving(OneHot.sample)):
        op(**double, backend="eager")
    return dict(inputs) | {name: double[name].to(inputs[name]) for name in noises}


def _moving(sample: Callable) -> Callable:
    """That method of OneHot, which first moves its noise in place."""

    def moved(dist: OneHot, noise: Tensor) -> Tensor:
        if dist.gumbel:
            noise.add_(sample(dist, noise).round())
            return sample(dist, noise)
        probs = dist.probs
        drawn = sample(dist, noise).view_as(probs).argmax(-1, keepdim=True)
        improbable = probs.gather(-1, drawn) < 1 / probs.shape[-1]
        drawn = torch.where(improbable, probs.argmax(-1, keepdim=True), drawn)
        noise.copy_((probs.cumsum(-1) - probs / 2).gather(-1, drawn).squeeze(-1))
        return sample(dist, noise)

    return moved


class CodecSizes(NamedTuple):
    """Sizes of an encoder and a decoder of images of 64 × 64."""

    channels: int  # of the images
    encoder: tuple[int, ...]  # of the convolutions, kernel 4
    embed: int | None  # of the linear layer behind them
    F: int
    linear: int  # channels of the decoder's one pixel
    linear_relu: bool
    decoder: tuple[int, int, int]  # between the transposed convolutions, kernels 5 5 6 6


REPORT_CODEC = CodecSizes(3, (16, 32, 64, 64), 1024, 230, 1024, True, (64, 32, 16))
"""Walker from pixels, as in the report."""


def codec_inputs(
    sizes: CodecSizes,
    N: int,
    *,
    smooth: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, Any]]:
    """Return arguments of ``encode``, ``decode`` and ``decode_error``, by op and name.

    The weights are channels_last, as an encoder's and a decoder's are. With ``smooth`` they are
    small and the biases large, so that hardly a unit is near its ReLU's kink, where rounding alone
    switches a gradient on or off.
    """
    generator = torch.Generator().manual_seed(seed)

    scale, lift = (0.3, 1.0) if smooth else (1.0, 0.0)

    def uniform(fan: int, *shape: int) -> Tensor:
        return (scale * (2 * torch.rand(*shape, generator=generator) - 1) / fan**0.5).to(dtype)

    def weight(fan: int, *shape: int) -> Tensor:
        return uniform(fan, *shape).contiguous(memory_format=torch.channels_last)

    widths = (sizes.channels, *sizes.encoder)
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    weights = tuple(weight(16 * a, b, a, 4, 4) for a, b in pairs)
    biases = tuple(uniform(16 * a, b) + lift for a, b in pairs)
    linear, flat = None, 4 * widths[-1]
    if sizes.embed is not None:
        linear = uniform(flat, sizes.embed, flat), uniform(flat, sizes.embed)
    encoder = EncoderParams(weights, biases, linear)
    widths = (sizes.linear, *sizes.decoder, sizes.channels)
    layers = list(zip(widths[:-1], widths[1:], (5, 5, 6, 6), strict=True))
    decoder = DecoderParams(
        (uniform(sizes.F, sizes.linear, sizes.F), uniform(sizes.F, sizes.linear) + lift),
        sizes.linear_relu,
        tuple(weight(b * k * k, a, b, k, k) for a, b, k in layers),
        tuple(uniform(b * k * k, b) + lift for _, b, k in layers),
    )
    shape = N, 64, 64, sizes.channels
    pixels, target = (
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(2)
    )
    feat = torch.randn(N, sizes.F, generator=generator).to(dtype)
    return {
        "encode": {"params": encoder, "pixels": pixels},
        "decode": {"params": decoder, "feat": feat},
        "decode_error": {"params": decoder, "feat": feat, "target": target},
    }


class Exact(dict[str, Tensor]):
    """Results in float64 by name, and how far float32's roundings would take them.

    Args:
        run: computes them in float64, the same at every call.
    """

    def __init__(self, run: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__(run())
        self._run = run

    @functools.cached_property
    def spread(self) -> dict[str, float]:
        """By name, the 2-norm of what roundings do to a result: their root mean square.

        Every operation, backward included, is done in float64 and then rounded at random
        (:class:`Roundings`), a few times over: Monte Carlo arithmetic (Parker 1997).
        """
        squares = dict.fromkeys(self, 0.0)
        for seed in range(DRAWS):
            with Roundings(seed):
                rounded = dict(self._run())
            for name, exact in self.items():
                squares[name] += error(rounded[name], exact) ** 2
        return {name: (square / DRAWS) ** 0.5 for name, square in squares.items()}


DRAWS = 4
"""Enough that of no result all come to nothing by luck."""


class Roundings(TorchDispatchMode):
    """What is computed inside is off by as much as in float32, whoever computes it there.

    A rounding is off by at most u = 2⁻²⁴ of its result, as likely up as down, so every result is
    multiplied by 1 + u·ξ, ξ standard normal. A sum of K terms x is rounded K times on its way, and
    the variances of independent errors add (Higham and Mary, "A new approach to probabilistic
    rounding error analysis", SIAM J. Sci. Comput. 41, 2019): added up one by one its partial sums
    grow as √k, so that it is off by u·√K·√(Σx²)·ξ; of other orders, a library's or a vector's,
    less. Cancelling terms count by their own size. The worst case, u·K·Σ|x|, is never seen and
    would let faults pass.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def _normals(self, like: Tensor) -> Tensor:
        """Drawn where they are wanted: a GPU would wait for a CPU's longer than for all else."""
        device = like.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        given = {"generator": self._generators[device], "device": device}
        return torch.randn(like.shape, **given, dtype=torch.float64).to(like)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # a sum's terms as squares, before it may overwrite them
        terms = _TERMS.get(func.overloadpacket)
        squares = None
        if terms is not None:
            squared = tree_map_only(Tensor, Tensor.square, args)
            squares = func(*squared, **kwargs)
        out = func(*args, **kwargs)
        alias = [result.alias_info for result in func._schema.returns]
        if any(info is not None and not info.is_write for info in alias):
            return out  # a view
        outputs = out if isinstance(out, (tuple, list)) else [out]
        scales = squares if isinstance(squares, (tuple, list)) else [squares] * len(outputs)
        for x, square in zip(outputs, scales, strict=True):
            if isinstance(x, Tensor) and x.is_floating_point():
                size = x * _FUNCTIONS.get(func.overloadpacket, 1)
                if square is not None:
                    size = (terms(*args) * square).sqrt()
                x.add_(U * size * self._normals(x))
        return out


U = 2.0**-24
_TERMS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mm: lambda a, b: a.shape[-1],
    torch.ops.aten.bmm: lambda a, b: a.shape[-1],
    torch.ops.aten.addmm: lambda x, a, b: a.shape[-1],
    torch.ops.aten.sum: lambda x, dims=(), *_: torch.Size(
        x.shape[d] for d in dims or range(x.ndim)
    ).numel(),
    torch.ops.aten.convolution: lambda x, w, *_: w[0].numel(),
    torch.ops.aten.convolution_backward: lambda g, x, w, *_: g[:, 0].numel() + w[0].numel(),
}
"""How many terms an element of a sum has."""
_FUNCTIONS = dict.fromkeys(
    (
        torch.ops.aten.exp,
        torch.ops.aten.elu,
        torch.ops.aten.gelu,
        torch.ops.aten.mish,
        torch.ops.aten.sigmoid,
        torch.ops.aten.silu,
        torch.ops.aten.softplus,
        torch.ops.aten.tanh,
    ),
    4.0,
)
"""Elementary functions, by how many u an implementation may be off."""


def evaluate(
    op: Callable,
    inputs: Mapping[str, Any],
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    autocast: bool = False,
    wrt: Collection[str] | None = None,
    using: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Run an op forward and backward and return its outputs and gradients by name.

    Args:
        op: a public op that returns tensors, nested in tuples as they like; it takes ``backend=``.
        inputs: its arguments by name, nested alike; floating tensors are converted to ``dtype``,
            all tensors are copied to ``device``.
        backend: the backend to name; asserted to have run.
        dtype, device: where and in what precision to compute.
        autocast: whether under autocast to bfloat16.
        wrt: the inputs that get gradients, by name or the beginning of one: ``"actor"`` is all of
            ``"actor.mlp.weights[0]"`` and so on. None: all that are floating but the noise.
        using: the outputs that a gradient reaches, likewise; None: all.

    Returns:
        Every output, ``out`` and where it stands in what the op returns (``out.deter``,
        ``out[0].deter``), and ``grad_`` with the name of every input in ``wrt``, zeros where no
        gradient came. The gradient that reaches an output is standard normal, the same for every
        backend and dtype.
    """
    run = functools.partial(_evaluate, op, inputs, backend, dtype, device, autocast, wrt, using)
    return Exact(run) if dtype == torch.float64 else run()


def _evaluate(
    op: Callable,
    inputs: Mapping[str, Any],
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str,
    autocast: bool,
    wrt: Collection[str] | None,
    using: Collection[str] | None,
) -> dict[str, Tensor]:
    leaves, spec = tree_flatten_with_path(dict(inputs))
    named, arguments = {}, []
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            name = path[0].key + keystr(path[1:])
            leaf = leaf.detach().to(device, copy=True)
            if leaf.is_floating_point():
                leaf = leaf.to(dtype)
                if not name.endswith("noise") if wrt is None else _named(name, wrt):
                    named[name] = leaf.requires_grad_()
        arguments.append(leaf)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        returned = op(**tree_unflatten(arguments, spec), backend=backend)
    assert last_backend(op.__name__) == backend, f"{last_backend(op.__name__)} ran, not {backend}"
    outputs = {
        "out" + keystr(path): leaf
        for path, leaf in tree_flatten_with_path(returned)[0]
        if isinstance(leaf, Tensor)
    }
    generator = torch.Generator().manual_seed(0)
    reached, weights = [], []
    for name, out in outputs.items():
        weight = torch.randn(out.shape, generator=generator).to(out)
        if out.requires_grad and (using is None or _named(name, using)):
            reached.append(out)
            weights.append(weight)
    if reached:
        torch.autograd.backward(reached, weights)
    result = {name: out.detach() for name, out in outputs.items()}
    for name, leaf in named.items():
        result[f"grad_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return result


def _named(name: str, beginnings: Collection[str]) -> bool:
    return any(name == b or name.startswith((f"{b}.", f"{b}[")) for b in beginnings)


def error(got: Tensor, truth: Tensor) -> float:
    """Return ‖got − truth‖₂ computed in float64; infinite where ``got`` is not finite."""
    distance = torch.linalg.vector_norm(got.detach().cpu().double() - truth.detach().cpu().double())
    return float(distance) if torch.isfinite(distance) else float("inf")


def assert_accurate(
    op: str,
    got: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    bf16: bool = False,
    native: bool = False,
) -> None:
    """Assert that every result of a backend is within the limits.

    Args:
        op: the op's name; under autocast a key of :data:`BF16_LIMITS`.
        got: the backend's results, float32 tensors by name as :func:`evaluate` returns them.
        eager, truth: those of eager float32 and eager float64 on the same inputs; without autocast
            truth is an :class:`Exact`, as :func:`evaluate` returns it.
        bf16: whether ``got`` and ``eager`` are of runs under autocast to bfloat16.
        native: whether to hold bfloat16 to :data:`NATIVE_BF16_LIMIT` instead.
    """
    assert got.keys() == eager.keys() == truth.keys()
    for name, exact in truth.items():
        assert got[name].shape == exact.shape, f"{op}: {name} has shape {list(got[name].shape)}"
        assert got[name].dtype == torch.float32, f"{op}: {name} is {got[name].dtype}"
        actual, others = error(got[name], exact), error(eager[name], exact)
        if bf16:
            limit = NATIVE_BF16_LIMIT if native else BF16_LIMITS[op]
            single = exact.ndim == 0 or (name.startswith("grad_") and "bias" in name)
            is_sum = limit.sums is not None and single
            rounding = limit.sums if is_sum else limit.rounding
            norm = float(torch.linalg.vector_norm(exact))
            allowed = limit.factor * others + rounding * torch.finfo(torch.bfloat16).eps * norm
        else:
            allowed = FACTOR * others
            if actual > allowed:  # only then does the rest matter, which takes longer
                allowed = max(allowed, ROUNDING * truth.spread[name])
        assert actual <= allowed, f"{op}: error of {name} is {actual:.3g}, allowed {allowed:.3g}"


class Resources(NamedTuple):
    """What a compiled GPU kernel uses: per thread registers and bytes of stack, local memory
    (spills) and, per program, bytes of shared memory."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    options: Mapping[str, Any],
) -> Resources:
    """Compile a Triton kernel for a GPU that need not be there, and return what it uses.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: type of every argument that is not a constant, e.g. ``{"x": "*fp32"}``;
            pointers are taken to be 16-byte aligned, as those of tensors are.
        constants: the ``tl.constexpr`` arguments.
        arch: compute capability without the dot, e.g. 90.
        options: what a launch passes beside the arguments: ``num_warps`` and the like.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options=dict(options),
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(usage["REG"], usage["STACK"], usage["LOCAL"], compiled.metadata.shared)
