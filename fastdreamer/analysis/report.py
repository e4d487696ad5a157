"""The report's figures from a run's snapshots: returns of actor and MPC, and what is dreamed.

Every episode is a line of ``episodes.csv`` as soon as it has ended, so a report that was stopped
goes on where it was; the figures are drawn from the files.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdreamer.acting.play import episode_seed
from fastdreamer.analysis.abreast import Cast, Key, Row
from fastdreamer.analysis.viz.curves import plot_runs, write_curve
from fastdreamer.analysis.viz.dreams import dream_figure, state_figure
from fastdreamer.config import ConfigError, PlanConfig
from fastdreamer.files import make_directory, room_for, write_csv
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.checkpoint import (
    CheckpointError,
    checksum,
    list_checkpoints,
    list_snapshots,
    load_meta,
)
from fastdreamer.training.trainer import RunError, read_config

POINTS = 6
"""Snapshots of a run that a report plays where nothing else is asked."""
_COLUMNS = ("controller", "env_frames", "update", "episode", "return", "seconds", "crc32")


class EpisodeOver(RunError):
    """An episode ended before its dream could begin; ``decisions`` says after how many."""

    def __init__(self, decisions: int, context: int) -> None:
        super().__init__(
            f"the episode ended after {decisions} decision{'s' * (decisions > 1)}, within the "
            f"context of {context}: choose a smaller one, or another seed"
        )
        self.decisions = decisions


def write_report(
    run: Path,
    out: Path,
    *,
    controllers: Sequence[str] = (),
    episodes: int = 10,
    points: int = POINTS,
    seed: int = 0,
    threads: int = 0,
    plan: PlanConfig | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Evaluate a run's snapshots and draw the report's Figures 3, 4 and 5.

    Args:
        run: run directory; its snapshots are used, or its checkpoints where it has none.
        out: directory for ``episodes.csv``, one curve a controller (``actor.csv``, ``mpc.csv``),
            ``figure-3.png`` (the first controller along training), ``figure-4.png`` (the dream of
            the last snapshot over the truth) and ``figure-5.png`` with its numbers,
            ``figure-5.csv`` (all controllers). Episodes it holds already are not played again.
        controllers: see ``Policy.act``; none: actor and mpc, or PlaNet's planet.
        episodes: a snapshot and controller; the same seeds for every one.
        points: snapshots used at most, spread evenly over the run; 0: all.
        seed: of the episodes.
        threads: how many episodes are played side by side, a thread each; 0: as many as torch has
            threads, ``TOGETHER`` at most. Of a task of others' code, whose environments may not
            bear it, and with ``plan.budget_ms`` one after another is played, on all of them.
        plan: settings of the planner; None: the run's own.
        say: receives lines of progress.

    Returns:
        The files written.

    Raises:
        RunError: no run, or no snapshot that can be read. ConfigError: the run has no such
        controller, or ``out`` holds episodes under other settings.
    """
    config = read_config(run)
    if episodes < 1 or points < 0 or threads < 0:
        raise ConfigError(
            "episodes must be >= 1, points and threads >= 0, got "
            f"{episodes}, {points} and {threads}"
        )
    plan = config.plan if plan is None else plan
    dataclasses.replace(config, plan=plan).validate()
    own = ("planet",) if config.agent == "planet" else ("actor", "mpc")
    controllers = list(dict.fromkeys(controllers or own))
    snapshots = _spread(_snapshots(run), points)
    make_directory(out)
    about = {
        "run": run.resolve().name,
        "task": config.env.task,
        "obs": config.env.obs,
        "seed": seed,
        "plan": dataclasses.asdict(plan),
    }
    episodes_file = out / "episodes.csv"
    done = _read_episodes(episodes_file, about)
    _refuse_others(episodes_file, done, snapshots)
    wanted = [(c, f, i) for c in controllers for f in snapshots for i in range(episodes)]
    missing = [key for key in wanted if key not in done]
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} of {len(wanted)} episodes are in {episodes_file}")
    cast = Cast(
        config, snapshots, plan=plan, episodes=episodes, seed=seed, threads=threads, say=say
    )
    with contextlib.closing(cast.play(missing)) as played:
        for row, line in played:
            done[row["controller"], row["env_frames"], row["episode"]] = row
            _append(episodes_file, about, row)
            say(line)
    rows = [done[key] for key in wanted if key in done]
    if not rows:
        raise RunError(f"{run}: no snapshot could be read")
    files = _draw(out, about, controllers, rows)
    if cast.newest is not None:
        files.append(_draw_dream(cast.newest, cast.env, seed, out))
    return [episodes_file, *files]


def dream_and_live(
    agent: Dreamer, env: Any, *, context: int, decisions: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the agent imagines after watching so many decisions, and what then really happens.

    Returns:
        Imagined and real observations [decisions, ...] by kind, under the same actions; fewer
        where the episode ends.

    Raises:
        EpisodeOver: the episode ended during the context.
    """
    seed = episode_seed(seed, "evaluate", 0)
    generator = torch.Generator().manual_seed(seed)
    obs, state = env.reset(seed=seed), None
    for watched in range(1, context + 1):
        action, state = agent.act(obs, state, generator=generator)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            raise EpisodeOver(watched, context)
    _, state = agent.act(obs, state, generator=generator)
    actions, seen = agent.dream(state, decisions, generator)
    real = []
    for action in actions:
        obs, _, terminated, truncated, _ = env.step(action)
        real.append(obs)
        if terminated or truncated:
            break
    return (
        {kind: array[: len(real)] for kind, array in seen.items()},
        {kind: np.stack([obs[kind] for obs in real]) for kind in seen},
    )


def _snapshots(run: Path) -> dict[int, Path]:
    """Snapshots by env frames, or checkpoints where there are none."""
    found = list_snapshots(run / "snapshots")
    if found:
        return found
    for path in list_checkpoints(run / "checkpoints"):
        try:
            found[load_meta(path)["cursor"]["env_frames"]] = path
        except CheckpointError:
            continue  # damaged: as load_newest passes it over
    if not found:
        raise RunError(f"{run} holds no snapshot and no checkpoint yet")
    return found


def _spread(snapshots: dict[int, Path], points: int) -> dict[int, Path]:
    """So many of them at most, evenly by env frames, first and last included."""
    if not points or len(snapshots) <= points:
        return snapshots
    frames = np.array(sorted(snapshots))
    wanted = np.linspace(frames[0], frames[-1], points) if points > 1 else frames[-1:]
    nearest = {int(frames[np.abs(frames - w).argmin()]) for w in wanted}
    return {f: snapshots[f] for f in sorted(nearest)}


def _read_episodes(path: Path, about: dict[str, Any]) -> dict[Key, Row]:
    """Rows by controller, env frames and episode; the file is made such as is written today: a line
    that a kill cut short goes, and what it had no column for is blank."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    first, _, rest = whole.partition("\n")
    if not first:
        path.unlink()
        return {}
    try:
        before = json.loads(first.removeprefix("# "))
        table = csv.DictReader(rest.splitlines())
        rows = [
            {
                "controller": row["controller"],
                **{name: int(row[name]) for name in ("env_frames", "update", "episode")},
                **{name: float(row[name]) for name in ("return", "seconds")},
                "crc32": row.get("crc32") or "",
            }
            for row in table
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a report's episodes: {error}") from error
    changed = [name for name in about if before.get(name) != about[name]]
    if changed:
        raise ConfigError(
            f"{path} holds episodes with another {' and '.join(changed)}; choose another --out"
        )
    if whole != text or (table.fieldnames or ()) != [*_COLUMNS]:
        write_csv(path, rows, columns=_COLUMNS, about=before)
    return {(row["controller"], row["env_frames"], row["episode"]): row for row in rows}


def _refuse_others(path: Path, done: dict[Key, Row], snapshots: dict[int, Path]) -> None:
    """Raise ConfigError where episodes were not played by these snapshots, but by those of a run of
    the same name, or of this one before it went on from an earlier checkpoint."""
    for frames, snapshot in snapshots.items():
        with contextlib.suppress(CheckpointError):  # said when it is to be loaded
            now = checksum(snapshot)
            if {row["crc32"] for row in done.values() if row["env_frames"] == frames} - {"", now}:
                raise ConfigError(
                    f"{path} holds episodes of another agent than {snapshot}; choose another --out"
                )


def _append(path: Path, about: dict[str, Any], row: Row) -> None:
    new = not path.exists()
    with room_for(path), path.open("a", encoding="utf-8", newline="") as file:
        if new:
            file.write(f"# {json.dumps(about)}\n")
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def _draw(out: Path, about: dict[str, Any], controllers: list[str], rows: list[Row]) -> list[Path]:
    """Curves, Figure 3 and, with two controllers or more, Figure 5 and its numbers."""
    files, table = [], {}
    for name in controllers:
        curve = []
        for frames in sorted({r["env_frames"] for r in rows if r["controller"] == name}):
            some = [r for r in rows if r["controller"] == name and r["env_frames"] == frames]
            returns = np.array([r["return"] for r in some])
            table[name, frames] = {r["episode"]: r["return"] for r in some}
            curve.append(
                {
                    "kind": "eval",
                    "env_frames": frames,
                    "update": some[0]["update"],
                    "return_mean": float(returns.mean()),
                    "return_std": float(returns.std()),
                    "episodes": len(returns),
                }
            )
        if curve:
            label = {"run": f"{about['run']}, {name}", "task": about["task"], "obs": about["obs"]}
            files.append(write_curve(out / f"{name}.csv", label, curve))
    files.append(plot_runs(files[:1], out / "figure-3.png"))
    if len(files) > 2:
        files.append(plot_runs(files[:-1], out / "figure-5.png", published=False))
        files.append(_write_comparison(out / "figure-5.csv", controllers, table))
    return files


def _write_comparison(
    path: Path, controllers: list[str], table: dict[tuple[str, int], dict[int, float]]
) -> Path:
    """Mean and standard error a controller, and each one's mean difference to the first.

    Episodes of one index start alike, so differences are taken pairwise.
    """
    first, *others = controllers
    columns = ["env_frames", *(f"{c}_{n}" for c in controllers for n in ("episodes", "mean", "se"))]
    columns += [f"{c}_minus_{first}{n}" for c in others for n in ("", "_se")]
    rows = []
    for frames in sorted({frames for _, frames in table}):
        row: dict[str, Any] = {"env_frames": frames}
        for name in controllers:
            returns = list(table.get((name, frames), {}).values())
            mean, se = _mean_and_error(returns)
            row |= {f"{name}_episodes": len(returns), f"{name}_mean": mean, f"{name}_se": se}
        base = table.get((first, frames), {})
        for name in others:
            own = table.get((name, frames), {})
            mean, se = _mean_and_error([own[i] - base[i] for i in own if i in base])
            row |= {f"{name}_minus_{first}": mean, f"{name}_minus_{first}_se": se}
        rows.append(row)
    return write_csv(path, rows, columns=columns)


def _mean_and_error(values: Sequence[float]) -> tuple[float | str, float | str]:
    """Mean and its standard error, rounded; blank where there are too few."""
    mean = round(float(np.mean(values)), 3) if len(values) else ""
    error = round(float(np.std(values, ddof=1) / len(values) ** 0.5), 3) if len(values) > 1 else ""
    return mean, error


def _draw_dream(agent: Dreamer, env: Any, seed: int, out: Path) -> Path:
    """Figure 4: half of an episode's first 100 decisions watched, the other half dreamed; of one
    that ends while it is watched, half of what it had."""
    half = min(50, env.max_decisions // 2)
    context, decisions = half, max(1, half)
    while True:
        try:
            imagined, real = dream_and_live(
                agent, env, context=context, decisions=decisions, seed=seed
            )
            break
        except EpisodeOver as over:  # at 0 nothing is watched that could end
            context = over.decisions // 2
    if "pixels" in imagined:
        return dream_figure(imagined["pixels"], real["pixels"], out / "figure-4.png")
    return state_figure(imagined["state"], real["state"], out / "figure-4.png")
