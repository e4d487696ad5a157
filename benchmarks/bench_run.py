"""Learner and collector together, from pixels by preset walker: one cycle of training."""

from __future__ import annotations

import pytest

from benchmarks.machine import ROOT
from benchmarks.run import BACKENDS, Variant, running, settings
from fastdreamer.envs.gl import GLError, select_gl


def test_run(race) -> None:
    try:
        select_gl()
    except GLError as error:
        pytest.skip(str(error))
    options = settings("walker", 1.25, ["--preset", "walker"])
    with running({name: Variant(ROOT, name) for name in BACKENDS}, options) as runs:
        race({name: run.turn for name, run in runs.items()}, warmup=1, pause=0.3)
