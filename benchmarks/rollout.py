"""What a Rollout adds to an op, and what it saves its caller: `python -m benchmarks.rollout`.

Forward passes one by one, and a step of learning behaviour from every state of a batch, of a V1 and
of a V3 model: imagination with heads, forward and backward, the caller's modules in either loop.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, report
from benchmarks.timing import cell, summary
from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import Categorical, State
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.rollout import Rollout, adapt
from fastdreamer.rollout.verify import _imagine_loop, _observe_loop
from fastdreamer.testing import REPORT

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "rollout"))
import modern  # noqa: E402

CALLS = {"rssm_step, B 1": 1000, "observe, T 50, B 50": 60, "imagine, H 15, B 400": 24}
"""Repeats of each."""
HORIZON = 15
LEARNING = {"V1, B 400": 20, "V1, B 1000": 12, "V1, B 2500": 6, "V3, B 1024": 5}
"""Steps of learning by the model and the rows that they start from (V1: n × 50; V3: 16 × 64)."""
PRECISIONS = {"bf16": True, "fp32": False}


def world_model() -> dict[str, nn.Module]:
    """Modules of the report's sizes, as a caller has them."""
    A, D, S, E, hidden, units, *layers, _, _ = REPORT
    reward, critic, actor = ([units] * n for n in layers)

    def mlp(*widths: int, last: bool = False) -> nn.Sequential:
        pairs = zip(widths[:-1], widths[1:], strict=True)
        parts = [part for a, b in pairs for part in (nn.Linear(a, b), nn.ELU())]
        return nn.Sequential(*(parts if last else parts[:-1]))

    return {
        "inp": mlp(S + A, hidden, last=True),
        "gru": nn.GRUCell(hidden, D),
        "prior": mlp(D, hidden, 2 * S),
        "post": mlp(D + E, hidden, 2 * S),
        "actor": mlp(D + S, *actor, 2 * A),
        "reward": mlp(D + S, *reward, 1),
        "critic": mlp(D + S, *critic, 1),
    }


def cases() -> dict[str, dict[str, Callable[[], Any]]]:
    """By name: the bare op, the same through a Rollout, and a loop over the caller's modules."""
    torch.manual_seed(0)
    rollout = Rollout.from_modules(**world_model(), backend="native")
    A, D, S, E = REPORT[:4]
    params, policy, heads = rollout.rssm, rollout.policy, rollout.heads
    one = State(torch.zeros(1, D), torch.zeros(1, S))
    action, noise = torch.randn(1, A).tanh(), torch.randn(1, S)
    T, B = 50, 50
    start = State(torch.zeros(B, D), torch.zeros(B, S))
    first = torch.zeros(T, B, dtype=torch.bool)
    seen = (torch.randn(T, B, E), torch.randn(T, B, A).tanh(), first, start, torch.randn(T, B, S))
    many = State(torch.randn(400, D).tanh(), torch.randn(400, S))
    noises = {"state_noise": torch.randn(15, 400, S), "action_noise": torch.randn(15, 400, A)}
    embed, acted, is_first, before, drawn = seen
    filtered = {"embed": embed, "action": acted, "is_first": is_first, "noise": drawn}
    filtered |= before._asdict()

    def step_loop() -> Any:
        nets, pair = rollout.nets, torch.cat([one.stoch, action], -1)
        deter = nets["gru"](nets["inp"](pair), one.deter)
        mean, y = nets["prior"](deter).chunk(2, -1)
        return deter, mean + (nn.functional.softplus(y) + 0.1) * noise

    return {
        "rssm_step, B 1": {
            "op": lambda: rssm_step(params, one, action, noise, backend="native")[0],
            "rollout": lambda: rollout.step(one, action, noise)[0],
            "own loop": step_loop,
        },
        "observe, T 50, B 50": {
            "op": lambda: (
                observe(params, before, embed, acted, is_first, drawn, backend="native").state
            ),
            "rollout": lambda: rollout.observe(*seen).state,
            "own loop": lambda: tuple(_observe_loop(rollout, filtered).values())[:2],
        },
        "imagine, H 15, B 400": {
            "op": lambda: imagine(params, policy, many, **noises, returns=heads, backend="native")[
                :2
            ],
            "rollout": lambda: rollout.imagine(many, **noises)[:2],
            "own loop": lambda: tuple(_imagine_loop(rollout, noises | many._asdict()).values())[:2],
        },
    }


def latest_model() -> Rollout:
    """A model in the manner and of the sizes of dreamerv3-torch, with its actor and heads."""
    sizes = modern.Sizes(6, 512, 32, 32, 4096, 512)
    heads = {name: modern.StatsMLP(sizes, 255) for name in ("reward", "critic")}
    heads["discount"] = modern.StatsMLP(sizes, 1, "binary")
    actor = modern.StatsMLP(sizes, sizes.action, "normal")
    rollout = adapt(modern.StatsRSSM(sizes), actor=actor, backend="native", **heads).rollout
    rollout.batch_first = False
    return rollout


def learning(
    rollout: Rollout, rows: int, horizon: int = HORIZON
) -> tuple[dict[str, Callable[[], list[Tensor]]], list[nn.Parameter]]:
    """By name: one step through a Rollout and through the caller's loop; and the parameters.

    Nothing is frozen: as in most peers' code, the world model's gradients are made as well.
    """
    torch.manual_seed(0)
    stoch, latent = rollout._state_noise(None, (1, rows), None)[0], rollout.options.latent
    if isinstance(latent, Categorical):
        classes = (stoch * latent.classes).long()
        stoch = nn.functional.one_hot(classes, latent.classes).flatten(1).float()
    start = State(torch.randn(rows, rollout.dims["D"]).tanh(), stoch)
    noises = {"state_noise": rollout._state_noise(None, (horizon, rows), None)}
    noises |= {"action_noise": rollout._action_noise(None, (horizon, rows), None)}
    unused = "post", "begin"
    modules = [m for name, net in rollout.nets.items() if name not in unused for m in net.modules]
    parameters = [parameter for module in modules for parameter in module.parameters()]

    def step(loop: bool, bf16: bool) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if loop:
                out = _imagine_loop(rollout, noises | start._asdict())
                value, returns = out["value"].float(), out["returns"].float()
            else:
                dream = rollout.imagine(start, **noises)
                value, returns = dream.value, dream.returns
        loss = (value - returns.detach()).square().mean() / 2 - returns.mean()
        loss.backward()
        return [value.detach(), returns.detach(), *(p.grad for p in parameters)]

    names = {"Rollout": False, "own loop": True}
    variants = {
        f"{name} {precision}": functools.partial(step, loop, bf16)
        for precision, bf16 in PRECISIONS.items()
        for name, loop in names.items()
    }
    return variants, parameters


def check_learning(rollout: Rollout, rows: int, horizon: int) -> None:
    """The values and gradients of a step of learning against the caller's loop in float32."""
    variants, _ = learning(rollout, rows, horizon)
    exact = variants["own loop fp32"]()

    def errors(variant: str) -> list[float]:
        pairs = zip(variants[variant](), exact, strict=True)
        return [float((got - want).norm() / want.norm()) for got, want in pairs]

    assert max(errors("Rollout fp32")) < 1e-4, "float32 does not agree"
    assert last_backend("imagine") == "native"
    pairs = zip(errors("Rollout bf16"), errors("own loop bf16"), strict=True)
    assert all(ours <= 2 * own for ours, own in pairs), "bfloat16 is worse than the own loop's"


def measure_learning(name: str, steps: int) -> dict[str, Any]:
    """Time steps of learning by turns, by precision; what they compute is compared first."""
    kind, rows = name.split(", B ")
    torch.manual_seed(0)
    if kind == "V1":
        rollout = Rollout.from_modules(**world_model(), backend="native")
        check_learning(rollout, int(rows), HORIZON)
    else:
        rollout = latest_model()
        check_learning(rollout, 8, 2)  # a class drawn otherwise goes on to all that follows
    variants, parameters = learning(rollout, int(rows))
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for precision in PRECISIONS:  # one after the other: both at once are nobody's memory
        sides = {name: run for name, run in variants.items() if name.endswith(precision)}
        for turn in range(steps + 2):
            for variant, run in sides.items():
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.mul_(1)  # as after an optimiser's step: weights are packed again
                begin = time.perf_counter()
                run()
                if turn > 1:  # the first two warm up: new pages, then all of them
                    seconds[variant].append(time.perf_counter() - begin)
    return {variant: summary(values) for variant, values in seconds.items()}


def measure(threads: int) -> dict[str, Any]:
    """Time all cases, their variants interleaved; what they compute is compared first."""
    torch.set_num_threads(threads)
    result: dict[str, Any] = {"machine": machine.record(), "times": {}, "learning": {}}
    with torch.no_grad():
        _measure_forward(result)
    for name, steps in LEARNING.items():
        result["learning"][name] = measure_learning(name, steps)
    return result


def _measure_forward(result: dict[str, Any]) -> None:
    for name, variants in cases().items():
        want = tuple(variants["op"]())
        for run in variants.values():
            for got, exact in zip(tuple(run()), want, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-4)
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(CALLS[name]):
            for variant, run in variants.items():
                begin = time.perf_counter()
                run()
                seconds[variant].append(time.perf_counter() - begin)
        times = {variant: summary(values[len(values) // 10 :]) for variant, values in
                 seconds.items()}  # fmt: skip
        result["times"][name] = times


def table(result: dict[str, Any]) -> str:
    """Return the result as two Markdown tables."""
    rows = []
    for name, times in result["times"].items():
        op, rollout, loop = (times[v]["median_ms"] for v in ("op", "rollout", "own loop"))
        rows.append([name, f"{op:.3f}", f"{rollout:.3f}", f"{(rollout - op) * 1e3:+.0f} µs",
                     f"{loop:.3f}", f"{loop / op:.2f}×", f"{loop / rollout:.2f}×"])  # fmt: skip
    heads = ["forward, median ms", "bare op", "Rollout", "added", "own modules in a loop"]
    forward = report.table([*heads, "op's ratio", "Rollout's ratio"], rows)
    if "learning" not in result:
        return forward
    rows = []
    for name, times in result["learning"].items():
        (turns,) = {t["repeats"] for t in times.values()}
        row = [f"{name}, H {HORIZON} ({turns} turns)"]
        for precision in PRECISIONS:
            rollout, loop = (times[f"{v} {precision}"] for v in ("Rollout", "own loop"))
            ratio = loop["median_ms"] / rollout["median_ms"]
            row += [cell(rollout), cell(loop), f"{ratio:.2f}×"]
        rows.append(row)
    heads = [f"{v} {p}" for p in PRECISIONS for v in ("Rollout", "own loop", "ratio")]
    learning = report.table(["forward and backward with heads, ms", *heads], rows)
    return f"{forward}\n\n{learning}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    report.publish("rollout", measure(args.threads), write=args.write)


if __name__ == "__main__":
    main()
