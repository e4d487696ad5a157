"""Milliseconds of one decision, in collection, alone and in evaluations.

`python -m benchmarks.collection [--write]`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import machine, report
from benchmarks.timing import MIN_REPEATS, PhaseRecorder, cell, summary
from benchmarks.variants import check_native
from fastdreamer.acting import policy as policy_module
from fastdreamer.acting.play import (
    agent_policy,
    episode_steps,
    evaluate,
    evaluate_together,
    more_envs,
)
from fastdreamer.acting.policy import Policy
from fastdreamer.config import Config, preset
from fastdreamer.envs import Env, dmc
from fastdreamer.envs.gl import select_gl
from fastdreamer.learning.dreamer import Dreamer

VARIANTS = {
    "full": ("full", dmc.SHADOW_SIZE),
    "fast": ("fast", dmc.SHADOW_SIZE),
    "suite's 2048² shadows": ("full", 2048),
}
"""Name → --render-quality and texels a side of the shadow map. The first is the default."""
ROWS = {
    "physics": "physics (2 control steps)",
    "render": "render (64 × 64)",
    "images": "act(): encoder of images (fp32)",
    "decide": "act(): filter and actor",
    "act": "act(): the rest",
    "policy": "policy (fp32)",
    "other": "other",
    "whole": "**whole decision**",
}
ACT_ROWS = {
    "images": "encoder of images",
    "decide": "filter and actor",
    "other": "the rest",
    "whole": "**act()**",
}
KINDS = {"state": "state", "pixels": "report", "both": "report"}
"""What an agent sees → the preset of its networks, for `act()` alone."""
EPISODES = 10  # of an evaluation
SHORT = {"state": 0.5, "pixels": 0.25}  # simulated seconds of its episodes here
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
            with recorder.annotate("act"):
                return act(obs)

        steps = episode_steps(env, timed, seed)
        next(steps)  # the reset
        for _ in steps:
            yield


@contextlib.contextmanager
def _recorded(recorder: PhaseRecorder, agent: Policy) -> Iterator[None]:
    """The two compiled parts of ``act`` as ranges of a recorder."""

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with recorder.annotate(name):
                return function(*args, **kwargs)

        return call

    encoder, decide = agent.model.encoder, policy_module.decide
    with (
        mock.patch.object(policy_module, "decide", timed("decide", decide)),
        mock.patch.object(encoder, "embed_pixels", timed("images", encoder.embed_pixels)),
    ):
        yield


def _config(obs: str, name: str, **env: Any) -> Config:
    config = dataclasses.replace(preset(name), device="cpu")
    return dataclasses.replace(
        config, env=dataclasses.replace(config.env, task="walker-walk", obs=obs, **env)
    )


def _acts(repeats: int, warmup: int) -> dict[str, dict[str, Any]]:
    """``act`` on one observation again and again, everything in cache."""
    rng, results = np.random.default_rng(0), {}
    for kind, name in KINDS.items():
        config = _config(kind, name)
        obs = {
            "pixels": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            "state": rng.normal(size=24).astype(np.float32),
        }
        if kind != "both":
            obs = {kind: obs[kind]}
        agent = Policy(config, {kind: x.shape for kind, x in obs.items()}, 6)
        act = agent_policy(agent, 0, config.collect.noise, sample=config.collect.sample)
        recorder = PhaseRecorder()
        for _ in range(warmup):
            act(obs)
        with _recorded(recorder, agent):
            for _ in range(repeats):
                with recorder.repeat():
                    act(obs)
        results[kind] = {phase: summary(each) for phase, each in recorder.samples.items()}
    return results


def _evaluations(rounds: int) -> dict[str, dict[str, Any]]:
    """A decision of evaluations one after another and side by side, in turn."""
    results = {}
    for kind, seconds in SHORT.items():
        config = _config(kind, KINDS[kind], time_limit=seconds)
        envs = more_envs([], config, EPISODES)
        agent = Policy(config, envs[0].obs_shapes, envs[0].action_dim)
        ways = {
            "one after another": lambda agent=agent, envs=envs: [
                evaluate(agent, envs[0], seed) for seed in range(EPISODES)
            ],
            "side by side": lambda agent=agent, envs=envs: evaluate_together(
                agent, envs, range(EPISODES)
            ),
        }
        first, second = (way() for way in ways.values())
        assert first == second, f"{kind}: {first} and {second}"
        decisions, times = EPISODES * envs[0].max_decisions, {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                times[way].append((time.perf_counter() - start) / decisions)
        results[kind] = {way: summary(each) for way, each in times.items()}
        for env in envs:
            env.close()
    return results


def measure(repeats: int, warmup: int) -> dict[str, Any]:
    """Time the parts of a decision, as the worker process makes it.

    The worker acts in float32 whatever the precision of the learner, with one torch thread. In a
    decision of collection the drawing before it has emptied the caches, in ``act`` by itself they
    are full.

    Args:
        repeats: timed decisions per variant, rounded up to whole blocks of ``BLOCK``, in which
            the variants take turns.
        warmup: untimed ones before.

    Raises:
        ValueError: too few repeats. GLError: nothing here can draw. MissingVariant: native cannot
            run here.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"at least {MIN_REPEATS} repeats, got {repeats}")
    check_native()
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
            with _recorded(recorders[name], agent):
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
        "acts": _acts(10 * repeats, warmup),
        "evaluations": _evaluations(rounds=MIN_REPEATS),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    phases = result["phases"]
    rows = _rows(ROWS, phases)
    gl, whole = result["gl"], next(iter(phases.values()))["whole"]
    text = (
        f"{result['settings']['task']}, drawn by {gl['backend']} ({gl['renderer']}); "
        f"{whole['repeats']} decisions, variants alternating every "
        f"{result['settings']['block']}.\n\n"
        + report.table(["ms: median (p20–p80)", *phases], rows)
    )
    if acts := result.get("acts"):
        text += "\n\n`act()` by itself, in a loop, everything in cache:\n\n" + report.table(
            ["ms: median (p20–p80)", *(f"{kind} (preset {KINDS[kind]})" for kind in acts)],
            _rows(ACT_ROWS, acts),
        )
    if evaluations := result.get("evaluations"):
        text += (
            f"\n\nEvaluations of {EPISODES} episodes, a decision of one of them:\n\n"
            + report.table(
                ["ms: median (p20–p80)", *next(iter(evaluations.values())), "ratio"],
                [[kind, *map(cell, ways.values()), _ratio(*ways.values())]
                 for kind, ways in evaluations.items()],
            )
        )  # fmt: skip
    return text


def _rows(labels: dict[str, str], columns: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each of these phases that was measured at all."""
    return [
        [label, *(cell(measured.get(phase)) for measured in columns.values())]
        for phase, label in labels.items()
        if any(phase in measured for measured in columns.values())
    ]


def _ratio(first: dict[str, float], second: dict[str, float]) -> str:
    return f"{first['median_ms'] / second['median_ms']:.2f}×"


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
