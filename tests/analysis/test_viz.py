"""Figures and videos come out of files alone, complete or not at all."""

import csv
import json
import math
import struct
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest

from fastdreamer.analysis.viz.curves import (
    _joined,
    _read_curve,
    export_csv,
    plot_runs,
    published_curves,
    write_curve,
)
from fastdreamer.analysis.viz.dreams import dream_figure, dream_video
from fastdreamer.errors import FastdreamerError
from fastdreamer.files import DiskFullError
from fastdreamer.training.logger import Logger
from fastdreamer.video import VideoError, write_video


def make_run(path, task="walker-walk", obs="pixels", episodes=20, evaluate=True):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"env": {"task": task, "obs": obs}}))
    with Logger(path) as log:
        for k in range(1, episodes + 1):
            where = {"env_frames": 1000 * k, "update": 100 * k}
            log.log("train", **where, loss=1.0)
            log.log("episode", **where, **{"return": 10.0 * k})
            if evaluate and k % 5 == 0:
                log.log("eval", **where, return_mean=12.0 * k, return_std=3.0, episodes=10)
    return path


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def svg_text(path):
    """The strings drawn in a figure: matplotlib writes each as a comment before its glyphs."""
    return path.read_text("utf-8")


def frames_of(video):
    reader = imageio_ffmpeg.read_frames(str(video))
    size = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(size[1], size[0], 3) for frame in reader]


def test_published_curves():
    walk = {label: (frames, returns) for label, frames, returns in published_curves("walk")}
    assert len(walk) == 5
    frames, returns = walk["DreamerV3"]
    assert frames.tolist() == [25e3, 50e3, 100e3, 250e3, 500e3, 1e6]
    assert returns.tolist() == [227, 418, 626, 898, 944, 961]
    for task in ("walk", "stand", "run"):
        for _, frames, returns in published_curves(task):
            assert len(frames) == len(returns) >= 4
            assert (np.diff(frames) > 0).all() and (returns > 0).all() and (returns < 1000).all()
    assert published_curves("hop") == []


def test_plot_two_runs_png(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", episodes=3, evaluate=False)]
    out = plot_runs(runs, tmp_path / "figures" / "curve.png")
    assert out == tmp_path / "figures" / "curve.png"
    assert png_size(out) == (1200, 720)
    assert out.stat().st_size > 20_000
    assert [path.name for path in out.parent.iterdir()] == ["curve.png"]


def test_plot_says_units_runs_and_published_methods(tmp_path):
    run = make_run(tmp_path / "seed0", episodes=120)
    text = svg_text(plot_runs([run], tmp_path / "curve.svg"))
    for part in (
        "env frames", "return (mean of 10 episodes)", "seed0 (walker-walk from pixels)",
        "DreamerV3, published", "course report, actor, published", "100k", "±1 std",
    ):  # fmt: skip
        assert part in text, part
    assert svg_text(plot_runs([run], tmp_path / "again.svg")) == text  # same data, same file
    assert "published" not in svg_text(plot_runs([run], tmp_path / "own.svg", published=False))


def test_published_curves_only_for_walker(tmp_path):
    cheetah = make_run(tmp_path / "cheetah", task="cheetah-run", obs="both")
    text = svg_text(plot_runs([cheetah], tmp_path / "cheetah.svg"))
    assert "published" not in text
    assert "cheetah (cheetah-run from pixels and state)" in text
    both = [cheetah, make_run(tmp_path / "stand", task="walker-stand", obs="state")]
    text = svg_text(plot_runs(both, tmp_path / "both.svg"))
    assert "published (stand, pixels)" in text and "(walk," not in text


def test_exported_curve_plots_like_the_run(tmp_path):
    run = make_run(tmp_path / "seed0")
    out = export_csv(run, tmp_path / "curves" / "seed0.csv")
    lines = out.read_text().splitlines()
    assert json.loads(lines[0].removeprefix("# ")) == {
        "run": "seed0",
        "task": "walker-walk",
        "obs": "pixels",
    }
    rows = list(csv.DictReader(lines[1:]))
    assert len(rows) == 24
    expected = {"kind", "env_frames", "update", "seconds", "return_mean", "return_std", "episodes"}
    assert set(rows[0]) == expected
    evals = [row for row in rows if row["kind"] == "eval"]
    assert [float(row["return_mean"]) for row in evals] == [60.0, 120.0, 180.0, 240.0]
    assert {row["episodes"] for row in evals} == {"10"}
    from_run = plot_runs([run], tmp_path / "run.svg").read_bytes()
    assert plot_runs([out], tmp_path / "csv.svg").read_bytes() == from_run


def test_foreign_csv_needs_two_columns_only(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("env_frames,return_mean\n1000,5\n2000,9.5\n")
    text = svg_text(plot_runs([path], tmp_path / "o.svg", task="walker-run"))
    assert "other" in text and "published (run, pixels)" in text
    path.write_text("step,score\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv.*env_frames and return_mean"):
        plot_runs([path], tmp_path / "o.png")


@pytest.mark.parametrize("evaluate", [True, False])
def test_unfinished_lines_and_nan_do_not_stop_a_plot(tmp_path, evaluate):
    run = make_run(tmp_path / "run", episodes=5, evaluate=evaluate)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "episode", "env_frames": 6000, "update": 600, "seconds": 9, "return": "nan"}'
            '\n{"kind": "epi'
        )
    assert plot_runs([run], tmp_path / "run.png").exists()
    rows = list(csv.DictReader(export_csv(run, tmp_path / "c.csv").read_text().splitlines()[1:]))
    assert math.isnan(float(rows[-1]["return_mean"]))
    lost = tmp_path / "lost.csv"  # whose every return is none
    lost.write_text("env_frames,return_mean\n1000,nan\n")
    assert plot_runs([lost], tmp_path / "lost.png").stat().st_size > 0


def test_seeds_of_one_setting_become_a_band(tmp_path):
    """Mean and standard deviation over runs, where both have been evaluated on both sides."""
    runs = []
    for seed, (gain, every) in enumerate([(10.0, 2000), (30.0, 4000)]):
        rows = [
            {"kind": "eval", "env_frames": f, "update": 0, "seconds": f / 50, "return_std": 9.0,
             "return_mean": gain * f / 1000, "episodes": 10}
            for f in range(every, 12_001, every)
        ]  # fmt: skip
        about = {"run": f"seed{seed}", "task": "walker-walk", "obs": "pixels"}
        runs.append(write_curve(tmp_path / f"{seed}.csv", about, rows))
    (joined,) = _joined([_read_curve(run) for run in runs], "frames")
    frames, mean, std = joined.of_kind("eval", "frames")
    assert frames.tolist() == [4000, 6000, 8000, 10_000, 12_000]
    assert mean.tolist() == [80, 120, 160, 200, 240] and std.tolist() == [40, 60, 80, 100, 120]
    (joined,) = _joined([_read_curve(run) for run in runs], "minutes")
    assert joined.of_kind("eval", "minutes")[0] * 60 == pytest.approx(frames / 50)
    text = svg_text(plot_runs(runs, tmp_path / "band.svg", band=True))
    for part in ("2 runs (walker-walk from pixels)", "±1 std of runs", "DreamerV3, published"):
        assert part in text
    text = svg_text(plot_runs(runs, tmp_path / "minutes.svg", band=True, axis="minutes"))
    assert "minutes" in text and "published" not in text and "env frames" not in text
    # a folder of seeds is a band of its own, in a CSV of one of its runs, too
    for name in ("wide", "narrow"):
        (tmp_path / name).mkdir()
        make_run(tmp_path / name / "seed0")
        (tmp_path / name / "seeds.json").write_text("[0]")
    narrow = export_csv(tmp_path / "narrow" / "seed0", tmp_path / "narrow.csv")
    text = svg_text(
        plot_runs([tmp_path / "wide" / "seed0", narrow, *runs], tmp_path / "a.svg", band=True)
    )
    for part in ("wide: 1 run (", "narrow: 1 run (", "2 runs (walker-walk from pixels)"):
        assert part in text
    with pytest.raises(ValueError, match="no stretch of frames in common"):
        late = [row for row in _read_curve(runs[1]).rows if row["env_frames"] == 12_000]
        early = [row for row in _read_curve(runs[0]).rows if row["env_frames"] < 5000]
        about = {"task": "walker-walk", "obs": "pixels"}
        apart = [write_curve(tmp_path / f"{i}.csv", about, r) for i, r in enumerate((late, early))]
        plot_runs(apart, tmp_path / "apart.svg", band=True)
    with pytest.raises(ValueError, match="own: holds no evaluation"):
        own = make_run(tmp_path / "own", evaluate=False)
        plot_runs([own], tmp_path / "own.svg", band=True)
    with pytest.raises(ValueError, match="bare: its curve has no seconds"):
        (tmp_path / "bare.csv").write_text("env_frames,return_mean\n1000,5\n")
        plot_runs([tmp_path / "bare.csv"], tmp_path / "bare.svg", axis="minutes")


def test_bad_runs_are_named(tmp_path):
    good = make_run(tmp_path / "good", episodes=2)
    empty = make_run(tmp_path / "empty", episodes=0)
    (tmp_path / "folder").mkdir()
    broken = make_run(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    foreign = make_run(tmp_path / "foreign")
    (foreign / "config.json").write_text("{}")
    for run, why in (
        (empty, "no finished episode"),
        (tmp_path / "folder", r"not a run directory, it has no metrics\.jsonl"),
        (tmp_path / "nowhere", "no such run"),
        (broken, "cannot read"),
        (foreign, "no value 'env'"),
    ):
        with pytest.raises(ValueError, match=rf"{run.name}: .*{why}"):
            plot_runs([good, run], tmp_path / "out.png")
        with pytest.raises(ValueError, match=run.name):
            export_csv(run, tmp_path / "out.csv")
    with pytest.raises(ValueError, match="no run"):
        plot_runs([], tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"\.png"):
        plot_runs([good], tmp_path / "out.bmp")
    assert not list(tmp_path.glob("*out*"))


def ramp(length=20, height=64, width=64):
    frames = np.zeros((length, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 250, length)[:, None, None]
    return frames


def test_dream_figure_size_and_columns(tmp_path):
    frames = ramp()
    out = dream_figure(frames, frames, tmp_path / "dream.png")
    assert png_size(out) == (1635, 367)  # 10.9 by 2.45 inches
    text = svg_text(dream_figure(frames, frames, tmp_path / "d.svg", columns=5))
    assert "imagined" in text and "real" in text and "decision" in text
    assert text.count("<image") == 10
    text = svg_text(dream_figure(frames, frames, tmp_path / "d.svg", frames_per_column=7))
    assert text.count("<image") == 2 * 3
    for label in ("0", "7", "14"):
        assert f"<!-- {label} -->" in text


def test_dream_figure_shorter_than_its_columns(tmp_path):
    frames = ramp(length=1)
    assert png_size(dream_figure(frames, frames, tmp_path / "d.png"))[0] == 285


@pytest.mark.parametrize("draw", [dream_figure, lambda a, b, out: dream_video(a, b, out, 20)])
def test_dream_checks_frames(tmp_path, draw):
    frames = ramp()
    with pytest.raises(ValueError, match="uint8"):
        draw(frames.astype(np.float32), frames, tmp_path / "d.mp4")
    with pytest.raises(ValueError, match="one shape"):
        draw(frames[:5], frames, tmp_path / "d.mp4")
    with pytest.raises(ValueError, match="at least 1"):
        draw(frames[:0], frames[:0], tmp_path / "d.mp4")


def test_video_reads_back(tmp_path):
    out = write_video(tmp_path / "videos" / "v.mp4", iter(ramp(20, 63, 65)), 20)
    frames = frames_of(out)
    assert len(frames) == 20
    assert frames[0].shape == (64, 66, 3)
    for k in (0, 10, 19):  # lossy, but the same ramp
        assert abs(frames[k][..., 0].mean() - ramp(20)[k, 0, 0, 0]) < 12
    assert [path.name for path in out.parent.iterdir()] == ["v.mp4"]


def test_dream_video_stacks_imagined_over_real(tmp_path):
    imagined, real = ramp(6), np.full_like(ramp(6), 90)
    frames = frames_of(dream_video(imagined, real, tmp_path / "d.mp4", 20))
    assert len(frames) == 6
    assert frames[0].shape == (2 * 256 + 4, 256, 3)
    assert frames[0][:250].mean() < 10
    assert abs(frames[0][262:].mean() - 90) < 10
    assert frames[0][256:260].mean() > 150


def test_a_video_without_its_encoder_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(FastdreamerError, match="is not installed: pip install 'fastdreamer"):
        write_video(tmp_path / "v.mp4", ramp(2), 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reads", ["cat > /dev/null", ""], ids=["at the end", "at once"])
@pytest.mark.parametrize(
    ("says", "error"),
    [
        ("Error writing trailer: No space left on device", DiskFullError),
        ("Unknown encoder 'libx264'", VideoError),
    ],
)
def test_an_encoder_that_fails_leaves_what_was_there(tmp_path, monkeypatch, reads, says, error):
    ffmpeg, folder = tmp_path / "ffmpeg", tmp_path / "videos"
    ffmpeg.write_text(
        f'#!/bin/sh\nfor out; do :; done\necho half > "$out"\n{reads}\necho "{says}" >&2\nexit 28\n'
    )
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    folder.mkdir()
    (folder / "v.mp4").write_bytes(b"old")
    with pytest.raises(error, match=f"v.mp4: .*ffmpeg ended with status 28: {says}"):
        write_video(folder / "v.mp4", ramp(20), 20)
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("v.mp4", b"old")]


def test_failed_video_leaves_nothing(tmp_path):
    def breaks():
        yield from ramp(3)
        raise KeyError("the environment died")

    (tmp_path / "old.mp4").write_bytes(b"old")
    with pytest.raises(KeyError):
        write_video(tmp_path / "old.mp4", breaks(), 20)
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "v.mp4", [], 20)
    with pytest.raises(ValueError, match="one size"):
        write_video(tmp_path / "v.mp4", [ramp(1)[0], ramp(1, 32, 32)[0]], 20)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "v.mp4", [np.zeros((8, 8, 3))], 20)
    with pytest.raises(ValueError, match=r"\.mp4"):
        write_video(tmp_path / "v.avi", ramp(1), 20)
    assert [path.name for path in tmp_path.iterdir()] == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


@pytest.mark.parametrize(
    "ours, theirs",
    [
        # it would know windows
        ("analysis.viz.curves, fastdreamer.analysis.viz.dreams", "matplotlib.pyplot"),
        # the worker beside it writes videos alone
        ("training.trainer", "matplotlib"),
    ],
)
def test_nothing_is_loaded_for_pictures_that_is_not_needed(ours, theirs):
    code = f"import sys, fastdreamer.{ours}; sys.exit({theirs!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
