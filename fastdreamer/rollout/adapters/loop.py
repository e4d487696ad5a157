"""What every adapter is: a module in a peer's place, checked against the peer itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.utils import probs_to_logits

from fastdreamer.ops.observe import Observation
from fastdreamer.ops.params import Categorical, OneHot
from fastdreamer.rollout.adapters.heads import read_with_heads
from fastdreamer.rollout.ask import asking, is_coarse, normals
from fastdreamer.rollout.draws import relative_difference, tolerance
from fastdreamer.rollout.layers import MisfitError
from fastdreamer.rollout.rollout import Rollout
from fastdreamer.rollout.watch import Answer, Watch


def make_rollout(
    given: dict[str, Any], options: dict[str, Any], bypassed: list[tuple[str, nn.Module]]
) -> Rollout:
    """The Rollout of a peer's layers, and of the actor and heads among the options.

    Args:
        given: what was read off the peer, in the words of :meth:`Rollout.from_modules`.
        options: the caller's, which come first.
        bypassed: modules around those layers that are not called any more, by name.
    """
    rollout = read_with_heads(given | options)
    rollout.watch(bypassed)
    return rollout


class InItsMode:
    """A module whose peer, ``model``, is no child of it, and yet trains when it does."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.model.training = mode
        return self


class Loop(InItsMode, nn.Module):
    """In a peer's place: its parts under their names, its attributes, and the fast ``rollout``.

    ``state_dict``, ``parameters`` and ``buffers`` are the peer's, also after either is moved or
    loaded. A subclass says how the loop is called (``forward``) and makes an ``example`` of its
    arguments.
    """

    rollout: Rollout

    def __init__(
        self,
        model: nn.Module,
        given: dict[str, Any],
        options: dict[str, Any],
        *parts: str,
    ) -> None:
        """Read ``given``; ``parts`` names the children that are not called any more."""
        super().__init__()
        for name, child in model._modules.items():
            self.add_module(name, child)
        # the peer's own dictionaries, into which moving and loading put other tensors
        self._parameters, self._buffers = model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        if isinstance(model, torch.jit.ScriptModule):  # it has views of itself, which no copy takes
            self._parameters = dict(model._parameters.items())
            self._buffers = dict(model._buffers.items())
        self.__dict__["model"] = model  # not a child: its parts are
        kind = type(model).__name__
        bypassed = [(kind, model), *((f"{kind}.{name}", getattr(model, name)) for name in parts)]
        self.rollout = make_rollout(given, options, bypassed)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("model")
            if model is None or name.startswith("__"):
                raise
            return getattr(model, name)

    def own(self, *inputs: Any) -> Any:
        """What the peer itself returns."""
        return self.model(*inputs)

    def noise(self, draw: Callable[..., Tensor], steps: int) -> Tensor:
        """Noise of that many steps of two rows; any numbers do for Gumbels."""
        latent = self.rollout.options.latent
        uniform = isinstance(latent, Categorical) and not latent.gumbel
        return draw(steps, 2, "C").sigmoid() if uniform else draw(steps, 2, "S")

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        """Arguments of the loop, some steps of two rows, and the noise of its samples.

        That is [T, 2, S], or [T, 2, C] uniform of categorical latents, or Gumbel.

        Args:
            draw: gives standard normals of the sizes named, numbers or letters of ``dims``.
        """
        raise NotImplementedError


def latent_loop(rollout: Rollout, seen: Observation, logits: str = "logit") -> tuple[dict, dict]:
    """Posterior and prior as dictionaries, as ``observe`` of V2- and V3-style code returns them."""
    states = []
    for dist, stoch in ((seen.post, seen.state.stoch), (seen.prior, rollout.draw(seen.prior))):
        given = dist._asdict()
        if isinstance(dist, OneHot):
            stoch, given = stoch.reshape(dist.logits.shape), {logits: dist.logits}
        states.append({"stoch": stoch, "deter": seen.state.deter} | given)
    return states[0], states[1]


def mixed_logits(dist: OneHot) -> Tensor:
    """log p with the uniform part mixed in, bounded as ``torch.distributions`` does."""
    return probs_to_logits(dist.probs)


def check_loop(loop: Any) -> None:
    """Run the peer itself and its loop on a small example, with the same noise; and again where it
    is called in another mode.

    Raises:
        MisfitError: they differ (the peer computes something else than its layers say), or the
            peer cannot be called so.
    """
    worst = largest_difference(loop)
    if worst[0] > _tolerance(loop):
        raise MisfitError(
            f"adapt: {type(loop.model).__name__} computes something else than its layers and "
            f"constants say: its {worst[1]} is off by {worst[0]:.0%}, with the same noise; give "
            "what differs as an option, or the layers to Rollout.from_modules(), and see "
            "Rollout.verify(own=)"
        )
    kind = type(loop.model).__name__
    loop.rollout.watched.append(Watch(kind, loop, called=True))
    loop.rollout.answers.append(Answer(kind, loop.model, partial(agrees, loop)))


def agrees(loop: Any) -> bool:
    """Whether the peer and its loop give the same."""
    return largest_difference(loop)[0] <= _tolerance(loop)


def largest_difference(loop: Any) -> tuple[float, str]:
    """The largest relative difference, and of what; of a copy in float32 where the peer is in less.

    Raises:
        MisfitError: it has no numbers yet, or cannot be called so.
    """
    if loop.rollout.like.is_meta:
        raise MisfitError(
            f"adapt: {type(loop.model).__name__} is on the meta device, where it cannot be asked "
            "what it computes; give it numbers first"
        )
    if is_coarse(loop.rollout.like):
        loop = copy.deepcopy(loop).float()
    rollout = loop.rollout
    numbers = normals(rollout.like)

    def draw(*sizes: int | str) -> Tensor:
        return numbers(*[rollout.dims[n] if isinstance(n, str) else n for n in sizes])

    with asking(rollout.like, loop.model):
        inputs, noise = loop.example(draw)
        try:
            want = dict(_tensors(rollout.serve(lambda: loop.own(*inputs), noise)))
        except Exception as error:  # whatever somebody's code raises
            raise MisfitError(
                f"adapt: {type(loop.model).__name__} is not called as the one known here: "
                f"{type(error).__name__}: {error}"
            ) from error
        got = dict(_tensors(rollout.serve(lambda: loop(*inputs), noise)))
    if want.keys() != got.keys() or any(want[k].shape != got[k].shape for k in want):
        raise MisfitError(
            f"adapt: {type(loop.model).__name__} returns something else than the one known here: "
            f"{_shapes(want)}, not {_shapes(got)}"
        )
    return max((relative_difference(got[name], x), name) for name, x in want.items())


def _tolerance(loop: Any) -> float:
    like = loop.rollout.like
    return tolerance(like.float() if is_coarse(like) else like)


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def _tensors(result: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The floating tensors in what a loop returns, by name."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield name, result
    elif isinstance(result, torch.distributions.Distribution):
        yield f"{name}.mean", result.mean
        yield f"{name}.stddev", result.stddev
    elif hasattr(result, "items"):
        for key, value in result.items():
            yield from _tensors(value, f"{name}[{key!r}]")
    elif isinstance(result, list | tuple):
        names = getattr(result, "_fields", range(len(result)))
        for key, value in zip(names, result, strict=True):
            yield from _tensors(value, f"{name}[{key!r}]")
