"""Metrics survive kills and resumes; the progress display suits where it is shown."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from fastdreamer.files import DiskFullError
from fastdreamer.training import logger as logger_module
from fastdreamer.training.logger import Logger, Progress, format_seconds, read_metrics


def write_updates(log: Logger, updates: range) -> None:
    for update in updates:
        frames = 1000 * update
        log.log("train", env_frames=frames, update=update, loss=1.0 / update)
        log.log("episode", env_frames=frames, update=update, length=500, **{"return": 2.5 * update})


def without_seconds(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def tensorboard_scalars(run, tag):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_line_holds_kind_units_and_values(tmp_path):
    with Logger(tmp_path / "run") as log:
        log.log("eval", env_frames=4000, update=200, return_mean=np.float32(1.5), episodes=10)
        log.log("train", env_frames=5000, update=300, loss=torch.tensor(0.25))
    first, second = read_metrics(tmp_path / "run")
    assert list(first)[:4] == ["kind", "env_frames", "update", "seconds"]
    assert (first["kind"], first["env_frames"], first["update"]) == ("eval", 4000, 200)
    assert (first["return_mean"], first["episodes"]) == (1.5, 10)
    assert second["loss"] == 0.25
    assert 0 <= first["seconds"] <= second["seconds"] < 60
    assert read_metrics(tmp_path / "run", "train") == [second]
    assert tensorboard_scalars(tmp_path / "run", "eval/return_mean") == [(4000, 1.5)]


def test_line_is_on_disk_before_close(tmp_path):
    log = Logger(tmp_path)
    log.log("train", env_frames=2, update=1, loss=1.0)
    assert len(read_metrics(tmp_path)) == 1
    log.close()
    log.close()


def test_non_finite_values_are_valid_json(tmp_path):
    with Logger(tmp_path) as log:
        log.log("train", env_frames=2, update=1, a=math.nan, b=math.inf, c=-math.inf)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (raw["a"], raw["b"], raw["c"]) == ("nan", "inf", "-inf")
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"]) and (record["b"], record["c"]) == (math.inf, -math.inf)


def test_bad_kind_and_reserved_name(tmp_path):
    with Logger(tmp_path) as log:
        with pytest.raises(ValueError, match="train, episode, eval"):
            log.log("training", env_frames=0, update=0)
        with pytest.raises(ValueError, match="seconds"):
            log.log("train", env_frames=0, update=0, seconds=1.0)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", [b"", b'{"kind": "train", "env_fra', b"\0\0\0\0", b"\xff\n"])
def test_resumed_file_equals_undisturbed(tmp_path, torn, monkeypatch):
    # a process's tenth writer of one second is read before its ninth: findings/tensorboard-…
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with Logger(tmp_path / "whole") as log:
        write_updates(log, range(1, 9))
    with Logger(tmp_path / "killed") as log:
        write_updates(log, range(1, 7))
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with Logger(tmp_path / "killed", resume_lines=8) as log:
        assert len(read_metrics(tmp_path / "killed")) == 8
        write_updates(log, range(5, 9))
    assert without_seconds(tmp_path / "killed") == without_seconds(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "killed").iterdir() if path.is_file()] == [
        "metrics.jsonl"
    ]
    expected = [(1000 * u, pytest.approx(1.0 / u)) for u in range(1, 9)]
    assert tensorboard_scalars(tmp_path / "killed", "train/loss") == expected


def test_kill_at_every_byte_of_the_last_line(tmp_path):
    with Logger(tmp_path) as log:
        write_updates(log, range(1, 3))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:end])
        complete = end == len(whole) - 1  # only the newline is missing
        assert len(read_metrics(tmp_path)) == 3 + complete


def test_seconds_continue_over_a_resume(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logger_module.time, "monotonic", lambda: now[0])
    log = Logger(tmp_path)
    now[0] = 130.0
    log.log("train", env_frames=2, update=1, loss=0.0)
    now[0] = 170.0
    log.log("train", env_frames=4, update=2, loss=0.0)
    log.close()
    now[0] = 5.0  # another boot
    log = Logger(tmp_path, resume_lines=1)
    now[0] = 6.0
    assert log.seconds == 31.0
    log.log("train", env_frames=4, update=2, loss=0.0)
    log.close()
    assert [record["seconds"] for record in read_metrics(tmp_path)] == [30.0, 31.0]


def test_a_run_from_nothing_drops_an_earlier_attempt(tmp_path):
    with Logger(tmp_path) as log:
        write_updates(log, range(1, 4))
    with Logger(tmp_path) as log:
        write_updates(log, range(1, 3))
    assert [record["update"] for record in read_metrics(tmp_path, "train")] == [1, 2]
    assert [step for step, _ in tensorboard_scalars(tmp_path, "train/loss")] == [1000, 2000]


@pytest.mark.parametrize("damage", ["not json", "[1, 2]", '{"kind": "train"}'])
def test_damage_before_the_last_line_is_named(tmp_path, damage):
    with Logger(tmp_path) as log:
        write_updates(log, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        Logger(tmp_path, resume_lines=1)
    assert path.read_bytes() == before


def test_no_metrics_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def plain_progress(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logger_module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)
    return now, out, Progress(10_000, title="walker-walk from pixels", console=console)


def test_plain_progress_one_line_per_news_and_interval(monkeypatch):
    now, out, progress = plain_progress(monkeypatch)

    def lines():
        return out.getvalue().splitlines()

    with progress:
        progress.update(env_frames=0, updates=0, phase="prefill")
        assert len(lines()) == 1  # at once
        now[0] = 3.0
        progress.update(env_frames=1000, last_return=25.0)
        assert len(lines()) == 1  # too soon
        now[0] = 11.0
        progress.update(updates=100, losses={"image": 12.345, "kl": 3.0}, seconds_left=3723)
        assert len(lines()) == 2  # the episode is told late, but told
        now[0] = 25.0
        progress.update(updates=200)
        assert len(lines()) == 2  # no news
        now[0] = 72.0
        progress.update(updates=300)
        assert len(lines()) == 3  # a sign of life
        now[0] = 73.0
        progress.update(eval_return=50.0)
        assert len(lines()) == 3
    assert len(lines()) == 4  # what was still untold
    assert lines()[1] == (
        "walker-walk from pixels: 1,000 of 10,000 env frames (10 %), updates 100, "
        "time left 1 h 02 min, last return 25.0, image 12.3, kl 3 [prefill]"
    )
    assert "eval return 50.0" in lines()[3]
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_the_first_time_left_is_news(monkeypatch):
    now, out, progress = plain_progress(monkeypatch)
    with progress:
        progress.update(env_frames=0, phase="prefill")
        now[0] = 11.0
        progress.update(env_frames=1000)
        now[0] = 22.0
        progress.update(updates=5, seconds_left=3723)
        assert "time left 1 h 02 min" in out.getvalue().splitlines()[2]
        now[0] = 33.0
        progress.update(updates=10, seconds_left=3712)
        assert len(out.getvalue().splitlines()) == 3


def test_plain_message_is_kept_verbatim(monkeypatch):
    _, out, progress = plain_progress(monkeypatch)
    text = "resume with: fastdreamer train --resume runs/[a]/b :smile: " + "x" * 60
    with progress:
        progress.message(text)
    assert out.getvalue() == text + "\n"


def test_terminal_progress_draws_bar_table_and_messages():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress(10_000, title="walker-walk from pixels", console=console) as progress:
        progress.message("above [all]")
        progress.update(
            env_frames=2500, updates=1200, updates_per_s=8.5, seconds_left=59, last_return=12.0,
            best_return=34.0, eval_return=math.nan, losses={"image": math.inf}, phase="training",
            waits=(0.031, 0.5),
        )  # fmt: skip
    console_text = out.getvalue()
    assert "above [all]" in console_text
    shown = io.StringIO()
    Console(file=shown, width=100).print(progress._render())
    text = shown.getvalue().replace("\N{NO-BREAK SPACE}", " ")
    for part in (
        "2,500 of 10,000 env frames", "25%", "1,200", "updates/s 8.5", "time left 59 s",
        "last 12.0", "best 34.0", "eval nan", "image inf", "training",
        "learner waits 3%", "collector waits 50%",
    ):  # fmt: skip
        assert part in text, part


def test_unknown_progress_field_lists_the_valid_ones(monkeypatch):
    _, _, progress = plain_progress(monkeypatch)
    with pytest.raises(TypeError, match="frames.*env_frames, updates"):
        progress.update(frames=1)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"), (11220, "3 h 07 min")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_endless_duration():
    assert format_seconds(math.inf) == "unknown"


def test_a_video_is_an_animation_in_tensorboard_and_no_line(tmp_path):
    frames = np.zeros((7, 12, 20, 3), np.uint8)
    frames[range(7), :, range(7)] = 255  # a line that moves
    with Logger(tmp_path) as log:
        log.log_video("eval/open_loop", frames, fps=10, env_frames=3000)
    assert read_metrics(tmp_path) == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("eval/open_loop")
    assert (event.step, event.width, event.height) == (3000, 20, 12)
    gif = Image.open(io.BytesIO(event.encoded_image_string))
    assert (gif.format, gif.n_frames, gif.info["duration"]) == ("GIF", 7, 100)
    for index, frame in enumerate(frames):
        gif.seek(index)
        assert (np.asarray(gif.convert("RGB")) == frame).all()


def test_a_full_disk_names_the_file(tmp_path):
    logger = Logger(tmp_path)
    logger.log("train", env_frames=1, update=1, loss=0.5)
    logger._file.close()
    with open("/dev/full", "a") as full:
        logger._file = full
        with pytest.raises(DiskFullError, match="metrics.jsonl: cannot be written .*No space left"):
            logger.log("train", env_frames=2, update=2, loss=0.25)
        with contextlib.suppress(OSError):
            full.close()
    logger.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5]
