"""cem's native body against eager, on every instruction set and number of threads.

The choice of the elites is discontinuous, so scores are compared where both bodies have the same
elites by construction, and the choice is checked against the scores it was made by. The instruction
set is chosen by the environment, so those checks run this file as a script.
"""

import math
from contextlib import contextmanager
from unittest import mock

import forked
import numpy as np
import pytest
import torch

from fastdreamer.ops.backend import BackendError, last_backend
from fastdreamer.ops.cem import cem, top
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.params import ReturnParams, State
from fastdreamer.testing import REPORT, Exact, Sizes, assert_accurate, cem_inputs, error

nan, inf = math.nan, math.inf
# A, D, S, E, hidden, units, layers of reward and critic, …: below, at and above vectors of 8 and 16
SMALL = Sizes(2, 3, 2, 4, 5, 7, 1, 2, 1, "elu")
ODD = Sizes(3, 17, 5, 4, 33, 31, 2, 3, 1, "silu")
WIDE = Sizes(16, 24, 8, 4, 48, 16, 1, 1, 1, "relu")
FLAT = Sizes(1, 13, 1, 4, 9, 7, 0, 0, 1, "tanh")  # heads of a single layer
MODELS = [*(SMALL._replace(activation=a) for a in ("elu", "relu", "silu", "tanh")), ODD, WIDE, FLAT]
# H, B, N: remainders of tiles of rows, start states that share a tile or not, one of something
SHAPES = [(4, 3, 7), (1, 5, 13), (3, 1, 101), (2, 60, 1)]
SCORES = ("lambda_return", "reward")


def native(given, **changed):
    plan = cem(**given | changed, backend="native")
    assert last_backend("cem") == "native"
    return plan


def departure(returns):
    return returns._replace(departure=True)


def results(plan):
    scores = {f"scores[{i}]": part for i, part in enumerate(plan.scores)}
    return {"mean": plan.mean, "std": plan.std} | scores


def compared(inputs):
    """Results of native and eager in float32 and of eager in float64, from inputs of each."""
    single, double = inputs
    plans = native(single), cem(**single, backend="eager")
    return *map(results, plans), Exact(lambda: results(cem(**double, backend="eager")))


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def captured(given):
    """The arguments with which the body calls the extension, to call it again with others."""
    from fastdreamer import _native

    with mock.patch.object(_native, "cem", wraps=_native.cem) as spy:
        native(given)
    names = [
        *("rssm", "heads", "start_deter", "start_stoch", "mean", "std", "action_noise"),
        *("state_noise", "scores", "proposals", "num_elites", "min_std", "sample_std", "clip"),
        *("bound_action", "threads"),
    ]
    arguments = dict(zip(names, spy.call_args.args, strict=True))
    return arguments | {name: given[name].numpy().copy() for name in ("mean", "std")}


# --- checks, also run as a script ----------------------------------------------------------------


def check_scores(models=MODELS, shapes=SHAPES) -> None:
    """With everyone elite, all iterations are comparable."""
    for sizes in models:
        for shape in shapes:
            for score in SCORES:
                inputs = [
                    cem_inputs(sizes, *shape, 3, dtype=dtype)
                    | {"num_elites": shape[2], "score": score}
                    for dtype in (torch.float32, torch.float64)
                ]
                assert_accurate("cem", *compared(inputs))
            # the last inputs but the score, by rewards of states 0..H-1
            departing = [
                given | {"score": "lambda_return", "returns": departure(given["returns"])}
                for given in inputs
            ]
            assert_accurate("cem", *compared(departing))
    # under autocast, over enough candidates that none is right by luck
    for sizes in models:
        for score in SCORES:
            inputs = [
                cem_inputs(sizes, 5, 3, 40, 1, dtype=dtype) | {"score": score}
                for dtype in (torch.float32, torch.float64)
            ]
            exact = cem(**inputs[1], backend="eager").scores
            with torch.autocast("cpu", torch.bfloat16):
                plan, eager = native(inputs[0]), cem(**inputs[0], backend="eager")
            assert {part.dtype for part in plan} == {torch.float32}
            actual, allowed = error(plan.scores, exact), error(eager.scores, exact)
            assert actual <= allowed, (sizes, score, actual, allowed)
            assert (plan.scores != native(inputs[0]).scores).any()


def check_proposals() -> None:
    """Given candidates are eager's: same scores with everyone elite, same elites with fewer."""
    for sizes in (SMALL, ODD, WIDE):
        for shape in SHAPES:
            horizon, batch, samples = shape
            for number in sorted({1, samples // 2, samples} - {0}):
                generator = torch.Generator().manual_seed(number)
                shapes = (horizon, batch, number, sizes.A)
                given = torch.randn(shapes, generator=generator, dtype=torch.float64)
                inputs = [
                    cem_inputs(sizes, *shape, 2, dtype=dtype)
                    | {"num_elites": samples, "proposals": given.to(dtype), "clip": 0.75}
                    for dtype in (torch.float32, torch.float64)
                ]
                assert_accurate("cem", *compared(inputs))
                # the best one alone, a proposal or not
                action = (
                    inputs[0]["mean"].unsqueeze(2)
                    + inputs[0]["std"].unsqueeze(2) * (inputs[0]["action_noise"][0])
                )
                action[:, :, :number] = inputs[0]["proposals"]
                once = {n: inputs[0][n][:1] for n in ("action_noise", "state_noise")}
                plan = native(inputs[0] | once, num_elites=1)
                best = top(plan.scores[0], 1)[None, :, :, None]
                want = action.clamp(-0.75, 0.75).take_along_dim(best, 2).squeeze(2)
                assert torch.equal(plan.mean, want)


def check_elites() -> None:
    """mean and std are those of the candidates with the best scores, iteration by iteration."""
    for sizes, shape in [(SMALL, (4, 3, 7)), (ODD, (2, 5, 13)), (WIDE, (1, 2, 40))]:
        for k in (1, 2, shape[2] - 1, shape[2]):
            given = cem_inputs(sizes, *shape, 3) | {"num_elites": k, "min_std": 0.2, "clip": 0.75}
            whole = native(given)
            mean, std = given["mean"], given["std"]
            for i in range(3):
                noise = {n: given[n][i : i + 1] for n in ("action_noise", "state_noise")}
                plan = native(given | noise, mean=mean, std=std)
                assert torch.equal(plan.scores[0], whole.scores[i])
                # the very candidates: the same two roundings
                action = mean.unsqueeze(2) + std.unsqueeze(2) * noise["action_noise"][0]
                action = action.clamp(-0.75, 0.75)
                best = top(plan.scores[0], k)
                elites = action.take_along_dim(best[None, :, :, None], 2).double()
                want = elites.mean(2), elites.std(2, unbiased=False).clamp(min=0.2)
                for got, exact in zip((plan.mean, plan.std), want, strict=True):
                    torch.testing.assert_close(got.double(), exact, rtol=2e-7, atol=1e-8)
                other = native(given | noise, mean=mean, std=std, sample_std=True)
                exact = elites.std(2, unbiased=k > 1).clamp(min=0.2)
                torch.testing.assert_close(other.std.double(), exact, rtol=2e-7, atol=1e-8)
                assert torch.equal(other.mean, plan.mean)
                mean, std = plan.mean, plan.std
            assert torch.equal(mean, whole.mean) and torch.equal(std, whole.std)


def check_buffers() -> None:
    """Every output is written, nothing around it is, and no thread changes a result."""
    from fastdreamer import _native

    for bf16 in (False, True):
        for sizes in (SMALL, ODD, FLAT):
            for shape in [(1, 1, 1), *SHAPES]:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    given = cem_inputs(sizes, *shape, 2)
                    want, arguments = native(given), captured(given)
                for number in (1, 2, 3, 8):
                    outputs = {}
                    for name, part in zip(("mean", "std", "scores"), want, strict=True):
                        whole = torch.full((part.numel() + 64,), nan)
                        outputs[name] = whole, whole[32:-32].view(part.shape)
                    for name in ("mean", "std"):
                        outputs[name][1].copy_(given[name])
                    arrays = {name: inner.numpy() for name, (_, inner) in outputs.items()}
                    _native.cem(**arguments | arrays | {"threads": number})
                    for (name, (whole, inner)), part in zip(outputs.items(), want, strict=True):
                        assert torch.equal(inner, part), (name, sizes, shape, number)
                        assert whole[:32].isnan().all() and whole[-32:].isnan().all(), name


def ranked(values):
    """A model and one step of candidates, in which candidate n scores in the order of values[n]."""
    given = cem_inputs(FLAT, 1, 1, len(values), 1)
    prior = given["params"].prior
    zero = ([torch.zeros_like(t) for t in part] for part in (prior.weights, prior.biases))
    given["params"] = given["params"]._replace(prior=MLPParams(*map(tuple, zero), "tanh"))
    pick = torch.zeros(1, 14)  # stoch, of [deter, stoch]
    pick[0, -1] = 1
    given["returns"] = ReturnParams(
        MLPParams((pick,), (torch.zeros(1),), "tanh"), None, None, gamma=1.0, lam=1.0
    )
    given["state_noise"] = torch.tensor(values).view(1, 1, 1, len(values), 1)
    return given | {"score": "reward"}


def check_order() -> None:
    """Highest first, the lower index among equals, NaN behind −∞ and never an elite."""
    values = [nan, 0.0, 1.0, -0.0, -inf, -nan, inf, 1.0, 0.0, inf]
    order = [6, 9, 2, 7, 1, 3, 8, 4]

    def candidates(given):
        action = given["mean"] + given["std"] * given["action_noise"][0, :, :, :, 0]
        return action.clamp(-0.9999, 0.9999).flatten()

    given = ranked(values)
    action = candidates(given).double()
    for k in range(1, 11):
        plan = native(given, num_elites=k)
        assert plan.scores[0, 0].isnan().nonzero().flatten().tolist() == [0, 5]
        elites = action[order[:k]]
        torch.testing.assert_close(plan.mean.item(), elites.mean().item(), rtol=2e-7, atol=1e-8)
        want = elites.std(unbiased=False).item()
        torch.testing.assert_close(plan.std.item(), want, rtol=2e-7, atol=1e-8)
        other = native(given, num_elites=k, sample_std=True)
        want = elites.std(unbiased=len(elites) > 1).item()  # of those that are no NaN
        torch.testing.assert_close(other.std.item(), want, rtol=2e-7, atol=1e-8)
    for value in (0.0, inf, -inf):
        given = ranked([value] * 40)
        plan = native(given, num_elites=1)
        assert plan.mean == candidates(given)[0] and plan.std == 0
    for sample in (False, True):
        plan = native(ranked([nan] * 3), num_elites=2, min_std=0.5, sample_std=sample)
        assert plan.mean.isnan().all() and plan.std.isnan().all()


def check_nan() -> None:
    """What NaN reaches and what not is eager's; the elites of so few are well apart."""
    for score in SCORES:
        clean = cem_inputs(SMALL, 4, 3, 6, 3) | {"num_elites": 4, "score": score}
        for name, where in [
            ("action_noise", (0, 3, 0, 1, 0)),
            ("action_noise", (1, 2, 1)),  # the whole of a row
            ("state_noise", (0, 3, 0, 1, 0)),
            ("state_noise", (1, 0, 1, slice(0, 4), 1)),
            ("mean", (0, 2, 1)),
            ("std", (3, 0, 0)),
        ]:
            given = clean | {name: clean[name].clone()}
            given[name][where] = nan
            for bf16 in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    plan = native(given, min_std=0.0)
                    want = cem(**given, backend="eager")
                assert torch.equal(plan.scores.isnan(), want.scores.isnan()), (name, where)
                assert torch.equal(plan.mean.isnan(), want.mean.isnan()), (name, where)
                assert torch.equal(plan.std.isnan(), want.std.isnan()), (name, where)
                if not bf16:
                    torch.testing.assert_close(
                        tuple(plan), tuple(want), rtol=1e-5, atol=1e-6, equal_nan=True
                    )


def run_self(**environment: str) -> str:
    done = forked.run(__file__, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [check_scores, check_proposals, check_elites, check_buffers, check_order, check_nan],
)
def test_native(check):
    check()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16", "amx", "amx_emulated"])
def test_native_on_isa(isa):
    from fastdreamer import _native

    if reason := _native.isa_reasons()[isa]:
        pytest.skip(reason)
    assert run_self(FASTDREAMER_ISA=isa) == isa


def test_report_sizes():
    check_scores([REPORT], [(3, 2, 30)])
    given = cem_inputs(REPORT, 4, 1, 100, 2) | {"num_elites": 20}
    for bf16 in (False, True):
        plans = []
        for number in (1, 2, 3, 8):
            with threads(number), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                plans.append(native(given))
        for plan in plans[1:]:
            assert all(map(torch.equal, plan, plans[0]))


def test_many_tiles_for_every_thread():
    """More than have their states kept at a time, and start states that share a tile."""
    given = cem_inputs(SMALL, 3, 3, 333, 4) | {"num_elites": 7}
    for returns in (given["returns"], departure(given["returns"])):
        plans = []
        for number in (1, 2, 3, 8):
            with threads(number):
                plans.append(native(given, returns=returns))
        for plan in plans[1:]:
            assert all(map(torch.equal, plan, plans[0]))
    check_scores([SMALL], [(3, 3, 333)])


def test_no_iterations_return_copies():
    given = cem_inputs(SMALL, 4, 3, 6, 0)
    plan = native(given, min_std=5.0)  # of fitted Normals only
    assert plan.scores.shape == (0, 3, 6)
    assert torch.equal(plan.mean, given["mean"]) and torch.equal(plan.std, given["std"])
    assert plan.mean.data_ptr() != given["mean"].data_ptr()
    assert plan.std.data_ptr() != given["std"].data_ptr()


def test_no_argument_changes_and_nothing_has_a_gradient():
    given = cem_inputs(SMALL, 4, 3, 6, 2)
    given["mean"].requires_grad_()
    names = ("mean", "std", "action_noise", "state_noise")
    before = {name: given[name].clone() for name in names}
    plan = native(given)
    assert not any(part.requires_grad for part in plan)
    assert all(torch.equal(given[name], before[name]) for name in names)


def test_proposals_in_another_layout_are_eagers_and_none_are_no_matter():
    given = cem_inputs(SMALL, 4, 3, 6, 2)
    proposals = torch.rand(4, 3, 1, SMALL.A).expand(4, 3, 2, SMALL.A)
    plans = [cem(**given, proposals=proposals, backend=b) for b in ("auto", "eager")]
    assert last_backend("cem") == "eager" and all(map(torch.equal, *plans))
    with pytest.raises(BackendError, match="strides .*, native needs it contiguous"):
        native(given, proposals=proposals)
    assert all(map(torch.equal, native(given, proposals=proposals[:, :, :0]), native(given)))


def test_the_score_takes_the_heads_it_needs():
    given = cem_inputs(SMALL, 4, 3, 6, 2)
    returns = given["returns"]

    def scores(**heads):
        score = heads.pop("score", "lambda_return")
        return native(given, returns=returns._replace(**heads), score=score).scores

    assert torch.equal(scores(), scores(critic=None))
    assert torch.equal(scores(target=None), scores(critic=None, target=returns.critic))
    assert (scores()[0] != scores(target=None)[0]).any()
    # neither heads nor constants matter to a sum of rewards
    plain = scores(critic=None, target=None, gamma=nan, lam=7.0, score="reward")
    assert torch.equal(plain, scores(score="reward"))


def test_clip():
    given = cem_inputs(SMALL, 4, 3, 1, 1)  # the mean is the one candidate
    given["std"] = given["std"] * 100
    for clip in (0.25, 0.9999, inf):
        want = given["mean"] + given["std"] * given["action_noise"][0, :, :, 0]
        assert torch.equal(native(given, clip=clip).mean, want.clamp(-clip, clip))


def test_no_row_and_no_candidate_sees_another():
    given = cem_inputs(SMALL, 4, 5, 13, 2)
    whole = native(given)
    for b in range(5):
        row = slice(b, b + 1)
        alone = {name: given[name][:, row].contiguous() for name in ("mean", "std")}
        for name in ("action_noise", "state_noise"):
            alone[name] = given[name][:, :, row].contiguous()
        plan = native(given | alone, start=State(*(part[row] for part in given["start"])))
        assert torch.equal(plan.mean, whole.mean[:, row])
        assert torch.equal(plan.std, whole.std[:, row])
        assert torch.equal(plan.scores, whole.scores[:, row])
        alone["start"] = State(*(part[row] for part in given["start"]))
        for n in range(13):
            for name in ("action_noise", "state_noise"):
                alone[name] = given[name][:1, :, row, n : n + 1].contiguous()
            plan = native(given | alone, num_elites=1)
            assert torch.equal(plan.scores[:, 0], whole.scores[:1, b, n : n + 1])


def test_a_second_call_allocates_nothing():
    from fastdreamer import _native

    given = cem_inputs(ODD, 4, 3, 40, 2)
    native(given)
    before = _native.arena_stats()[1]
    native(given)
    assert _native.arena_stats()[1] == before


def test_auto_is_native_for_float32():
    given = cem_inputs(SMALL, 4, 3, 6, 1)
    cem(**given)
    assert last_backend("cem") == "native"
    cem(**cem_inputs(SMALL, 4, 3, 6, 1, dtype=torch.float64))
    assert last_backend("cem") == "eager"


def test_bindings_reject_what_the_kernels_cannot_take():
    from fastdreamer import _native

    given = cem_inputs(SMALL, 4, 3, 6, 2)
    good = captured(given)
    with torch.autocast("cpu", torch.bfloat16):
        other = captured(given)
    wide = captured(cem_inputs(SMALL._replace(D=4), 4, 3, 6, 2))
    locked = good["std"].copy()
    locked.flags.writeable = False

    def zeros(*shape, dtype=np.float32):
        return np.zeros(shape, dtype)

    heads = good["heads"]
    _native.cem(**good)
    for change, message in [
        ({"num_elites": 0}, r"num_elites must be in 1\.\.6, got 0"),
        ({"num_elites": 7}, r"num_elites must be in 1\.\.6, got 7"),
        ({"min_std": -1.0}, "min_std must be at least 0"),
        ({"min_std": nan}, "min_std must be at least 0"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip": nan}, "clip must be positive"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"heads": (*heads[:4], 1.5, *heads[5:])}, r"lam must be in \[0, 1\], got 1.5"),
        ({"heads": (*heads[:4], nan, *heads[5:])}, "lam must be in"),
        (
            {"heads": heads[:3]},
            "heads .reward, .*, lam, departure, reward_as",
        ),
        ({"rssm": good["rssm"][:2]}, "rssm must be"),
        ({"rssm": other["rssm"]}, "weights of two precisions"),
        ({"heads": other["heads"]}, "weights of two precisions"),
        ({"heads": (heads[0], other["heads"][1], *heads[2:])}, "weights of two precisions"),
        ({"heads": wide["heads"]}, "reward must map 5 to 1, not 6 to 1"),
        ({"heads": (heads[0], wide["heads"][1], *heads[2:])}, "bootstrap must map 5 to 1"),
        ({"rssm": (wide["rssm"][0], *good["rssm"][1:2], *wide["rssm"][2:])}, "prior must map 3"),
        ({"action_noise": zeros(4, 3, 6, 2)}, r"action_noise must be \[I, H, B, N, A\]"),
        ({"action_noise": zeros(2, 0, 3, 6, 2)}, "none of H, B and N 0"),
        ({"action_noise": zeros(2, 4, 3, 6, 3)}, r"action_noise must be \[2, 4, 3, 6, 2\]"),
        ({"state_noise": zeros(2, 4, 3, 5, 2)}, r"state_noise must be \[2, 4, 3, 6, 2\]"),
        ({"state_noise": zeros(2, 4, 3, 6, 2, dtype=np.float64)}, "buffer format 'd'"),
        ({"start_deter": zeros(3, 4)}, r"start.deter must be \[3, 3\]"),
        ({"start_stoch": zeros(2, 2)}, r"start.stoch must be \[3, 2\]"),
        ({"mean": zeros(4, 3, 1)}, r"mean must be \[4, 3, 2\]"),
        ({"std": zeros(2, 3, 4).T}, "std must be .* byte strides"),
        ({"std": locked}, "std must be writable"),
        ({"scores": zeros(2, 3, 5)}, r"scores must be \[2, 3, 6\]"),
        ({"std": good["mean"]}, "std overlaps mean"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.cem(**good | change)
    with pytest.raises(TypeError):
        _native.cem(**good | {"mean": [[0.0]]})


if __name__ == "__main__":
    from fastdreamer import _native

    torch.set_num_threads(1)
    check_scores()
    check_proposals()
    check_elites()
    check_buffers()
    check_order()
    check_nan()
    print(_native.isa())
