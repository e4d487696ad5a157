"""NaturalDreamer's nets, whose loop stands in its training code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import Categorical
from fastdreamer.rollout.adapters.loop import Loop, mixed_logits
from fastdreamer.rollout.layers import MisfitError

_NETS = ("recurrentModel", "priorNet", "posteriorNet")


class NaturalLoop(Loop):
    """In the place of the steps 1 to T - 1 of ``worldModelTraining``, batch-first, from zeros.

    Its policy is not reparameterised and bounds its std by a tanh: it has no fast imagination.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        recurrent, prior, post = (getattr(model, name) for name in _NETS)
        mixes = [float(net.config.uniformMix) for net in (prior, post)]
        if mixes[0] != mixes[1]:
            raise MisfitError(
                f"posteriorNet: its uniformMix is {mixes[1]}, the prior's is {mixes[0]}; one for "
                "both fits"
            )
        given = {
            "inp": [recurrent.linear, recurrent.activation],
            "gru": recurrent.recurrent,
            "prior": prior.network,
            "post": post.network,
            "latent": Categorical(int(prior.latentClasses), mixes[0]),
            "batch_first": True,
        }
        nets = nn.Module()  # the peer itself is none
        for name in _NETS:
            nets.add_module(name, getattr(model, name))
        super().__init__(nets, given, options, *_NETS)

    def forward(
        self, encodedObservations: Tensor, actions: Tensor, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """recurrentStates, priorsLogits, posteriors, posteriorsLogits, [B, T - 1, ...].

        Args:
            encodedObservations, actions: [B, T, ...], observed and done at each step.
        """
        seen = self.rollout.observe(encodedObservations[:, 1:], actions[:, :-1], noise=noise)
        prior, post = mixed_logits(seen.prior), mixed_logits(seen.post)
        return seen.state.deter, prior, seen.state.stoch, post

    def own(self, embed: Tensor, action: Tensor) -> Any:
        model, steps = self.model, []
        deter = embed.new_zeros(len(embed), self.rollout.dims["D"])
        stoch = embed.new_zeros(len(embed), self.rollout.dims["S"])
        for t in range(1, embed.shape[1]):
            deter = model.recurrentModel(deter, stoch, action[:, t - 1])
            _, prior = model.priorNet(deter)
            stoch, post = model.posteriorNet(torch.cat((deter, embed[:, t]), -1))
            steps.append((deter, prior, stoch, post))
        return tuple(torch.stack(parts, 1) for parts in zip(*steps, strict=True))

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        return (draw(2, 4, "E"), draw(2, 4, "A").tanh()), self.noise(draw, 3)
