"""Known Dreamers in PyTorch, recognised from the object itself: :func:`adapt`.

Each peer gets back a loop with the signature of its own, over a :class:`Rollout` (``.rollout``)
that uses its parameters in place. Nothing of a peer is imported; ``torchrl`` and ``tensordict``
are there already where their objects are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastdreamer.rollout.adapters.blocks import BlocksLoop
from fastdreamer.rollout.adapters.grusa import GrusaLoop
from fastdreamer.rollout.adapters.loop import check_loop
from fastdreamer.rollout.adapters.mlps import MlpsLoop
from fastdreamer.rollout.adapters.natural import NaturalLoop
from fastdreamer.rollout.adapters.nonterms import NontermsLoop
from fastdreamer.rollout.adapters.representation import RepresentationLoop
from fastdreamer.rollout.adapters.sheeprl import CategoricalLoop, DynamicLoop
from fastdreamer.rollout.adapters.simple import SimpleLoop
from fastdreamer.rollout.adapters.stats import StatsLoop
from fastdreamer.rollout.adapters.transition import TransitionLoop
from fastdreamer.rollout.layers import (
    AVERAGED,
    MisfitError,
    as_given,
    is_compiled,
    is_parallel,
)
from fastdreamer.rollout.watch import refuse_hooks

__all__ = ["adapt"]


def adapt(model: nn.Module, **options: Any) -> nn.Module:
    """Return the fast loop in the place of a known peer's own: a module over the same parameters.

    The peer itself is run once on a few numbers, and its loop with the same noise: what differs
    is refused.

    Args:
        model: torchrl's ``RSSMRollout``, ``RSSMRolloutV3`` or ``RSSMPriorV3``; sheeprl's ``RSSM``
            of Dreamer V1, V2 or V3; the ``RSSM`` of dreamerv3-torch and dreamer-torch
            (``_obs_stat_layer``), r2dreamer (``_deter_net``), burchim (``mlp_img1``, ...) or
            SimpleDreamer; NaturalDreamer's ``Dreamer``; a ``TransitionModel`` with
            ``fc_embed_state_action``, ``rnn``, ``fc_embed_belief_prior``, ...; an ``RSSMRollout``
            with ``representation_model`` and ``transition_model``; an RSSM with ``grusa``, ``gru``,
            ``prior`` and ``posterior``, or with ``fc_state_action`` and ``observe_rollout``.
            Compiled by ``torch.compile`` or ``torch.jit.script``, or not.
        options: of :meth:`Rollout.from_modules`, instead of what is read off the model; ``actor``
            and the heads may be the peer's own. A policy's constants that its object does not keep
            are asked for.

    Raises:
        MisfitError: the model is none of these, has parts without a fast loop, or computes
            something else than the peer known here.
    """
    if is_compiled(model):
        refuse_hooks([(type(model).__name__, model)])
        model = as_given(model)
    if is_parallel(model):
        raise MisfitError(f"adapt: {type(model).__name__} {AVERAGED}")
    for fits, loop in _PEERS:
        if fits(model):
            try:
                made = loop(model, **options)
            except AttributeError as error:  # of the model, or of its actor or heads
                raise MisfitError(
                    f"adapt: {type(model).__name__} is not made as the one known here: {error}; "
                    "where the layers fit, Rollout.from_modules() takes them"
                ) from error
            check_loop(made)
            return made
    if _torchrl("RSSMPosteriorV3")(model):
        raise MisfitError(
            "adapt: RSSMPosteriorV3 alone is no loop; with its prior RSSMRolloutV3 fits, or its "
            "obs_rnn_to_post_projector as post= of Rollout.from_modules()"
        )
    raise MisfitError(
        f"adapt: {type(model).__name__} is no peer known here: torchrl's RSSMRollout, "
        "RSSMRolloutV3 or RSSMPriorV3, sheeprl's RSSM (recurrent_model.mlp and .rnn, "
        "representation_model, transition_model), an RSSM with _cell and _obs_stat_layer, with "
        "_deter_net, _img_net and _obs_net, with mlp_img1, mlp_img2, mlp_obs1 and gru, with grusa, "
        "gru, prior and posterior, with fc_state_action and observe_rollout, or SimpleDreamer's "
        "(recurrent_model.linear and .recurrent), NaturalDreamer's (recurrentModel, priorNet, "
        "posteriorNet), a TransitionModel (fc_embed_state_action, rnn, ...), an RSSMRollout "
        "(representation_model, transition_model); where the layers fit, Rollout.from_modules() "
        "takes those of any other"
    )


def _has(*names: str) -> Callable[[Any], bool]:
    """Whether a model has all of these attributes, dots within them followed."""

    def has(model: Any) -> bool:
        for name in names:
            part = model
            for step in name.split("."):
                if not hasattr(part, step):
                    return False
                part = getattr(part, step)
        return True

    return has


def _torchrl(name: str) -> Callable[[Any], bool]:
    """Whether a model is torchrl's class of this name."""
    return lambda model: (
        type(model).__name__ == name and type(model).__module__.startswith("torchrl.")
    )


def _first(model: Any, **options: Any) -> nn.Module:
    from fastdreamer.rollout.adapters.torchrl import TorchrlRollout  # there, as its model is

    return TorchrlRollout(model, **options)


def _third(model: Any, **options: Any) -> nn.Module:
    from fastdreamer.rollout.adapters.torchrl_v3 import TorchrlRolloutV3

    return TorchrlRolloutV3(model, **options)


def _third_prior(model: Any, **options: Any) -> nn.Module:
    from fastdreamer.rollout.adapters.torchrl_v3 import PriorLoop

    return PriorLoop(model, **options)


_PARTS = ("representation_model", "transition_model")
_PEERS: list[tuple[Callable[[Any], bool], Callable[..., nn.Module]]] = [
    (_torchrl("RSSMRollout"), _first),
    (_torchrl("RSSMRolloutV3"), _third),
    (_torchrl("RSSMPriorV3"), _third_prior),
    (_has("_cell", "_obs_stat_layer", "_obs_out_layers", "_img_out_layers"), StatsLoop),
    (_has("_deter_net._dyn_gru", "_img_net", "_obs_net"), BlocksLoop),
    (_has("mlp_img1", "mlp_img2", "mlp_obs1", "gru"), MlpsLoop),
    (_has("recurrentModel.recurrent", "priorNet", "posteriorNet"), NaturalLoop),
    (_has("fc_embed_state_action", "fc_embed_belief_prior", "rnn"), TransitionLoop),
    (_has("fc_state_action", "rnn", "observe_rollout"), NontermsLoop),
    (_has("grusa", "gru", "prior", "posterior"), GrusaLoop),
    (_has("recurrent_model.mlp", "recurrent_model.rnn", "discrete", *_PARTS), CategoricalLoop),
    (_has("recurrent_model.mlp", "recurrent_model.rnn", *_PARTS), DynamicLoop),
    (_has("recurrent_model.linear", "recurrent_model.recurrent", *_PARTS), SimpleLoop),
    (_has("representation_model._transition_model", *_PARTS), RepresentationLoop),
]
