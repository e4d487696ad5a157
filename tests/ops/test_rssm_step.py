"""rssm_step: against torch's own cells, by gradcheck, and on bad input."""

import pytest
import torch
from torch.nn.functional import elu, softplus

from fastdreamer.ops.cells import GRUParams, gru_cell
from fastdreamer.ops.layers import ACTIVATIONS
from fastdreamer.ops.params import State, StdTransform, actor_dist, latent_dist
from fastdreamer.ops.rssm_step import rssm_step


def arguments(case, batch=3):
    return case.params, case.state(batch), case.action(batch), case.randn(batch, 2)


def test_gru_cell_is_torch_s(case):
    cell = torch.nn.GRUCell(5, 3).double()
    x, h = case.randn(7, 5), case.randn(7, 3)
    got = gru_cell(GRUParams(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), x, h)
    torch.testing.assert_close(got, cell(x, h), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_modules_it_stands_for(case, batch):
    params, state, action, noise = arguments(case, batch)
    rssm = case.rssm
    x = elu(rssm.inp.layers[0](torch.cat([state.stoch, action], -1)))
    deter = rssm.gru(x, state.deter)
    raw = rssm.prior.layers[1](elu(rssm.prior.layers[0](deter)))
    mean, std = raw[:, :2], softplus(raw[:, 2:]) + 0.1

    new, prior = rssm_step(params, state, action, noise, backend="eager")
    close = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(new.deter, deter, **close)
    torch.testing.assert_close(prior.mean, mean, **close)
    torch.testing.assert_close(prior.std, std, **close)
    torch.testing.assert_close(new.stoch, mean + std * noise, **close)
    torch.testing.assert_close(new.feat, torch.cat([deter, new.stoch], -1), **close)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_the_one_named(new_case, activation):
    case = new_case(activation)
    params, state, action, noise = arguments(case)
    act = {"elu": torch.nn.ELU, "relu": torch.nn.ReLU, "silu": torch.nn.SiLU, "tanh": torch.nn.Tanh}
    act |= {"gelu": torch.nn.GELU, "mish": torch.nn.Mish}
    act["gelu_tanh"] = lambda: torch.nn.GELU(approximate="tanh")
    x = act[activation]()(case.rssm.inp.layers[0](torch.cat([state.stoch, action], -1)))
    new, _ = rssm_step(params, state, action, noise)
    torch.testing.assert_close(new.deter, case.rssm.gru(x, state.deter), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("activation", ["elu", "silu", "tanh"])
def test_gradients(new_case, check_gradients, activation):
    case = new_case(activation)
    params = case.params._replace(post=None)  # no observation, no posterior
    check_gradients(rssm_step, params, *arguments(case)[1:])


def test_std_never_falls_below_min_std(case):
    raw = torch.tensor([[0.0, 0.0, -800.0, 800.0]])
    dist = latent_dist(raw, StdTransform(min=0.1), torch.float64)
    assert dist.std.dtype == torch.float64
    assert dist.std.tolist() == [[0.1, 800.1]]
    actor = case.actor.params()
    bias = torch.tensor([900.0, -900.0, -900.0, 900.0], dtype=torch.float64)
    extreme = actor._replace(mlp=actor.mlp._replace(biases=(actor.mlp.biases[0], bias)))
    policy = actor_dist(extreme, case.randn(1, 5))
    torch.testing.assert_close(policy.mean.tolist(), [[5.0, -5.0]])  # c·tanh(x/c), c = 5
    assert policy.std[0, 0] == 0.1 and 890 < policy.std[0, 1] < 910


@pytest.mark.parametrize(
    "std",
    [StdTransform(min=-0.7), StdTransform("exp", scale=-1.0, min=1.0), StdTransform(floor=-1.0)],
)
def test_no_std_is_below_its_floor_on_any_backend(new_case, std):
    """Where nothing says otherwise that is 0, whatever scale and least one are."""
    case = new_case("silu")
    case.rssm.float()
    params = case.rssm.params()._replace(latent=std, post=None)
    given = [torch.randn(9, n, generator=torch.Generator().manual_seed(n)) for n in (3, 2, 2, 2)]
    found = {}
    for backend in ("eager", "native"):
        state, action, noise = State(*given[:2]), given[2][:, : params.dims()["A"]], given[3]
        found[backend] = rssm_step(params, state, action, noise, backend=backend)[1].std
    assert (found["eager"] >= std.floor).all()
    torch.testing.assert_close(found["native"], found["eager"], rtol=1e-5, atol=1e-6)


def test_detached_parameters_get_no_gradient(case):
    _, state, action, noise = arguments(case)
    state = State(*(part.requires_grad_() for part in state))
    new, _ = rssm_step(case.rssm.params().detach(), state, action, noise)
    new.feat.sum().backward()
    assert state.deter.grad is not None and state.stoch.grad is not None
    assert all(p.grad is None for p in case.rssm.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deter": torch.zeros(3, 4)}, "state.deter must be [B, D=3] float64, got [3, 4] float64"),
        ({"stoch": torch.zeros(3, 5)}, "state.stoch must be [B=3, S=2] float64, got [3, 5]"),
        ({"stoch": torch.zeros(2, 2)}, "state.stoch must be [B=3, S=2] float64, got [2, 2]"),
        ({"action": torch.zeros(3)}, "action must be [B=3, A=2] float64, got [3]"),
        ({"action": torch.zeros(3, 3)}, "action must be [B=3, A=2] float64, got [3, 3]"),
        ({"noise": torch.zeros(4, 2)}, "noise must be [B=3, S=2] float64, got [4, 2]"),
    ],
)
def test_wrong_shapes(case, change, message):
    params, state, action, noise = arguments(case)
    given = {"deter": state.deter, "stoch": state.stoch, "action": action, "noise": noise}
    given |= {name: x.double() for name, x in change.items()}
    with pytest.raises(ValueError) as caught:
        rssm_step(params, State(given["deter"], given["stoch"]), given["action"], given["noise"])
    assert str(caught.value).startswith(f"rssm_step: {message}")


def test_wrong_dtypes(case):
    params, state, action, noise = arguments(case)
    with pytest.raises(ValueError, match="rssm_step: action must be .* float64, got .* float32"):
        rssm_step(params, state, action.float(), noise)
    with pytest.raises(ValueError, match="rssm_step: noise must be .* float64, got .* int64"):
        rssm_step(params, state, action, noise.long())
    with pytest.raises(TypeError, match="rssm_step: action must be a tensor, got ndarray"):
        rssm_step(params, state, action.numpy(), noise)


def test_backends(case, check_backends):
    check_backends(rssm_step, *arguments(case))
