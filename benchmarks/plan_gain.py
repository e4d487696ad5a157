"""What a plan gains over the actor, believed and real: `python -m benchmarks.plan_gain SNAPSHOT`.

From the same moments of the actor's episodes, the actor's own actions and those of plans are
carried out blindly for some decisions; the model's expected sum of rewards stands beside the
simulator's.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from fastdreamer.acting.play import config_env
from fastdreamer.config import PlanConfig
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.cem import evaluate
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import State
from fastdreamer.training.pretrained import load

PLANS = {
    "actor": None,
    "plan, report": PlanConfig(),
    "… common noise": PlanConfig(common_noise=True),
    "… and 10 decisions, std 0.5": PlanConfig(plan_horizon=10, common_noise=True, init_std=0.5),
    "… and std 0.2": PlanConfig(plan_horizon=10, common_noise=True, init_std=0.2),
}
BLIND = 10  # decisions
MOMENTS = (5, 40, 100, 160)  # decisions of an episode
SAMPLES = 100  # latent trajectories that the model's expectation is taken over


def measure(snapshot: Path, episodes: int) -> dict[str, np.ndarray]:
    """Return [moments, 2] by plan: the model's expected sum of rewards and the real one."""
    agent = load(snapshot)
    env = config_env(agent.config)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PLANS}
    for seed in range(episodes):
        for moment in MOMENTS:
            for name, plan in PLANS.items():
                state = _live(agent, env, seed, moment)
                generator = torch.Generator().manual_seed(moment)
                actions = _actions(agent, state, plan, generator)
                believed = _believed(agent, state, actions, generator)
                real = sum(env.step(action)[1] for action in actions[:, 0].numpy())
                found[name].append((believed, real))
    return {name: np.array(pairs) for name, pairs in found.items()}


def _live(agent: Dreamer, env: Any, seed: int, decisions: int) -> State:
    """Let the actor play; return the filtered state after so many decisions."""
    generator = torch.Generator().manual_seed(seed)
    obs, state = env.reset(seed=seed), None
    for _ in range(decisions):
        action, state = agent.act(obs, state, generator=generator)
        obs = env.step(action)[0]
    _, state = agent.act(obs, state, generator=generator)
    return State(state.deter, state.stoch)


@torch.no_grad()
def _actions(
    agent: Dreamer, state: State, plan: PlanConfig | None, generator: torch.Generator
) -> Tensor:
    if plan is None:  # the actor's mean actions along its own mean dream
        noise = torch.zeros(BLIND, 1, agent.model.rssm.stoch + agent.action_dim)
        parts = noise.split([agent.model.rssm.stoch, agent.action_dim], -1)
        parts = (part.contiguous() for part in parts)
        return imagine(agent.model.rssm.params(), agent.actor.params(), state, *parts).action
    agent.config = dataclasses.replace(agent.config, plan=plan)
    return agent.plan(state, generator=generator)[1].mean[:BLIND]


@torch.no_grad()
def _believed(agent: Dreamer, state: State, actions: Tensor, generator: torch.Generator) -> float:
    many = State(*(part.expand(SAMPLES, -1).contiguous() for part in state))
    noise = torch.randn(BLIND, SAMPLES, agent.model.rssm.stoch, generator=generator)
    actions = actions.expand(-1, SAMPLES, -1).contiguous()
    states = open_loop(agent.model.rssm.params(), many, actions, noise)
    return evaluate(agent._return_params(), many.feat, states.feat, "reward").mean().item()


def table(found: dict[str, np.ndarray]) -> str:
    """Return means, and differences to the actor with their standard errors, as Markdown."""
    rows = []
    for name, pairs in found.items():
        gain = pairs - found["actor"]
        errors = gain.std(0, ddof=1) / len(gain) ** 0.5
        cells = [f"{mean:.2f}" for mean in pairs.mean(0)]
        if name != "actor":
            cells += [f"{g:+.2f} ± {e:.2f}" for g, e in zip(gain.mean(0), errors, strict=True)]
        rows.append([name, *cells, *["–"] * (4 - len(cells))])
    header = ["", "believed", "real", "believed − actor's", "real − actor's"]
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--episodes", type=int, default=6)
    args = parser.parse_args()
    print(table(measure(args.snapshot, args.episodes)))


if __name__ == "__main__":
    main()
