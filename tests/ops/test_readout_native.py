"""What outputs of heads and actors mean, in the native ops against eager.

Two-hot heads over bins, symexp'd and wider heads, continuation by its mode; policies squashed
otherwise than by a tanh, one-hot actions, bounded actions of the model's own. Outputs and all
gradients, fp32 and bf16, on every ISA of the host and for several numbers of threads. The
environment chooses the instruction set, once a process, so those run this file as a script.
"""

import itertools
from unittest import mock

import pytest
import torch
from native_and_eager import (
    assert_only_outputs_are_written,
    assert_threads_change_nothing,
    compare,
    compare_with_and_without_gradients,
)

from fastdreamer import testing
from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.cem import cem
from fastdreamer.ops.decide import decide
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.params import (
    SQUASHES,
    Categorical,
    Readout,
    StdTransform,
    noise_of,
    noise_size,
    two_hot,
)
from fastdreamer.testing import Sizes

PLAIN, SYMEXP = Readout(), Readout(None, True)
BOUNDED = StdTransform("sigmoid", scale=0.9, offset=2.0, min=0.1)
V2 = StdTransform("sigmoid", 2.0, 0.5, min=0.1)
WRT = ("params", "actor", "start", *(f"returns.{h}" for h in
       ("reward", "critic", "target", "discount")))  # fmt: skip
"""Inputs that may have gradients: all but the bins and the noise."""


def symlog_bins(n):
    """As many heads have them: the expectation is taken in symlog space."""
    bins = torch.linspace(-4, 4, n)
    return Readout((bins - bins.flip(0)) / 2, True)


class Case:
    """A model's sizes, and what its heads and its actor are.

    Args:
        sizes, H, B: of ``testing.imagine_inputs``.
        reward, value: a Readout each, and how many outputs it has.
        squash, std, mean_scale: of the policy; a Categorical std is of one-hot actions.
        more: hard, bound, latent, through as ``make`` takes them.
    """

    def __init__(
        self, sizes, H, B, reward=(PLAIN, 1), value=(PLAIN, 1), squash="tanh", std=None,
        mean_scale=5.0, **more,
    ):  # fmt: skip
        self.shape, self.reward, self.value = (sizes, H, B), reward, value
        self.policy = {"squash": squash, "mean_scale": mean_scale} | ({"std": std} if std else {})
        self.more = more

    def make(self, op=imagine, *, hard=None, bound=False, latent=None, through=False, **inputs):
        generator = torch.Generator().manual_seed(7)
        if latent is not None:
            inputs = testing.categorical(inputs, latent)

        def widened(mlp, outputs):
            weight = mlp.weights[-1]
            fan = weight.shape[1]
            weight = torch.randn(outputs, fan, generator=generator) / fan**0.5
            bias = 0.1 * torch.randn(outputs, generator=generator)
            return mlp._replace(
                weights=(*mlp.weights[:-1], weight), biases=(*mlp.biases[:-1], bias)
            )

        params = inputs["params"]._replace(bound_action=bound)
        inputs = inputs | {"params": params}
        A = params.dims()["A"]
        if inputs.get("actor") is not None:
            actor = inputs["actor"]._replace(**self.policy, through_feat=through)
            outputs = A if isinstance(actor.std, Categorical) else 2 * A
            inputs["actor"] = actor._replace(mlp=widened(actor.mlp, outputs))
            if isinstance(actor.std, Categorical) and inputs["action_noise"] is not None:
                lead = inputs["action_noise"].shape[:-1]
                size = noise_size(actor.std, A)
                inputs["action_noise"] = noise_of(actor.std)[1]((*lead, size), generator=generator)
        if "returns" in inputs:
            returns = inputs["returns"]
            inputs["returns"] = returns._replace(
                reward=widened(returns.reward, self.reward[1]),
                critic=widened(returns.critic, self.value[1]),
                target=returns.target and widened(returns.target, self.value[1]),
                discount=None if hard is None else widened(returns.reward, 1),
                hard_discount=bool(hard),
                reward_as=self.reward[0],
                value_as=self.value[0],
            )
        one_hot = inputs.get("actor") is not None and isinstance(inputs["actor"].std, Categorical)
        return testing.away_from_borders(op, inputs) if latent or one_hot else inputs

    def imagine(self, **changes):
        sizes, H, B = self.shape
        inputs = testing.imagine_inputs(sizes, H, B, heads=True)
        return self.make(**self.more | changes, **inputs)


SMALL = Sizes(1, 7, 5, 1, 17, 5, 0, 1, 2, "silu")
MIDDLE = Sizes(6, 21, 30, 4, 16, 33, 1, 2, 3, "elu")
# sizes, H, B: outputs below, at and above vectors of 8 and 16; one row, and more than a tile
CASES = {
    "one": Case(SMALL, 2, 1, (SYMEXP, 1), (two_hot(3), 3), "none"),
    "two-hot": Case(MIDDLE, 3, 49, (two_hot(255), 255), (two_hot(255), 255)),
    "symlog": Case(
        MIDDLE, 7, 15, (symlog_bins(41), 41), (symlog_bins(33), 33), "bound", BOUNDED, 1.0,
        through=True, bound=True,
    ),
    "V3": Case(
        Sizes(3, 32, 48, 33, 64, 40, 1, 2, 1, "silu", 40), 5, 16,
        (two_hot(17), 17), (symlog_bins(63), 63), "none", BOUNDED, 1.0,
        bound=True, latent=Categorical(16, 0.01), hard=False,
    ),
    "pairs": Case(MIDDLE, 2, 51, (PLAIN, 2), (SYMEXP, 2), "clip", V2, 1.0, hard=False),
    "symexp": Case(MIDDLE, 3, 17, (SYMEXP, 1), (SYMEXP, 1), "clip", bound=True, hard=True),
    "even": Case(
        MIDDLE, 4, 5, (two_hot(8), 8), (symlog_bins(2), 2), "bound", V2, float("inf")
    ),
    "one-hot": Case(MIDDLE, 3, 20, (PLAIN, 1), (two_hot(31), 31), std=Categorical(6, 0.01)),
    "dice": Case(
        MIDDLE, 3, 9, (Readout(torch.linspace(-3, 5, 15)), 15), (PLAIN, 3), std=Categorical(3),
        through=True, bound=True, latent=Categorical(5),
    ),
}  # fmt: skip
ONLY_FP32 = ("one", "symexp")  # in bfloat16 the error of few numbers is luck, and so are signs


def precisions(name):
    return (False,) if name in ONLY_FP32 else (False, True)


def check_imagine(name):
    inputs = CASES[name].imagine()
    for bf16 in precisions(name):
        compare_with_and_without_gradients(imagine, inputs, bf16=bf16, wrt=WRT)


def check_cem(name):
    """With everyone elite, all iterations are comparable; candidates beyond ±1."""
    case = CASES[name]
    inputs = testing.cem_inputs(*case.shape, 5, 2) | {"num_elites": 5, "clip": 1.5}
    more = {key: value for key, value in case.more.items() if key != "through"}
    inputs = case.make(cem, **more, **inputs)
    for score in ("lambda_return", "reward"):
        compare(cem, inputs | {"score": score}, wrt=())


def check_decide(name):
    case = CASES[name]
    sizes, _, B = case.shape
    more = {key: case.more[key] for key in ("bound", "latent") if key in case.more}
    inputs = case.make(decide, **more, **testing.decide_inputs(sizes, B))
    for bf16 in precisions(name):
        compare(decide, inputs, bf16=bf16, wrt=())
    compare(decide, inputs | {"action_noise": None}, wrt=())


def zeroed(mlp, bias=0.7):
    last = mlp.weights[-1].shape[0]
    return mlp._replace(
        weights=(*mlp.weights[:-1], torch.zeros_like(mlp.weights[-1])),
        biases=(*mlp.biases[:-1], torch.full((last,), bias)),
    )


def check_equal_probabilities():
    """Of bins up to e^20 that stand symmetrically about 0: exactly 0, whatever the sum."""
    for n in (2, 3, 8, 15, 16, 17, 33, 254, 255):
        for readout in (two_hot(n), symlog_bins(n)):
            inputs = Case(MIDDLE, 2, 17, (readout, n), (readout, n)).imagine()
            heads = {head: zeroed(getattr(inputs["returns"], head)) for head in
                     ("reward", "critic", "target")}  # fmt: skip
            inputs["returns"] = inputs["returns"]._replace(**heads)
            for bf16 in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    dream = imagine(**inputs, backend="native")
                for out in (dream.reward, dream.value, dream.returns):
                    assert (out == 0).all(), (n, bf16)


@pytest.mark.parametrize("name", CASES)
def test_imagine(name):
    check_imagine(name)


@pytest.mark.parametrize("name", CASES)
def test_cem_and_decide(name):
    check_cem(name)
    check_decide(name)


def test_equal_probabilities_give_nothing():
    check_equal_probabilities()


@pytest.mark.parametrize("name", ["one", "two-hot", "symlog", "V3", "dice"])
def test_threads_change_nothing(name, threads):
    assert_threads_change_nothing(imagine, CASES[name].imagine(), threads, wrt=WRT)


@pytest.mark.parametrize("using", ["reward", "value", "returns", "discount", "action", "stoch"])
@pytest.mark.parametrize("name", ["V3", "pairs", "symlog"])
def test_gradient_of_one_output(name, using):
    inputs = CASES[name].imagine(hard=False)
    compare(imagine, inputs, wrt=WRT, using=(f"out.{using}",))


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("squash", SQUASHES)
def test_policies(squash, bound, through):
    """Samples within ±1 and beyond."""
    for std, mean_scale in itertools.product((BOUNDED, V2), (1.0, float("inf"))):
        case = Case(MIDDLE, 3, 17, squash=squash, std=std, mean_scale=mean_scale)
        inputs = case.imagine(bound=bound, through=through)
        got = compare(imagine, inputs, wrt=("actor", "start", "params"))
        size = got["out.action"].abs()
        assert (size > 1).any() == (squash == "none") and (size < 1).any()


def test_a_hard_discount_has_no_gradient():
    inputs, soft = (CASES["pairs"].imagine(hard=hard) for hard in (True, False))
    returns = inputs["returns"]
    last = returns.discount.weights[-1].requires_grad_()
    inputs["start"].deter.requires_grad_()
    for backend, bf16 in itertools.product(("native", "eager"), (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            dream, likely = (imagine(**given, backend=backend) for given in (inputs, soft))
        assert dream.discount.unique().tolist() == [0, pytest.approx(0.99)]
        assert torch.equal(dream.discount > 0, likely.discount > 0.99 / 2)
        assert not dream.discount.requires_grad and dream.returns.requires_grad
        assert torch.autograd.grad(dream.returns.sum(), last, allow_unused=True) == (None,)
    tied = zeroed(returns.discount, 0.0)
    given = inputs | {"returns": returns._replace(discount=tied)}
    assert (imagine(**given, backend="native").discount == 0).all()


def test_a_symexp_has_no_gradient_at_nothing():
    """As that of sign(x) expm1(|x|) composed, which eager and the peers have."""
    inputs = CASES["symexp"].imagine(hard=None)
    returns = inputs["returns"]
    inputs["returns"] = returns._replace(reward=zeroed(returns.reward, 0.0))
    got = compare(imagine, inputs, wrt=WRT, using=("out.reward",))
    assert (got["out.reward"] == 0).all()
    assert not any(grad.any() for name, grad in got.items() if name.startswith("grad"))


def test_what_is_not_a_number():
    """NaN stays in its row, and infinite and huge logits give what eager gives."""
    case = Case(MIDDLE, 1, 4, (two_hot(19), 19), (symlog_bins(19), 19), "none")
    inputs = case.imagine()
    returns = inputs["returns"]
    for logits in ([0.0] * 18 + [torch.inf], [0.0] * 18 + [torch.nan], [-torch.inf] * 18 + [0.0],
                   [-torch.inf] * 19, [1e30] * 2 + [-1e30] * 17, [3e38] * 19):  # fmt: skip
        heads = {}
        for name in ("reward", "critic", "target"):
            head = zeroed(getattr(returns, name))
            heads[name] = head._replace(biases=(*head.biases[:-1], torch.tensor(logits)))
        given = inputs | {"returns": returns._replace(**heads)}
        got, want = (imagine(**given, backend=backend) for backend in ("native", "eager"))
        for mine, theirs in [(got.reward, want.reward), (got.value, want.value)]:
            torch.testing.assert_close(mine, theirs, equal_nan=True)
    clean = imagine(**inputs, backend="native")
    inputs["action_noise"][0, 2] = torch.nan
    seen = imagine(**inputs, backend="native")
    rest = [0, 1, 3]
    for mine, theirs in zip(seen, clean, strict=True):
        if mine is not None:
            assert torch.equal(mine[:, rest], theirs[:, rest])
    assert seen.reward[0, 2].isnan() and seen.returns[0, 2].isnan()
    assert seen.action[0, 2].isnan().all()


@pytest.mark.parametrize("squash", SQUASHES)
def test_an_undefined_action_stays_undefined(squash):
    inputs = Case(MIDDLE, 2, 3, squash=squash).imagine(bound=True)
    inputs["start"].deter[1] = torch.nan
    seen = imagine(**inputs, backend="native")
    assert seen.action[:, 1].isnan().all() and seen.deter[:, 1].isnan().all()
    assert not seen.action[:, [0, 2]].isnan().any()


def test_a_pack_of_every_policy():
    """Of the same layers: what is kept of one is not taken for another."""
    sizes, _, B = CASES["pairs"].shape
    inputs = Case(sizes, 1, B, std=V2).make(decide, **testing.decide_inputs(sizes, B))
    for squash in SQUASHES:
        given = inputs | {"actor": inputs["actor"]._replace(squash=squash)}
        got, want = (decide(**given, backend=backend).action for backend in ("native", "eager"))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_buffers(name):
    inputs = CASES[name].imagine()
    assert_only_outputs_are_written(imagine, inputs, "imagine_forward", 9)


def test_the_mode_of_one_hot_actions():
    """The first of equals; of NaN, NaN."""
    sizes, _, B = CASES["dice"].shape
    inputs = Case(sizes, 1, B, std=Categorical(3)).make(decide, **testing.decide_inputs(sizes, B))
    actor = inputs["actor"]
    tied = zeroed(actor.mlp)
    inputs |= {"actor": actor._replace(mlp=tied), "action_noise": None}
    assert decide(**inputs, backend="native").action.tolist() == [[1, 0, 0, 1, 0, 0]] * B
    inputs["actor"] = actor
    inputs["state"].deter[2] = torch.nan
    got, want = (decide(**inputs, backend=backend).action for backend in ("native", "eager"))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got[2].isnan().all()


def test_candidates_are_bounded_where_the_dynamics_take_them():
    """Beyond ±1: the plan is of the candidates themselves, their scores are of bounded ones."""
    sizes, H, B = CASES["symexp"].shape
    inputs = testing.cem_inputs(sizes, H, B, 7, 2) | {"num_elites": 7, "clip": 3.0}
    inputs["mean"] *= 4
    free = cem(**inputs, backend="native")
    inputs["params"] = inputs["params"]._replace(bound_action=True)
    bound = cem(**inputs, backend="native")
    compare(cem, inputs, wrt=())
    assert (free.mean.abs() > 1).any()
    torch.testing.assert_close(free.mean, bound.mean)
    assert not torch.allclose(free.scores, bound.scores)
    proposals = 3 * torch.ones(H, B, 2, sizes.A)
    compare(cem, inputs | {"proposals": proposals}, wrt=())


def test_bins_are_read_at_every_call():
    """They belong to no pack: changed in place or not, contiguous, float64 or not."""
    case = CASES["two-hot"]
    inputs = case.imagine()
    returns = inputs["returns"]
    for bins in (
        returns.reward_as.bins.double(),
        torch.linspace(-1, 1, 510)[::2],
        returns.reward_as.bins.mul_(2),
    ):
        given = inputs | {"returns": returns._replace(reward_as=Readout(bins))}
        got, want = (imagine(**given, backend=backend).reward for backend in ("native", "eager"))
        assert (got - want).norm() < 1e-4 * want.norm()


def test_auto_takes_native():
    for name in CASES:
        imagine(**CASES[name].imagine())
        assert last_backend("imagine") == "native"


def test_what_is_refused_still():
    inputs = CASES["two-hot"].imagine()
    returns = inputs["returns"]
    bins = returns.reward_as.bins.clone().requires_grad_()
    learned = inputs | {"returns": returns._replace(reward_as=Readout(bins))}
    with pytest.raises(BackendError, match="native.*no learned bins"):
        imagine(**learned, backend="native")


def test_the_bindings_refuse():
    from fastdreamer import _native

    inputs = CASES["two-hot"].imagine()
    with (
        torch.no_grad(),
        mock.patch.object(_native, "imagine_forward", wraps=_native.imagine_forward) as spy,
    ):
        imagine(**inputs, backend="native")
    arguments = list(spy.call_args.args)
    actor, heads = arguments[2], arguments[3]
    short = heads[7][0][:-1].copy()
    for place, changed, message in [
        (3, (*heads[:7], (short, False), *heads[8:]), r"reward_as.bins must be \[255\]"),
        (3, (*heads[:8], (short, False), *heads[9:]), r"value_as.bins must be \[255\]"),
        (2, (*actor[:3], "fold", *actor[4:]), "squash must be tanh, none, bound or clip"),
        (
            2,
            (*actor[:2], (4, 0.0, False), *actor[3:]),
            "6 logits make no categoricals of 4 classes",
        ),
        (2, (*actor[:2], (6, 0.0, False), *actor[3:]), "actor must map 51 to 6, not 51 to 12"),
    ]:
        given = [*arguments[:place], changed, *arguments[place + 1 :]]
        with pytest.raises(ValueError, match=message):
            _native.imagine_forward(*given)


def test_isa(run_on_isa):
    run_on_isa(__file__)


if __name__ == "__main__":
    from fastdreamer import _native

    torch.set_num_threads(1)
    check_equal_probabilities()
    for name in CASES:
        check_imagine(name)
        check_cem(name)
        check_decide(name)
    print(_native.isa())
