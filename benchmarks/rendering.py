"""What a picture costs and how it differs from the suite's own: renderers and qualities.

`python -m benchmarks.rendering [--write]`; the table and the figure are those of docs/rendering.md.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import matplotlib
import numpy as np

from benchmarks import machine, report
from benchmarks.machine import ROOT
from benchmarks.timing import MIN_REPEATS
from fastdreamer.acting.play import random_policy
from fastdreamer.envs import dmc, list_tasks
from fastdreamer.envs.quality import QUALITIES, RENDERERS
from fastdreamer.errors import ArgumentError

PAGE = ROOT / "docs" / "rendering.md"
FIGURE = ROOT / "docs" / "figures" / "rendering.png"
SIZE = 64
REFERENCE = "the suite's own"
STEPS = 5  # control steps between pictures
TASK_PICTURES = 20  # of each other task


class _Suite:
    """A task that is drawn as the suite draws it, in the suite's framebuffer."""

    def __init__(self, name: str) -> None:
        with (
            mock.patch.object(dmc, "SHADOW_SIZE", 2048),
            mock.patch.object(dmc, "_frees_contexts", lambda physics: False),
        ):
            self._task = dmc.SuiteTask(name)
        self.reset, self.step, self.close = self._task.reset, self._task.step, self._task.close
        self.action_min, self.action_max = self._task.action_min, self._task.action_max

    def render(self, height: int, width: int) -> np.ndarray:
        camera = self._task._camera_id
        return self._task._env.physics.render(height, width, camera_id=camera)


def _variants(name: str) -> dict[str, Callable[[], Any]]:
    made: dict[str, Callable[[], Any]] = {REFERENCE: lambda: _Suite(name)}
    for render in RENDERERS:
        for quality in QUALITIES:
            made[f"`{render}`, `{quality}`"] = lambda render=render, quality=quality: dmc.SuiteTask(
                name, render=render, render_quality=quality
            )
    return made


def _pictures(variants: dict[str, Callable[[], Any]], frames: int) -> dict[str, dict[str, Any]]:
    """The same episode of random actions in all of them, drawn in turn.

    Returns:
        By variant: CPU seconds a picture, differences from the first variant's (mean of 255), the
        first picture and the last.
    """
    with contextlib.ExitStack() as stack:
        tasks = {}
        for name, make in variants.items():
            tasks[name] = make()
            stack.callback(tasks[name].close)
        first = next(iter(tasks.values()))
        policy = random_policy(len(first.action_min), 0)
        centre, scale = (first.action_max + first.action_min) / 2, first.action_max
        scale = scale - centre
        made = {name: {"seconds": [], "difference": []} for name in tasks}
        for task in tasks.values():
            task.reset(0)
            task.render(SIZE, SIZE)  # what is made once
        for _ in range(frames):
            for _ in range(STEPS):
                action = centre + scale * policy({})
                ends = [task.step(action)[1:] for task in tasks.values()]
            for name, task in tasks.items():
                start = time.process_time()
                picture = task.render(SIZE, SIZE)
                made[name]["seconds"].append(time.process_time() - start)
                made[name]["picture"] = picture
                made[name].setdefault("first", picture)
            reference = made[next(iter(tasks))]["picture"].astype(np.float64)
            for values in made.values():
                values["difference"].append(np.abs(values["picture"] - reference).mean())
            if any(map(any, ends)):
                for task in tasks.values():
                    task.reset(None)
    return made


def measure(frames: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Time every variant on Walker, and compare rays with the suite on a task of each domain.

    Args:
        frames: pictures of Walker by each.

    Returns:
        The result, and the first picture of each variant.

    Raises:
        ValueError: too few frames. GLError: nothing here draws by OpenGL.
    """
    if frames < MIN_REPEATS:
        raise ValueError(f"at least {MIN_REPEATS} frames, got {frames}")
    gl, circumstances = dmc._load_gl(), machine.record()
    walker = _pictures(_variants("walker-walk"), frames)
    domains = {name.split("-")[0]: name for name in reversed(list_tasks())}
    tasks: dict[str, Any] = {}
    for name in sorted(domains.values()):
        variants = _variants(name)
        try:
            variants["`rays`, `full`"]().close()
        except ArgumentError as error:
            tasks[name] = str(error)
            continue
        pair = {label: variants[label] for label in (REFERENCE, "`rays`, `full`")}
        drawn = _pictures(pair, TASK_PICTURES)["`rays`, `full`"]
        tasks[name] = {
            "ms": 1e3 * float(np.median(drawn["seconds"])),
            "difference": float(np.mean(drawn["difference"])),
        }
    result = {
        "machine": circumstances,
        "gl": {"backend": gl.name, "renderer": gl.renderer},
        "frames": frames,
        "variants": {
            name: {
                "ms": 1e3 * float(np.median(values["seconds"])),
                "difference": float(np.mean(values["difference"])),
                "largest": float(np.max(values["difference"])),
            }
            for name, values in walker.items()
        },
        "tasks": tasks,
    }
    return result, {name: values["first"] for name, values in walker.items()}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = [
        [name, f"{v['ms']:.2f}", "–" if name == REFERENCE else f"{v['difference']:.2f}",
         "–" if name == REFERENCE else f"{v['largest']:.2f}"]
        for name, v in result["variants"].items()
    ]  # fmt: skip
    drawn = {name: v for name, v in result["tasks"].items() if isinstance(v, dict)}
    tasks = [[f"`{n}`", f"{v['ms']:.2f}", f"{v['difference']:.2f}"] for n, v in drawn.items()]
    refused = ", ".join(f"`{name}`" for name in result["tasks"] if name not in drawn)
    gl = result["gl"]
    return (
        report.table(
            ["Walker, 64 × 64", "ms of CPU a frame", "mean difference of 255", "largest mean"], rows
        )
        + f"\n\nMedians of {result['frames']} frames of one episode of random actions, drawn in "
        f"turn; OpenGL by {gl['backend']} ({gl['renderer']}). The differences are from the suite's "
        "own picture of the same state, over a whole frame.\n\n"
        + report.table(["`rays`, `full`", "ms of CPU a frame", "mean difference of 255"], tasks)
        + f"\n\n{TASK_PICTURES} frames of each. Refused: {refused}."
    )


def draw(pictures: dict[str, np.ndarray]) -> None:
    """Write the figure: a picture by each variant."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    columns = len(QUALITIES) + 1
    figure, axes = plt.subplots(
        len(RENDERERS), columns, figsize=(1.4 * columns, 3.2), dpi=100, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    names = [REFERENCE, *QUALITIES]
    for row, render in enumerate(RENDERERS):
        for axis, name in zip(axes[row], names, strict=True):
            label = name if name == REFERENCE else f"`{render}`, `{name}`"
            if row == 0 or name != REFERENCE:
                axis.imshow(pictures[label], interpolation="nearest")
                axis.set_title(label.replace("`", ""), fontsize=8)
    figure.savefig(FIGURE)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON, page, figure")
    args = parser.parse_args()
    result, pictures = measure(args.frames)
    report.publish("rendering", result, write=args.write)
    if args.write:
        draw(pictures)


if __name__ == "__main__":
    main()
