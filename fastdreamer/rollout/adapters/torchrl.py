"""torchrl's ``RSSMRollout`` (Dreamer V1), TensorDict in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from fastdreamer.ops.params import State
from fastdreamer.rollout.adapters.heads import split_extractor
from fastdreamer.rollout.adapters.loop import InItsMode, make_rollout
from fastdreamer.rollout.layers import MisfitError


class TorchrlRollout(InItsMode, TensorDictModuleBase):
    """In the place of torchrl's ``RSSMRollout``: TensorDict [*batch, T] in and out.

    The same keys as the original's. A posterior with a third in_key reads its noise there; else it
    is drawn. The prior's sample, which nothing reads, is drawn only where it has a key.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.rssm_prior, self.rssm_posterior = model.rssm_prior, model.rssm_posterior
        self.in_keys, self.out_keys = model.in_keys, model.out_keys
        self.__dict__["model"] = model  # not a child: its parts are
        if len(self.rssm_prior.in_keys) > 3:
            raise MisfitError("rssm_prior: its noise is not read; give noise to the posterior")
        prior, post = self.rssm_prior.module, self.rssm_posterior.module
        prior_layers, std = split_extractor("rnn_to_prior_projector", prior.rnn_to_prior_projector)
        post_layers, post_std = split_extractor(
            "obs_rnn_to_post_projector", post.obs_rnn_to_post_projector
        )
        if std != post_std:
            raise MisfitError(f"rssm_posterior: its std is {post_std}, the prior's is {std}; "
                              "one for both fits")  # fmt: skip
        given = {
            "inp": prior.action_state_projector,
            "gru": prior.rnn,
            "prior": prior_layers,
            "post": post_layers,
            "std": std,
            "stoch_first": True,  # heads are MLP(state, belief)
            "through_feat": True,  # DreamerActorLoss does not detach
        }
        parts = ("rssm_prior", "rssm_posterior", "rssm_prior.module", "rssm_posterior.module")
        bypassed = [("RSSMRollout", model), *((name, model.get_submodule(name)) for name in parts)]
        self.rollout = make_rollout(given, options, bypassed)

    def forward(self, tensordict: Any) -> Any:
        out = tensordict.exclude(*self.out_keys)
        *batch, steps = out.shape
        state_key, belief_key, action_key = self.rssm_prior.in_keys
        embed_key, *post_noise = self.rssm_posterior.in_keys[1:]

        def rows(key: Any) -> Tensor:  # [*batch, T, n] -> [T, B, n]
            x = out.get(key)
            return x.reshape(-1, *x.shape[len(batch) :]).transpose(0, 1).contiguous()

        action, embed = rows(action_key), rows(embed_key)
        start = State(rows(belief_key)[0], rows(state_key)[0])
        noise = rows(post_noise[0]) if post_noise else None
        seen = self.rollout.observe(embed, action, None, start, noise)
        mean_key, std_key, sample_key, next_belief = self.rssm_prior.out_keys
        values = {mean_key: seen.prior.mean, std_key: seen.prior.std}
        if sample_key != "_":
            values[sample_key] = self.rollout.draw(seen.prior)
        values[next_belief] = seen.state.deter
        parts = (seen.post.mean, seen.post.std, seen.state.stoch)
        values |= dict(zip(self.rssm_posterior.out_keys, parts, strict=True))
        for key, first, now in [(state_key, start.stoch, seen.state.stoch),
                                (belief_key, start.deter, seen.state.deter)]:  # fmt: skip
            values[key] = torch.cat([first[None], now[:-1]])
        for key, value in values.items():
            if key != "_":
                out.set(key, value.transpose(0, 1).reshape(*batch, steps, -1))
        return out

    def own(self, tensordict: Any) -> Any:
        """What the peer's two modules give, step by step."""
        state_key, belief_key, *_ = self.rssm_prior.in_keys
        next_belief, next_state = self.rssm_prior.out_keys[-1], self.rssm_posterior.out_keys[-1]
        steps: list[Any] = []
        for step in tensordict.unbind(-1):
            if steps:
                step.set(state_key, steps[-1].get(next_state))
                step.set(belief_key, steps[-1].get(next_belief))
            steps.append(self.rssm_posterior(self.rssm_prior(step)))
        return torch.stack(steps, tensordict.ndim - 1)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        """Its arguments, and the noise of its samples; see ``Loop.example``."""
        state_key, belief_key, action_key = self.rssm_prior.in_keys
        embed_key, *post_noise = self.rssm_posterior.in_keys[1:]
        given = TensorDict(batch_size=[2, 3])
        given.set(state_key, draw(2, 3, "S")).set(belief_key, draw(2, 3, "D").tanh())
        given.set(action_key, draw(2, 3, "A").tanh()).set(embed_key, draw(2, 3, "E"))
        for key in post_noise:
            given.set(key, draw(2, 3, "S"))
        return (given,), draw(3, 2, "S")
