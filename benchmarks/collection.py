"""Milliseconds of one decision of collection: `python -m benchmarks.collection [--write]`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import machine, report
from benchmarks.timing import MIN_REPEATS, PhaseRecorder, cell, summary
from fastdreamer.agent import Dreamer
from fastdreamer.config import preset
from fastdreamer.envs import Env, dmc
from fastdreamer.envs.gl import select_gl
from fastdreamer.play import agent_policy, rollout_episode

VARIANTS = {
    "full": ("full", dmc.SHADOW_SIZE),
    "fast": ("fast", dmc.SHADOW_SIZE),
    "suite's 2048² shadows": ("full", 2048),
}
"""Name → --render-quality and texels a side of the shadow map. The first is the default."""
ROWS = {
    "physics": "physics (2 control steps)",
    "render": "render (64 × 64)",
    "policy": "policy (fp32)",
    "other": "other",
    "whole": "**whole decision**",
}
BLOCK = 10  # decisions in a row: the GL context changes between variants, not in training


class _TimedTask(dmc.SuiteTask):
    """A task whose physics and rendering are ranges of a recorder."""

    def __init__(self, recorder: PhaseRecorder, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorder = recorder

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        with self._recorder.annotate("physics"):
            return super().step(action)

    def render(self, height: int, width: int) -> np.ndarray:
        with self._recorder.annotate("render"):
            return super().render(height, width)


def make_env(variant: str, recorder: PhaseRecorder) -> Env:
    """Return Walker from pixels as a run has it, drawn as the variant says."""
    quality, shadow_size = VARIANTS[variant]
    config = preset("report").env
    with mock.patch.object(dmc, "SHADOW_SIZE", shadow_size):
        task = _TimedTask(recorder, config.task, render_quality=quality)
    return Env(task, obs="pixels", action_repeat=config.action_repeat, image_size=config.image_size)


def _decisions(env: Env, policy: Callable[[], Callable], recorder: PhaseRecorder) -> Iterator[None]:
    """One decision at a time by the collector's own loop, new episodes as they end."""
    for seed in range(1_000_000):
        act = policy()

        def timed(obs: dict[str, np.ndarray], act: Callable = act) -> np.ndarray:
            with recorder.annotate("policy"):
                return act(obs)

        steps = rollout_episode(env, timed, seed)
        next(steps)  # the reset
        for _ in steps:
            yield


def measure(repeats: int, warmup: int) -> dict[str, Any]:
    """Time the parts of a decision, as the worker process makes it.

    The worker acts in float32 whatever the precision of the learner, with one torch thread.

    Args:
        repeats: timed decisions per variant, rounded up to whole blocks of ``BLOCK``, in which
            the variants take turns.
        warmup: untimed ones before.

    Raises:
        ValueError: too few repeats. GLError: nothing here can draw.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"at least {MIN_REPEATS} repeats, got {repeats}")
    torch.set_num_threads(1)
    gl = select_gl()
    circumstances = machine.record()
    config = dataclasses.replace(preset("report"), device="cpu")
    agent, recorders, running = None, {}, {}
    for name in VARIANTS:
        recorders[name] = PhaseRecorder()
        env = make_env(name, recorders[name])
        agent = agent or Dreamer(config, env.obs_shapes, env.action_dim)
        policy = lambda agent=agent: agent_policy(  # noqa: E731
            agent, 0, config.collect.noise, sample=config.collect.sample
        )
        running[name] = _decisions(env, policy, recorders[name])
        for _ in range(warmup):
            next(running[name])
    for _ in range(-(-repeats // BLOCK)):
        for name, steps in running.items():
            for _ in range(BLOCK):
                with recorders[name].repeat():
                    next(steps)
    return {
        "machine": circumstances,
        "settings": {"task": config.env.task, "warmup": warmup, "block": BLOCK},
        "gl": {"backend": gl.name, "renderer": gl.renderer},
        "phases": {
            name: {phase: summary(seconds) for phase, seconds in recorder.samples.items()}
            for name, recorder in recorders.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    phases = result["phases"]
    rows = [
        [label, *(cell(measured.get(phase)) for measured in phases.values())]
        for phase, label in ROWS.items()
    ]
    gl, whole = result["gl"], next(iter(phases.values()))["whole"]
    return (
        f"{result['settings']['task']}, drawn by {gl['backend']} ({gl['renderer']}); "
        f"{whole['repeats']} decisions, variants alternating every "
        f"{result['settings']['block']}.\n\n"
        + report.table(["ms: median (p20–p80)", *phases], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    result = measure(args.repeats, args.warmup)
    report.publish("collection", result, write=args.write)


if __name__ == "__main__":
    main()
