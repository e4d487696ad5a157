"""Layers of modules that somebody else wrote, read as parameters of the ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastdreamer.errors import ArgumentError
from fastdreamer.ops.params import ACTIVATIONS, GRUParams, MLPParams

_MODULES = {nn.ELU: "elu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
_FIT = "Linear layers with bias and one of " + ", ".join(ACTIVATIONS) + " between them fit"


class MisfitError(ArgumentError):
    """A module has no fast loop; the message names it, why, and what would fit."""


class Net:
    """Linear layers, an activation, and the modules they came from."""

    def __init__(self, linears: Sequence[nn.Linear], activation: str, given: object) -> None:
        self.linears, self.activation, self.given = tuple(linears), activation, given
        self.inputs, self.out = linears[0].in_features, linears[-1].out_features

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.linears

    def params(self) -> MLPParams:
        """The layers as they are now, in place."""
        weights = tuple([_tensor(layer, "weight") for layer in self.linears])
        return MLPParams(
            weights, tuple([_tensor(layer, "bias") for layer in self.linears]), self.activation
        )

    def __call__(self, x: Tensor, *, act_last: bool = False) -> Tensor:
        """As the caller's own code runs it: its module where that is one, else layer by layer."""
        if isinstance(self.given, nn.Sequential):
            return self.given(x)
        act = ACTIVATIONS[self.activation]
        for i, layer in enumerate(self.linears):
            x = layer(x)
            if act_last or i < len(self.linears) - 1:
                x = act(x)
        return x


class Gru:
    """A cell of ``torch.nn``."""

    def __init__(self, module: nn.GRUCell | nn.GRU) -> None:
        self.module, self.modules = module, (module,)
        suffix = "" if isinstance(module, nn.GRUCell) else "_l0"
        self.names = tuple(n + suffix for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        self.inputs, self.deter = module.input_size, module.hidden_size

    def params(self) -> GRUParams:
        return GRUParams(*[_tensor(self.module, name) for name in self.names])

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """As the caller's own code runs it."""
        if isinstance(self.module, nn.GRUCell):
            return self.module(x, h)
        dim = 1 if self.module.batch_first else 0
        return self.module(x.unsqueeze(dim), h.unsqueeze(0))[0].squeeze(dim)


def read_gru(name: str, module: nn.Module) -> Gru:
    """Read a GRU, or refuse it."""
    fit = "nn.GRUCell, or nn.GRU of one layer in one direction, with bias, fits"
    kinds = (nn.GRUCell, nn.GRU)
    if not any(isinstance(module, k) and type(module).forward is k.forward for k in kinds):
        raise MisfitError(
            f"{name}: {_describe(module)} is no torch.nn GRU: a cell with normalisation, in blocks "
            f"or with its reset before the product computes something else; {fit}"
        )
    if isinstance(module, nn.GRU) and (module.num_layers != 1 or module.bidirectional):
        raise MisfitError(f"{name}: nn.GRU has more layers or directions than one; {fit}")
    if not module.bias:
        raise MisfitError(f"{name}: {_describe(module)} has no bias; {fit}")
    _refuse_hooks(name, module)
    return Gru(module)


def read_net(
    name: str,
    given: nn.Module | Sequence[nn.Module],
    activation: str | None = None,
    *,
    act_last: bool = False,
) -> Net:
    """Read layers, or refuse them.

    Args:
        name: for messages.
        given: ``nn.Sequential`` (nested as it likes), ``nn.Linear``, or a list of them.
        activation: what is between the layers where no module says so.
        act_last: whether an activation follows the last layer.

    Raises:
        MisfitError: something else is among them.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise MisfitError(
            f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    linears: list[nn.Linear] = []
    pattern, found = "", set()
    for path, module in _flatten(name, given):
        _refuse_hooks(path, module)
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            if is_lazy(module.weight):
                raise MisfitError(f"{path}: LazyLinear has no weights yet; run one batch first")
            if module.bias is None:
                raise MisfitError(f"{path}: Linear has no bias; {_FIT}")
            if linears and linears[-1].out_features != module.in_features:
                raise MisfitError(
                    f"{path}: takes {module.in_features} inputs, the layer before has "
                    f"{linears[-1].out_features} outputs"
                )
            linears.append(module)
            pattern += "L"
        elif type(module) in _MODULES and getattr(module, "alpha", 1.0) == 1.0:
            found.add(_MODULES[type(module)])
            pattern += "a"
        elif not isinstance(module, nn.Identity):
            raise MisfitError(f"{path}: {_describe(module)} has no fast loop; {_FIT}")
    if not linears:
        raise MisfitError(f"{name}: has no Linear layer; {_FIT}")
    if len(found) > 1:
        raise MisfitError(f"{name}: has several activations, {', '.join(sorted(found))}; {_FIT}")
    count = len(linears)
    bare = pattern == "L" * count and (count > 1 or act_last)
    if bare and activation is None:
        raise MisfitError(f"{name}: no activation follows its layers; name it with activation=")
    if not bare and pattern != "a".join("L" * count) + "a" * act_last:
        where = "and behind the last" if act_last else "and none behind the last"
        raise MisfitError(
            f"{name}: its layers and activations stand as {pattern!r}, but one activation must "
            f"stand between each two layers {where}"
        )
    own = found.pop() if found else activation or "elu"
    return Net(linears, own, None if bare else given)


def _flatten(name: str, given: object) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(given, nn.Sequential) or not isinstance(given, nn.Module):
        if isinstance(given, nn.Module):
            if type(given).forward is not nn.Sequential.forward and not _joins(given):
                raise MisfitError(f"{name}: {_describe(given)} has a forward() of its own; {_FIT}")
            _refuse_hooks(name, given)
        elif not isinstance(given, Sequence):
            raise MisfitError(f"{name}: must be modules, got {type(given).__name__}; {_FIT}")
        for i, module in enumerate(given):  # type: ignore[arg-type]
            yield from _flatten(f"{name}[{i}]", module)
    else:
        yield name, given


def _joins(module: nn.Module) -> bool:
    """torchrl's MLP: a Sequential whose forward() only concatenates its inputs."""
    kind = type(module)
    return kind.__name__ == "MLP" and kind.__module__.startswith("torchrl.")


def _refuse_hooks(name: str, module: nn.Module) -> None:
    lazy = isinstance(module, nn.Linear) and is_lazy(module.weight)  # its hooks are its own
    if not lazy and (module._forward_hooks or module._forward_pre_hooks):
        raise MisfitError(f"{name}: {_describe(module)} has forward hooks, which would not run")


def _describe(module: object) -> str:
    return (
        repr(module).split("\n")[0].rstrip("(")
        if isinstance(module, nn.Module)
        else (type(module).__name__)
    )


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name)
    return getattr(module, name) if tensor is None else tensor  # parametrized
