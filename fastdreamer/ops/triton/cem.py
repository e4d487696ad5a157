"""Triton body of :mod:`fastdreamer.ops.cem`: all iterations as one program.

An iteration samples the candidates, rolls them through the dynamics step by step, evaluates the
heads on all H·B·N states at once, scores, and refits the Normal in place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer.ops.params import ReturnParams, RSSMParams, State
from fastdreamer.ops.triton import tiles
from fastdreamer.ops.triton.build import (
    Precision,
    autocast_bf16,
    bins_of,
    gru_named,
    named,
)
from fastdreamer.ops.triton.layout import (
    NO_STD,
    MlpShape,
    Read,
    StagedShape,
    StepShape,
    feat_shape,
    step_shape,
)
from fastdreamer.ops.triton.program import Program
from fastdreamer.ops.triton.run import run
from fastdreamer.ops.triton.staged import Builder

BLOCK = 256
LAST = tl.constexpr(-(2**31))  # the key of what is never an elite


@triton.jit(do_not_specialize=["size"])
def sample_kernel(
    mean,  # [H, B, A] float32
    std,
    noise,  # [H, B, N, A]
    proposals,  # [H, B, P, A], in place of the first P candidates, or None
    action,  # [H, B, N, A], written
    size,  # H · B · N · A
    clip,
    A: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """clamp(mean + std · noise, ±clip); NaN stays NaN."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    of = at // (N * A) * A + at % A
    m = tl.load(mean + of, mask=inside, other=0.0)
    s = tl.load(std + of, mask=inside, other=0.0)
    a = m + s * tl.load(noise + at, mask=inside, other=0.0)
    if proposals is not None:
        n = at // A % N
        proposed = inside & (n < P)
        a = tl.load(proposals + (of // A * P + n) * A + at % A, mask=proposed, other=a)
    a = tl.where(a > clip, clip, a)
    a = tl.where(a < -clip, -clip, a)
    tl.store(action + at, a, mask=inside)


@triton.jit(do_not_specialize=["H", "columns"])
def score_kernel(
    reward,  # [H, columns] float32
    value,  # of the same states, or None: the rewards are summed
    discount,  # likewise, or None: gamma
    scores,  # [columns]
    H,
    columns,
    gamma,
    lam,
    mix,  # 1 - lam
    BLOCK: tl.constexpr,
):
    """G_0 of each column, or the sum of its rewards."""
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = column < columns
    at = column + tl.cast(H - 1, tl.int64) * columns
    total = tl.zeros([BLOCK], tl.float32)
    if value is not None:
        total = tl.load(value + at, mask=inside, other=0.0)
    for _ in range(H):
        r = tl.load(reward + at, mask=inside, other=0.0)
        if value is not None:
            v = tl.load(value + at, mask=inside, other=0.0)
            d = gamma
            if discount is not None:
                d = tl.load(discount + at, mask=inside, other=0.0)
            total = r + d * (mix * v + lam * total)
        else:
            total += r
        at -= columns
    tl.store(scores + column, total, mask=inside)


@triton.jit(do_not_specialize=["B"])
def refit_kernel(
    scores,  # [B, N]
    action,  # [H, B, N, A]
    mean,  # [H, B, A], written
    std,
    B,
    least,
    H: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LESS: tl.constexpr,  # 1: the sample's standard deviation, 0: the population's
    NP: tl.constexpr,  # powers of two, at least N and K
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The Normal of the K best of each row.

    The order is that of one 64-bit key: above, bits of the score that compare as the score does,
    NaN below all; below, the index counted backwards, so that among equals the lower one is first.
    """
    b = tl.program_id(0)
    n = tl.arange(0, NP)
    score = tl.load(scores + b * N + n, mask=n < N, other=float("nan"))
    alive = score == score
    score = tl.where(score == 0.0, 0.0, score)  # -0 is 0
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(alive, ordered, LAST)
    key = (ordered.to(tl.int64) << 32) | (NP - 1 - n).to(tl.int64)
    best = tl.topk(key, KP)
    elite = ((best >> 32) > LAST) & (tl.arange(0, KP) < K)
    index = NP - 1 - (best & 0x7FFFFFFF).to(tl.int32)
    count = tl.sum(elite.to(tl.float32), 0)  # 0: all become NaN
    divisor = tl.where(count > 1.0, count - LESS, count)
    for start in range(0, H * A, BLOCK):
        e = start + tl.arange(0, BLOCK)
        inside = e < H * A
        row = (e // A).to(tl.int64) * B + b
        mask = elite[:, None] & inside[None, :]
        a = tl.load(
            action + (row[None, :] * N + index[:, None]) * A + (e % A)[None, :],
            mask=mask,
            other=0.0,
        )
        m = tl.sum(a, 0) / count
        off = tl.where(mask, a - m[None, :], 0.0)
        s = tl.sqrt(tl.sum(off * off, 0) / divisor)
        s = tl.where(s < least, least, s)
        tl.store(mean + row * A + e % A, m, mask=inside)
        tl.store(std + row * A + e % A, s, mask=inside)


class _Spec(NamedTuple):
    """All that the program depends on."""

    sizes: tuple[int, int, int, int]  # I, H, B, N
    precision: Precision
    step: StepShape | StagedShape
    reward: MlpShape
    value: MlpShape | None  # None: rewards are summed
    discount: MlpShape | None  # None: gamma
    gamma: float
    lam: float
    num_elites: int
    min_std: float
    sample_std: bool
    clip: float
    proposals: int  # P; 0: none are given
    reward_as: Read | None = None
    value_as: Read | None = None
    hard: bool = False  # whether a discount is gamma or 0
    departure: bool = False  # whether rewards are those of states 0..H-1


@functools.lru_cache(maxsize=64)
def program(spec: _Spec) -> Program:
    (I, H, B, N), step = spec.sizes, spec.step  # noqa: E741
    A, D, S = step.A, step.D, step.S
    rows = B * N
    b = Builder("cem", spec.precision)
    start = b.slot("start.deter", (B, D)), b.slot("start.stoch", (B, S))
    given = b.slot("start.mean", (H, B, A)), b.slot("start.std", (H, B, A))
    action_noise = b.slot("action_noise", (I, H, B, N, A))
    state_noise = b.slot("state_noise", (I, H, B, N, step.noise))
    proposals = b.slot("proposals", (H, B, spec.proposals, A)) if spec.proposals else None
    mean, std = b.slot("mean", (H, B, A), "output"), b.slot("std", (H, B, A), "output")
    scores = b.slot("scores", (I, B, N), "output")
    action = b.slot("action", (H, B, N, A), "scratch")
    bounds = step.bound and spec.clip > 1.0  # else they are
    deter = b.slot("deter", (H + 1, rows, D), "scratch")
    stoch = b.slot("stoch", (H + 1, rows, S), "scratch")
    tape = b.operands("tape", (rows, step.tape), "scratch")
    logits = {"logits": b.slot("logits", (rows, S), "scratch").at(0)} if step.classes else {}
    reward = b.slot("reward", (H, rows), "scratch")
    reward_tape = b.operands("reward.tape", (H * rows, spec.reward.tape), "scratch")

    dynamics = b.pack_step("step", step, "prior")
    reward_head = b.pack_mlp("reward", spec.reward)
    value = None
    if spec.value:
        value = b.slot("value", (H, rows), "scratch")
        value_tape = b.operands("value.tape", (H * rows, spec.value.tape), "scratch")
        value_head = b.pack_mlp("value", spec.value)
    discount = None
    if spec.discount:
        discount = b.slot("discount", (H, rows), "scratch")
        discount_tape = b.operands("discount.tape", (H * rows, spec.discount.tape), "scratch")
        discount_head = b.pack_mlp("discount", spec.discount)
    for source, target in zip(given, (mean, std), strict=True):
        b.copy(source, target, H * B, A)
    b.copy(start[0], deter, B, D, repeat=N)  # row b · N + n
    b.copy(start[1], stoch, B, S, repeat=N)
    states = deter.at(rows * D), stoch.at(rows * S)  # 1..H
    paid = (deter.at(0), stoch.at(0)) if spec.departure else states
    with b.loop("i", I) as i:
        size = H * rows * A
        b.launch(
            sample_kernel,
            (-(-size // BLOCK),),
            {
                "mean": mean, "std": std, "noise": action_noise.at(i * size),
                "proposals": proposals, "action": action, "size": size, "clip": spec.clip,
            },
            {"A": A, "N": N, "P": spec.proposals, "BLOCK": BLOCK},
        )  # fmt: skip
        taken = b.bounded(action) if bounds else action
        with b.loop("t", H) as t:
            b.step_forward(
                step,
                dynamics,
                {
                    "deter": deter.at(t * rows * D), "stoch": stoch.at(t * rows * S),
                    "action": taken.at(t * rows * A),
                    "noise": state_noise.at((i * H + t) * rows * step.noise),
                    "new_deter": deter.at((t + 1) * rows * D),
                    "new_stoch": stoch.at((t + 1) * rows * S), "tape": tape.at(0), **logits,
                },
                rows,
                save=False,
            )  # fmt: skip
        b.head_forward(
            spec.reward, reward_head, paid, reward, reward_tape, H * rows,
            save=False, read=spec.reward_as, bins="reward.bins",
        )  # fmt: skip
        if spec.value:
            b.head_forward(
                spec.value, value_head, states, value, value_tape, H * rows,
                save=False, read=spec.value_as, bins="value.bins",
            )  # fmt: skip
        if spec.discount:
            b.mlp_forward(
                spec.discount, discount_head, states, discount.at(0), discount_tape.at(0),
                H * rows, save=False, head="hard" if spec.hard else "discount",
                normal=NO_STD._replace(scale=spec.gamma),
            )  # fmt: skip
        b.launch(
            score_kernel,
            (-(-rows // BLOCK),),
            {
                "reward": reward, "value": value, "discount": discount,
                "scores": scores.at(i * rows), "H": H,
                "columns": rows, "gamma": spec.gamma, "lam": spec.lam, "mix": 1.0 - spec.lam,
            },
            {"BLOCK": BLOCK},
        )  # fmt: skip
        np, kp = max(16, triton.next_power_of_2(N)), max(2, triton.next_power_of_2(spec.num_elites))
        b.launch(
            refit_kernel,
            (B,),
            {
                "scores": scores.at(i * rows), "action": action, "mean": mean, "std": std,
                "B": B, "least": spec.min_std,
            },
            {
                "H": H, "A": A, "N": N, "K": spec.num_elites, "LESS": int(spec.sample_std),
                "NP": np, "KP": kp, "BLOCK": 16,
            },
        )  # fmt: skip
    return b.program()


def cem(
    params: RSSMParams,
    returns: ReturnParams,
    start: State,
    mean: Tensor,
    std: Tensor,
    action_noise: Tensor,
    state_noise: Tensor,
    num_elites: int,
    min_std: float,
    clip: float,
    score: str,
    proposals: Tensor | None,
    sample_std: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``fastdreamer.ops.cem``: mean, std, scores."""
    iterations, horizon, batch, samples, _ = action_noise.shape
    if not iterations:
        return mean.clone(), std.clone(), mean.new_empty(0, batch, samples)
    device = mean.device
    step = step_shape(params)
    bootstrap = (returns.target or returns.critic) if score == "lambda_return" else None
    discount = returns.discount if bootstrap else None
    spec = _Spec(
        (iterations, horizon, batch, samples),
        Precision(autocast_bf16(device), tiles.capability(device)),
        step,
        *(
            head and feat_shape(head, step.D, step.S, stoch_first=returns.stoch_first)
            for head in (returns.reward, bootstrap, discount)
        ),
        *((float(returns.gamma), float(returns.lam)) if bootstrap else (1.0, 1.0)),
        *(num_elites, min_std, sample_std, clip, 0 if proposals is None else proposals.shape[2]),
        Read.of(returns.reward_as, returns.reward),
        Read.of(returns.value_as, bootstrap),
        returns.hard_discount,
        returns.departure and bootstrap is not None,
    )
    inputs = {
        "start.deter": start.deter, "start.stoch": start.stoch, "start.mean": mean,
        "start.std": std, "action_noise": action_noise, "state_noise": state_noise,
        **named("inp", params.inp), **gru_named(params.gru),
        **named("prior", params.prior), **named("reward", returns.reward),
        **(named("value", bootstrap) if bootstrap else {}),
        **(named("discount", discount) if discount else {}),
        **({"proposals": proposals} if spec.proposals else {}),
        **bins_of(returns),
    }  # fmt: skip
    inputs = {slot.name: inputs[slot.name] for slot in program(spec).of_kind("input")}
    with torch.no_grad():
        found = run(program(spec), {name: t.detach().contiguous() for name, t in inputs.items()})
    return found["mean"], found["std"], found["scores"]
