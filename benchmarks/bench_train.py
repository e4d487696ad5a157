"""One whole update of preset `report`, data included: every variant against eager fp32."""

from __future__ import annotations

import pytest

from benchmarks import synthetic
from benchmarks.learner import VARIANTS, Learner

REFERENCE = next(iter(VARIANTS))
# Of a loss of the first update, from the same weights, batch and noise. bf16 keeps 8 bits: one
# rounding is up to 0.4 %, and the actor's loss stands behind 15 steps of dynamics. A wrong kernel
# is off by far more; what each op may be off is tested op by op.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("episodes")
    synthetic.write_episodes(directory, 2)
    replay = synthetic.open_replay(directory)
    replay.load()
    return replay


@pytest.mark.parametrize("variant", VARIANTS)
def test_update(versus, replay, variant: str) -> None:
    learner, reference = (Learner(name, replay, "report") for name in (variant, REFERENCE))
    ours, theirs = learner.step(), reference.step()
    for name in theirs:
        if name.endswith("_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), name
    versus(learner.step, reference.step, rounds=20)
