"""Small inputs of the ops, for the tests that send their programs through graphs."""

import importlib
import sys

import standin
import torch
from torch.utils._pytree import tree_map

from fastdreamer import testing

sys.path.insert(0, str(standin.HERE.parent / "ops"))

import interpreter  # noqa: E402

interpreter.correct_bfloat16()

CASES = {
    "rssm_step": testing.rssm_step_inputs(standin.SMALL, 5),
    "open_loop": testing.open_loop_inputs(standin.SMALL, 3, 5),
    "imagine": testing.imagine_inputs(standin.SMALL, 3, 5, heads=True),
    "observe": testing.observe_inputs(standin.SMALL, 3, 3),
    # with a single elite the second iteration's candidates would all be one, whatever the noise
    "cem": testing.cem_inputs(standin.SMALL, 3, 2, 7, 3)
    | {"proposals": torch.full((3, 2, 1, 2), 0.25), "num_elites": 3},
}


def evaluate(name, backend, dtype, autocast=False, *, scale=1.0, wrt=None):
    """As ``testing.evaluate``; ``scale`` is a factor of all parameters."""
    op = getattr(importlib.import_module(f"fastdreamer.ops.{name}"), name)
    inputs = dict(CASES[name])
    for key in inputs.keys() & {"params", "actor", "returns"}:
        inputs[key] = tree_map(lambda x: x * scale if torch.is_tensor(x) else x, inputs[key])
    return testing.evaluate(op, inputs, backend=backend, dtype=dtype, autocast=autocast, wrt=wrt)
