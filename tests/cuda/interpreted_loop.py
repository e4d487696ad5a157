"""The graph loop end to end on the stand-in driver: numbers, replays, moved pointers, other shapes.

Run by test_loop.py with the interpreter on.
"""

import gc

import pytest
import torch
import toy
from toy import check_forward, check_search, forward_inputs, run_forward, search_inputs

from fastdreamer.ops.triton import program as graph
from fastdreamer.ops.triton.run import run_direct

H, B = 4, 6


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("H, B", [(1, 1), (2, 4), (5, 7)])
def test_forward(bench, H, B):
    program = toy.forward(H, B)
    inputs = bench.inputs(forward_inputs(1, H, B))
    outputs = bench.run(program, inputs)
    check_forward(outputs, inputs)
    assert len(bench.launched) == H
    direct = run_direct(program, inputs)
    assert torch.equal(outputs["y"], direct["y"])


@pytest.mark.parametrize("H, B", [(1, 3), (4, 5)])
def test_backward(bench, H, B):
    given = {name: x.requires_grad_() for name, x in forward_inputs(2, H, B).items()}
    y, states = toy.eager_forward(**given)
    after = y * toy.SCALE  # the state behind each step, without its constant noise
    grad = torch.randn(H, B, toy.D, generator=torch.Generator().manual_seed(3))
    total = (after * grad).sum()
    expected = torch.autograd.grad(total, [given["start"], given["weight"]])
    inputs = {"grad": grad, "y": y, "weight": given["weight"], "states": states}
    outputs = bench.run(
        toy.backward(H, B), bench.inputs({k: v.detach() for k, v in inputs.items()})
    )
    torch.testing.assert_close(outputs["grad_start"], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["grad_weight"], expected[1], rtol=1e-4, atol=1e-5)
    assert len(bench.launched) == H + 1


def test_nested_loops(bench):
    inputs = bench.inputs(search_inputs())
    program = toy.search(3, 3, 2, 5)
    outputs = bench.run(program, inputs)
    check_search(outputs, inputs)
    assert len(bench.launched) == 3 * (2 + 3)
    bench.check_launches(program, {**inputs, **outputs})


# ---------------------------------------------------------------- graphs


def test_one_launch_a_call_and_one_capture(bench, driver):
    program = toy.forward(H, B)
    run_forward(bench, program, 0)
    inputs = bench.inputs(forward_inputs(1))
    since = driver.calls
    check_forward(bench.run(program, inputs), inputs)
    names = driver.names(since)
    assert names.count("cuGraphLaunch") == 1
    assert not {"cuLaunchKernel", "cuStreamBeginCapture_v2", "cuModuleLoadData"} & set(names)
    assert len(bench.graphs) == 1


def test_only_nodes_with_moved_pointers_are_written(bench, driver):
    program = toy.forward(H, B)
    inputs = bench.inputs(forward_inputs(0))
    bench.run(program, inputs)
    moved = {**inputs, "start": bench.arena.copy(inputs["start"] + 1)}
    graphs = bench.graphs
    since = driver.calls
    outputs = bench.run(program, moved)
    check_forward(outputs, moved)
    # y is new as well and is in every node; so here is one node that only `start` moves:
    assert driver.names(since).count("cuGraphExecKernelNodeSetParams_v2") == H
    (entry,) = graphs._graphs.values()
    since = driver.calls
    entry.replay({**moved, **outputs})
    assert driver.names(since) == ["cuCtxPushCurrent_v2", "cuGraphLaunch", "cuCtxPopCurrent_v2"]
    entry.replay({**inputs, **outputs})
    assert driver.names(since).count("cuGraphExecKernelNodeSetParams_v2") == 1
    check_forward(outputs, inputs)


def test_other_shapes_are_other_graphs_and_old_ones_are_given_up(driver, compiler, bench):
    bench.graphs._capacity = 2
    programs = [toy.forward(h, B) for h in (2, 3, 4)]
    for program, h in zip(programs, (2, 3, 4), strict=True):
        inputs = bench.inputs(forward_inputs(h, h))
        check_forward(bench.run(program, inputs), inputs)
    assert len(bench.graphs) == 2
    gc.collect()
    assert driver.live() == {"contexts": 1, "modules": 1, "graphs": 2, "execs": 2}
    inputs = bench.inputs(forward_inputs(2, 2))
    check_forward(bench.run(programs[0], inputs), inputs)  # captured anew


@pytest.mark.parametrize("name, shift", [("start", 4), ("noise", 8)])
def test_a_pointer_at_no_multiple_of_16_is_not_promised_to_be_one(bench, name, shift):
    program = toy.forward(H, B)
    run_forward(bench, program)
    inputs = bench.inputs(forward_inputs(5), **{name: shift})
    check_forward(bench.run(program, inputs), inputs)
    assert len(bench.graphs) == 2


def test_rows_at_no_multiple_of_16_are_not_promised_to_be_either():
    rows = graph.Slot("x", (5, 3), torch.float32)
    t = graph.index("t")
    assert rows.at(t * 4).aligned
    assert not rows.at(t * 3).aligned
    assert not rows.at(t % 2 * 3).aligned
    assert not rows.at(1).aligned


def test_wrong_inputs_are_refused(bench):
    program = toy.forward(H, B)
    inputs = bench.inputs(forward_inputs(0))
    with pytest.raises(ValueError, match="inputs must be"):
        bench.graphs.run(program, {"start": inputs["start"]})
    with pytest.raises(ValueError, match=r"start must be \[6, 8\] torch.float32"):
        bench.graphs.run(program, {**inputs, "start": inputs["start"].double()})
    with pytest.raises(ValueError, match="weight must be .* contiguous"):
        bench.graphs.run(program, {**inputs, "weight": inputs["weight"].T})
