"""Floating point operations that an op needs: twice the multiply-adds of its matrix products.

What is counted is the least work that gives the result, whoever does it: elementwise functions,
sampling and the λ-return are left out, and so is what one backend does twice and another once.
``test_tools.py`` holds the counts against ``torch.utils.flop_counter`` on the eager bodies.
"""

from __future__ import annotations

from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import (
    ActorParams,
    DecoderParams,
    EncoderParams,
    ReturnParams,
    RSSMParams,
)


def rssm_step(params: RSSMParams, B: int, *, backward: bool = False) -> int:
    """One step of the dynamics of B rows: input layer, GRU, prior.

    With ``backward``, the gradients of every parameter and input as well, which cost as much each.
    """
    return 2 * B * _dynamics(params) * (3 if backward else 1)


def open_loop(params: RSSMParams, H: int, B: int, *, backward: bool = False) -> int:
    """H steps of B rows under given actions; ``backward`` as in ``rssm_step``."""
    return H * rssm_step(params, B, backward=backward)


def observe(params: RSSMParams, T: int, B: int, *, backward: bool = False) -> int:
    """The posterior filter over T steps of B rows.

    With ``backward``, the gradients of every parameter and of the embedding as well: both of them
    cost as much as the forward pass, but for the first step, whose state asks for none.
    """
    assert params.post is not None
    step = _dynamics(params) + _mlp(params.post)
    if not backward:
        return 2 * T * B * step
    return 2 * T * B * 3 * step - 2 * B * (_mlp(params.inp) + params.gru.weight_hh.numel())


def imagine(
    params: RSSMParams, actor: ActorParams, H: int, B: int, returns: ReturnParams | None = None
) -> int:
    """H decisions of B rows; with ``returns``, reward and bootstrap value of the states 1..H."""
    step = _dynamics(params) + _mlp(actor.mlp) + (_heads(returns) if returns else 0)
    return 2 * H * B * step


def actor_update(
    params: RSSMParams, actor: ActorParams, H: int, B: int, returns: ReturnParams
) -> int:
    """``imagine`` with heads, and the gradient of its returns with respect to the actor.

    Backward through heads and dynamics goes to their inputs only, since their parameters are
    frozen; through the actor to its weights, and to the inputs of all layers but the first,
    whose input is detached. State 0 asks for no gradient.
    """
    through = _heads(returns) + _dynamics(params)
    actor_backward = 2 * _mlp(actor.mlp) - actor.mlp.weights[0].numel()
    first = params.gru.weight_hh.numel()
    forward = imagine(params, actor, H, B, returns)
    return forward + 2 * H * B * (through + actor_backward) - 2 * B * first


def actor_critic_update(
    params: RSSMParams, actor: ActorParams, H: int, B: int, returns: ReturnParams
) -> int:
    """``actor_update`` and the gradient of the critic's loss in the states 0..H-1.

    Where the critic bootstraps itself, values and input gradients of the states 1..H-1 are those
    of the actor's pass: state 0 and the weight gradients come on top. (Eager code runs the critic
    a second time; that is not counted.)
    """
    assert returns.critic is not None and returns.target is None
    critic = _mlp(returns.critic)
    inner = critic - returns.critic.weights[0].numel()  # the features are detached
    extra = 2 * B * (critic + inner) + 2 * H * B * critic
    return actor_update(params, actor, H, B, returns) + extra


def cem(params: RSSMParams, returns: ReturnParams, I: int, H: int, B: int, N: int) -> int:  # noqa: E741
    """I iterations of N candidates for each of B start states, scored by their λ-return."""
    return 2 * I * H * B * N * (_dynamics(params) + _heads(returns))


def _mlp(mlp: MLPParams) -> int:
    return sum(weight.numel() for weight in mlp.weights)


def decide(params: RSSMParams, actor: ActorParams, B: int) -> int:
    """One step of the posterior filter without the prior, and the actor, of B rows."""
    assert params.post is not None
    return 2 * B * (_dynamics(params) - _mlp(params.prior) + _mlp(params.post) + _mlp(actor.mlp))


def codec(
    encoder: EncoderParams | None,
    decoder: DecoderParams | None,
    N: int,
    *,
    backward: bool = False,
) -> int:
    """N images of 64 × 64 encoded and as many decoded, or one of both.

    With ``backward``, the gradients of every parameter and of the features as well, which cost as
    much each; the images ask for none.
    """
    layers, first = [], 0
    if encoder is not None:
        size = 64
        for weight in encoder.weights:
            size = (size - weight.shape[2]) // 2 + 1
            layers.append(size**2 * weight.numel())
        first = layers[0]
        if encoder.linear is not None:
            layers.append(encoder.linear[0].numel())
    if decoder is not None:
        size = 1
        layers.append(decoder.linear[0].numel())
        for weight in decoder.weights:
            layers.append(size**2 * weight.numel())
            size = 2 * (size - 1) + weight.shape[2]
    return 2 * N * (3 * sum(layers) - first if backward else sum(layers))


def _dynamics(params: RSSMParams) -> int:
    gru = params.gru
    return _mlp(params.inp) + gru.weight_ih.numel() + gru.weight_hh.numel() + _mlp(params.prior)


def _heads(returns: ReturnParams) -> int:
    bootstrap = returns.target or returns.critic
    given = (head for head in (returns.reward, bootstrap, returns.discount) if head is not None)
    return sum(map(_mlp, given))
