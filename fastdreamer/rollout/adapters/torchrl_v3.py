"""torchrl's ``RSSMRolloutV3`` (DreamerV3), TensorDict in and out, and ``RSSMPriorV3``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from fastdreamer.ops.params import Categorical, State
from fastdreamer.rollout.adapters.loop import InItsMode, Loop, make_rollout
from fastdreamer.rollout.layers import MisfitError


class TorchrlRolloutV3(InItsMode, TensorDictModuleBase):
    """In the place of torchrl's ``RSSMRolloutV3``, over either recurrent model.

    TensorDict [*batch, T] in and out.

    The same keys as the original's, the inputs that a reset zeroes included. The prior's sample,
    which nothing reads, is not drawn.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.rssm_prior, self.rssm_posterior = model.rssm_prior, model.rssm_posterior
        self.in_keys, self.out_keys = model.in_keys, model.out_keys
        self.reset_key, self.action_key = model.reset_key, model.action_key
        self.__dict__["model"] = model  # not a child: its parts are
        prior, post = self.rssm_prior.module, self.rssm_posterior.module
        if prior.unimix != post.unimix:
            raise MisfitError(
                f"rssm_posterior: its unimix is {post.unimix}, the prior's is {prior.unimix}; one "
                "for both fits"
            )
        given = _of_prior(prior) | {"post": post.obs_rnn_to_post_projector}
        parts = ("rssm_prior", "rssm_posterior", "rssm_prior.module", "rssm_posterior.module")
        bypassed = [("RSSMRolloutV3", model)]
        bypassed += [(name, model.get_submodule(name)) for name in parts]
        self.rollout = make_rollout(given, options, bypassed)

    def forward(self, tensordict: Any) -> Any:
        out = tensordict.exclude(*self.out_keys)
        *batch, steps = out.shape
        state_key, belief_key, _ = self.rssm_prior.in_keys
        logits_key, _, next_belief = self.rssm_prior.out_keys
        post_key, next_state = self.rssm_posterior.out_keys

        def rows(key: Any) -> Tensor:  # [*batch, T, n] -> [T, B, n]
            x = out.get(key)
            return x.reshape(-1, *x.shape[len(batch) :]).transpose(0, 1).contiguous()

        action, embed = rows(self.action_key), rows(self.rssm_posterior.in_keys[1])
        start = State(rows(belief_key)[0], rows(state_key)[0])
        reset = None if self.reset_key is None else out.get(self.reset_key, None)
        first = None if reset is None else rows(self.reset_key).reshape(action.shape[:2])
        seen = self.rollout.observe(embed, action, first, start)
        # of each step: what it started from
        before = (torch.cat([x[None], y[:-1]]) for x, y in zip(start, seen.state, strict=True))
        used = dict(zip((belief_key, state_key, self.action_key), (*before, action), strict=True))
        if first is not None:
            used = {key: x.masked_fill(first[..., None], 0) for key, x in used.items()}
        values = used | {logits_key: seen.prior.logits, post_key: seen.post.logits}
        values |= {next_state: seen.state.stoch, next_belief: seen.state.deter}
        for key, value in values.items():
            out.set(key, value.transpose(0, 1).reshape(*batch, steps, *value.shape[2:]))
        return out

    def own(self, tensordict: Any) -> Any:
        """What the peer's two modules give, step by step."""
        state_key, belief_key, _ = self.rssm_prior.in_keys
        next_state, next_belief = self.rssm_posterior.out_keys[-1], self.rssm_prior.out_keys[-1]
        steps: list[Any] = []
        for step in tensordict.unbind(-1):
            if steps:
                step.set(state_key, steps[-1].get(next_state))
                step.set(belief_key, steps[-1].get(next_belief))
            if self.reset_key is not None:
                for key in (state_key, belief_key, self.action_key):
                    step.set(key, step.get(key).masked_fill(step.get(self.reset_key), 0))
            steps.append(self.rssm_posterior(self.rssm_prior(step)))
        return torch.stack(steps, tensordict.ndim - 1)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        """Its arguments, and the noise of its samples; see ``Loop.example``."""
        state_key, belief_key, _ = self.rssm_prior.in_keys
        given = TensorDict(batch_size=[2, 3])
        given.set(state_key, draw(2, 3, "S")).set(belief_key, draw(2, 3, "D").tanh())
        given.set(self.action_key, draw(2, 3, "A").tanh())
        given.set(self.rssm_posterior.in_keys[1], draw(2, 3, "E"))
        if self.reset_key is not None:
            first = torch.zeros_like(draw(2, 3, 1), dtype=torch.bool)
            first[0, 1] = first[1, 0] = True
            given.set(self.reset_key, first)
        return (given,), draw(3, 2, "C").sigmoid()


class PriorLoop(Loop):
    """In the place of torchrl's ``RSSMPriorV3``: a step without an observation.

    The posterior has no recurrence: of the two together ``RSSMRolloutV3`` is the loop.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, _of_prior(model), options)

    def forward(
        self, state: Tensor, belief: Tensor, action: Tensor, *, _uniform: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prior logits [..., C, K], its sample and the belief, of any leading sizes."""
        lead, dims = action.shape[:-1], self.rollout.dims
        rows = State(belief.reshape(-1, dims["D"]), state.reshape(-1, dims["S"]))
        noise = None if _uniform is None else _uniform.reshape(-1, dims["C"])
        action = action.to(belief.dtype).reshape(-1, dims["A"])
        new, prior = self.rollout.step(rows, action, noise)
        logits = prior.logits.reshape(*lead, *prior.logits.shape[1:])
        return logits, new.stoch.reshape(*lead, -1), new.deter.reshape(*lead, -1)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        given = draw(2, "S"), draw(2, "D").tanh(), 1.5 * draw(2, "A")
        return given, self.noise(draw, 1)


def _of_prior(prior: nn.Module) -> dict[str, Any]:
    """What ``RSSMPriorV3`` holds; a block-diagonal GRU has the input layers in itself."""
    return {
        "inp": prior.action_state_projector,
        "gru": prior.rnn,
        "prior": prior.rnn_to_prior_projector,
        "latent": Categorical(prior.num_classes, float(prior.unimix)),
        "stoch_first": True,  # heads are MLP(state, belief)
        "through_feat": True,
    }
