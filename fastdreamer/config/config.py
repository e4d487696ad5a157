"""Config: every section of a run's settings together, and which of them can run."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from operator import ge, gt
from typing import Any, Literal

from fastdreamer.config.schema import build, check_types, require
from fastdreamer.config.sections import (
    BehaviorConfig,
    CollectConfig,
    EnvConfig,
    EvalConfig,
    ExploreConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    ReplayConfig,
    SafetyConfig,
    TrainConfig,
)

_POSITIVE = {
    "env": ("action_repeat",),
    "replay": ("capacity", "batch"),
    "model": ("deter", "stoch", "hidden", "units", "decoder_linear", "min_std"),
    "loss": ("image_scale", "state_scale", "reward_scale", "discount_scale"),
    "behavior": ("imag_horizon", "mean_scale", "min_std", "value_scale"),
    "optim": ("model_lr", "actor_lr", "critic_lr", "eps", "clip"),
    "collect": ("prefill", "envs"),
    "plan": ("plan_horizon", "num_samples", "num_elites", "init_std", "warm_iterations"),
    "safety": ("min_height", "max_joint_speed", "lr", "hinge", "multiplier_max",
               "shield_samples", "shield_elites", "shield_iterations", "shield_std"),
    "train": ("frames", "replay_ratio", "checkpoint_every", "keep_checkpoints",
              "log_every"),
    "eval": ("episodes",),
}  # fmt: skip
_NOT_NEGATIVE = {
    "": ("seed", "threads"),
    "model": ("reward_layers", "state_layers"),
    "loss": ("kl_scale", "free_nats"),
    "behavior": ("actor_layers", "critic_layers", "target_every", "entropy"),
    "optim": ("anneal",),
    "collect": ("noise", "round", "workers"),
    "explore": ("beta",),
    "safety": ("layers", "step_scale", "limit", "multiplier_lr"),
    "plan": ("iterations", "min_std", "proposals"),
    "train": ("pretrain", "snapshot_every"),
    "eval": ("every",),
}
_BEFORE: dict[str, dict[str, Any]] = {
    "model": {"input_hidden": None},
    "behavior": {"greedy": "median"},
    "collect": {"sample": False},
}
"""What was built in before it could be chosen: runs and checkpoints from then don't name it."""


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Presets: report, walker, walker-v3, state, tiny."""

    seed: int = 0
    """Fixes every random number of the run."""
    backend: Literal["auto", "eager", "native", "triton"] = "auto"
    """Who computes the recurrent loops; auto takes the fastest that can run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast, float32 weights; auto: bf16 where the CPU measures it faster, or the GPU has
    compute capability 8.0."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto: cuda where there is a GPU that can run, else cpu."""
    threads: int = 0
    """CPU threads of the learner; 0: by the cores and by who computes (docs/training.md)."""
    agent: Literal["dreamer", "planet"] = "dreamer"
    """dreamer: actor and critic learn in imagination; planet: a world model and a planner alone."""
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self) -> Config:
        """Return self; raise ConfigError naming the first field that cannot run."""
        check_types(self)
        for names, accepts, holds in ((_POSITIVE, "> 0", gt), (_NOT_NEGATIVE, ">= 0", ge)):
            for section, fields in names.items():
                for name in fields:
                    value = getattr(getattr(self, section) if section else self, name)
                    require(holds(value, 0), f"{section}.{name}".lstrip("."), accepts, value)
        require(self.seed < 1 << 32, "seed", "< 2**32, as simulators take it", self.seed)
        if self.env.obs != "pixels":
            layers = self.model.state_layers
            require(layers > 0, "model.state_layers", "> 0 where the state is seen", layers)
        for name in ("gamma", "lam"):
            value = getattr(self.behavior, name)
            require(0 <= value <= 1, f"behavior.{name}", "between 0 and 1", value)
        self._validate_model()
        if self.model.discount:
            gamma = self.behavior.gamma
            require(gamma > 0, "behavior.gamma", "> 0 with model.discount", gamma)
        keep = self.train.keep_snapshots
        require(keep >= 2, "train.keep_snapshots", ">= 2", keep)
        for name in ("num_elites", "proposals"):
            value, samples = getattr(self.plan, name), self.plan.num_samples
            require(value <= samples, f"plan.{name}", f"<= plan.num_samples = {samples}", value)
        require(0 < self.plan.clip <= 1, "plan.clip", "> 0 and <= 1", self.plan.clip)
        if self.agent == "planet":  # it has no actor to ask
            collect, evaluate = self.collect.controller, self.eval.controller
            require(collect == "auto", "collect.controller", "'auto' for planet", collect)
            ok = evaluate in ("auto", "planet")
            require(ok, "eval.controller", "'auto' or 'planet' for planet", evaluate)
            require(not self.plan.proposals, "plan.proposals", "0 for planet", self.plan.proposals)
        size, envs = self.collect.round, self.collect.envs
        ok = size == 0 or size >= envs
        require(ok, "collect.round", f"0 or >= collect.envs = {envs}", size)
        balance = self.loss.kl_balance
        require(balance is None or 0 <= balance <= 1, "loss.kl_balance", "none or 0..1", balance)
        require(self.replay.length >= 2, "replay.length", ">= 2", self.replay.length)
        if self.env.obs != "state":
            size = self.env.image_size
            require(size == 64, "env.image_size", "64 (the four-layer encoder's size)", size)
        for name, value in (
            ("env.time_limit", self.env.time_limit),
            ("model.input_hidden", self.model.input_hidden),
            ("model.encoder_linear", self.model.encoder_linear),
            ("plan.budget_ms", self.plan.budget_ms),
            ("explore.units", self.explore.units),
        ):
            require(value is None or value > 0, name, "none or > 0", value)
        self._validate_explore()
        self._validate_safety()
        ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        require(ok, "device", "auto, cpu, cuda or cuda:N", self.device)
        return self

    def _validate_model(self) -> None:
        classes, unimix, bins = self.model.classes, self.model.unimix, self.model.bins
        require(classes is None or classes >= 2, "model.classes", "none or >= 2", classes)
        require(0 <= unimix < 1, "model.unimix", ">= 0 and < 1", unimix)
        require(classes or not unimix, "model.unimix", "0 without model.classes", unimix)
        require(bins >= 3 and bins % 2 == 1, "model.bins", "an odd number >= 3", bins)

    def _validate_explore(self) -> None:
        explore = self.explore
        require(explore.heads >= 2, "explore.heads", ">= 2", explore.heads)
        require(0 < explore.delta < 1, "explore.delta", "between 0 and 1", explore.delta)
        if explore.method == "none":
            return
        pairing = self.behavior.pairing
        require(pairing == "arrival", "behavior.pairing", "'arrival' with explore", pairing)
        plans = self.agent == "planet" or self.collect.controller in ("mpc", "mixed")
        if explore.at == "plan":
            accepts = "'actor' where no planner collects (--collect mpc)"
            require(plans, "explore.at", accepts, explore.at)
        if self.agent == "planet":
            require(explore.at == "plan", "explore.at", "'plan' for planet", explore.at)
            require(not explore.critics, "explore.critics", "false for planet", True)

    def _validate_safety(self) -> None:
        safety = self.safety
        require(0 < safety.alpha <= 1, "safety.alpha", "> 0 and <= 1", safety.alpha)
        elites, samples = safety.shield_elites, safety.shield_samples
        require(elites <= samples, "safety.shield_elites", f"<= {samples} candidates", elites)
        if safety.signal == "none":
            require(not safety.shield, "safety.shield", "false without safety.signal", True)
            return
        # gym:… is taken for an environment, and so not for code that is imported where it is asked
        own = re.fullmatch(r"(?!gym:)[\w.]+:\w+", safety.signal) is not None
        ok = safety.signal == "walker" or own
        require(ok, "safety.signal", "none, walker or module:function", safety.signal)
        require(self.agent == "dreamer", "agent", "'dreamer' with safety", self.agent)
        ok = self.env.obs != "pixels"
        require(ok, "env.obs", "state or both with safety (it reads the state)", self.env.obs)


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested plain dictionaries (JSON types; tuples as lists)."""
    as_lists = lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}  # noqa: E731
    return dataclasses.asdict(config, dict_factory=as_lists)


def from_dict(values: dict[str, Any]) -> Config:
    """Return the validated Config of such dictionaries; unknown fields raise ConfigError.

    A field that a section lacks takes its default or, if it is younger than the section's other
    fields, what was built in before: a run goes on as it was begun.
    """
    if isinstance(values, dict):
        for section, before in _BEFORE.items():
            if isinstance(values.get(section), dict):
                values = values | {section: before | values[section]}
    return build(Config, values).validate()
