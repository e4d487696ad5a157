"""Adapters of known peers: torchrl's own classes, and minimal modules shaped like the others."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.adapters import adapt
from fastdreamer.ops.backend import last_backend
from fastdreamer.rollout import MisfitError, StdTransform

A, D, S, E, H, T, B = 2, 12, 3, 5, 12, 6, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stack(*widths, act=nn.ELU):
    layers = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class Queue:
    """Hands out the noise of a peer's random draws, step by step."""

    def __init__(self, monkeypatch, noise):
        self.left = list(noise)
        monkeypatch.setattr(torch, "randn_like", lambda like: self.left.pop(0).to(like))


def same(got, want, model):
    """Values, and the gradients of the model's parameters for the same weighting."""
    grads = []
    for outputs in (got, want):
        model.zero_grad()
        torch.manual_seed(3)
        sum((torch.randn(x.shape) * x).sum() for x in outputs).backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert any(g is not None and g.abs().sum() > 0 for g in grads[0])


# ---------------------------------------------------------------- time-major, lists of beliefs


class TransitionModel(nn.Module):
    def __init__(self, act_fn=F.relu):
        super().__init__()
        self.act_fn, self.min_std_dev = act_fn, 0.1
        self.fc_embed_state_action = nn.Linear(S + A, D)
        self.rnn = nn.GRUCell(D, D)
        self.fc_embed_belief_prior, self.fc_state_prior = nn.Linear(D, H), nn.Linear(H, 2 * S)
        self.fc_embed_belief_posterior = nn.Linear(D + E, H)
        self.fc_state_posterior = nn.Linear(H, 2 * S)

    def dist(self, x):
        mean, std = x.chunk(2, 1)
        std = F.softplus(std) + self.min_std_dev
        return mean, std

    def forward(self, prev_state, actions, prev_belief, observations, nonterminals, noise):
        act, out, state, belief = self.act_fn, [], prev_state, prev_belief
        for t in range(len(actions)):
            state = state if nonterminals is None else state * nonterminals[t]
            hidden = act(self.fc_embed_state_action(torch.cat([state, actions[t]], 1)))
            belief = self.rnn(hidden, belief)
            prior = self.dist(self.fc_state_prior(act(self.fc_embed_belief_prior(belief))))
            dist = prior
            if observations is not None:
                seen = act(self.fc_embed_belief_posterior(torch.cat([belief, observations[t]], 1)))
                dist = self.dist(self.fc_state_posterior(seen))
            state = dist[0] + dist[1] * noise[t]
            out.append((belief, *prior, state, *dist))
        return [torch.stack(x) for x in zip(*out, strict=True)]


class ActorModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.act_fn = F.elu
        self._mean_scale, self._init_std, self._min_std = 5, 5, 1e-4
        self.fc1, self.fc2, self.fc3 = nn.Linear(D + S, H), nn.Linear(H, H), nn.Linear(H, 2 * A)

    def forward(self, belief, state):
        raw_init_std = torch.log(torch.exp(torch.tensor(float(self._init_std))) - 1)
        x = self.act_fn(self.fc2(self.act_fn(self.fc1(torch.cat([belief, state], 1)))))
        mean, std = self.fc3(x).chunk(2, 1)
        mean = self._mean_scale * torch.tanh(mean / self._mean_scale)
        return mean, F.softplus(std + raw_init_std) + self._min_std


@pytest.mark.parametrize("act", [F.relu, F.elu])
def test_transition_model(act):
    model, noise = TransitionModel(act), torch.randn(T, B, S)
    loop, action, embed = adapt(model), torch.randn(T, B, A).tanh(), torch.randn(T, B, E)
    belief, state = torch.randn(B, D).tanh(), torch.randn(B, S)
    ends = torch.ones(T, B, 1)
    ends[2, 1] = 0
    for nonterminals in (None, ends):
        given = (state, action, belief, embed, nonterminals)
        want = model(*given, noise)
        beliefs, _, *prior, states, mean, std = loop(*given, noise=noise)
        same([beliefs, *prior, states, mean, std], want, model)
    want = model(state, action, belief, None, None, noise)
    beliefs, states, *prior = loop(state, action, belief, noise=noise)
    same([beliefs, *prior, states], want[:4], model)
    assert last_backend("observe") == last_backend("open_loop") == "native"
    assert len(loop(state, action, belief, embed)) == 7 and len(loop(state, action, belief)) == 4
    with pytest.raises(MisfitError, match="nonterminals without observations"):
        loop(state, action, belief, None, ends)


def test_imagination_with_a_peer_s_actor():
    model, actor = TransitionModel(F.elu), ActorModel()
    both = nn.ModuleList([model, actor])
    rollout = adapt(model, actor=actor).rollout
    noise, action_noise = torch.randn(T, B, S), torch.randn(T, B, A)
    belief, state = start = torch.randn(B, D).tanh(), torch.randn(B, S)
    dream = rollout.imagine(start, state_noise=noise, action_noise=action_noise)
    beliefs, states = [], []
    for t in range(T):
        mean, std = actor(belief.detach(), state.detach())
        action = torch.tanh(mean + std * action_noise[t])
        out = model(state, action[None], belief, None, None, noise[t : t + 1])
        belief, state = out[0][0], out[3][0]
        beliefs.append(belief)
        states.append(state)
    same(dream[:2], [torch.stack(beliefs), torch.stack(states)], both)


# ---------------------------------------------------------------- action before state


class RSSMState(NamedTuple):
    mean: Tensor
    std: Tensor
    stoch: Tensor
    deter: Tensor


class RSSMTransition(nn.Module):
    def __init__(self):
        super().__init__()
        self._rnn_input_model = nn.Sequential(nn.Linear(A + S, H), nn.ELU())
        self._cell = nn.GRUCell(H, D)
        self._stochastic_prior_model = stack(D, H, 2 * S)

    def forward(self, prev_action, prev_state):
        x = self._rnn_input_model(torch.cat([prev_action, prev_state.stoch], -1))
        deter = self._cell(x, prev_state.deter)
        return draw(self._stochastic_prior_model(deter), deter)


def draw(raw, deter):
    mean, std = raw.chunk(2, -1)
    std = F.softplus(std) + 0.1
    return RSSMState(mean, std, mean + std * torch.randn_like(std), deter)


class RSSMRepresentation(nn.Module):
    def __init__(self, transition):
        super().__init__()
        self._transition_model = transition
        self._stochastic_posterior_model = stack(D + E, H, 2 * S)

    def forward(self, obs_embed, prev_action, prev_state):
        prior = self._transition_model(prev_action, prev_state)
        raw = self._stochastic_posterior_model(torch.cat([prior.deter, obs_embed], -1))
        return prior, draw(raw, prior.deter)


class RSSMRollout(nn.Module):
    def __init__(self):
        super().__init__()
        self.transition_model = RSSMTransition()
        self.representation_model = RSSMRepresentation(self.transition_model)


def test_representation_and_transition(monkeypatch):
    model, noise = RSSMRollout(), torch.randn(T, B, S)
    loop = adapt(model)
    start = RSSMState(*torch.randn(3, B, S), torch.randn(B, D).tanh())
    embed, action = torch.randn(T, B, E), torch.randn(T, B, A).tanh()
    stacked = lambda states: RSSMState(*map(torch.stack, zip(*states, strict=True)))  # noqa: E731
    with monkeypatch.context() as patch:
        Queue(patch, [x for n in noise for x in (torch.zeros(B, S), n)])
        priors, posts, state = [], [], start
        for t in range(T):
            prior, state = model.representation_model(embed[t], action[t], state)
            priors.append(prior)
            posts.append(state)
    prior, post = loop(T, embed, action, start, noise=noise)
    assert isinstance(prior, RSSMState)
    want_prior, want_post = stacked(priors), stacked(posts)
    same([*post, *prior[:2]], [*want_post, *want_prior[:2]], model)
    with monkeypatch.context() as patch:
        Queue(patch, noise)
        states, state = [], start
        for t in range(T):
            state = model.transition_model(action[t], state)
            states.append(state)
    got = loop.rollout_transition(T, action, start, noise=noise)
    same(got, stacked(states), model)


# ---------------------------------------------------------------- batch-first


class GrusaRSSM(nn.Module):
    def __init__(self):
        super().__init__()
        self.grusa = nn.Sequential(nn.Linear(S + A, H), nn.ELU())
        self.gru = nn.GRUCell(H, D)
        self.prior, self.posterior = stack(D, H, 2 * S), stack(D + E, H, 2 * S)
        self.reward = stack(D + S, H, 1)

    def rollout_obs(self, e, a, noise):
        dist = lambda x: (x.chunk(2, -1)[0], F.softplus(x.chunk(2, -1)[1]) + 0.3)  # noqa: E731
        h, s, out = a.new_zeros(len(a), D), a.new_zeros(len(a), S), []
        for t in range(a.shape[1] + 1):
            previous = a[:, t - 1] if t else torch.zeros_like(a[:, 0])
            h = self.gru(self.grusa(torch.cat([s, previous], -1)), h)
            post = dist(self.posterior(torch.cat([h, e[:, t]], -1)))
            s = post[0] + post[1] * noise[:, t]
            out.append((h, s, *dist(self.prior(h)), *post))
        return [torch.stack(x, 1) for x in zip(*out[1:], strict=True)]


def test_grusa():
    model, noise = GrusaRSSM(), torch.randn(B, T + 1, S)
    loop = adapt(model, std=StdTransform(min=0.3))
    e, a = torch.randn(B, T + 1, E), torch.randn(B, T, A).tanh()
    hs, states, priors, posts = loop(e, a, noise=noise)
    want = model.rollout_obs(e, a, noise)
    parts = [
        torch.stack([getattr(d, name) for d in dists], 1)
        for dists in (priors, posts) for name in ("mean", "stddev")
    ]  # fmt: skip
    same([hs, states, *parts], want, model)
    assert "reward" in loop.rollout.nets


# ---------------------------------------------------------------- sheeprl's Dreamer V1


class SheepMLP(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self._model = stack(*widths)

    def forward(self, x):
        return self._model(x)


class RecurrentModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(S + A, D), nn.ELU())
        self.rnn = nn.GRU(D, D)

    def forward(self, x, h):
        return self.rnn(self.mlp(x), h)


class SheepRSSM(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent_model, self.min_std = RecurrentModel(), 0.2
        self.representation_model = SheepMLP(D + E, H, 2 * S)
        self.transition_model = SheepMLP(D, H, 2 * S)

    def dynamic(self, posterior, h, action, embed, noise):
        out, h = self.recurrent_model(torch.cat((posterior, action), -1), h)
        raws = self.transition_model(out), self.representation_model(torch.cat((h, embed), -1))
        (prior_mean, prior_std), (mean, std) = (
            (x.chunk(2, -1)[0], F.softplus(x.chunk(2, -1)[1]) + self.min_std) for x in raws
        )
        return h, mean + std * noise, mean, std, prior_mean, prior_std


class SheepActor(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = SheepMLP(S + D, H, H)
        self.model._model.append(nn.ELU())
        self.mlp_heads = nn.ModuleList([nn.Linear(H, 2 * A)])
        self.init_std, self.min_std, self.distribution = 5.0, 1e-4, "tanh_normal"


def test_sheeprl():
    model, noise = SheepRSSM(), torch.randn(T, B, S)
    loop, action, embed = adapt(model), torch.randn(T, B, A).tanh(), torch.randn(T, B, E)
    h, s = torch.randn(1, B, D).tanh(), torch.randn(1, B, S)
    out, state = [], (s, h)
    for t in range(T):
        step = model.dynamic(*state, action[t][None], embed[t][None], noise[t][None])
        out.append(step)
        state = step[1], step[0]
    want = [torch.cat(x) for x in zip(*out, strict=True)]
    deter, stoch, _, post, prior = loop(s, h, action, embed, noise=noise)
    same([deter, stoch, *post, *prior], want, model)
    rollout = adapt(model, actor=SheepActor(), critic=SheepMLP(S + D, H, 1)).rollout
    assert rollout.options.action_std == StdTransform(offset=5.0, min=1e-4)
    assert rollout.policy.stoch_first and rollout.verify(repeats=1).ok
    discrete = SheepActor()
    discrete.distribution = "discrete"
    with pytest.raises(MisfitError, match="one tanh_normal head fits"):
        adapt(model, actor=discrete)


# ---------------------------------------------------------------- torchrl itself


def torchrl_model(noise=False, **posterior):
    pytest.importorskip("torchrl", reason="the extra torchrl is not installed")
    from tensordict.nn import TensorDictModule
    from torchrl.data import Bounded
    from torchrl.modules import RSSMPosterior, RSSMPrior
    from torchrl.modules import RSSMRollout as Original

    spec = Bounded(-1, 1, (A,))
    prior = RSSMPrior(spec, hidden_dim=D, rnn_hidden_dim=D, state_dim=S, action_dim=A)
    post = RSSMPosterior(hidden_dim=H, state_dim=S, rnn_hidden_dim=D, obs_embed_dim=E, **posterior)
    n = lambda *names: [("next", name) for name in names]  # noqa: E731
    return Original(
        TensorDictModule(
            prior,
            ["state", "belief", "action"],
            [*n("prior_mean", "prior_std"), "_", ("next", "belief")],
        ),
        TensorDictModule(
            post,
            n("belief", "encoded_latents") + (["post_noise"] if noise else []),
            n("posterior_mean", "posterior_std", "state"),
        ),
    )


def torchrl_batch(*batch):
    from tensordict import TensorDict

    return TensorDict(
        {
            "state": torch.randn(*batch, T, S),
            "belief": torch.randn(*batch, T, D).tanh(),
            "action": torch.randn(*batch, T, A).tanh(),
            ("next", "encoded_latents"): torch.randn(*batch, T, E),
            "post_noise": torch.randn(*batch, T, S),
            "reward": torch.randn(*batch, T, 1),
        },
        [*batch, T],
    )


def test_torchrl_rollout():
    model = torchrl_model(noise=True)
    fast, data = adapt(model), torchrl_batch(B)
    before = data.clone()
    want, got = model(data.clone()), fast(data)
    assert (data == before).all() and last_backend("observe") == "native"
    keys = lambda td: sorted(map(str, td.keys(True, True)))  # noqa: E731
    assert keys(got) == keys(want) and got.batch_size == want.batch_size
    names = [k for k in want.keys(True, True) if want[k].requires_grad]
    assert len(names) >= 6
    same([got[k] for k in names], [want[k] for k in names], model)
    for key in want.keys(True, True):
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    assert fast.in_keys == model.in_keys and fast.out_keys == model.out_keys


def test_torchrl_trains_the_same():
    """Their world-model loss for three steps of Adam, once with each rollout."""
    curves = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = torchrl_model(noise=True)
        rollout = adapt(model) if fast else model
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        data, losses = torchrl_batch(B), []
        for _ in range(3):
            out = rollout(data.clone())["next"]
            loss = (out["state"] - data["reward"]).square().mean() + out[
                "prior_mean"
            ].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][2] < curves[0][0]


def test_torchrl_draws_its_noise_without_a_key():
    fast = adapt(torchrl_model())
    torch.manual_seed(1)
    one = fast(torchrl_batch(B))
    torch.manual_seed(1)
    data = torchrl_batch(B)
    assert torch.equal(fast(data)["next", "state"], one["next", "state"])
    assert not torch.equal(fast(data)["next", "state"], one["next", "state"])


def test_torchrl_actor():
    """DreamerActor under TanhNormal: the same actions, and gradients through what it sees."""
    model = torchrl_model()
    from torchrl.modules import DreamerActor
    from torchrl.modules.distributions import TanhNormal

    actor = DreamerActor(out_features=A, depth=2, num_cells=H)
    actor(torch.zeros(1, S), torch.zeros(1, D))  # its layers are lazy
    rollout = adapt(model, actor=actor).rollout
    both, noise = nn.ModuleList([model, actor]), torch.randn(T, B, S)
    action_noise = torch.randn(T, B, A)
    belief, state = start = torch.randn(B, D).tanh(), torch.randn(B, S)
    dream = rollout.imagine(start, state_noise=noise, action_noise=action_noise)
    actions, beliefs = [], []
    for t in range(T):
        dist = TanhNormal(*actor(state, belief), tanh_loc=True)
        action = torch.tanh(dist.loc + dist.scale * action_noise[t])
        _, _, state, belief = model.rssm_prior.module(state, belief, action, noise[t])
        actions.append(action)
        beliefs.append(belief)
    same([dream.action, dream.deter], [torch.stack(actions), torch.stack(beliefs)], both)


def test_torchrl_refusals():
    with pytest.raises(MisfitError, match="rssm_posterior: its std is .*floor=0.5.*the prior's"):
        adapt(torchrl_model(scale_lb=0.5))
    from tensordict.nn import NormalParamExtractor

    model = torchrl_model()
    model.rssm_prior.module.rnn_to_prior_projector[-1] = NormalParamExtractor("relu")
    with pytest.raises(MisfitError, match="rnn_to_prior_projector: scale mapping"):
        adapt(model)


def test_unknown_models_are_refused():
    with pytest.raises(MisfitError, match="Linear is no peer known here.*from_modules"):
        adapt(nn.Linear(2, 2))
    with pytest.raises(MisfitError, match="act_fn: gelu has no fast loop"):
        adapt(TransitionModel(F.gelu))
