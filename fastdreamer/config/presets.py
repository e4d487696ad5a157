"""Named starting points of a configuration; values, not code paths."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastdreamer.config.config import Config
from fastdreamer.config.schema import ConfigError, build, check_types
from fastdreamer.config.sections import (
    BehaviorConfig,
    CollectConfig,
    EnvConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    ReplayConfig,
    TrainConfig,
)


def _walker() -> Config:
    """From pixels on two CPU cores: the original's actor and losses on a small scale."""
    return Config(
        env=EnvConfig(render_quality="fast"),
        replay=ReplayConfig(batch=16, length=16),
        model=ModelConfig(
            hidden=200,
            input_hidden=None,
            units=200,
            encoder_channels=(16, 32, 64, 128),
            encoder_linear=None,
            decoder_channels=(64, 32, 16),
            decoder_linear=512,
            decoder_linear_relu=False,
        ),
        loss=LossConfig(
            image_scale=0.5, state_scale=0.5, reward_scale=0.5, free_nats=1.0, kl_balance=0.8
        ),
        behavior=BehaviorConfig(
            imag_horizon=10,
            actor_layers=2,
            critic_layers=2,
            mean_scale=5.0,
            std_offset=math.log(math.expm1(5.0)),
            min_std=1e-4,
            greedy="median",
            value_scale=0.5,
            discount_weights=True,
            target_every=100,
        ),
        optim=OptimConfig(actor_lr=3e-4, critic_lr=3e-4),
        collect=CollectConfig(prefill=5),
        plan=PlanConfig(plan_horizon=15, init_std=0.5, common_noise=True),
        train=TrainConfig(frames=350_000, replay_ratio=64.0, pretrain=100),
        eval=EvalConfig(every=20_000),
    )


def _walker_v3() -> Config:
    """The walker preset with what DreamerV3 has in the place of the original's: categorical
    latents, normalised layers and cell, two-hot heads, returns by their range. Of what was tried
    it learns most in two hours (docs/recipe.md)."""
    walker = _walker()
    return dataclasses.replace(
        walker,
        model=dataclasses.replace(
            walker.model,
            stoch=16,
            classes=16,
            unimix=0.01,
            cell="late-reset",
            activation="silu",
            norm="layer",
            readout="two-hot",
        ),
        # 0.5 of the KL for the prior and 0.1 for the posterior
        loss=dataclasses.replace(
            walker.loss, reward_scale=1.0, kl_scale=0.6, kl_balance=5 / 6, free_nats_each=True
        ),
        behavior=dataclasses.replace(
            walker.behavior, value_scale=1.0, return_norm=True, entropy=3e-4
        ),
    )


def _state() -> Config:
    """From the simulator's state on a small CPU: the walker preset with fewer updates."""
    walker = _walker()
    return dataclasses.replace(
        walker,
        env=EnvConfig(task="walker-stand", obs="state"),
        plan=dataclasses.replace(walker.plan, plan_horizon=10),
        train=dataclasses.replace(walker.train, frames=300_000, replay_ratio=50.0),
        eval=EvalConfig(),
    )


def _tiny() -> Config:
    """Seconds, not hours: for tests."""
    return Config(
        threads=1,
        precision="fp32",
        env=EnvConfig(obs="state", time_limit=1.0),
        replay=ReplayConfig(batch=4, length=8),
        model=ModelConfig(
            deter=16,
            stoch=4,
            hidden=16,
            input_hidden=None,
            units=16,
            encoder_channels=(4, 4, 4, 4),
            encoder_linear=16,
            decoder_channels=(4, 4, 4),
            decoder_linear=16,
        ),
        behavior=BehaviorConfig(imag_horizon=3, actor_layers=2, critic_layers=2, greedy="median"),
        collect=CollectConfig(prefill=2),
        plan=PlanConfig(plan_horizon=3, num_samples=8, num_elites=3, iterations=2),
        train=TrainConfig(
            frames=400,
            replay_ratio=32.0,
            checkpoint_every=10,
            keep_checkpoints=2,
            log_every=5,
            snapshot_every=120,
        ),
        eval=EvalConfig(every=120, episodes=1, video=False),
    )


PRESETS = {
    "report": Config(),
    "walker": _walker(),
    "walker-v3": _walker_v3(),
    "state": _state(),
    "tiny": _tiny(),
}
"""Named starting points; ``fastdreamer train`` starts from ``walker-v3`` where none is named."""


def preset(name: str, changes: dict[str, Any] | None = None) -> Config:
    """The preset of that name.

    Args:
        changes: what to have in place of its settings, as a part of a ``config.json``:
            ``{"env": {"obs": "state"}, "seed": 3}``. Whether they fit together ``validate()`` says.

    Raises:
        ConfigError: an unknown name, which lists the valid ones; an unknown field, or a value of
            another type.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; valid presets: {', '.join(PRESETS)}")
    config = build(Config, changes or {}, base=PRESETS[name])
    check_types(config)
    return config
