"""Inputs and the measure of error that tests and benchmarks share.

The rule: the truth is the eager body in float64. The error of a backend's float32 result may be
at most twice that of eager float32 on the same inputs, plus a few eps times the size of the result;
that of a bfloat16 run at most twice that of eager under autocast.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.codec import DecoderParams, EncoderParams
from fastdreamer.ops.params import (
    ActorParams,
    GRUParams,
    MLPParams,
    ReturnParams,
    RSSMParams,
    State,
    StdTransform,
)


class Limit(NamedTuple):
    """What an op's error may be: ``factor`` × eager's error + ``rounding`` × eps × norm."""

    factor: float
    rounding: float
    reason: str
    sums: float | None = None  # rounding of the biases' gradients, where it is another


_RECURRENT = Limit(
    2.0,
    8.0,
    "sums of hundreds of products a step, in another order than eager's; eager's error itself is "
    "luck where a result has few elements, hence a few eps (measured: 5)",
    # Σ over H·B rows, whose terms nearly cancel where their signs are random: the error is that of
    # the terms, ten times larger than the sum (measured: 21)
    sums=32.0,
)
_RECURRENT_BF16 = Limit(
    2.0,
    1 / 16,
    "as many roundings to bfloat16 as autocast or fewer (the errors' median ratio is 0.7); the "
    "rest is luck where a result has few elements (measured: 0.03)",
    sums=1 / 8,  # a single number, Σ over H·B rows (measured: 0.09)
)
LIMITS = {
    "lambda_return": Limit(
        2.0,
        1.0,
        "as many roundings a step as eager or, fused, fewer; with a single element eager may be "
        "exact by luck, hence one eps",
    ),
} | dict.fromkeys(("rssm_step", "observe", "imagine", "open_loop", "cem"), _RECURRENT)
"""One limit per op; see :func:`assert_accurate`."""

BF16_LIMITS = dict.fromkeys(
    ("rssm_step", "observe", "imagine", "open_loop", "cem"), _RECURRENT_BF16
)
"""Those of a backend's bfloat16 against eager under autocast to bfloat16."""

NATIVE_LIMITS = {
    False: Limit(
        2.0,
        3.0,
        "sums in another order than eager's, whose error itself is luck where a result has few "
        "elements (measured: 2.1 on scalar, of 100 elements; 0.9 elsewhere, of two)",
        # one number, Σ over H·B rows whose terms nearly cancel (measured: 4.7)
        sums=6.0,
    ),
    True: Limit(
        2.0,
        0.0,
        "no larger than autocast's at the report's sizes, where every result has a limit of 1.0 "
        "(measured: 0.9); of smaller models some results are luck (measured: 1.5)",
        # of few elements (measured: 0.07 for one that eager has exact by luck)
        sums=1 / 8,
    ),
}
"""Those of the native core, which are narrower: in float32 and, True, in bfloat16."""


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
    hidden: int  # of the RSSM's input, prior and posterior layers
    units: int  # of the actor and the heads
    reward_layers: int  # hidden layers
    critic_layers: int
    actor_layers: int
    activation: str


REPORT = Sizes(6, 200, 30, 1024, 400, 400, 2, 3, 4, "elu")
"""Walker from pixels, as in the report."""


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
    A, D, S, E, hidden, units, *layers, activation = sizes
    feat = D + S

    def uniform(fan: int, *shape: int) -> Tensor:
        return ((2 * torch.rand(*shape, generator=generator) - 1) / fan**0.5).to(dtype)

    def mlp(*widths: int) -> MLPParams:
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        weights = tuple(uniform(fan, out, fan) for fan, out in pairs)
        return MLPParams(weights, tuple(uniform(fan, out) for fan, out in pairs), activation)

    shapes = (3 * D, hidden), (3 * D, D), (3 * D,), (3 * D,)
    rssm = RSSMParams(
        inp=mlp(S + A, hidden),
        gru=GRUParams(*(uniform(D, *shape) for shape in shapes)),
        prior=mlp(D, hidden, 2 * S),
        post=mlp(D + E, hidden, 2 * S),
        std=StdTransform(min=0.1),
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
    """Assert that every result of a backend is within the op's limit.

    Args:
        op: the op's name, a key of :data:`LIMITS` or :data:`BF16_LIMITS`.
        got: the backend's results, float32 tensors by name as :func:`evaluate` returns them.
        eager, truth: those of eager float32 and eager float64 on the same inputs.
        bf16: whether ``got`` and ``eager`` are of runs under autocast to bfloat16.
        native: whether to hold ``got`` to :data:`NATIVE_LIMITS` instead.
    """
    assert got.keys() == eager.keys() == truth.keys()
    limit = NATIVE_LIMITS[bf16] if native else (BF16_LIMITS if bf16 else LIMITS)[op]
    eps = torch.finfo(torch.bfloat16 if bf16 else torch.float32).eps
    for name, exact in truth.items():
        assert got[name].shape == exact.shape, f"{op}: {name} has shape {list(got[name].shape)}"
        assert got[name].dtype == torch.float32, f"{op}: {name} is {got[name].dtype}"
        single = exact.ndim == 0 or (name.startswith("grad_") and "bias" in name)
        is_sum = limit.sums is not None and single
        rounding = limit.sums if is_sum else limit.rounding
        norm = float(torch.linalg.vector_norm(exact))
        allowed = limit.factor * error(eager[name], exact) + rounding * eps * norm
        actual = error(got[name], exact)
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
