"""The world model: the states of a batch, and the evidence lower bound (report section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdreamer.learning import losses
from fastdreamer.learning.learner import Learner, Losses
from fastdreamer.machine import nvtx
from fastdreamer.nn.dists import entropy
from fastdreamer.ops.observe import Observation, observe

_PARTS = {"pixels": "image", "state": "state"}
"""Loss of the reconstruction by kind of observation."""


class WorldModelLearner(Learner):
    """Optimiser ``model``: encoder, dynamics, decoder, reward and continuation."""

    def optimized(self) -> dict[str, tuple[nn.Module | None, float]]:
        return {"model": (self.agent.model, self.agent.config.optim.model_lr)}

    def watch(self, batch: dict[str, Tensor], noise: Tensor) -> Observation:
        """The states of the batch's sequences: encode and filter.

        Args:
            batch: as :meth:`fastdreamer.Dreamer.update` takes it. noise: [T, B, ...], of the
                posterior.
        """
        model = self.agent.model
        with self.agent.autocast():
            with nvtx.annotate("encode"):
                embed = model.encoder(batch)  # [T, B, E]
            with nvtx.annotate("observe"):
                start = model.rssm.initial(noise.shape[1])
                return observe(
                    model.rssm.params(), start, embed, batch["action"], batch["is_first"], noise
                )

    def losses(
        self, batch: dict[str, Tensor], seen: Observation, *, health: bool = False
    ) -> Losses:
        """Reconstruct what was seen from its states, reward included; hold posterior and prior
        together.

        Args:
            batch: that ``seen`` is of. health: also measure the latents' entropies.
        """
        config, model, feat = self.agent.config.loss, self.agent.model, seen.state.feat
        T, B = batch["reward"].shape
        with self.agent.autocast(), nvtx.annotate("decode"):
            errors = model.decoder.squared_errors(feat, batch)
            reward = model.reward(feat).to(feat.dtype)
            goes_on = model.discount and model.predict_continuation(feat)
        kl, kl_nats = losses.kl_loss(
            seen.post,
            seen.prior,
            free_nats=config.free_nats,
            balance=config.kl_balance,
            each=config.free_nats_each,
            mean=self.ranks.mean,
        )
        reward = losses.reward_loss(reward, model.reward.readout, batch["reward"])
        parts = {"reward": reward, "kl": kl}
        if goes_on is not None:
            parts["discount"] = losses.discount_loss(goes_on, batch["terminated"])
        # Of unit-variance Normals: the squared error summed over an observation.
        parts |= {_PARTS[kind]: error / (T * B) for kind, error in errors.items()}
        loss = losses.model_loss(config, parts)
        metrics = {f"{name}_loss": part for name, part in parts.items()}
        metrics |= {"kl": kl_nats, "model_loss": loss}
        if health:
            with torch.no_grad():
                latents = {"prior": seen.prior, "post": seen.post}
                metrics |= {f"{n}_entropy": entropy(p).mean() for n, p in latents.items()}
        return Losses({"model": loss}, metrics, parts)
