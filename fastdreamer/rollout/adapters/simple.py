"""SimpleDreamer's ``RSSM``, whose loop stands in its training code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import StdTransform
from fastdreamer.rollout.adapters.loop import Loop


class SimpleLoop(Loop):
    """In the place of the steps 1 to T - 1 of ``dynamic_learning``, batch-first, from zeros."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        recurrent, transition = model.recurrent_model, model.transition_model
        given = {
            "inp": [recurrent.linear, recurrent.activation],
            "gru": recurrent.recurrent,
            "prior": transition.network,
            "post": model.representation_model.network,
            "std": StdTransform(min=float(transition.config.min_std)),
            "embed_first": True,
            "stoch_first": True,
            "through_feat": True,
            "batch_first": True,
        }
        parts = ("recurrent_model", "transition_model", "representation_model")
        super().__init__(model, given, options, *parts)

    def forward(
        self, embedded_observation: Tensor, action: Tensor, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The posterior infos by their names, [B, T - 1, ...], of [B, T, ...] observed and done."""
        seen = self.rollout.observe(embedded_observation[:, 1:], action[:, :-1], noise=noise)
        return {
            "priors": self.rollout.draw(seen.prior),
            "prior_dist_means": seen.prior.mean,
            "prior_dist_stds": seen.prior.std,
            "posteriors": seen.state.stoch,
            "posterior_dist_means": seen.post.mean,
            "posterior_dist_stds": seen.post.std,
            "deterministics": seen.state.deter,
        }

    def own(self, embed: Tensor, action: Tensor) -> dict[str, Tensor]:
        model, steps = self.model, []
        stoch, deter = model.recurrent_model_input_init(len(embed))
        for t in range(1, embed.shape[1]):
            deter = model.recurrent_model(stoch, action[:, t - 1], deter)
            prior, drawn = model.transition_model(deter)
            post, stoch = model.representation_model(embed[:, t], deter)
            dists = (x for dist in (prior, post) for x in (dist.mean, dist.stddev))
            prior_mean, prior_std, post_mean, post_std = dists
            steps.append((drawn, prior_mean, prior_std, stoch, post_mean, post_std, deter))
        names = ("priors", "prior_dist_means", "prior_dist_stds", "posteriors")
        names += ("posterior_dist_means", "posterior_dist_stds", "deterministics")
        stacked = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        return dict(zip(names, stacked, strict=True))

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        return (draw(2, 4, "E"), draw(2, 4, "A").tanh()), draw(3, 2, "S")
