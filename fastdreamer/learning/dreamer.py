"""Dreamer: a policy that learns; ``update()`` from replay, ``dream()`` of what it would see.

With ``config.agent == "planet"`` it is PlaNet: the same world model, and a planner for an actor.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from fastdreamer.acting.noise import latent, normal
from fastdreamer.acting.policy import Policy, PolicyState
from fastdreamer.config import Config
from fastdreamer.errors import FastdreamerError
from fastdreamer.learning.barrier import BarrierLearner
from fastdreamer.learning.behavior import BehaviorLearner
from fastdreamer.learning.exploration import ExplorerLearner
from fastdreamer.learning.learner import Learner, Losses
from fastdreamer.learning.ranks import ALONE, Ranks
from fastdreamer.learning.world_model import WorldModelLearner
from fastdreamer.machine import nvtx
from fastdreamer.nn.codec import float_to_pixels
from fastdreamer.ops.backend import release_memory
from fastdreamer.ops.gpu import capturing
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import symexp
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import State


class NonFiniteLoss(FastdreamerError, RuntimeError):
    """A loss or its gradient became NaN or infinite; ``name`` says which."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"{name} became {value}")
        self.name, self.value = name, value


class Dreamer(Policy):
    """The agent of the report: ``act()`` in the world, ``update()`` from replay.

    Arguments are those of :class:`fastdreamer.acting.policy.Policy`, all of whose networks it has,
    and ``ranks``, the processes that learn together.
    """

    def __init__(
        self,
        config: Config,
        obs_shapes: dict[str, tuple[int, ...]],
        action_dim: int,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(config, obs_shapes, action_dim, whole=True)
        ones = torch.ones((), device=self.device)
        self.register_buffer("return_range", ones)  # running 5-95 percentile range
        self.ranks = ranks
        self.world_model = WorldModelLearner(self, ranks)
        self.behavior = BehaviorLearner(self, ranks) if self.actor is not None else None
        self.optimist = ExplorerLearner(self, ranks) if self.explorer is not None else None
        self.barrier = BarrierLearner(self, ranks) if self.guard is not None else None

    @property
    def learners(self) -> list[Learner]:
        """One a loss family that the agent has."""
        found = [self.world_model, self.behavior, self.optimist, self.barrier]
        return [learner for learner in found if learner is not None]

    def make_optimizers(self) -> dict[str, torch.optim.Adam]:
        """One Adam each for ``model``, ``actor`` and ``critic`` (PlaNet: the model's alone).

        With an explorer also ``rewards``, ``explorer`` and ``critics``, as far as it has them;
        with a guard ``barrier``.
        """
        eps = self.config.optim.eps
        return {
            name: torch.optim.Adam(module.parameters(), lr=lr, eps=eps, fused=True)
            for name, (module, lr) in self._optimized().items()
        }

    def set_pace(self, optimizers: dict[str, torch.optim.Optimizer], pace: float) -> None:
        """Let optimisers go on at so much of the learning rates of the configuration."""
        for name, (_, lr) in self._optimized().items():
            for group in optimizers[name].param_groups:
                group["lr"] = pace * lr

    def update(
        self,
        batch: dict[str, Tensor],
        optimizers: dict[str, torch.optim.Optimizer],
        generator: torch.Generator,
        *,
        health: bool = False,
    ) -> dict[str, float]:
        """Learn from one batch: world model, then actor and critic in imagination.

        Args:
            batch: time-major [T, B, ...]: ``pixels`` uint8 and/or ``state`` float, ``action``
                (the one that led to the observation), ``reward`` (received with it),
                ``is_first`` bool and, where ends are predicted, ``terminated`` bool. Of several
                ranks, this one's sequences.
            optimizers: of ``make_optimizers()``.
            generator: draws every noise of the update, on its own device; alike on all ranks.
            health: also measure what tells a healthy run from a dead one: ``prior_entropy``,
                ``post_entropy``, ``actor_entropy`` (of the squashed action, all in nats),
                ``actor_std`` (before the tanh) and ``action_saturated``, the share of imagined
                actions beyond ±0.99.

        Returns:
            The losses and diagnostics by name. While a CUDA graph is captured nothing can be read:
            then tensors, that every replay fills anew, and no value is checked.

        Raises:
            NonFiniteLoss: a loss or gradient is NaN or infinite; its optimiser was not stepped,
                and of actor and critic neither. RankError: another rank is gone.
        """
        release_memory()  # the last rollout's would lie idle beside the decoder's
        watching, *dreaming = self._noise(*batch["reward"].shape, generator)
        # Dynamics learning: the model's states of the batch; a step up the evidence lower bound.
        seen = self.world_model.watch(batch, watching)
        found = self.world_model.losses(batch, seen, health=health)
        metrics = self._learn("model", found, optimizers)
        release_memory()  # the decoder's would lie idle beside the imagination's
        feat, dream = seen.state.feat, None
        # Behaviour learning: imagine from each state, predict rewards and values, λ-returns; a step
        # of actor and critic.
        if self.behavior is not None:
            dream = self.behavior.imagine(seen.state, batch, dreaming)
            found = self.behavior.losses(dream, health=health)
            if self.barrier is not None:
                found = found.beside(self.barrier.losses(batch, feat, dream))
            metrics |= self._learn("behavior", found, optimizers)
            if self.barrier is not None:
                self.barrier.update_multiplier(found)
        # The report's future work 1: whoever collects by optimism.
        if self.optimist is not None:
            found = self.optimist.losses(feat, batch["reward"], dream, generator)
            metrics |= self._learn("explorer", found, optimizers)
        return _numbers(metrics)

    def update_target(self) -> None:
        """Copy the critic to the target critic; call every ``behavior.target_every`` updates."""
        if self.target_critic is not None:
            self.target_critic.load_state_dict(self.critic.state_dict())
        if self.optimist is not None:
            self.optimist.update_target()

    @torch.no_grad()
    def dream(
        self, state: PolicyState, horizon: int, generator: torch.Generator | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Imagine what the agent does next and what it would see (report Figure 4).

        Dreamer's actor acts in the dream; PlaNet plans at every step of it.

        Args:
            state: of one environment, as ``act`` returned it; its action has not been taken yet.
            horizon: decisions to imagine, at least 1.
            generator: of the latent samples and actions; None uses the agent's own.

        Returns:
            The actions [horizon, A], the first of which is the state's own, and the predicted
            observations that they lead to: ``pixels`` uint8 [horizon, 64, 64, 3] and/or ``state``
            [horizon, n] in the observation's units.

        Raises:
            ValueError: horizon below 1, or more than one environment.
        """
        if horizon < 1 or len(state.deter) != 1:
            raise ValueError(f"dream: {horizon} decisions of {len(state.deter)} environments")
        generator = generator or self._act_generator
        rssm = self.model.rssm.params()
        state_noise = latent(rssm, generator, horizon, 1).to(self.device)
        now = State(state.deter, state.stoch)
        first = open_loop(rssm, now, state.action[None], state_noise[:1])
        deter, stoch, action = first.deter, first.stoch, state.action[None]
        if self.actor is None:
            for noise in state_noise[1:]:
                now = State(deter[-1], stoch[-1])
                then, _ = self.plan(now, "planet", generator=generator)
                then = then[None]
                step = open_loop(rssm, now, then, noise[None])
                deter, stoch = torch.cat([deter, step.deter]), torch.cat([stoch, step.stoch])
                action = torch.cat([action, then])
        elif horizon > 1:
            rest = imagine(
                rssm,
                self.actor.params(),
                State(deter[0], stoch[0]),
                state_noise[1:],
                normal(generator, horizon - 1, 1, self.action_dim).to(self.device),
            )
            deter, stoch = torch.cat([deter, rest.deter]), torch.cat([stoch, rest.stoch])
            action = torch.cat([action, rest.action])
        means = self.model.decoder(State(deter, stoch).feat[:, 0])
        return action[:, 0].cpu().numpy(), _observed(means)

    @torch.no_grad()
    def decode(self, state: PolicyState) -> dict[str, np.ndarray]:
        """The observations that the decoder makes of a state.

        Returns:
            ``pixels`` uint8 [B, 64, 64, 3] and/or ``state`` [B, n] in its own units.
        """
        return _observed(self.model.decoder(State(state.deter, state.stoch).feat))

    @torch.no_grad()
    def foresee(self, state: PolicyState, generator: torch.Generator | None = None) -> PolicyState:
        """The state behind a state's action, without looking: one step of the dynamics.

        Args:
            state: as ``act`` returned it; its action is the one that is taken.
            generator: of the latent sample; None uses the agent's own.
        """
        rssm = self.model.rssm.params()
        noise = latent(rssm, generator or self._act_generator, 1, len(state.deter)).to(self.device)
        now = State(state.deter, state.stoch)
        ahead = open_loop(rssm, now, state.action[None], noise)
        return state._replace(deter=ahead.deter[0], stoch=ahead.stoch[0])

    @torch.no_grad()
    def predict(
        self, batch: dict[str, Tensor], context: int, generator: torch.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """Watch the beginning of recorded sequences, then predict the rest by the actions alone.

        Args:
            batch: time-major [T, B, ...], as ``Dreamer.update`` takes it.
            context: steps that are watched, 1..T - 1; no episode begins behind them.
            generator: of the latent samples; None uses the agent's own.

        Returns:
            The observations that the decoder makes of all T states, the watched ones included:
            ``pixels`` uint8 [T, B, 64, 64, 3] and/or ``state`` [T, B, n] in its own units.

        Raises:
            ValueError: no such context, or an episode begins behind it.
        """
        T, B = batch["is_first"].shape
        if not 1 <= context < T or batch["is_first"][context:].any():
            raise ValueError(
                f"predict: {context} of {T} steps watched, or an episode begins behind"
            )
        generator = generator or self._act_generator
        rssm = self.model.rssm.params()
        noise = latent(rssm, generator, T, B).to(self.device)
        seen = {kind: x[:context] for kind, x in batch.items()}
        with self.autocast():
            watched = observe(
                rssm,
                self.model.rssm.initial(B),
                self.model.encoder(seen),
                seen["action"],
                seen["is_first"],
                noise[:context],
            ).state
            now = State(watched.deter[-1], watched.stoch[-1])
            ahead = open_loop(rssm, now, batch["action"][context:], noise[context:])
            means = self.model.decoder(torch.cat([watched.feat, ahead.feat]))
        return _observed(means)

    def _optimized(self) -> dict[str, tuple[nn.Module, float]]:
        """Networks, one an optimiser, by its name, and their learning rates."""
        return {
            name: (module, lr)
            for learner in self.learners
            for name, (module, lr) in learner.optimized().items()
            if module is not None
        }

    def _noise(self, T: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Of the posterior [T, B, ...], and of imagined states and actions [H, T·B, ...]."""
        H, rows = self.config.behavior.imag_horizon, self.ranks.size * B
        rssm = self.model.rssm.params()
        drawn = (
            latent(rssm, generator, T, rows),
            latent(rssm, generator, H, T * rows),
            normal(generator, H, T * rows, self.action_dim),
        )
        return tuple(self.ranks.own(noise, B).to(self.device) for noise in drawn)

    def _learn(
        self, what: str, found: Losses, optimizers: dict[str, torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        """Backward, clip, step; return the metrics, and the gradients' norms before clipping."""
        norms = {}
        with nvtx.annotate(f"{what} backward"):
            for name in found.named:
                optimizers[name].zero_grad(set_to_none=True)
            torch.autograd.backward(list(found.named.values()))
            networks = {
                name: [p for group in optimizers[name].param_groups for p in group["params"]]
                for name in found.named
            }
            parts, named, metrics = self.ranks.exchange(
                itertools.chain(*networks.values()), found.parts, found.named, found.metrics
            )
            for name, params in networks.items():
                norms[name] = nn.utils.clip_grad_norm_(params, self.config.optim.clip)
            _check_finite(
                {f"{name} loss": value for name, value in (parts | named).items()}
                | {f"gradient of the {name} loss": norm for name, norm in norms.items()}
            )
            with nvtx.annotate("optimizer"):
                for name in found.named:
                    optimizers[name].step()
        return metrics | {f"{name}_grad_norm": norm for name, norm in norms.items()}


def _check_finite(values: dict[str, Tensor]) -> None:
    """Raise for the first that is not finite."""
    if not capturing(next(iter(values.values())).device):
        for name, value in _numbers(values).items():
            if not math.isfinite(value):
                raise NonFiniteLoss(name, value)


def _numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics as floats, in one transfer from the device."""
    numbers = torch.stack([value.detach() for value in metrics.values()])
    numbers = numbers.unbind() if capturing(numbers.device) else numbers.tolist()
    return dict(zip(metrics, numbers, strict=True))


def _observed(means: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The decoder's means as observations: uint8 pixels, the state in its own units."""
    seen = {}
    if "pixels" in means:
        seen["pixels"] = float_to_pixels(means["pixels"]).cpu().numpy()
    if "state" in means:
        seen["state"] = symexp(means["state"].float()).cpu().numpy()
    return seen
