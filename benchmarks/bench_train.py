"""One whole update of preset `report`, data included."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import synthetic
from benchmarks.learner import Learner
from benchmarks.race import first_line, refused
from benchmarks.variants import OURS, VARIANTS, Entries, Variant
from fastdreamer.training.replay import Replay

REFERENCE = "eager fp32"
# Of a loss of the first update, from the same weights, batch and noise. bf16 keeps 8 bits: one
# rounding is up to 0.4 %, and the actor's loss stands behind 15 steps of dynamics. A wrong kernel
# is off by far more; what each op may be off is tested op by op.
TOLERANCE = 0.05


def open_replay(directory: Path) -> Replay:
    """Two episodes of noise, written there and loaded."""
    synthetic.write_episodes(directory, 2)
    replay = synthetic.open_replay(directory)
    replay.load()
    return replay


def differing(got: Mapping[str, float], expected: Mapping[str, float]) -> str:
    """What losses of the first update are not those expected; "" where all are."""
    return ", ".join(
        f"{loss} is {got[loss]:.4g}, expected {expected[loss]:.4g}"
        for loss in expected
        if loss.endswith("_loss") and not math.isclose(got[loss], expected[loss], rel_tol=TOLERANCE)
    )


def entries(
    replay: Replay,
    preset_name: str = "report",
    variants: Mapping[str, Variant] = VARIANTS,
) -> Entries:
    """A learner for each variant that is right in its first update; why the others are not there.

    Raises:
        AssertionError: losses of native or triton are not those of eager fp32.
    """
    expected = Learner(REFERENCE, replay, preset_name, variants).step()
    run, left_out, missing = {}, {}, []
    for name, variant in variants.items():
        learner = Learner(name, replay, preset_name, variants)
        try:
            got = learner.step()
        except RuntimeError as error:
            if not refused(variant, error):
                raise
            left_out[name] = first_line(error)
            missing.append(name)
            continue
        wrong = differing(got, expected)
        assert not wrong or variant.backend not in OURS, f"{name}: {wrong}"
        if wrong:
            left_out[name] = wrong
        else:
            run[name] = learner.step
    return Entries(run, left_out, tuple(missing))


def test_update(race) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = entries(open_replay(Path(folder)))
        race(built, rounds=20, warmup=1)
