"""Recurrent cells of modules that somebody else wrote, read as parameters of the ops.

A cell that is none of ``torch.nn`` is recognised by its parts and then asked: it has to give, on a
few numbers, what its parts and constants say, in one order of columns and gates or another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.cells import (
    BlockGRUParams,
    GRUParams,
    LateGRUParams,
    block_gru_cell,
    late_gru_cell,
)
from fastdreamer.ops.layers import MLPParams, mlp_act
from fastdreamer.ops.params import Branches, bounded
from fastdreamer.rollout.layers import (
    AVERAGED,
    Layer,
    Net,
    Reader,
    as_given,
    asked,
    children_with_parameters,
    describe,
    is_linear,
    is_parallel,
    kind_of,
    near,
    norm_of,
    tensor_of,
)

FIT = (
    "nn.GRUCell or nn.GRU of one layer in one direction, with bias, the GRU of DreamerV2 and V3 "
    "(one Linear of x and h, perhaps LayerNorm or RMSNorm over its 3D outputs, reset inside the "
    "candidate) and DreamerV3's block-diagonal GRU fit"
)
_UPDATE_BIASES = ("update_bias", "_update_bias")


class Gru:
    """A cell of ``torch.nn``."""

    front: Net | None = None
    branches: Callable[[], Branches] | None = None

    def __init__(self, module: nn.Module, kind: type[nn.GRUCell] | type[nn.GRU]) -> None:
        self.module, self.given, self.kind, self.modules = module, module, kind, (module,)
        suffix = "" if kind is nn.GRUCell else "_l0"
        self.names = tuple(n + suffix for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        self.inputs, self.deter = module.input_size, module.hidden_size

    def params(self) -> GRUParams:
        return GRUParams(*[tensor_of(self.module, name) for name in self.names])

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


class LateGru:
    """One Linear of x and h together, perhaps normalised, its reset inside the candidate."""

    front: Net | None = None
    branches: Callable[[], Branches] | None = None

    def __init__(self, module: nn.Module, order: tuple[bool, str, float] = (False, "rcu", -1.0)):
        linears, norms = late_parts(module)
        self.module, self.given, self.order = module, module, order
        self.layer = Layer(linears[0], norm_of(norms[0]) if norms else None)
        self.modules = tuple(linears + norms)
        self.deter = linears[0].weight.shape[0] // 3
        self.inputs = linears[0].weight.shape[1] - self.deter

    def params(self) -> LateGRUParams:
        weight, bias, norm = self.layer.tensors()
        return LateGRUParams(weight, bias, norm, *self.order)

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        return _new(self.module, x, h)

    def again(self, given: nn.Module) -> LateGru:
        return LateGru(given, self.order)


class BlockGru:
    """DreamerV3's block-diagonal GRU, of x and h or of stoch, deter and action.

    In the first form, torchrl's public cell, ``front`` holds the layers of x, which belong behind
    the model's own; in the second ``branches`` are the layers of stoch and action.
    """

    front: Net | None = None
    branches: Callable[[], Branches] | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module, self.given = module, module
        cell = block_parts(module)
        assert cell is not None
        self.nets, blocks, self.activation, self.update_bias, self.bound = cell
        self.blocks = [Layer(linear, norm_of(norm) if norm else None) for linear, norm in blocks]
        self.modules = tuple(part for net in self.nets.values() for part in net.modules) + tuple(
            part for layer in self.blocks for part in layer.modules
        )
        self.deter = self.nets["hidden"].inputs
        if "input" in self.nets:
            self.front = self.nets["input"]
            self.inputs = self.front.inputs
        else:
            self.branches = self._branches
            self.inputs = self.nets["stoch"].inputs + self.nets["action"].inputs

    def params(self) -> BlockGRUParams:
        weights, biases, norms = zip(*[layer.tensors() for layer in self.blocks], strict=True)
        blocks = MLPParams(tuple(weights), tuple(biases), self.activation, tuple(norms[:-1]))
        given = self.nets["hidden"].params(), blocks
        return BlockGRUParams(*given, "input" not in self.nets, self.update_bias)

    def _branches(self) -> Branches:
        return Branches(self.nets["stoch"].params(), self.nets["action"].params())

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As the caller's own code runs it: of x and h, or of stoch, deter and action."""
        return _new(self.module, *inputs)

    def again(self, given: nn.Module) -> BlockGru:
        return BlockGru(given)


def read_cell(reader: Reader, name: str, given: nn.Module) -> Gru | LateGru | BlockGru | None:
    """A recurrence, or None where it is none that the ops have."""
    module = reader.uncompiled(name, given)
    if type(module).__name__ == "DreamerV3BlockGRU" and hasattr(module, "cell"):
        reader.watched.append((name, module))
        module = module.cell
    kind = kind_of(module)
    if kind in (nn.GRUCell, nn.GRU):
        return _read_torch(reader, name, module, kind)
    if isinstance(module, nn.Module):
        parts = [(f"{name}.{path}".rstrip("."), part) for path, part in module.named_modules()]
        made: Any = None
        as_read: Any = None
        if block_parts(module) is not None:
            made, as_read = BlockGru(module), _as_block
            agrees = asked(module, partial(as_read, made))
        elif late_parts(module) is not None:
            made, as_read, agrees = LateGru(module), _as_late, False
            for order in _orders(module):
                made.order = order
                if asked(module, partial(as_read, made)):
                    agrees = True
                    break
        if made is not None and agrees:
            reader.watched += parts
            reader.asked.append((name, module, partial(asked, module, partial(as_read, made))))
            return made
        if made is not None:
            reader.misfits.append(
                f"{name}: {describe_cell(module)} has the parts of a GRU with its reset inside the "
                f"candidate, but computes something else; {FIT}"
            )
            return None
    why = "is no GRU that is known here"
    if isinstance(module, nn.GRUCell | nn.GRU):
        why = "has a forward() of its own"
    why = AVERAGED if is_parallel(module) else why
    reader.misfits.append(f"{name}: {describe_cell(module)} {why}; {FIT}")
    return None


def _read_torch(reader: Reader, name: str, module: nn.Module, kind: type) -> Gru | None:
    if kind is nn.GRU and (module.num_layers != 1 or module.bidirectional):
        reader.misfits.append(f"{name}: nn.GRU has more layers or directions than one; {FIT}")
        return None
    if not module.bias:
        reader.misfits.append(f"{name}: {describe(module)} has no bias; {FIT}")
        return None
    reader.watched.append((name, module))
    return Gru(module, kind)


def late_parts(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """The Linear and the norm of a cell that has nothing else with parameters."""
    linears, norms = [], []
    for part in children_with_parameters(module):
        if is_linear(part):
            linears.append(part)
        elif norm_of(part) is not None:
            norms.append(part)
        else:
            return None
    if len(linears) != 1 or len(norms) > 1:
        return None
    rows, columns = linears[0].weight.shape
    sized = not norms or norm_of(norms[0]).size in (None, rows)
    return (linears, norms) if rows % 3 == 0 and columns > rows // 3 and sized else None


def block_parts(module: nn.Module) -> Any:
    """Layers by the names that r2dreamer and torchrl give them, or None.

    Returns:
        The nets of h and of x, or of stoch and action; pairs of block layer and norm, the last of
        the gates; activation; update bias; and whether the action is bounded.
    """
    if hasattr(module, "_dyn_hid") and hasattr(module, "_dyn_gru"):  # r2dreamer
        names = {"hidden": "_dyn_in0", "stoch": "_dyn_in1", "action": "_dyn_in2"}
        hidden, gates, bound = list(module._dyn_hid), module._dyn_gru, True
    elif hasattr(module, "belief_projection") and hasattr(module, "gates"):  # torchrl's own model
        names = {"hidden": "belief_projection", "stoch": "state_projection"}
        names |= {"action": "action_projection"}
        hidden, gates, bound = list(module.hidden_layers), module.gates, True
    elif hasattr(module, "dynamic_linears") and hasattr(module, "gates"):  # torchrl's public cell
        pairs = zip(module.dynamic_linears, module.dynamic_norms, strict=True)
        hidden = [part for pair in pairs for part in (*pair, module.activation)]
        names, gates, bound = {}, module.gates, False
    else:
        return None
    reader, nets = Reader(), {}
    for name, attribute in names.items():
        nets[name] = reader.net(attribute, getattr(module, attribute), act_last=True)
    if not names:
        for name, kind in (("input", "input"), ("hidden", "hidden")):
            parts = [getattr(module, f"{kind}_linear"), getattr(module, f"{kind}_norm")]
            nets[name] = reader.net(name, [*parts, module.activation], act_last=True)
    blocks = list(zip(hidden[::3], hidden[1::3], strict=True))
    if any(net is None for net in nets.values()) or any(norm_of(n) is None for _, n in blocks):
        return None
    if len({net.activation for net in nets.values()}) > 1:
        return None
    update_bias = float(getattr(module, "update_bias", -1.0))
    return nets, [*blocks, (gates, None)], nets["hidden"].activation, update_bias, bound


def _orders(module: nn.Module) -> list[tuple[bool, str, float]]:
    """How the columns and rows of a cell may stand, the likeliest first."""
    biases = [getattr(module, name, None) for name in _UPDATE_BIASES]
    numbers = [float(x) for x in biases if isinstance(x, int | float)] + [-1.0, 0.0]
    gates = ["rcu", *("".join(order) for order in itertools.permutations("ruc"))]
    return list(itertools.product((False, True), dict.fromkeys(gates), dict.fromkeys(numbers)))


def _as_late(cell: LateGru, module: nn.Module, draw: Callable[..., Tensor]) -> bool:
    cell = cell if module is cell.module else cell.again(module)
    x, h = draw(3, cell.inputs), draw(3, cell.deter).tanh()
    return near(_new(cell.module, x, h), late_gru_cell(cell.params(), x, h))


def _as_block(cell: BlockGru, module: nn.Module, draw: Callable[..., Tensor]) -> bool:
    cell = cell if module is cell.module else cell.again(module)
    h = draw(3, cell.deter).tanh()
    if cell.front is not None:
        x = draw(3, cell.inputs)
        want = block_gru_cell(cell.params(), mlp_act(cell.front.params(), x), h)
        return near(_new(cell.module, x, h), want)
    stoch, action = (2 * draw(3, cell.nets[name].inputs) for name in ("stoch", "action"))
    branches = cell._branches()
    features = mlp_act(branches.stoch, stoch), mlp_act(branches.action, bounded(action))
    want = block_gru_cell(cell.params(), torch.cat(features, -1), h)
    return near(_new(cell.module, stoch, h, action), want)


def _new(module: nn.Module, *inputs: Tensor) -> Tensor:
    """h' from a cell that takes and returns h or a list of it, alone or behind its output."""
    try:
        result = module(*inputs)
    except (IndexError, TypeError, RuntimeError, AttributeError):
        result = module(*inputs[:-1], [inputs[-1]])
    while isinstance(result, Sequence) and not isinstance(result, Tensor):
        result = result[0]
    return result


def describe_cell(module: object) -> str:
    """A cell with the parts that say what it computes."""
    module = as_given(module)
    parts = [describe(part) for part in module.children()] if isinstance(module, nn.Module) else []
    return describe(module) + (f" of {', '.join(parts)}" if parts else "")
