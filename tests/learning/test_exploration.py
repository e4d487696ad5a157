"""Optimism: the bound, the ensemble, who maximises it, its schedule and its calibration."""

import dataclasses
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from fastdreamer.acting.exploration import Explorer, beta_at, spread, upper_bound
from fastdreamer.acting.planning import PlanningError
from fastdreamer.analysis.calibration import calibrate, calibrate_episodes, predict_rewards
from fastdreamer.cli import main
from fastdreamer.config import ConfigError, ExploreConfig, SafetyConfig, preset, to_dict
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.learning.exploration import imagine_members, reward_loss
from fastdreamer.nn import MLP, Ensemble
from fastdreamer.ops.backend import last_backend, use_backend
from fastdreamer.ops.cem import cem
from fastdreamer.ops.imagine import predicted_discount
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.layers import MLPParams, mlp
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import State
from fastdreamer.testing import Sizes, cem_inputs
from fastdreamer.training.checkpoint import load_newest
from fastdreamer.training.logger import read_metrics
from fastdreamer.training.pretrained import load
from fastdreamer.training.trainer import Stopped, Trainer, create_run

A, STATE, T, B = 2, 5, 6, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_agent(config="tiny", **explore):
    config = dataclasses.replace(preset("tiny"), explore=ExploreConfig("ucb", **explore))
    if explore.get("at") == "plan":
        collect = dataclasses.replace(config.collect, controller="mpc")
        config = dataclasses.replace(config, collect=collect)
    return Dreamer(config, {"state": (STATE,)}, A)


def make_batch(seed=0):
    g = seeded(seed)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    return {
        "state": torch.randn(T, B, STATE, generator=g),
        "action": torch.rand(T, B, A, generator=g) * 2 - 1,
        "reward": torch.rand(T, B, generator=g),
        "is_first": first,
    }


# ---------------------------------------------------------------- the bound


def test_bound_is_mean_plus_beta_spreads():
    samples = torch.randn(5, 4, 7, dtype=torch.float64, generator=seeded())
    mean, std = samples.mean(0), samples.std(0)
    torch.testing.assert_close(spread(samples), std)
    torch.testing.assert_close(upper_bound(samples, 1.5), mean + 1.5 * std)
    assert torch.equal(upper_bound(samples, 0.0), mean)
    assert torch.autograd.gradcheck(lambda x: upper_bound(x, 1.5), samples.requires_grad_())


def test_gradient_of_agreement_is_finite():
    samples = torch.ones(3, 2, requires_grad=True)
    upper_bound(samples, 2.0).sum().backward()
    torch.testing.assert_close(samples.grad, torch.full((3, 2), 1 / 3))


def test_schedule():
    assert [beta_at(ExploreConfig(beta=1.5), t) for t in (0, 9)] == [1.5, 1.5]
    growing = ExploreConfig(beta=0.5, schedule="gp-ucb", delta=0.1)
    for rounds in (0, 7, 99):
        t = rounds + 1
        want = 0.5 * math.sqrt(2 * math.log(t * t * math.pi**2 / 0.6))
        assert beta_at(growing, rounds) == pytest.approx(want)


# ---------------------------------------------------------------- the ensemble


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_ensemble_is_its_members_one_by_one(layers, lead):
    torch.manual_seed(0)
    heads = Ensemble(3, [4, *[5] * layers, 2], "elu").double()
    x = torch.randn(*lead, 4, dtype=torch.float64, requires_grad=True)
    out = heads(x)
    assert out.shape == (3, *lead, 2)
    for m in range(3):
        weights, biases = ([p[m] for p in ps] for ps in (heads.weights, heads.biases))
        torch.testing.assert_close(out[m], mlp(MLPParams(weights, biases, "elu"), x))
    assert not torch.equal(out[0], out[1])
    heads(x, frozen=True).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in heads.parameters())


def test_each_head_learns_from_its_own_weighting():
    explorer = make_agent().explorer
    feat, reward = torch.randn(T, B, 20, generator=seeded()), torch.rand(T, B)
    weights = torch.ones(5, 1, B)
    weights[2] = 0
    loss = reward_loss(explorer, feat.requires_grad_(), reward, weights)
    error = (explorer.rewards(feat)[..., 0] - reward).square()
    torch.testing.assert_close(loss, error.mean((1, 2))[[0, 1, 3, 4]].sum())
    loss.backward()
    assert feat.grad is None
    norms = explorer.rewards.weights[0].grad.flatten(1).norm(dim=1)
    assert norms[2] == 0 and (norms[[0, 1, 3, 4]] > 0).all()


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("critics", [False, True])
def test_every_member_has_its_own_lambda_return(critics, ends):
    agent = make_agent(critics=critics)
    head = MLP([20, 8, 1], "elu").params() if ends else None
    explorer, H = agent.explorer, 4
    feat = torch.randn(H, B, 20, generator=seeded())
    value = torch.randn(H, B, generator=seeded(1))
    behavior = agent.config.behavior
    going = predicted_discount(head, behavior.gamma, feat)
    got = explorer.member_returns(feat, None if critics else value, going)
    for m in range(5):
        reward = explorer.rewards(feat)[m, ..., 0]
        own = explorer.critics(feat)[m, ..., 0] if critics else value
        discount = torch.full((H, B), behavior.gamma)
        if ends:
            discount = discount * torch.sigmoid(mlp(head, feat)[..., 0])
        want = lambda_return(reward, own, discount, behavior.lam, backend="eager")
        torch.testing.assert_close(got[m], want)


# ---------------------------------------------------------------- two arms


def two_armed(beta, at="actor", *, ends=False, **behavior):
    """A world of one decision: an action is remembered, a negative one surely pays 0.5, a positive
    one 0.4 in the mean, on which three heads disagree by ±0.5.

    ends: it also has a continuation head, yet to be told what to say, and an ensemble of critics.
    """
    config = dataclasses.replace(
        preset("tiny"),
        model=dataclasses.replace(
            preset("tiny").model,
            deter=1,
            stoch=1,
            hidden=2,
            units=2,
            reward_layers=1,
            activation="relu",
            min_std=1e-6,
            discount=ends,
        ),
        behavior=dataclasses.replace(
            preset("tiny").behavior, imag_horizon=1, actor_layers=0, critic_layers=0, **behavior
        ),
        plan=dataclasses.replace(
            preset("tiny").plan, plan_horizon=1, num_samples=64, num_elites=8, iterations=8
        ),
        collect=dataclasses.replace(preset("tiny").collect, controller="mpc"),
        explore=ExploreConfig("ucb", at=at, heads=3, beta=beta, critics=ends),
    )
    agent = Dreamer(config, {"state": (STATE,)}, 1)
    explorer, rssm = agent.explorer, agent.model.rssm
    with torch.no_grad():
        for parameter in [*rssm.parameters(), *agent.model.reward.parameters()]:
            parameter.zero_()
        for parameter in [*agent.critic.parameters(), *agent.actor.parameters()]:
            parameter.zero_()
        rssm.inp.layers[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))  # ±action
        rssm.gru.weight_ih[2] = torch.tensor([1.0, -1.0])
        rssm.gru.bias_ih[1] = -30  # the update gate: all new, deter = tanh(action)
        rssm.prior.layers[1].bias[1] = -30  # no noise to speak of
        arms = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # relu(±deter)
        for head in (explorer.rewards.weights[0], agent.model.reward.layers[0].weight[None]):
            head.copy_(arms)
        for bias in explorer.rewards.biases:
            bias.zero_()
        explorer.rewards.weights[1].copy_(torch.tensor([[[-0.1, 0.5]], [[0.4, 0.5]], [[0.9, 0.5]]]))
        agent.model.reward.layers[1].weight.copy_(torch.tensor([[0.4, 0.5]]))
        for actor in (agent.actor, explorer.actor):
            if actor is not None:
                for parameter in actor.parameters():
                    parameter.zero_()
    return agent


@pytest.mark.parametrize(("beta", "arm"), [(1.0, 1), (0.0, -1)])
def test_the_planner_prefers_the_uncertain_arm_if_it_is_an_optimist(beta, arm):
    agent = two_armed(beta, at="plan")
    start = State(torch.zeros(4, 1), torch.zeros(4, 1))
    for controller in ("mpc", "planet"):
        action, _ = agent.plan(start, controller, explore=True, generator=seeded())
        assert (arm * action > 0.9).all()
        action, _ = agent.plan(start, controller, generator=seeded())  # greedy: the mean
        assert (action < -0.9).all()


def test_an_optimist_s_plan_of_nothing_but_nan_names_the_rows_of_the_caller():
    """Also where every row, which has a generator of its own, is planned by itself."""
    agent = two_armed(1.0, at="plan")
    start = State(torch.zeros(4, 1), torch.zeros(4, 1))
    start.deter[[1, 3]] = torch.nan
    for generator in (seeded(), [seeded(i) for i in range(4)]):
        with pytest.raises(PlanningError, match=r"NaN in environments \[1, 3\] of 4"):
            agent.plan(start, explore=True, generator=generator)


@pytest.mark.parametrize(("beta", "arm"), [(1.0, 1), (0.0, -1)])
def test_the_actor_prefers_the_uncertain_arm_if_it_is_an_optimist(beta, arm):
    agent = two_armed(beta)
    explorer, g = agent.explorer, seeded()
    optimizer = torch.optim.Adam(explorer.actor.parameters(), lr=0.05)
    start = State(torch.zeros(256, 1), torch.zeros(256, 1))
    rssm, critic = agent.model.rssm.params().detach(), agent.critic.params().detach()
    for _ in range(80):
        noise = torch.zeros(1, 256, 1), torch.randn(1, 256, 1, generator=g)
        imagined = imagine_members(explorer, rssm, explorer.actor.params(), start, noise, critic)
        returns = imagined[1]
        loss = -upper_bound(returns, explorer.beta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = torch.tanh(explorer.actor(torch.zeros(1, 2)).mean)
    assert arm * mean.item() > 0.5
    obs = np.zeros(STATE, np.float32)
    explored, _ = agent.act(obs, explore=True, generator=seeded())
    greedy, _ = agent.act(obs, generator=seeded())
    assert arm * explored[0] > 0.5 and greedy[0] == 0  # the greedy actor was not touched


@pytest.mark.parametrize("discounted", [False, True])
def test_the_optimist_s_losses_weigh_how_far_it_would_come_itself(discounted):
    """The greedy actor always goes left, where few episodes go on, the optimist right."""
    agent = two_armed(0.0, ends=True, discount_weights=discounted)
    explorer, H, reward, value = agent.explorer, 3, 1.0, 2.0
    goes_on = {1: 0.9, -1: 0.2}  # right and left
    with torch.no_grad():
        for actor, side in ((agent.actor, -1), (explorer.actor, 1)):
            actor.mlp.layers[-1].bias[0] = side
        first = torch.tensor(agent.actor(torch.zeros(1, 2)).mean.item())
        place = abs(torch.tanh(torch.tanh(first)).item())  # ±, where an action without noise leads
        for heads, says in ((explorer.rewards, reward), (explorer.critics, value)):
            for parameter in heads.parameters():
                parameter.zero_()
            heads.biases[-1].fill_(says)
        for parameter in agent.model.discount.parameters():
            parameter.zero_()
        inner, outer = agent.model.discount.layers
        inner.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # relu(±place)
        odds = [math.log(p / (1 - p)) / place for p in goes_on.values()]
        outer.weight.copy_(torch.tensor([odds]))
    start = State(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))  # two, and the second is an end
    noise = torch.zeros(H, 2, 1), torch.zeros(H, 2, 1)
    dream = agent.behavior.imagine(start, {"terminated": torch.tensor([[False, True]])}, noise)
    found = agent.optimist.losses(torch.zeros(1, 2, 2), torch.zeros(1, 2), dream, seeded())

    behavior = agent.config.behavior
    per_step = behavior.gamma if discounted else 1.0
    left = [(per_step * goes_on[-1]) ** t for t in range(H)]
    torch.testing.assert_close(dream.weights, torch.tensor([[w, 0.0] for w in left]))
    weights = [(per_step * goes_on[1]) ** t for t in range(H)]
    factor, total, returns = behavior.gamma * goes_on[1], value, []
    for _ in range(H):
        total = reward + factor * ((1 - behavior.lam) * value + behavior.lam * total)
        returns.insert(0, total)
    pairs = list(zip(weights, returns, strict=True))
    want = -sum(w * g for w, g in pairs) / (2 * H)
    assert found.named["explorer"].item() == pytest.approx(want, rel=1e-5)
    want = 3 * sum(w * (value - g) ** 2 for w, g in pairs) / (2 * H)  # of three critics
    got = found.named["critics"].item() / behavior.value_scale
    assert got == pytest.approx(want, rel=1e-5)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("explore", [{}, {"critics": True}, {"at": "plan"}])
def test_what_is_not_optimism_learns_as_ever(explore):
    """Model, actor and critic of an agent with an explorer are those of one without, bit by bit."""
    agent = make_agent(**explore)
    plain_config = dataclasses.replace(agent.config, explore=ExploreConfig())
    plain = Dreamer(plain_config, {"state": (STATE,)}, A)
    assert set(plain.make_optimizers()) == {"model", "actor", "critic"}
    for one in (agent, plain):
        one.update(make_batch(), one.make_optimizers(), seeded(1))
    ours, theirs = agent.state_dict(), plain.state_dict()
    assert not any(name.startswith("explorer") for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_update_moves_every_part_and_reports_it():
    agent = make_agent(critics=True, schedule="gp-ucb")
    optimizers = agent.make_optimizers()
    before = {k: v.clone() for k, v in agent.explorer.state_dict().items()}
    metrics = agent.update(make_batch(), optimizers, seeded())
    after = agent.explorer.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {name.split(".")[0] for name in moved} == {"rewards", "critics", "actor"}
    assert metrics["explore_beta"] == pytest.approx(beta_at(agent.config.explore, 0))
    assert metrics["explore_spread"] > 0 and "explorer_grad_norm" in metrics
    owned = [p for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in agent.parameters() if p.requires_grad}


def test_both_actors_are_kept_uncertain():
    """Each loss falls by the scaled entropy of that actor's own actions; nothing else changes."""
    found = []
    for entropy in (0.0, 0.5, 1.0):
        behavior = dataclasses.replace(preset("tiny").behavior, entropy=entropy)
        config = dataclasses.replace(make_agent().config, behavior=behavior)
        agent = Dreamer(config, {"state": (STATE,)}, A)
        with torch.no_grad():  # unlike the other actor, and narrow
            agent.explorer.actor.mlp.layers[-1].bias[A:] = -5.0
        found.append(agent.update(make_batch(), agent.make_optimizers(), seeded()))
    without, half, all_of_it = found
    for name in ("actor_loss", "explorer_loss"):
        by_half, by_one = half[name] - without[name], all_of_it[name] - without[name]
        assert by_one != 0 and by_half == pytest.approx(by_one / 2, rel=1e-4), name
    assert all_of_it["explorer_loss"] != pytest.approx(all_of_it["actor_loss"], rel=1e-2)
    same = [name for name in without if without[name] == half[name]]
    assert {"model_loss", "critic_loss", "rewards_loss", "explore_return"} <= set(same)


def test_target_critics_follow_when_told():
    config = preset("tiny")
    behavior = dataclasses.replace(config.behavior, target_every=3)
    config = dataclasses.replace(
        config, behavior=behavior, explore=ExploreConfig("ucb", critics=True)
    )
    agent = Dreamer(config, {"state": (STATE,)}, A)
    agent.update(make_batch(), agent.make_optimizers(), seeded())
    ours, target = agent.explorer.critics, agent.explorer.target_critics
    assert not torch.equal(ours.weights[0], target.weights[0])
    agent.update_target()
    assert torch.equal(ours.weights[0], target.weights[0])
    assert not any(p.requires_grad for p in target.parameters())


def test_the_exploring_actor_is_who_is_sampled():
    agent, obs = make_agent(), np.ones((50, STATE), np.float32)
    act = lambda **how: agent.act(obs, generator=seeded(), **how)  # noqa: E731
    sampled, state = act(explore=True, sample=True)
    g = seeded()
    torch.randn(50, 4, generator=g)  # the posterior sample
    feat = torch.cat([state.deter, state.stoch], -1)
    with torch.no_grad():
        want = torch.tanh(agent.explorer.actor(feat).sample(torch.randn(50, A, generator=g)))
    np.testing.assert_allclose(sampled, want.numpy(), rtol=1e-5, atol=1e-6)
    assert (act(sample=True)[0] != sampled).any(-1).all()


def test_no_explorer_no_exploration():
    agent = Dreamer(preset("tiny"), {"state": (STATE,)}, A)
    with pytest.raises(ConfigError, match="no explorer"):
        agent.act(np.zeros(STATE, np.float32), explore=True)


@pytest.mark.parametrize(
    ("explore", "other", "says"),
    [
        ({"heads": 1}, {}, "explore.heads must be >= 2, got 1"),
        ({"beta": -1.0}, {}, "explore.beta must be >= 0"),
        ({"delta": 1.0}, {}, "explore.delta must be between 0 and 1"),
        ({"units": 0}, {}, "explore.units must be none or > 0"),
        ({"at": "plan"}, {}, "where no planner collects"),
        ({}, {"agent": "planet"}, "explore.at must be 'plan' for planet"),
        ({"at": "plan", "critics": True}, {"agent": "planet"}, "explore.critics must be false"),
        (
            {},
            {"behavior": dataclasses.replace(preset("tiny").behavior, pairing="departure")},
            "behavior.pairing must be 'arrival' with explore, got 'departure'",
        ),
    ],
)
def test_bad_settings_are_named(explore, other, says):
    config = dataclasses.replace(preset("tiny"), explore=ExploreConfig("ucb", **explore), **other)
    with pytest.raises(ConfigError, match=says):
        config.validate()
    assert to_dict(preset("tiny"))["explore"]["method"] == "none"


# ---------------------------------------------------------------- cem by any score


def test_cem_ranks_by_a_function_as_by_its_name():
    given = cem_inputs(Sizes(2, 3, 2, 4, 5, 7, 1, 2, 1, "elu"), 4, 3, 6, 3) | {"num_elites": 2}

    def summed(feat):
        return mlp(given["returns"].reward, feat).squeeze(-1).sum(0)

    want = cem(**given | {"score": "reward"}, backend="eager")
    got = cem(**given | {"score": summed}, backend="eager")
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with use_backend("native"):
        native = cem(**given | {"score": summed})
    assert last_backend("open_loop") == "native"
    torch.testing.assert_close(native.mean, want.mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="or a function, got 'best'"):
        cem(**given | {"score": "best"})


# ---------------------------------------------------------------- calibration


def test_normal_errors_of_the_stated_spread_are_calibrated():
    g = seeded()
    samples = torch.randn(400, 4000, generator=g)  # mean ≈ 0, spread ≈ 1
    true = torch.randn(4000, generator=g)
    good = calibrate(2, samples, true)
    assert (good.ahead, good.count) == (2, 4000)
    for level, share in good.coverage.items():
        assert abs(share - level) < 0.03
    assert good.scale == pytest.approx(1, abs=0.05) and good.rmse == pytest.approx(1, abs=0.05)
    sure = calibrate(0, samples / 10, true)
    assert sure.coverage[0.9] < 0.2 and sure.scale == pytest.approx(10, rel=0.05)


def test_rewards_ahead_are_predicted_under_the_actions_taken():
    agent, g = make_agent(), seeded()
    rssm, heads = agent.model.rssm.params(), agent.explorer.rewards
    states = State(torch.randn(T, 16, generator=g), torch.randn(T, 4, generator=g))
    action, noise = torch.rand(T, A, generator=g), torch.randn(2, T - 2, 4, generator=g)
    got = predict_rewards(rssm, heads, states, action, noise)
    for t in range(T - 2):
        start = State(states.deter[t : t + 1], states.stoch[t : t + 1])
        end = open_loop(rssm, start, action[t + 1 : t + 3, None], noise[:, t : t + 1])
        want = heads(torch.cat([end.deter[-1], end.stoch[-1]], -1))[:, 0, 0]
        torch.testing.assert_close(got[:, t], want.detach(), rtol=1e-4, atol=1e-5)
    now = predict_rewards(rssm, heads, states, action, noise[:0].new_empty(0, T, 4))
    torch.testing.assert_close(now, heads(states.feat)[..., 0].detach())
    with pytest.raises(ValueError, match="6 decisions ahead in an episode of 6 steps"):
        predict_rewards(rssm, heads, states, action, noise.new_empty(6, 0, 4))


def test_episodes_are_calibrated_without_their_reset():
    agent, r = make_agent(), np.random.default_rng(0)
    episodes = [
        {
            "state": r.normal(size=(n, STATE)).astype(np.float32),
            "action": r.uniform(-1, 1, (n, A)).astype(np.float32),
            "reward": np.full(n, np.float32(n)),
        }
        for n in (7, 9)
    ]
    rows = calibrate_episodes(agent.model, agent.explorer.rewards, episodes, [0, 1, 3], seeded())
    assert [(row.ahead, row.count) for row in rows] == [(0, 14), (1, 14), (3, 10)]
    assert all(row.coverage[0.95] < 0.5 and row.rmse > 5 for row in rows)
    # One that ended early has no rewards so far ahead, and there may be none that has.
    episodes.append({name: array[:2] for name, array in episodes[0].items()})
    rows = calibrate_episodes(agent.model, agent.explorer.rewards, episodes, [0, 1, 3, 9], seeded())
    assert [(row.ahead, row.count) for row in rows] == [(0, 15), (1, 15), (3, 10)]


def test_explorer_counts_its_rounds_in_its_state():
    agent = make_agent(schedule="gp-ucb")
    first = agent.explorer.beta
    agent.explorer.rounds += 9
    assert isinstance(agent.explorer, Explorer) and agent.explorer.beta > first
    twin = make_agent(schedule="gp-ucb")
    twin.load_state_dict(agent.state_dict())
    assert twin.explorer.beta == agent.explorer.beta


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize(
    ("agent", "controller", "at", "optimists"),
    [
        ("dreamer", "mixed", "plan", 1),  # of the episodes 2, 3 and 4 the planner plays one
        ("dreamer", "mixed", "actor", 3),
        ("planet", "auto", "plan", 3),
    ],
)
def test_rounds_are_the_optimist_s_episodes(tmp_path, agent, controller, at, optimists):
    few = {"frames": 40, "replay_ratio": 2.0}
    changes = {"agent": agent, "collect": {"controller": controller}, "env": {"time_limit": 0.2}}
    changes |= {"explore": {"method": "ucb", "at": at}, "eval": {"every": 0}, "train": few}
    create_run(tmp_path / "run", preset("tiny", changes))
    Trainer(tmp_path / "run").train()
    assert load(tmp_path / "run").explorer.rounds == optimists


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """With explorer, guard and a collecting shield, weights and metrics are the same."""
    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny,
        explore=ExploreConfig("ucb", critics=True, schedule="gp-ucb"),
        safety=SafetyConfig("walker", shield=True, multiplier_lr=0.5),
        behavior=dataclasses.replace(tiny.behavior, target_every=7),
        train=dataclasses.replace(tiny.train, frames=200, checkpoint_every=8),
    )
    runs = [tmp_path / "straight", tmp_path / "stopped"]
    for run in runs:
        create_run(run, config)
    Trainer(runs[0]).train()

    update, calls = Dreamer.update, []

    def signalled(*args, **kwargs):
        calls.append(args)
        if len(calls) == 31:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    monkeypatch.setattr(Dreamer, "update", signalled)
    with pytest.raises(Stopped):
        Trainer(runs[1]).train()
    Trainer(runs[1]).train()

    (_, straight, said), (_, resumed, _) = (load_newest(run / "checkpoints") for run in runs)
    assert straight.keys() == resumed.keys() and said["cursor"]["update"] == 60
    assert {"agent/explorer.rounds", "agent/guard.multiplier"} <= straight.keys()
    assert any(name.startswith("explorer_optimizer/") for name in straight)
    assert any(name.startswith("barrier_optimizer/") for name in straight)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert straight["agent/explorer.rounds"] == 3  # two of five episodes were random
    lines = [read_metrics(run) for run in runs]
    for one, other in zip(*lines, strict=True):
        clocks = ("seconds", "updates_per_s", "wait_collector_s", "wait_learner_s")
        assert {k: v for k, v in one.items() if k not in clocks} == {
            k: v for k, v in other.items() if k not in clocks
        }
    collected = [line for line in lines[0] if line["kind"] == "episode"]
    assert all("violations" in line for line in collected)
    assert ["shield_changed" in line for line in collected] == [False, False, True, True, True]

    # What the run leaves is what the commands read.
    agent = load(runs[0])
    assert agent.explorer.rounds == 3 and agent.make_shield().decisions == 0
    out = tmp_path / "calibration"
    argv = ["eval", str(runs[0]), "--episodes", "2", "--calibration", str(out)]
    assert main([*argv, "--shield", "--safety.max-joint-speed", "5"]) == 0
    rows = (out / "calibration.csv").read_text().splitlines()
    assert rows[0].startswith("ahead,count,rmse,spread,scale,coverage_50") and len(rows) == 5
    assert (out / "calibration.png").stat().st_size > 0
    monkeypatch.setattr(Dreamer, "act", None)  # before an episode is played for it
    assert main([*argv[:-1], str(out / "calibration.csv")]) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--shield"], "has no barrier; train one with --safety"),
        (["--calibration", "out"], "has no reward heads; train some with --explore ucb"),
        (["--safety", "nowhere:f"], "cannot be loaded"),
        (["--safety", "height"], "safety.signal must be none, walker or module:function"),
    ],
)
def test_what_an_agent_has_not_learned_is_not_evaluated(argv, says, plain_run, capsys):
    assert main(["eval", str(plain_run), "--episodes", "1", *argv]) == 1
    assert says in " ".join(capsys.readouterr().err.split())


def test_violations_of_any_agent_that_sees_the_state_are_counted(plain_run, capsys):
    assert main(["eval", str(plain_run), "--episodes", "1", "--safety", "walker"]) == 0
    assert "violations: " in capsys.readouterr().out


def test_a_run_may_be_given_an_explorer_and_a_guard_once(plain_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    before = load(run).state_dict()
    added = ["--explore", "ucb", "--safety", "walker", "--train.frames", "160"]
    assert main(["train", "--resume", str(run), *added]) == 0
    agent = load(run)
    assert agent.explorer.rounds == 1 and agent.make_shield().decisions == 0
    assert before.keys() < agent.state_dict().keys()
    capsys.readouterr()
    kept = (run / "config.json").read_bytes()
    for change in (["--explore.heads", "3"], ["--safety.layers", "1"], ["--safety", "none"]):
        assert main(["train", "--resume", str(run), *change]) == 1
        assert "fixed when a run starts" in " ".join(capsys.readouterr().err.split())
    assert (run / "config.json").read_bytes() == kept
    changed = ["--explore.beta", "3", "--safety.alpha", "0.5", "--collect.noise", "0.1"]
    assert main(["train", "--resume", str(run), *changed, "--train.frames", "200"]) == 0


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A finished run with neither explorer nor guard, from before there were such settings."""
    run = tmp_path_factory.mktemp("runs") / "plain"
    config = preset("tiny")
    train = dataclasses.replace(config.train, frames=120)
    create_run(run, dataclasses.replace(config, train=train))
    Trainer(run).train()
    settings = json.loads((run / "config.json").read_text())
    del settings["explore"], settings["safety"]
    (run / "config.json").write_text(json.dumps(settings))
    return run
