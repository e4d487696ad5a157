"""A loop and its peer share all tensors: saved, moved, loaded, replaced and copied."""

import copy
from functools import partial

import modern
import peers
import pytest
import torch
from torch import nn

from fastdreamer.rollout import adapt

STARTS = {
    "dreamerv3-torch": (modern.StatsRSSM, "W"),
    "burchim": (modern.MlpsRSSM, "weight_init"),
    "sheeprl": (modern.SheepV3, "initial_recurrent_state"),
    "sheeprl, none that learns": (
        partial(modern.SheepV3, learnable=False),
        "initial_recurrent_state",
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def made(name):
    """A model whose episodes begin somewhere else than at zero, its loop, and where that stands."""
    kind, start = STARTS[name]
    model = kind()
    with torch.no_grad():
        getattr(model, start).normal_()
    return model, adapt(model), start


def tensors(model):
    """All that a model has, by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def in_step(loop):
    """Whether a loop and its peer have the same tensors by the same names."""
    own, peer = tensors(loop), tensors(loop.model)
    return own.keys() == peer.keys() and all(own[name] is peer[name] for name in own)


@pytest.mark.parametrize("name", STARTS)
def test_a_loop_saves_what_its_peer_saves(name):
    model, loop, start = made(name)
    assert list(loop.state_dict()) == list(model.state_dict()) and start in loop.state_dict()
    assert in_step(loop)
    model.register_buffer("passing", torch.zeros(1), persistent=False)
    loop.register_buffer("lasting", torch.zeros(1))
    assert list(loop.state_dict()) == list(model.state_dict())
    assert in_step(loop) and {"passing", "lasting"} <= tensors(loop).keys()
    assert "passing" not in loop.state_dict() and "lasting" in loop.state_dict()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_loop_of_a_script_has_its_tensors():
    class Start(peers.ScriptedTransition):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("count", torch.zeros(1))

    loop = adapt(Start())
    assert list(loop.state_dict()) == list(loop.model.state_dict())
    assert {"scale", "count"} <= loop.state_dict().keys()
    assert copy.deepcopy(loop).state_dict().keys() == loop.state_dict().keys()
