"""What a Rollout adds to an op, and what it saves its caller: `python -m benchmarks.rollout`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import machine, report
from benchmarks.timing import summary
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import State
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.rollout import Rollout
from fastdreamer.testing import REPORT
from fastdreamer.verify import _imagine_loop, _observe_loop

CALLS = {"rssm_step, B 1": 1000, "observe, T 50, B 50": 60, "imagine, H 15, B 400": 24}
"""Repeats of each."""


def world_model() -> dict[str, nn.Module]:
    """Modules of the report's sizes, as a caller has them."""
    A, D, S, E, hidden, units, *layers, _ = REPORT
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
        deter = nets["gru"](nets["inp"](pair, act_last=True), one.deter)
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


@torch.no_grad()
def measure(threads: int) -> dict[str, Any]:
    """Time all cases, their variants interleaved; what they compute is compared first."""
    torch.set_num_threads(threads)
    result: dict[str, Any] = {"machine": machine.record(), "times": {}}
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
    return result


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    rows = []
    for name, times in result["times"].items():
        op, rollout, loop = (times[v]["median_ms"] for v in ("op", "rollout", "own loop"))
        rows.append([name, f"{op:.3f}", f"{rollout:.3f}", f"{(rollout - op) * 1e3:+.0f} µs",
                     f"{loop:.3f}", f"{loop / op:.2f}×", f"{loop / rollout:.2f}×"])  # fmt: skip
    heads = ["forward, median ms", "bare op", "Rollout", "added", "own modules in a loop"]
    return report.table([*heads, "op's ratio", "Rollout's ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    report.publish("rollout", measure(args.threads), write=args.write)


if __name__ == "__main__":
    main()
