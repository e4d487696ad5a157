"""Safety: a control barrier function learned beside actor and critic (report, future work 2).

A safety signal judges an observation: positive is safe, negative is a violation. The barrier
B(feat) is learned from it to be positive on safe states, negative on unsafe ones, and not to fall
faster along the agent's own imagined steps than

    B(next) ≥ (1 − α)·B(now),

which keeps a trajectory that starts in {B ≥ 0} there (a discrete-time control barrier function:
Agrawal and Sreenath 2017). The actor pays for what is missing through a Lagrange multiplier; at run
time a shield replaces an action that breaks the condition by the nearest one that keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.acting.noise import Source, normal
from fastdreamer.config import Config, ConfigError, SafetyConfig
from fastdreamer.named import named
from fastdreamer.nn import MLP, RSSM
from fastdreamer.ops.cem import top
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import MLPParams, RSSMParams, State, mlp

Signal = Callable[[np.ndarray], np.ndarray]
"""State observations [..., n] -> margins [...], positive where safe."""

_WALKER_STATE = 24  # 14 orientations, the torso's height, 9 velocities (3 of the root, 6 joints)


# ---------------------------------------------------------------- signals


def walker_signal(min_height: float, max_joint_speed: float) -> Signal:
    """The built-in signal of Walker: the torso is high enough and no joint turns too fast.

    margin = min((height − min_height) / min_height, (max − fastest joint) / max), so that both
    count in parts of their limit; height in metres, speeds in rad/s.
    """

    def signal(state: np.ndarray) -> np.ndarray:
        height, speed = state[..., 14], np.abs(state[..., 18:24]).max(-1)
        return np.minimum(
            (height - min_height) / min_height, (max_joint_speed - speed) / max_joint_speed
        )

    return signal


def own_signal(safety: SafetyConfig) -> bool:
    """Whether the signal is a function of the user's, ``module:function``."""
    return ":" in safety.signal


def refuse_signal(safety: SafetyConfig, how: str) -> NoReturn:
    """Raise ConfigError: a file names a module, and files import nothing by themselves."""
    raise ConfigError(
        f"safety.signal {safety.signal!r} is named by a file alone, which imports nothing: "
        f"name it again by {how} if you trust it"
    )


def load_signal(config: Config, state_size: int) -> Signal:
    """The safety signal that a configuration names.

    Args:
        config: ``safety.signal`` is "walker" or "module:function"; the module is looked up on
            Python's path and in the current directory.
        state_size: n of the state observations.

    Raises:
        ConfigError: there is no such function, or it does not map [..., n] to finite [...].
    """
    safety = config.safety
    if safety.signal == "none":
        raise ConfigError("there is no safety.signal; name one, walker or module:function")
    if safety.signal == "walker":
        if state_size != _WALKER_STATE:
            raise ConfigError(
                f"safety.signal 'walker' reads Walker's {_WALKER_STATE} numbers of state, "
                f"{config.env.task} has {state_size}; name your own as module:function"
            )
        return walker_signal(safety.min_height, safety.max_joint_speed)
    try:
        function = named(safety.signal)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"safety.signal {safety.signal!r} cannot be loaded: {error}") from error
    if not callable(function):
        raise ConfigError(f"safety.signal {safety.signal!r} is not a function, but {function!r}")
    for lead in ((), (2, 3)):
        _checked(function, safety.signal, np.zeros((*lead, state_size), np.float32))
    return lambda state: _checked(function, safety.signal, state)


def _checked(function: Signal, name: str, state: np.ndarray) -> np.ndarray:
    """The margins, refused where they are not one finite number a state."""
    try:
        margin = np.asarray(function(state), np.float32)
    except Exception as error:
        raise ConfigError(
            f"safety.signal {name!r} failed on a state of shape {state.shape}: {error!r}"
        ) from error
    if margin.shape != state.shape[:-1] or not np.isfinite(margin).all():
        got = f"shape {margin.shape}" if margin.shape != state.shape[:-1] else "values not finite"
        raise ConfigError(
            f"safety.signal {name!r} must map states [..., {state.shape[-1]}] to one finite margin "
            f"each, of {state.shape} made {got}"
        )
    return margin


# ---------------------------------------------------------------- learning


def shortfall(barrier: Tensor, alpha: float) -> Tensor:
    """What is missing in B(next) ≥ (1 − α)·B(now), [H + 1, B] -> [H, B], at least 0."""
    return F.relu((1 - alpha) * barrier[:-1] - barrier[1:])


class Guard(nn.Module):
    """The barrier and the Lagrange multiplier, and their losses.

    Args:
        config: of the agent, with a ``safety.signal``.
        feat_size: F.
        state_size: n of the state observations.
    """

    def __init__(self, config: Config, feat_size: int, state_size: int) -> None:
        super().__init__()
        self.config, model = config.safety, config.model
        self._state_size = state_size
        self.signal_of(config, asked=True)
        sizes = [feat_size, *[model.units] * config.safety.layers, 1]
        self.barrier = MLP(sizes, model.activation)
        self.register_buffer("multiplier", torch.zeros(()))

    def signal_of(self, config: Config, *, asked: bool) -> None:
        """Take the signal that a configuration names; a module of one's own is imported at its
        first use, and not at all where nobody ``asked`` for it, but a file alone names it."""
        self.__dict__.pop("signal", None)
        self._load = lambda: load_signal(config, self._state_size)
        if own_signal(config.safety) and not asked:
            self._load = lambda: refuse_signal(config.safety, "load(..., safety=...)")

    @functools.cached_property
    def signal(self) -> Signal:
        """Margins of states; ConfigError where it cannot be had."""
        return self._load()

    def sign_loss(self, feat: Tensor, margin: Tensor) -> Tensor:
        """Positive on safe states, negative on unsafe ones, each by a hinge and a mean of its own.

        With b = clamp(margin, −m, m), m ``safety.hinge``: mean over safe states of max(0, b − B) +
        mean over unsafe ones of max(0, B − b). What is demanded goes to 0 at the edge, so that the
        barrier crosses it as smoothly as the signal does.

        Args:
            feat: [..., F] of states that were observed; no gradient flows into it.
            margin: [...], the safety signal there.
        """
        value = self.barrier(feat.detach()).squeeze(-1).float()
        safe = margin > 0
        bound = margin.clamp(-self.config.hinge, self.config.hinge)
        miss = F.relu(torch.where(safe, bound - value, value - bound))
        mean = lambda mask: (miss * mask).sum() / mask.sum().clamp(min=1)  # noqa: E731
        return mean(safe) + mean(~safe)

    def losses(
        self, seen: Tensor, margin: Tensor, imagined: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What barrier and actor learn from one update.

        Args:
            seen: [T, B, F], states that were observed. margin: [T, B], their safety signal.
            imagined: [H + 1, N, F], states 0..H of the actor's imagination.

        Returns:
            The barrier's loss, which reaches nothing but the barrier; the actor's price ν·(mean
            shortfall), which reaches it through the states alone; and metrics.
        """
        config = self.config
        value = self.barrier(imagined.detach()).squeeze(-1).float()
        step = shortfall(value, config.alpha).mean()
        sign = self.sign_loss(seen, margin)
        loss = sign + config.step_scale * step
        frozen = mlp(self.barrier.params().detach(), imagined).squeeze(-1).float()
        missing = shortfall(frozen, config.alpha).mean()
        price = self.multiplier.clone() * missing
        metrics = {
            "barrier_loss": loss,
            "barrier_sign_loss": sign,
            "safety_shortfall": missing,
            "safety_multiplier": self.multiplier.clone(),
            "unsafe_share": (margin <= 0).float().mean(),
        }
        return loss, price, metrics

    def update_multiplier(self, missing: Tensor) -> None:
        """One step of dual ascent: ν ← clamp(ν + lr·(missing − limit), 0, max)."""
        config = self.config
        step = config.multiplier_lr * (missing.detach() - config.limit)
        self.multiplier.add_(step).clamp_(0, config.multiplier_max)


# ---------------------------------------------------------------- shield


class Filtered(NamedTuple):
    """What became of proposed actions, one row an environment."""

    action: Tensor  # [B, A]
    changed: Tensor  # [B] bool: the proposal broke the condition
    failed: Tensor  # [B] bool: so did every candidate; the action has the greatest margin
    margin: Tensor  # [B], B(next) − (1 − α)·B(now) of the action


@torch.no_grad()
def filter_actions(
    params: RSSMParams,
    barrier: MLPParams,
    state: State,
    action: Tensor,
    noise: Tensor,
    *,
    alpha: float,
    std: float,
    num_elites: int,
    clip: float = 1.0,
    backend: str | None = None,
) -> Filtered:
    """Keep proposed actions that keep B(next) ≥ (1 − α)·B(now); replace the others.

    A replacement is searched by the cross-entropy method: in each of I iterations N candidates
    a = clamp(mean + std·ε, ±clip) are judged, from the proposal as the first mean; the Normal is
    then fitted to the K best, which are those that keep the condition, nearest to the proposal
    first, and after them those with the greatest margin; its standard deviation stays ``std`` until
    a candidate keeps the condition. Of all candidates of all iterations the
    nearest one that keeps the condition is returned, or, where none does, the one with the greatest
    margin, the proposal included. The next state is the mean of its prior: the dynamics' noise is
    left out.

    Args:
        params: the RSSM's tensors.
        barrier: B, feat -> 1.
        state: deter [B, D] and stoch [B, S].
        action: [B, A], the proposal.
        noise: [I, B, N, A] standard normal.
        alpha: α in (0, 1].
        std: standard deviation of the first candidates.
        num_elites: K in 1..N.
        clip: bound on |a|.
        backend: of the dynamics, see ``fastdreamer.ops.backend``.

    Raises:
        ValueError: a shape or number does not fit.
    """
    B, A = action.shape
    iterations, N = noise.shape[0], noise.shape[2]
    if noise.shape != (iterations, B, N, A) or not iterations:
        raise ValueError(f"filter_actions: noise must be [I, {B}, N, {A}], got {list(noise.shape)}")
    if not 0 < alpha <= 1:
        raise ValueError(f"filter_actions: alpha must be in (0, 1], got {alpha}")
    if not 1 <= num_elites <= N:
        raise ValueError(f"filter_actions: num_elites must be in 1..N={N}, got {num_elites}")
    floor = (1 - alpha) * mlp(barrier, state.feat).squeeze(-1)  # [B]

    def margin(rows: slice | Tensor, tried: Tensor) -> Tensor:
        """B(next) − (1 − α)·B(now) of actions [b, n, A] -> [b, n]."""
        n = tried.shape[1]
        start = State(*(part[rows].repeat_interleave(n, 0) for part in state))
        still = torch.zeros(1, len(start.stoch), start.stoch.shape[1]).to(start.stoch)
        after = open_loop(params, start, tried.reshape(1, -1, A), still, backend=backend)
        value = mlp(barrier, State(after.deter[0], after.stoch[0]).feat).squeeze(-1)
        return value.view(-1, n) - floor[rows].unsqueeze(1)

    best, kept = action.clone(), margin(slice(None), action.unsqueeze(1)).squeeze(1)
    changed = ~(kept >= 0)  # a NaN keeps nothing
    failed = changed.clone()
    rows = changed.nonzero().squeeze(1)
    if len(rows):
        proposal = action[rows].unsqueeze(1)  # [b, 1, A]
        mean, deviation = proposal, torch.full_like(proposal, std)
        tried, margins = [proposal], [kept[rows].unsqueeze(1)]
        for draw in noise[:, rows]:
            tried.append((mean + deviation * draw).clamp(-clip, clip))  # [b, N, A]
            margins.append(margin(rows, tried[-1]))
            order = _preference(margins[-1], (tried[-1] - proposal).norm(dim=-1))
            elites = tried[-1].take_along_dim(top(order, num_elites).unsqueeze(-1), 1)
            found = (margins[-1] >= 0).any(1)[:, None, None]
            mean = elites.mean(1, True)
            deviation = torch.where(found, elites.std(1, False, True), std)
        # The proposal and all candidates, [b, 1 + I·N, ...].
        all_tried, all_margins = torch.cat(tried, 1), torch.cat(margins, 1)
        first = top(_preference(all_margins, (all_tried - proposal).norm(dim=-1)), 1)  # [b, 1]
        best[rows] = all_tried.take_along_dim(first.unsqueeze(-1), 1).squeeze(1)
        kept[rows] = all_margins.take_along_dim(first, 1).squeeze(1)
        failed[rows] = ~(kept[rows] >= 0)
    return Filtered(best, changed, failed, kept)


def _preference(margin: Tensor, distance: Tensor) -> Tensor:
    """Higher is better: kept conditions by nearness (in (0, 1]), then margins (below 0)."""
    return torch.where(margin >= 0, 1 / (1 + distance), margin)


class Shield:
    """The filter of a trained agent's actions, with counts of what it did.

    Args:
        config: the shield's settings and α. rssm, barrier: the agent's modules.

    Attributes:
        decisions: actions seen. changed: of them, those that broke the condition and were replaced.
        failed: of these, those for which no candidate kept it either.
    """

    def __init__(self, config: SafetyConfig, rssm: RSSM, barrier: MLP) -> None:
        self.config, self.rssm, self.barrier = config, rssm, barrier
        self.decisions = self.changed = self.failed = 0

    def __call__(self, state: State, action: Tensor, generator: Source) -> Tensor:
        """Filter actions [B, A] proposed in states [B, ...]."""
        config, (batch, size) = self.config, action.shape
        shape = (config.shield_iterations, batch, config.shield_samples, size)
        filtered = filter_actions(
            self.rssm.params(),
            self.barrier.params(),
            state,
            action,
            normal(generator, *shape, dim=1).to(action.device),
            alpha=config.alpha,
            std=config.shield_std,
            num_elites=config.shield_elites,
        )
        self.decisions += batch
        self.changed += int(filtered.changed.sum())
        self.failed += int(filtered.failed.sum())
        return filtered.action


# ---------------------------------------------------------------- counting


class Violations:
    """Counts the decisions whose observation the safety signal calls unsafe.

    Args:
        signal: of ``load_signal``.

    Attributes:
        decisions: observations seen, the first of an episode left out: nobody decided on it.
        count: of them, those of margin 0 or less.
    """

    def __init__(self, signal: Signal) -> None:
        self.signal = signal
        self.decisions = self.count = 0

    def __call__(
        self, t: int, obs: dict[str, np.ndarray], action: np.ndarray, reward: float
    ) -> None:
        """See one step of an episode, t = 0 its first observation."""
        if t:
            self.decisions += 1
            self.count += int(self.signal(obs["state"]) <= 0)


def safety_rates(violations: Violations | None, shield: Shield | None) -> dict[str, float]:
    """Violations, and the shield's replacements and failures, each per 1000 decisions."""
    rates = {}
    if violations is not None:
        rates["violations"] = 1000 * violations.count / violations.decisions
    if shield is not None:
        rates["shield_changed"] = 1000 * shield.changed / shield.decisions
        rates["shield_failed"] = 1000 * shield.failed / shield.decisions
    return rates
