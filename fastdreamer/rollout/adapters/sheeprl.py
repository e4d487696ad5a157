"""sheeprl's ``RSSM`` of Dreamer V1, and those of V2 and V3."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import Categorical, OneHot, State, StdTransform
from fastdreamer.rollout.adapters.heads import bare, layers_of
from fastdreamer.rollout.adapters.loop import Loop, mixed_logits


class _SteppedLoop(Loop):
    """What the three have in common: their layers, and a loop of the caller's over ``dynamic``."""

    def __init__(self, model: nn.Module, latent: dict[str, Any], options: dict[str, Any]) -> None:
        given, bypassed = _layers(model)
        super().__init__(model, given | latent, options, "recurrent_model")
        self.rollout.watch(bypassed)

    def steps(self, posterior: Tensor, recurrent_state: Tensor, *sequences: Tensor) -> list[Any]:
        """What the peer itself returns of one step after the other."""
        steps, state = [], (posterior, recurrent_state)
        for t in range(len(sequences[0])):
            steps.append(self.model.dynamic(*state, *(x[t : t + 1] for x in sequences)))
            state = steps[-1][1], steps[-1][0]
        return steps


class DynamicLoop(_SteppedLoop):
    """In the place of the loop over ``dynamic``, over all steps; its arguments and what it returns.

    Since 0.8.4 ``dynamic`` takes ``is_first`` and zeroes action and state there: so does the loop.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, {"std": StdTransform(min=float(model.min_std))}, options)
        self.resets = "is_first" in inspect.signature(model.dynamic).parameters

    def forward(
        self,
        posterior: Tensor,
        recurrent_state: Tensor,
        action: Tensor,
        embedded_obs: Tensor,
        is_first: Tensor | None = None,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What ``dynamic`` returns, stacked: action [T, B, A], states [1, B, ...]."""
        if (is_first is not None) != self.resets:
            raise TypeError(
                "dynamic of this sheeprl takes is_first" if self.resets
                else "dynamic of this sheeprl takes no is_first"
            )  # fmt: skip
        first = None if is_first is None else is_first.reshape(action.shape[:2]) != 0
        start = State(recurrent_state[0], posterior[0])
        seen = self.rollout.observe(embedded_obs, action, first, start, noise)
        prior = self.rollout.draw(seen.prior)
        return seen.state.deter, seen.state.stoch, prior, tuple(seen.post), tuple(seen.prior)

    def own(self, *inputs: Any) -> Any:
        h, z, prior, *dists = zip(*self.steps(*inputs), strict=True)
        joined = (tuple(map(torch.cat, zip(*dist, strict=True))) for dist in dists)
        return *map(torch.cat, (h, z, prior)), *joined

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        first = torch.zeros_like(draw(3, 2, 1))
        first[0, 1] = first[1, 0] = 1
        sequences = [draw(3, 2, "A").tanh(), draw(3, 2, "E"), *([first] if self.resets else [])]
        return (draw(1, 2, "S"), draw(1, 2, "D").tanh(), *sequences), draw(3, 2, "S")


class CategoricalLoop(_SteppedLoop):
    """The same of V2 and V3, whose states are one-hot, [T, B, C, K].

    V3's ``dynamic`` takes ``initial_states`` (they are the learned ones here) and, since 0.8.4,
    returns no priors: ``prior_logits`` computes those of all states at once.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        unimix = float(getattr(model, "unimix", 0.0))
        latent = {"latent": Categorical(int(model.discrete), unimix)}
        if hasattr(model, "initial_recurrent_state"):
            latent |= {"begin": (model, "initial_recurrent_state"), "begin_through": False}
        super().__init__(model, latent, options)
        self.mixes = hasattr(model, "_uniform_mix") and model.unimix > 0
        self.posterior_only = hasattr(model, "prior_logits")

    def forward(
        self,
        posterior: Tensor,
        recurrent_state: Tensor,
        action: Tensor,
        embedded_obs: Tensor,
        is_first: Tensor,
        initial_states: tuple[Tensor, Tensor] | None = None,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What ``dynamic`` returns, stacked: action [T, B, A], posterior [1, B, C, K]."""
        first = is_first.reshape(action.shape[:2]) != 0
        start = State(recurrent_state[0], posterior[0].flatten(-2))
        seen = self.rollout.observe(embedded_obs, action, first, start, noise)
        h, z = seen.state.deter, seen.state.stoch.reshape(seen.post.logits.shape)
        logits = [self._logits(dist) for dist in (seen.post, seen.prior)]
        if self.posterior_only:
            return h, z, logits[0]
        prior = self.rollout.draw(seen.prior).reshape(z.shape)
        return h, z, prior, *logits

    def _logits(self, dist: OneHot) -> Tensor:
        return (mixed_logits(dist) if self.mixes else dist.logits).flatten(-2)

    def own(self, *inputs: Any) -> Any:
        return tuple(map(torch.cat, zip(*self.steps(*inputs), strict=True)))

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        first = torch.zeros_like(draw(3, 2, 1))
        first[0, 1] = first[1, 0] = 1
        start = draw(1, 2, "C", int(self.model.discrete)), draw(1, 2, "D").tanh()
        return (*start, draw(3, 2, "A").tanh(), draw(3, 2, "E"), first), self.noise(draw, 3)


def _layers(model: nn.Module) -> tuple[dict[str, Any], list[tuple[str, nn.Module]]]:
    """What was read off a model, and the modules around it."""
    bypassed: list[tuple[str, nn.Module]] = []
    prior, post = (
        layers_of(name, bare(name, getattr(model, name), bypassed), bypassed)
        for name in ("transition_model", "representation_model")
    )
    recurrent = bare("recurrent_model", model.recurrent_model, bypassed)
    given = {
        "inp": layers_of("inp", recurrent.mlp, bypassed),
        "gru": recurrent.rnn,
        "prior": prior,
        "post": post,
        "stoch_first": True,
    }
    return given, bypassed
