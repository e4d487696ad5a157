"""Dreamer: a policy that learns; ``update()`` from replay.

With ``config.agent == "planet"`` it is PlaNet: the same world model, and a planner for an actor.
"""

from __future__ import annotations

import nvtx
import torch
from torch import Tensor, nn

from fastdreamer.acting.exploration import spread, upper_bound
from fastdreamer.acting.policy import Policy
from fastdreamer.config import Config
from fastdreamer.errors import FastdreamerError
from fastdreamer.learning import losses
from fastdreamer.nn.dists import entropy, squashed_entropy
from fastdreamer.ops.backend import release_memory
from fastdreamer.ops.gpu import capturing
from fastdreamer.ops.imagine import Imagination, imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.params import State

_PARTS = {"pixels": "image", "state": "state"}
"""Loss of the reconstruction by kind of observation."""
SATURATED = 0.99
"""An action beyond ± this counts as saturated."""


class NonFiniteLoss(FastdreamerError, RuntimeError):
    """A loss or its gradient became NaN or infinite; ``name`` says which."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"{name} became {value}")
        self.name, self.value = name, value


class Dreamer(Policy):
    """The agent of the report: ``act()`` in the world, ``update()`` from replay.

    Arguments are those of :class:`fastdreamer.acting.policy.Policy`.
    """

    def __init__(
        self, config: Config, obs_shapes: dict[str, tuple[int, ...]], action_dim: int
    ) -> None:
        super().__init__(config, obs_shapes, action_dim)
        ones = torch.ones((), device=self.device)
        self.register_buffer("return_range", ones)  # running 5-95 percentile range

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
                ``is_first`` bool and, where ends are predicted, ``terminated`` bool.
            optimizers: of ``make_optimizers()``.
            generator: draws every noise of the update, on its own device.
            health: also measure what tells a healthy run from a dead one: ``prior_entropy``,
                ``post_entropy``, ``actor_entropy`` (of the squashed action, all in nats),
                ``actor_std`` (before the tanh) and ``action_saturated``, the share of imagined
                actions beyond ±0.99.

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
        release_memory()  # the last rollout's would lie idle beside the decoder's
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
                errors = self.model.decoder.squared_errors(feat, batch)
                reward = self.model.predict_reward(feat)
                goes_on = self.model.discount and self.model.predict_continuation(feat)
        kl, kl_nats = losses.kl_loss(
            seen.post, seen.prior, free_nats=loss.free_nats, balance=loss.kl_balance
        )
        parts = {"reward": losses.reward_loss(reward, batch["reward"]), "kl": kl}
        if goes_on is not None:
            parts["discount"] = losses.discount_loss(goes_on, batch["terminated"])
        # Of unit-variance Normals: the squared error summed over an observation (report section 2).
        parts |= {_PARTS[kind]: error / (T * B) for kind, error in errors.items()}
        model_loss = losses.model_loss(loss, parts)
        with nvtx.annotate("model backward"):
            norms = self._step({"model": model_loss}, optimizers, parts)
        values = {f"{name}_loss": part for name, part in parts.items()}
        values |= {"kl": kl_nats, "model_loss": model_loss}
        if health:
            with torch.no_grad():
                latents = {"prior": seen.prior, "post": seen.post}
                values |= {f"{n}_entropy": entropy(p).mean() for n, p in latents.items()}
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
        if health:
            values |= self._actor_health(start, dream, action_noise[0])
        weights = torch.ones(H, 1, device=self.device)
        if config.behavior.discount_weights:
            weights = gamma ** torch.arange(H, device=self.device, dtype=torch.float32)[:, None]
        if dream.discount is not None:
            ended = batch["terminated"].flatten()  # [T·B]
            weights = weights * losses.survival_weights(dream.discount, ended, gamma)
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

    @torch.no_grad()
    def _actor_health(self, start: State, dream: Imagination, noise: Tensor) -> dict[str, Tensor]:
        """How wide the actor is in the states it imagines from, and how its actions saturate."""
        with self._autocast():
            dist = self.actor(start.feat)
        return {
            "actor_entropy": squashed_entropy(dist, noise).mean(),
            "actor_std": dist.std.mean(),
            "action_saturated": (dream.action.abs() > SATURATED).float().mean(),
        }

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
                before, returns = explorer.imagine(
                    rssm, actor, start, noise, critic, self._discount_params()
                )
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

    def _return_scale(self, returns: Tensor) -> Tensor | float:
        """max(1, running range of the returns), as in DreamerV3; 1 when not asked for."""
        if not self.config.behavior.return_norm:
            return 1.0
        low, high = torch.quantile(returns.detach().flatten(), returns.new_tensor([0.05, 0.95]))
        self.return_range.lerp_(high - low, 0.01)
        return self.return_range.clamp(min=1.0)


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
