"""Layers of modules that somebody else wrote, read as parameters of the ops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from fastdreamer.errors import ArgumentError
from fastdreamer.ops.cells import GRUParams
from fastdreamer.ops.layers import ACTIVATIONS, MLPParams

_ACTIVATIONS = {nn.ELU: "elu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
_FIT = "Linear layers with bias and one of " + ", ".join(ACTIVATIONS) + " between them fit"
_CELLS_FIT = "nn.GRUCell, or nn.GRU of one layer in one direction, with bias, fits"
_KINDS = (nn.Linear, nn.GRUCell, nn.GRU, nn.Sequential, nn.Identity, *_ACTIVATIONS)
_SCRIPTED = {f"__torch__.{kind.__module__}.{kind.__name__}": kind for kind in _KINDS}

_OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _OWN_HOOKS)


class MisfitError(ArgumentError):
    """A module has no fast loop; the message names it, why, and what would fit."""


class Net:
    """Linear layers, an activation, and the modules they came from."""

    def __init__(
        self, linears: Sequence[nn.Module], activation: str, given: object, act_last: bool
    ) -> None:
        self.linears, self.activation = tuple(linears), activation
        self.given, self.act_last = given, act_last
        self.inputs, self.out = linears[0].weight.shape[1], linears[-1].weight.shape[0]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.linears

    def params(self) -> MLPParams:
        """The layers as they are now, in place."""
        weights = tuple([_tensor(layer, "weight") for layer in self.linears])
        return MLPParams(
            weights, tuple([_tensor(layer, "bias") for layer in self.linears]), self.activation
        )

    def __call__(self, x: Tensor) -> Tensor:
        """As the caller's own code runs it: its module where that is one, else layer by layer."""
        if isinstance(self.given, nn.Module):
            return self.given(x)
        act = ACTIVATIONS[self.activation]
        for i, layer in enumerate(self.linears):
            x = layer(x)
            if self.act_last or i < len(self.linears) - 1:
                x = act(x)
        return x

    def again(self, given: object) -> Net:
        """The same of a copy of what was given."""
        net = Reader().net("", given, self.activation, act_last=self.act_last)
        assert net is not None
        return net


class Gru:
    """A cell of ``torch.nn``."""

    def __init__(self, module: nn.Module, kind: type[nn.GRUCell] | type[nn.GRU]) -> None:
        self.module, self.given, self.kind, self.modules = module, module, kind, (module,)
        suffix = "" if kind is nn.GRUCell else "_l0"
        self.names = tuple(n + suffix for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        self.inputs, self.deter = module.input_size, module.hidden_size

    def params(self) -> GRUParams:
        return GRUParams(*[_tensor(self.module, name) for name in self.names])

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """As the caller's own code runs it."""
        if self.kind is nn.GRUCell:
            return self.module(x, h)
        module, dim = self.module, 1 if self.module.batch_first else 0
        if isinstance(module, torch.jit.ScriptModule):  # its forward is for scripts alone
            module = nn.GRU(self.inputs, self.deter, batch_first=bool(dim)).to(x)
            tensors = dict(zip(self.names, self.params(), strict=True))
            module = partial(torch.func.functional_call, module, tensors)
            return module((x.unsqueeze(dim), h.unsqueeze(0)))[0].squeeze(dim)
        return module(x.unsqueeze(dim), h.unsqueeze(0))[0].squeeze(dim)

    def again(self, given: nn.Module) -> Gru:
        """The same of a copy of its module."""
        return Gru(given, self.kind)


class Reader:
    """Reads the parts of a model one after another; what does not fit is told at once.

    ``misfits`` collects the reasons, ``watched`` every module that is not called any more, by a
    name for messages.
    """

    def __init__(self) -> None:
        self.misfits: list[str] = []
        self.watched: list[tuple[str, nn.Module]] = []

    def gru(self, name: str, module: nn.Module) -> Gru | None:
        """A GRU, or None where it is none."""
        module = self._uncompiled(name, module)
        kind = kind_of(module)
        if kind not in (nn.GRUCell, nn.GRU):
            self.misfits.append(
                f"{name}: {_describe_cell(module)} is no torch.nn GRU: a cell with normalisation, "
                f"in blocks or with its reset before the product computes something else; "
                f"{_CELLS_FIT}"
            )
            return None
        if kind is nn.GRU and (module.num_layers != 1 or module.bidirectional):
            self.misfits.append(
                f"{name}: nn.GRU has more layers or directions than one; {_CELLS_FIT}"
            )
            return None
        if not module.bias:
            self.misfits.append(f"{name}: {describe(module)} has no bias; {_CELLS_FIT}")
            return None
        self.watched.append((name, module))
        return Gru(module, kind)

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
        if activation is not None and activation not in ACTIVATIONS:
            self.misfits.append(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        linears: list[nn.Module] = []
        pattern, found = "", set()
        for path, module in self._flatten(name, given):
            kind = kind_of(module)
            if kind is nn.Linear:
                reason = _why_no_layer(module, linears)
                if reason:
                    self.misfits.append(f"{path}: {reason}")
                linears.append(module)
                pattern += "L"
            elif kind in _ACTIVATIONS and getattr(module, "alpha", 1.0) == 1.0:
                found.add(_ACTIVATIONS[kind])
                pattern += "a"
            elif kind is not nn.Identity:
                own = isinstance(module, nn.Linear | nn.Sequential)
                why = "has a forward() of its own" if own else "has no fast loop"
                self.misfits.append(f"{path}: {describe(module)} {why}; {_FIT}")
        if len(self.misfits) > before:
            return None
        count = len(linears)
        bare = pattern == "L" * count and (count > 1 or act_last)
        if not linears:
            self.misfits.append(f"{name}: has no Linear layer; {_FIT}")
        elif len(found) > 1:
            several = ", ".join(sorted(found))
            self.misfits.append(f"{name}: has several activations, {several}; {_FIT}")
        elif bare and activation is None:
            self.misfits.append(
                f"{name}: no activation follows its layers; name it with activation="
            )
        elif not bare and pattern != "a".join("L" * count) + "a" * act_last:
            where = "and behind the last" if act_last else "and none behind the last"
            self.misfits.append(
                f"{name}: its layers and activations stand as {pattern!r}, but one activation "
                f"must stand between each two layers {where}"
            )
        if len(self.misfits) > before:
            return None
        own_activation = found.pop() if found else activation or "elu"
        return Net(linears, own_activation, linears if bare else as_given(given), act_last)

    def _flatten(self, name: str, given: object) -> Iterator[tuple[str, nn.Module]]:
        """The modules in their order, those that hold others opened."""
        given = self._uncompiled(name, given)
        if isinstance(given, nn.Module):
            self.watched.append((name, given))
            opened = kind_of(given) is nn.Sequential or _joins(given)
            parts = list(given.children()) if opened else None
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

    def _uncompiled(self, name: str, module: object) -> object:
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
    for kind in _KINDS:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def is_compiled(module: object) -> bool:
    """Whether it is what ``torch.compile`` returns of a module."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def as_given(module: object) -> object:
    """The module inside of what ``torch.compile`` returns; any other as it is."""
    return module._orig_mod if is_compiled(module) else module  # type: ignore[attr-defined]


def refuse_hooks(watched: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise where a hook would not run: the loops call no module.

    Raises:
        MisfitError: names the module and the kind of hook.
    """
    for name in _GLOBAL_HOOKS:
        if getattr(torch_module, name):
            raise MisfitError(f"torch.nn.modules.module has {_spoken(name)}, which would not run")
    for path, module in watched:
        for name in _OWN_HOOKS:
            if getattr(module, name):
                raise MisfitError(
                    f"{path}: {describe(module)} has {_spoken(name)}, which would not run"
                )


def _spoken(attribute: str) -> str:
    """``_forward_pre_hooks`` as "forward pre-hooks"."""
    return attribute.strip("_").replace("_pre_", " pre-").replace("_", " ")


def _why_no_layer(module: nn.Module, before: list[nn.Module]) -> str | None:
    if is_lazy(module.weight):
        return "LazyLinear has no weights yet; run one batch first"
    if module.bias is None:
        return f"Linear has no bias; {_FIT}"
    if before and not is_lazy(before[-1].weight):
        got, made = module.weight.shape[1], before[-1].weight.shape[0]
        if got != made:
            return f"takes {got} inputs, the layer before has {made} outputs"
    return None


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


def _describe_cell(module: object) -> str:
    """A cell with the parts that say what it computes."""
    parts = [describe(part) for part in module.children()] if isinstance(module, nn.Module) else []
    return describe(module) + (f" of {', '.join(parts)}" if parts else "")


def _tensor(module: nn.Module, name: str) -> Tensor:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, name)
    tensor = module._parameters.get(name)
    return getattr(module, name) if tensor is None else tensor  # parametrized
