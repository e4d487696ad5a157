"""Minimal models in the attribute styles of public Dreamers of today, with the loops these have.

Written for tests and benchmarks: nothing is there that a loop does not need. Sizes are an argument.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions.utils import probs_to_logits

D = torch.distributions


class Sizes(NamedTuple):
    action: int = 2
    deter: int = 12
    latents: int = 3  # categoricals
    classes: int = 4
    embed: int = 5
    hidden: int = 10
    blocks: int = 3

    @property
    def stoch(self):
        return self.latents * self.classes


SMALL = Sizes()


def normed(*widths, norm=nn.LayerNorm, act=nn.SiLU, bias=False, eps=1e-3):
    """Linear, norm and activation, over and over."""
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), *([norm(b, eps=eps)] if norm else []), act()]
    return layers


class Mixed(D.OneHotCategorical):
    """One-hot samples with the gradient of p, a mode with that of log p."""

    def __init__(self, logits, unimix=0.0):
        if unimix:
            probs = (1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]
            logits = probs.log()
        super().__init__(logits=logits)

    def straight(self):
        return super().sample() + self.probs - self.probs.detach()

    def best(self):
        hot = F.one_hot(self.logits.argmax(-1), self.logits.shape[-1])
        return hot + self.logits - self.logits.detach()


def bounded(action):
    return action / action.abs().clamp(min=1).detach()


# ---------------------------------------------------------------- NM512, jsikyoon


class LateCell(nn.Module):
    """The GRU of DreamerV2; its state in a list."""

    def __init__(self, inputs, size, norm=True, bias=False, update_bias=-1, eps=1e-3):
        super().__init__()
        self._size, self._update_bias = size, update_bias
        self.layers = nn.Sequential()
        self.layers.add_module("GRU_linear", nn.Linear(inputs + size, 3 * size, bias=bias))
        if norm:
            self.layers.add_module("GRU_norm", nn.LayerNorm(3 * size, eps=eps))

    def forward(self, inputs, state):
        state = state[0]
        r, c, u = self.layers(torch.cat([inputs, state], -1)).split(self._size, -1)
        u = torch.sigmoid(u + self._update_bias)
        new = u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * state
        return new, [new]


class StatsRSSM(nn.Module):
    """NM512's dreamerv3-torch."""

    def __init__(self, sizes=SMALL, discrete=True, unimix=0.01, initial="learned", norm=True):
        super().__init__()
        s = self.sizes = sizes
        self._stoch, self._discrete = s.latents, s.classes if discrete else 0
        self._deter, self._unimix_ratio, self._initial = s.deter, unimix, initial
        self._num_actions = s.action
        self._rec_depth, self._min_std, self._mean_act, self._std_act = 1, 0.1, "none", "sigmoid2"
        stoch, out = (s.stoch, s.stoch) if discrete else (s.latents, 2 * s.latents)
        kind = {"norm": nn.LayerNorm if norm else None}
        self._img_in_layers = nn.Sequential(*normed(stoch + s.action, s.hidden, **kind))
        self._cell = LateCell(s.hidden, s.deter, norm)
        self._img_out_layers = nn.Sequential(*normed(s.deter, s.hidden, **kind))
        self._obs_out_layers = nn.Sequential(*normed(s.deter + s.embed, s.hidden, **kind))
        self._imgs_stat_layer = nn.Linear(s.hidden, out)
        self._obs_stat_layer = nn.Linear(s.hidden, out)
        if initial == "learned":
            self.W = nn.Parameter(torch.zeros(1, s.deter))

    def stats(self, x):
        if self._discrete:
            return {"logit": x.unflatten(-1, (self._stoch, self._discrete))}
        mean, y = x.chunk(2, -1)
        return {"mean": mean, "std": 2 * torch.sigmoid(y / 2) + self._min_std}

    def get_dist(self, stats):
        if self._discrete:
            return Mixed(stats["logit"], self._unimix_ratio)
        return D.Normal(stats["mean"], stats["std"])

    def drawn(self, stats):
        dist = self.get_dist(stats)
        return dist.straight() if self._discrete else dist.rsample()

    def initial(self, rows):
        shape = (rows, self._stoch, self._discrete) if self._discrete else (rows, self._stoch)
        names = ("logit", "stoch") if self._discrete else ("mean", "std", "stoch")
        zero = self._obs_stat_layer.weight.new_zeros
        state = {name: zero(shape) for name in names} | {"deter": zero(rows, self._deter)}
        if self._initial == "learned":
            state["deter"] = torch.tanh(self.W).repeat(rows, 1)
            stats = self.stats(self._imgs_stat_layer(self._img_out_layers(state["deter"])))
            dist = self.get_dist(stats)
            state["stoch"] = dist.best() if self._discrete else dist.mean
        return state

    def img_step(self, state, action):
        stoch = state["stoch"].flatten(1)
        x = self._img_in_layers(torch.cat([stoch, action], -1))
        x, deter = self._cell(x, [state["deter"]])
        stats = self.stats(self._imgs_stat_layer(self._img_out_layers(x)))
        return {"stoch": self.drawn(stats), "deter": deter[0], **stats}

    def obs_step(self, state, action, embed, is_first=None):
        if is_first is not None:
            if state is None or is_first.all():
                state, action = self.initial(len(action)), torch.zeros_like(action)
            elif is_first.any():
                action *= 1 - is_first[:, None]
                new = self.initial(len(action))
                for key, value in state.items():
                    first = is_first.view(-1, *(1,) * (value.ndim - 1))
                    state[key] = value * (1 - first) + new[key] * first
        prior = self.img_step(state, action)
        x = self._obs_out_layers(torch.cat([prior["deter"], embed], -1))
        stats = self.stats(self._obs_stat_layer(x))
        return {"stoch": self.drawn(stats), "deter": prior["deter"], **stats}, prior

    def observe(self, embed, action, is_first, state=None):
        steps = []
        for t in range(embed.shape[1]):
            steps.append(self.obs_step(state, action[:, t], embed[:, t], is_first[:, t]))
            state = dict(steps[-1][0])
        return tuple({k: torch.stack([x[k] for x in part], 1) for k in part[0]}
                     for part in zip(*steps, strict=True))  # fmt: skip


class OldStatsRSSM(StatsRSSM):
    """jsikyoon's dreamer-torch: bias, ELU and no norm but perhaps the cell's; nothing is reset."""

    def __init__(self, sizes=SMALL, discrete=True, norm=False):
        super().__init__(sizes, discrete, 0.0, "zeros", False)
        s, stoch = sizes, sizes.stoch if discrete else sizes.latents
        plain = functools.partial(normed, norm=None, act=nn.ELU, bias=True)
        self._inp_layers = nn.Sequential(*plain(stoch + s.action, s.hidden, s.hidden))
        self._img_out_layers = nn.Sequential(*plain(s.deter, s.hidden))
        self._obs_out_layers = nn.Sequential(*plain(s.deter + s.embed, s.hidden))
        self._ims_stat_layer = self._imgs_stat_layer
        del self._img_in_layers, self._imgs_stat_layer, self._unimix_ratio, self._initial
        del self._num_actions
        self._cell = LateCell(s.hidden, s.deter, norm, bias=True, eps=1e-5)
        self._shared, self._temp_post = False, True

    def get_dist(self, stats):
        return Mixed(stats["logit"]) if self._discrete else D.Normal(stats["mean"], stats["std"])

    def img_step(self, state, action):
        x = self._inp_layers(torch.cat([state["stoch"].flatten(1), action], -1))
        x, deter = self._cell(x, [state["deter"]])
        stats = self.stats(self._ims_stat_layer(self._img_out_layers(x)))
        return {"stoch": self.drawn(stats), "deter": deter[0], **stats}

    def observe(self, embed, action, state=None):
        steps = []
        for t in range(embed.shape[1]):
            steps.append(self.obs_step(state, action[:, t], embed[:, t]))
            state = steps[-1][0]
        return tuple({k: torch.stack([x[k] for x in part], 1) for k in part[0]}
                     for part in zip(*steps, strict=True))  # fmt: skip


class BoundNormal:
    """Of dreamerv3-torch: samples divided by their size where that exceeds 1."""

    def __init__(self, mean, std, absmax):
        self._dist, self.mean, self.absmax = D.Independent(D.Normal(mean, std), 1), mean, absmax

    def sample(self):
        out = self._dist.rsample()
        return out if self.absmax is None else bounded(out)


class TwoHot:
    """A head's distribution over bins, its mode in their space or that of symexp."""

    def __init__(self, logits, bins, squashed):
        self.probs, self.bins, self.squashed = logits.softmax(-1), bins, squashed

    def mode(self):
        x = (self.probs * self.bins).sum(-1, keepdim=True)
        return x.sign() * x.abs().expm1() if self.squashed else x


class StatsMLP(nn.Module):
    """dreamerv3-torch's MLP with its distribution: actor, reward, value and continuation."""

    def __init__(self, sizes=SMALL, outputs=1, dist="symlog_disc", absmax=1.0):
        super().__init__()
        self._dist, self._absmax, self._symlog_inputs = dist, absmax, False
        self._min_std, self._max_std, self._unimix_ratio = 0.1, 1.0, 0.01
        self.layers = nn.Sequential(*normed(sizes.stoch + sizes.deter, sizes.hidden, sizes.hidden))
        self.mean_layer = nn.Linear(sizes.hidden, outputs)
        if dist == "normal":
            self.std_layer = nn.Linear(sizes.hidden, outputs)

    def forward(self, features):
        hidden = self.layers(features)
        mean = self.mean_layer(hidden)
        if self._dist == "normal":
            std = 0.9 * torch.sigmoid(self.std_layer(hidden) + 2) + 0.1
            return BoundNormal(torch.tanh(mean), std, self._absmax)
        if self._dist == "onehot":
            dist = Mixed(mean, self._unimix_ratio)
            dist.sample = dist.straight
            return dist
        if self._dist == "binary":
            return D.Bernoulli(logits=mean)
        return TwoHot(mean, torch.linspace(-20, 20, mean.shape[-1]).to(mean), True)


class ActionHead(nn.Module):
    """jsikyoon's policy."""

    def __init__(self, sizes=SMALL, dist="trunc_normal"):
        super().__init__()
        widths = sizes.stoch + sizes.deter, sizes.hidden, sizes.hidden
        self._dist, self._min_std, self._init_std = dist, 0.1, 0.0
        self._pre_layers = nn.Sequential(*normed(*widths, norm=None, act=nn.ELU, bias=True))
        size = sizes.action if dist == "onehot" else 2 * sizes.action
        self._dist_layer = nn.Linear(sizes.hidden, size)

    def forward(self, features):
        raw = self._dist_layer(self._pre_layers(features))
        if self._dist == "onehot":
            dist = Mixed(raw)
            dist.sample = dist.straight
            return dist
        mean, y = raw.chunk(2, -1)
        normal = D.Normal(torch.tanh(mean), 2 * torch.sigmoid(y / 2) + self._min_std)
        return D.Independent(normal, 1)


class DenseHead(nn.Module):
    """jsikyoon's heads."""

    def __init__(self, sizes=SMALL, dist="normal"):
        super().__init__()
        self._dist = dist
        self._mean_layers = nn.Sequential(
            *normed(sizes.stoch + sizes.deter, sizes.hidden, norm=None, act=nn.ELU, bias=True),
            nn.Linear(sizes.hidden, 1),
        )

    def forward(self, features):
        mean = self._mean_layers(features)
        dist = D.Bernoulli(logits=mean) if self._dist == "binary" else D.Normal(mean, 1.0)
        return D.Independent(dist, 1)


# ---------------------------------------------------------------- burchim


class OwnLinear(nn.Linear):
    """With a forward of its own that adds noise where it is asked to."""

    vn_std = None

    def forward(self, x):
        weight = self.weight
        if self.vn_std is not None and self.training:
            weight = weight + self.vn_std * torch.randn_like(weight)
        return F.linear(x, weight, self.bias)


class OwnLayerNorm(nn.LayerNorm):
    """In float32, its result in the input's dtype."""

    def __init__(self, size, eps=1e-3):
        super().__init__(size, eps)
        self.permute_input = nn.Identity()

    def forward(self, x):
        return super().forward(self.permute_input(x).float() if x.dtype.itemsize < 4 else x).to(x)


class OwnMLP(nn.Module):
    def __init__(self, *widths, last=False):
        super().__init__()
        count = len(widths) - 1
        self.layers = nn.ModuleList(
            nn.Sequential(
                OwnLinear(a, b, bias=last and i == count - 1),
                *([nn.Identity(), nn.Identity()] if last and i == count - 1
                  else [OwnLayerNorm(b), nn.SiLU()]),
                nn.Identity(),
            )
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )  # fmt: skip

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class OwnCell(nn.Module):
    def __init__(self, inputs, size):
        super().__init__()
        self.linear, self.norm = OwnLinear(inputs + size, 3 * size, False), OwnLayerNorm(3 * size)

    def forward(self, x, hidden):
        r, c, u = self.norm(self.linear(torch.cat([x, hidden], -1))).chunk(3, -1)
        u = torch.sigmoid(u - 1)
        new = u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * hidden
        return new, new


class MlpsRSSM(nn.Module):
    """burchim's: the embedding before deter, actions bounded and reset in place."""

    def __init__(self, sizes=SMALL, learn_initial=True, action_clip=1.0):
        super().__init__()
        s = self.sizes = sizes
        self.stoch_size, self.discrete, self.min_std = s.latents, s.classes, 0.1
        self.uniform_mix, self.action_clip, self.learn_initial = 0.01, action_clip, learn_initial
        self.mlp_img1 = OwnMLP(s.stoch + s.action, s.hidden)
        self.gru = OwnCell(s.hidden, s.deter)
        self.mlp_img2 = OwnMLP(s.deter, s.hidden, s.stoch, last=True)
        self.mlp_obs1 = OwnMLP(s.embed + s.deter, s.hidden, s.stoch, last=True)
        if learn_initial:
            self.weight_init = nn.Parameter(torch.zeros(s.deter))

    def dist(self, raw):
        logits = raw.unflatten(-1, (self.stoch_size, self.discrete))
        return logits, Mixed(logits, self.uniform_mix)

    def initial(self, rows):
        zero = self.mlp_img1.layers[0][0].weight.new_zeros
        size = (rows, self.stoch_size, self.discrete)
        state = {"logits": zero(size), "stoch": zero(size), "deter": zero(rows, self.sizes.deter)}
        if self.learn_initial:
            state["deter"] = torch.tanh(self.weight_init).repeat(rows, 1)
            state["stoch"] = self.dist(self.mlp_img2(state["deter"]))[1].best()
        return state

    def forward_img(self, state, action):
        if self.action_clip > 0:
            action *= (self.action_clip / action.abs().clamp(min=self.action_clip)).detach()
        x = self.mlp_img1(torch.cat([state["stoch"].flatten(1), action], -1))
        x, deter = self.gru(x, state["deter"])
        logits, dist = self.dist(self.mlp_img2(x))
        return {"stoch": dist.straight(), "deter": deter, "logits": logits}

    def forward(self, state, action, embed, is_first):
        if self.action_clip > 0:
            action *= (self.action_clip / action.abs().clamp(min=self.action_clip)).detach()
        if is_first.any():
            action *= 1 - is_first[:, None]
            new = self.initial(len(embed))
            for key, value in state.items():
                first = is_first.view(-1, *(1,) * (value.ndim - 1))
                state[key] = value * (1 - first) + new[key] * first
        prior = self.forward_img(state, action)
        logits, dist = self.dist(self.mlp_obs1(torch.cat([embed, prior["deter"]], -1)))
        return {"stoch": dist.straight(), "deter": prior["deter"], "logits": logits}, prior

    def observe(self, embed, prev_actions, is_firsts, prev_state=None):
        if prev_state is None:
            prev_actions[:, 0] = 0
            prev_state = self.initial(len(embed))
        steps = []
        for t in range(embed.shape[1]):
            step = self(prev_state, prev_actions[:, t], embed[:, t], is_firsts[:, t])
            steps.append(step)
            prev_state = dict(step[0])
        return tuple({k: torch.stack([x[k] for x in part], 1) for k in part[0]}
                     for part in zip(*steps, strict=True))  # fmt: skip


class PolicyNetwork(nn.Module):
    """burchim's policy, no tanh and no bound on the sample; ``bins`` makes it a value network."""

    def __init__(self, sizes=SMALL, discrete=False, bins=0):
        super().__init__()
        self.mlp = OwnMLP(sizes.stoch + sizes.deter, sizes.hidden, sizes.hidden)
        outputs = bins or (sizes.action if discrete else 2 * sizes.action)
        self.linear_proj, self.bins = OwnLinear(sizes.hidden, outputs), bins
        if not bins:
            self.discrete, self.min_std, self.max_std, self.uniform_mix = discrete, 0.1, 1.0, 0.01

    def forward(self, x):
        raw = self.linear_proj(self.mlp(x))
        if self.bins:
            return TwoHot(raw, torch.linspace(-20, 20, self.bins).to(raw), True)
        if self.discrete:
            dist = Mixed(raw, self.uniform_mix)
            dist.sample = dist.straight
            return dist
        mean, y = raw.chunk(2, -1)
        return D.Independent(D.Normal(torch.tanh(mean), 0.9 * torch.sigmoid(y + 2) + 0.1), 1)


# ---------------------------------------------------------------- r2dreamer


class BlockLinear(nn.Module):
    """[out / G, in / G, G] weights."""

    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        self.blocks = blocks
        scale = (inputs / blocks) ** -0.5
        self.weight = nn.Parameter(scale * torch.randn(outputs // blocks, inputs // blocks, blocks))
        self.bias = nn.Parameter(0.1 * torch.randn(outputs))

    def forward(self, x):
        x = x.unflatten(-1, (self.blocks, -1))
        return torch.einsum("...gi,oig->...go", x, self.weight).flatten(-2) + self.bias


class Deter(nn.Module):
    def __init__(self, s, layers=1):
        super().__init__()
        self.blocks, self.size = s.blocks, s.deter
        rms = {"norm": nn.RMSNorm, "bias": True, "eps": 1e-4}
        for i, width in enumerate((s.deter, s.stoch, s.action)):
            setattr(self, f"_dyn_in{i}", nn.Sequential(*normed(width, s.hidden, **rms)))
        self._dyn_hid, width = nn.Sequential(), (3 * s.hidden + s.deter // s.blocks) * s.blocks
        for i in range(layers):
            self._dyn_hid.add_module(f"dyn_hid_{i}", BlockLinear(width, s.deter, s.blocks))
            self._dyn_hid.add_module(f"norm_{i}", nn.RMSNorm(s.deter, eps=1e-4))
            self._dyn_hid.add_module(f"act_{i}", nn.SiLU())
            width = s.deter
        self._dyn_gru = BlockLinear(width, 3 * s.deter, s.blocks)

    def forward(self, stoch, deter, action):
        parts = (
            self._dyn_in0(deter),
            self._dyn_in1(stoch.reshape(len(deter), -1)),
        )
        x = torch.cat([*parts, self._dyn_in2(bounded(action))], -1)
        x = x.unsqueeze(-2).expand(-1, self.blocks, -1)
        x = torch.cat([deter.unflatten(-1, (self.blocks, -1)), x], -1).flatten(-2)
        gates = self._dyn_gru(self._dyn_hid(x)).unflatten(-1, (self.blocks, -1)).chunk(3, -1)
        r, c, u = (gate.flatten(-2) for gate in gates)
        u = torch.sigmoid(u - 1)
        return u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * deter


class Shaped(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.unflatten(-1, self.shape)


class BlocksRSSM(nn.Module):
    """r2dreamer's: straight-through Gumbel samples."""

    def __init__(self, sizes=SMALL, unimix=0.01, dyn_layers=1):
        super().__init__()
        s = self.sizes = sizes
        self._stoch, self._discrete, self._unimix_ratio = s.latents, s.classes, unimix
        self._deter_net = Deter(s, dyn_layers)
        rms = {"norm": nn.RMSNorm, "bias": True, "eps": 1e-4}
        shaped = Shaped(s.latents, s.classes)
        self._obs_net = nn.Sequential(
            *normed(s.deter + s.embed, s.hidden, **rms), nn.Linear(s.hidden, s.stoch), shaped
        )
        self._img_net = nn.Sequential(
            *normed(s.deter, s.hidden, s.hidden, **rms), nn.Linear(s.hidden, s.stoch), shaped
        )

    def drawn(self, logit):
        probs = (1 - self._unimix_ratio) * logit.softmax(-1) + self._unimix_ratio / self._discrete
        return F.gumbel_softmax(probs.log(), hard=True)

    def obs_step(self, stoch, deter, action, embed, reset):
        keep = ~reset.view(-1, 1)
        stoch, deter, action = stoch * keep[..., None], deter * keep, action * keep
        deter = self._deter_net(stoch, deter, action)
        logit = self._obs_net(torch.cat([deter, embed], -1))
        return self.drawn(logit), deter, logit

    def observe(self, embed, action, initial, reset):
        (stoch, deter), steps = initial, []
        for t in range(action.shape[1]):
            step = self.obs_step(stoch, deter, action[:, t], embed[:, t], reset[:, t])
            stoch, deter, _ = step
            steps.append(step)
        return tuple(torch.stack(x, 1) for x in zip(*steps, strict=True))

    def img_step(self, stoch, deter, action):
        deter = self._deter_net(stoch, deter, action)
        return self.drawn(self._img_net(deter)), deter


class HeadMLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self._symlog_inputs = False
        rms = {"norm": nn.RMSNorm, "bias": True, "eps": 1e-4}
        self.layers = nn.Sequential(*normed(sizes.stoch + sizes.deter, *[sizes.hidden] * 2, **rms))

    def forward(self, x):
        return self.layers(x)


def bounded_normal(x, min_std, max_std):
    mean, y = x.chunk(2, -1)
    std = (max_std - min_std) * torch.sigmoid(y + 2) + min_std
    return D.Independent(D.Normal(torch.tanh(mean), std), 1)


def onehot(x, unimix_ratio):
    dist = Mixed(x, unimix_ratio)
    dist.rsample = lambda: F.gumbel_softmax(dist.logits, hard=True)
    return dist


def symexp_twohot(x, bin_num):
    half = torch.linspace(-20, 0, (bin_num + 1) // 2)
    half = half.sign() * half.abs().expm1()
    return TwoHot(x, torch.cat([half, -half[: bin_num // 2].flip(0)]).to(x), False)


def binary(x):
    return D.Independent(D.Bernoulli(logits=x), 1)


class MLPHead(nn.Module):
    """r2dreamer's: its distribution a partial function."""

    def __init__(self, sizes=SMALL, name="bounded_normal", outputs=4, **kwargs):
        super().__init__()
        self.mlp, self._dist_name = HeadMLP(sizes), name
        self.last = nn.Linear(sizes.hidden, outputs)
        self._dist = functools.partial(globals()[name], **kwargs)

    def forward(self, x):
        return self._dist(self.last(self.mlp(x)))


# ---------------------------------------------------------------- NaturalDreamer


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


class NaturalRecurrent(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.activation = nn.Tanh()
        self.linear = nn.Linear(s.stoch + s.action, s.hidden)
        self.recurrent = nn.GRUCell(s.hidden, s.deter)

    def forward(self, recurrentState, latentState, action):
        x = self.activation(self.linear(torch.cat((latentState, action), -1)))
        return self.recurrent(x, recurrentState)


class NaturalNet(nn.Module):
    def __init__(self, s, inputs, mix=0.01):
        super().__init__()
        self.config = Config(uniformMix=mix)
        self.latentLength, self.latentClasses = s.latents, s.classes
        act = nn.Tanh()  # in all places
        layers = normed(inputs, s.hidden, s.hidden, norm=None, act=lambda: act, bias=True)
        self.network = nn.Sequential(*layers, nn.Linear(s.hidden, s.stoch))

    def forward(self, x):
        probs = self.network(x).unflatten(-1, (self.latentLength, self.latentClasses)).softmax(-1)
        probs = (1 - self.config.uniformMix) * probs + self.config.uniformMix / self.latentClasses
        logits = probs_to_logits(probs)
        return D.OneHotCategoricalStraightThrough(logits=logits).rsample().flatten(-2), logits


class Natural:
    """NaturalDreamer's agent, which is no module."""

    def __init__(self, sizes=SMALL):
        self.recurrentModel = NaturalRecurrent(sizes)
        self.priorNet = NaturalNet(sizes, sizes.deter)
        self.posteriorNet = NaturalNet(sizes, sizes.deter + sizes.embed)


# ---------------------------------------------------------------- sheeprl


class SheepMLP(nn.Module):
    def __init__(self, *widths, norm=nn.LayerNorm, act=nn.SiLU, bias=False, last=True):
        super().__init__()
        *hidden, out = widths if last else (*widths, None)
        layers = normed(*hidden, norm=norm, act=act, bias=bias)
        self._model = nn.Sequential(*layers, *([nn.Linear(hidden[-1], out)] if last else []))

    def forward(self, x):
        return self._model(x)


class SheepCell(nn.Module):
    """h before x; of sequences of one step."""

    def __init__(self, inputs, size, bias):
        super().__init__()
        self.linear = nn.Linear(size + inputs, 3 * size, bias=bias)
        self.layer_norm = nn.LayerNorm(3 * size, eps=1e-3)

    def forward(self, x, h):
        r, c, u = self.layer_norm(self.linear(torch.cat((h, x), -1))).chunk(3, -1)
        u = torch.sigmoid(u - 1)
        return u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h


class SheepRecurrent(nn.Module):
    def __init__(self, s, third):
        super().__init__()
        kind = {} if third else {"norm": None, "act": nn.ELU, "bias": True}
        self.mlp = SheepMLP(s.stoch + s.action, s.hidden, last=False, **kind)
        self.rnn = SheepCell(s.hidden, s.deter, bias=not third)

    def forward(self, x, h):
        return self.rnn(self.mlp(x), h)


class SheepV2(nn.Module):
    """sheeprl's RSSM of Dreamer V2."""

    third = False

    def __init__(self, sizes=SMALL):
        super().__init__()
        s = sizes
        kind = {} if self.third else {"norm": None, "act": nn.ELU, "bias": True}
        self.discrete = s.classes
        self.recurrent_model = SheepRecurrent(s, self.third)
        self.representation_model = SheepMLP(s.deter + s.embed, s.hidden, s.stoch, **kind)
        self.transition_model = SheepMLP(s.deter, s.hidden, s.stoch, **kind)

    def drawn(self, logits):
        logits = logits.unflatten(-1, (-1, self.discrete))
        return D.OneHotCategoricalStraightThrough(logits=logits).rsample()

    def dynamic(self, posterior, recurrent_state, action, embedded_obs, is_first):
        keep = 1 - is_first
        x = torch.cat((keep * posterior.flatten(-2), keep * action), -1)
        h = self.recurrent_model(x, keep * recurrent_state)
        prior = self.transition_model(h)
        post = self.representation_model(torch.cat((h, embedded_obs), -1))
        return h, self.drawn(post), self.drawn(prior), post, prior


class SheepV3(SheepV2):
    """Of V3, 0.8.4: a start, learned or not, whose mode has no gradient; no priors in the loop."""

    third = True

    def __init__(self, sizes=SMALL, unimix=0.01, learnable=True):
        super().__init__(sizes)
        self.unimix, start = unimix, torch.zeros(sizes.deter)
        if learnable:
            self.initial_recurrent_state = nn.Parameter(start)
        else:
            self.register_buffer("initial_recurrent_state", start)

    def _uniform_mix(self, logits):
        logits = logits.unflatten(-1, (-1, self.discrete))
        if self.unimix > 0:
            probs = (1 - self.unimix) * logits.softmax(-1) + self.unimix / self.discrete
            logits = probs_to_logits(probs)
        return logits.flatten(-2)

    def prior_logits(self, h):
        return self._uniform_mix(self.transition_model(h))

    def dynamic(self, posterior, recurrent_state, action, embedded_obs, is_first, *_):
        h0 = torch.tanh(self.initial_recurrent_state).expand_as(recurrent_state)
        best = self.prior_logits(h0).unflatten(-1, (-1, self.discrete))
        z0 = F.one_hot(best.argmax(-1), self.discrete).to(h0)
        h = (1 - is_first) * recurrent_state + is_first * h0
        z = (1 - is_first) * posterior.flatten(-2) + is_first * z0.flatten(-2)
        h = self.recurrent_model(torch.cat((z, (1 - is_first) * action), -1), h)
        post = self._uniform_mix(self.representation_model(torch.cat((h, embedded_obs), -1)))
        return h, self.drawn(post), post


class SheepActor(nn.Module):
    """Of V3: a scaled Normal whose samples are bounded, or one-hot actions."""

    def __init__(self, sizes=SMALL, distribution="scaled_normal"):
        super().__init__()
        self.model = SheepMLP(sizes.stoch + sizes.deter, *[sizes.hidden] * 2, last=False)
        outputs = sizes.action if distribution == "discrete" else 2 * sizes.action
        self.mlp_heads = nn.ModuleList([nn.Linear(sizes.hidden, outputs)])
        self.distribution, self.init_std, self.min_std, self.max_std = distribution, 2.0, 0.1, 1.0
        self._unimix, self._action_clip = 0.01, 1.0

    def forward(self, state):
        raw = self.mlp_heads[0](self.model(state))
        if self.distribution == "discrete":
            probs = (1 - self._unimix) * raw.softmax(-1) + self._unimix / raw.shape[-1]
            dist = D.OneHotCategoricalStraightThrough(logits=probs_to_logits(probs))
            return (dist.rsample(),), (dist,)
        mean, y = raw.chunk(2, -1)
        dist = D.Normal(torch.tanh(mean), 0.9 * torch.sigmoid(y + self.init_std) + self.min_std)
        dist = D.Independent(dist, 1)
        return (bounded(dist.rsample()),), (dist,)
