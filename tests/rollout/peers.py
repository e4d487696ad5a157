"""Minimal world models in the attribute styles of public Dreamers, their loops as these have them.

Written for the tests: sizes are small, and nothing is there that a loop does not need.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

A, D, S, E, H = 2, 12, 3, 5, 12


def stack(*widths, act=nn.ELU):
    """With one activation in all places, as some have it."""
    layers, act = [], act()
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), act]
    return nn.Sequential(*layers[:-1])


def gaussian(raw, least=0.1):
    mean, std = raw.chunk(2, -1)
    std = F.softplus(std) + least
    return mean, std, mean + std * torch.randn_like(std)


# ---------------------------------------------------------------- time-major, lists of beliefs


class TransitionModel(nn.Module):
    """Kaixhin's PlaNet and yusukeurakami's Dreamer; with ``lag`` zhaoyi11's."""

    def __init__(self, act_fn=F.relu, lag=False):
        super().__init__()
        self.act_fn, self.min_std_dev, self.lag = act_fn, 0.1, lag
        self.fc_embed_state_action = nn.Linear(S + A, D)
        self.rnn = nn.GRUCell(D, D)
        self.fc_embed_belief_prior, self.fc_state_prior = nn.Linear(D, H), nn.Linear(H, 2 * S)
        self.fc_embed_belief_posterior = nn.Linear(D + E, H)
        self.fc_state_posterior = nn.Linear(H, 2 * S)
        self.modules = [self.fc_embed_state_action, self.rnn]

    def forward(self, prev_state, actions, prev_belief, observations=None, nonterminals=None):
        act, priors, posts, state, belief = self.act_fn, [], [], prev_state, prev_belief
        for t in range(len(actions)):
            if nonterminals is not None and not (self.lag and t == 0):
                state = state * nonterminals[t - 1 if self.lag else t]
            hidden = act(self.fc_embed_state_action(torch.cat([state, actions[t]], 1)))
            belief = self.rnn(hidden, belief)
            raw = self.fc_state_prior(act(self.fc_embed_belief_prior(belief)))
            mean, std, state = gaussian(raw, self.min_std_dev)
            priors.append((belief, state, mean, std))
            if observations is not None:
                seen = act(self.fc_embed_belief_posterior(torch.cat([belief, observations[t]], 1)))
                mean, std, state = gaussian(self.fc_state_posterior(seen), self.min_std_dev)
                posts.append((state, mean, std))
        both = [*zip(*priors, strict=True), *zip(*posts, strict=True)]
        return [torch.stack(x) for x in both]


class ScriptedTransition(torch.jit.ScriptModule):
    """The same scripted, as both publish it."""

    __constants__ = ["min_std_dev"]

    def __init__(self):
        super().__init__()
        self.act_fn, self.min_std_dev = F.relu, 0.1
        self.fc_embed_state_action = nn.Linear(S + A, D)
        self.rnn = nn.GRUCell(D, D)
        self.fc_embed_belief_prior, self.fc_state_prior = nn.Linear(D, H), nn.Linear(H, 2 * S)
        self.fc_embed_belief_posterior = nn.Linear(D + E, H)
        self.fc_state_posterior = nn.Linear(H, 2 * S)
        self.modules = [self.fc_embed_state_action, self.rnn]

    @torch.jit.script_method
    def forward(
        self,
        prev_state: Tensor,
        actions: Tensor,
        prev_belief: Tensor,
        observations: Tensor | None = None,
        nonterminals: Tensor | None = None,
    ) -> list[Tensor]:
        beliefs, priors, means, stds = [prev_belief], [prev_state], [prev_state], [prev_state]
        states, post_means, post_stds = [prev_state], [prev_state], [prev_state]
        for t in range(actions.size(0)):
            state = priors[-1] if observations is None else states[-1]
            state = state if nonterminals is None else state * nonterminals[t]
            x = self.act_fn(self.fc_embed_state_action(torch.cat([state, actions[t]], dim=1)))
            beliefs.append(self.rnn(x, beliefs[-1]))
            x = self.act_fn(self.fc_embed_belief_prior(beliefs[-1]))
            mean, std = torch.chunk(self.fc_state_prior(x), 2, dim=1)
            means.append(mean)
            stds.append(F.softplus(std) + self.min_std_dev)
            priors.append(means[-1] + stds[-1] * torch.randn_like(mean))
            if observations is not None:
                x = torch.cat([beliefs[-1], observations[t]], dim=1)
                x = self.act_fn(self.fc_embed_belief_posterior(x))
                mean, std = torch.chunk(self.fc_state_posterior(x), 2, dim=1)
                post_means.append(mean)
                post_stds.append(F.softplus(std) + self.min_std_dev)
                states.append(post_means[-1] + post_stds[-1] * torch.randn_like(mean))
        out = [torch.stack(x[1:]) for x in [beliefs, priors, means, stds]]
        if observations is not None:
            out += [torch.stack(x[1:]) for x in [states, post_means, post_stds]]
        return out


class ActorModel(nn.Module):
    """``fc1`` to ``fcN``; yusukeurakami's returns mean and std, zhaoyi11's an action."""

    def __init__(self, samples=False, underscore="_", mean_scale=5.0):
        super().__init__()
        self.act_fn, self.samples = F.elu, samples
        for name, value in [("mean_scale", mean_scale), ("init_std", 5), ("min_std", 1e-4)]:
            setattr(self, underscore + name, value)
        self.constants = mean_scale, math.log(math.expm1(5)), 1e-4
        self.fc1, self.fc2, self.fc3 = nn.Linear(D + S, H), nn.Linear(H, H), nn.Linear(H, 2 * A)

    def forward(self, belief, state):
        scale, offset, least = self.constants
        x = self.act_fn(self.fc2(self.act_fn(self.fc1(torch.cat([belief, state], 1)))))
        mean, std = self.fc3(x).chunk(2, 1)
        mean, std = scale * torch.tanh(mean / scale), F.softplus(std + offset) + least
        if not self.samples:
            return mean, std
        normal, tanh = torch.distributions.Normal(mean, std), torch.distributions.TanhTransform()
        return torch.distributions.TransformedDistribution(normal, [tanh]).rsample(), None


class ScriptedActor(torch.jit.ScriptModule):
    """yusukeurakami's, scripted as the rest of it."""

    def __init__(self):
        super().__init__()
        self.act_fn = F.elu
        self._mean_scale, self._init_std, self._min_std = 5, 5, 1e-4
        self.fc1, self.fc2, self.fc3 = nn.Linear(D + S, H), nn.Linear(H, H), nn.Linear(H, 2 * A)

    @torch.jit.script_method
    def forward(self, belief: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        raw_init_std = torch.log(torch.exp(self._init_std) - 1)
        x = self.act_fn(self.fc1(torch.cat([belief, state], dim=1)))
        mean, std = torch.chunk(self.fc3(self.act_fn(self.fc2(x))), 2, dim=1)
        mean = self._mean_scale * torch.tanh(mean / self._mean_scale)
        return mean, F.softplus(std + raw_init_std) + self._min_std


class ScalarModel(nn.Module):
    """A reward or value model of the same repositories."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.act_fn, self.factor = F.relu, factor
        self.fc1, self.fc2 = nn.Linear(D + S, H), nn.Linear(H, 1)

    def forward(self, belief, state):
        hidden = self.act_fn(self.fc1(torch.cat([belief, state], 1)))
        return self.factor * self.fc2(hidden).squeeze(1)


# ---------------------------------------------------------------- states with nonterms


class NontermsRSSM(nn.Module):
    """adityabingi's."""

    def __init__(self):
        super().__init__()
        self.act_fn = nn.ELU()
        self.rnn = nn.GRUCell(D, D)
        self.fc_state_action = nn.Linear(S + A, D)
        self.fc_embed_prior, self.fc_state_prior = nn.Linear(D, H), nn.Linear(H, 2 * S)
        self.fc_embed_posterior = nn.Linear(E + D, H)
        self.fc_state_posterior = nn.Linear(H, 2 * S)

    def observe_rollout(self, obs_embed, actions, nonterms, prev_state, horizon):
        act, state, out = self.act_fn, prev_state, ([], [])
        for t in range(horizon):
            x = torch.cat([state["stoch"] * nonterms[t], actions[t] * nonterms[t]], -1)
            deter = self.rnn(act(self.fc_state_action(x)), state["deter"] * nonterms[t])
            x = torch.cat([obs_embed[t], deter], -1)
            raws = (
                self.fc_state_prior(act(self.fc_embed_prior(deter))),
                self.fc_state_posterior(act(self.fc_embed_posterior(x))),
            )
            for raw, states in zip(raws, out, strict=True):
                mean, std, stoch = gaussian(raw)
                state = {"mean": mean, "std": std, "stoch": stoch, "deter": deter}
                states.append(state)
        return tuple({k: torch.stack([s[k] for s in x]) for k in x[0]} for x in out)


class ActionDecoder(nn.Module):
    """juliusfrost's and adityabingi's policies, of joined features."""

    def __init__(self, **attributes):
        super().__init__()
        self.action_model = stack(S + D, H, 2 * A)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, features):
        mean, std = self.action_model(features).chunk(2, -1)
        std = F.softplus(std + math.log(math.expm1(3.0))) + 0.01
        normal, tanh = (
            torch.distributions.Normal(2 * torch.tanh(mean / 2), std),
            torch.distributions,
        )
        return tanh.TransformedDistribution(normal, [tanh.TanhTransform()]).rsample()


# ---------------------------------------------------------------- action before state


class RSSMState(NamedTuple):
    mean: Tensor
    std: Tensor
    stoch: Tensor
    deter: Tensor


def stacked(states):
    return RSSMState(*map(torch.stack, zip(*states, strict=True)))


class RSSMTransition(nn.Module):
    def __init__(self):
        super().__init__()
        self._rnn_input_model = nn.Sequential(nn.Linear(A + S, H), nn.ELU())
        self._cell = nn.GRUCell(H, D)
        self._stochastic_prior_model = stack(D, H, 2 * S)

    def initial_state(self, batch_size):
        return RSSMState(*(torch.zeros(batch_size, n) for n in (S, S, S, D)))

    def forward(self, prev_action, prev_state):
        x = self._rnn_input_model(torch.cat([prev_action, prev_state.stoch], -1))
        deter = self._cell(x, prev_state.deter)
        return RSSMState(*gaussian(self._stochastic_prior_model(deter)), deter)


class RSSMRepresentation(nn.Module):
    def __init__(self, transition):
        super().__init__()
        self._transition_model = transition
        self._stochastic_posterior_model = stack(D + E, H, 2 * S)

    def forward(self, obs_embed, prev_action, prev_state):
        prior = self._transition_model(prev_action, prev_state)
        raw = self._stochastic_posterior_model(torch.cat([prior.deter, obs_embed], -1))
        return prior, RSSMState(*gaussian(raw), prior.deter)


class RSSMRollout(nn.Module):
    """juliusfrost's."""

    def __init__(self):
        super().__init__()
        self.transition_model = RSSMTransition()
        self.representation_model = RSSMRepresentation(self.transition_model)

    def forward(self, *args):
        return self.rollout_representation(*args)

    def rollout_representation(self, steps, obs_embed, action, prev_state):
        priors, posts, state = [], [], prev_state
        for t in range(steps):
            prior, state = self.representation_model(obs_embed[t], action[t], state)
            priors.append(prior)
            posts.append(state)
        return stacked(priors), stacked(posts)

    def rollout_transition(self, steps, action, prev_state):
        states, state = [], prev_state
        for t in range(steps):
            state = self.transition_model(action[t], state)
            states.append(state)
        return stacked(states)


# ---------------------------------------------------------------- batch-first


class GrusaRSSM(nn.Module):
    """bstars', whose least std is a constant of another module."""

    def __init__(self, least=0.3):
        super().__init__()
        self.grusa = nn.Sequential(nn.Linear(S + A, H), nn.ELU())
        self.gru = nn.GRUCell(H, D)
        self.prior, self.posterior = stack(D, H, 2 * S), stack(D + E, H, 2 * S)
        self.reward = stack(D + S, H, 1)
        self.hidden_least = lambda: least  # no number to be read

    def rollout_obs(self, e, a):
        normal, least = torch.distributions.Normal, self.hidden_least()
        h, s, out = a.new_zeros(len(a), D), a.new_zeros(len(a), S), []
        for t in range(a.shape[1] + 1):
            previous = a[:, t - 1] if t else torch.zeros_like(a[:, 0])
            h = self.gru(self.grusa(torch.cat([s, previous], -1)), h)
            mean, std, s = gaussian(self.posterior(torch.cat([h, e[:, t]], -1)), least)
            prior = self.prior(h).chunk(2, -1)
            dists = normal(prior[0], F.softplus(prior[1]) + least), normal(mean, std)
            out.append((h, s, *(torch.distributions.Independent(d, 1) for d in dists)))
        hs, states, priors, posts = zip(*out[1:], strict=True)
        return torch.stack(hs, 1), torch.stack(states, 1), list(priors), list(posts)


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


class SimpleRecurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = nn.ELU()
        self.linear, self.recurrent = nn.Linear(S + A, H), nn.GRUCell(H, D)

    def forward(self, stoch, action, deter):
        return self.recurrent(self.activation(self.linear(torch.cat((stoch, action), 1))), deter)


class SimpleDistribution(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.config, self.network = Config(min_std=0.2), stack(inputs, H, 2 * S)

    def forward(self, *parts):
        mean, std = self.network(torch.cat(parts, 1)).chunk(2, -1)
        dist = torch.distributions.Normal(mean, F.softplus(std) + self.config.min_std)
        return dist, dist.rsample()


class SimpleRSSM(nn.Module):
    """SimpleDreamer's: embed before deter in the posterior."""

    def __init__(self):
        super().__init__()
        self.recurrent_model = SimpleRecurrent()
        self.transition_model = SimpleDistribution(D)
        self.representation_model = SimpleDistribution(E + D)

    def recurrent_model_input_init(self, batch_size):
        return torch.zeros(batch_size, S), torch.zeros(batch_size, D)


class SimpleActor(nn.Module):
    """Its policy: the constants in a configuration, ``init_std`` added to the raw output."""

    def __init__(self):
        super().__init__()
        self.config = Config(mean_scale=4, init_std=3.0, min_std=0.01)
        self.discrete_action_bool, self.network = False, stack(S + D, H, 2 * A)

    def forward(self, posterior, deterministic):
        mean, std = self.network(torch.cat((posterior, deterministic), -1)).chunk(2, -1)
        std = F.softplus(std + self.config.init_std) + self.config.min_std
        normal, d = torch.distributions.Normal(4 * torch.tanh(mean / 4), std), torch.distributions
        return d.Independent(d.TransformedDistribution(normal, [d.TanhTransform()]), 1).rsample()


# ---------------------------------------------------------------- sheeprl


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
    """sheeprl's Dreamer V1 before 0.8.4, whose ``dynamic`` has no ``is_first``."""

    def __init__(self):
        super().__init__()
        self.recurrent_model, self.min_std = RecurrentModel(), 0.2
        self.representation_model = SheepMLP(D + E, H, 2 * S)
        self.transition_model = SheepMLP(D, H, 2 * S)

    def dynamic(self, posterior, recurrent_state, action, embedded_obs):
        out, h = self.recurrent_model(torch.cat((posterior, action), -1), recurrent_state)
        mean, std, prior = gaussian(self.transition_model(out), self.min_std)
        seen = self.representation_model(torch.cat((h, embedded_obs), -1))
        post_mean, post_std, posterior = gaussian(seen, self.min_std)
        return h, posterior, prior, (post_mean, post_std), (mean, std)


class SheepRSSMOfToday(SheepRSSM):
    """Of 0.8.4: an episode's beginning zeroes action and state."""

    def dynamic(self, posterior, recurrent_state, action, embedded_obs, is_first):
        keep = 1 - is_first
        given = (keep * posterior, keep * recurrent_state, keep * action, embedded_obs)
        return super().dynamic(*given)


class SheepActor(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = SheepMLP(S + D, H, H)
        self.model._model.append(nn.ELU())
        self.mlp_heads = nn.ModuleList([nn.Linear(H, 2 * A)])
        self.init_std, self.min_std, self.distribution = torch.tensor(5.0), 1e-4, "tanh_normal"

    def forward(self, state):
        mean, std = self.mlp_heads[0](self.model(state)).chunk(2, -1)
        std = F.softplus(std + self.init_std) + self.min_std
        d, normal = torch.distributions, torch.distributions.Normal(5 * torch.tanh(mean / 5), std)
        dist = d.Independent(d.TransformedDistribution(normal, [d.TanhTransform()]), 1)
        return (dist.rsample(),), (dist,)
