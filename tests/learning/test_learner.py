"""Learners: who teaches which parameters, and that a loss reaches no others'."""

import dataclasses

import pytest
import torch

from fastdreamer.config import ExploreConfig, SafetyConfig, preset
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.learning.learner import Losses

A, STATE, T, B = 6, 24, 5, 3
TINY = preset("tiny")
AGENTS = {
    "dreamer": TINY,
    "ends": dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, discount=True)),
    "explorer": dataclasses.replace(TINY, explore=ExploreConfig("ucb", critics=True)),
    "guard": dataclasses.replace(TINY, safety=SafetyConfig("walker")),
    "planet": dataclasses.replace(TINY, agent="planet", explore=ExploreConfig("ucb", at="plan")),
}


def make_batch():
    g, first = torch.Generator().manual_seed(0), torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    return {
        "state": 6 * torch.randn(T, B, STATE, generator=g),
        "action": torch.rand(T, B, A, generator=g) * 2 - 1,
        "reward": torch.rand(T, B, generator=g),
        "is_first": first,
        "terminated": torch.rand(T, B, generator=g) < 0.2,
    }


@pytest.mark.parametrize("name", AGENTS)
def test_every_parameter_has_one_teacher(name):
    agent = Dreamer(AGENTS[name], {"state": (STATE,)}, A)
    optimized = [pair for learner in agent.learners for pair in learner.optimized().items()]
    names = [optimizer for optimizer, (module, _) in optimized if module is not None]
    assert list(agent.make_optimizers()) == names and len(set(names)) == len(names)
    taught = [p for _, (module, _) in optimized if module is not None for p in module.parameters()]
    assert len({id(p) for p in taught}) == len(taught)
    assert {id(p) for p in taught} == {id(p) for p in agent.parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("name", AGENTS)
def test_a_loss_reaches_the_parameters_of_its_optimizer_alone(monkeypatch, name, backend):
    """Each of the losses that one backward pass serves, looked at by itself."""
    agent = Dreamer(dataclasses.replace(AGENTS[name], backend=backend), {"state": (STATE,)}, A)
    modules = {n: m for learner in agent.learners for n, (m, _) in learner.optimized().items()}
    if agent.guard is not None:
        agent.guard.multiplier.fill_(1.0)
    reached, learn = set(), agent._learn

    def look(what, found, optimizers):
        for loss_name, loss in found.named.items():
            parameters = [p for p in agent.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            got = {id(p) for p, grad in zip(parameters, grads, strict=True) if grad is not None}
            own = {id(p) for p in modules[loss_name].parameters()}
            assert got and got <= own, loss_name
            reached.update(got)
        return learn(what, found, optimizers)

    monkeypatch.setattr(agent, "_learn", look)
    agent.update(make_batch(), agent.make_optimizers(), torch.Generator().manual_seed(0))
    assert reached == {id(p) for p in agent.parameters() if p.requires_grad}


def test_losses_beside_each_other_are_added_where_they_reach_the_same():
    one = Losses({"actor": torch.tensor(1.0), "critic": torch.tensor(2.0)}, {"a": torch.ones(())})
    other = Losses(
        {"actor": torch.tensor(4.0), "barrier": torch.tensor(8.0)}, {"b": torch.ones(())}
    )
    both = one.beside(other)
    assert {name: loss.item() for name, loss in both.named.items()} == {
        "actor": 5.0, "critic": 2.0, "barrier": 8.0,
    }  # fmt: skip
    assert list(both.metrics) == ["a", "b"]
    assert one.named["actor"] == 1 and set(other.named) == {"actor", "barrier"}
