"""A loop and its peer share all tensors: saved, moved, loaded, replaced and copied."""

import copy
import io
from functools import partial

import modern
import peers
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastdreamer.rollout import MisfitError, Readout, Rollout, adapt
from fastdreamer.rollout.adapters.loop import agrees

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


CONVERSIONS = {
    "in place": lambda _: None,
    "overwriting": torch.__future__.set_overwrite_module_params_on_conversion,
    "swapping": torch.__future__.set_swap_module_params_on_conversion,
}


@pytest.fixture(params=CONVERSIONS)
def conversion(request):
    """How torch moves a module's parameters."""
    CONVERSIONS[request.param](True)
    yield
    CONVERSIONS[request.param](False)


def made(name):
    """A model whose episodes begin somewhere else than at zero, its loop, and where that stands."""
    kind, start = STARTS[name]
    model = kind()
    with torch.no_grad():
        getattr(model, start).normal_(0, 0.3)
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


PEERS = {name: kind for name, (kind, _) in STARTS.items()} | {
    "Gaussian": partial(modern.StatsRSSM, discrete=False),
    "dreamer-torch": modern.OldStatsRSSM,
    "r2dreamer": modern.BlocksRSSM,
    "NaturalDreamer": modern.Natural,
    "sheeprl V2": modern.SheepV2,
    "PlaNet": peers.TransitionModel,
    "scripted": peers.ScriptedTransition,
    "nonterms": peers.NontermsRSSM,
    "juliusfrost": peers.RSSMRollout,
    "bstars": partial(peers.GrusaRSSM, 0.1),
    "sheeprl V1": peers.SheepRSSMOfToday,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PEERS)
def test_no_tensor_is_kept(name):
    """After all of a peer's are others, its loop gives what it gives itself."""
    loop = adapt(PEERS[name]())
    for x in (loop, copy.deepcopy(loop)):
        other = {key: y + 0.1 * torch.randn_like(y) for key, y in x.state_dict().items()}
        x.load_state_dict(other, assign=True)
        assert agrees(x)
        x.double()
        assert x.rollout.like.dtype == torch.float64 and agrees(x)
    assert agrees(loop)


# ---------------------------------------------------------------- a start by its name


def begins(loop):
    """What an episode of the loop begins with, before its tanh."""
    return loop.rollout.initial(1).deter.detach().atanh().flatten()


def begun_later(model, start, by=0.5):
    """The model's state, its start another."""
    return {key: x + by * (key == start) for key, x in model.state_dict().items()}


@pytest.mark.parametrize("by", ["peer", "loop"])
@pytest.mark.parametrize("name", STARTS)
def test_moved_it_gives_what_its_peer_gives(name, by, conversion):
    model, loop, start = made(name)
    before = begins(loop)
    (model if by == "peer" else loop).double()
    assert in_step(loop) and getattr(model, start).dtype == torch.float64
    assert loop.rollout.initial(1).deter.dtype == torch.float64
    torch.testing.assert_close(begins(loop).float(), before)
    assert agrees(loop)  # to within rounding of float64
    (loop if by == "peer" else model).float()
    assert in_step(loop) and torch.equal(begins(loop), before) and agrees(loop)


@pytest.mark.parametrize("by", ["peer", "loop"])
@pytest.mark.parametrize("name", STARTS)
def test_what_is_loaded_is_what_it_begins_with(name, by):
    model, loop, start = made(name)
    target = model if by == "peer" else loop
    for assign in (False, True):
        other = begun_later(target, start)
        target.load_state_dict(other, assign=assign)
        assert in_step(loop)
        torch.testing.assert_close(begins(loop), other[start].flatten())
        assert agrees(loop)
    held = getattr(model, start)
    if isinstance(held, nn.Parameter):
        loop.rollout.initial(1).deter.sum().backward()
        assert held.grad.abs().sum() > 0
        assert any(p is held for p in loop.rollout.parameters())


@pytest.mark.parametrize("name", STARTS)
def test_one_call_may_have_another_start(name):
    model, loop, start = made(name)
    other, sizes = begun_later(model, start), loop.rollout.dims
    given, noise = loop.example(lambda *n: torch.randn([sizes.get(i, i) for i in n]))

    def deter(run):
        found = loop.rollout.serve(lambda: run(*given), noise)[0]
        return found["deter"] if isinstance(found, dict) else found

    before = deter(loop)
    called = deter(lambda *x: torch.func.functional_call(loop, {start: other[start]}, x))
    assert torch.equal(deter(loop), before) and not torch.equal(called, before)
    model.load_state_dict(other)
    assert torch.equal(deter(loop), called)


def reloaded(loop):
    """A loop saved as a whole."""
    file = io.BytesIO()
    torch.save(loop, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
@pytest.mark.parametrize("name", STARTS)
def test_a_copy_is_in_step_with_itself_alone(name, copied):
    model, loop, start = made(name)
    before, twin = begins(loop), copied(loop)
    assert twin.model is not model and in_step(twin) and in_step(loop)
    assert not {id(x) for x in tensors(twin).values()} & {id(x) for x in tensors(loop).values()}
    torch.testing.assert_close(begins(twin), before)
    twin.load_state_dict(begun_later(twin, start), assign=True)
    twin.model.double()
    assert in_step(twin) and agrees(twin)
    assert in_step(loop) and torch.equal(begins(loop), before) and agrees(loop)
    model.load_state_dict(begun_later(model, start, -0.5), assign=True)
    for found, moved in ((twin, 0.5), (loop, -0.5)):
        torch.testing.assert_close(begins(found).float(), before + moved)


class Half(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", STARTS)
def test_a_parametrized_start_is_computed(name):
    model, loop, start = made(name)
    before = begins(loop)
    parametrize.register_parametrization(model, start, Half())
    for same in (loop, adapt(model)):
        torch.testing.assert_close(begins(same), before / 2)
        assert agrees(same)
        found = same.rollout.verify(repeats=1)
        assert found.ok, str(found)
        held = model.parametrizations[start].original
        learns = isinstance(held, nn.Parameter)
        assert learns == any(p is held for p in same.rollout.parameters())
        assert learns == ("observe: gradient of begin.0.original" in [x.name for x in found.lines])


def test_a_start_of_one_s_own_by_its_name():
    """By module and name whatever replaces it is seen; a tensor is used as it is."""
    model = modern.StatsRSSM()
    model.register_buffer("start", torch.randn(modern.SMALL.deter))
    given = {
        "inp": model._img_in_layers, "gru": model._cell, "stoch_first": True,
        "prior": [model._img_out_layers, model._imgs_stat_layer],
        "post": [model._obs_out_layers, model._obs_stat_layer],
        "latent": adapt(model).rollout.options.latent,
    }  # fmt: skip
    by_name = Rollout.from_modules(**given, begin=(model, "start"))
    itself = Rollout.from_modules(**given, begin=model.start)
    for rollout in (by_name, itself):
        torch.testing.assert_close(rollout.initial(1).deter[0], torch.tanh(model.start))
        assert rollout.verify(repeats=1).ok
    model.double()
    torch.testing.assert_close(by_name.initial(1).deter[0], torch.tanh(model.start))
    message = r"begin: is torch.float32 on cpu, the prior torch.float64 on cpu; begin=\(module"
    with pytest.raises(MisfitError, match=message):
        itself.initial(1)
    for begin, message in [
        ((model, "begin"), "begin: StatsRSSM has no tensor 'begin'"),
        ((model, "_cell"), "begin: StatsRSSM has no tensor '_cell'"),
        (3, "begin: must be a tensor, or a module and the tensor's name there, got int"),
    ]:
        with pytest.raises(MisfitError, match=message):
            Rollout.from_modules(**given, begin=begin)


# ---------------------------------------------------------------- bins of heads


class TwoHot(nn.Module):
    """A head whose bins learn."""

    def __init__(self):
        super().__init__()
        sizes = modern.SMALL
        self.layers = nn.Linear(sizes.stoch + sizes.deter, 9)
        self.bins = nn.Parameter(torch.linspace(-2, 2, 9))


def test_bins_that_learn_are_read_by_their_name():
    """Parameters of the loops like any others: verified, and seen where they are replaced."""
    model, actor = modern.StatsRSSM(), modern.StatsMLP(outputs=modern.SMALL.action, dist="normal")
    reward, critic = TwoHot(), TwoHot()
    rollout = adapt(
        model, actor=actor, reward=reward.layers, critic=critic.layers,
        reward_as=Readout((reward, "bins")), value_as=Readout((critic, "bins"), squashed=True),
    ).rollout  # fmt: skip
    rollout.batch_first = False
    found = rollout.verify(repeats=1)
    assert found.ok, str(found)
    names = [line.name for line in found.lines]
    for head in (reward, critic):
        assert any(p is head.bins for p in rollout.parameters())
        which = "reward" if head is reward else "value"
        assert f"imagine: gradient of {which}_bins.0.value" in names
    start = rollout.initial(3)
    noises = {"state_noise": torch.rand(5, 3, modern.SMALL.latents)}
    noises["action_noise"] = torch.randn(5, 3, modern.SMALL.action)
    before = rollout.imagine(start, **noises)
    for head in (reward, critic):
        state = {key: x + (key == "bins") for key, x in head.state_dict().items()}
        head.load_state_dict(state, assign=True)
    after = rollout.imagine(start, **noises)
    torch.testing.assert_close(after.reward, before.reward + 1)
    after.value.sum().backward()
    assert critic.bins.grad.abs().sum() > 0 and reward.bins.grad is None
    wrong = {"reward_as": Readout((reward, "bin"))}
    with pytest.raises(MisfitError, match="reward_bins: TwoHot has no tensor 'bin'"):
        adapt(model, reward=reward.layers, **wrong)


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_parametrized_norms_are_computed(norm):
    """Whether they were so when they were read, or became so since."""
    model = modern.StatsRSSM()
    prior = nn.Sequential(*modern.normed(modern.SMALL.deter, 10, norm=norm), model._imgs_stat_layer)
    given = {"inp": model._img_in_layers, "gru": model._cell, "prior": prior, "stoch_first": True}
    given["latent"] = adapt(model).rollout.options.latent
    before = Rollout.from_modules(**given)
    for name, _ in list(prior[1].named_parameters()):
        with torch.no_grad():
            getattr(prior[1], name).normal_()
        parametrize.register_parametrization(prior[1], name, Half())
    deter = torch.randn(3, modern.SMALL.deter).tanh()
    for rollout in (before, Rollout.from_modules(**given)):
        torch.testing.assert_close(rollout.prior(deter).logits.flatten(1), prior(deter))
        found = rollout.verify(repeats=1)
        assert found.ok, str(found)
