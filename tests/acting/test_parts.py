"""What travels to whoever acts: all that acting needs, no more, and strictly."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fastdreamer.acting.parts import acting_parts, acting_weights
from fastdreamer.acting.planning import PlanningError
from fastdreamer.acting.policy import Policy
from fastdreamer.config import Config, ConfigError, ExploreConfig, SafetyConfig, preset
from fastdreamer.learning.dreamer import Dreamer

SHAPES, A = {"state": (24,)}, 6
OBS = {"state": np.linspace(-1, 1, 24, dtype=np.float32)}


def configurations():
    """Every way to act in a run: (config, who collects, who evaluates)."""
    tiny = preset("tiny")
    for agent, collect, evaluate in itertools.product(
        ("dreamer", "planet"), ("auto", "actor", "mpc", "mixed"), ("auto", "actor", "mpc", "planet")
    ):
        for explore, target, shield, ends in (
            (ExploreConfig(), 0, False, False),
            (ExploreConfig("ucb"), 7, True, True),
            (ExploreConfig("ucb", critics=True), 0, False, False),
            (ExploreConfig("ucb", critics=True), 7, False, True),
            (ExploreConfig("ucb", at="plan"), 7, False, False),
        ):
            config = dataclasses.replace(
                tiny,
                agent=agent,
                model=dataclasses.replace(tiny.model, discount=ends),
                behavior=dataclasses.replace(tiny.behavior, target_every=target),
                collect=dataclasses.replace(tiny.collect, controller=collect),
                eval=dataclasses.replace(tiny.eval, controller=evaluate),
                explore=explore,
                safety=SafetyConfig("walker", shield=True) if shield else SafetyConfig(),
            )
            try:
                config.validate()
            except ConfigError:
                continue
            yield config


CONFIGS = list(configurations())


def played(config: Config) -> list[tuple[str, bool]]:
    """The controllers of a run's episodes, and whether they are optimists."""
    both = {"mixed": ["actor", "mpc"]}
    collect = both.get(config.collect.controller, [config.collect.controller])
    optimist = config.explore.method == "ucb"
    return [*((name, optimist) for name in collect), (config.eval.controller, False)]


@pytest.mark.parametrize("config", CONFIGS[::3])
def test_who_acts_has_what_travels_and_acts_as_the_agent(config):
    agent, other = Dreamer(config, SHAPES, A), dataclasses.replace(config, seed=9)
    weights = acting_weights(agent)
    policy = Policy(other, SHAPES, A)
    assert policy.state_dict().keys() == weights.keys()
    policy.load_state_dict(weights)
    for controller, explore in played(config):
        shields = [one.make_shield() if config.safety.shield else None for one in (agent, policy)]
        acts = [
            one.act(
                OBS, controller=controller, explore=explore, shield=shield, noise=0.3,
                generator=torch.Generator().manual_seed(0),
            )[0]
            for one, shield in zip((agent, policy), shields, strict=True)
        ]  # fmt: skip
        np.testing.assert_array_equal(*acts)


@pytest.mark.parametrize("config", CONFIGS[1::3])
def test_an_action_hangs_on_all_that_travels(config):
    weights = acting_weights(Dreamer(config, SHAPES, A))

    def acts(lost: str) -> str:
        """What a policy does of which one part is NaN."""
        policy, done = Policy(config, SHAPES, A), []
        policy.load_state_dict(weights)
        for name, x in policy.state_dict().items():
            if lost and f"{name}.".startswith(f"{lost}.") and x.is_floating_point():
                x.fill_(float("nan"))
        for controller, explore in played(config):
            shield = policy.make_shield() if config.safety.shield else None
            generator = torch.Generator().manual_seed(0)
            try:
                action, _ = policy.act(
                    OBS, controller=controller, explore=explore, shield=shield, generator=generator
                )
            except PlanningError as error:
                action = error
            done.append((action, shield and shield.changed))
        return str(done)

    for part in acting_parts(config):
        sent = any(f"{name}.".startswith(f"{part}.") for name in weights)
        if sent and part != "explorer.rounds":  # an integer, which counts under gp-ucb
            assert acts(part) != acts(""), part


def test_the_weights_are_copies():
    agent = Dreamer(preset("tiny"), SHAPES, A)
    state = agent.state_dict()
    for name, value in acting_weights(agent).items():
        assert torch.equal(value, state[name]) and value.data_ptr() != state[name].data_ptr()


def test_too_few_or_too_many_are_an_error():
    config = preset("tiny")
    agent, policy = Dreamer(config, SHAPES, A), Policy(config, SHAPES, A)
    weights = acting_weights(agent)
    lost = sorted(weights)[0]
    with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
        policy.load_state_dict({name: x for name, x in weights.items() if name != lost})
    with pytest.raises(RuntimeError, match="Unexpected key.*actor2"):
        policy.load_state_dict(weights | {"actor2": weights[lost]})
