"""Faults seeded into the ops' own programs: the comparison with eager has to see each.

Run by test_ops.py. A fault keeps a program valid (every pointer stays in its tensor), so that it
shows in nothing but the numbers.
"""

import functools

import pytest
import real
import torch
from faults import changed, with_args, without

from fastdreamer import testing
from fastdreamer.ops.triton.program import Launch, Loop, index


@functools.lru_cache(maxsize=16)
def expected(op, dtype, **options):
    return real.evaluate(op, "eager", dtype, **options)


def agrees(op, **options):
    """Run the op through graphs; whether its numbers are eager's."""
    got = real.evaluate(op, "triton", torch.float32, **options)
    eager, truth = (expected(op, dtype, **options) for dtype in (torch.float32, torch.float64))
    try:
        testing.assert_accurate(op, got, eager, truth)
    except AssertionError as error:
        assert ": error of " in str(error)
        return False
    return True


def of(kernel, argument=None, slot=None):
    """Whether a launch is of a kernel (module.function), an argument of which is in a slot."""

    def matches(launch):
        fn = launch.kernel.fn.fn
        name = f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"
        if name != kernel or argument is None:
            return name == kernel
        return argument in launch.args and launch.args[argument].slot.name == slot

    return matches


def edit(matches, **changes):
    """Other arguments for some launches: ``name=function of the launch's own``."""

    def change(launch, _):
        if not matches(launch):
            return launch
        new = {name: f(launch.args[name]) for name, f in changes.items() if name in launch.args}
        return with_args(launch, **new)

    return lambda program: changed(program, change)


def moved(offset=0):
    """A pointer elsewhere into its tensor."""
    return lambda argument: argument.slot.at(offset)


def left_out(matches):
    return lambda program: changed(program, lambda x, _: None if matches(x) else x)


def looped(name, make):
    def loop(item):
        return make(item) if item.name == name else item

    return lambda program: changed(program, lambda launch, _: launch, loop=loop)


def shorter(name):
    return looped(name, lambda loop: Loop(loop.name, loop.count - 1, loop.body))


def other_order(program):
    """The launches of a step in the opposite order."""
    return looped("t", lambda loop: Loop(loop.name, loop.count, loop.body[::-1]))(program)


def forwards(program):
    """The sweep from the first step to the last."""
    (count,) = (item.count for item in program.body if isinstance(item, Loop))

    def turned(value):
        if isinstance(value, int | float | bool):
            return value
        # stride · i is stride · (count - 1 - i) backwards
        terms = [(term.stride, count - 1 - index(term.loop)) for term in value.offset.terms]
        return value.slot.at(value.offset.base + sum(stride * i for stride, i in terms))

    def change(launch, _):
        return with_args(launch, **{name: turned(v) for name, v in launch.args.items()})

    return changed(program, change)


def dropped(matches, name):
    """Without a pointer that a kernel may do without."""

    def change(launch, _):
        found = matches(launch) and name in launch.args
        return without(launch, name) if found else launch

    return lambda program: changed(program, change)


def block_too_few(matches):
    def change(launch, _):
        grid = launch.grid[0] - 1, *launch.grid[1:]
        return Launch(launch.kernel, grid, launch.args) if matches(launch) else launch

    return lambda program: changed(program, change)


def parity(argument):
    """As if the states were kept in two buffers, one of which is wrong from step 2 on."""
    size = argument.slot.numel // argument.slot.shape[0]
    return argument.slot.at(index("t") % 2 * size)


def own_values(program):
    edited = edit(LAMBDA_RETURN, next_value=lambda _: program.slots["value"].at(0))
    return edited(program)


FORWARD, BACKWARD = of("cells.forward_kernel"), of("cells.backward_kernel")
MLP, GRADIENT = "mlp.forward_kernel", "weights.gradient_kernel"
LAMBDA_RETURN = of("lambda_return.forward_kernel")
BEHIND = 5 * 20  # imagine's state behind the first, [B, D]
ONE_TAPE = "one tape for all steps"

FAULTS = {
    "imagine": {
        "state buffers of the wrong parity": edit(FORWARD, deter=parity),
        "a step's noise does not advance": edit(FORWARD, noise=moved()),
        "the actor's noise does not advance": edit(of(MLP, "noise", "action_noise"), noise=moved()),
        "the last step is skipped": shorter("t"),
        "the actor comes behind the step": other_order,
        "the last row is left out": edit(FORWARD, rows=lambda rows: rows - 1),
        ONE_TAPE: edit(FORWARD, tape=moved()),
        "rewards of the states before": edit(of(MLP, "out", "reward"), x1=moved()),
        "the λ-return ends in the critic's own values": own_values,
    },
    "imagine backward": {
        "the sweep goes forwards": forwards,
        "the sweep ends a step early": shorter("t"),
        "what reaches the states from outside is not added": dropped(
            of("weights.copy_kernel", "source", "d_out.deter"), "source"
        ),
        "a weight does not learn from the last row": edit(
            of(GRADIENT, "d_weight", "d_actor.weight0"), rows=lambda rows: rows - 1
        ),
    },
    "critic backward": {
        "the states behind the step": edit(of(GRADIENT, "x", "deter"), x=moved(BEHIND)),
    },
    "open_loop backward": {
        "gradients of actions stay in the first step": edit(BACKWARD, d_action=moved()),
    },
    "observe": {
        "the reset of the first step in every step": edit(FORWARD, first=moved()),
        "the embedding of the first step in every step": edit(FORWARD, extra=moved()),
        "priors of the states before": edit(of(MLP, "out", "prior.mean"), x1=moved()),
    },
    "observe backward": {
        "gradients pass a reset": dropped(BACKWARD, "first"),
        "weights learn from states that a reset zeroed": dropped(of(GRADIENT), "first"),
    },
    "cem": {
        "candidates of the first iteration in every iteration": edit(
            of("cem.sample_kernel"), noise=moved()
        ),
        "an iteration too few": shorter("i"),
        "a refit by the scores of the first iteration": edit(
            of("cem.refit_kernel"), scores=moved()
        ),
        "a refit without the last row": block_too_few(of("cem.refit_kernel")),
        "the last reward does not count": edit(of("cem.score_kernel"), H=lambda H: H - 1),
    },
}  # by program


@pytest.mark.parametrize("name, fault", [(name, f) for name in FAULTS for f in FAULTS[name]])
def test_a_fault_in_a_program_is_caught(new_graphs, assembler, name, fault):
    graphs = new_graphs(assembler)
    faulty = []

    def change(program):
        if program.name != name:
            return program
        faulty.append(FAULTS[name][fault](program))
        before, after = ([_plain(x) for x in p.launches()] for p in (program, faulty[-1]))
        assert before != after, "the fault changes the program"
        return faulty[-1]

    graphs.change = change
    op = {"critic": "imagine"}.get(name.split()[0], name.split()[0])
    backward = "backward" in name or fault == ONE_TAPE
    assert not agrees(op, wrt=None if backward else ())
    assert len(faulty) == 1


@pytest.mark.parametrize("op", ["imagine", "observe", "cem"])
def test_without_a_fault_a_forward_pass_agrees(new_graphs, assembler, op):
    """As with gradients, see interpreted_ops.py."""
    new_graphs(assembler)
    assert agrees(op, wrt=())


def _plain(unrolled):
    launch, indices = unrolled
    values = {
        name: (v.slot.name, v.offset.value(indices)) if hasattr(v, "slot") else v
        for name, v in launch.args.items()
    }
    return launch.kernel.name, launch.grid, values


@pytest.mark.parametrize("fault", ["none", "packed once", "stale pointers"])
@pytest.mark.parametrize("op", ["imagine", "observe", "cem"])
def test_a_fault_in_a_second_call_is_caught(new_graphs, assembler, driver, op, fault):
    """With other weights, as after an optimiser's step; the graph is that of the first call."""
    graphs = new_graphs(assembler)
    assert agrees(op)
    count = len(graphs.ran)
    graphs.compare = fault == "none"
    if fault == "packed once":
        run = graphs.bench._launch

        def without_packing(identity, name, *rest):
            if not name.startswith("pack"):
                run(identity, name, *rest)

        driver.on_launch(without_packing)
    else:
        driver.fault(fault)
    assert agrees(op, scale=1.25) == (fault == "none")
    assert len(graphs.ran) == 2 * count and len(graphs.bench.graphs) == count
