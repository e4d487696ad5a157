"""What the shipped Triton kernels use on GPUs that need not be there.

Compiles every kernel of every program of the recurrent ops at Walker's sizes, all layers of 400,
for each precision, tile and architecture; those of a step and of the actor with an input layer of
200, as preset ``report`` has; the same in bfloat16 for two other models: SiLU at those sizes,
and widths of 1024 with SiLU as DreamerV3 has; and the kernels of a model made of today's parts, see
:func:`todays`, those of Gumbel-softmax samples as well, and of models whose steps are taken in
stages, see :func:`staged`, in both precisions. Checks:
no stack, no local memory (LDL, STL), at most 99 KB of shared memory, matrix instructions in every
kernel with products in bfloat16, barriers where layers hand over through global memory, and no load
that pipelining moved across one. The whole matrix, two processes at a time, takes minutes::

    python -m tests.triton_resources    # or: --arch 90 --precision bf16 --rows 50 --model wide
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastdreamer.ops.cells import BlockGRUParams, LateGRUParams
from fastdreamer.ops.layers import MLPParams, Norm
from fastdreamer.ops.params import (
    ActorParams,
    Branches,
    Categorical,
    ReturnParams,
    RSSMParams,
    two_hot,
)
from fastdreamer.ops.triton import cem, observe, rollout
from fastdreamer.ops.triton.aot import checked, source
from fastdreamer.ops.triton.build import Action, Precision
from fastdreamer.ops.triton.layout import (
    Read,
    embed_shape,
    feat_shape,
    make_std,
    prior_shape,
    step_shape,
)
from fastdreamer.ops.triton.program import Program, Spec
from fastdreamer.testing import REPORT, Sizes, make_params

ARCHS = (80, 90, 100, 120)
ROWS = (50, 2500)  # around the tiles' switch
MODELS = {
    "report": REPORT,
    "input": REPORT._replace(input_hidden=200),
    "silu": REPORT._replace(activation="silu"),
    "wide": Sizes(6, 1024, 32, 1024, 1024, 1024, 2, 3, 4, "silu"),
    "today": Sizes(6, 512, 1024, 1024, 512, 512, 2, 2, 2, "silu"),
    "gumbel": Sizes(6, 512, 1024, 1024, 512, 512, 1, 1, 1, "silu"),
    "blocks": Sizes(6, 2048, 512, 1024, 256, 256, 2, 2, 2, "silu"),
    "apart": Sizes(6, 512, 30, 1024, 400, 400, 2, 2, 2, "elu"),
    "late": Sizes(6, 512, 32, 1024, 400, 400, 2, 2, 2, "elu"),
}
SHARED = 99 * 1024  # what the least of the four architectures lends a block
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
# of modules or functions: they multiply
PRODUCTS = (
    *("cells", "mlp", "weights.gradient_kernel"),
    *("blocks.forward_kernel", "blocks.backward_kernel", "blocks.gradient_kernel"),
)
FEW = 4
ACTOR = ("mlp.forward_kernel action", "mlp.backward_kernel action")
NORMS = ("norms", "i_norms", "g_norm", "l_norms")
OPTIONAL = (
    *("first", "extra", "d_mean", "d_x1", "d_more", "proposals", *NORMS),
    *("norm", "own", "x3", "of_h", "packed"),
)
PARTS = ("cells", "mlp", "categorical", "readout", "weights.norm")
STAGES = (  # what steps in stages have that others have not
    *("blocks", "normal", "before", "mlp.backward_kernel ready"),
    "mlp.forward_kernel normal True with extra",
    "mlp.forward_kernel plain True with norms/extra",
)
WANTED = {REPORT: ("",), MODELS["today"]: PARTS, MODELS["gumbel"]: ("categorical",)}
WANTED |= {MODELS[name]: STAGES for name in ("blocks", "apart", "late")}
BLOCKS = ("BM", "BN", "BK", "BG", "BS", "BO", "BI", "BR", "BLOCK", "BLOCK_K", "BLOCK_N")


class Usage(NamedTuple):
    """Of one kernel on one architecture."""

    kernel: str
    arch: int
    registers: int
    stack: int
    local: int
    spills: int  # instructions that load from or store to local memory
    shared: int
    matrix: tuple[str, ...]  # kinds of matrix instructions
    order: str  # in its TTGIR: barriers (B), and whether loads (L) and stores (S) lie between them
    moved: tuple[str, ...]  # loads and stores that its source has elsewhere
    seconds: float  # of compiling


def todays(
    params: RSSMParams, actor: ActorParams, returns: ReturnParams
) -> tuple[RSSMParams, ActorParams, ReturnParams]:
    """The same model of what DreamerV3 is made of.

    Normalised layers without bias, a GRU with its reset inside the candidate, categorical latents,
    two-hot heads, a bounded policy.
    """

    def layers(mlp: MLPParams, act_last: bool = False) -> MLPParams:
        hidden = mlp.weights[: len(mlp.weights) - (not act_last)]
        norms = tuple(norm(len(weight)) for weight in hidden)
        return mlp._replace(biases=(*[None] * len(hidden), *mlp.biases[len(hidden) :]), norms=norms)

    def norm(n: int) -> Norm:
        return Norm("layer", torch.ones(n), torch.zeros(n), 1e-3)

    def logits(mlp: MLPParams) -> MLPParams:
        weights, biases = ((*t[:-1], t[-1][: len(t[-1]) // 2]) for t in mlp[:2])
        return layers(mlp._replace(weights=weights, biases=biases))

    joint = torch.cat([params.gru.weight_ih, params.gru.weight_hh], 1)
    params = params._replace(
        inp=layers(params.inp, True),
        gru=LateGRUParams(joint, None, norm(len(joint))),
        prior=logits(params.prior),
        post=logits(params.post),
        latent=Categorical(32, 0.01),
    )

    def two_hot_head(mlp: MLPParams) -> MLPParams:
        last = torch.zeros(255, mlp.weights[-1].shape[1]), torch.zeros(255)
        return layers(mlp._replace(weights=(*mlp[0][:-1], last[0]), biases=(*mlp[1][:-1], last[1])))

    reward, critic, target = map(two_hot_head, returns[:3])
    read = two_hot(255)
    returns = returns._replace(
        reward=reward, critic=critic, target=target, reward_as=read, value_as=read
    )
    return params, actor._replace(mlp=layers(actor.mlp), mean_scale=1.0, squash="bound"), returns


def staged(params: RSSMParams, sizes: Sizes) -> RSSMParams:
    """The same dynamics with layers of stoch and action apart before their GRU; of "blocks" the
    block-diagonal one, of eight blocks as in DreamerV3.
    """
    D, units = sizes.D, sizes.hidden
    like = params.inp

    def layer(n: int) -> MLPParams:
        biases = (None if like.norms else torch.zeros(units),)
        return like._replace(weights=(torch.zeros(units, n),), biases=biases, norms=like.norms[:1])

    gru = params.gru
    if sizes == MODELS["blocks"]:
        weights = torch.zeros(8, D // 8 + 3 * units, D // 8), torch.zeros(8, D // 8, 3 * D // 8)
        norm = Norm("rms", torch.ones(D), None, 1e-4)
        blocks = MLPParams(weights, (torch.zeros(D), torch.zeros(3 * D)), "silu", (norm,))
        gru = BlockGRUParams(layer(D), blocks)
    elif isinstance(gru, LateGRUParams):
        gru = gru._replace(weight=torch.zeros(3 * D, D + 2 * units))
    else:
        gru = gru._replace(weight_ih=torch.zeros(3 * D, 2 * units))
    return params._replace(inp=Branches(layer(sizes.S), layer(sizes.A)), gru=gru)


def programs(sizes: Sizes, rows: int, precision: Precision) -> Iterator[Program]:
    """Every program of the ops, forward and backward; the first FEW train imagine and observe."""
    params, actor, returns = make_params(sizes)
    if sizes in [MODELS[name] for name in ("today", "gumbel", "blocks", "late")]:
        params, actor, returns = todays(params, actor, returns)
        drawn = params.latent._replace(gumbel=sizes == MODELS["gumbel"])
        params = params._replace(latent=drawn)
    if sizes in (MODELS["blocks"], MODELS["apart"], MODELS["late"]):
        params = staged(params, sizes)
    step, D, S = step_shape(params), sizes.D, sizes.S
    shapes = [feat_shape(head, D, S) for head in returns[:3]]
    reads = (
        Read.of(returns.reward_as, returns.reward),
        Read.of(returns.value_as, returns.critic),
    )
    heads = rollout._Heads(*shapes, None, returns.gamma, returns.lam, *reads)
    policy = Action(actor.mean_scale, make_std(actor.std), actor.squash)
    dream = rollout._Spec(
        "imagine", 2, rows, precision, step, feat_shape(actor.mlp, D, S, groups=2), policy, False,
        heads, False, True, True,
    )  # fmt: skip
    yield rollout.forward_program(dream)
    wants = rollout._Wants(True, True, True, True)
    given = frozenset({"deter", "stoch", "action", "reward", "returns"})
    yield rollout.backward_program(dream, wants, given)
    filtered = observe._Spec(
        2, rows, precision, step_shape(params, posterior=True, resets=(True, True, True)),
        prior_shape(params), embed_shape(params), True, True,
    )  # fmt: skip
    yield observe.forward_program(filtered)
    yield observe.backward_program(
        filtered, observe._Wants(True, True, True), frozenset(observe.outputs(step))
    )
    yield rollout.forward_program(dream._replace(through=False, critic=False))
    yield rollout.critic_program(dream)
    other = dream._replace(through_feat=True, heads=heads._replace(discount=shapes[0]))
    yield rollout.forward_program(other)
    yield rollout.backward_program(other, wants, given)
    one = dream._replace(op="rssm_step", H=1, actor=None, policy=None, heads=None, prior=True)
    yield rollout.forward_program(one)
    yield rollout.backward_program(one, wants._replace(actor=False), frozenset(step.moments))
    many = dream._replace(op="open_loop", actor=None, policy=None, heads=None)
    yield rollout.forward_program(many)
    yield rollout.forward_program(many._replace(through=False))
    yield rollout.backward_program(many, wants._replace(actor=False), frozenset({"deter", "stoch"}))
    yield observe.forward_program(filtered._replace(save=False))
    elites = max(1, rows // 10)
    plan = cem._Spec(
        (2, 3, 1, rows), precision, step, *shapes[:2], None,
        gamma=returns.gamma, lam=returns.lam, num_elites=elites, min_std=0.1,
        sample_std=False, clip=1.0, proposals=0,
    )  # fmt: skip
    yield cem.program(plan)
    yield cem.program(plan._replace(value=None, proposals=2))
    yield cem.program(plan._replace(discount=shapes[0]))


@functools.cache
def kernels(sizes: Sizes, rows: int, precision: Precision) -> list[Spec]:
    """What there is to compile: of kernels that differ in the model's sizes alone, the largest.

    Of other models than Walker's, the steps and the actor of the first FEW programs; of today's all
    in those that has another part than Walker's, of Gumbel-softmax samples what draws them.
    """
    found: dict[Any, tuple[int, Spec]] = {}
    count = None if sizes == REPORT else FEW
    for program in itertools.islice(programs(sizes, rows, precision), count):
        for launch, indices in program.launches():
            spec = launch.spec(dict.fromkeys(indices, 1))
            if not label(spec).startswith(WANTED.get(sizes, ("cells", *ACTOR))):
                continue
            size = sum(v for _, v in spec.constants if type(v) is int)
            key = (
                spec.fn,
                tuple((k, v) for k, v in spec.constants if type(v) is not int or k in BLOCKS),
                spec.options,
                spec.types,
            )
            if key not in found or found[key][0] < size:
                found[key] = size, spec
    return [spec for _, spec in found.values()]


def label(spec: Spec) -> str:
    """A name that tells the kernels apart."""
    constants = dict(spec.constants)
    module = spec.fn.fn.__module__.rpartition(".")[2]
    words = [f"{module}.{spec.fn.fn.__name__}"]
    words += [str(v) for k, v in constants.items() if k in ("HEAD", "SAVE") and v]
    words += ["with " + "/".join(names)] if (names := _optional(spec)) else []
    words += ["x".join(str(constants[k]) for k in BLOCKS if k in constants)]
    words += ["bf16" if any(t == "*bf16" for _, t in spec.types) else "fp32"]
    return " ".join(words)


def _optional(spec: Spec) -> list[str]:
    return [n for n, _ in spec.types if n in OPTIONAL]


def compile_for(spec: Spec, arch: int) -> Usage:
    """Compile a kernel and return what it uses.

    Raises:
        LayoutError: it takes other parameters than the loop would give it.
    """
    began = time.perf_counter()
    made = triton.compile(
        source(spec), target=GPUTarget("cuda", arch, 32), options=dict(spec.options)
    )
    seconds = time.perf_counter() - began
    checked(spec, made.metadata, made.asm["ptx"], made.asm["cubin"])  # the parameters' layout
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])

        def tool(command: Any, option: str) -> str:
            done = subprocess.run(
                [command.path, option, cubin], capture_output=True, text=True, check=True
            )
            return done.stdout

        report = tool(triton.knobs.nvidia.cuobjdump, "-res-usage")
        code = tool(triton.knobs.nvidia.nvdisasm, "-c")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    order, moved = memory_order(made.asm["ttir"], made.asm["ttgir"])
    return Usage(
        label(spec), arch, used["REG"], used["STACK"], used["LOCAL"],
        len(re.findall(r"\b(?:LDL|STL)\b", code)), made.metadata.shared,
        tuple(sorted(set(MATRIX.findall(code)))), order, moved, seconds,
    )  # fmt: skip


_EVENT = re.compile(
    r"\b(?:(?P<load>tt\.load|ttg\.async_copy_global_to_local|ttng\.async_tma_copy\w*)"
    r"|(?P<store>tt\.store)|(?P<barrier>ttg\.barrier|gpu\.barrier))\b.*?(?:loc\((?P<at>.*)\))?$"
)


class Place(NamedTuple):
    """Where a load or store is: behind how many barriers, and in which loops that have some."""

    segment: int
    loops: tuple[int, ...]


def memory_events(code: str) -> list[tuple[str, str, Place]]:
    """Loads (L), stores (S) and barriers (B) in order: what, where in the source, and the place."""
    names = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", code, re.MULTILINE))

    @functools.cache
    def source_of(at: str) -> str:
        return re.sub(r"#loc\d*", lambda name: source_of(names.get(name[0], "")), at)

    found, scopes, with_barrier, opened, segment = [], [], [], 0, 0
    for line in code.splitlines():
        text = re.sub(r" loc\(.*\)$", "", line).strip()
        if text.startswith("}"):
            scopes.pop()
        if event := _EVENT.search(line):
            what = event.lastgroup if event.lastgroup != "at" else None
            what = what or next(k for k in ("load", "store", "barrier") if event[k])
            if what == "barrier":
                segment += 1
                with_barrier += [scope for scope in scopes if scope not in with_barrier]
            found.append((what[0].upper(), source_of(event["at"] or ""), segment, tuple(scopes)))
        if text.endswith("{"):
            opened += 1
            scopes.append(opened)
    number = {scope: i for i, scope in enumerate(sorted(with_barrier))}
    return [
        (what, at, Place(segment, tuple(number[s] for s in scopes if s in number)))
        for what, at, segment, scopes in found
    ]


def memory_order(before: str, after: str) -> tuple[str, tuple[str, ...]]:
    """The order of memory accesses and barriers behind the compiler's passes, and what they moved.

    A load may come earlier, for its loop to be pipelined, but not from behind a barrier, and not
    out of a loop that has one: the loads of its next round are behind the barrier of this one.
    """
    allowed: dict[tuple[str, str], set[Place]] = {}
    for what, at, place in memory_events(before):
        allowed.setdefault((what, at), set()).add(place)
    segments, moved = [set()], []
    for what, at, place in memory_events(after):
        if what == "B":
            segments.append(set())
            continue
        segments[-1].add(what)
        if place not in allowed.get((what, at), ()):
            moved.append(f"{what} {at}")
    return "B".join("".join(sorted(segment)) for segment in segments), tuple(moved)


def faults(spec: Spec, usage: Usage) -> list[str]:
    """What is wrong with a kernel, nothing if all is well."""
    wrong = []
    if usage.stack or usage.local or usage.spills:
        wrong.append(
            f"{usage.stack} bytes of stack, {usage.local} of local memory, {usage.spills} spills"
        )
    if usage.shared > SHARED:
        wrong.append(f"{usage.shared} bytes of shared memory")
    bf16 = any(t == "*bf16" for _, t in spec.types)
    multiplies = any(name in usage.kernel for name in PRODUCTS)
    if bf16 and multiplies and not usage.matrix:
        wrong.append("no matrix instructions")
    if (want := handovers(spec)) != usage.order:
        wrong.append(f"loads, stores and barriers in the order {usage.order}, not {want}")
    if usage.moved:
        wrong.append(f"moved across a barrier: {', '.join(usage.moved)}")
    return wrong


def handovers(spec: Spec) -> str:
    """The order of loads, stores and barriers: what another thread stored is read behind one."""
    order = "LS" + "BLS" * barriers(spec)
    if spec.fn.fn.__name__ == "copy_kernel" and "source" not in dict(spec.types):
        return order if dict(spec.constants)["ADD"] else order[1:]
    if spec.fn.fn.__module__.endswith(".mlp") and spec.fn.fn.__name__ == "backward_kernel":
        # Without the input's gradient nothing in the kernel reads what the last of the layers
        # stored. The barrier behind it is one of those that the loop over layers has anyway.
        return order if "d_x1" in dict(spec.types) else order[:-2]
    return order


def barriers(spec: Spec) -> int:
    """How many places inside a kernel hand over through global memory.

    Hidden layers are the first one and a loop over the others.
    """
    c = dict(spec.constants)
    module = spec.fn.fn.__module__.rpartition(".")[2]
    backward = spec.fn.fn.__name__ == "backward_kernel"
    each = {name: 1 + (name in dict(spec.types)) for name in ("norms", "i_norms", "l_norms")}
    if module == "cells":
        # forward: input layers, gates, latent layers; backward: outputs, latent layers, gates, the
        # last input layer, the others; a layer with a norm has one more, between its sums and that
        inputs = min(c["IL"] - backward, 2) + backward
        layers = inputs * each["i_norms"] + min(c["LL"], 2) * each["l_norms"]
        # and a late GRU, too
        return layers + (2 if backward else 1) + ("g_norm" in dict(spec.types))
    if module == "blocks":  # gradients through a norm: behind it, then before it
        return int("_backward_" in spec.fn.fn.__name__ and "norm" in dict(spec.types))
    if module == "mlp":
        layers = min(c["LAYERS"], 2) * each["norms"]
        return layers + (1 if backward and c["HEAD"] != "ready" else 0)
    return 0


def check(task: tuple[str, int, bool, int, int]) -> tuple[Usage, list[str]]:
    model, rows, bf16, arch, number = task
    spec = kernels(MODELS[model], rows, Precision(bf16, arch))[number]
    usage = compile_for(spec, arch)
    return usage, faults(spec, usage)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHS)
    parser.add_argument("--precision", nargs="*", default=("bf16", "fp32"))
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--model", nargs="*", default=tuple(MODELS), choices=MODELS)
    parser.add_argument("--kernel", default="", help="what their names contain")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    tasks, seen = [], set()
    for model, arch, precision, rows in itertools.product(
        options.model, options.arch, options.precision, options.rows
    ):
        bf16 = precision == "bf16"
        if model in ("silu", "wide") and not bf16:
            continue
        for i, spec in enumerate(kernels(MODELS[model], rows, Precision(bf16, arch))):
            name = (label(spec), arch, model)
            if name not in seen and options.kernel in name[0]:
                seen.add(name)
                tasks.append((model, rows, bf16, arch, i))
    began, failed = time.perf_counter(), 0
    print(f"Triton {triton.__version__}")
    print(f"model  {'kernel':68} sm  regs stack local shared barriers compile  matrix")
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for (model, *_), (used, wrong) in zip(tasks, pool.map(check, tasks), strict=True):
            failed += bool(wrong)
            print(
                f"{model:6} {used.kernel:68} {used.arch:<3} {used.registers:4} {used.stack:5} "
                f"{used.local:5} {used.shared:6} {used.order.count('B'):8} {used.seconds:6.1f}s  "
                f"{' '.join(used.matrix)}{'  FAULT: ' if wrong else ''}{'; '.join(wrong)}",
                flush=True,
            )
    print(f"{len(tasks)} kernels, {failed} at fault, {time.perf_counter() - began:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
