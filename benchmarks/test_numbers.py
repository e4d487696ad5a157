"""The numbers in the documents' prose and hand-made tables are those of the result files.

The tables that ``benchmarks.report`` writes have their own test (``test_tools.py``).
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale_model
from benchmarks.machine import ROOT
from benchmarks.report import README, RESULTS, TOP_README

CURVES = RESULTS / "curves"
FIGURES = ROOT / "docs" / "figures"


@functools.cache
def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


@functools.cache
def curve(path: Path) -> list[dict[str, str]]:
    """The rows of a table in a file, as of a run's curve."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    return list(csv.DictReader(lines))


def evaluations(name: str, folder: Path = CURVES) -> dict[int, dict[str, float]]:
    """Mean and std of the return and the seconds (a report has none) of every evaluation, by env
    frames."""
    names = {"return_mean": "mean", "return_std": "std", "seconds": "seconds"}
    return {
        int(row["env_frames"]): {short: float(row[long] or "nan") for long, short in names.items()}
        for row in curve(folder / f"{name}.csv")
        if row["kind"] == "eval"
    }


def prose(page: Path) -> str:
    """A page as one line."""
    return " ".join(page.read_text().split())


def spread(found: dict[str, float]) -> str:
    return f"{found['mean']:.0f} ± {found['std']:.0f}"


def listed(values: Iterable[float]) -> str:
    *most, last = (f"{value:.0f}" for value in values)
    return f"{', '.join(most)} and {last}"


def ms(times: dict[str, float]) -> float:
    return times["median_ms"]


# ------------------------------------------------------------------------------- sentences


def of_ops() -> Iterator[tuple[Path, str]]:
    works = result("ops/amd-epyc-25-17")["works"]
    works = {name: work["times"] for name, work in works.items()}
    cem = works["cem, one action"]
    yield (
        TOP_README,
        f"{ms(cem['native bf16']):.0f} ms native bfloat16, {ms(cem['eager fp32']):.0f} ms eager",
    )
    aims = {
        "encode + decode_error + backward": "encode + decode_error + backward",
        "cem, one action": "cem, one action",
        "whole update, data included": "whole update",
    }
    for name, label in aims.items():
        ours, baseline = ms(works[name]["native bf16"]), ms(works[name]["compiled bf16"])
        digits = 0 if ours >= 100 else 1
        yield README, f"| {label} | {ours:.{digits}f} ms, {baseline / ours:.2f}× ("


def of_peers() -> Iterator[tuple[Path, str]]:
    peers = result("peers")["peers"]
    times = {name: {k: ms(t) for k, t in found["bf16"].items()} for name, found in peers.items()}
    own = {name: t["own"] / t["fast"] for name, t in times.items()}
    yield (
        TOP_README,
        f"{min(own.values()):.1f} to {max(own.values()):.1f} times as fast as their own in "
        f"bfloat16 (dreamerv3-torch {own['NM512/dreamerv3-torch']:.1f}×, "
        f"r2dreamer {own['NM512/r2dreamer']:.1f}×)",
    )
    loops = [
        side / t["fast"]
        for name, t in times.items()
        if name.startswith("torchrl V3")
        for loop, side in t.items()
        if loop != "fast"
    ]
    yield (
        TOP_README,
        f"torchrl's V3 {min(loops):.1f} to {max(loops):.1f} times as fast as its loops",
    )


def _minutes(name: str) -> tuple[dict[int, float], float]:
    """When a curve passes 500 and 900, and when it ends."""
    seen = list(evaluations(name).values())
    aims = {aim: next(x["seconds"] for x in seen if x["mean"] >= aim) / 60 for aim in (500, 900)}
    return aims, seen[-1]["seconds"] / 60


_FIRST = (20_000, 40_000, 60_000)
_ALONG = (40_000, 100_000, 120_000, 200_000, 250_000, 300_000)
_THEIRS = (100_000, 200_000, 300_000)


def of_runs() -> Iterator[tuple[Path, str]]:
    native, eager = (run["updates_per_s"] for run in result("run")["runs"].values())
    at = result("run")["machine"]["commit"][:7]
    yield TOP_README, f"at work all the time: {native:.1f} native, {eager:.1f} eager at {at}"
    last = evaluations("actor", FIGURES / "report-pixels")
    minutes, whole = _minutes("walker-walk-pixels-v3-seed2")
    rows = curve(CURVES / "walker-walk-pixels-v3-seed2.csv")
    rows = [(int(r["update"]), float(r["seconds"])) for r in rows if r["kind"] == "episode"]
    speed = statistics.median(
        (after[0] - before[0]) / (after[1] - before[1])
        for before, after in itertools.pairwise(rows)
        if after[0] > before[0]
    )
    yield TOP_README, f"of that run: {speed:.1f} beside its collector (median episode)."
    told = f"{minutes[500]:.0f} to 500, {minutes[900]:.0f} to 900, {whole:.0f} in all"
    yield ROOT / "docs" / "recipe.md", told
    other, all_of_it = _minutes("walker-walk-pixels-v3-seed1")
    told = f"{other[500]:.0f} minutes to 500, {other[900]:.0f} to 900, {all_of_it:.0f} in all"
    yield ROOT / "docs" / "recipe.md", told
    v3 = [evaluations(f"walker-walk-pixels-v3-seed{seed}") for seed in (0, 1, 2)]
    bare = [evaluations(f"walker-walk-pixels-v3-no-sample-seed{seed}") for seed in (0, 1)]
    told = [" and ".join(f"{x[frames]['mean']:.0f}" for x in bare) for frames in _FIRST]
    beside = [", ".join(f"{x[frames]['mean']:.0f}" for x in v3) for frames in _FIRST]
    yield (
        ROOT / "docs" / "recipe.md",
        f"{', '.join(told)} at 20, 40, 60 000 (with samples, three seeds: {'; '.join(beside)})",
    )
    yield (
        TOP_README,
        f"500 is passed after {minutes[500]:.0f} minutes, 900 after {minutes[900]:.0f}",
    )
    yield TOP_README, f"**{spread(last[350_000])}** (ten episodes of the deterministic actor)"
    yield ROOT / "docs" / "recipe.md", f"`fastdreamer eval` at the end: **{spread(last[350_000])}**"
    means = listed(x["mean"] for x in last.values())
    yield ROOT / "docs" / "report.md", f"{means} at 10, 80, 150, 210"

    planned = evaluations("mpc", FIGURES / "report-pixels").values()
    told = f"MPC plays the same episodes: {listed(x['mean'] for x in planned)}."
    yield ROOT / "docs" / "report.md", told

    yield TOP_README, f"ends by itself, after {whole:.0f} minutes on two idle cores"
    played = curve(FIGURES / "report-pixels" / "episodes.csv")
    played = [float(row["seconds"]) for row in played if row["controller"] == "actor"]
    told = f"on one thread {statistics.median(played):.0f} seconds an episode of the actor"
    yield ROOT / "docs" / "report.md", told
    ends = {
        name: list(evaluations(f"walker-walk-state-collect-{name}").values())[-1]["seconds"] / 60
        for name in ("actor-seed0", "actor-seed1", "mixed-seed0", "mixed-seed1")
    }
    yield (
        ROOT / "docs" / "report.md",
        f"disturbed least took {ends['actor-seed1']:.0f} minutes (seed 1) and that of `mixed` "
        f"{ends['mixed-seed0']:.0f} (seed 0)",
    )
    others = f"took {ends['actor-seed0']:.0f} and {ends['mixed-seed1']:.0f}, half an hour's pause"
    yield ROOT / "docs" / "report.md", others
    paced = evaluations("walker-walk-pixels-v3-seed2")
    for aim, page in ((500, "minutes to 500, mean of seeds, seeds 0 and 1 at seed 2's speed"),
                      (900, "minutes to 900, likewise")):  # fmt: skip
        at = [next(f for f, x in each.items() if x["mean"] >= aim) for each in v3]
        spent = [paced[frames]["seconds"] / 60 for frames in at]
        each = ", ".join(f"{m:.0f}" for m in spent)
        asked = {500: "90 | 45", 900: "180 | 120"}[aim]
        told = f"{page} | {asked} | {statistics.fmean(spent):.0f} ({each}) |"
        yield ROOT / "docs" / "recipe.md", told
    told = f"{round(statistics.fmean(at) / 1000)} 000 ({', '.join(str(f // 1000) for f in at)} thou"
    yield ROOT / "docs" / "recipe.md", told

    today = evaluations("walker-walk-report-seed0")
    first, second, third = (spread(today[frames]) for frames in _THEIRS)
    own = {
        int(row["env_frames"]): float(row["mean_return"])
        for row in curve(ROOT / "fastdreamer" / "data" / "walker_pixels.csv")
        if (row["method"], row["task"]) == ("report-actor", "walk")
    }
    theirs = listed(own[frames] for frames in _THEIRS)
    yield (
        TOP_README,
        f"evaluation {first} over five episodes at 100 000 env frames (9 700 updates), {second} at "
        f"200 000 and {third} at 300 000 (29 700), where the report's own run had {theirs}",
    )
    seconds = f"{today[300_000]['seconds']:,.0f}".replace(",", " ")
    yield README, f"29 700 updates in {seconds} s;"
    yield README, f"evaluation (5 episodes) {first} at 100 000 env frames, {third} at 300 000 |"
    yield (
        ROOT / "docs" / "recipe.md",
        f"{listed(today[frames]['mean'] for frames in _ALONG)} at 40, 100, 120, 200, 250 and "
        f"300 000 (the report's own run: {theirs} at 100, 200 and 300 000)",
    )
    above = sorted(100 * (today[frames]["mean"] / own[frames] - 1) for frames in _THEIRS)
    yield ROOT / "docs" / "recipe.md", f"{above[0]:.0f} to {above[-1]:.0f} % above the report's own"
    native, eager = (evaluations(f"walker-stand-state-{b}")[40_000] for b in ("native", "eager"))
    yield README, f"at 40 000 env frames: native {spread(native)}, eager {spread(eager)};"
    yield TOP_README, f"({native['mean']:.0f} and {eager['mean']:.0f} at 40 000 env frames)"
    stand = evaluations("walker-stand-state")
    first, second = (stand[frames] for frames in (50_000, 60_000))
    yield (
        README,
        f"{spread(first)} at 50 000 env frames after {first['seconds']:.0f} s, {spread(second)} at "
        f"60 000 after {second['seconds']:.0f} s",
    )


def of_random_actions() -> Iterator[tuple[Path, str]]:
    returns = result("random_policy")["returns"]

    def told(task: str) -> str:
        values = returns[task]
        mean = sum(values) / len(values)
        std = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
        return f"{mean:.0f} ± {std:.0f}"

    yield TOP_README, f"uniformly random actions get {told('walker-walk')} (20 episodes)"
    page = ROOT / "docs" / "compare.md"
    yield page, f"(random actions get {told('walker-walk')})"
    yield page, f"random actions get {told('walker-stand')} on this task"


def of_the_pool() -> Iterator[tuple[Path, str]]:
    times = result("pool")["times"]
    gain = {
        kind: {name: ms(found["1 × 1"]) / ms(t) for name, t in found.items()}
        for kind, found in times.items()
    }
    pixels, state, ray = gain["pixels"], gain["state"], result("pool")["ray"]
    page = ROOT / "docs" / "scale.md"
    yield (
        TOP_README,
        f"two environments side by side collect {pixels['1 × 2']:.2f} times as fast as one from "
        f"pixels, two workers {pixels['2 × 1']:.1f} times",
    )
    yield (
        page,
        f"collect {pixels['1 × 2']:.2f} times as fast as one from pixels and {state['1 × 2']:.2f} "
        f"times from state, four {pixels['1 × 4']:.1f} and {state['1 × 4']:.1f} times",
    )
    yield page, f"two workers do more ({state['2 × 1']:.2f} times)"
    ratios = {kind: [f"{x:.2f}" for x in found.values()] for kind, found in ray.items()}
    yield (
        page,
        f"collected {' and '.join(ratios['pixels'])} times as much from pixels (one worker, two) "
        f"and {' and '.join(ratios['state'])} times from state",
    )


def of_costs() -> Iterator[tuple[Path, str]]:
    options = result("options")
    updates = {name: ms(t) / ms(options["updates"]["neither"])
               for name, t in options["updates"].items()}  # fmt: skip
    five = updates["explorer, 5 heads"], updates["explorer, 5 heads of 64 units"]
    yield (
        ROOT / "docs" / "exploration.md",
        f"an update takes {five[0]:.1f} times as long with five heads of the agent's width, "
        f"{five[1]:.1f} times with five of 64 units (`--explore.units 64`), "
        f"{updates['explorer, 5 heads and critics']:.1f} times with critics",
    )
    plain, kept, replaced = (ms(t) for t in options["decisions"].values())
    yield (
        ROOT / "docs" / "safety.md",
        f"takes {updates['barrier']:.1f} times as long with a barrier; a decision "
        f"{kept - plain:.1f} ms more where the shield keeps the action and "
        f"{replaced - plain:.1f} ms more where it replaces it",
    )
    planning = {name: ms(t) for name, t in result("planning")["times"].items()}
    native, fp32, bf16, eager = (
        planning[f"{b} {p}"]
        for b, p in (("native", "bf16"), ("native", "fp32"), ("eager", "bf16"), ("eager", "fp32"))
    )
    warm = planning["native bf16, warm"]
    page = ROOT / "docs" / "planning.md"
    yield (
        page,
        f"{native:.0f} ms native bfloat16, {fp32:.0f} native float32, {bf16:.0f} eager bfloat16, "
        f"{eager:.0f} eager float32. Native is {eager / native:.1f} times faster",
    )
    yield page, f"makes it {warm:.0f} ms ({eager / warm:.0f} times faster)"
    drawn = {name: found["ms"] for name, found in result("rendering")["variants"].items()}
    full = result("rendering")["variants"]["`rays`, `full`"]["difference"]
    yield (
        TOP_README,
        f"takes {drawn['`opengl`, `fast`']:.1f} ms by OpenGL on the CPU and "
        f"{drawn['`rays`, `fast`']:.1f} ms by `--render rays`",
    )
    yield TOP_README, f"at `full` rays are {full:.1f} of 255 from"
    yield (
        ROOT / "docs" / "recipe.md",
        f"{drawn['`opengl`, `fast`']:.1f} ms of CPU a frame instead of "
        f"{drawn['`opengl`, `full`']:.1f} |",
    )
    peaks = {n: list(p.values())[-1] for n, p in result("memory")["peaks"].items()}
    eager, native = (
        [peaks[f"learner, {b} {p}"] for p in ("fp32", "bf16")] for b in ("eager", "native")
    )
    yield (
        TOP_README,
        f"eager {eager[0]:.0f} MiB in float32 and {eager[1]:.0f} in bfloat16, native "
        f"{native[0]:.0f} and {native[1]:.0f};",
    )
    works = result("graph_overhead")["works"]
    replays = [1e3 * ms(work["times"]["replay"]) for work in works.values()]
    moved = works["imagine + heads"]["times"]["replay with every pointer moved, a node"]
    page = ROOT / "docs" / "gpu.md"
    yield page, f"The {min(replays):.1f} to {max(replays):.1f} µs of a replay measured"
    nodes = works["imagine + heads"]["nodes"]
    yield page, f"each node written adds {1e3 * ms(moved):.2f} µs there, which for all {nodes}"


def of_calibration() -> Iterator[tuple[Path, str]]:
    with (RESULTS / "calibration.csv").open() as file:
        for row in csv.DictReader(file):
            cells = [row["count"], f"{float(row['rmse']):.3f}", f"{float(row['spread']):.3f}"]
            cells += [f"{100 * float(row[f'coverage_{p}']):.0f} %" for p in (50, 80, 90, 95)]
            yield ROOT / "docs" / "exploration.md", f"| {' | '.join(cells)} |"


def of_comparisons() -> Iterator[tuple[Path, str]]:
    for path in sorted((RESULTS / "compare").glob("*.md")):
        yield ROOT / "docs" / "compare.md", " ".join(path.read_text().split())


SOURCES = (
    of_ops,
    of_peers,
    of_runs,
    of_random_actions,
    of_the_pool,
    of_costs,
    of_calibration,
    of_comparisons,
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_sentences_have_the_numbers_of_results(source):
    sentences = list(source())
    assert sentences
    for page, sentence in sentences:
        assert sentence in prose(page), f"{page.relative_to(ROOT)} should say: {sentence}"


# --------------------------------------------------------------------------- rows of curves

RECIPE = {f"`walker-v3`, seed {k}": f"walker-walk-pixels-v3-seed{k}" for k in range(3)}
RECIPE |= {f"`walker`, seed {k}": f"walker-walk-pixels-seed{k}" for k in range(3)}
RECIPE |= {f"seed {k}, 5 episodes": f"walker-walk-pixels-seed{k}" for k in range(3)}
RENDERING = {"rays, seed 0": "walker-walk-pixels-rays-seed0"}
RENDERING |= {f"OpenGL, seed {k}": f"walker-walk-pixels-seed{k}" for k in range(3)}
COLLECTING = {
    f"`{who}`, seed {k}": f"walker-walk-state-collect-{who}-seed{k}"
    for who in ("actor", "mixed")
    for k in range(2)
}


@pytest.mark.parametrize(
    ("page", "rows"), [("recipe", RECIPE), ("rendering", RENDERING), ("report", COLLECTING)]
)
def test_tables_of_returns_are_those_of_curves(page, rows):
    lines = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for label, name in rows.items():
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"| {label} |"))
        head = next(i for i in range(at, 0, -1) if not lines[i - 1].startswith("|"))
        seen = evaluations(name)
        for frames, told in zip(cells[head][1:], cells[at][1:], strict=True):
            found = seen[int(re.sub(r"k$", "000", frames.replace(" ", "")))]
            want = spread(found) if "±" in told else f"{found['mean']:.0f}"
            assert told == want, f"{page}, {label}, {frames}"


def test_training_episodes_of_a_healthy_run_are_those_of_its_curve():
    lines = (ROOT / "docs" / "recipe.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if "| training episodes | `kl`" in line)
    rows = curve(CURVES / "walker-walk-pixels-v3-seed2.csv")
    seen = {int(r["env_frames"]): float(r["return_mean"]) for r in rows if r["kind"] == "episode"}
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :]))
    assert len(table) == 9
    for line in table:
        at, told = (cell.strip() for cell in line.split("|")[1:3])
        at = int(at.replace(" ", ""))
        around = [value for frames, value in seen.items() if abs(frames - at) <= 5000]
        assert told == f"{statistics.fmean(around):.0f}", line


# ------------------------------------------------------------------------------- simulation


def test_the_simulation_of_scale_is_that_of_the_results():
    text = README.read_text()
    args = scale_model.parse(["--ratio", "1"])
    costs = scale_model.measured(args.quality)
    table, _ = scale_model.table(costs, **scale_model.setting_of(args))
    assert table in text, "run `python -m benchmarks.scale_model --ratio 1`"
    often = scale_model.setting_of(scale_model.parse([]))
    rates = [scale_model.simulate(costs, 1, ranks, **often)[0] for ranks in (1, 16)]
    told = "({:.0f} env frames a second with one rank, {:.0f} with 16)".format(*rates)
    assert told in prose(README)
    assert often["ratio"] == 64 and "replay ratio of 64 one collector" in prose(README)
