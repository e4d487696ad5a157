"""What a run says about itself: metrics.jsonl, TensorBoard events, the progress display."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from fastdreamer.errors import ArgumentError
from fastdreamer.files import replacing, room_for

METRICS_FILE = "metrics.jsonl"
SEEDS_FILE = "seeds.json"
"""What a folder of runs that differ in their seed alone has beside them: their seeds, in the order
of training."""
KINDS = ("train", "episode", "eval")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_metrics(run_dir: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the metrics of a run, oldest first.

    run_dir: the run directory. kind: only lines of this kind ("train", "episode" or "eval").
    Returns one dict per line: kind, env_frames (env frames), update, seconds, then the values;
    "nan", "inf" and "-inf" come back as floats. A torn last line (the run was killed while
    writing it) is left out. Raises FileNotFoundError where there is no metrics file and ValueError
    naming the file and line of any other damage.
    """
    records = [_decode(record) for _, record in _lines(Path(run_dir) / METRICS_FILE)]
    return [record for record in records if kind is None or record["kind"] == kind]


def _decode(record: dict[str, Any]) -> dict[str, Any]:
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The (raw text, parsed record) pairs of a metrics file, without a torn last line."""
    raw = path.read_bytes().split(b"\n")
    while raw and not raw[-1]:
        raw.pop()
    parsed = []
    for number, line in enumerate(raw, 1):
        try:
            record = json.loads(line)
            if not {"kind", "env_frames", "update", "seconds"} <= record.keys():
                raise ValueError("a metrics line has kind, env_frames, update and seconds")
        except (ValueError, AttributeError) as error:
            if number == len(raw):
                break
            raise ArgumentError(f"{path}:{number}: not a metrics line: {error}") from error
        parsed.append((line, record))
    return parsed


class Logger:
    """Writes `metrics.jsonl` and TensorBoard events (in `tensorboard/`) of one run.

    run_dir: the run directory, made if missing.
    resume_lines: how many lines the checkpoint that the run goes on from had seen (`lines`). Later
    ones and a torn last line are dropped, so that the file of a resumed run equals that of an
    uninterrupted one but for what clocks say: `seconds`, `updates_per_s`, `wait_collector_s` and
    `wait_learner_s`.
    None: the run starts from nothing, so lines of an earlier attempt are dropped too.
    """

    def __init__(self, run_dir: str | Path, *, resume_lines: int | None = None) -> None:
        # Imported here: reading metrics (plots) must not cost the seconds this import takes.
        from torch.utils.tensorboard import SummaryWriter

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        kept = []
        if resume_lines is not None and self._path.exists():
            kept = _lines(self._path)[:resume_lines]
        if self._path.exists():
            with replacing(self._path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line, _ in kept))
        self.lines = len(kept)
        self._offset = max((record["seconds"] for _, record in kept), default=0.0)
        # TensorBoard hides earlier events from this step on.
        purge_step = max((record["env_frames"] + 1 for _, record in kept), default=0)
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds this run has taken so far, earlier parts of a resumed run included."""
        return self._offset + time.monotonic() - self._start

    def log(self, kind: str, *, env_frames: int, update: int, **values: float) -> None:
        """Write one line of metrics and the same scalars to TensorBoard, both flushed.

        kind: "train", "episode" or "eval". env_frames: env frames collected so far, the step of
        the TensorBoard scalars `kind/name`. update: updates done so far. values: numbers (Python,
        numpy or 0-d tensors); a non-finite one is written as "nan", "inf" or "-inf", since JSON
        has no such numbers. Raises ValueError for another kind or a value named `seconds`.
        """
        if kind not in KINDS:
            raise ValueError(f"log: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if "seconds" in values:
            raise ValueError("log: `seconds` is written by the logger itself")
        record: dict[str, Any] = {
            "kind": kind,
            "env_frames": int(env_frames),
            "update": int(update),
            "seconds": round(self.seconds, 3),
        }
        with room_for(self._path):
            for name, value in values.items():
                number = value if type(value) is int else float(value)
                record[name] = number if math.isfinite(number) else str(number)
                self._tensorboard.add_scalar(f"{kind}/{name}", number, record["env_frames"])
            # One write of one whole line: a kill leaves at most the last line torn.
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            self.lines += 1
            self._tensorboard.flush()

    def log_video(self, name: str, frames: np.ndarray, *, fps: float, env_frames: int) -> None:
        """Show frames in TensorBoard, as an animation among its images; no line of metrics.

        name: its tag. frames: uint8 [T, h, w, 3]. fps: frames per second. env_frames: the step.
        """
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        images, gif = [Image.fromarray(frame) for frame in frames], io.BytesIO()
        options = {"save_all": True, "append_images": images[1:], "loop": 0}
        images[0].save(gif, format="GIF", duration=round(1000 / fps), **options)
        height, width = frames.shape[1:3]
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        with room_for(self._path):
            self._tensorboard.file_writer.add_summary(summary, env_frames)
            self._tensorboard.flush()

    def sync(self) -> None:
        """Bring every line to the disk, so that a checkpoint may count on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring everything to the disk and close the files; calling it again does nothing."""
        if self._file.closed:
            return
        with room_for(self._path):
            self.sync()
            self._file.close()
            self._tensorboard.close()

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


NBSP = "\N{NO-BREAK SPACE}"
PLAIN_INTERVAL = 10.0  # seconds between lines where the output is not a terminal
HEARTBEAT = 60.0  # seconds after which such a line comes even without news

_FIELDS = (
    "env_frames",
    "updates",
    "updates_per_s",
    "seconds_left",
    "last_return",
    "best_return",
    "eval_return",
    "waits",
    "losses",
    "phase",
)
_NEWS = ("env_frames", "last_return", "eval_return")


class Progress:
    """Shows how training goes; a context manager.

    On a terminal, a bar over env frames with a small table under it. Elsewhere (a pipe, a log
    file) plain lines without control codes: the first update at once, then one when an episode or
    evaluation has arrived, at most every 10 s, and one a minute without news.

    total_frames: env frames the run will have at its end. title: e.g. "walker-walk from pixels".
    console: a rich console; standard output by default.
    """

    def __init__(self, total_frames: int, *, title: str, console: Console | None = None) -> None:
        self._console = Console() if console is None else console
        self._title = title
        self._total = total_frames
        self._fields: dict[str, Any] = dict.fromkeys(_FIELDS)
        self._fields["env_frames"] = 0
        self._bar = Bar(
            BarColumn(bar_width=32),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} env frames"),
            TaskProgressColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total_frames)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=2,  # drawing must not take time from training
            )
        self._news = False
        self._printed: float | None = None  # time of the last plain line

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._news:
            self._print_line()

    def update(self, **fields: Any) -> None:
        """Take new values of any fields and show them; fields not given keep theirs.

        env_frames, updates: counts so far. updates_per_s. seconds_left: of the whole run.
        last_return, best_return: of training episodes. eval_return: mean of the last evaluation.
        waits: shares of the time in which the learner waited for the collector, and the other way.
        losses: dict of name to float. phase: what is going on now, in a word or two.
        Raises TypeError for any other field.
        """
        unknown = fields.keys() - set(_FIELDS)
        if unknown:
            raise TypeError(
                f"Progress.update: unknown {', '.join(sorted(unknown))}; "
                f"valid fields: {', '.join(_FIELDS)}"
            )
        self._news |= any(k in fields and fields[k] != self._fields[k] for k in _NEWS)
        self._news |= "seconds_left" in fields and self._fields["seconds_left"] is None
        self._fields.update(fields)
        self._bar.update(self._task, completed=self._fields["env_frames"])
        if self._live is not None:
            return  # its own thread draws
        if self._printed is None:
            self._print_line()
            return
        waited = time.monotonic() - self._printed
        if waited >= (PLAIN_INTERVAL if self._news else HEARTBEAT):
            self._print_line()

    def message(self, text: str) -> None:
        """Print `text` on its own line, above the display where there is one."""
        self._console.out(text, highlight=False)

    def _print_line(self) -> None:
        percent = 100 * self._fields["env_frames"] / max(1, self._total)
        parts = [
            f"{self._fields['env_frames']:,} of {self._total:,} env frames ({percent:.0f} %)",
            *(f"{name} {value}" for name, value in self._counts() + self._returns()),
            *(f"{name} {value}" for name, value in self._losses()),
        ]
        phase = self._fields["phase"]
        self.message(f"{self._title}: " + ", ".join(parts) + (f" [{phase}]" if phase else ""))
        self._printed = time.monotonic()
        self._news = False

    def _render(self) -> Group:
        head = Text(self._title, style="bold")
        if self._fields["phase"]:
            head.append(f"  {self._fields['phase']}", style="dim")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, pairs in (
            ("progress", self._counts()),
            ("return", self._returns()),
            ("losses", self._losses()),
        ):
            if pairs:
                cells = Text()
                for key, value in pairs:
                    # Unbreakable, so that a narrow terminal wraps between pairs, not inside one.
                    cells.append(f"{key.removesuffix(' return')} ".replace(" ", NBSP), style="dim")
                    cells.append(value.replace(" ", NBSP) + "   ")
                table.add_row(name, cells)
        return Group(head, self._bar.get_renderable(), table)

    def _counts(self) -> list[tuple[str, str]]:
        fields = self._fields
        pairs = []
        if fields["updates"] is not None:
            pairs.append(("updates", f"{fields['updates']:,}"))
        if fields["updates_per_s"] is not None:
            pairs.append(("updates/s", f"{fields['updates_per_s']:.3g}"))
        if fields["seconds_left"] is not None:
            pairs.append(("time left", format_seconds(fields["seconds_left"])))
        if fields["waits"] is not None:
            names = ("learner waits", "collector waits")
            pairs += [(n, f"{share:.0%}") for n, share in zip(names, fields["waits"], strict=True)]
        return pairs

    def _returns(self) -> list[tuple[str, str]]:
        named = ((name, self._fields[f"{name}_return"]) for name in ("last", "best", "eval"))
        return [(f"{name} return", f"{value:.1f}") for name, value in named if value is not None]

    def _losses(self) -> list[tuple[str, str]]:
        return [(name, f"{value:.3g}") for name, value in (self._fields["losses"] or {}).items()]


def format_seconds(seconds: float) -> str:
    """A duration in seconds as people write it: "45 s", "12 min 05 s", "3 h 07 min"."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
