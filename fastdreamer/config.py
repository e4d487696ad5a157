"""Every setting of a run, as frozen dataclasses; presets are values, not code paths.

``Config()`` is the report's experiment. ``PRESETS`` holds the named starting points, the command
line overrides single fields (``--model.deter 300``), and ``validate()`` refuses what cannot run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Suppress, arg

Activation = Literal["elu", "relu", "silu", "tanh"]


def _short(name: str) -> Any:
    """A second, shorter name of an option on the command line."""
    return arg(aliases=[name])


class ConfigError(ValueError):
    """A setting that cannot run; the message names the field and the values it accepts."""


@dataclass(frozen=True)
class EnvConfig:
    """The task and what the agent sees of it."""

    task: Suppress[str] = "walker-walk"
    """DeepMind Control task, domain-task; ``train`` takes it as its argument."""
    obs: Annotated[Literal["pixels", "state", "both"], _short("--obs")] = "pixels"
    """Observation: camera pixels, the simulator's state vector, or both."""
    action_repeat: int = 2
    """Simulator control steps per decision; rewards are summed, one image is rendered."""
    image_size: int = 64
    """Height and width of the pixels."""
    time_limit: float | None = None
    """Simulated seconds of an episode; None is the task's own (Walker: 1000 env frames)."""
    render_quality: Annotated[Literal["full", "fast"], _short("--render-quality")] = "full"
    """"fast" also drops multisampling: about twice as quick in software, a little coarser."""


@dataclass(frozen=True)
class ReplayConfig:
    """Where experience is kept and how it is sampled."""

    capacity: int = 1_000_000
    """Env frames kept on disk; the oldest episodes go first."""
    batch: int = 8
    """Sequences per update."""
    length: int = 50
    """Decisions per sequence."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the world model."""

    deter: int = 200
    """D, size of the deterministic state."""
    stoch: int = 30
    """S, size of the stochastic state."""
    hidden: int = 400
    """Units of the RSSM's input, prior and posterior layers."""
    min_std: float = 0.1
    """Added to the softplus of the prior's and posterior's standard deviation."""
    encoder_channels: tuple[int, int, int, int] = (16, 32, 64, 64)
    """Channels of the four convolutions (kernel 4, stride 2, ReLU)."""
    encoder_linear: int | None = 1024
    """Size of a linear layer behind the convolutions; None uses them flat."""
    decoder_channels: tuple[int, int, int] = (64, 32, 16)
    """Channels between the four transposed convolutions (kernels 5 5 6 6, stride 2)."""
    decoder_linear: int = 1024
    """Size of the linear layer before the transposed convolutions."""
    decoder_linear_relu: bool = True
    """Apply a ReLU behind that linear layer."""
    units: int = 400
    """Units of every MLP: reward, actor, critic, and the state encoder and decoder."""
    reward_layers: int = 2
    """Hidden layers of the reward head."""
    state_layers: int = 2
    """Hidden layers of the state encoder and of the state decoder."""
    activation: Activation = "elu"
    """Activation of the RSSM and of every MLP."""


@dataclass(frozen=True)
class LossConfig:
    """The world model's loss (negative evidence lower bound)."""

    image_scale: float = 1.0
    """Factor of the squared error summed over pixels (0.5: unit-variance Gaussian likelihood)."""
    state_scale: float = 1.0
    """Factor of the squared error summed over the state vector."""
    reward_scale: float = 1.0
    """Factor of the reward's squared error."""
    kl_scale: float = 1.0
    """Factor of the KL divergence."""
    free_nats: float = 3.0
    """The mean KL is not pushed below this."""
    kl_balance: float | None = None
    """Weight of the prior's share of the KL gradient (0.8 in DreamerV2); None: not balanced."""


@dataclass(frozen=True)
class BehaviorConfig:
    """Actor and critic, learned in imagination."""

    imag_horizon: int = 15
    """Decisions imagined from every state of the batch."""
    gamma: float = 0.99
    """Discount per decision."""
    lam: float = 0.95
    """The λ of the λ-return."""
    actor_layers: int = 4
    """Hidden layers of the actor."""
    critic_layers: int = 3
    """Hidden layers of the critic."""
    mean_scale: float = 1.0
    """c in the actor's mean c·tanh(x/c) before the squashing tanh."""
    std_offset: float = 5.0
    """Added to the actor's raw standard deviation before its softplus."""
    min_std: float = 0.1
    """Added to the actor's standard deviation."""
    value_scale: float = 1.0
    """Factor of the critic's squared error."""
    discount_weights: bool = False
    """Weight imagined step t by γ^t in both losses."""
    target_every: int = 0
    """Copy the critic to a target network every so many updates; 0: no target network."""
    return_norm: bool = False
    """Divide the actor's loss by the 5-95 percentile range of the returns, at least 1."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam, one optimiser each."""

    model_lr: float = 6e-4
    """Learning rate of the world model."""
    actor_lr: float = 8e-5
    """Learning rate of the actor."""
    critic_lr: float = 8e-5
    """Learning rate of the critic."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip: float = 100.0
    """Largest norm of each optimiser's gradient."""


@dataclass(frozen=True)
class CollectConfig:
    """How experience is gathered."""

    prefill: int = 3
    """Episodes of uniformly random actions before the first update."""
    noise: float = 0.3
    """Standard deviation of the Gaussian added to the actor's action."""

    controller: Annotated[Literal["auto", "actor", "mpc", "mixed"], _short("--collect")] = "auto"
    """Who acts: the actor, the planner (mpc), or both, every other episode; auto: the agent's own,
    which is Dreamer's actor and PlaNet's planner."""


@dataclass(frozen=True)
class PlanConfig:
    """Model-predictive control (report, Algorithm 2), and PlaNet's planner."""

    plan_horizon: int = 20
    """Decisions planned ahead."""
    num_samples: int = 100
    """Candidate action sequences an iteration."""
    num_elites: int = 20
    """The best of them, which the next Normal is fitted to."""
    iterations: int = 15
    """Refits; with 0 the actor's own action is taken."""
    init_std: float = 1.0
    """Standard deviation of the first candidates around the start (the report: 1)."""
    min_std: float = 0.0
    """The least standard deviation of a refit."""
    clip: float = 0.9999
    """Bound on the candidates' actions."""
    common_noise: bool = False
    """Roll all candidates of an iteration out under the same latent noise, so that their scores
    differ by their actions alone."""
    proposals: int = 0
    """So many of the candidates are rollouts of the stochastic actor."""
    warm_start: bool = False
    """Start from the last plan, one decision later, instead of the actor's rollout."""
    warm_iterations: int = 5
    """Refits of a warm start."""
    budget_ms: Annotated[float | None, _short("--plan-ms")] = None
    """Milliseconds a plan may take: as many iterations as fit, at least one; none: all."""


@dataclass(frozen=True)
class ExploreConfig:
    """Optimism: the upper confidence bound of the λ-return over an ensemble of heads."""

    method: Annotated[Literal["none", "ucb"], _short("--explore")] = "none"
    """none: collect for the return alone; ucb: for mean + β·std of the members' λ-returns."""
    at: Literal["actor", "plan"] = "actor"
    """Who maximises the bound: a second actor that collects, or the planner that collects."""
    heads: int = 5
    """M, reward heads, at least 2."""
    units: int | None = None
    """Units of the ensembles' hidden layers; none: those of the agent's own heads."""
    critics: bool = False
    """An ensemble of critics, too; without it the members share the agent's critic."""
    beta: float = 1.0
    """Weight of the spread."""
    schedule: Literal["constant", "gp-ucb"] = "constant"
    """gp-ucb: β grows with round t of collection as √(2·ln(t²π²/(6δ)))."""
    delta: float = 0.1
    """The δ of that schedule."""


@dataclass(frozen=True)
class SafetyConfig:
    """A control barrier function, learned from a safety signal on the state observation."""

    signal: Annotated[str, _short("--safety")] = "none"
    """none, walker (torso height and joint speed), or module:function: state to margin."""
    min_height: float = 0.5
    """Of "walker": least height of the torso in metres."""
    max_joint_speed: float = 20.0
    """Of "walker": greatest speed of a joint in rad/s."""
    alpha: float = 0.2
    """The barrier may lose this part of itself in a decision: B(next) ≥ (1 − α)·B(now)."""
    layers: int = 2
    """Hidden layers of the barrier."""
    lr: float = 1e-3
    """Learning rate of the barrier."""
    hinge: float = 0.3
    """On safe states the barrier is to reach the signal or at least this; unsafe: its negative."""
    step_scale: float = 1.0
    """Factor of the condition's shortfall in the barrier's loss."""
    limit: float = 0.01
    """Mean shortfall that the actor may cause before its multiplier grows."""
    multiplier_lr: float = 2.0
    """Step of the Lagrange multiplier an update; 0: the actor does not know of the barrier."""
    multiplier_max: float = 200.0
    """The multiplier's greatest value."""
    shield: bool = False
    """Filter the actions of collection, too."""
    shield_samples: int = 64
    """Candidates an iteration of the shield."""
    shield_elites: int = 8
    """Candidates that the next iteration starts from."""
    shield_iterations: int = 3
    """Iterations of the shield."""
    shield_std: float = 0.5
    """Standard deviation of its first candidates around the proposed action."""


@dataclass(frozen=True)
class TrainConfig:
    """The schedule."""

    frames: int = 1_000_000
    """Env frames to collect, prefill included."""
    replay_ratio: float = 80.0
    """Replayed decisions per collected decision; sets the updates per episode."""
    pretrain: int = 0
    """Updates on the prefill alone, before the first policy episode."""
    checkpoint_every: int = 200
    """Updates between checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    snapshot_every: int = 10_000
    """Env frames between snapshots, weights kept for good; 0: none but the final one."""
    keep_snapshots: int = 50
    """Most snapshots kept; where there are more, every second one goes."""
    log_every: int = 50
    """Updates between logged losses."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation, without exploration noise."""

    every: int = 10_000
    """Env frames between evaluations; 0: never."""
    episodes: int = 5
    """Episodes an evaluation."""
    video: bool = True
    """Keep a video of the first episode of each evaluation (pixels only)."""
    controller: Literal["auto", "actor", "mpc", "planet"] = "auto"
    """Who acts; auto: the agent's own."""


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Presets: report, walker, state, tiny."""

    seed: int = 0
    """Fixes every random number of the run."""
    backend: Literal["auto", "eager", "native", "triton"] = "auto"
    """Who computes the recurrent loops; auto takes the fastest that can run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast, float32 weights; auto: bf16 where the CPU has it, and on GPUs."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads of the learner; 0 is torch's own choice."""
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
        _check_types(self, "")
        positive = {
            "env": ("action_repeat",),
            "replay": ("capacity", "batch"),
            "model": ("deter", "stoch", "hidden", "units", "decoder_linear", "min_std"),
            "loss": ("image_scale", "state_scale", "reward_scale"),
            "behavior": ("imag_horizon", "mean_scale", "min_std", "value_scale"),
            "optim": ("model_lr", "actor_lr", "critic_lr", "eps", "clip"),
            "collect": ("prefill",),
            "plan": ("plan_horizon", "num_samples", "num_elites", "init_std", "warm_iterations"),
            "safety": ("min_height", "max_joint_speed", "lr", "hinge", "multiplier_max",
                       "shield_samples", "shield_elites", "shield_iterations", "shield_std"),
            "train": ("frames", "replay_ratio", "checkpoint_every", "keep_checkpoints",
                      "log_every"),
            "eval": ("episodes",),
        }  # fmt: skip
        not_negative = {
            "": ("seed", "threads"),
            "model": ("reward_layers", "state_layers"),
            "loss": ("kl_scale", "free_nats"),
            "behavior": ("actor_layers", "critic_layers", "target_every"),
            "collect": ("noise",),
            "explore": ("beta",),
            "safety": ("layers", "step_scale", "limit", "multiplier_lr"),
            "plan": ("iterations", "min_std", "proposals"),
            "train": ("pretrain", "snapshot_every"),
            "eval": ("every",),
        }
        for names, accepts, low in ((positive, "> 0", 0), (not_negative, ">= 0", -1)):
            for section, fields in names.items():
                for name in fields:
                    value = getattr(getattr(self, section) if section else self, name)
                    ok = value > 0 if low == 0 else value >= 0
                    _require(ok, f"{section}.{name}".lstrip("."), accepts, value)
        for name in ("gamma", "lam"):
            value = getattr(self.behavior, name)
            _require(0 <= value <= 1, f"behavior.{name}", "between 0 and 1", value)
        keep = self.train.keep_snapshots
        _require(keep >= 2, "train.keep_snapshots", ">= 2", keep)
        for name in ("num_elites", "proposals"):
            value, samples = getattr(self.plan, name), self.plan.num_samples
            _require(value <= samples, f"plan.{name}", f"<= plan.num_samples = {samples}", value)
        _require(0 < self.plan.clip <= 1, "plan.clip", "> 0 and <= 1", self.plan.clip)
        if self.agent == "planet":  # it has no actor to ask
            collect, evaluate = self.collect.controller, self.eval.controller
            _require(collect == "auto", "collect.controller", "'auto' for planet", collect)
            ok = evaluate in ("auto", "planet")
            _require(ok, "eval.controller", "'auto' or 'planet' for planet", evaluate)
            _require(not self.plan.proposals, "plan.proposals", "0 for planet", self.plan.proposals)
        balance = self.loss.kl_balance
        _require(balance is None or 0 <= balance <= 1, "loss.kl_balance", "none or 0..1", balance)
        _require(self.replay.length >= 2, "replay.length", ">= 2", self.replay.length)
        if self.env.obs != "state":
            size = self.env.image_size
            _require(size == 64, "env.image_size", "64 (the four-layer encoder's size)", size)
        for name, value in (
            ("env.time_limit", self.env.time_limit),
            ("model.encoder_linear", self.model.encoder_linear),
            ("plan.budget_ms", self.plan.budget_ms),
            ("explore.units", self.explore.units),
        ):
            _require(value is None or value > 0, name, "none or > 0", value)
        self._validate_explore()
        self._validate_safety()
        ok = re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None
        _require(ok, "device", "cpu, cuda or cuda:N", self.device)
        return self

    def _validate_explore(self) -> None:
        explore = self.explore
        _require(explore.heads >= 2, "explore.heads", ">= 2", explore.heads)
        _require(0 < explore.delta < 1, "explore.delta", "between 0 and 1", explore.delta)
        if explore.method == "none":
            return
        plans = self.agent == "planet" or self.collect.controller in ("mpc", "mixed")
        if explore.at == "plan":
            accepts = "'actor' where no planner collects (--collect mpc)"
            _require(plans, "explore.at", accepts, explore.at)
        if self.agent == "planet":
            _require(explore.at == "plan", "explore.at", "'plan' for planet", explore.at)
            _require(not explore.critics, "explore.critics", "false for planet", True)

    def _validate_safety(self) -> None:
        safety = self.safety
        _require(0 < safety.alpha <= 1, "safety.alpha", "> 0 and <= 1", safety.alpha)
        elites, samples = safety.shield_elites, safety.shield_samples
        _require(elites <= samples, "safety.shield_elites", f"<= {samples} candidates", elites)
        if safety.signal == "none":
            _require(not safety.shield, "safety.shield", "false without safety.signal", True)
            return
        ok = safety.signal == "walker" or re.fullmatch(r"[\w.]+:\w+", safety.signal) is not None
        _require(ok, "safety.signal", "none, walker or module:function", safety.signal)
        _require(self.agent == "dreamer", "agent", "'dreamer' with safety", self.agent)
        ok = self.env.obs != "pixels"
        _require(ok, "env.obs", "state or both with safety (it reads the state)", self.env.obs)


def _report() -> Config:
    return Config()


def _walker() -> Config:
    """The original's networks, actor and losses with a cheaper economy."""
    return Config(
        replay=ReplayConfig(batch=16, length=50),
        model=ModelConfig(
            hidden=200,
            encoder_channels=(32, 64, 128, 256),
            encoder_linear=None,
            decoder_channels=(128, 64, 32),
            decoder_linear_relu=False,
        ),
        loss=LossConfig(
            image_scale=0.5, state_scale=0.5, reward_scale=0.5, free_nats=1.0, kl_balance=0.8
        ),
        behavior=BehaviorConfig(
            mean_scale=5.0,
            std_offset=math.log(math.expm1(5.0)),
            min_std=1e-4,
            value_scale=0.5,
            discount_weights=True,
            target_every=100,
        ),
        collect=CollectConfig(prefill=5),
        plan=PlanConfig(plan_horizon=15, init_std=0.5, common_noise=True),
        train=TrainConfig(replay_ratio=160.0, pretrain=100),
    )


def _state() -> Config:
    """From the simulator's state on a small CPU: the walker preset with smaller networks."""
    walker = _walker()
    return dataclasses.replace(
        walker,
        env=EnvConfig(task="walker-stand", obs="state"),
        replay=ReplayConfig(batch=16, length=16),
        model=dataclasses.replace(walker.model, units=200),
        behavior=dataclasses.replace(
            walker.behavior, imag_horizon=10, actor_layers=2, critic_layers=2
        ),
        optim=OptimConfig(actor_lr=3e-4, critic_lr=3e-4),
        plan=dataclasses.replace(walker.plan, plan_horizon=10),
        train=TrainConfig(frames=300_000, replay_ratio=50.0, pretrain=100),
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
            units=16,
            encoder_channels=(4, 4, 4, 4),
            encoder_linear=16,
            decoder_channels=(4, 4, 4),
            decoder_linear=16,
        ),
        behavior=BehaviorConfig(imag_horizon=3, actor_layers=2, critic_layers=2),
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


PRESETS = {"report": _report(), "walker": _walker(), "state": _state(), "tiny": _tiny()}
"""Named starting points; the ``walker`` preset is the default of ``fastdreamer train``."""


def preset(name: str) -> Config:
    """Return the preset of that name; ConfigError lists the valid names."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; valid presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested plain dictionaries (JSON types; tuples as lists)."""
    as_lists = lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}  # noqa: E731
    return dataclasses.asdict(config, dict_factory=as_lists)


def from_dict(values: dict[str, Any]) -> Config:
    """Return the validated Config of such dictionaries; unknown fields raise ConfigError."""
    return _build(Config, values, "").validate()


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(values, dict):
        name = prefix.rstrip(".") or "config"
        raise ConfigError(f"{name} must be a table of fields, got {values!r}")
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {prefix}{near[0]}?)" if near else ""
            raise ConfigError(
                f"unknown field {prefix}{name}{hint}; valid fields: {', '.join(names)}"
            )
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made)


_TYPES = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
}


def _check_types(section: Any, prefix: str) -> None:
    hints = get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value, hint, name = getattr(section, f.name), hints[f.name], f"{prefix}{f.name}"
        options = get_args(hint)
        if dataclasses.is_dataclass(hint):
            _check_types(value, f"{name}.")
        elif get_origin(hint) is Literal:
            _require(value in options, name, " | ".join(map(repr, options)), value)
        elif get_origin(hint) is tuple:
            ok = isinstance(value, tuple) and len(value) == len(options)
            ok = ok and all(type(v) is int and v > 0 for v in value)
            _require(ok, name, f"{len(options)} positive whole numbers", value)
        elif value is not None or type(None) not in options:
            accepts, types = _TYPES[options[0] if options else hint]
            accepts += " or none" if options else ""
            _require(type(value) in types, name, accepts, value)
            _require(not isinstance(value, float) or math.isfinite(value), name, "finite", value)


def _require(ok: bool, name: str, accepts: str, value: Any) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {accepts}, got {value!r}")
