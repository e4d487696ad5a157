"""The ops' own programs replayed from graphs on the stand-in driver; run by test_ops.py.

Values and gradients against eager in float64, every launch against the program unrolled in
Python, guards around every tensor, and one graph launch a pass.
"""

import gc
import importlib
import os
import sys

import pytest
import standin

sys.path.insert(0, str(standin.HERE.parent / "ops"))

import interpreter  # noqa: E402
import torch  # noqa: E402

from fastdreamer import testing  # noqa: E402

interpreter.correct_bfloat16()
SMALL = testing.Sizes(A=2, D=20, S=6, E=24, hidden=24, units=24, reward_layers=1, critic_layers=1,
                      actor_layers=1, activation="elu")  # fmt: skip
CASES = {
    "rssm_step": lambda dtype: testing.rssm_step_inputs(SMALL, 5, dtype=dtype),
    "open_loop": lambda dtype: testing.open_loop_inputs(SMALL, 3, 5, dtype=dtype),
    "imagine": lambda dtype: testing.imagine_inputs(SMALL, 3, 5, heads=True, dtype=dtype),
    "observe": lambda dtype: testing.observe_inputs(SMALL, 3, 3, dtype=dtype),
    "cem": lambda dtype: (
        testing.cem_inputs(SMALL, 3, 2, 6, 2, dtype=dtype)
        | {"proposals": torch.full((3, 2, 1, 2), 0.25, dtype=dtype)}
    ),
}
ONLY = os.environ.get("FASTDREAMER_GRAPH_OPS", "").split() or list(CASES)


@pytest.fixture(scope="session")
def driver():
    return standin.Driver(os.environ["FASTDREAMER_LIBCUDA"])


@pytest.fixture(scope="session")
def compiler():
    compiler = standin.Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def graphs(driver, compiler, monkeypatch):
    """Sends every program through a graph on the stand-in; yields the programs that ran."""
    bench = standin.Bench(driver, compiler)
    allocate = lambda slot, _: bench.arena.empty(slot.shape, slot.dtype)  # noqa: E731
    monkeypatch.setattr("fastdreamer.ops.cuda_graph.empty", allocate)
    ran = []

    def run(program, inputs):
        inputs = bench.inputs(inputs)
        since = driver.calls
        outputs = bench.run(program, inputs)
        bench.check_launches(program, {**inputs, **outputs})
        ran.append((program, driver.names(since).count("cuGraphLaunch")))
        return {name: tensor.clone() for name, tensor in outputs.items()}

    for name in ("imagine", "observe", "cem"):
        try:
            module = importlib.import_module(f"fastdreamer.ops.triton.{name}")
        except ModuleNotFoundError:
            continue
        monkeypatch.setattr(module, "run", run, raising=False)
    yield ran
    driver.on_launch(None)
    bench.graphs.clear()
    gc.collect()
    assert driver.live() == {}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ONLY)
def test_values_and_gradients(graphs, name, bf16):
    op = getattr(importlib.import_module(f"fastdreamer.ops.{name}"), name)
    inputs = CASES[name](torch.float32)

    def evaluate(backend, dtype, autocast=False):
        return testing.evaluate(op, inputs, backend=backend, dtype=dtype, autocast=autocast)

    truth = evaluate("eager", torch.float64)
    eager = evaluate("eager", torch.float32, bf16)
    got = evaluate("triton", torch.float32, bf16)
    testing.assert_accurate(name, got, eager, truth, bf16=bf16)
    assert graphs, "no program ran"
    assert all(count == 1 for _, count in graphs), "one graph launch a pass"
    # forward, backward, and the critic's own backward
    assert len(graphs) == {"cem": 1, "imagine": 3}.get(name, 2)
