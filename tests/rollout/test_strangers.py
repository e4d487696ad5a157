"""Modules as strangers keep and use them: in both modes, parametrized, replaced, wrapped, saved."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import modern
import peers
import pytest
import torch
import torch.nn.functional as F
from modern import SMALL
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from fastdreamer.ops.backend import last_backend
from fastdreamer.rollout import Categorical, Joined, MisfitError, Rollout, StdTransform, adapt
from fastdreamer.rollout.adapters.loop import agrees

A, D, C, K, E, H, _ = SMALL
Z, T, B = SMALL.stoch, 5, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Model(nn.Module):
    """A world model of one's own, with whatever cell."""

    def __init__(self, cell):
        super().__init__()
        if not isinstance(cell, modern.Deter):
            self.inp = nn.Sequential(*modern.normed(Z + A, H))
        self.gru = cell
        self.prior = nn.Sequential(*modern.normed(D, H), nn.Linear(H, Z))
        self.post = nn.Sequential(*modern.normed(D + E, H), nn.Linear(H, Z))


CELLS = {
    "torch": lambda: nn.GRUCell(H, D),
    "late": lambda: modern.LateCell(H, D, bias=True),
    "late, no norm, no bias": lambda: modern.LateCell(H, D, norm=False),
    "block": lambda: modern.Deter(SMALL),
}


def made(model, **options):
    return Rollout.from_modules(
        **dict(model.named_children()), latent=Categorical(K, 0.01), **options
    )


def sequence():
    noise = torch.rand(T, B, C)
    return torch.randn(T, B, E), torch.randn(T, B, A), torch.rand(T, B) < 0.3, None, noise


def verified(rollout):
    """On few numbers, which make the caller's own loop short."""
    batch = {"embed": torch.randn(T, B, E), "action": torch.randn(T, B, A)}
    batch = {name: x.to(rollout.like) for name, x in batch.items()}
    found = rollout.verify(batch, repeats=1)
    assert found.ok, str(found)
    return [line.name for line in found.lines]


def loss_of(rollout, given):
    seen = rollout.observe(*given)
    return seen.post.logits.square().mean() + seen.state.deter.square().mean()


def grads_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def alike(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- parametrized


def parametrized(cell):
    """Weights by two tensors, by power iterations that go on in training, and a norm's by one."""
    linears = [part for part in cell.modules() if hasattr(part, "weight") and part.weight.ndim > 1]
    for i, linear in enumerate(linears):
        (parametrizations.spectral_norm if i % 2 else parametrizations.weight_norm)(linear)
    if isinstance(cell, nn.GRUCell):
        parametrizations.weight_norm(cell, "weight_ih")
        parametrizations.spectral_norm(cell, "weight_hh")
    for norm in [part for part in cell.modules() if isinstance(part, nn.LayerNorm | nn.RMSNorm)]:
        parametrize.register_parametrization(norm, "weight", Half())


class Half(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", CELLS)
def test_parametrized_cells(name):
    """Before they are read, and after; one weight of a power iteration alone, too."""
    for how in (parametrized, only_spectral):
        model = Model(CELLS[name]())
        before = made(model)
        how(model.gru)
        for rollout in (before, made(model)):
            names = verified(rollout)
        assert any("gradient of gru" in name and "original" in name for name in names)


def only_spectral(cell):
    for part in list(cell.modules()):
        for name, weight in list(part.named_parameters(recurse=False)):
            if weight.ndim == 2:
                parametrizations.spectral_norm(part, name)


def test_asking_leaves_everything_as_it_was():
    """Running statistics and counts of calls are the caller's; modes, too."""

    class Counts(modern.StatsRSSM):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def observe(self, embed, action, is_first, state=None):
            self.calls = self.calls + 1
            return super().observe(embed, action, is_first, state)

    model = Counts()
    model._obs_out_layers.eval()
    before = {name: x.clone() for name, x in model.named_buffers()}
    modes, version = [m.training for m in model.modules()], model.calls._version
    loop = adapt(model)
    loop.rollout.batch_first = False
    verified(loop.rollout)
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())
    assert modes == [m.training for m in model.modules()]
    assert model.calls._version == version and loop.calls is model.calls
    norm = nn.BatchNorm1d(H)
    prior = nn.Sequential(nn.Linear(D, H), norm, nn.SiLU(), nn.Linear(H, Z))
    whole = Model(modern.LateCell(H, D))
    whole.prior = prior
    with pytest.raises(MisfitError, match=r"prior\[1\]: BatchNorm1d"):
        made(whole)
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(H))


# ---------------------------------------------------------------- replaced since


def test_another_forward_is_not_taken_for_the_known_one():
    """As accelerate's hooks and patches put it there; seen at each call."""
    model = Model(modern.LateCell(H, D))
    rollout, given = made(model), sequence()
    layer = model.prior[0]
    for twice, fits in ((2.0, False), (1.0, True)):
        layer.forward = MethodType(
            lambda self, x, twice=twice: twice * F.linear(x, self.weight, self.bias), layer
        )
        with pytest.raises(MisfitError, match=r"prior\[0\]: Linear.*has got another forward\(\)"):
            rollout.observe(*given)
        if fits:  # what gives the same is a Linear
            verified(made(model))
            continue
        with pytest.raises(MisfitError, match=r"prior\[0\]: Linear.*has a forward\(\) of its own"):
            made(model)
    del layer.forward
    rollout.observe(*given)
    model.gru.forward = lambda x, h: h
    with pytest.raises(MisfitError, match=r"gru: LateCell.*has got another forward\(\)"):
        rollout.observe(*given)
    cell = nn.GRUCell(H, D)
    cell.forward = lambda x, h: h
    with pytest.raises(
        MisfitError, match=r"gru: GRUCell.*has a forward\(\) of its own; nn.GRUCell"
    ):
        made(Model(cell))


def test_other_modules_are_seen():
    """In a stack, in a cell, at its end; in a peer and in the loop that stands in its place."""
    given = sequence()
    for change in (
        lambda m: setattr(m.prior, "0", nn.Linear(D, H, bias=False)),
        lambda m: setattr(m.gru.layers, "GRU_linear", nn.Linear(H + D, 3 * D)),
        lambda m: m.post.append(nn.Identity()),
    ):
        model = Model(modern.LateCell(H, D))
        rollout = made(model)
        rollout.observe(*given)
        change(model)
        with pytest.raises(MisfitError, match="has got another module '.*' since it was read"):
            rollout.observe(*given)
    for by in ("model", "loop"):
        model = modern.StatsRSSM()
        loop = adapt(model)
        target = model if by == "model" else loop
        target.more = nn.Linear(1, 1)  # what is new beside the rest is the caller's
        loop.register_forward_hook(lambda *_: None)  # it is called, and its hooks
        assert agrees(loop)
        target._imgs_stat_layer = nn.Linear(H, Z)
        with pytest.raises(MisfitError, match="got another module '_imgs_stat_layer'"):
            loop.rollout.initial(1)


# ---------------------------------------------------------------- both modes


class Dropping(modern.StatsRSSM):
    """A peer with dropout added."""

    def img_step(self, state, action):
        return super().img_step(state | {"deter": F.dropout(state["deter"], 0.5, self.training)},
                                action)  # fmt: skip


class Actor(modern.StatsMLP):
    def forward(self, features):
        return super().forward(F.dropout(features, 0.5, self.training))


def test_what_a_module_does_in_one_mode_alone():
    """Read in evaluation, it is asked again before it is used in training, once."""
    given, asked = sequence(), []

    class Noisy(nn.Linear):
        std = 0.0

        def forward(self, x):
            asked.append(self.training)
            noise = self.std * torch.randn_like(self.weight) if self.training else 0.0
            return F.linear(x, self.weight + noise, self.bias)

    model = Model(modern.LateCell(H, D))
    model.prior[0] = Noisy(D, H, bias=False)
    model.eval()
    rollout = made(model)
    asked.clear()
    for mode in (False, True, False, True):
        model.train(mode)
        for _ in range(2):
            rollout.observe(*given)
    assert asked == [True]
    # not while the code around is traced: the module would be compiled, and be another
    rollout = made(model)
    compiled = torch.compile(lambda: rollout.observe(*given).state.deter, backend="eager")
    want = compiled()
    model.eval()
    torch.testing.assert_close(compiled(), want)
    model.prior[0].std = 0.1
    rollout = made(model)
    rollout.observe(*given)
    twin = copy.deepcopy(rollout)
    pickle.loads(pickle.dumps(made(Model(CELLS["late"]())))).observe(*given)
    model.train()
    twin.nets["prior"].given.train()
    for changed in (rollout, rollout, twin):
        with pytest.raises(
            MisfitError, match=r"prior\[0\]: Noisy.* computes something else in training than in"
        ):
            changed.observe(*given)
    model.eval()
    rollout.observe(*given)


def test_a_peer_and_its_actor_in_one_mode_alone():
    """Whether they themselves are set to it, or what stands in their place."""
    peer, actor = Dropping().eval(), Actor(outputs=A, dist="normal").eval()
    loop, by_actor = adapt(peer), adapt(modern.StatsRSSM(), actor=actor)
    for of, module, name in (
        (loop, peer, "Dropping"),
        (loop, nn.ModuleList([loop]), "Dropping"),
        (by_actor, actor, "actor: Actor"),
    ):
        assert agrees(of)
        module.train()
        with pytest.raises(MisfitError, match=f"{name}.*something else in training"):
            of.rollout.initial(1)
        module.eval()
        of.rollout.initial(1)


@pytest.mark.parametrize("kind", [modern.StatsRSSM, modern.MlpsRSSM, peers.TransitionModel])
def test_a_mode_first_met_within_noise_that_is_served(kind):
    """Of which the questions take none, and which a peer in its turn is asked with its own of."""
    loop = adapt(kind())
    sizes = loop.rollout.dims
    given, noise = loop.example(lambda *n: torch.randn([sizes.get(i, i) for i in n]))
    loop.eval()
    got, want = (loop.rollout.serve(lambda run=run: run(*given), noise) for run in (loop, loop.own))
    for a, b in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [x for part in parts for x in tensors(part)]


# ---------------------------------------------------------------- dtypes and devices


def test_coarse_dtypes_hide_no_wrong_constant():
    """Rounding of bfloat16 is larger than many a constant: a copy in float32 is asked."""
    for dtype in (torch.bfloat16, torch.float16):
        for cell in ("late", "block"):
            model = Model(CELLS[cell]()).to(dtype)
            assert made(model).like.dtype == dtype
        with pytest.raises(MisfitError, match="GrusaRSSM computes something else"):
            adapt(peers.GrusaRSSM().to(dtype))  # its least std is 0.3
        assert agrees(adapt(peers.GrusaRSSM().to(dtype), std=StdTransform(min=0.3)))
        actor = modern.StatsMLP(outputs=A, dist="normal").to(dtype)
        adapt(modern.StatsRSSM().to(dtype), actor=actor)
        actor._min_std = 0.11  # its forward() has 0.1
        with pytest.raises(MisfitError, match="actor: StatsMLP gives something else"):
            adapt(modern.StatsRSSM().to(dtype), actor=actor)
    for cell in ("late", "block"):  # LayerNorm, and RMSNorm
        verified(made(Model(CELLS[cell]()).bfloat16()))


def test_the_default_device_and_dtype_are_another():
    model, actor = modern.StatsRSSM(), modern.StatsMLP(outputs=A, dist="normal")
    with torch.device("meta"):
        loop = adapt(model, actor=actor)
        loop.rollout.batch_first = False
        found = loop.rollout.verify(repeats=1)
    assert found.ok, str(found)
    torch.set_default_dtype(torch.float64)
    try:
        assert adapt(model, actor=actor).rollout.like.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_numbers_nothing_can_be_asked():
    with pytest.raises(MisfitError, match="LateCell is on the meta device, where it cannot be"):
        made(Model(modern.LateCell(H, D)).to("meta"))
    with pytest.raises(MisfitError, match="GrusaRSSM is on the meta device, where it cannot be"):
        adapt(peers.GrusaRSSM().to("meta"))
    model = Model(nn.GRUCell(H, D)).to("meta")
    rollout = made(model)  # layers of torch's are known
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.1)
    verified(rollout)


# ---------------------------------------------------------------- wrapped, joined, verified


def test_wrappers_that_average_gradients_are_not_bypassed():
    parts = dict(Model(nn.GRUCell(H, D)).named_children())
    for name in ("gru", "prior"):
        with pytest.raises(MisfitError, match=f"{name}: DataParallel.*never be averaged: give"):
            Rollout.from_modules(
                **parts | {name: nn.DataParallel(parts[name])}, latent=Categorical(K)
            )
    with pytest.raises(MisfitError, match="adapt: DataParallel would be bypassed.*wrap what calls"):
        adapt(nn.DataParallel(modern.StatsRSSM()))


class DTensor(torch.Tensor):
    """By name what fully_shard makes of parameters between calls."""


def test_sharded_weights_are_refused():
    model = Model(nn.GRUCell(H, D))
    rollout = made(model)
    for layer in (model.prior[0], model.post[0]):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(DTensor))
    with pytest.raises(MisfitError, match="prior: is sharded: read the model before fully_shard"):
        rollout.observe(*sequence())
    with pytest.raises(MisfitError) as raised:
        made(model, begin=(model.prior[0], "weight"))
    told = [line.split(": read")[0] for line in str(raised.value).split("\n")]
    assert told == ["prior[0]: is sharded", "post[0]: is sharded", "begin: is sharded"]


def test_joined_layers_without_bias():
    model = Model(nn.GRUCell(H, D))
    halves = [nn.Linear(H, Z // 2, bias=False) for _ in range(2)]
    parts = dict(model.named_children())
    parts["prior"] = [*list(model.prior)[:-1], Joined(*halves)]
    rollout = Rollout.from_modules(**parts, latent=Categorical(K))
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)
    assert rollout.rssm.prior.biases[-1] is None
    with pytest.raises(MisfitError, match="one has a bias"):
        parts["prior"][-1] = Joined(halves[0], nn.Linear(H, Z // 2))
        Rollout.from_modules(**parts, latent=Categorical(K))


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_gradients_are_verified_in_any_block(block):
    model = Model(nn.GRUCell(H, D))
    with block():
        batch = {"embed": torch.randn(T, B, E), "action": torch.randn(T, B, A)}
        found = made(model).verify(batch, repeats=1)
    assert found.ok, str(found)
    assert any(line.error > 0 for line in found.lines if "gradient of gru" in line.name)


def test_verify_leaves_parameters_trainable_where_a_head_fails():
    class Fails(nn.Linear):
        def forward(self, x):
            if Fails.fails and x.ndim > 2 and x.dtype == torch.float32:  # no copy
                raise ValueError("not today")
            return super().forward(x)

    Fails.fails = False
    model = Model(nn.GRUCell(H, D))
    model.actor, model.reward = nn.Linear(D + Z, 2 * A), nn.Linear(D + Z, 1)
    model.critic, model.target = nn.Linear(D + Z, 1), Fails(D + Z, 1)
    rollout = made(model)
    Fails.fails = True
    with pytest.raises(ValueError, match="not today"):
        rollout.verify(repeats=1)
    assert all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- gradients


def test_checkpointed_and_offloaded_gradients():
    """What the node saved may be computed again, or lie elsewhere, when it is wanted."""
    model, given = Model(modern.LateCell(H, D)), sequence()
    rollout = made(model)
    want = grads_of(loss_of(rollout, given), model)
    assert last_backend("observe") == "native"
    embed = given[0].requires_grad_()
    for reentrant in (False, True):
        model.zero_grad()
        loss = checkpoint(
            lambda embed: loss_of(rollout, (embed, *given[1:])), embed, use_reentrant=reentrant
        )
        loss.backward()
        alike([p.grad for p in model.parameters()], want)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = loss_of(rollout, given)
    alike(grads_of(loss, model), want)


def test_gradients_twice_and_of_gradients():
    model, given = Model(modern.LateCell(H, D)), sequence()
    rollout = made(model)
    loss = loss_of(rollout, given)
    loss.backward(retain_graph=True)
    once = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    loss.backward()
    alike([p.grad for p in model.parameters()], [g if g is None else 2 * g for g in once])
    loss = loss_of(rollout, given)
    with pytest.raises(RuntimeError, match="native gradients have none of their own: choose back"):
        torch.autograd.grad(loss, model.gru.layers[0].weight, create_graph=True)
    rollout.backend = "eager"
    (grad,) = torch.autograd.grad(
        loss_of(rollout, given), model.gru.layers[0].weight, create_graph=True
    )
    assert grad.requires_grad


def test_averaged_copies_are_models_of_their_own():
    agent = nn.Module()
    agent.rssm = adapt(modern.StatsRSSM())
    averaged = AveragedModel(agent, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(agent)
    before = {name: x.clone() for name, x in agent.rssm.state_dict().items()}
    with torch.no_grad():
        for p in agent.rssm.parameters():
            p.add_(0.1)
    averaged.update_parameters(agent)
    twin = averaged.module.rssm
    for name, x in twin.state_dict().items():
        torch.testing.assert_close(x, before[name] + 0.05)
    assert agrees(twin) and agrees(agent.rssm)
    assert torch.equal(twin.rollout.initial(1).deter, torch.tanh(twin.W))


def test_one_rollout_in_several_threads():
    model, given = Model(modern.LateCell(H, D)), sequence()
    rollout = made(model)
    want = grads_of(loss_of(rollout, given), model)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: grads_of(loss_of(rollout, given), model), range(8)):
            alike(got, want)
