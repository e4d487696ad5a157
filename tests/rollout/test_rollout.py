"""``fastdreamer.rollout`` against the caller's own loop: values, gradients, refusals."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.params import State
from fastdreamer.rollout import Categorical, MisfitError, Rollout, StdTransform
from fastdreamer.rollout.draws import with_noise

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
        {"pairing": "departure", "stoch_first": True},
    ],
)
def test_variants_agree(model, options):
    found = make(model, **options).verify(repeats=1)
    assert found.ok, str(found)


def test_verify_times_what_training_does(model):
    """Weights have changed before each timed call."""
    packs = pytest.importorskip("fastdreamer.ops.native.packs")
    rollout = make(model)
    before = packs.counts()["packed"]
    rollout.verify(repeats=1)
    once = packs.counts()["packed"] - before
    rollout.verify(repeats=4)
    again = packs.counts()["packed"] - before - once
    assert again >= once + 3, (once, again)


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


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gru": OwnGRU()}, r"gru: OwnGRU\(\) is no GRU that is known here; nn.GRUCell or nn.GRU"),
        ({"gru": nn.LSTMCell(H, D)}, "gru: LSTMCell"),
        ({"gru": nn.GRU(H, D, num_layers=2)}, "more layers or directions than one"),
        ({"gru": nn.GRUCell(H, D, bias=False)}, "has no bias"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.ELU(), nn.Linear(H, 6))},
         r"prior\[1\]: BatchNorm1d.*has no fast loop; Linear layers, LayerNorm or RMSNorm"),
        ({"post": nn.Sequential(nn.Linear(D + E, H), nn.Dropout(0.1), nn.Linear(H, 6))},
         r"post\[1\]: Dropout"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.ELU(0.5), nn.Linear(H, 6))}, "alpha=0.5"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.ELU(), nn.Linear(H, 6), nn.ELU())},
         "'LaLa', but one activation must stand between each two layers and none behind the last"),
        ({"prior": nn.Sequential(nn.Linear(D, H), nn.ELU(), nn.Linear(H, H), nn.ReLU(),
                                 nn.Linear(H, 6))}, "several activations, elu, relu"),
        ({"inp": nn.Linear(S + A, H)}, "inp: no activation follows its layers; name it"),
        ({"inp": nn.Sequential(nn.LazyLinear(H), nn.ELU())}, "LazyLinear has no weights yet"),
        ({"prior": nn.Linear(D, 32 * 32), "post": None, "actor": None, "reward": None,
          "critic": None, "discount": None}, "inp: takes 5 inputs.*are the latents categorical"),
        ({"prior": nn.Linear(D, 5)}, "prior: has 5 outputs.*categorical"),
        ({"actor": stack(D + S, H, A)}, "actor: must map 15 to 4 .*, got 15 to 2"),
        ({"reward": stack(D + S, H, 255)}, "reward: must map 15 to 1"),
        ({"post": OwnSequential(nn.Linear(D + E, 2 * S))}, r"forward\(\) of its own"),
        ({"post": 3}, "post: must be modules, got int"),
        ({"activation": "selu"}, "activation must be one of elu, relu, silu, tanh, gelu, .*'selu'"),
        ({"std": StdTransform("abs")}, "std: kind must be one of softplus, sigmoid, exp"),
        ({"mean_scale": 0.0}, "mean_scale must be positive"),
        ({"reset": "belief"}, "reset must be one of all, state, stoch, deter"),
        ({"pairing": "state"}, "pairing must be one of arrival, departure"),
        ({"action_dim": 3}, r"a state of 3 \(half of the prior's outputs\) and an action of 3 do"),
        ({"post": nn.Sequential(OwnLinear(H, 6))}, r"OwnLinear.*has a forward\(\) of its own"),
    ],
)  # fmt: skip
def test_refusals_name_the_module_and_the_reason(model, changes, message):
    with pytest.raises(MisfitError, match=message):
        Rollout.from_modules(**model.parts() | changes)


@pytest.mark.parametrize("inp", [None, nn.Sequential(nn.Linear(9, 20), nn.Dropout(), nn.ELU())])
def test_input_layers_that_are_not_there_are_not_judged(inp):
    """By the inputs of the cell behind them, which hold no action."""
    with pytest.raises(MisfitError) as raised:
        Rollout.from_modules(inp=inp, gru=nn.GRUCell(20, 8), prior=nn.Linear(8, 6))
    (line,) = str(raised.value).splitlines()
    assert line.startswith("inp: must be given" if inp is None else "inp")


def test_missing_parts(model):
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
    for given in ({"own": len}, {"own_dream": len}):
        with pytest.raises(
            ValueError, match="made without the layers that (observe|imagine) needs"
        ):
            bare.verify(repeats=1, **given)


def test_all_that_does_not_fit_is_named_at_once(model):
    changes = {
        "gru": nn.Sequential(nn.Linear(2 * H, 3 * D, bias=False), nn.LayerNorm(3 * D)),
        "prior": nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Softplus(), nn.Linear(H, 6)),
        "reset": "belief",
    }  # fmt: skip
    with pytest.raises(MisfitError) as raised:
        Rollout.from_modules(**model.parts() | changes)
    lines = str(raised.value).split("\n")
    for line, start in zip(
        lines,
        ["gru: Sequential of Linear(in_features=20, out_features=36, bias=False), LayerNorm",
         "prior[1]: BatchNorm1d", "prior[2]: Softplus", "reset must be"],
        strict=True,
    ):  # fmt: skip
        assert line.startswith(start)


@pytest.mark.parametrize("name", ["actor", "reward", "discount", None])
def test_categorical_latents_never_pass_for_gaussian(name):
    """C·K logits, and a GRU of torch: halves of them would make a mean and a std."""
    Z = 16
    parts = {"inp": stack(Z + A, H, last=True), "gru": nn.GRUCell(H, D), "prior": stack(D, H, Z),
             "post": stack(D + E, H, Z)}  # fmt: skip
    if name is None:
        both = "latents of 8 with actions of 10 and categorical latents of 16 classes in all with"
        with pytest.raises(MisfitError, match=f"{both} actions of 2; say action_dim="):
            Rollout.from_modules(**parts)
        with pytest.raises(MisfitError, match="its 16 outputs are the logits of categorical"):
            Rollout.from_modules(**parts, action_dim=A)
        gaussian = Rollout.from_modules(**parts, action_dim=10)
        assert gaussian.dims == {"D": D, "S": 8, "A": 10, "E": E} and gaussian.verify(repeats=1).ok
        return
    head = stack(D + Z, H, 2 * A if name == "actor" else 1)
    with pytest.raises(
        MisfitError, match=f"16 outputs are the logits of categorical.*{name} takes"
    ):
        Rollout.from_modules(**parts, **{name: head})


class Categoricals(nn.Module):
    """C categoricals of K classes after tanh layers, 1 % uniform, drawn by their distribution."""

    C, K = 3, 4

    def __init__(self):
        super().__init__()
        Z = self.C * self.K
        self.inp, self.gru = stack(Z + A, H, act=nn.Tanh, last=True), nn.GRUCell(H, D)
        self.prior = stack(D, H, H, Z, act=nn.Tanh)
        self.post = stack(D + E, H, H, Z, act=nn.Tanh)
        self.actor = stack(D + Z, H, 2 * A, act=nn.Tanh)
        self.reward, self.critic = stack(D + Z, H, 1, act=nn.Tanh), stack(D + Z, H, 1, act=nn.Tanh)

    def sample(self, logits):
        logits = logits.unflatten(-1, (self.C, self.K))
        probs = 0.99 * logits.softmax(-1) + 0.01 / self.K
        drawn = torch.distributions.OneHotCategoricalStraightThrough(probs=probs).rsample()
        return drawn.flatten(-2), logits

    def filter(self, embed, action, is_first, start):
        (deter, stoch), out = start, []
        for t in range(embed.shape[1]):
            keep = 1 - is_first[:, t, None].float()
            x = torch.cat([stoch * keep, action[:, t] * keep], -1)
            deter = self.gru(self.inp(x), deter * keep)
            _, prior = self.sample(self.prior(deter))
            stoch, post = self.sample(self.post(torch.cat([deter, embed[:, t]], -1)))
            out.append((deter, stoch, post, prior))
        names = ("deter", "stoch", "post_logits", "prior_logits")
        return dict(zip(names, (torch.stack(x, 1) for x in zip(*out, strict=True)), strict=True))


@pytest.mark.parametrize("gumbel", [False, True])
def test_a_policy_of_one_hot_actions_draws_its_own_noise(gumbel):
    torch.manual_seed(0)
    parts = dict(Categoricals().named_children())
    parts["actor"] = nn.Linear(D + parts["post"][-1].out_features, A)
    how = {"latent": Categorical(Categoricals.K), "action_std": Categorical(A, gumbel=gumbel)}
    rollout = Rollout.from_modules(**parts, **how)
    dream = rollout.imagine(rollout.initial(2), 6)
    assert torch.equal(dream.action.detach().sort(-1).values[..., -1], torch.ones(6, 2))
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)


def test_categorical_latents():
    """All loops, against a filter that draws its classes itself."""
    torch.manual_seed(0)
    model = Categoricals()
    C, K = model.C, model.K
    parts = dict(model.named_children())
    rollout = Rollout.from_modules(**parts, latent=Categorical(K, 0.01), batch_first=True)
    assert rollout.dims == {"D": D, "S": C * K, "C": C, "A": A, "E": E}
    found = rollout.verify(own=model.filter, repeats=1)
    assert found.ok, str(found)
    assert "your observe: gradient of post.2.weight" in [line.name for line in found.lines]
    start = rollout.initial(2)
    seen = rollout.observe(torch.randn(2, 5, E), torch.randn(2, 5, A))
    assert seen.post.logits.shape == seen.prior.probs.shape == (2, 5, C, K)
    assert torch.equal(seen.state.stoch.detach().unflatten(-1, (C, K)).sum(-1), torch.ones(2, 5, C))
    assert rollout.imagine(start, 6).returns.shape == (2, 6)
    state, prior = rollout.step(start, torch.zeros(2, A))
    torch.testing.assert_close(prior.logits, rollout.prior(state.deter).logits)
    assert rollout.open_loop(start, torch.zeros(2, 4, A)).stoch.shape == (2, 4, C * K)
    assert rollout.plan(start, 3, num_samples=8, num_elites=2, iterations=1).mean.shape == (2, 3, A)
    given = torch.ones(2, 5, E), torch.ones(2, 5, A)
    seeded = lambda: torch.Generator().manual_seed(4)  # noqa: E731
    same = [rollout.observe(*given, generator=seeded()).state.stoch for _ in range(2)]
    assert torch.equal(*same)
    wrong = Rollout.from_modules(**parts, latent=Categorical(K), batch_first=True)
    assert wrong.verify(repeats=1).ok and not wrong.verify(own=model.filter, repeats=1).ok
    native = Rollout.from_modules(**parts, latent=Categorical(K, 0.01), backend="native")
    assert native.verify(repeats=1).ok and last_backend("observe") == "native"
    for latent, message in [
        (Categorical(5), "12 outputs make no categoricals of 5 classes"),
        (Categorical(K, 1.0), "1.0 of them uniform"),
    ]:
        with pytest.raises(MisfitError, match=message):
            Rollout.from_modules(**parts, latent=latent)
    with pytest.raises(MisfitError, match="actor: must map 24 to 4 .D=12, S=12, A=2., got 15 to 4"):
        Rollout.from_modules(**parts | {"actor": stack(D + S, H, 2 * A)}, latent=Categorical(K))
    with pytest.raises(MisfitError, match="actor takes 24 features.*say latent=Categorical"):
        Rollout.from_modules(**parts)


def nothing(*_):
    pass


HOOKS = {
    "forward hooks": lambda m: m.register_forward_hook(nothing),
    "forward pre-hooks": lambda m: m.register_forward_pre_hook(nothing),
    "backward hooks": lambda m: m.register_full_backward_hook(nothing),
    "backward pre-hooks": lambda m: m.register_full_backward_pre_hook(nothing),
    "global forward hooks": lambda _: module_hooks.register_module_forward_hook(nothing),
    "global forward pre-hooks": lambda _: module_hooks.register_module_forward_pre_hook(nothing),
    "global backward hooks": lambda _: module_hooks.register_module_full_backward_hook(nothing),
    "global backward pre-hooks": lambda _: module_hooks.register_module_full_backward_pre_hook(
        nothing
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_refused(model, kind):
    """Before the modules are read, and after; of layers, activations, containers and cells."""
    rollout, given = make(model), batch()
    for module in (model.prior[0], model.inp[1], model.post, model.gru):
        handle = HOOKS[kind](module)
        for call in (lambda: make(model), lambda: rollout.observe(*given)):
            with pytest.raises(MisfitError, match=f"has {kind}, which would not run"):
                call()
        handle.remove()
        rollout.observe(*given)


def test_compiled_modules_are_read_through(model):
    given, want = batch(), make(model)
    parts = {name: torch.compile(part, backend="eager") for name, part in model.parts().items()}
    rollout = Rollout.from_modules(**parts, backend="native")
    assert torch.equal(rollout.observe(*given).state.stoch, want.observe(*given).state.stoch)
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)
    parts["prior"].register_forward_hook(nothing)
    with pytest.raises(MisfitError, match="prior: OptimizedModule.*has forward hooks"):
        rollout.observe(*given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("gru", [nn.GRUCell, nn.GRU])
def test_scripted_modules_are_read_through(gru):
    """Parameters are the scripts': of whole stacks, and of layers with functions between them."""
    model, given = Model(gru=gru), batch()
    scripted = {name: torch.jit.script(part) for name, part in model.parts().items()}
    rollout = Rollout.from_modules(**scripted, backend="native")
    assert torch.equal(rollout.observe(*given).state.stoch, make(model).observe(*given).state.stoch)
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)
    loss_of(rollout, given).backward()
    weight = dict(scripted["gru"].named_parameters())
    assert weight["weight_hh" if gru is nn.GRUCell else "weight_hh_l0"].grad.abs().sum() > 0
    layers = [torch.jit.script(layer) for layer in model.prior if isinstance(layer, nn.Linear)]
    by_layer = Rollout.from_modules(**scripted | {"prior": layers}, activation="elu")
    assert by_layer.verify(repeats=1).ok
    with pytest.raises(MisfitError, match="prior: .*Scripted.* has no fast loop"):
        Rollout.from_modules(**scripted | {"prior": torch.jit.script(Scripted())})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_that_stand_in_several_places(model):
    """One activation behind all layers, as many have it; a layer twice, which gets the sum."""
    act, layer = nn.ELU(), nn.Linear(H, H)
    model.inp = nn.Sequential(nn.Linear(S + A, H), act, nn.Linear(H, H), act)
    model.post = nn.Sequential(nn.Linear(D + E, H), act, layer, act, layer, act, nn.Linear(H, 6))
    for scripted in (False, True):
        parts = model.parts() | ({"post": torch.jit.script(model.post)} if scripted else {})
        rollout = Rollout.from_modules(**parts, backend="native")
        assert len(rollout.rssm.post.weights) == 4
        found = rollout.verify(repeats=1)
        assert found.ok, str(found)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6, D)), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias).abs()


def test_pairing_of_rewards(model):
    """r(s_{t+1}) + γ v(s_{t+1}), or r(s_t) + γ v(s_{t+1}), in imagination and in plans."""
    start, noises = (
        (torch.randn(4, D).tanh(), torch.randn(4, S)),
        (torch.randn(6, 4, S), torch.randn(6, 4, A)),
    )
    del model.discount
    found = {}
    for pairing in ("arrival", "departure"):
        rollout = Rollout.from_modules(**model.parts(), pairing=pairing)
        dream = rollout.imagine(start, state_noise=noises[0], action_noise=noises[1])
        assert last_backend("imagine") == "native"
        states = [torch.cat([x[None], y]) for x, y in zip(start, dream[:2], strict=True)]
        feat = torch.cat(states, -1)
        reward, value = (net(feat).squeeze(-1) for net in (model.reward, model.critic))
        paid = reward[1:] if pairing == "arrival" else reward[:-1]
        want = lambda_return(paid, value[1:], torch.full_like(paid, 0.99), 0.95, backend="eager")
        torch.testing.assert_close(dream.returns, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dream.reward, paid, rtol=1e-4, atol=1e-5)
        plan = rollout.plan(start, 3, num_samples=20, num_elites=4, iterations=2,
                            generator=torch.Generator().manual_seed(0))  # fmt: skip
        found[pairing] = plan.scores[0]
    assert not torch.allclose(*found.values(), rtol=1e-2)


def test_plans_from_a_given_mean_within_given_bounds(model):
    rollout, start = make(model, batch_first=True), (torch.zeros(2, D), torch.zeros(2, S))
    mean = torch.linspace(-2, 2, 2 * 4 * A).view(2, 4, A)
    given = {"num_samples": 8, "num_elites": 8, "iterations": 1}
    plan = rollout.plan(start, mean=mean, init_std=1e-6, clip=1.5, **given)
    torch.testing.assert_close(plan.mean, mean.clamp(-1.5, 1.5), atol=1e-4, rtol=0)
    assert torch.equal(rollout.plan(start, 4, mean=mean, iterations=0).mean, mean)
    with pytest.raises(ValueError, match="horizon or mean must be given"):
        rollout.plan(start)
    with pytest.raises(ValueError, match="horizon is 3, mean has 4 steps"):
        rollout.plan(start, 3, mean=mean)


# ---------------------------------------------------------------- the caller's own function


def own_filter(model, turned=False, least=0.1):
    """As the caller's code has it: prior and posterior drawn at each step."""

    def sample(raw):
        mean, std = raw.chunk(2, -1)
        return torch.distributions.Normal(mean, torch.nn.functional.softplus(std) + least)

    def run(embed, action, is_first, start):
        (deter, stoch), out = start, []
        for t in range(len(action)):
            keep = (~is_first[t, :, None]).float()
            x = torch.cat([stoch * keep, action[t] * keep], -1)
            deter = model.gru(model.inp(x), deter * keep)
            prior = sample(model.prior(deter))
            prior.rsample()
            parts = (embed[t], deter) if turned else (deter, embed[t])
            post = sample(model.post(torch.cat(parts, -1)))
            stoch = post.rsample()
            out.append((deter, stoch, post.mean, post.stddev, prior.mean))
        names = ("deter", "stoch", "post_mean", "post_std", "prior_mean")
        return dict(zip(names, map(torch.stack, zip(*out, strict=True)), strict=True))

    return run


def own_dream(model, scale=5.0):
    def run(start, horizon):
        (deter, stoch), out = start, []
        for _ in range(horizon):
            mean, std = model.actor(torch.cat([deter, stoch], -1).detach()).chunk(2, -1)
            std = torch.nn.functional.softplus(std + 5.0) + 1e-4
            action = scale * torch.tanh(mean / scale) + std * torch.randn(std.shape)
            deter = model.gru(model.inp(torch.cat([stoch, action.tanh()], -1)), deter)
            mean, std = model.prior(deter).chunk(2, -1)
            std = torch.nn.functional.softplus(std) + 0.1
            stoch = torch.normal(torch.zeros_like(mean), 1.0) * std + mean
            out.append((deter, stoch, action.tanh()))
        return dict(zip(("deter", "stoch", "action"), map(torch.stack, zip(*out, strict=True)),
                        strict=True))  # fmt: skip

    return run


def test_verify_runs_the_caller_s_own_function(model):
    torch.manual_seed(7)
    found = make(model).verify(own=own_filter(model), own_dream=own_dream(model), repeats=1)
    assert found.ok, str(found)
    names = {line.name for line in found.lines}
    assert (
        "your observe: post_mean" in names and "your imagine: gradient of actor.0.weight" in names
    )
    assert torch.equal(torch.rand(1), torch.manual_seed(7) and torch.rand(1))  # none was drawn


def test_verify_sees_the_mistakes_that_its_own_loop_cannot(model):
    """Order, lag, reset and constants: the loops agree, the caller's function does not."""
    with torch.no_grad():
        model.actor[-1].weight.mul_(20)  # means that the bound reaches
    same_size = Rollout.from_modules(
        **model.parts() | {"post": stack(2 * D, H, 2 * S)}, embed_first=True
    )
    wrong = [
        (
            same_size,
            {"own": own_filter(same_size_model(model, same_size))},
            "your observe: post_mean",
        ),
        (
            make(model, std=StdTransform(min=0.2)),
            {"own": own_filter(model)},
            "your observe: post_std",
        ),
        (make(model, reset="stoch"), {"own": own_filter(model)}, "your observe: deter"),
        (make(model, mean_scale=1.0), {"own_dream": own_dream(model)}, "your imagine: action"),
    ]
    for rollout, given, name in wrong:
        assert rollout.verify(repeats=1).ok
        found = rollout.verify(repeats=1, **given)
        assert not found.ok
        assert name in [line.name for line in found.lines if not line.ok]


def same_size_model(model, rollout):
    """The model with the Rollout's posterior."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules, post=rollout.nets["post"].given)
    return twin


def test_verify_says_what_is_wrong_with_the_function(model):
    rollout = make(model)
    with pytest.raises(ValueError, match="the own observe returned belief"):
        rollout.verify(own=lambda *_: {"belief": torch.zeros(20, 8, S)}, repeats=1)
    for draw, message in [
        (lambda: torch.rand(8, S), "drew by aten.rand, which has no noise here"),
        (lambda: torch.randn(8, 7), r"drew \[8, 7\] numbers, but has noise for \[20, 8, 3\]"),
        (lambda: [torch.randn(8, S) for _ in range(3)], "drew 3 times 3 numbers.*multiple of 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            rollout.verify(own=lambda *_, draw=draw: {"stoch": draw()}, repeats=1)


def test_noise_by_every_name():
    """Served alike to single steps, to several draws a step and to the whole at once."""
    noise = torch.randn(4, 3, 2)
    normal = torch.distributions.Normal(torch.ones(3, 2), 2.0)
    for draw in (
        lambda: [torch.randn(3, 2) for _ in range(4)],
        lambda: [torch.randn_like(torch.ones(1, 3, 2))[0] for _ in range(4)],
        lambda: [torch.empty(3, 2).normal_() for _ in range(4)],
        lambda: [(torch.randn(3, 2), torch.normal(torch.zeros(3, 2), 1.0))[1] for _ in range(4)],
        lambda: [(normal.rsample() - 1) / 2 for _ in range(4)],
        lambda: torch.randn(4, 3, 2).unbind(0),
        lambda: torch.randn(3, 4, 2).unbind(1),
    ):
        torch.testing.assert_close(torch.stack(list(with_noise(draw, noise))), noise)
    both = noise, torch.randn(4, 3, 2)  # of one size they take turns
    drawn = with_noise(lambda: [torch.randn(3, 2) for _ in range(8)], *both)
    assert torch.equal(torch.stack(drawn), torch.stack(both, 1).flatten(0, 1))
