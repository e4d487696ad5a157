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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdreamer.acting.noise import Source, normal, one_by_one
from fastdreamer.acting.signals import Signal, Violations, load_signal, refuse_signal
from fastdreamer.config import Config, SafetyConfig
from fastdreamer.named import names_code
from fastdreamer.nn import MLP, RSSM
from fastdreamer.ops.cem import top
from fastdreamer.ops.layers import MLPParams, mlp
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import Categorical, RSSMParams, State, latent_dist


class Guard(nn.Module):
    """The barrier, the multiplier by which the actor pays for it, and the signal they learn from.

    Args:
        config: of the agent, with a ``safety.signal``.
        feat_size: F.
        state_size: n of the state observations.
    """

    def __init__(self, config: Config, feat_size: int, state_size: int) -> None:
        super().__init__()
        self._state_size = state_size
        self.signal_of(config, asked=True)
        sizes = [feat_size, *[config.model.units] * config.safety.layers, 1]
        self.barrier = MLP(sizes, config.model.activation)
        self.register_buffer("multiplier", torch.zeros(()))

    def signal_of(self, config: Config, *, asked: bool) -> None:
        """Take the signal that a configuration names; a module of one's own is imported at its
        first use, and not at all where nobody ``asked`` for it, but a file alone names it."""
        self.__dict__.pop("signal", None)
        self._load = lambda: load_signal(config, self._state_size)
        if names_code(config.safety.signal) and not asked:
            self._load = lambda: refuse_signal(config.safety, "load(..., safety=...)")

    @functools.cached_property
    def signal(self) -> Signal:
        """Margins of states; ConfigError where it cannot be had."""
        return self._load()


class Filtered(NamedTuple):
    """What became of proposed actions, one row an environment."""

    action: Tensor  # [B, A]
    changed: Tensor  # [B] bool: the action is another than the proposal
    failed: Tensor  # [B] bool: no candidate kept the condition; the action has the greatest margin
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
    margin, the proposal included. The next state is the mean of its prior, or the mode
    of a categorical one: the dynamics' noise is left out.

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
        still = torch.zeros(1, len(start.stoch), params.dims()[params.noise]).to(start.stoch)
        after = open_loop(params, start, tried.reshape(1, -1, A), still, backend=backend)
        deter, stoch = after.deter[0], after.stoch[0]
        if isinstance(params.latent, Categorical):
            stoch = latent_dist(mlp(params.prior, deter), params.latent, deter.dtype).mode()
        value = mlp(barrier, State(deter, stoch).feat).squeeze(-1)
        return value.view(-1, n) - floor[rows].unsqueeze(1)

    best, kept = action.clone(), margin(slice(None), action.unsqueeze(1)).squeeze(1)
    failed = ~(kept >= 0)  # a NaN keeps nothing
    rows = failed.nonzero().squeeze(1)
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
    # Where none keeps it, the proposal's own margin may be the greatest.
    return Filtered(best, (best != action).any(-1), failed, kept)


def _preference(margin: Tensor, distance: Tensor) -> Tensor:
    """Higher is better: kept conditions by nearness (in (0, 1]), then margins (below 0)."""
    return torch.where(margin >= 0, 1 / (1 + distance), margin)


class Shield:
    """The filter of a trained agent's actions, with counts of what it did.

    Args:
        config: the shield's settings and α. rssm, barrier: the agent's modules.

    Attributes:
        decisions: actions seen. changed: of them, those that were replaced by another.
        failed: those for which no candidate kept the condition, the proposal included, which may
            have been left as it was.
    """

    def __init__(self, config: SafetyConfig, rssm: RSSM, barrier: MLP) -> None:
        self.config, self.rssm, self.barrier = config, rssm, barrier
        self.decisions = self.changed = self.failed = 0

    def __call__(self, state: State, action: Tensor, generator: Source) -> Tensor:
        """Filter actions [B, A] proposed in states [B, ...]."""
        filtered = self.filter(state, action, generator)
        self.count(len(action), int(filtered.changed.sum()), int(filtered.failed.sum()))
        return filtered.action

    def filter(self, state: State, action: Tensor, generator: Source) -> Filtered:
        """The same, uncounted, and what became of every row."""
        config, (batch, size) = self.config, action.shape
        each = one_by_one(generator, batch)
        if len(each) > 1:
            rows = [
                self.filter(State(*(part[i : i + 1] for part in state)), action[i : i + 1], own)
                for i, own in enumerate(each)
            ]
            return Filtered(*map(torch.cat, zip(*rows, strict=True)))
        shape = (config.shield_iterations, batch, config.shield_samples, size)
        return filter_actions(
            self.rssm.params(),
            self.barrier.params(),
            state,
            action,
            normal(generator, *shape, dim=1).to(action.device),
            alpha=config.alpha,
            std=config.shield_std,
            num_elites=config.shield_elites,
        )

    def count(self, decisions: int, changed: int, failed: int) -> None:
        """Add to the counts."""
        self.decisions += decisions
        self.changed += changed
        self.failed += failed


class Shields:
    """Shields of one agent, one a row of a batch; each counts its own row.

    shields: at least one.
    """

    def __init__(self, shields: Sequence[Shield]) -> None:
        self._shields = shields

    def __call__(self, state: State, action: Tensor, generator: Source) -> Tensor:
        """Filter actions [B, A] proposed in states [B, ...]."""
        filtered = self._shields[0].filter(state, action, generator)
        rows = zip(filtered.changed.tolist(), filtered.failed.tolist(), strict=True)
        for shield, (changed, failed) in zip(self._shields, rows, strict=True):
            shield.count(1, changed, failed)
        return filtered.action


def safety_rates(violations: Violations | None, shield: Shield | None) -> dict[str, float]:
    """Violations, and the shield's replacements and failures, each per 1000 decisions."""
    rates = {}
    if violations is not None:
        rates["violations"] = 1000 * violations.count / violations.decisions
    if shield is not None:
        rates["shield_changed"] = 1000 * shield.changed / shield.decisions
        rates["shield_failed"] = 1000 * shield.failed / shield.decisions
    return rates
