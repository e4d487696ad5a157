"""Peers' actors and heads: layers and constants, checked against what the peer's module gives."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdreamer.ops.params import (
    Categorical,
    Normal,
    Readout,
    State,
    StdTransform,
    choose,
    noise_size,
    policy_dist,
    read_out,
    two_hot,
)
from fastdreamer.rollout.ask import asking, is_coarse, normals
from fastdreamer.rollout.draws import relative_difference, tolerance, with_noise
from fastdreamer.rollout.layers import (
    AVERAGED,
    Joined,
    MisfitError,
    describe,
    is_compiled,
    is_parallel,
    kind_of,
)
from fastdreamer.rollout.rollout import HEADS, Rollout
from fastdreamer.rollout.watch import Answer

_FUNCTIONS = {F.elu: nn.ELU, F.relu: nn.ReLU, F.silu: nn.SiLU, F.tanh: nn.Tanh}
_FUNCTIONS |= {torch.relu: nn.ReLU, torch.tanh: nn.Tanh, F.gelu: nn.GELU, F.mish: nn.Mish}
_HOLDERS = ("_model", "model", "network", "feedforward_model", "action_model", "_mean_layers")
_LAST = ("mean_layer", "last", "linear_proj")

Watched = list[tuple[str, nn.Module]]


def read_with_heads(options: dict[str, Any]) -> Rollout:
    """:meth:`Rollout.from_modules` of options whose actor and heads may be peers' modules.

    Raises:
        MisfitError: a module does not fit, a policy's constants are not known, or a module gives
            something else than its layers and constants say.
    """
    options, bypassed, asked = dict(options), [], {}
    policies: list[dict[str, Any]] = [{}]
    for name in ("actor", *HEADS):
        if options.get(name) is None:
            continue
        module = bare(name, options[name], bypassed)
        if name == "actor":
            options[name], policies = _read_actor(module, bypassed)
            policies = [known | _policy(options) for known in policies]
        else:
            options[name] = layers_of(name, module, bypassed)
            read = "reward_as" if name == "reward" else "value_as"
            if name != "discount" and (readout := _readout(name, module)) is not None:
                options.setdefault(read, readout)
        if options[name] is not module and not _of_torchrl(module):
            asked[name] = module
    if options.get("actor") is not None:
        one_hot = isinstance(policies[0].get("action_std"), Categorical)
        demanded = ("action_std",) if one_hot else ("mean_scale", "action_std")
        lacking = [what for what in demanded if what not in policies[0]]
        if lacking:
            raise MisfitError(
                f"actor: its layers do not say {' and '.join(lacking)}; give them: the policy is "
                "tanh(c·tanh(x/c) + std(y)·noise)"
            )
    for policy in policies:
        rollout = Rollout.from_modules(**options | policy)
        wrong = [name for name in asked if not _as_asked(rollout, name, asked[name])]
        if "actor" not in wrong:
            break
    for name in wrong:
        said = f" with {policy}" if name == "actor" else ""
        raise MisfitError(
            f"{name}: {type(asked[name]).__name__} gives something else than its layers{said}; "
            "give the layers themselves and what belongs to them"
        )
    rollout.watch(bypassed)
    for name, module in asked.items():
        rollout.answers.append(Answer(name, module, partial(_as_asked, rollout, name, module)))
    return rollout


def bare(name: str, module: Any, bypassed: Watched) -> Any:
    """A module out of what wraps it: torch.compile, TensorDictModule, Lightning Fabric.

    Raises:
        MisfitError: it is wrapped for data-parallel training, which gradients would bypass.
    """
    while isinstance(module, nn.Module):
        for wrapper in (module, getattr(module, "_forward_module", None)):
            if is_parallel(wrapper):
                raise MisfitError(f"{name}: {type(wrapper).__name__} {AVERAGED}")
        inner = getattr(module, "_orig_mod" if is_compiled(module) else "module", None)
        if isinstance(inner, nn.ModuleList) and len(inner):
            inner = inner[0]  # of a TensorDictSequential, what is sampled from comes behind
        if not isinstance(inner, nn.Module):
            break
        bypassed.append((name, module))
        module = inner
    return module


def layers_of(name: str, module: Any, bypassed: Watched) -> Any:
    """The layers of a module that holds them, as Sequential or as ``fc1`` to ``fcN``."""
    if not isinstance(module, nn.Module) or kind_of(module) in (nn.Sequential, nn.Linear):
        return module
    if getattr(module, "_symlog_inputs", False) or getattr(
        getattr(module, "mlp", None), "_symlog_inputs", False
    ):
        raise MisfitError(f"{name}: takes the symlog of its inputs; features as they are fit")
    last = next((n for n in _LAST if isinstance(getattr(module, n, None), nn.Linear)), None)
    if last is not None:  # dreamerv3-torch's MLP, r2dreamer's and burchim's heads
        bypassed.append((name, module))
        inner = module if last == "mean_layer" else module.mlp
        if inner is not module:
            bypassed.append((name, inner))
        std = getattr(module, "std_layer", None)
        final = getattr(module, last)
        return [inner.layers, final if std is None else Joined(final, std)]
    if hasattr(module, "fc1"):
        bypassed.append((name, module))
        count = next(i for i in range(1, 100) if not hasattr(module, f"fc{i + 1}"))
        layers = [getattr(module, f"fc{i}") for i in range(1, count + 1)]
        act = function_of(module)
        return [x for layer in layers[:-1] for x in (layer, act)] + layers[-1:]
    for holder in _HOLDERS:
        inner = getattr(module, holder, None)
        if isinstance(inner, nn.Module):
            bypassed.append((name, module))
            return layers_of(name, bare(name, inner, bypassed), bypassed)
    return module


def function_of(module: nn.Module) -> nn.Module:
    """The activation that a module keeps as ``act_fn``, a function or a module."""
    function = module.act_fn
    if isinstance(function, nn.Module):
        return function
    if function not in _FUNCTIONS:
        name = getattr(function, "__name__", repr(function))
        raise MisfitError(
            f"act_fn: {name} has no fast loop; elu, relu, silu, tanh, gelu and mish fit"
        )
    return _FUNCTIONS[function]()


def split_extractor(name: str, layers: nn.Sequential) -> tuple[nn.Sequential, StdTransform]:
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


def _policy(options: dict[str, Any]) -> dict[str, Any]:
    constants = ("mean_scale", "action_std", "squash")
    return {name: options[name] for name in constants if name in options}


def _read_actor(module: Any, bypassed: Watched) -> tuple[Any, list[dict[str, Any]]]:
    """Layers, and what the policy's constants are (or may be: ``init_std`` has two readings)."""
    if hasattr(module, "backbone"):  # torchrl's DreamerActor
        layers, std = split_extractor("backbone", module.backbone)
        bypassed.append(("actor", module))
        return layers, [{"action_std": std} | _mean_scale_of_torchrl(bypassed)]
    if hasattr(module, "mlp_heads"):
        policy = _policy_of_sheeprl(module)
        bypassed.append(("actor", module))
        hidden = bare("actor", module.model, bypassed)
        return [layers_of("actor", hidden, bypassed), module.mlp_heads[0]], [policy]
    if any(isinstance(getattr(module, name, None), nn.Linear) for name in _LAST):
        return layers_of("actor", module, bypassed), [_policy_of_v3(module)]
    if hasattr(module, "_pre_layers"):  # dreamer-torch's ActionHead
        policy = _policy_of_v2(module)
        bypassed.append(("actor", module))
        return [module._pre_layers, module._dist_layer], [policy]
    kind = getattr(module, "dist", None)
    discrete = any(getattr(module, n, None) is True for n in ("discrete", "discrete_action_bool"))
    if discrete or kind not in (None, "tanh_normal"):
        raise MisfitError("actor: a tanh-Normal policy fits, not one-hot or other actions")
    scale, init, least = (_constant(module, n) for n in ("mean_scale", "init_std", "min_std"))
    known = {} if scale is None else {"mean_scale": scale}
    layers = layers_of("actor", module, bypassed)
    if init is None or least is None:
        return layers, [known]
    # init_std is the std at y = 0, which is never 0, or what is added to y
    offsets = [math.log(math.expm1(init)), init] if init > 0 else [init]
    return layers, [known | {"action_std": StdTransform(offset=x, min=least)} for x in offsets]


def _policy_of_sheeprl(module: Any) -> dict[str, Any]:
    """What the actor of Dreamer V1, V2 or V3 makes of its outputs; init_std is an offset itself."""
    kind, heads = getattr(module, "distribution", ""), module.mlp_heads
    if len(heads) != 1:
        raise MisfitError("actor: one head fits, not several discrete actions")
    if kind == "discrete":
        unimix = float(getattr(module, "_unimix", 0.0))
        return {"action_std": Categorical(heads[0].weight.shape[0], unimix)}
    init, least = float(module.init_std), float(module.min_std)
    bound = {"squash": "bound"} if float(getattr(module, "_action_clip", 0.0)) == 1.0 else {}
    if float(getattr(module, "_action_clip", 0.0)) not in (0.0, 1.0):
        raise MisfitError(f"actor: action_clip = {module._action_clip}; 1.0, or 0.0 for none, fits")
    softplus = StdTransform(offset=init, min=least)
    if kind == "tanh_normal":
        return {"action_std": softplus, "mean_scale": 5.0}
    if kind == "normal":
        return {"action_std": softplus, "mean_scale": math.inf, "squash": "none"} | bound
    if kind == "scaled_normal":
        std = StdTransform("sigmoid", float(module.max_std) - least, offset=init, min=least)
        return {"action_std": std, "mean_scale": 1.0, "squash": "none"} | bound
    raise MisfitError(
        f"actor: a policy {kind!r} is drawn by its inverse CDF; tanh_normal, normal, scaled_normal "
        "and discrete fit"
    )


def _policy_of_v2(module: Any) -> dict[str, Any]:
    """The same of dreamer-torch's ActionHead, which draws a truncated normal without its bounds."""
    kind = module._dist
    if kind == "onehot":
        return {"action_std": Categorical(module._dist_layer.weight.shape[0])}
    if kind == "trunc_normal":
        std = StdTransform("sigmoid", 2.0, 0.5, min=float(module._min_std))
        return {"mean_scale": 1.0, "action_std": std, "squash": "none"}
    raise MisfitError(
        f"actor: a policy {kind!r} has no fast loop; trunc_normal and onehot fit, or its layers "
        "and constants"
    )


def _policy_of_v3(module: Any) -> dict[str, Any]:
    """The same of dreamerv3-torch's MLP, r2dreamer's MLPHead and burchim's PolicyNetwork."""
    if hasattr(module, "_dist_name"):
        kind, said = module._dist_name, module._dist.keywords
        constants = said.get("min_std"), said.get("max_std"), said.get("unimix_ratio", 0.0), None
    elif hasattr(module, "_dist"):
        kind = module._dist
        names = ("_min_std", "_max_std", "_unimix_ratio", "_absmax")
        constants = tuple(getattr(module, name) for name in names)
    else:
        kind = "onehot" if module.discrete else "normal"
        names = ("min_std", "max_std", "uniform_mix")
        constants = *(getattr(module, name) for name in names), None
    least, most, unimix, absmax = constants
    if kind == "onehot":
        last = next(getattr(module, name) for name in _LAST if hasattr(module, name))
        gumbel = hasattr(module, "_dist_name")  # r2dreamer's
        return {"action_std": Categorical(last.weight.shape[0], float(unimix), gumbel)}
    if absmax not in (None, 1.0):
        raise MisfitError(f"actor: absmax = {absmax}; 1.0, or None, fits")
    bounded = {"mean_scale": 1.0, "squash": "none" if absmax is None else "bound"}
    if kind in ("normal", "bounded_normal"):
        std = StdTransform("sigmoid", float(most) - float(least), offset=2.0, min=float(least))
        return bounded | {"action_std": std}
    if kind == "tanh_normal" and absmax is None:
        return {"mean_scale": 1.0, "action_std": StdTransform(min=float(least))} | (
            {"squash": "tanh"}
        )
    raise MisfitError(
        f"actor: a policy {kind!r} has no fast loop; normal, bounded_normal, tanh_normal and "
        "onehot fit"
    )


def _readout(name: str, module: Any) -> Readout | None:
    """How a head of those repositories is read; None where nothing says so."""
    kind = getattr(module, "_dist_name", None) or getattr(module, "_dist", None)
    if kind == "symlog_disc" or (kind is None and hasattr(module, "linear_proj")):
        last = module.mean_layer if hasattr(module, "mean_layer") else module.linear_proj
        like = last.weight
        bins = torch.linspace(-20, 20, like.shape[0], dtype=like.dtype, device=like.device)
        return Readout(bins, squashed=True) if like.shape[0] > 1 else None
    if kind == "symexp_twohot":
        return two_hot(module.last.weight.shape[0], module.last.weight)
    if kind == "symlog_mse":
        return Readout(None, squashed=True)
    return None


def _constant(module: Any, name: str) -> float | None:
    """A number that an actor or its configuration keeps."""
    for owner, attribute in [(module, name), (module, f"_{name}"),
                             (getattr(module, "config", None), name)]:  # fmt: skip
        value = getattr(owner, attribute, None)
        if isinstance(value, int | float | Tensor):
            return float(value)
    return None


def _mean_scale_of_torchrl(bypassed: Watched) -> dict[str, float]:
    """How the TanhNormal behind the actor bounds its mean, where it is among what was given."""
    for _, wrapper in bypassed:
        for part in wrapper.modules():
            kind = getattr(part, "distribution_class", None)
            if kind is None:
                continue
            said = dict(part.distribution_kwargs or {})
            low, high = (float(said.get(n, x)) for n, x in (("low", -1), ("high", 1)))
            if kind.__name__ != "TanhNormal" or (low, high) != (-1.0, 1.0):
                raise MisfitError(
                    f"actor: TanhNormal in [-1, 1] fits, got {kind.__name__} in [{low}, {high}]"
                )
            bounded = bool(said.get("tanh_loc", False))
            return {"mean_scale": float(said.get("upscale", 5.0)) if bounded else math.inf}
    return {}


def _of_torchrl(module: Any) -> bool:
    return type(module).__module__.startswith("torchrl.")


# ---------------------------------------------------------------- asking the modules


def _as_asked(rollout: Rollout, name: str, module: nn.Module) -> bool:
    """Whether a peer's actor or head gives what its layers and constants say, on a few features.

    Large ones show a bound on the mean; with small ones the tanh hides no standard deviation.

    Raises:
        MisfitError: it takes none of (deter, stoch), (stoch, deter) and the two joined.
    """
    if is_coarse(rollout.like):
        rollout, module = copy.deepcopy((rollout, module))
        for part in (module, *(part for net in rollout.nets.values() for part in net.modules)):
            part.float()
    return all(_gives(rollout, name, module, scale) for scale in (10.0, 0.1))


def _gives(rollout: Rollout, name: str, module: nn.Module, scale: float) -> bool:
    like, dims, o = rollout.like, rollout.dims, rollout.options
    drawn: dict[str, tuple[Tensor, ...]] = {}  # of one-hot actions
    reasons: list[str] = []
    with asking(like, module):
        draw = normals(like)
        deter, stoch, noise = (draw(2, dims[n]) for n in "DSA")
        state, noise = State(scale * deter, scale * stoch), 0.3 * noise
        feat = state.concat(o.stoch_first)
        raw = rollout.nets[name](feat)
        wanted = [[raw]]
        if name == "actor":
            dist = policy_dist(raw, o.mean_scale, o.action_std)
            if isinstance(dist, Normal):
                wanted = [[choose(dist, o.squash, noise)], [*dist]]
            else:
                kind = "gumbel" if o.action_std.gumbel else "uniform"
                noise = noise[:, : noise_size(o.action_std, dims["A"])].sigmoid()
                drawn, wanted = {kind: (noise[None],)}, [[dist.sample(noise), dist.probs]]
        elif name != "discount":
            wanted.append([read_out(rollout.readout(name), raw)])
        for given in ((state.deter, state.stoch), (state.stoch, state.deter), (feat,)):
            normal = () if drawn else (noise[None],)
            try:
                answers = with_noise(_asking(module, *given), *normal, **drawn)
            except Exception as error:  # whatever somebody's code raises
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            if any(all(any(map(_near(x), answers)) for x in parts) for parts in wanted):
                return True
    if len(reasons) == 3:
        raise MisfitError(
            f"{name}: {describe(module)} takes neither deter and stoch nor the two joined "
            f"({reasons[-1]}); give its layers and what belongs to them"
        )
    return False


def _asking(module: nn.Module, *given: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: list(_answers(module(*given)))


def _answers(result: Any) -> Iterator[Tensor]:
    """What a head may mean: its tensors, or its distribution's samples, mean, mode and so on."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _answers(part)
    else:
        for draw in ("rsample", "sample"):
            with contextlib.suppress(NotImplementedError, AttributeError, ValueError):
                yield getattr(result, draw)()
        while hasattr(result, "base_dist"):
            result = result.base_dist
        for name in ("mean", "mode", "logits", "probs"):
            with contextlib.suppress(NotImplementedError, AttributeError):
                part = getattr(result, name)
                part = part() if callable(part) else part
                if isinstance(part, Tensor):
                    yield part


def _near(want: Tensor) -> Callable[[Tensor], bool]:
    def near(got: Tensor) -> bool:
        if got.numel() != want.numel():
            return False
        return relative_difference(got.reshape_as(want), want) <= tolerance(want)

    return near
