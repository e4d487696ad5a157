"""Faults seeded into small programs and into the loop: each has to be seen; run by test_loop.py."""

import pytest
import standin
import toy
from faults import changed, with_args
from toy import check_forward, check_search, forward_inputs, search_inputs

from fastdreamer.ops.triton import program as graph
from fastdreamer.ops.triton.program import Launch, Loop, Program

H, B = 4, 6


def wrong_stride(launch, number):
    if number == 0:
        return launch
    return with_args(launch, noise=launch.args["noise"].slot.at(B * toy.D + graph.index("t") * 8))


def no_double_buffer(launch, number):
    return launch if number == 0 else with_args(launch, after=launch.args["state"])


def step_too_few(program):
    loop = program.body[1]
    body = [program.body[0], Loop("t", loop.count - 1, loop.body)]
    return Program(program.name, list(program.slots.values()), body)


IN_THE_PROGRAM = {
    "wrong stride": lambda p: changed(p, wrong_stride),
    "no double buffer": lambda p: changed(p, no_double_buffer),
    "a step too few": step_too_few,
    "a wrong flag": lambda p: changed(p, lambda x, _: with_args(x, first_row=False)),
    "a wrong float": lambda p: changed(p, lambda x, _: with_args(x, scale=0.76)),
    "a row too few": lambda p: changed(p, lambda x, _: with_args(x, B=B - 1)),
    "a row too many": lambda p: changed(p, lambda x, _: with_args(x, B=B + 1)),
    "a short grid": lambda p: changed(p, lambda x, _: Launch(x.kernel, (1,), x.args)),
    "a swapped input": lambda p: changed(
        p, lambda x, n: with_args(x, state=p.slots["noise"]) if n == 0 else x
    ),
    "a written input": lambda p: changed(
        p, lambda x, n: with_args(x, after=p.slots["start"]) if n == 0 else x
    ),
}


@pytest.mark.parametrize("fault", IN_THE_PROGRAM)
def test_a_fault_in_the_program_is_caught(bench, fault):
    program = IN_THE_PROGRAM[fault](toy.forward(H, B))
    inputs = bench.inputs(forward_inputs(0))
    with pytest.raises(AssertionError):
        check_forward(bench.run(program, inputs), inputs)


def caught(bench, program, inputs, compare):
    """How a fault shows: by the launches' parameters, by the numbers."""
    ways = set()
    try:
        outputs = bench.run(program, inputs)
    except AssertionError:  # a stray pointer, a wrong block, a touched guard
        return {"launches", "numbers"}
    try:
        compare(outputs, inputs)
    except AssertionError:
        ways.add("numbers")
    try:
        bench.check_launches(program, {**inputs, **outputs})
    except AssertionError:
        ways.add("launches")
    return ways


# Twice the same launch gives the same numbers, and a row too many may be overwritten by the next.
MAY_LEAVE_THE_NUMBERS = ("repeat node", "wrong scalar")


@pytest.mark.parametrize("node", [0, 2])
@pytest.mark.parametrize("fault", standin.FAULTS)
def test_a_fault_of_the_loop_is_caught(bench, driver, fault, node):
    program = toy.forward(H, B)
    if fault == "stale pointers":  # the first call has none
        bench.run(program, bench.inputs(forward_inputs(0)))
    driver.fault(fault, node)
    ways = caught(bench, program, bench.inputs(forward_inputs(1)), check_forward)
    assert ("launches" in ways) == (fault != "none")
    if fault not in MAY_LEAVE_THE_NUMBERS:
        assert ("numbers" in ways) == (fault != "none")


@pytest.mark.parametrize("fault", ["none", "reverse order", "drop node", "swap pointers"])
@pytest.mark.parametrize("node", [1, 8, 14])
def test_a_fault_in_nested_loops_is_caught(bench, driver, fault, node):
    driver.fault(fault, node)
    ways = caught(bench, toy.search(3, 3, 2, 5), bench.inputs(search_inputs()), check_search)
    assert ways == (set() if fault == "none" else {"launches", "numbers"})
