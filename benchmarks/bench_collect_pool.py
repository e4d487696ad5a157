"""A round of episodes by pools of workers × environments: the same work, the same bytes."""

from __future__ import annotations

import pytest

from benchmarks.pool import KINDS, opened
from fastdreamer.envs.gl import GLError, select_gl


@pytest.mark.parametrize("kind", KINDS)
def test_round(race, kind: str) -> None:
    if kind == "pixels":
        try:
            select_gl()
        except GLError as error:
            pytest.skip(str(error))
    with opened(kind) as runs:
        race(runs)
