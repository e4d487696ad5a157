"""The settings of each part of a run and their defaults, which are the report's experiment.

A field's text below it is its help on the command line. Nothing is checked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

try:
    from tyro.conf import Suppress, arg
except ModuleNotFoundError:  # no command line is installed, which alone looks at these
    Suppress, arg = None, dict

Activation = Literal["elu", "relu", "silu", "tanh"]
Greedy = Literal["median", "mode"]
Norms = Literal["none", "layer", "rms"]
Quality = Literal["full", "fast", "matte", "unshadowed", "bare"]
Readouts = Literal["plain", "symlog", "two-hot"]


def _short(name: str) -> Any:
    """A second, shorter name of an option on the command line."""
    return arg(aliases=[name])


@dataclass(frozen=True)
class EnvConfig:
    """The task and what the agent sees of it."""

    task: Annotated[str, Suppress] = "walker-walk"
    """DeepMind Control task, gym:ID or module:function; ``train`` takes it as its argument."""
    obs: Annotated[Literal["pixels", "state", "both"], _short("--obs")] = "pixels"
    """Observation: camera pixels, the simulator's state vector, or both."""
    action_repeat: int = 2
    """Simulator control steps per decision; rewards are summed, one image is rendered."""
    image_size: int = 64
    """Height and width of the pixels."""
    time_limit: float | None = None
    """Simulated seconds of an episode; None is the task's own (Walker: 1000 env frames)."""
    render: Annotated[Literal["opengl", "rays"], _short("--render")] = "opengl"
    """Who draws the suite's images; rays need no OpenGL (docs/rendering.md)."""
    render_quality: Annotated[Quality, _short("--render-quality")] = "full"
    """Each leaves out one thing more: fast multisampling, matte the floor's mirror image,
    unshadowed the shadows, bare the sky."""


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
    """S, size of the stochastic state; with ``classes`` the number of its categoricals."""
    classes: int | None = None
    """K: the stochastic state is that many categorical latents of K classes each, straight-through
    as in DreamerV2; none: it is Gaussian."""
    unimix: float = 0.0
    """Part of the uniform distribution in these categoricals (0.01 in DreamerV3)."""
    cell: Literal["gru", "late-reset"] = "gru"
    """The RSSM's recurrence: torch's GRU, or DreamerV2's, whose reset is inside the candidate."""
    hidden: int = 400
    """Units of the RSSM's prior and posterior layers."""
    input_hidden: int | None = 200
    """Units of the input layer in front of its GRU; none: as many as ``hidden``."""
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
    """Hidden layers of the reward head, and of the continuation head."""
    discount: bool | None = None
    """Predict whether the episode goes on behind a state, and discount by it; none: a new run does
    so on tasks from outside the suite, whose episodes may end early."""
    state_layers: int = 2
    """Hidden layers of the state encoder and of the state decoder, at least 1."""
    activation: Activation = "elu"
    """Activation of the RSSM and of every MLP."""
    norm: Norms = "none"
    """LayerNorm or RMSNorm in front of these activations, in the place of the layers' biases, and
    inside the late-reset cell; ensembles of an explorer and a barrier have none."""
    readout: Readouts = "plain"
    """How the heads of reward and value say a number: as it is, by its symlog, or (two-hot) as a
    mean over bins that they classify into, which starts at 0 (DreamerV3)."""
    bins: int = 255
    """Bins of two-hot heads, from symexp(−20) to symexp(20); an odd number."""


@dataclass(frozen=True)
class LossConfig:
    """The world model's loss (negative evidence lower bound)."""

    image_scale: float = 1.0
    """Factor of the squared error summed over pixels (0.5: unit-variance Gaussian likelihood)."""
    state_scale: float = 1.0
    """Factor of the squared error summed over the state vector."""
    reward_scale: float = 1.0
    """Factor of the reward head's loss."""
    discount_scale: float = 1.0
    """Factor of the continuation's cross-entropy."""
    kl_scale: float = 1.0
    """Factor of the KL divergence."""
    free_nats: float = 3.0
    """The mean KL is not pushed below this."""
    free_nats_each: bool = False
    """The KL of no single state is pushed below it (DreamerV3), instead of their mean."""
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
    pairing: Literal["arrival", "departure"] = "arrival"
    """Which reward goes with the value of state t + 1 in the λ-return: that of arriving there or,
    as in the report's code, that predicted in state t."""
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
    greedy: Greedy = "mode"
    """The actor's action without noise: tanh(mean), the median of its distribution, or the mode."""
    value_scale: float = 1.0
    """Factor of the critic's loss."""
    discount_weights: bool = False
    """Weight imagined step t by γ^t in both losses; where ends are predicted, the probability to
    come so far weights it anyway."""
    target_every: int = 0
    """Copy the critic to a target network every so many updates; 0: no target network."""
    return_norm: bool = False
    """Divide the actor's loss by the 5-95 percentile range of the returns, at least 1."""
    entropy: float = 0.0
    """Weight of the entropy of the actor's squashed action, in nats, beside the returns."""


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
    anneal: int = 0
    """Env frames at the end of a run over which all learning rates fall linearly to a tenth."""


@dataclass(frozen=True)
class CollectConfig:
    """How experience is gathered."""

    prefill: int = 3
    """Episodes of uniformly random actions before the first update."""
    sample: bool = True
    """The actor acts by a sample of its distribution; without it by what an evaluation takes."""
    noise: float = 0.3
    """Standard deviation of the Gaussian added to the action, which is then clipped."""
    controller: Annotated[Literal["auto", "actor", "mpc", "mixed"], _short("--collect")] = "auto"
    """Who acts: the actor, the planner (mpc), or both, every other episode; auto: the agent's own,
    which is Dreamer's actor and PlaNet's planner."""
    round: int = 0
    """Episodes a cycle collects with the weights of one update; 0: as many as ``envs``."""
    envs: int = 1
    """Environments that a worker steps side by side; one decision is one batch of them."""
    workers: int = 0
    """Processes that share out a round, which changes nothing but the time; 0: the cores that the
    learner's threads leave, at least one and no more than a round has batches of ``envs``."""


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
    refit_std: Literal["population", "sample"] = "population"
    """The elites' standard deviation: by 1/K or, as the report's code takes it, by 1/(K - 1)."""
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
    """Milliseconds a plan may take: as many iterations as fit, at least one; none: all. With
    ``collect.envs`` a plan is one of so many environments."""


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
    """Keep a video of the first episode of each evaluation, and show in TensorBoard what the world
    model predicts blindly (pixels only)."""
    controller: Literal["auto", "actor", "mpc", "planet"] = "auto"
    """Who acts; auto: the agent's own."""
