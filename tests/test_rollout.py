"""``fastdreamer.rollout`` against the caller's own loop: values, gradients, refusals."""

import copy
import io

import pytest
import torch
from torch import nn

from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.params import State
from fastdreamer.rollout import MisfitError, Rollout, StdTransform

A, D, S, E, H = 2, 12, 3, 5, 10


def stack(*widths, act=nn.ELU, last=False):
    layers = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class Model(nn.Module):
    """A Dreamer as somebody might write it."""

    def __init__(self, act=nn.ELU, gru=nn.GRUCell):
        super().__init__()
        self.inp = stack(S + A, H, act=act, last=True)
        self.gru = gru(H, D)
        self.prior, self.post = stack(D, H, 2 * S, act=act), stack(D + E, H, H, 2 * S, act=act)
        self.actor = stack(D + S, H, H, 2 * A, act=act)
        self.reward, self.critic = stack(D + S, H, 1, act=act), stack(D + S, H, H, 1, act=act)
        self.discount = stack(D + S, H, 1, act=act)

    def parts(self):
        return dict(self.named_children())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def make(model, **options):
    return Rollout.from_modules(**model.parts(), backend="native", **options)


@pytest.mark.parametrize("act", [nn.ELU, nn.ReLU, nn.SiLU, nn.Tanh])
@pytest.mark.parametrize("gru", [nn.GRUCell, nn.GRU])
def test_agrees_with_the_own_loop(act, gru):
    torch.manual_seed(1)
    rollout = make(Model(act, gru))
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)
    assert last_backend("imagine") == last_backend("observe") == "native"
    names = [line.name for line in found.lines]
    assert "imagine: gradient of actor.0.weight" in names and "imagine: returns" in names
    assert "agrees" in str(found) and "DOES NOT" not in str(found)


@pytest.mark.parametrize(
    "options",
    [
        {"action_first": True, "embed_first": True, "stoch_first": True},
        {"through_feat": True, "mean_scale": float("inf"), "action_std": StdTransform("exp")},
        {"std": StdTransform("sigmoid", scale=2, slope=0.5, min=0.1), "reset": "stoch"},
        {"std": StdTransform(floor=0.1), "reset": "deter", "batch_first": True},
        {"reset": "state", "gamma": 0.9, "lam": 0.5, "batch_first": True},
    ],
)
def test_variants_agree(model, options):
    found = make(model, **options).verify(repeats=1)
    assert found.ok, str(found)


def test_verify_sees_a_wrong_reading(model):
    rollout = make(model)
    rollout.nets["prior"].given = stack(D, H, 2 * S)  # the caller's loop is another
    found = rollout.verify(repeats=1)
    assert not found.ok and "DOES NOT AGREE" in str(found)
    with pytest.raises(ValueError, match="batch has frames"):
        rollout.verify({"frames": torch.zeros(1)})


def batch(T=6, B=4):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    first = torch.zeros(T, B, dtype=torch.bool)
    first[3, 1] = True
    return draw(T, B, E), draw(T, B, A).tanh(), first, (draw(B, D), draw(B, S)), draw(T, B, S)


def test_layouts_agree(model):
    embed, action, first, start, noise = batch()
    seen = make(model).observe(embed, action, first, start, noise)
    turn = lambda x: x.transpose(0, 1)  # noqa: E731
    other = make(model, batch_first=True)
    turned = other.observe(*map(turn, (embed, action, first)), start, turn(noise))
    assert torch.equal(turn(turned.state.stoch), seen.state.stoch)
    assert torch.equal(turn(turned.prior.std), seen.prior.std)
    states = make(model).open_loop(start, action, noise)
    again = other.open_loop(start, turn(action), turn(noise))
    assert torch.equal(turn(again.stoch), states.stoch)
    noises = {"state_noise": noise, "action_noise": action}
    dream = make(model).imagine(start, **noises)
    turned = other.imagine(start, **{k: turn(v) for k, v in noises.items()})
    assert torch.equal(turn(turned.returns), dream.returns)
    assert turned.deter.shape == (4, 6, D)


def test_steps_make_an_open_loop(model):
    _, action, _, start, noise = batch()
    rollout = make(model)
    whole, state = rollout.open_loop(start, action, noise), State(*start)
    for t in range(len(action)):
        state, prior = rollout.step(state, action[t], noise[t])
    torch.testing.assert_close(state.stoch, whole.stoch[-1])
    torch.testing.assert_close(prior.mean, rollout.prior(state.deter).mean)


def test_noise_is_drawn_from_the_generator(model):
    rollout, start = make(model), (torch.zeros(4, D), torch.zeros(4, S))
    dreams = [
        rollout.imagine(start, 5, generator=torch.Generator().manual_seed(seed)).stoch
        for seed in (0, 0, 1)
    ]
    assert torch.equal(dreams[0], dreams[1]) and not torch.equal(dreams[0], dreams[2])
    assert rollout.imagine(start, 5, returns=False).returns is None
    with pytest.raises(ValueError, match="horizon or noise"):
        rollout.imagine(start)


def test_plans(model):
    plan = make(model, batch_first=True).plan(
        rollout_start := (torch.zeros(2, D), torch.zeros(2, S)), 4, num_samples=30, num_elites=5,
        iterations=3, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert plan.mean.shape == (2, 4, A) and last_backend("cem") == "native"
    assert plan.scores[-1].mean() > plan.scores[0].mean()
    parts = model.parts()
    del parts["critic"], parts["discount"]
    by_reward = Rollout.from_modules(**parts).plan(
        rollout_start, 4, num_samples=9, num_elites=2, iterations=1
    )
    assert by_reward.mean.shape == (4, 2, A)


def loss_of(rollout, given):
    seen = rollout.observe(*given)
    return seen.state.stoch.square().mean() + seen.prior.mean.square().mean()


def test_parameters_are_the_caller_s(model):
    """An optimiser's step, load_state_dict and .to() change what the next call computes."""
    rollout, given = make(model), batch()
    assert {id(p) for p in rollout.parameters()} == {id(p) for p in model.parameters()}
    saved, optimizer = copy.deepcopy(model.state_dict()), torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(rollout, given)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    fresh = Rollout.from_modules(**copy.deepcopy(model).parts(), backend="eager")
    torch.testing.assert_close(loss_of(rollout, given), loss_of(fresh, given))
    for assign in (False, True):
        model.load_state_dict(saved, assign=assign)
        assert float(loss_of(rollout, given)) == losses[0]


def test_double_is_right_or_refused(model):
    given, rollout = batch(), Rollout.from_modules(**model.parts())
    want = loss_of(rollout, given)
    assert last_backend("observe") == "native"
    model.double()
    wide = [x.double() if x.is_floating_point() else x for x in (*given[:3], *given[3], given[4])]
    wide = (*wide[:3], tuple(wide[3:5]), wide[5])
    got = loss_of(rollout, wide)
    assert got.dtype == torch.float64 and last_backend("observe") == "eager"
    torch.testing.assert_close(got.float(), want)
    with pytest.raises(BackendError, match="float64, native needs float32"):
        loss_of(make(model), wide)
    with pytest.raises(ValueError, match="float64"):
        loss_of(rollout, given)


def test_autocast_is_native_bfloat16(model):
    given, rollout = batch(), make(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = rollout.observe(*given)
    high = rollout.observe(*given)
    assert low.state.stoch.dtype == torch.float32
    assert not torch.equal(low.state.stoch, high.state.stoch)
    torch.testing.assert_close(low.state.stoch, high.state.stoch, atol=0.1, rtol=0.1)


def test_frozen_parts_and_shared_weights(model):
    for p in model.prior.parameters():
        p.requires_grad_(False)
    model.post[4] = nn.Linear(H, 2 * S)
    model.reward = model.critic  # one module, two heads
    rollout = make(model)
    assert rollout.verify(repeats=1).ok
    loss_of(rollout, batch()).backward()
    assert all(p.grad is None for p in model.prior.parameters())
    assert model.inp[0].weight.grad.abs().sum() > 0


def test_two_rollouts_over_one_module(model):
    given, both = batch(), (make(model), make(model, batch_first=False, reset="state"))
    for rollout in both:
        loss_of(rollout, given).backward()
    twice = model.gru.weight_hh.grad.clone()
    model.zero_grad()
    loss_of(both[0], given).backward()
    loss_of(both[1], given).backward()
    torch.testing.assert_close(model.gru.weight_hh.grad, twice)


def test_parametrized_weights(model):
    nn.utils.parametrizations.weight_norm(model.prior[0])
    rollout = make(model)
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)
    before = rollout.prior(torch.ones(1, D)).mean
    with torch.no_grad():
        model.prior[0].parametrizations.weight.original0.mul_(2)
    assert not torch.equal(rollout.prior(torch.ones(1, D)).mean, before)


def test_under_compile(model):
    rollout, (embed, action, first, start, noise) = make(model), batch()

    def around(embed):
        seen = rollout.observe(torch.tanh(embed) * 2, action, first, start, noise)
        return seen.state.stoch.square().mean()

    compiled = torch.compile(around, backend="aot_eager")
    for _ in range(2):
        grads = []
        for run in (around, compiled):
            model.zero_grad()
            x = embed.clone().requires_grad_()
            run(x).backward()
            grads.append((x.grad, model.gru.weight_ih.grad.clone()))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            model.gru.weight_ih.mul_(1.1)


def test_saves_nothing_of_its_own(model):
    make(model)
    torch.save(model.state_dict(), io.BytesIO())
    assert not any("rollout" in name for name in model.state_dict())


# ---------------------------------------------------------------- refusals


class OwnGRU(nn.Module):
    pass


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gru": OwnGRU()}, r"gru: OwnGRU\(\) is no torch.nn GRU.*nn.GRUCell, or nn.GRU"),
        ({"gru": nn.LSTMCell(H, D)}, "gru: LSTMCell"),
        ({"gru": nn.GRU(H, D, num_layers=2)}, "more layers or directions than one"),
        ({"gru": nn.GRUCell(H, D, bias=False)}, "has no bias"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.ELU(), nn.Linear(H, 6))},
         r"prior\[1\]: LayerNorm.*has no fast loop; Linear layers with bias"),
        ({"post": nn.Sequential(nn.Linear(D + E, H), nn.Dropout(0.1), nn.Linear(H, 6))},
         r"post\[1\]: Dropout"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.ELU(0.5), nn.Linear(H, 6))}, "alpha=0.5"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.ELU(), nn.Linear(H, 6), nn.ELU())},
         "'LaLa', but one activation must stand between each two layers and none behind"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.ELU(), nn.Linear(H, H), nn.ReLU(),
                                 nn.Linear(H, 6))}, "several activations, elu, relu"),
        ({"inp": nn.Linear(S + A, H)}, "inp: no activation follows its layers; name it"),
        ({"inp": nn.Sequential(nn.LazyLinear(H), nn.ELU())}, "LazyLinear has no weights yet"),
        ({"prior": nn.Linear(D, 2 * S, bias=False)}, "prior: Linear has no bias"),
        ({"prior": nn.Linear(D, 32 * 32)}, "inp: takes 5 inputs.*are the latents categorical"),
        ({"prior": nn.Linear(D, 5)}, "prior: has 5 outputs.*categorical"),
        ({"actor": stack(D + S, H, A)}, "actor: must map 15 to 4 .*, got 15 to 2"),
        ({"reward": stack(D + S, H, 255)}, "reward: must map 15 to 1"),
        ({"post": OwnSequential(nn.Linear(D + E, 2 * S))}, r"forward\(\) of its own"),
        ({"post": 3}, "post: must be modules, got int"),
        ({"activation": "gelu"}, "activation must be one of elu, relu, silu, tanh, got 'gelu'"),
        ({"std": StdTransform("abs")}, "std: kind must be one of softplus, sigmoid, exp"),
        ({"mean_scale": 0.0}, "mean_scale must be positive"),
        ({"reset": "belief"}, "reset must be one of all, state, stoch, deter"),
    ],
)  # fmt: skip
def test_refusals_name_the_module_and_the_reason(model, changes, message):
    with pytest.raises(MisfitError, match=message):
        Rollout.from_modules(**model.parts() | changes)


def test_missing_parts_and_hooks(model):
    parts = model.parts()
    bare = Rollout.from_modules(**{k: parts[k] for k in ("inp", "gru", "prior")})
    start = (torch.zeros(1, D), torch.zeros(1, S))
    for call, name in [
        (lambda: bare.imagine(start, 2), "imagine needs actor"),
        (lambda: bare.plan(start, 2), "needs reward"),
        (lambda: bare.observe(torch.zeros(2, 1, E), torch.zeros(2, 1, A)), "observe needs post"),
    ]:
        with pytest.raises(MisfitError, match=name):
            call()
    assert bare.verify(repeats=1).ok
    model.prior[0].register_forward_hook(lambda *_: None)
    with pytest.raises(MisfitError, match=r"prior\[0\]: Linear.* has forward hooks"):
        make(model)
