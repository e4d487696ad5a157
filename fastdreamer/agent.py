"""Dreamer: world model, actor and critic; ``act()`` in the world, ``update()`` from replay.

With ``config.agent == "planet"`` it is PlaNet: the same world model, and a planner for an actor.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import nvtx
import torch
from torch import Tensor, nn

from fastdreamer import losses
from fastdreamer.checkpoint import CheckpointError, load_checkpoint, load_newest
from fastdreamer.config import Config, ConfigError, PlanConfig, SafetyConfig, from_dict
from fastdreamer.exploration import Explorer, spread, upper_bound
from fastdreamer.nn import MLP, Actor, WorldModel
from fastdreamer.nn.codec import float_to_pixels, pixels_to_float
from fastdreamer.nn.dists import symexp, symlog
from fastdreamer.ops.graph import capturing
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import ReturnParams, State
from fastdreamer.planning import PlanInfo, plan
from fastdreamer.safety import Guard, Shield


class PolicyState(NamedTuple):
    """What the agent carries from one decision to the next."""

    deter: Tensor  # [B, D]
    stoch: Tensor  # [B, S]
    action: Tensor  # [B, A], the last action
    plan: Tensor | None = None  # [H, B, A], the last plan, which a warm start goes on from


class NonFiniteLoss(RuntimeError):
    """A loss or its gradient became NaN or infinite; ``name`` says which."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"{name} became {value}")
        self.name, self.value = name, value


class Dreamer(nn.Module):
    """The agent of the report.

    Args:
        config: every setting.
        obs_shapes: ``{"pixels": (64, 64, 3), "state": (n,)}``, one or both.
        action_dim: A.

    The initial weights are a function of ``config.seed`` alone; torch's global random generator
    is left as it was.
    """

    def __init__(
        self, config: Config, obs_shapes: dict[str, tuple[int, ...]], action_dim: int
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
                self.actor = Actor(
                    [feat, *[model.units] * behavior.actor_layers, action_dim],
                    model.activation,
                    mean_scale=behavior.mean_scale,
                    std_offset=behavior.std_offset,
                    min_std=behavior.min_std,
                )
                self.critic = MLP(
                    [feat, *[model.units] * behavior.critic_layers, 1], model.activation
                )
            self.explorer = self.guard = None
            if config.explore.method == "ucb":
                self.explorer = Explorer(config, feat, action_dim)
            if config.safety.signal != "none":
                self.guard = Guard(config, feat, self.obs_shapes["state"][0])
        self.target_critic = None
        if behavior.target_every and self.critic is not None:
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("return_range", torch.ones(()))  # running 5-95 percentile range
        self.to(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self._act_generator = torch.Generator().manual_seed(config.seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.return_range.device

    def make_optimizers(self) -> dict[str, torch.optim.Adam]:
        """One Adam each for ``model``, ``actor`` and ``critic`` (PlaNet: the model's alone).

        With an explorer also ``rewards``, ``explorer`` and ``critics``, as far as it has them;
        with a guard ``barrier``.
        """
        optim = self.config.optim
        make = lambda module, lr: torch.optim.Adam(  # noqa: E731
            module.parameters(), lr=lr, eps=optim.eps, fused=True
        )
        modules = {
            "model": (self.model, optim.model_lr),
            "actor": (self.actor, optim.actor_lr),
            "critic": (self.critic, optim.critic_lr),
        }
        if self.explorer is not None:
            modules["rewards"] = (self.explorer.rewards, optim.model_lr)
            modules["explorer"] = (self.explorer.actor, optim.actor_lr)
            modules["critics"] = (self.explorer.critics, optim.critic_lr)
        if self.guard is not None:
            modules["barrier"] = (self.guard.barrier, self.config.safety.lr)
        return {name: make(*pair) for name, pair in modules.items() if pair[0] is not None}

    # ---------------------------------------------------------------- acting

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
        noise: float = 0.0,
        explore: bool = False,
        shield: Shield | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, PolicyState]:
        """Filter one observation and choose an action.

        Args:
            obs: ``{"pixels": uint8 [64, 64, 3], "state": float [n]}`` or the only kind the agent
                sees by itself; or a batch of them, [B, ...].
            state: what the last call returned; None at the start of an episode.
            controller: ``"actor"``; ``"mpc"``, a plan ranked by λ-return; ``"planet"``, one ranked
                by the sum of rewards; None takes the agent's own, actor or (PlaNet) planet.
            noise: standard deviation of Gaussian exploration noise. The action is clipped to
                [-1, 1], and the noisy, clipped one is what the filter sees next.
            explore: be optimistic: the exploring actor chooses, a plan is ranked by the upper
                confidence bound.
            shield: of ``make_shield()``; has the last word on the action, noise included, and
                counts what it does.
            generator: of the posterior sample, the plan, the exploration noise and the shield's
                candidates; None uses the agent's own, seeded with ``config.seed``.

        Returns:
            The action, float32 [A] or [B, A] in [-1, 1], and the state for the next call. With
            ``noise=0`` the actor's action is tanh(mean).

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
        draw = lambda size: torch.randn(batch, size, generator=generator).to(self.device)  # noqa: E731
        embed = self.model.encoder(tensors)
        filtered = observe(
            self.model.rssm.params(),
            State(state.deter, state.stoch),
            embed[None],
            state.action[None],
            torch.zeros(1, batch, dtype=torch.bool, device=self.device),
            draw(self.model.rssm.stoch)[None],
        ).state
        deter, stoch = filtered.deter[0], filtered.stoch[0]
        chosen, controller = None, self.controller(controller)
        if explore and self.explorer is None:
            raise ConfigError("act: this agent has no explorer; train one with --explore ucb")
        if controller == "actor":
            actor = (self.explorer.actor if explore else None) or self.actor
            action = torch.tanh(actor(torch.cat([deter, stoch], -1)).mean)
        else:
            now = State(deter, stoch)
            action, info = self.plan(
                now, controller, explore=explore, last=state.plan, generator=generator
            )
            chosen = info.mean
        if noise:
            action = (action + noise * draw(self.action_dim)).clamp(-1, 1)
        if shield is not None:
            action = shield(State(deter, stoch), action, generator)
        out = action.cpu().numpy().copy()  # the caller may change it, the filter must not see that
        return (out if batched else out[0]), PolicyState(deter, stoch, action, chosen)

    def controller(self, name: str | None = None) -> str:
        """The controller of that name, ``None`` and ``"auto"`` being the agent's own.

        Raises:
            ConfigError: there is none, or the agent has no actor for it.
        """
        own = "planet" if self.actor is None else "actor"
        valid = (own,) if self.actor is None else ("actor", "mpc", "planet")
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
        state: State,
        controller: str = "mpc",
        *,
        explore: bool = False,
        last: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, PlanInfo]:
        """Plan with ``config.plan`` from each state of a batch.

        Args:
            state: deter [B, D] and stoch [B, S], of a PolicyState or imagined.
            controller: ``"mpc"`` or ``"planet"``.
            explore: rank by the upper confidence bound of the same score.
            last: ``PlanInfo.mean`` of one decision ago, for a warm start.
            generator: of every noise; None uses the agent's own.

        Returns:
            The actions [B, A] and how they were found; see :func:`fastdreamer.planning.plan`.
        """
        mpc = self.controller(controller) == "mpc"
        actor, score = self.actor, "lambda_return" if mpc else "reward"
        if explore:
            actor = self.explorer.actor or actor
            score = self.explorer.score(self.target_critic or self.critic, score)
        with self._autocast():
            return plan(
                state,
                self.model.rssm.params(),
                self._return_params(),
                self.config.plan,
                actor=actor.params() if mpc else None,
                score=score,
                last=last,
                generator=generator or self._act_generator,
            )

    def make_shield(self) -> Shield:
        """A shield by this agent's barrier, with counts of its own; ``act`` takes it.

        Raises:
            ConfigError: the agent has learned no barrier.
        """
        if self.guard is None:
            raise ConfigError("make_shield: this agent has no barrier; train one with --safety")
        return Shield(self.config.safety, self.model.rssm, self.guard.barrier)

    def _observation(self, obs: object) -> tuple[dict[str, Tensor], bool]:
        """Check an observation; return it as a batch, and whether it was one already."""
        if not isinstance(obs, dict):
            if len(self.obs_shapes) != 1:
                kinds = " and ".join(self.obs_shapes)
                raise ValueError(f"act: obs must be a dict with {kinds}, got {type(obs).__name__}")
            obs = {next(iter(self.obs_shapes)): obs}
        tensors, leads = {}, set()
        for kind, shape in self.obs_shapes.items():
            if kind not in obs:
                raise ValueError(f"act: obs lacks {kind!r}, got {', '.join(obs)}")
            x = obs[kind]
            if not isinstance(x, Tensor):  # a copy: frames may be read-only or upside down
                x = torch.from_numpy(np.array(x, order="C"))
            x = x.to(self.device)
            dtype = torch.uint8 if kind == "pixels" else torch.float32
            if kind == "pixels" and x.dtype != dtype:
                raise ValueError(f"act: pixels must be uint8, got {str(x.dtype)[6:]}")
            lead = x.shape[: x.ndim - len(shape)]
            if x.ndim not in (len(shape), len(shape) + 1) or x.shape[len(lead) :] != shape:
                want = ", ".join(map(str, shape))
                raise ValueError(
                    f"act: {kind} must be [{want}] or [B, {want}], got {list(x.shape)}"
                )
            tensors[kind] = x.to(dtype).reshape(-1, *shape)
            leads.add(tuple(lead))
        if len(leads) > 1:
            raise ValueError("act: pixels and state differ in their batch size")
        return tensors, leads != {()}

    # -------------------------------------------------------------- learning

    def update(
        self,
        batch: dict[str, Tensor],
        optimizers: dict[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ) -> dict[str, float]:
        """Learn from one batch: world model, then actor and critic in imagination.

        Args:
            batch: time-major [T, B, ...]: ``pixels`` uint8 and/or ``state`` float, ``action``
                (the one that led to the observation), ``reward`` (received with it),
                ``is_first`` bool.
            optimizers: of ``make_optimizers()``.
            generator: draws every noise of the update, on its own device.

        Returns:
            The losses and diagnostics by name. While a CUDA graph is captured nothing can be read:
            then tensors, that every replay fills anew, and no value is checked.

        Raises:
            NonFiniteLoss: a loss or gradient is NaN or infinite; its optimiser was not stepped,
                and of actor and critic neither.
        """
        config, loss, rssm = self.config, self.config.loss, self.model.rssm
        T, B = batch["reward"].shape
        H, gamma = config.behavior.imag_horizon, config.behavior.gamma
        where = generator.device
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=where).to(self.device)  # noqa: E731
        post_noise = draw(T, B, rssm.stoch)
        state_noise, action_noise = draw(H, T * B, rssm.stoch), draw(H, T * B, self.action_dim)

        # World model: filter the sequences, reconstruct what was seen (report section 2).
        with self._autocast():
            with nvtx.annotate("encode"):
                embed = self.model.encoder(batch)  # [T, B, E]
            with nvtx.annotate("observe"):
                seen = observe(
                    rssm.params(),
                    rssm.initial(B),
                    embed,
                    batch["action"],
                    batch["is_first"],
                    post_noise,
                )
            with nvtx.annotate("decode"):
                feat = seen.state.feat  # [T, B, F]
                means = self.model.decoder(feat)
                reward = self.model.predict_reward(feat)
        kl, kl_nats = losses.kl_loss(
            seen.post, seen.prior, free_nats=loss.free_nats, balance=loss.kl_balance
        )
        parts = {"reward": losses.reward_loss(reward, batch["reward"]), "kl": kl}
        if "pixels" in means:
            target = pixels_to_float(batch["pixels"])
            parts["image"] = losses.reconstruction_loss(means["pixels"].float(), target)
        if "state" in means:
            target = symlog(batch["state"])
            parts["state"] = losses.reconstruction_loss(means["state"].float(), target)
        model_loss = losses.model_loss(loss, parts)
        with nvtx.annotate("model backward"):
            norms = self._step({"model": model_loss}, optimizers, parts)
        values = {f"{name}_loss": part for name, part in parts.items()}
        values |= {"kl": kl_nats, "model_loss": model_loss}
        heads = (feat, batch["reward"], generator)  # what an explorer's reward heads learn from
        if self.actor is None:
            more = {} if self.explorer is None else self._explore(optimizers, *heads)
            return _numbers(values, norms, more)

        # Behaviour: imagine from every state just filtered, dynamics frozen (report section 3).
        start = State(*(part.detach().flatten(0, 1) for part in seen.state))  # [T·B, ...]
        with self._autocast(), nvtx.annotate("imagine"):
            dream = imagine(
                rssm.params().detach(),
                self.actor.params(),
                start,
                state_noise,
                action_noise,
                returns=self._return_params(),
            )
        weights = torch.ones(H, 1, device=self.device)
        if config.behavior.discount_weights:
            weights = gamma ** torch.arange(H, device=self.device, dtype=torch.float32)[:, None]
        scale = self._return_scale(dream.returns)
        actor_loss = losses.actor_loss(dream.returns, weights, scale)
        behavior, more = {"actor": actor_loss}, {}
        if self.guard is not None:
            margin = torch.from_numpy(self.guard.signal(batch["state"].cpu().numpy()))
            imagined = torch.cat([start.feat[None], State(dream.deter, dream.stoch).feat])
            with self._autocast():
                barrier_loss, price, more = self.guard.losses(feat, margin.to(feat), imagined)
            behavior = {"actor": actor_loss + price, "barrier": barrier_loss}
        # The critic: the states that the actions were chosen in, towards the same returns.
        critic_loss = losses.critic_loss(dream.value, dream.returns, weights)
        critic_loss = config.behavior.value_scale * critic_loss
        with nvtx.annotate("behavior backward"):
            norms |= self._step({**behavior, "critic": critic_loss}, optimizers)
        if self.guard is not None:
            self.guard.update_multiplier(more["safety_shortfall"])
        if self.explorer is not None:
            imagination = (start, (state_noise, action_noise), weights, scale)
            more |= self._explore(optimizers, *heads, imagination)

        values |= {"actor_loss": actor_loss, "critic_loss": critic_loss}
        imagined = {
            "imagined_reward": dream.reward.mean(),
            "imagined_value": dream.value.mean(),
            **more,
        }
        return _numbers(values, norms, imagined)

    def update_target(self) -> None:
        """Copy the critic to the target critic; call every ``behavior.target_every`` updates."""
        if self.target_critic is not None:
            self.target_critic.load_state_dict(self.critic.state_dict())
        if self.explorer is not None:
            self.explorer.update_target()

    def _explore(
        self,
        optimizers: dict[str, torch.optim.Optimizer],
        feat: Tensor,
        reward: Tensor,
        generator: torch.Generator,
        imagination: tuple[State, tuple[Tensor, Tensor], Tensor, Tensor | float] | None = None,
    ) -> dict[str, Tensor]:
        """Learn the reward heads and, in imagination, the optimist; return metrics.

        ``imagination`` is where the greedy actor learned: start, noise, weights and scale.
        """
        explorer = self.explorer
        shape = explorer.rewards.members, 1, feat.shape[1]
        each = torch.empty(shape, device=generator.device)
        each = each.exponential_(generator=generator).to(self.device)
        metrics = {"explore_beta": torch.tensor(explorer.beta, device=self.device)}
        with self._autocast(), nvtx.annotate("explore"):
            found = {"rewards": explorer.reward_loss(feat, reward, each)}
            if explorer.imagines:
                # Critics of a planner that is the optimist learn from the greedy actor's dreams.
                actor = (explorer.actor or self.actor).params()
                critic = (self.target_critic or self.critic).params().detach()
                rssm = self.model.rssm.params().detach()
                start, noise, weights, scale = imagination
                before, returns = explorer.imagine(rssm, actor, start, noise, critic)
                metrics["explore_return"] = returns.mean()
                metrics["explore_spread"] = spread(returns.detach()).mean()
            if explorer.critics is not None:
                loss = explorer.critic_loss(before, returns, weights)
                found["critics"] = self.config.behavior.value_scale * loss
        if explorer.actor is not None:
            bound = upper_bound(returns, explorer.beta)
            found["explorer"] = losses.actor_loss(bound, weights, scale)
        norms = self._step(found, optimizers)
        metrics |= {f"{name}_loss": loss for name, loss in found.items()}
        return metrics | {f"{name}_grad_norm": norm for name, norm in norms.items()}

    def _step(
        self,
        by_name: dict[str, Tensor],
        optimizers: dict[str, torch.optim.Optimizer],
        parts: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Backward, clip, step; return the gradients' norms before clipping.

        Args:
            by_name: losses by the name of the optimiser whose parameters they reach, and no
                other's, so that one backward pass serves them all.
            optimizers: all of them.
            parts: terms of the losses, looked at first.
        """
        for name, value in ((parts or {}) | by_name).items():
            _check_finite(f"{name} loss", value)
        for name in by_name:
            optimizers[name].zero_grad(set_to_none=True)
        torch.autograd.backward(list(by_name.values()))
        norms = {}
        for name in by_name:
            params = [p for group in optimizers[name].param_groups for p in group["params"]]
            norms[name] = nn.utils.clip_grad_norm_(params, self.config.optim.clip)
            _check_finite(f"gradient of the {name} loss", norms[name])
        with nvtx.annotate("optimizer"):
            for name in by_name:
                optimizers[name].step()
        return norms

    def _return_params(self) -> ReturnParams:
        critics = (self.critic, self.target_critic)
        critic, target = (None if head is None else head.params() for head in critics)
        heads = (self.model.reward.params().detach(), critic, target)
        return ReturnParams(*heads, self.config.behavior.gamma, self.config.behavior.lam)

    def _return_scale(self, returns: Tensor) -> Tensor | float:
        """max(1, running range of the returns), as in DreamerV3; 1 when not asked for."""
        if not self.config.behavior.return_norm:
            return 1.0
        low, high = torch.quantile(returns.detach().flatten(), returns.new_tensor([0.05, 0.95]))
        self.return_range.lerp_(high - low, 0.01)
        return self.return_range.clamp(min=1.0)

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    # -------------------------------------------------------------- dreaming

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
        rssm = self.model.rssm
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(self.device)  # noqa: E731
        state_noise = draw(horizon, 1, rssm.stoch)
        now = State(state.deter, state.stoch)
        first = open_loop(rssm.params(), now, state.action[None], state_noise[:1])
        deter, stoch, action = first.deter, first.stoch, state.action[None]
        if self.actor is None:
            for noise in state_noise[1:]:
                now = State(deter[-1], stoch[-1])
                then, _ = self.plan(now, "planet", generator=generator)
                then = then[None]
                step = open_loop(rssm.params(), now, then, noise[None])
                deter, stoch = torch.cat([deter, step.deter]), torch.cat([stoch, step.stoch])
                action = torch.cat([action, then])
        elif horizon > 1:
            rest = imagine(
                rssm.params(),
                self.actor.params(),
                State(deter[0], stoch[0]),
                state_noise[1:],
                draw(horizon - 1, 1, self.action_dim),
            )
            deter, stoch = torch.cat([deter, rest.deter]), torch.cat([stoch, rest.stoch])
            action = torch.cat([action, rest.action])
        means = self.model.decoder(State(deter, stoch).feat[:, 0])
        seen = {}
        if "pixels" in means:
            seen["pixels"] = float_to_pixels(means["pixels"]).cpu().numpy()
        if "state" in means:
            seen["state"] = symexp(means["state"]).cpu().numpy()
        return action[:, 0].cpu().numpy(), seen


def _check_finite(name: str, value: Tensor) -> None:
    if not capturing(value.device) and not torch.isfinite(value):
        raise NonFiniteLoss(name, value.item())


def _numbers(
    values: dict[str, Tensor], norms: dict[str, Tensor], more: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """Losses, gradients' norms and diagnostics as floats, in one transfer from the device."""
    values = values | {f"{name}_grad_norm": norm for name, norm in norms.items()} | (more or {})
    numbers = torch.stack([v.detach() for v in values.values()])
    numbers = numbers.unbind() if capturing(numbers.device) else numbers.tolist()
    return dict(zip(values, numbers, strict=True))


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bf16`` where the device multiplies in bfloat16, else ``fp32``."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "fp32"


def load(
    run_or_file: str | os.PathLike,
    *,
    plan: PlanConfig | None = None,
    safety: SafetyConfig | None = None,
) -> Dreamer:
    """Load a trained agent.

    Args:
        run_or_file: a run directory (its newest checkpoint) or one checkpoint or snapshot file.
        plan: settings of the planner in place of the run's own.
        safety: settings of the shield and the safety signal in place of the run's own; the barrier
            stays the run's.

    Returns:
        The agent on the CPU, ready for ``act(obs, state)``.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or foreign.
    """
    path = Path(run_or_file)
    if path.is_dir():
        found = load_newest(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"{path} holds no checkpoint yet")
        _, tensors, meta = found
    else:
        tensors, meta = load_checkpoint(path)
    config = dataclasses.replace(from_dict(meta["config"]), device="cpu")
    if plan is not None:
        config = dataclasses.replace(config, plan=plan)
    agent = Dreamer(config, meta["obs_shapes"], meta["action_dim"])
    weights = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("agent/")}
    agent.load_state_dict(weights)
    if safety is not None:
        agent.config = dataclasses.replace(config, safety=safety).validate()
    return agent.eval()
