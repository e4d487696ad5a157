"""Layers of modules that somebody else wrote, read as parameters of the ops."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fastdreamer.errors import ArgumentError
from fastdreamer.ops.layers import ACTIVATIONS, MLPParams, Norm, normalise
from fastdreamer.rollout.ask import asking, is_coarse, normals, parts_of
from fastdreamer.rollout.draws import relative_difference, tolerance

_ACTIVATIONS = {nn.ELU: "elu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
_ACTIVATIONS |= {nn.GELU: "gelu", nn.Mish: "mish"}
_NORMS = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
_FIT = (
    "Linear layers, LayerNorm or RMSNorm behind them or not, and one of "
    + ", ".join(ACTIVATIONS)
    + " between them fit"
)
_KINDS = (nn.Linear, nn.GRUCell, nn.GRU, nn.Sequential, nn.Identity, *_ACTIVATIONS, *_NORMS)
_SCRIPTED = {f"__torch__.{kind.__module__}.{kind.__name__}": kind for kind in _KINDS}

_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
AVERAGED = (
    "would be bypassed and its gradients never be averaged: give what it wraps, and wrap what "
    "calls the loop"
)
SHARDED = (
    "is sharded: read the model before fully_shard, and call the loop in the forward() of a module "
    "that fully_shard was given, where its weights are whole"
)


class MisfitError(ArgumentError):
    """A module has no fast loop; the message names it, why, and what would fit."""


class Joined(NamedTuple):
    """Two Linear layers of the same inputs, the outputs of the second behind those of the first.

    Of policies and latents whose mean and std have a layer each: ``actor=[layers, Joined(m, s)]``.
    """

    first: nn.Module
    second: nn.Module


class NormOf:
    """A module that is LayerNorm or RMSNorm, or gives the same."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.module, self.kind = module, kind
        self.scale = _tensor_among(module, "weight", "scale", "gamma")
        self.shift = _tensor_among(module, "bias", "beta")
        weight = None if self.scale is None else getattr(module, self.scale)
        shape = getattr(module, "normalized_shape", None)
        self.size = shape[-1] if shape else None if weight is None else weight.shape[-1]

    def params(self, dtype: torch.dtype) -> Norm:
        weight, bias = (
            None if name is None else tensor_of(self.module, name)
            for name in (self.scale, self.shift)
        )
        eps = self.module.eps
        return Norm(self.kind, weight, bias, torch.finfo(dtype).eps if eps is None else float(eps))


class Layer:
    """A Linear layer, or two whose outputs are joined, and the norm behind it."""

    def __init__(self, linear: nn.Module | Joined, norm: NormOf | None = None) -> None:
        self.linear, self.norm = linear, norm
        self.linears = tuple(linear) if isinstance(linear, Joined) else (linear,)
        weight, *others = (part.weight for part in self.linears)
        self.inputs = weight.shape[1]
        self.out = weight.shape[0] + sum(other.shape[0] for other in others)

    @property
    def given(self) -> list[object]:
        """The modules, what is joined as one."""
        return [self.linear, *([] if self.norm is None else [self.norm.module])]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.linears if self.norm is None else (*self.linears, self.norm.module)

    def tensors(self) -> tuple[Tensor, Tensor | None, Norm | None]:
        """Weight, bias and norm as they are now; of one layer in place."""
        weights, biases = (
            [tensor_of(part, name) for part in self.linears] for name in ("weight", "bias")
        )
        weight, bias = weights[0], biases[0]
        norm = None if self.norm is None else self.norm.params(weight.dtype)
        if len(self.linears) > 1:
            weight, bias = torch.cat(weights), None if bias is None else torch.cat(biases)
        if weight.ndim == 3 and hasattr(self.linears[0], "blocks"):
            weight = weight.permute(2, 1, 0)  # r2dreamer's [out / G, in / G, G]
        return weight, bias, norm

    def __call__(self, x: Tensor) -> Tensor:
        """As the caller's own code runs it."""
        x = torch.cat([part(x) for part in self.linears], -1)
        return x if self.norm is None else self.norm.module(x)


class Net:
    """Linear layers, their norms, an activation, and the modules they came from."""

    def __init__(
        self, layers: Sequence[Layer], activation: str, given: object, act_last: bool
    ) -> None:
        self.layers, self.activation = tuple(layers), activation
        self.given, self.act_last = given, act_last
        self.inputs, self.out = layers[0].inputs, layers[-1].out

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(part for layer in self.layers for part in layer.modules)

    def params(self) -> MLPParams:
        """The layers as they are now, in place."""
        weights, biases, norms = zip(*[layer.tensors() for layer in self.layers], strict=True)
        count = len(norms) - (not self.act_last)
        norms = norms[:count] if any(norm is not None for norm in norms) else ()
        return MLPParams(weights, biases, self.activation, norms)

    def __call__(self, x: Tensor) -> Tensor:
        """As the caller's own code runs it: its module where that is one, else layer by layer."""
        if isinstance(self.given, nn.Module):
            return self.given(x)
        act = ACTIVATIONS[self.activation]
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.act_last or i < len(self.layers) - 1:
                x = act(x)
        return x

    def again(self, given: object) -> Net:
        """The same of a copy of what was given."""
        net = Reader().net("", given, self.activation, act_last=self.act_last)
        assert net is not None
        return net


class Reader:
    """Reads the parts of a model one after another; what does not fit is told at once.

    ``misfits`` collects the reasons, ``watched`` every module that is not called any more, by a
    name for messages, and ``asked`` those that were asked what they compute, and how.
    """

    def __init__(self) -> None:
        self.misfits: list[str] = []
        self.watched: list[tuple[str, nn.Module]] = []
        self.asked: list[tuple[str, nn.Module, Callable[[], object]]] = []

    def net(
        self,
        name: str,
        given: nn.Module | Sequence[nn.Module],
        activation: str | None = None,
        *,
        act_last: bool = False,
    ) -> Net | None:
        """Linear layers, or None where something else is among them.

        Args:
            name: for messages.
            given: ``nn.Sequential`` (nested as it likes), ``nn.Linear``, or a list of them;
                compiled by ``torch.compile`` or ``torch.jit.script``, or not.
            activation: what is between the layers where no module says so.
            act_last: whether an activation follows the last layer.
        """
        before = len(self.misfits)
        given = list(given) if type(given) is nn.ModuleList else given  # has no forward()
        if activation is not None and activation not in ACTIVATIONS:
            self.misfits.append(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        layers: list[Layer] = []
        pattern, found = "", set()
        for path, module in self._flatten(name, given):
            kind = kind_of(module)
            if isinstance(module, Joined) or is_linear(module):
                reasons = [f"{path}: {why}" for why in _why_no_layer(module, layers)]
                self.misfits += reasons
                layers += [] if reasons else [Layer(module)]
                pattern += "L"
                for part in module if isinstance(module, Joined) else [module]:
                    if kind_of(part) is not nn.Linear:
                        self.asked.append((path, part, partial(is_linear, part)))
            elif kind in _ACTIVATIONS and getattr(module, "alpha", 1.0) == 1.0:
                tanh = getattr(module, "approximate", "none") == "tanh"
                found.add("gelu_tanh" if tanh else _ACTIVATIONS[kind])
                pattern += "a"
            elif (norm := norm_of(module)) is not None:
                pattern += "n"
                if kind not in _NORMS:
                    self.asked.append((path, module, partial(norm_of, module)))
                if layers:
                    layers[-1].norm = norm
                if layers and norm.size not in (None, layers[-1].out):
                    self.misfits.append(
                        f"{path}: normalises {norm.size} numbers, the layer before has "
                        f"{layers[-1].out}"
                    )
            elif kind is not nn.Identity:
                own = isinstance(module, nn.Linear | nn.Sequential)
                why = "has a forward() of its own" if own else "has no fast loop"
                why = AVERAGED if is_parallel(module) else why
                self.misfits.append(f"{path}: {describe(module)} {why}; {_FIT}")
        if len(self.misfits) > before:
            return None
        bare = not found and (len(layers) > 1 or act_last)
        act = "" if bare else "a"
        wanted = f"(Ln?{act})*" + (f"Ln?{act}" if act_last else "L")
        if not layers:
            self.misfits.append(f"{name}: has no Linear layer; {_FIT}")
        elif len(found) > 1:
            several = ", ".join(sorted(found))
            self.misfits.append(f"{name}: has several activations, {several}; {_FIT}")
        elif bare and activation is None and re.fullmatch(wanted, pattern):
            self.misfits.append(
                f"{name}: no activation follows its layers; name it with activation="
            )
        elif not re.fullmatch(wanted, pattern):
            where = "and behind the last" if act_last else "and none behind the last"
            self.misfits.append(
                f"{name}: its layers, norms and activations stand as {pattern!r}, but one "
                f"activation must stand between each two layers {where}, norms before it"
            )
        if len(self.misfits) > before:
            return None
        own_activation = found.pop() if found else activation or "elu"
        parts = [part for layer in layers for part in layer.given]
        return Net(layers, own_activation, parts if bare else as_given(given), act_last)

    def tensor(self, name: str, given: Tensor | tuple[nn.Module, str]) -> Held | None:
        """A tensor, or a module and the tensor's name there; None where it is neither."""
        if isinstance(given, Tensor):
            return Held(Alone(given))
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], nn.Module)):
            kind = type(given).__name__
            self.misfits.append(
                f"{name}: must be a tensor, or a module and the tensor's name there, got {kind}"
            )
            return None
        owner, attribute = as_given(given[0]), given[1]
        held = getattr(owner, attribute, None)
        if is_sharded(held):
            self.misfits.append(f"{name}: {SHARDED}")
            return None
        if isinstance(held, Tensor):
            return Held(owner, attribute)
        self.misfits.append(f"{name}: {describe(owner)} has no tensor {attribute!r}")
        return None

    def _flatten(self, name: str, given: object) -> Iterator[tuple[str, nn.Module]]:
        """The modules in their order, those that hold others opened."""
        given = self.uncompiled(name, given)
        if isinstance(given, nn.Module):
            self.watched.append((name, given))
            opened = kind_of(given) is nn.Sequential or _joins(given)
            opened = opened or type(given) is nn.ModuleList
            # not children(), which names a module once that stands in several places
            parts = list(given._modules.values()) if opened else None
        elif isinstance(given, Joined):
            for part in given:
                self.watched.append((name, part))
            yield name, given
            return
        else:
            opened = isinstance(given, Sequence) and not isinstance(given, str)
            parts = list(given) if opened else None
            if not opened:
                kind = type(given).__name__
                self.misfits.append(f"{name}: must be modules, got {kind}; {_FIT}")
                return
        if parts is None:
            yield name, given
            return
        for i, part in enumerate(parts):
            yield from self._flatten(f"{name}[{i}]", part)

    def uncompiled(self, name: str, module: object) -> object:
        """The module that ``torch.compile`` was given, whose hooks it runs beside its own."""
        if is_compiled(module):
            self.watched.append((name, module))
            return as_given(module)
        return module


def kind_of(module: object) -> type[nn.Module] | None:
    """Which class of torch.nn a module computes as; None where it has a forward() of its own.

    A scripted module says so by the qualified name of its type.
    """
    if isinstance(module, torch.jit.ScriptModule):
        name = module._c._type().qualified_name()
        return _SCRIPTED.get(re.sub(r"___torch_mangle_\d+\.", "", name))
    if "forward" in getattr(module, "__dict__", ()):  # put there by somebody, as accelerate does
        return None
    for kind in _KINDS:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def is_compiled(module: object) -> bool:
    """Whether it is what ``torch.compile`` returns of a module."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def is_parallel(module: object) -> bool:
    """Whether it wraps a module for data-parallel training."""
    return type(module).__name__ in _PARALLEL


def is_sharded(tensor: object) -> bool:
    """Whether it is one of ``torch.distributed.tensor``, as those of FSDP are between calls."""
    return type(tensor).__name__ == "DTensor"


def as_given(module: object) -> object:
    """The module inside of what ``torch.compile`` returns; any other as it is."""
    return module._orig_mod if is_compiled(module) else module  # type: ignore[attr-defined]


class Alone(nn.Module):
    """A single tensor, a parameter or a buffer, which calling it gives."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if isinstance(value, nn.Parameter):
            self.register_parameter("value", value)
        else:
            self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.value


class Held:
    """A single tensor among the nets: a module's by its name, or what a module gives when called.

    It is never kept itself: what moves, loads or parametrizes a module puts others in its place.
    """

    def __init__(self, owner: nn.Module, name: str | None = None) -> None:
        self.owner, self.name = owner, name

    @property
    def given(self) -> nn.Module:
        """A module of that tensor alone, or of what it is computed from; calling it gives it."""
        if self.name is None:
            return self.owner
        if is_parametrized(self.owner, self.name):
            return self.owner.parametrizations[self.name]
        return Alone(getattr(self.owner, self.name))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.given,)

    def params(self) -> Tensor:
        """The numbers as they are now, [n]."""
        value = self.owner() if self.name is None else getattr(self.owner, self.name)
        return value.flatten()

    def again(self, given: nn.Module) -> Held:
        """The same of a copy."""
        return Held(given)


def _why_no_layer(module: nn.Module | Joined, before: list[Layer]) -> Iterator[str]:
    parts = list(module) if isinstance(module, Joined) else [module]
    if not all(is_linear(part) for part in parts):
        yield f"only two Linear layers can be joined; {_FIT}"
        return
    if any(is_lazy(part.weight) for part in parts):
        yield "LazyLinear has no weights yet; run one batch first"
        return
    if any(is_sharded(part.weight) for part in parts):
        yield SHARDED
        return
    if len({part.weight.shape[1] for part in parts}) > 1:
        yield "the layers joined take other numbers of inputs"
    if len({part.bias is None for part in parts}) > 1:
        yield "of the layers joined one has a bias and one has none"
    got, made = parts[0].weight.shape[1], before[-1].out if before else None
    if made not in (None, got):
        yield f"takes {got} inputs, the layer before has {made} outputs"


def is_linear(module: object) -> bool:
    """Whether it is ``nn.Linear``, or one of its children that gives the same."""
    if kind_of(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or is_lazy(module.weight):
        return False
    return asked(module, _as_linear)


def _as_linear(module: nn.Linear, draw: Callable[..., Tensor]) -> bool:
    x = draw(3, module.weight.shape[1])
    return near(module(x), F.linear(x, module.weight, module.bias))


def norm_of(module: object) -> NormOf | None:
    """A norm over the last dimension, or None where it is none."""
    kind = kind_of(module)
    if kind in _NORMS:
        return NormOf(module, _NORMS[kind]) if len(module.normalized_shape) == 1 else None
    names = {name for name, _ in module.named_parameters()} if isinstance(module, nn.Module) else ()
    if not names or not hasattr(module, "eps") or "." in "".join(names):
        return None
    for kind in _NORMS.values():
        norm = NormOf(module, kind)
        if norm.size is None or not names <= {norm.scale, norm.shift}:
            continue
        if asked(module, partial(_as_norm, kind)):
            return norm
    return None


def _as_norm(kind: str, module: nn.Module, draw: Callable[..., Tensor]) -> bool:
    norm = NormOf(module, kind)
    x = draw(3, norm.size) + 0.5
    return near(module(x), normalise(norm.params(x.dtype), x))


def _tensor_among(module: nn.Module, *names: str) -> str | None:
    """The first of these names that a tensor has there: a parameter, also parametrized, or not."""
    return next((n for n in names if isinstance(getattr(module, n, None), Tensor)), None)


def children_with_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within that own parameters, parametrized or not."""
    for part in parts_of(module):
        if is_parametrized(part) or any(True for _ in part.parameters(recurse=False)):
            yield part


def asked(module: nn.Module, agrees: Callable[[nn.Module, Callable[..., Tensor]], bool]) -> bool:
    """Whether a module, called on a few numbers, agrees; one that cannot be called does not.

    Args:
        module: whose dtype and device the numbers have. Of one in bfloat16 or float16 a copy in
            float32 is asked.
        agrees: gets the module, and what draws standard normals of given sizes.

    Raises:
        MisfitError: it has no numbers yet.
    """
    like = _first_of(module)
    if like is None:
        return False
    if like.is_meta:
        raise MisfitError(
            f"{describe(module)} is on the meta device, where it cannot be asked what it computes; "
            "give it numbers first"
        )
    with asking(like, module):
        try:
            if is_coarse(like):
                module = copy.deepcopy(module).float()
            return agrees(module, normals(_first_of(module)))
        except Exception:  # whatever somebody's code raises
            return False


def _first_of(module: nn.Module) -> Tensor | None:
    return next(itertools.chain(module.parameters(), module.buffers()), None)


def near(got: Tensor, want: Tensor) -> bool:
    """Whether two results are the same but for rounding, which may be to float32 inside."""
    same = isinstance(got, Tensor) and got.shape == want.shape
    return same and relative_difference(got, want) <= tolerance(want.float())


def _joins(module: nn.Module) -> bool:
    """torchrl's MLP: a Sequential whose forward() only concatenates its inputs."""
    kind = type(module)
    return kind.__name__ == "MLP" and kind.__module__.startswith("torchrl.")


def describe(module: object) -> str:
    """A module for a message."""
    return (
        repr(module).split("\n")[0].rstrip("(")
        if isinstance(module, nn.Module)
        else (type(module).__name__)
    )


def tensor_of(module: nn.Module, name: str) -> Any:
    """A parameter as it is now, a parametrized one computed; None where it is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, name)
    tensor = module._parameters.get(name)
    return getattr(module, name, None) if tensor is None else tensor  # parametrized
