"""Policy: the networks that choose an agent's actions, and how it acts with them.

With ``config.agent == "planet"`` there is no actor and no critic: a planner acts.
"""

from __future__ import annotations

import contextlib
import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdreamer.acting.exploration import Explorer
from fastdreamer.acting.noise import Source, latent, normal, one_by_one
from fastdreamer.acting.parts import acting_parts, keep_only
from fastdreamer.acting.planning import (
    PlanInfo,
    PlanningError,
    greedy_actions,
    nothing_but_nan,
    plan,
)
from fastdreamer.acting.shield import Guard, Shield, Shields
from fastdreamer.config import Config, ConfigError
from fastdreamer.machine.device import resolve_device, resolve_precision
from fastdreamer.nn import Actor, ScalarHead, WorldModel
from fastdreamer.ops.decide import decide
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import Readout, ReturnParams, State


class PolicyState(NamedTuple):
    """What the agent carries from one decision to the next."""

    deter: Tensor  # [B, D]
    stoch: Tensor  # [B, S]
    action: Tensor  # [B, A], the last action
    plan: Tensor | None = None  # [H, B, A], the last plan, which a warm start goes on from

    def rows(self, index: list[int]) -> PolicyState:
        """Those of some environments."""
        plan = None if self.plan is None else self.plan[:, index]
        return PolicyState(self.deter[index], self.stoch[index], self.action[index], plan)


class Policy(nn.Module):
    """The networks that choose a run's actions, and how: encoder, filter, actor, planner, shield.

    It has those of :func:`fastdreamer.acting.parts.acting_parts`, no more and no less, so that the
    weights that travel to it are loaded strictly; what it has not is None.

    Args:
        config: every setting.
        obs_shapes: ``{"pixels": (64, 64, 3), "state": (n,)}``, one or both.
        action_dim: A.
        whole: have all networks of the agent, as who learns does.

    The initial weights are a function of ``config.seed`` alone; torch's global random generator
    is left as it was.
    """

    def __init__(
        self,
        config: Config,
        obs_shapes: dict[str, tuple[int, ...]],
        action_dim: int,
        *,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.config = config.validate()
        self.obs_shapes = {kind: tuple(shape) for kind, shape in obs_shapes.items()}
        self.action_dim = action_dim
        behavior, model = config.behavior, config.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = WorldModel(model, self.obs_shapes, action_dim)
            feat = self.model.rssm.feat_size
            self.actor = self.critic = None
            if config.agent == "dreamer":
                self.actor = Actor.from_config(model, behavior, feat, action_dim)
                self.critic = ScalarHead.from_config(model, feat, behavior.critic_layers)
            self.explorer = self.guard = None
            if config.explore.method == "ucb":
                self.explorer = Explorer(config, feat, action_dim)
            if config.safety.signal != "none":
                self.guard = Guard(config, feat, self.obs_shapes["state"][0])
        self.target_critic = None
        if behavior.target_every and self.critic is not None:
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        if not whole:
            keep_only(self, acting_parts(config))
        self.to(resolve_device(config.device, config.backend))
        self.precision = resolve_precision(config.precision, self.device, config.backend)
        self._act_generator = torch.Generator().manual_seed(config.seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.rssm.prior.layers[0].weight.device

    def initial_state(self, batch: int) -> PolicyState:
        """The state before an episode, [batch, ...] zeros."""
        state = self.model.rssm.initial(batch)
        return PolicyState(*state, state.deter.new_zeros(batch, self.action_dim))

    @torch.no_grad()
    def act(
        self,
        obs: dict[str, np.ndarray | Tensor] | np.ndarray | Tensor,
        state: PolicyState | None = None,
        *,
        controller: str | None = None,
        sample: bool = False,
        noise: float = 0.0,
        explore: bool = False,
        shield: Shield | Shields | None = None,
        generator: Source | None = None,
    ) -> tuple[np.ndarray, PolicyState]:
        """Filter one observation and choose an action.

        Args:
            obs: ``{"pixels": uint8 [64, 64, 3], "state": float [n]}`` or the only kind the agent
                sees by itself; or a batch of them, [B, ...].
            state: what the last call returned; None at the start of an episode.
            controller: ``"actor"``; ``"mpc"``, a plan ranked by λ-return; ``"planet"``, one ranked
                by the sum of rewards; None takes the agent's own, actor or (PlaNet) planet.
            sample: the actor acts by a sample tanh(mean + std·ε); a plan is what it is.
            noise: standard deviation of Gaussian exploration noise. The action is clipped to
                [-1, 1], and the noisy, clipped one is what the filter sees next.
            explore: be optimistic: the exploring actor chooses, a plan is ranked by the upper
                confidence bound.
            shield: of ``make_shield()``, or one a row of them; has the last word on the action,
                noise included, and counts what it does.
            generator: of the posterior sample, the actor's sample or the plan, the exploration
                noise and the shield's candidates, in this order; None uses the agent's own, seeded
                with ``config.seed``. A sequence has one for every row of the batch, which then is
                an environment of its own: it draws what it would draw alone, and where the ops run
                native its action and state are those it would have alone, bit by bit (but for plans
                in bfloat16 on AMX).

        Returns:
            The action, float32 [A] or [B, A] in [-1, 1], and the state for the next call. Without
            ``sample`` and ``noise`` the actor's action is that of ``config.behavior.greedy``.

        Raises:
            ValueError: an observation does not fit the agent. ConfigError: it has no such
            controller, or no explorer. PlanningError: a plan came to nothing but NaN.
        """
        tensors, batched = self._observation(obs)
        batch = len(next(iter(tensors.values())))
        if state is None:
            state = self.initial_state(batch)
        if len(state.deter) != batch:
            raise ValueError(f"act: a batch of {batch} observations, {len(state.deter)} states")
        generator = generator or self._act_generator
        alone = bool(one_by_one(generator, batch))
        draw = lambda: normal(generator, batch, self.action_dim).to(self.device)  # noqa: E731
        controller = self.controller(controller)
        if explore and self.explorer is None:
            raise ConfigError("act: this agent has no explorer; train one with --explore ucb")
        actor = None
        if controller == "actor":
            actor = (self.explorer.actor if explore else None) or self.actor
        greedy = self.config.behavior.greedy
        inside = actor is not None and (sample or greedy == "median")  # one call does it all
        encoder, rssm = self.model.encoder, self.model.rssm.params()
        now, action = decide(
            rssm,
            actor.params() if inside else None,
            State(state.deter, state.stoch),
            state.action,
            self._embed(tensors.get("pixels"), alone=alone),
            latent(rssm, generator, batch).to(self.device),
            draw() if sample and inside else None,
            encoder=encoder.state and encoder.state.params(),
            vector=tensors.get("state"),
        )
        chosen = None
        if actor is not None and not inside:
            action = greedy_actions(actor.params(), now, greedy, alone=alone)
        elif action is None:
            action, info = self.plan(
                now, controller, explore=explore, last=state.plan, generator=generator
            )
            chosen = info.mean
        if noise:
            action = (action + noise * draw()).clamp(-1, 1)
        if shield is not None:
            action = shield(now, action, generator)
        out = action.cpu().numpy().copy()  # the caller may change it, the filter must not see that
        return (out if batched else out[0]), PolicyState(*now, action, chosen)

    def _embed(self, pixels: Tensor | None, *, alone: bool) -> Tensor | None:
        """Embed images; ``alone``: one by one, see :func:`fastdreamer.acting.noise.one_by_one`."""
        if pixels is None:
            return None
        embed = self.model.encoder.embed_pixels
        return torch.cat([embed(image) for image in pixels.split(1)]) if alone else embed(pixels)

    def controller(self, name: str | None = None) -> str:
        """The controller of that name, ``None`` and ``"auto"`` being the agent's own.

        Raises:
            ConfigError: there is none, or the agent has no actor for it.
        """
        planet = self.config.agent == "planet"
        valid = ("planet",) if planet else ("actor", "mpc", "planet")
        own = valid[0]
        if name in (None, "auto"):
            return own
        if name not in valid:
            raise ConfigError(
                f"controller must be one of {', '.join(valid)} for a {self.config.agent} agent, "
                f"got {name!r}"
            )
        return name

    def plan(
        self,
        state: State | PolicyState,
        controller: str = "mpc",
        *,
        explore: bool = False,
        last: Tensor | None = None,
        generator: Source | None = None,
    ) -> tuple[Tensor, PlanInfo]:
        """Plan with ``config.plan`` from each state of a batch.

        Args:
            state: what has deter [B, D] and stoch [B, S]: a PolicyState, or an imagined State.
            controller: ``"mpc"`` or ``"planet"``.
            explore: rank by the upper confidence bound of the same score.
            last: ``PlanInfo.mean`` of one decision ago, for a warm start.
            generator: of every noise, one or one a row; None uses the agent's own.

        Returns:
            The actions [B, A] and how they were found; see :mod:`fastdreamer.acting.planning`.

        Raises:
            PlanningError: all candidates of a row scored NaN; names all such rows.
        """
        source, on_time = generator or self._act_generator, self.config.plan.budget_ms is not None
        each = one_by_one(source, len(state.deter))
        if explore and len(each) > 1 and not on_time:  # the bound is no op; the time is one for all
            found, lost = [], []
            for i, own in enumerate(each):
                row = State(state.deter[i : i + 1], state.stoch[i : i + 1])
                before = None if last is None else last[:, i : i + 1]
                try:
                    found.append(
                        self.plan(row, controller, explore=True, last=before, generator=own)
                    )
                except PlanningError:
                    lost.append(i)
            if lost:  # of the caller's rows, each of which was the only one of its own plan
                raise nothing_but_nan(lost, len(each))
            actions, infos = zip(*found, strict=True)
            return torch.cat(actions), PlanInfo.beside(infos)
        mpc = self.controller(controller) == "mpc"
        actor, score = self.actor, "lambda_return" if mpc else "reward"
        if explore:
            actor = self.explorer.actor or actor
            critic = self.target_critic or self.critic
            score = self.explorer.score(critic, score, self.discount_params())
        with self.autocast():
            return plan(
                State(state.deter, state.stoch),
                self.model.rssm.params(),
                self.return_params(),
                self.config.plan,
                actor=actor.params() if mpc else None,
                greedy=self.config.behavior.greedy,
                score=score,
                last=last,
                generator=source,
            )

    def make_shield(self) -> Shield:
        """A shield by this agent's barrier, with counts of its own; ``act`` takes it.

        Raises:
            ConfigError: the agent has learned no barrier.
        """
        if self.guard is None or self.guard.barrier is None:
            raise ConfigError("make_shield: this agent has no barrier; train one with --safety")
        return Shield(self.config.safety, self.model.rssm, self.guard.barrier)

    def _observation(self, obs: object) -> tuple[dict[str, Tensor], bool]:
        """Check an observation; return it as a batch, and whether it was one already."""
        if not isinstance(obs, dict):
            if len(self.obs_shapes) != 1:
                kinds = " and ".join(self.obs_shapes)
                raise ValueError(f"act: obs must be a dict with {kinds}, got {type(obs).__name__}")
            obs = {next(iter(self.obs_shapes)): obs}
        tensors, leads, device = {}, set(), self.device
        for kind, shape in self.obs_shapes.items():
            if kind not in obs:
                raise ValueError(f"act: obs lacks {kind!r}, got {', '.join(obs)}")
            x = obs[kind]
            if not isinstance(x, Tensor):  # a copy: frames may be read-only or upside down
                x = torch.from_numpy(np.array(x, order="C"))
            dtype = torch.uint8 if kind == "pixels" else torch.float32
            if kind == "pixels" and x.dtype != dtype:
                raise ValueError(f"act: pixels must be uint8, got {str(x.dtype)[6:]}")
            lead = x.shape[: x.ndim - len(shape)]
            if x.ndim not in (len(shape), len(shape) + 1) or x.shape[len(lead) :] != shape:
                want = ", ".join(map(str, shape))
                raise ValueError(
                    f"act: {kind} must be [{want}] or [B, {want}], got {list(x.shape)}"
                )
            tensors[kind] = x.to(device, dtype).view(-1, *shape)
            leads.add(tuple(lead))
        if len(leads) > 1:
            raise ValueError("act: pixels and state differ in their batch size")
        return tensors, leads != {()}

    def return_params(self) -> ReturnParams:
        """What values a trajectory: the heads that there are, frozen but for the critics, γ and λ.

        Who plans as an optimist alone has no reward head here: the explorer's are the score.
        """
        critics = (self.critic, self.target_critic)
        critic, target = (None if head is None else head.params() for head in critics)
        reward, value = self.model.reward, self.critic or self.target_critic
        behavior = self.config.behavior
        return ReturnParams(
            None if reward is None else reward.params().detach(),
            critic,
            target,
            behavior.gamma,
            behavior.lam,
            self.discount_params(),
            departure=behavior.pairing == "departure",
            reward_as=Readout() if reward is None else reward.readout,
            value_as=Readout() if value is None else value.readout,
        )

    def discount_params(self) -> MLPParams | None:
        """The continuation head, frozen, or None."""
        head = self.model.discount
        return None if head is None else head.params().detach()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products within are of the precision that the agent computes in."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)
