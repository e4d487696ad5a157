"""Known Dreamers in PyTorch, recognised from the object itself: :func:`adapt`.

Each peer gets back a loop with the signature of its own, over a :class:`Rollout` (``.rollout``)
that uses its parameters in place. Nothing of a peer is imported; ``torchrl`` and ``tensordict``
are there already where their objects are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdreamer.nn.layers import MisfitError
from fastdreamer.ops.params import State, StdTransform
from fastdreamer.rollout import Rollout

_FUNCTIONS = {F.elu: "elu", F.relu: "relu", F.silu: "silu", F.tanh: "tanh"}
_FUNCTIONS |= {torch.relu: "relu", torch.tanh: "tanh"}


def adapt(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """Return the fast loop in the place of a known peer's own.

    Args:
        model: torchrl's ``RSSMRollout``; a ``TransitionModel`` with ``fc_embed_state_action``,
            ``rnn``, ``fc_embed_belief_prior``, ...; an ``RSSMRollout`` with
            ``representation_model`` and ``transition_model``; an RSSM with ``grusa``, ``gru``,
            ``prior`` and ``posterior``; sheeprl's Dreamer-V1 ``RSSM``.
        options: of :meth:`Rollout.from_modules`, instead of what is read off the model; ``actor``
            may be the peer's own (torchrl's ``DreamerActor``, one with layers ``fc1``, ``fc2``,
            ..., sheeprl's ``Actor``), the heads any layers.

    Raises:
        MisfitError: the model is none of these, or has parts without a fast loop.
    """
    for fits, loop in _PEERS:
        if fits(model):
            return loop(model, **options)
    raise MisfitError(
        f"adapt: {type(model).__name__} is no peer known here: torchrl's RSSMRollout, a "
        "TransitionModel (fc_embed_state_action, rnn, ...), an RSSMRollout "
        "(representation_model, transition_model), an RSSM with grusa, gru, prior and posterior, "
        "or sheeprl's RSSM (recurrent_model, representation_model, transition_model); "
        "Rollout.from_modules() takes the layers of any other"
    )


class TorchrlRollout(nn.Module):
    """In the place of torchrl's ``RSSMRollout``: TensorDict [*batch, T] in and out.

    The same keys as the original's. A posterior with a third in_key reads its noise there; else it
    is drawn. The prior's sample, which nothing reads, is drawn only where it has a key.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.rssm_prior, self.rssm_posterior = model.rssm_prior, model.rssm_posterior
        self.in_keys, self.out_keys = model.in_keys, model.out_keys
        prior, post = self.rssm_prior.module, self.rssm_posterior.module
        prior_layers, std = _split_extractor("rnn_to_prior_projector", prior.rnn_to_prior_projector)
        post_layers, post_std = _split_extractor(
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
        self.rollout = _make(given, options)

    def forward(self, tensordict: Any) -> Any:
        out = tensordict.exclude(*self.out_keys)
        *batch, steps = out.shape
        state_key, belief_key, action_key, *noise_keys = self.rssm_prior.in_keys
        embed_key, *post_noise = self.rssm_posterior.in_keys[1:]
        if noise_keys:
            raise MisfitError("rssm_prior: its noise is not read; give noise to the posterior")

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
            drawn = torch.randn_like(seen.prior.mean)
            values[sample_key] = seen.prior.sample(drawn)
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


class TransitionLoop:
    """In the place of a time-major ``TransitionModel``: lists of beliefs and states.

    ``nonterminals`` (0 or 1) mask the previous state, not the belief, as the original does.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        given = {
            "inp": [model.fc_embed_state_action],
            "gru": model.rnn,
            "prior": [model.fc_embed_belief_prior, model.fc_state_prior],
            "post": [model.fc_embed_belief_posterior, model.fc_state_posterior],
            "activation": _function(model),
            "std": StdTransform(min=float(model.min_std_dev)),
            "reset": "stoch",
        }
        self.rollout = _make(given, options)

    def __call__(
        self,
        prev_state: Tensor,
        actions: Tensor,
        prev_belief: Tensor,
        observations: Tensor | None = None,
        nonterminals: Tensor | None = None,
        *,
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """beliefs, prior states, means, stds; with observations the posterior's three, too."""
        start = State(prev_belief, prev_state)
        if observations is None:
            if nonterminals is not None:
                raise MisfitError("TransitionModel: nonterminals without observations are not read")
            if noise is None:
                noise = actions.new_empty(*actions.shape[:2], prev_state.shape[-1]).normal_()
            states = self.rollout.open_loop(start, actions, noise)
            prior = self.rollout.prior(states.deter)
            return [*states, *prior]
        first = None if nonterminals is None else nonterminals.reshape(actions.shape[:2]) == 0
        seen = self.rollout.observe(observations, actions, first, start, noise)
        drawn = seen.prior.sample(torch.randn_like(seen.prior.mean))
        return [seen.state.deter, drawn, *seen.prior, seen.state.stoch, *seen.post]


class RepresentationLoop:
    """In the place of an ``RSSMRollout`` whose states are (mean, std, stoch, deter)."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        transition, representation = model.transition_model, model.representation_model
        pick = functools.partial(_attribute, "RSSMRollout")
        given = {
            "inp": pick(transition, "_rnn_input_model", "rnn_input_model"),
            "gru": pick(transition, "_cell", "cell"),
            "prior": pick(transition, "_stochastic_prior_model", "stochastic_prior_model"),
            "post": pick(
                representation, "_stochastic_posterior_model", "stochastic_posterior_model"
            ),
            "std": StdTransform(min=0.1),
            "action_first": True,
            "stoch_first": True,
        }
        self.rollout = _make(given, options)

    def __call__(
        self,
        steps: int,
        obs_embed: Tensor,
        action: Tensor,
        prev_state: Any,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """prior and posterior states, each of the class of ``prev_state``, [steps, B, ...]."""
        start = State(prev_state.deter, prev_state.stoch)
        seen = self.rollout.observe(obs_embed[:steps], action[:steps], None, start, noise)
        drawn = seen.prior.sample(torch.randn_like(seen.prior.mean))
        new = type(prev_state)
        prior = new(*seen.prior, drawn, seen.state.deter)
        return prior, new(*seen.post, seen.state.stoch, seen.state.deter)

    rollout_representation = __call__

    def rollout_transition(
        self, steps: int, action: Tensor, prev_state: Any, *, noise: Tensor | None = None
    ) -> Any:
        """States under given actions."""
        start = State(prev_state.deter, prev_state.stoch)
        states = self.rollout.open_loop(start, action[:steps], noise)
        return type(prev_state)(*self.rollout.prior(states.deter), states.stoch, states.deter)


class GrusaLoop:
    """In the place of ``rollout_obs`` of a batch-first RSSM: embed [B, T + 1, E], action [B, T, A].

    The least std is no attribute of the model: pass ``std=`` where it is not 0.1.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        given = {"inp": model.grusa, "gru": model.gru, "prior": model.prior}
        given |= {"post": model.posterior, "std": StdTransform(min=0.1), "batch_first": True}
        if isinstance(getattr(model, "reward", None), nn.Module):
            given["reward"] = model.reward
        self.rollout = _make(given, options)

    def __call__(
        self, e: Tensor, a: Tensor, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list, list]:
        """hs, states, and a list of priors and of posteriors; ``noise`` is [B, T + 1, S]."""
        # the initial state is a step, too, from zeros with a zero action
        action = torch.cat([a.new_zeros(a.shape[0], 1, a.shape[2]), a], 1)
        seen = self.rollout.observe(e, action, noise=noise)

        def split(dist: Any) -> list:
            normal = torch.distributions.Normal
            pairs = zip(dist.mean.unbind(1)[1:], dist.std.unbind(1)[1:], strict=True)
            return [torch.distributions.Independent(normal(*pair), 1) for pair in pairs]

        return seen.state.deter[:, 1:], seen.state.stoch[:, 1:], split(seen.prior), split(seen.post)


class DynamicLoop:
    """In the place of the loop over ``RSSM.dynamic`` of sheeprl's Dreamer V1, over all steps."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        given = {
            "inp": model.recurrent_model.mlp,
            "gru": model.recurrent_model.rnn,
            "prior": _unwrap(model.transition_model),
            "post": _unwrap(model.representation_model),
            "std": StdTransform(min=float(model.min_std)),
            "stoch_first": True,
        }
        self.rollout = _make(given, options)

    def __call__(
        self,
        posterior: Tensor,
        recurrent_state: Tensor,
        action: Tensor,
        embedded_obs: Tensor,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What ``dynamic`` returns, stacked: action [T, B, A], states [1, B, ...]."""
        start = State(recurrent_state[0], posterior[0])
        seen = self.rollout.observe(embedded_obs, action, None, start, noise)
        prior = seen.prior.sample(torch.randn_like(seen.prior.mean))
        return seen.state.deter, seen.state.stoch, prior, tuple(seen.post), tuple(seen.prior)


# ---------------------------------------------------------------- reading peers


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda model: all(hasattr(model, name) for name in names)


def _is_torchrl(model: Any) -> bool:
    kind = type(model)
    return kind.__name__ == "RSSMRollout" and kind.__module__.startswith("torchrl.")


_PEERS: list[tuple[Callable[[Any], bool], Callable[..., Any]]] = [
    (_is_torchrl, TorchrlRollout),
    (_has("fc_embed_state_action", "fc_embed_belief_prior", "rnn"), TransitionLoop),
    (_has("grusa", "gru", "prior", "posterior"), GrusaLoop),
    (_has("recurrent_model", "representation_model", "transition_model"), DynamicLoop),
    (_has("representation_model", "transition_model"), RepresentationLoop),
]


def _make(given: dict[str, Any], options: dict[str, Any]) -> Rollout:
    options = dict(options)
    if isinstance(options.get("actor"), nn.Module):
        given |= _actor(options.pop("actor"))
    for name in ("reward", "critic", "target", "discount"):
        if isinstance(options.get(name), nn.Module):
            options[name] = _unwrap(options[name])
    return Rollout.from_modules(**given | options)


def _unwrap(module: Any) -> Any:
    """The layers of modules that only hold them: TensorDictModule, sheeprl's MLP, fc1..fcN."""
    if isinstance(module, nn.Sequential | nn.Linear | list | tuple):
        return module
    for name in ("module", "_model", "model"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _unwrap(inner)
    return module


def _actor(module: nn.Module) -> dict[str, Any]:
    """Layers and constants of a peer's actor."""
    inner = module
    while not hasattr(inner, "backbone") and isinstance(
        getattr(inner, "module", None), nn.Module | nn.ModuleList
    ):
        inner = inner.module[0] if isinstance(inner.module, nn.ModuleList) else inner.module
    if hasattr(inner, "backbone"):  # torchrl's DreamerActor; its TanhNormal bounds the mean by 5
        layers, std = _split_extractor("backbone", inner.backbone)
        return {"actor": layers, "action_std": std, "mean_scale": 5.0}
    if hasattr(module, "fc1"):
        count = sum(hasattr(module, f"fc{i}") for i in range(1, 17))
        layers = [getattr(module, f"fc{i}") for i in range(1, count + 1)]
        init, least = float(module._init_std), float(module._min_std)
        std = StdTransform(offset=math.log(math.expm1(init)), min=least)
        found = [*layers], float(module._mean_scale)
        act = _activation(_function(module))
        stacked = [x for layer in layers[:-1] for x in (layer, act)] + layers[-1:]
        return {"actor": nn.Sequential(*stacked), "action_std": std, "mean_scale": found[1]}
    if hasattr(module, "mlp_heads"):  # sheeprl: the offset is init_std itself
        if len(module.mlp_heads) != 1 or getattr(module, "distribution", "") != "tanh_normal":
            raise MisfitError("actor: one tanh_normal head fits, not discrete or other actions")
        std = StdTransform(offset=float(module.init_std), min=float(module.min_std))
        layers = nn.Sequential(*_unwrap(module.model), module.mlp_heads[0])
        return {"actor": layers, "action_std": std, "mean_scale": 5.0}
    return {"actor": _unwrap(module)}


def _split_extractor(name: str, layers: nn.Sequential) -> tuple[nn.Sequential, StdTransform]:
    """Layers, and the transform of the NormalParamExtractor behind them."""
    last = layers[-1]
    if type(last).__name__ != "NormalParamExtractor":
        raise MisfitError(f"{name}: must end with NormalParamExtractor, got {last!r}")
    mapping, floor = last.scale_mapping, float(last.scale_lb)
    if mapping in (F.softplus, torch.nn.functional.softplus):
        std = StdTransform(floor=floor)
    elif mapping is torch.exp:
        std = StdTransform("exp", floor=floor)
    elif type(mapping).__name__ == "biased_softplus":
        std = StdTransform(offset=float(mapping.bias), min=float(mapping.min_val), floor=floor)
    else:
        raise MisfitError(
            f"{name}: scale mapping {mapping!r} has no fast loop; softplus, exp and "
            "biased_softplus fit"
        )
    return nn.Sequential(*list(layers)[:-1]), std


def _function(model: nn.Module) -> str:
    function = model.act_fn
    if function not in _FUNCTIONS:
        name = getattr(function, "__name__", repr(function))
        raise MisfitError(f"act_fn: {name} has no fast loop; elu, relu, silu and tanh fit")
    return _FUNCTIONS[function]


def _activation(name: str) -> nn.Module:
    return {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}[name]()


def _attribute(style: str, module: nn.Module, *names: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise MisfitError(f"{style}: {type(module).__name__} has no {' or '.join(names)}")
