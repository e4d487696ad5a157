"""The ops' own programs replayed from graphs on the stand-in driver; run by test_ops.py.

Values and gradients against eager in float64, every launch against the program unrolled in
Python, guards around every tensor, and one graph launch a pass.
"""

import os

import pytest
import real
import test_blocks_native
import torch

from fastdreamer import testing
from fastdreamer.ops.observe import observe

COMPILED = os.environ.get("FASTDREAMER_GRAPH_OPS", "").split()
"""The ops whose kernels are compiled; the others' are assembled from their parameters alone."""


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", real.CASES)
def test_values_and_gradients(request, new_graphs, name, bf16):
    compiled = name in COMPILED or COMPILED == ["all"]
    graphs = new_graphs(request.getfixturevalue("compiler" if compiled else "assembler"))
    truth = real.evaluate(name, "eager", torch.float64)
    eager = real.evaluate(name, "eager", torch.float32, bf16)
    got = real.evaluate(name, "triton", torch.float32, bf16)
    testing.assert_accurate(name, got, eager, truth, bf16=bf16)
    assert all(count == 1 for _, count in graphs.ran), "one graph launch a pass"
    # forward, backward, and the critic's own backward
    assert len(graphs.ran) == {"cem": 1, "imagine": 3}.get(name, 2)


def test_lambda_return(request, new_graphs, monkeypatch):
    """By itself; nothing of it is in bfloat16."""
    monkeypatch.setitem(real.CASES, "lambda_return", testing.lambda_return_inputs(3, 129))
    test_values_and_gradients(request, new_graphs, "lambda_return", False)


def test_steps_in_stages(request, new_graphs, monkeypatch):
    """DreamerV3's, whose launches have a second dimension of programs; states zeroed before."""
    inputs = test_blocks_native.Style(2, depth=2).apply(observe, real.CASES["observe"])
    monkeypatch.setitem(real.CASES, "observe", inputs)
    test_values_and_gradients(request, new_graphs, "observe", False)
