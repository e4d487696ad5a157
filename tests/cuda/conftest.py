"""What the interpreted_*.py files share, which run with the interpreter and a stand-in driver."""

import gc
import os

import pytest
import standin


@pytest.fixture(scope="session")
def driver():
    return standin.Driver(os.environ["FASTDREAMER_LIBCUDA"])


@pytest.fixture(scope="session")
def compiler():
    compiler = standin.Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def new_bench(driver, monkeypatch):
    """``new_bench(compile_kernel)``: a bench whose driver objects are all gone in the end."""
    made = []

    def new(compile_kernel):
        bench = standin.Bench(driver, compile_kernel)
        allocate = lambda slot, _: bench.arena.empty(slot.shape, slot.dtype)  # noqa: E731
        monkeypatch.setattr("fastdreamer.ops.triton.cuda_graph.empty", allocate)
        made.append(bench)
        return bench

    driver.fault()
    driver.fail(-1)
    yield new
    driver.fault()
    driver.fail(-1)
    driver.on_launch(None)
    for bench in made:
        bench.graphs.clear()
    gc.collect()
    assert driver.live() == {}
    assert driver.context_depth == 0


@pytest.fixture
def bench(new_bench, compiler):
    """Runs small programs (toy.py) with compiled kernels."""
    return new_bench(compiler)


class Graphs:
    """Stands in for ``run.run``: every program goes through a graph on the stand-in driver.

    Attributes:
        ran: each program that ran, and how many graph launches it took.
        change: what is run in place of a program.
        compare: whether the launches of an unchanged program are compared with it.
    """

    def __init__(self, driver, bench):
        self.driver, self.bench = driver, bench
        self.ran = []
        self.change = lambda program: program
        self.compare = True
        self._changed = {}

    def __call__(self, program, inputs):
        faulty = self._changed.setdefault(program, self.change(program))
        inputs = self.bench.inputs(inputs)
        since = self.driver.calls
        outputs = self.bench.run(faulty, inputs)
        if self.compare and faulty is program:
            self.bench.check_launches(program, {**inputs, **outputs})
        self.ran.append((program, self.driver.names(since).count("cuGraphLaunch")))
        return {name: tensor.clone() for name, tensor in outputs.items()}


@pytest.fixture(scope="session")
def assembler():
    return standin.Assembler()


@pytest.fixture
def new_graphs(driver, new_bench, monkeypatch):
    """``new_graphs(compile_kernel)`` sends the ops' programs through graphs."""

    def new(compile_kernel):
        graphs = Graphs(driver, new_bench(compile_kernel))
        for name in ("rollout", "observe", "cem", "lambda_return"):
            monkeypatch.setattr(f"fastdreamer.ops.triton.{name}.run", graphs)
        return graphs

    return new
