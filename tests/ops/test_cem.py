"""cem: against a loop over single candidates, known optima, ties, NaN, and bad input."""

import functools
import math

import pytest
import torch

from fastdreamer.ops.cells import GRUParams
from fastdreamer.ops.cem import cem, top
from fastdreamer.ops.layers import MLPParams, mlp
from fastdreamer.ops.params import ReturnParams, RSSMParams, State, StdTransform
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Sizes, cem_inputs

SIZES = Sizes(2, 3, 2, 4, 5, 7, 1, 2, 1, "elu")
nan, inf = math.nan, math.inf
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
H, B, N, I, K = 4, 3, 6, 3, 2  # noqa: E741


def arguments(horizon=H, batch=B, samples=N, iterations=I, *, num_elites=K, score="lambda_return"):
    given = cem_inputs(SIZES, horizon, batch, samples, iterations, dtype=torch.float64)
    return given | {"num_elites": num_elites, "score": score}


def by_hand(
    params, returns, start, mean, std, action_noise, state_noise,
    *, num_elites, score, min_std=0.0, sample_std=False, clip=0.9999, proposals=None,
):  # fmt: skip
    """Algorithm 2 written out: one start state, one candidate, one step after the other."""
    mean, std, scores = mean.clone(), std.clone(), []
    for action_eps, state_eps in zip(action_noise, state_noise, strict=True):
        scores.append([])
        for b in range(mean.shape[1]):
            actions, values = [], []
            for n in range(action_eps.shape[2]):
                action = mean[:, b] + std[:, b] * action_eps[:, b, n]  # [H, A]
                if proposals is not None and n < proposals.shape[2]:
                    action = proposals[:, b, n]
                action = torch.where(action > clip, clip, action)
                action = torch.where(action < -clip, -clip, action)
                state = State(start.deter[b : b + 1], start.stoch[b : b + 1])
                reward, value = [], []
                for a, eps in zip(action, state_eps[:, b, n], strict=True):
                    state, _ = rssm_step(params, state, a[None], eps[None])
                    reward.append(mlp(returns.reward, state.feat).item())
                    if score == "lambda_return":
                        critic = returns.critic if returns.target is None else returns.target
                        value.append(mlp(critic, state.feat).item())
                actions.append(action)
                values.append(sum(reward) if score == "reward" else g0(reward, value, returns))
            alive = [n for n in range(len(values)) if not math.isnan(values[n])]
            elites = sorted(alive, key=lambda n: (-values[n], n))[:num_elites]
            scores[-1].append(values)
            chosen = torch.stack([actions[n] for n in elites]) if elites else mean[None, :, b] * nan
            mean[:, b] = chosen.sum(0) / len(chosen)
            less = 1 if sample_std and len(chosen) > 1 else 0
            variance = (chosen - mean[:, b]).square().sum(0) / (len(chosen) - less)
            std[:, b] = torch.where(variance.sqrt() < min_std, min_std, variance.sqrt())
    return mean, std, torch.tensor(scores, dtype=torch.float64)


def g0(reward, value, returns):
    """G_0 as the λ-weighted mixture of the n-step returns, n = 1..H."""
    gamma, lam, horizon = returns.gamma, returns.lam, len(reward)
    total = 0.0
    for n in range(1, horizon + 1):
        weight = lam ** (n - 1) * ((1 - lam) if n < horizon else 1)
        partial = sum(gamma**t * reward[t] for t in range(n)) + gamma**n * value[n - 1]
        total += weight * partial
    return total


@pytest.mark.parametrize("score", ["lambda_return", "reward"])
@pytest.mark.parametrize(
    "sizes",
    [(H, B, N, I, K), (1, B, N, I, K), (H, 1, N, I, K), (H, B, 1, I, 1), (H, B, N, 1, N),
     (1, 1, 1, 1, 1), (2, 2, 9, 4, 4)],
)  # fmt: skip
def test_equals_the_loop_over_single_candidates(sizes, score):
    given = arguments(*sizes[:4], num_elites=sizes[4], score=score)
    plan = cem(**given, min_std=0.05, backend="eager")
    horizon, batch, samples, iterations, _ = sizes
    assert plan.mean.shape == plan.std.shape == (horizon, batch, 2)
    assert plan.scores.shape == (iterations, batch, samples)
    torch.testing.assert_close(tuple(plan), by_hand(**given, min_std=0.05), **CLOSE)


@pytest.mark.parametrize("elites", [1, 2, N])
def test_the_sample_s_standard_deviation(elites):
    given = arguments(num_elites=elites) | {"sample_std": True}
    plan = cem(**given)
    torch.testing.assert_close(tuple(plan), by_hand(**given), **CLOSE)
    once = {name: given[name][:1] for name in ("action_noise", "state_noise")}
    sample, population = (cem(**given | once | {"sample_std": s}).std for s in (True, False))
    ratio = (elites / max(elites - 1, 1)) ** 0.5
    torch.testing.assert_close(sample, population * ratio, **CLOSE)
    assert (sample == 0).all() == (elites == 1)


@pytest.mark.parametrize("number", [0, 1, 4, N])
def test_proposals_are_the_first_candidates_of_every_iteration(number):
    generator = torch.Generator().manual_seed(1)
    proposals = torch.randn(H, B, number, 2, dtype=torch.float64, generator=generator)
    given = arguments() | {"proposals": proposals}
    before = proposals.clone()
    plan = cem(**given)
    torch.testing.assert_close(tuple(plan), by_hand(**given), **CLOSE)
    assert torch.equal(proposals, before)
    # their action noise is not used
    given["action_noise"][:, :, :, :number] = nan
    torch.testing.assert_close(tuple(cem(**given)), tuple(plan), **EXACT)
    if number == 0:
        torch.testing.assert_close(tuple(cem(**arguments())), tuple(plan), **EXACT)


def test_proposals_that_do_not_fit_are_refused():
    given = arguments()
    with pytest.raises(ValueError, match=f"cem: 7 proposals, but only N={N} candidates"):
        cem(**given, proposals=torch.zeros(H, B, 7, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="cem: proposals must be"):
        cem(**given, proposals=torch.zeros(H, B, 2, 3, dtype=torch.float64))


def test_iterations_can_be_cut_anywhere_and_none_changes_nothing():
    given = arguments()
    whole = cem(**given)

    def some(mean, std, which):
        noise = {name: given[name][which] for name in ("action_noise", "state_noise")}
        return cem(**given | noise | {"mean": mean, "std": std})

    first = some(given["mean"], given["std"], slice(0, 1))
    then = some(first.mean, first.std, slice(1, None))
    torch.testing.assert_close(tuple(then[:2]), tuple(whole[:2]), **EXACT)
    torch.testing.assert_close(torch.cat([first.scores, then.scores]), whole.scores, **EXACT)

    none = some(given["mean"], given["std"], slice(0, 0))
    assert none.scores.shape == (0, B, N)
    torch.testing.assert_close((none.mean, none.std), (given["mean"], given["std"]), **EXACT)
    assert none.mean is not given["mean"] and none.std is not given["std"]


def test_rows_do_not_see_each_other():
    given = arguments()
    whole = cem(**given)
    for b in range(B):
        row = slice(b, b + 1)
        alone = given | {
            "start": State(*(part[row] for part in given["start"])),
            "mean": given["mean"][:, row],
            "std": given["std"][:, row],
            "action_noise": given["action_noise"][:, :, row],
            "state_noise": given["state_noise"][:, :, row],
        }
        want = whole.mean[:, row], whole.std[:, row], whole.scores[:, row]
        torch.testing.assert_close(tuple(cem(**alone)), want, **CLOSE)


def aimed(target, score):
    """A model whose state is tanh(tanh(action)) and whose reward is −Σ|state − that of target|.

    The value is 0 everywhere, so that every score is largest at action = target in each step.
    """
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    goal = torch.tensor(target, dtype=torch.float64).tanh().tanh()
    pick_deter = torch.cat([eye, zeros(2, 2)], 1)  # of [deter, stoch]
    pick_action = torch.cat([zeros(2, 2), eye], 1)  # of [stoch, action]
    params = RSSMParams(
        inp=MLPParams((pick_action,), (zeros(2),), "tanh"),
        # an update gate that is shut: h' = tanh(x)
        gru=GRUParams(
            torch.cat([zeros(4, 2), eye]),
            zeros(6, 2),
            torch.tensor([0, 0, -50, -50, 0, 0]).double(),
            zeros(6),
        ),
        prior=MLPParams((zeros(4, 2),), (zeros(4),), "tanh"),
        post=None,
        latent=StdTransform(min=0.1),
    )
    reward = MLPParams(
        (torch.cat([pick_deter, -pick_deter]), -torch.ones(1, 4).double()),
        (torch.cat([-goal, goal]), zeros(1)),
        "relu",
    )
    value = MLPParams((zeros(1, 4),), (zeros(1),), "relu")
    returns = ReturnParams(reward, value, None, gamma=0.9, lam=0.8)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(15, 3, 2, 200, 4, dtype=torch.float64, generator=generator)
    return {
        "params": params,
        "returns": returns,
        "start": State(zeros(2, 2), zeros(2, 2)),
        "mean": zeros(3, 2, 2),
        "std": zeros(3, 2, 2) + 1,
        "action_noise": noise[..., :2].contiguous(),
        "state_noise": noise[..., 2:].contiguous(),
        "num_elites": 20,
        "score": score,
    }


@pytest.mark.parametrize("score", ["lambda_return", "reward"])
@pytest.mark.parametrize("target", [(0.5, -0.3), (0.0, 0.8)])
def test_finds_a_known_optimum(target, score):
    plan = cem(**aimed(target, score))
    want = torch.tensor(target, dtype=torch.float64).expand(3, 2, 2)
    torch.testing.assert_close(plan.mean, want, rtol=0, atol=1e-3)
    assert plan.std.max() < 1e-3
    best = plan.scores.max(-1).values
    assert (best < 0).all() and (best[-1] > -1e-3).all() and (best[0] < -0.1).all()


def test_goes_to_the_bound_when_better_lies_behind_it():
    plan = cem(**aimed((5.0, -5.0), "reward"), clip=0.7)
    want = torch.tensor((0.7, -0.7), dtype=torch.float64).expand(3, 2, 2)
    torch.testing.assert_close(plan.mean, want, rtol=0, atol=1e-4)
    assert plan.mean.abs().max() <= 0.7 and plan.std.max() < 1e-4


def test_clip_bounds_every_candidate():
    given = arguments(samples=1, iterations=1, num_elites=1)  # the mean is the one candidate
    wide = given | {"std": given["std"] * 100}
    plan = cem(**wide)
    assert plan.mean.abs().max() == 0.9999 and (plan.mean.abs() == 0.9999).double().mean() > 0.8
    assert cem(**wide, clip=0.25).mean.abs().max() == 0.25
    free = cem(**wide, clip=inf).mean
    want = wide["mean"] + wide["std"] * wide["action_noise"][0, :, :, 0]
    torch.testing.assert_close(free, want, **EXACT)


def test_min_std_is_a_bound_of_the_fitted_std():
    given = arguments()
    plan = cem(**given)
    middle = plan.std.median().item()
    once = {name: given[name][:1] for name in ("action_noise", "state_noise")}
    free, held = cem(**given | once).std, cem(**given | once, min_std=middle).std
    torch.testing.assert_close(held, free.clamp(min=middle), **EXACT)
    assert (held == middle).any() and (held > middle).any()
    assert (cem(**given | {"num_elites": 1}, min_std=0.3).std == 0.3).all()
    assert (cem(**given | {"num_elites": 1}).std == 0).all()


def test_k_equal_to_n_takes_everyone():
    given = arguments(iterations=1, num_elites=N)
    plan = cem(**given, clip=inf)
    noise = given["action_noise"][0]
    mean = given["mean"] + given["std"] * noise.mean(2)
    torch.testing.assert_close(plan.mean, mean, **CLOSE)
    torch.testing.assert_close(plan.std, given["std"] * noise.std(2, unbiased=False), **CLOSE)


def flat(head, bias=0.0):
    """The head with a constant output."""
    weights, biases = (*head.weights[:-1], head.weights[-1] * 0), head.biases[:-1]
    return MLPParams(weights, (*biases, head.biases[-1] * 0 + bias), head.activation)


def excess(head):
    """A head that is positive where stoch's last component exceeds 0.5 and exactly 0 elsewhere."""
    first, last = (torch.zeros_like(weight) for weight in head.weights)
    first[0, -1] = last[0, 0] = 1
    return MLPParams((first, last), (head.biases[0] * 0 - 0.5, head.biases[1] * 0), "relu")


def test_among_equals_the_lower_index_wins():
    given = arguments(samples=40, iterations=1, num_elites=5, score="reward")
    action = given["mean"].unsqueeze(2) + given["std"].unsqueeze(2) * given["action_noise"][0]
    action = action.clamp(-0.9999, 0.9999)
    given["returns"] = given["returns"]._replace(reward=flat(given["returns"].reward, 2.0))
    plan = cem(**given)
    assert (plan.scores == 2.0 * H).all()
    torch.testing.assert_close(plan.mean, action[:, :, :5].mean(2), **CLOSE)

    # some above the tie, some in it
    given = arguments(1, samples=40, num_elites=30, score="reward")
    given["returns"] = given["returns"]._replace(reward=excess(given["returns"].reward))
    plan = cem(**given)
    above = (plan.scores > 0).sum(-1)
    assert (plan.scores >= 0).all() and (above > 0).all() and (above < 30).all()
    torch.testing.assert_close(tuple(plan), by_hand(**given), **CLOSE)


def test_the_order_of_scores():
    """A NaN's sign and payload do not matter, nor does the sign of zero."""
    scores = torch.tensor(
        [[nan, -0.0, 1.0, 0.0, -inf, -nan, inf, 1.0, -0.0, inf]], dtype=torch.float64
    )
    for dtype in (torch.float32, torch.float64):
        assert top(scores.to(dtype), 10).tolist() == [[6, 9, 2, 7, 1, 3, 8, 4, 0, 5]]
        assert top(scores.to(dtype), 3).tolist() == [[6, 9, 2]]


@pytest.mark.parametrize("score", ["lambda_return", "reward"])
@pytest.mark.parametrize("name", ["action_noise", "state_noise"])
def test_a_nan_candidate_is_no_elite(name, score):
    given = arguments(num_elites=N - 2, score=score)
    given[name][0, H - 1, 0, 1, 0] = nan  # within what K leaves over
    given[name][1, 0, 1, :4, 1] = nan  # two are left of four elites
    plan = cem(**given)
    lost = torch.zeros(I, B, N, dtype=torch.bool)
    lost[0, 0, 1] = lost[1, 1, :4] = True
    assert torch.equal(plan.scores.isnan(), lost)
    assert plan.mean.isfinite().all() and plan.std.isfinite().all()
    torch.testing.assert_close(tuple(plan), by_hand(**given), equal_nan=True, **CLOSE)


def test_a_row_of_nan_becomes_nan_and_the_others_do_not():
    given = arguments()
    want = cem(**given)
    given["action_noise"][1, 2, 1] = nan
    plan = cem(**given, min_std=0.0)
    assert plan.mean[:, 1].isnan().all() and plan.std[:, 1].isnan().all()
    assert plan.scores[0, 1].isfinite().all() and plan.scores[1:, 1].isnan().all()
    for got, clean in zip(plan, want, strict=True):
        torch.testing.assert_close(got[:, [0, 2]], clean[:, [0, 2]], **EXACT)


def test_minus_infinity_ranks_above_nan_and_infinity_first():
    given = arguments(iterations=1, score="reward")
    action = given["mean"].unsqueeze(2) + given["std"].unsqueeze(2) * given["action_noise"][0]
    action = action.clamp(-0.9999, 0.9999)
    for bias in (-inf, inf):
        changed = given | {"state_noise": given["state_noise"].clone()}
        changed["state_noise"][0, 0, :, 0] = nan
        head = flat(given["returns"].reward, bias)
        changed["returns"] = given["returns"]._replace(reward=head)
        plan = cem(**changed)
        assert plan.scores[..., 0].isnan().all() and (plan.scores[..., 1:] == bias).all()
        torch.testing.assert_close(plan.mean, action[:, :, 1:3].mean(2), **CLOSE)


def test_the_target_bootstraps_where_given():
    given = arguments()
    returns = given["returns"]
    scores = {}
    for name, heads in {
        "both": returns,
        "target": returns._replace(critic=None),
        "critic": returns._replace(target=None),
        "swapped": returns._replace(critic=None, target=returns.critic),
    }.items():
        scores[name] = cem(**given | {"returns": heads}).scores
    assert torch.equal(scores["both"], scores["target"])
    assert torch.equal(scores["critic"], scores["swapped"])
    assert (scores["both"] - scores["critic"]).abs().max() > 1e-3
    bare = returns._replace(critic=None, target=None)
    with pytest.raises(ValueError, match="cem: returns.critic is None, but the λ-return needs"):
        cem(**given | {"returns": bare})
    assert cem(**given | {"returns": bare, "score": "reward"}).scores.isfinite().all()


def test_nothing_has_a_gradient_and_no_argument_changes():
    given = arguments()
    params = given["params"]
    inp = params.inp._replace(weights=(params.inp.weights[0].clone().requires_grad_(),))
    given["params"] = params._replace(inp=inp)
    given["mean"].requires_grad_()
    before = {name: given[name].clone() for name in ("mean", "std", "action_noise", "state_noise")}
    state = torch.get_rng_state()
    for iterations in (0, I):
        noise = {name: given[name][:iterations] for name in ("action_noise", "state_noise")}
        plan = cem(**given | noise)
        assert not any(part.requires_grad for part in plan)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in before.items():
        assert torch.equal(given[name], value), name


def test_detached_heads_are_the_same_heads():
    returns = arguments()["returns"]
    weight = returns.reward.weights[0].clone().requires_grad_()
    reward = returns.reward._replace(weights=(weight, *returns.reward.weights[1:]))
    detached = returns._replace(reward=reward, target=None).detach()
    assert detached.reward.weights[0].data_ptr() == weight.data_ptr()
    assert not detached.reward.weights[0].requires_grad
    assert detached.target is None and detached[3:] == returns[3:]


@pytest.mark.parametrize("score", ["lambda_return", "reward"])
def test_under_autocast_scores_and_plan_are_float32(score):
    given = cem_inputs(SIZES, H, B, N, 1) | {"num_elites": N, "score": score}
    want = cem(**given, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        plan = cem(**given, backend="eager")
    assert {part.dtype for part in plan} == {torch.float32}
    torch.testing.assert_close(plan.scores, want.scores, rtol=0, atol=0.05)
    assert (plan.scores != want.scores).any()
    # summed over time in float32, not in the heads' bfloat16
    assert (plan.scores != plan.scores.bfloat16().float()).any()
    torch.testing.assert_close(plan.mean, want.mean)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("start", State(torch.zeros(B, 9), torch.zeros(B, 2)), "start.deter must be [B, D=3]"),
        ("start", State(torch.zeros(B, 3), torch.zeros(2, 2)), "start.stoch must be [B=3, S=2]"),
        ("mean", torch.zeros(H, B, 5), "mean must be [H, B=3, A=2] float64, got [4, 3, 5] float64"),
        ("mean", torch.zeros(H, 2), "mean must be [H, B=3, A=2] float64, got [4, 2] float64"),
        ("std", torch.zeros(H, B, 1), "std must be [H=4, B=3, A=2] float64, got [4, 3, 1]"),
        ("std", torch.zeros(5, B, 2), "std must be [H=4, B=3, A=2] float64, got [5, 3, 2]"),
        (
            "action_noise",
            torch.zeros(I, 5, B, N, 2),
            "action_noise must be [I, H=4, B=3, N, A=2] float64, got [3, 5, 3, 6, 2] float64",
        ),
        (
            "action_noise",
            torch.zeros(H, B, N, 2),
            "action_noise must be [I, H=4, B=3, N, A=2] float64, got [4, 3, 6, 2] float64",
        ),
        (
            "state_noise",
            torch.zeros(2, H, B, N, 2),
            "state_noise must be [I=3, H=4, B=3, N=6, S=2] float64, got [2, 4, 3, 6, 2] float64",
        ),
        (
            "state_noise",
            torch.zeros(I, H, B, 5, 2),
            "state_noise must be [I=3, H=4, B=3, N=6, S=2] float64, got [3, 4, 3, 5, 2] float64",
        ),
    ],
)
def test_wrong_shapes(name, x, message):
    x = State(*(part.double() for part in x)) if isinstance(x, State) else x.double()
    with pytest.raises(ValueError) as caught:
        cem(**arguments() | {name: x})
    assert str(caught.value).startswith(f"cem: {message}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_elites": 0}, "cem: num_elites must be in 1..N=6, got 0"),
        ({"num_elites": N + 1}, "cem: num_elites must be in 1..N=6, got 7"),
        ({"min_std": -0.1}, "cem: min_std must be at least 0, got -0.1"),
        ({"min_std": nan}, "cem: min_std must be at least 0, got nan"),
        ({"clip": 0.0}, "cem: clip must be positive, got 0.0"),
        ({"clip": nan}, "cem: clip must be positive, got nan"),
        (
            {"score": "return"},
            "cem: score must be one of lambda_return, reward or a function, got 'return'",
        ),
    ],
)
def test_wrong_numbers(changed, message):
    with pytest.raises(ValueError) as caught:
        cem(**arguments() | changed)
    assert str(caught.value) == message


def test_wrong_dtype_lambda_and_nothing_to_do():
    given = arguments()
    with pytest.raises(ValueError, match="cem: std must be .* float64, got .* float32"):
        cem(**given | {"std": given["std"].float()})
    off = given["returns"]._replace(lam=1.5)
    with pytest.raises(ValueError, match=r"cem: returns.lam must be in \[0, 1\], got 1.5"):
        cem(**given | {"returns": off})
    empty = {"mean": given["mean"][:0], "std": given["std"][:0]}
    empty |= {name: given[name][:, :0] for name in ("action_noise", "state_noise")}
    with pytest.raises(ValueError, match=r"cem: mean is empty, \[0, 3, 2\]"):
        cem(**given | empty)
    nobody = {name: given[name][:, :, :, :0] for name in ("action_noise", "state_noise")}
    with pytest.raises(ValueError, match=r"cem: num_elites must be in 1..N=0, got 2"):
        cem(**given | nobody)


def test_backends(check_backends):
    given = arguments()
    keywords = {name: given.pop(name) for name in ("num_elites", "score")}
    op = functools.update_wrapper(functools.partial(cem, **keywords), cem)
    check_backends(op, *given.values())
