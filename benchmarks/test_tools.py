"""The tools that measure: run as `pytest benchmarks/test_tools.py`; no time is judged."""

from __future__ import annotations

import importlib
import json
import time

import pytest
import torch

from benchmarks import machine, report
from benchmarks.__main__ import MEASUREMENTS
from benchmarks.timing import PhaseRecorder, cell, summary


def test_time_of_nested_ranges_is_counted_once(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    recorder = PhaseRecorder()
    with (
        recorder.repeat(containers=["update"]),  # 0 … 28
        recorder.annotate("update"),  # 1 … 21
        recorder.annotate("backward"),  # 3 … 15
        recorder.annotate("optimizer", color="red"),  # 6 … 10
    ):
        pass
    assert recorder.samples == {
        "backward": [(6 - 3) + (15 - 10)],
        "optimizer": [10 - 6],
        "whole": [28],
        "other": [28 - 8 - 4],
    }


def test_a_range_that_raises_is_closed():
    recorder = PhaseRecorder()
    with recorder.repeat():
        with pytest.raises(KeyError), recorder.annotate("fails"):
            raise KeyError
        with recorder.annotate("next"):
            pass
    assert recorder.samples.keys() == {"fails", "next", "other", "whole"}
    assert sum(v[0] for k, v in recorder.samples.items() if k != "whole") == pytest.approx(
        recorder.samples["whole"][0]
    )


def test_summary_and_cell():
    times = summary([0.001 * n for n in range(1, 102)])
    assert times == pytest.approx(
        {"median_ms": 51.0, "p20_ms": 21.0, "p80_ms": 81.0, "repeats": 101}
    )
    assert cell(times) == "51.0 (21.0–81.0)"
    assert cell(None) == "–"


def test_fill_replaces_one_place_only():
    document = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nold\n<!-- end -->\n"
    filled = report.fill(document, "x", r"new \1")
    assert filled == document.replace("old", r"new \1", 1)
    with pytest.raises(ValueError, match="<!-- z -->"):
        report.fill(document, "z", "new")


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_readme_holds_the_results(name):
    path = report.RESULTS / f"{name}.json"
    readme = report.README.read_text()
    if not path.exists():
        assert f"<!-- {name} -->\nNot measured yet.\n<!-- end -->" in readme
        return
    result = json.loads(path.read_text())
    table = importlib.import_module(f"benchmarks.{name}").table(result)
    text = f"{table}\n\nMeasured on: {machine.describe(result['machine'])}."
    assert report.fill(readme, name, text) == readme, "run the measurement with --write"


def test_phases_of_a_tiny_update_add_up():
    from benchmarks import phases

    threads = torch.get_num_threads()
    try:
        result = phases.measure(20, 1, 1, "tiny")
    finally:
        torch.set_num_threads(threads)
    for measured in result["phases"].values():
        assert measured.keys() == phases.ROWS.keys()
        assert all(times["repeats"] == 20 for times in measured.values())
        assert measured["other"]["median_ms"] < measured["whole"]["median_ms"] / 2
    assert "whole update" in phases.table(result)


def test_too_few_repeats_are_refused():
    from benchmarks import phases

    with pytest.raises(ValueError, match="at least 20"):
        phases.measure(19, 1, 1)
