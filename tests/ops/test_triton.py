"""The recurrent ops as Triton kernels, under Triton's interpreter, against eager float64.

The interpreter is chosen by the environment before triton is imported, so every check runs in a
process of its own. The interpreter is slow: the default run takes small models that have a
remainder in every block, ``python tests/ops/test_triton.py all`` every case of the native tests
that takes less than minutes.
"""

import itertools
import math
import os
import sys

import forked
import pytest
import torch
from torch.utils._pytree import tree_map_only

from fastdreamer import testing
from fastdreamer.ops.backend import last_backend
from fastdreamer.ops.cem import cem, top
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import Sizes, assert_accurate

OPS = {
    "rssm_step": rssm_step,
    "open_loop": open_loop,
    "imagine": imagine,
    "observe": observe,
    "cem": cem,
}
nan, inf = math.nan, math.inf
DEVICE = "cpu"  # tests/test_gpu.py runs the same on a GPU

# sizes, H or T, B, layers of inp and of prior and posterior; one block of 16 columns and its
# remainder, several blocks, more than one block of rows
SMALL = Sizes(3, 21, 5, 7, 17, 19, 1, 2, 2, "elu")
CASES = {
    "blocks": (Sizes(2, 35, 17, 33, 40, 35, 1, 0, 1, "elu", 20), 2, 3, (1, 2)),
    "rows": (Sizes(1, 7, 1, 1, 5, 5, 0, 1, 1, "tanh"), 2, 17, (2, 1)),
    "silu": (Sizes(3, 16, 5, 9, 17, 18, 2, 1, 0, "silu", 33), 1, 4, (2, 3)),
    "relu": (Sizes(6, 21, 30, 4, 33, 20, 1, 2, 1, "relu"), 2, 1, (1, 2)),
}
ONLY_FP32 = ("relu",)  # in bfloat16 a unit near its kink may switch, as in the native tests


def evaluate(*arguments, **options) -> dict:
    return testing.evaluate(*arguments, **options, device=DEVICE)


def on_device(inputs: dict) -> dict:
    return tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), inputs)


def check(op: str, inputs: dict, *, bf16: bool = False, **options) -> None:
    run, fp32 = OPS[op], {"dtype": torch.float32, "autocast": bf16, **options}
    got = evaluate(run, inputs, backend="triton", **fp32)
    eager = evaluate(run, inputs, backend="eager", **fp32)
    truth = evaluate(run, inputs, backend="eager", dtype=torch.float64, **options)
    assert_accurate(op, got, eager, truth, bf16=bf16)


def make_inputs(op: str, *case) -> dict:
    from test_native import make_inputs  # layers of any number

    return on_device(make_inputs(op, *case))


def cem_inputs(*case) -> dict:
    return on_device(testing.cem_inputs(*case))


def check_case(op: str, name: str, *precisions: bool) -> None:
    for bf16 in precisions:
        check(op, make_inputs(op, *CASES[name]), bf16=bf16)


# --- what a process of its own runs -------------------------------------------------------------


def check_rssm_step() -> None:
    check_case("rssm_step", "blocks", False)
    check_case("rssm_step", "silu", True)
    inputs = make_inputs("rssm_step", SMALL, 1, 2)
    check("rssm_step", inputs, using=("out[1].std",))
    check("rssm_step", inputs, wrt=())
    check("rssm_step", inputs, wrt=("action",))


def check_open_loop() -> None:
    check_case("open_loop", "rows", False)
    check_case("open_loop", "silu", True)


def check_imagine() -> None:
    check_case("imagine", "blocks", False)
    check_case("imagine", "silu", True)
    check_case("imagine", "relu", False)


def check_imagine_gradients() -> None:
    """Of some inputs by some outputs: exactly those that native gives."""
    inputs = make_inputs("imagine", SMALL, 2, 2)
    check("imagine", inputs, wrt=())
    check("imagine", inputs, wrt=("actor",), using=("out.returns",))
    check("imagine", inputs, wrt=("returns.critic", "start"), using=("out.value", "out.action"))
    inputs["returns"] = inputs["returns"]._replace(target=None)
    check("imagine", inputs, wrt=("returns.reward",), using=("out.reward", "out.returns"))
    del inputs["returns"]
    check("imagine", inputs, wrt=("params.gru",), using=("out.deter",))


def check_observe() -> None:
    check_case("observe", "blocks", True)
    check_case("observe", "rows", False)
    check_case("observe", "silu", False)


def check_observe_gradients() -> None:
    inputs = make_inputs("observe", SMALL, 3, 3)
    inputs["is_first"][0, 1] = inputs["is_first"][2, 2] = True
    check("observe", inputs, using=("out.prior.std",), wrt=("embed", "params.prior"))
    check("observe", inputs, using=("out.state.stoch",), wrt=("start", "action", "params.post"))
    check("observe", inputs, wrt=())
    wide = {**inputs, "embed": inputs["embed"].bfloat16().float()}
    outs, grads = [], []
    for given in (wide["embed"], wide["embed"].bfloat16()):
        given = given.clone().requires_grad_()
        seen = observe(**wide | {"embed": given}, backend="triton")
        seen.state.stoch.square().sum().backward()
        outs.append(seen.post.mean)
        grads.append(given.grad)
    assert torch.equal(*outs) and grads[1].dtype == torch.bfloat16
    assert torch.equal(grads[0].bfloat16(), grads[1])


def check_cem() -> None:
    inputs = cem_inputs(SMALL, 3, 2, 9, 2)
    check("cem", inputs, wrt=())
    check("cem", inputs | {"score": "reward", "num_elites": 9}, wrt=())
    check("cem", inputs | {"sample_std": True}, wrt=())
    check("cem", cem_inputs(SMALL, 1, 1, 17, 2), wrt=(), bf16=True)
    inputs = cem_inputs(SMALL, 2, 2, 1, 2)
    inputs["returns"] = inputs["returns"]._replace(target=None)
    check("cem", inputs, wrt=())
    given = {k: v for k, v in inputs.items() if k not in ("action_noise", "state_noise")}
    none = cem(
        **given, action_noise=inputs["action_noise"][:0], state_noise=inputs["state_noise"][:0],
        backend="triton",
    )  # fmt: skip
    assert torch.equal(none.mean, given["mean"]) and none.scores.shape == (0, 2, 1)


def check_bfloat16() -> None:
    """Over all results and gradients of an op, the error is no larger than autocast's."""
    for op in OPS:
        check_overall(op, Sizes(3, 40, 12, 48, 64, 64, 2, 3, 4, "elu"), 4, 8)


def check_overall(op: str, sizes: Sizes, steps: int, rows: int) -> None:
    if op == "cem":
        # all of them elite: else a rounding would decide which are
        inputs = cem_inputs(sizes, steps, 2, rows, 1) | {"num_elites": rows}
    else:
        inputs = make_inputs(op, sizes, steps, rows)
    check_overall_of(op, inputs)


def check_overall_of(op: str, inputs: dict) -> None:
    from test_native import overall

    got, eager = (
        evaluate(OPS[op], inputs, backend=backend, dtype=torch.float32, autocast=True)
        for backend in ("triton", "eager")
    )
    truth = evaluate(OPS[op], inputs, backend="eager", dtype=torch.float64)
    ours, autocast = overall(got, truth), overall(eager, truth)
    print(f"{op}: error in bfloat16 {ours:.4f}, of autocast {autocast:.4f}", flush=True)
    assert ours <= autocast


def check_variants() -> None:
    """Column orders, std transforms, plain means, discount heads, resets by part, gradients
    through what the actor sees."""
    from test_variants import discount_head, make

    orders = {"action_first": True, "embed_first": True, "stoch_first": True}
    for transform in ("exp", "floor"):  # softplus is everywhere, sigmoid below
        check("rssm_step", make("rssm_step", B=2, transform=transform, **orders))
    for reset in ("state", "stoch", "deter"):
        check("observe", make("observe", 3, 3, reset=reset, **orders))
    flags = {"discount": discount_head(), "through_feat": True}
    check("imagine", make("imagine", 2, 3, mean_scale=inf, transform="sigmoid", **flags))
    check("imagine", make("imagine", 2, 3, **flags, **orders), bf16=True)
    check("imagine", make("imagine", 2, 3, **flags), wrt=("start",), using=("out.discount",))
    check("cem", make("cem", 2, 5, discount=flags["discount"], **orders), wrt=())
    check("imagine", make("imagine", 2, 3, departure=True, discount=flags["discount"]))
    check("cem", make("cem", 2, 3, departure=True) | {"num_elites": 3}, wrt=())


def check_refit() -> None:
    """Ties go to the lower index, -0 is 0, NaN comes last and is never an elite."""
    import triton

    from fastdreamer.ops.triton.cem import refit_kernel, sample_kernel

    rows = [
        [1.0, 2.0, 2.0, 2.0, -1.0, 0.5, 2.0],
        [0.0, -0.0, 0.0, -0.0, -1.0, -0.0, 0.0],
        [nan, -inf, 3.0, nan, inf, -inf, nan],
        [nan, nan, 1.0, nan, nan, nan, -nan],
        [nan] * 7,
        [-inf] * 7,
        [inf, -3.5, -1e-45, 1e-45, 3e38, -3e38, inf],
    ]
    scores = torch.tensor(rows, device=DEVICE)
    B, N = scores.shape
    H, A = 3, 2
    action = torch.randn(H, B, N, A, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for K, less in itertools.product(range(1, N + 1), (0, 1)):
        mean = torch.full((H, B, A), -9.0, device=DEVICE)
        std = torch.full_like(mean, -9.0)
        refit_kernel[(B,)](
            scores, action, mean, std, B, 0.05,
            H=H, A=A, N=N, K=K, LESS=less, NP=16, KP=max(2, triton.next_power_of_2(K)), BLOCK=16,
        )  # fmt: skip
        best = top(scores, K)
        elites = action.take_along_dim(best[None, :, :, None], 2).double()
        failed = scores.take_along_dim(best, 1).isnan()
        elites = elites.masked_fill(failed[None, :, :, None], nan)
        want = elites.nanmean(2)
        count = (~failed).sum(1)[:, None].double()
        factor = count / (count - less).clamp(min=1)
        spread = (elites - want.unsqueeze(2)).square().nanmean(2)
        spread = (spread * factor).sqrt().clamp(min=0.05)
        close = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(mean.double(), want, **close)
        torch.testing.assert_close(std.double(), spread, **close)

    mean = torch.tensor([0.5, nan, 5.0, -5.0], device=DEVICE).view(2, 1, 2)
    noise = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = torch.full_like(noise, -9.0)
    proposals = 2 * torch.randn(2, 1, 1, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    drawn = mean.unsqueeze(2) + mean.abs().unsqueeze(2) / 9 * noise
    for given in (None, proposals):
        P = 0 if given is None else 1
        sample_kernel[(1,)](
            mean, mean.abs() / 9, noise, given, got, 12, 0.9, A=2, N=3, P=P, BLOCK=16
        )
        want = torch.cat([proposals[:, :, :P], drawn[:, :, P:]], 2).clamp(-0.9, 0.9)
        torch.testing.assert_close(got, want, equal_nan=True)


def check_misuse() -> None:
    """What was saved for a backward pass may not be changed, and gradients have none."""
    inputs = make_inputs("open_loop", SMALL, 2, 2)
    action = inputs["action"].requires_grad_()
    states = open_loop(**inputs, backend="triton")
    states.deter.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="triton gradients have none of their own"):
        torch.autograd.grad(states.deter.sum(), action, create_graph=True)
    with torch.no_grad():
        inputs["params"].gru.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.deter.sum().backward()


QUICK = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and name not in ("check_case", "check_overall", "check_overall_of")
}


def check_all() -> None:
    """Every case of these and of the native tests that the interpreter gets through."""
    from test_native import CASES as NATIVE
    from test_native import precisions

    for function in QUICK.values():
        function()
    for op in OPS:
        check_overall(op, testing.REPORT, 3, 16)
    for op in ("rssm_step", "open_loop", "imagine", "observe"):
        for name in CASES:
            check_case(op, name, *[False] * 1, *[True] * (name not in ONLY_FP32))
        for name, case in NATIVE.items():
            if max(case[0].D, case[0].units) <= 200 and case[2] < 60:
                for bf16 in precisions(name):
                    check(op, make_inputs(op, *case), bf16=bf16)
                print(op, name, flush=True)


def run_self(name: str, file: str = __file__) -> str:
    """Run a check of a file in a process whose triton is interpreted; return its last word."""
    done = forked.run(file, name, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize("name", QUICK)
def test_under_the_interpreter(name):
    assert run_self(name) == "triton"


def test_a_call_does_not_ask_for_its_parameters_one_by_one(monkeypatch):
    """Which a host would do in every call; nothing is launched here."""
    from fastdreamer.ops.triton import rollout

    asked, parameters = [], rollout.Call.parameters
    counted = lambda call: asked.append(1) or parameters(call)  # noqa: E731
    monkeypatch.setattr(rollout.Call, "parameters", counted)

    def nothing(program, inputs):
        outputs = program.of_kind("output")
        return {slot.name: torch.zeros(slot.shape, dtype=slot.dtype) for slot in outputs}

    monkeypatch.setattr(rollout, "run", nothing)
    x = testing.imagine_inputs(SMALL, 2, 3, heads=True)
    call = rollout.Call("imagine", x["params"], x["actor"], x["returns"])
    noises = {name: x[name] for name in ("state_noise", "action_noise")}
    found = call(**rollout.start_of(x["start"]), **noises)
    assert found["returns"].shape == (2, 3) and len(asked) <= 3


def main(checks: dict, name: str) -> None:
    """That process; what a program has not written yet is NaN."""
    from interpreter import correct_bfloat16

    from fastdreamer.ops.triton import program

    correct_bfloat16()
    empty = program.empty
    program.empty = lambda slot, device: empty(slot, device).fill_(nan)
    os.environ.setdefault("FASTDREAMER_BACKEND", "triton")
    checks[name]()
    ops = [op for op in OPS if last_backend(op)]
    assert ops or name == "refit"
    print("triton")


if __name__ == "__main__":
    main(QUICK | {"all": check_all}, sys.argv[1])
