"""The command line: what a user types, what comes back."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdreamer
from fastdreamer import _native
from fastdreamer.cli import main
from fastdreamer.envs import gl
from fastdreamer.machine import doctor
from fastdreamer.machine.doctor import kernel_reasons
from fastdreamer.ops.backend import describe_kernels, last_backend
from fastdreamer.ops.gpu import driver_state
from fastdreamer.training import pretrained
from fastdreamer.training.checkpoint import list_checkpoints, load_meta
from fastdreamer.training.episodes import read_episode
from fastdreamer.training.trainer import Trainer, read_config

PIXELS = ["--preset", "tiny", "--obs", "pixels", "--render-quality", "fast"]
STATE = ["train", "walker", "--obs", "state"]
SHORT = ["--env.time-limit", "0.5", "--train.frames", "120", "--eval.every", "60"]


def output(capsys) -> str:
    captured = capsys.readouterr()
    return re.sub(r"\s+", " ", captured.out + captured.err)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished tiny run from pixels."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", "walker", *PIXELS, *SHORT, "--eval.video", "--run", str(run_dir)]) == 0
    return run_dir


def test_a_run_leaves_everything_behind(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "tensorboard", "episodes", "checkpoints"} <= names
    assert list((run / "videos").glob("eval-*.mp4"))
    assert not list(run.rglob(".tmp-*"))
    assert json.loads((run / "config.json").read_text())["env"]["task"] == "walker-walk"


def test_pixels_without_opengl(tmp_path, capsys, monkeypatch):
    """By rays: no OpenGL is asked for, the worker's pictures are this process's, bit for bit."""
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    run_dir = tmp_path / "run"
    start = ["train", "walker", "--preset", "tiny", "--obs", "pixels", *SHORT]
    assert main([*start, "--run", str(tmp_path / "none")]) == 1
    assert "--render rays" in output(capsys)
    assert main([*start, "--render", "rays", "--eval.video", "--run", str(run_dir)]) == 0
    assert list((run_dir / "videos").glob("eval-*.mp4"))
    arrays, meta = read_episode(run_dir / "episodes" / "episode-000000.safetensors")
    assert (meta["render"], meta["render_quality"]) == ("rays", "full")
    env = fastdreamer.make_env("walker", render="rays", time_limit=0.5)
    seen = [env.reset(seed=meta["seed"])["pixels"]]
    seen += [env.step(action)[0]["pixels"] for action in arrays["action"][1:]]
    assert np.array_equal(seen, arrays["pixels"])
    assert main(["eval", str(run_dir), "--episodes", "1"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(run_dir), "--render-quality", "fast"]) == 1
    assert "env.render_quality, 'full' here, 'fast' asked for" in output(capsys)


def test_eval(run, capsys, tmp_path):
    video = tmp_path / "episode.mp4"
    assert main(["eval", str(run), "--episodes", "2", "--video", str(video)]) == 0
    text = output(capsys)
    assert re.search(r"walker-walk: return \d+\.\d ± \d+\.\d \(2 episodes", text), text
    assert video.stat().st_size > 0
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert main(["eval", str(newest), "--episodes", "2"]) == 0
    assert text.split("walker-walk:")[1].split("video")[0].strip() in output(capsys)


def test_dream(run, capsys, tmp_path):
    out = tmp_path / "dream"
    assert main(["dream", str(run), "--context", "3", "--decisions", "5", "--out", str(out)]) == 0
    assert (out / "dream.png").stat().st_size > 0 and (out / "dream.mp4").stat().st_size > 0
    assert main(["dream", str(run), "--context", "9", "--decisions", "90"]) == 1
    assert "fit in an episode of 10 decisions" in output(capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--episodes", "1"],
        ["dream", "--context", "3", "--decisions", "3"],
        ["report", "--episodes", "1", "--points", "1", "--controllers", "actor"],
    ],
    ids=lambda command: command[0],
)
def test_playing_takes_the_runs_backend_or_its_own(command, run, capsys, tmp_path, monkeypatch):
    pytest.importorskip("fastdreamer._native")
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"backend": "eager"}))

    def took(run_dir, *options):
        out = [] if command[0] == "eval" else ["--out", str(tmp_path / f"out-{len(seen)}")]
        assert main([command[0], str(run_dir), *command[1:], *out, *options]) == 0
        seen.append(last_backend("decide"))

    seen: list = []
    took(tmp_path / "run")
    took(tmp_path / "run", "--backend", "native")
    monkeypatch.setenv("FASTDREAMER_BACKEND", "eager")
    took(run)  # which is set to auto
    assert seen == ["eager", "native", "eager"]
    if not torch.cuda.is_available():
        assert main([command[0], str(run), "--backend", "triton"]) == 1
        assert "backend 'triton' cannot run" in output(capsys)


def test_plot(run, capsys, tmp_path):
    picture, table = tmp_path / "curve.png", tmp_path / "curve.csv"
    assert main(["plot", str(run), "--out", str(picture), "--csv", str(table)]) == 0
    assert picture.stat().st_size > 0
    assert main(["plot", str(table), "--out", str(tmp_path / "again.png")]) == 0
    assert main(["plot", str(run), str(table), "--csv", str(table)]) == 1
    assert "name one RUN" in output(capsys)


def test_load_and_act(run):
    agent = fastdreamer.load(run)
    env = fastdreamer.make_env("walker", time_limit=0.5, render_quality="fast", seed=1)
    obs, state, done, decisions = env.reset(), None, False, 0
    while not done:
        action, state = agent.act(obs, state)
        assert action.shape == (6,) and np.abs(action).max() <= 1
        obs, _, terminated, truncated, _ = env.step(action)
        done, decisions = terminated or truncated, decisions + 1
    assert decisions == 10


def test_tasks_are_listed_one_a_line_and_others_explained(capsys):
    assert main(["tasks"]) == 0
    listed, _, others = capsys.readouterr().out.partition("\n\n")
    assert tuple(listed.splitlines()) == fastdreamer.list_tasks()
    assert "gym:ID " in others and "module:function " in others


@pytest.fixture
def untrained(monkeypatch):
    """Runs end before they have learned or drawn anything."""
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    monkeypatch.setattr("fastdreamer.cli.train.plot_runs", lambda runs, picture: picture)


@pytest.fixture
def settings(tmp_path, monkeypatch, untrained):
    """Write a file for --config, and start a run that does not train; what its settings are."""
    monkeypatch.chdir(tmp_path)

    def train(told, *options):
        if told is not None:
            Path("told.json").write_text(told if isinstance(told, str) else json.dumps(told))
        assert main(["train", *options, "--config", "told.json", "--run", "made"]) == 0
        return read_config(Path("made"))

    return train


def test_a_part_of_a_configuration_replaces_the_preset_and_options_replace_it(settings):
    told = {"env": {"task": "walker-stand", "time_limit": 2.5}, "model": {"deter": 24}, "seed": 5}
    told["model"]["encoder_channels"] = [8, 8, 8, 8]
    made = settings(told, "--preset", "tiny", "--seed", "6", "--model.stoch", "7")
    tiny = fastdreamer.preset("tiny")
    env = dataclasses.replace(tiny.env, task="walker-stand", time_limit=2.5)
    model = dataclasses.replace(
        tiny.model, deter=24, stoch=7, encoder_channels=(8, 8, 8, 8), discount=False
    )
    want = dataclasses.replace(tiny, env=env, model=model, seed=6, device=made.device)
    assert made == want


def test_the_configuration_of_a_run_makes_another_like_it(run, settings):
    made = settings((run / "config.json").read_text(), "cheetah-run", "--seed", "9")
    old = read_config(run)
    env = dataclasses.replace(old.env, task="cheetah-run")
    assert made == dataclasses.replace(old, env=env, seed=9) and made.env.time_limit == 0.5


@pytest.mark.parametrize(
    ("told", "options", "says"),
    [
        ({"env": {"obz": "state"}}, [], "unknown field env.obz (did you mean env.obs?)"),
        ({"modle": {}}, [], "unknown field modle (did you mean model?)"),
        ({"model": {"deter": "many"}}, [], "model.deter must be a whole number, got 'many'"),
        ({"model": 3}, [], "model must be a table of fields, got 3"),
        ([1], [], "config must be a table of fields, got [1]"),
        ("{", [], "--config told.json: not JSON"),
        (None, [], "--config told.json: cannot be read: No such file"),
        ({"model": {"deter": 0}}, ["walker"], "model.deter must be > 0, got 0"),
        ({}, [], "train needs a TASK"),
        ({"env": {"task": "nosuch:make"}}, [], "told.json names an environment of its owner's"),
        (
            {"env": {"task": "walker-walk", "obs": "state"}, "safety": {"signal": "nosuch:signal"}},
            [],
            "safety.signal 'nosuch:signal' is named by a file alone",
        ),
        ({}, ["walker", "--preset", "nosuch"], "fastdreamer: unknown preset 'nosuch'"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(
    told, options, says, settings, capsys, tmp_path
):
    with pytest.raises(AssertionError):
        settings(told, *options)
    text = output(capsys)
    assert says in text and "Traceback" not in text, text
    assert not (tmp_path / "made").exists()


def test_a_loaded_agent_computes_where_it_is_told(run, monkeypatch):
    assert fastdreamer.load(run).device == torch.device("cpu")
    with pytest.raises(fastdreamer.ConfigError, match="device must be auto, cpu, cuda or cuda:N"):
        fastdreamer.load(run, device="tpu")
    if not torch.cuda.is_available():
        assert fastdreamer.load(run, device="auto").device == torch.device("cpu")
        with pytest.raises(fastdreamer.BackendError, match="^device 'cuda' cannot be used"):
            fastdreamer.load(run, device=torch.device("cuda"))
    moved = []
    monkeypatch.setattr(pretrained, "check_backend", lambda backend, device: None)
    monkeypatch.setattr(pretrained.Dreamer, "to", lambda self, device: moved.append(device))
    fastdreamer.load(run, device="cuda:1")
    assert moved == ["cuda:1"]


def test_resume_a_finished_run_and_extend_it(run, capsys):
    assert main(["train", "--resume", str(run), "--train.frames", "160"]) == 0
    assert json.loads((run / "config.json").read_text())["train"]["frames"] == 160
    assert "resumed from" in output(capsys)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "walkr"], "did you mean walker-"),
        (
            ["train", "walker", "--preset", "fast"],
            "valid presets: report, walker, walker-v3, state, tiny",
        ),
        (["train"], "needs a TASK"),
        (["train", "walker", "--model.deter", "0"], "model.deter must be > 0"),
        (["train", "walker", "--behavior.gamma", "1.5"], "behavior.gamma must be between 0 and 1"),
        (["train", "walker", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (
            ["train", "walker", "--device", "cpu", "--backend", "triton"],
            "backend 'triton' runs on a GPU and device is 'cpu'",
        ),
        (
            ["train", "walker", "--device", "cuda", "--backend", "native"],
            "backend 'native' runs on the CPU and device is 'cuda'",
        ),
        (["train", "walker", "--seed", "4294967296"], "seed must be < 2**32"),
        ([*STATE, "--train.frames", "1"], "leave nothing of train.frames = 1 to learn in"),
        (
            [*STATE, "--collect.prefill", "50", "--train.frames", "400", "--env.time-limit", "1"],
            "collect.prefill = 50 random episodes of up to 40 env frames leave nothing of",
        ),
        ([*STATE, "--env.time-limit", "1e-9"], "time_limit must be at least one control step"),
        ([*STATE, "--model.state-layers", "0"], "model.state_layers must be > 0"),
        ([*STATE, "--model.deter", "1000000000"], "sizes take more than 8,388,608 TiB"),
        ([*STATE, "--model.deter", "1000000"], "TiB for 3,001,"),
        ([*STATE, "--replay.batch", "1000000000"], "for one batch (replay.batch"),
        ([*STATE, "--plan.num-samples", "1000000000"], "for a plan's candidates"),
        ([*STATE, "--threads", "100000"], "got 100000, whose stacks alone are 781 GiB"),
        ([*STATE, "--collect.workers", "10000"], "collect.workers must be at most 8 a core"),
        (
            [*STATE, "--collect.envs", "3", "--collect.round", "2"],
            "collect.round must be 0 or >= collect.envs = 3, got 2",
        ),
        ([*STATE, "--safety", "nowhere:f"], "safety.signal 'nowhere:f' cannot be loaded"),
        (["train", "--resume", "nowhere"], "nowhere is not a run directory"),
        (["eval", "nowhere"], "nowhere: no such run or checkpoint"),
        (["eval", ".", "--episodes", "2"], "holds no checkpoint yet"),
        (["dream", "nowhere"], "nowhere: no such run or checkpoint"),
        (["plot", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_explained(argv, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    text = output(capsys)
    assert says in text and "Traceback" not in text, text
    assert not list(tmp_path.iterdir())  # a refused command leaves nothing behind


def test_without_a_renderer_the_reason_alone_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gl, "_selected", {})
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.delenv(gl._SELECTED, raising=False)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/dev/null")
    assert main(["train", "walker", *PIXELS]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("fastdreamer: MUJOCO_GL=egl is set, but this backend cannot")
    assert len(captured.err.splitlines()) == 3 and captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_dm_control_that_does_not_fit_its_mujoco_is_named(capsys, monkeypatch, tmp_path):
    from dm_control import suite

    def misfit(*args, **kwargs):
        raise AttributeError("'mujoco._structs.MjModel' object has no attribute 'flex_bandwidth'")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "load", misfit)
    assert main(["train", "walker", "--preset", "tiny"]) == 1
    pair = " with ".join(f"{name} {version(name)}" for name in ("dm_control", "mujoco"))
    text = output(capsys)
    assert text.startswith(f"fastdreamer: {pair} cannot load a task (AttributeError: 'mujoco._st")
    assert not list(tmp_path.iterdir())
    assert dict(doctor._simulator())["simulator"].startswith(f"no: {pair} cannot load a task")
    monkeypatch.undo()
    assert dict(doctor._simulator())["simulator"] == "walker-walk loads and steps"


def test_names_of_runs_hold_the_seed_and_do_not_collide(monkeypatch, tmp_path, untrained):
    class Noon(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datetime.datetime", Noon)
    for seed in ("7", "7", "8", "7"):
        assert main([*STATE, "--preset", "tiny", "--seed", seed]) == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    stem = "walker-walk-20260101-120000-seed"
    assert names == [f"{stem}7", f"{stem}7-2", f"{stem}7-3", f"{stem}8"]
    seeds = [read_config(tmp_path / "runs" / name).seed for name in names]
    assert seeds == [7, 7, 7, 8]


def test_a_full_disk_is_looked_at_before_a_run(capsys, monkeypatch, tmp_path, untrained):
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert main(STATE) == 1
    assert "1 MiB are free, the checkpoints alone take" in output(capsys)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    assert main(["train", "walker"]) == 0
    assert "note: 1 GiB are free at" in output(capsys)


def test_where_nothing_can_be_written_no_run_is_begun(capsys, monkeypatch, tmp_path, untrained):
    monkeypatch.chdir(tmp_path)
    able = os.access
    closed = lambda path, mode: able(path, mode) and Path(path) != tmp_path  # noqa: E731
    monkeypatch.setattr(os, "access", closed)
    for where in ([], ["--run", "a/b"]):
        assert main([*STATE, *where]) == 1
        assert f"{tmp_path} cannot be written to" in output(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        ["plot", "RUN"],
        ["report", "RUN", "--out", "."],
        ["eval", "RUN", "--video", "episode.mp4"],
        ["watch", "RUN", "--out", "film.gif"],
        ["export", "RUN", "agent.safetensors"],
    ],
    ids=lambda argv: argv[0],
)
def test_where_nothing_can_be_written_one_line_says_so(argv, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    able = os.access
    closed = lambda path, mode: able(path, mode) and Path(path).absolute() != tmp_path  # noqa: E731
    monkeypatch.setattr(os, "access", closed)
    monkeypatch.setattr(fastdreamer.Dreamer, "act", lambda *args, **kwargs: pytest.fail("played"))
    assert main([str(run) if word == "RUN" else word for word in argv]) == 1
    assert f"fastdreamer: {tmp_path} cannot be written to" in output(capsys)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_replaced_is_named(run, capsys, monkeypatch, tmp_path):
    """As one of somebody else's in a directory for all, or what is a directory itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curves.png").mkdir()
    assert main(["plot", str(run)]) == 1
    assert "fastdreamer: curves.png cannot be written: Is a directory" in output(capsys)

    def refuse(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted", source, None, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert main(["plot", str(run), "--out", "c.svg"]) == 1
    assert "fastdreamer: c.svg cannot be written: Operation not permitted" in output(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_fewer_frames_than_there_are_leave_nothing_to_do(run, capsys):
    before = (run / "config.json").read_bytes()
    assert main(["train", "--resume", str(run), "--train.frames", "20"]) == 1
    assert "env frames already: there is nothing to do up to train.frames = 20" in output(capsys)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "option", [["--preset", "tiny"], ["--preset", "nosuch"], ["--config", "nosuch.json"]]
)
def test_a_starting_point_is_no_setting_of_a_run_that_goes_on(option, run, capsys):
    before = (run / "config.json").read_bytes()
    assert main(["train", "--resume", str(run), *option]) == 1
    assert f"{option[0]} is where a new run starts from" in output(capsys)
    assert (run / "config.json").read_bytes() == before


def test_a_fault_of_ours_keeps_its_traceback_and_a_user_s_is_one_line(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "walkr"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(ValueError, match="unknown task 'walkr'"):
        main(["--debug", "train", "walkr"])
    for fault in (ValueError("shapes do not fit"), OSError("no such device")):

        def fails(*args, fault=fault):
            raise fault

        monkeypatch.setattr("fastdreamer.training.trainer.canonical_task", fails)
        with pytest.raises(type(fault), match=str(fault)):
            main(["train", "walker"])


def test_help_into_a_pipe_that_closes_is_quiet():
    shell = f"{sys.executable} -m fastdreamer train --help; echo $? >&2"
    read, write = os.pipe()
    os.close(read)  # before there is a word, as a reader that is through with it does
    try:
        done = subprocess.run(
            ["bash", "-c", shell], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(write)
    assert done.stderr == "141\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "walker", "--obs", "stat"], "('pixels', 'state', 'both')"),
        (["train", "walker", "--env.obz", "state"], "--env.obs {pixels,state,both}"),
        (["train", "walker", "--model.deter", "many"], "--model.deter INT"),
        (["train", "walker", "--resume"], "Missing value for argument '--resume'"),
        (["train", "walker", "--preset"], "Missing value for argument '--preset'"),
        (["fly"], "train"),
    ],
)
def test_unknown_options_list_the_valid_ones(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert says in output(capsys).replace("│ ", "")


def test_runs_are_not_overwritten_and_fixed_settings_not_changed(run, capsys):
    assert main(["train", "walker", "--run", str(run)]) == 1
    assert f"fastdreamer train --resume {run}" in output(capsys)
    before = (run / "config.json").read_bytes()
    for change in (["--model.deter", "7"], ["--seed", "1"], ["--env.action-repeat", "4"]):
        assert main(["train", "--resume", str(run), *change]) == 1
        assert "is fixed when a run starts" in output(capsys)
    assert main(["train", "cheetah-run", "--resume", str(run)]) == 1
    assert (run / "config.json").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can run here")
@pytest.mark.parametrize(("option", "value"), [("--backend", "triton"), ("--device", "cuda")])
def test_what_cannot_run_here_is_refused_at_once(option, value, tmp_path, capsys):
    argv = ["train", "walker", "--preset", "tiny", option, value, "--run", str(tmp_path / "run")]
    assert main(argv) == 1
    text = output(capsys)
    assert re.search("triton.* cannot run: no usable|device 'cuda' cannot be used: no usable", text)
    assert driver_state() in text, "the reason that doctor shows"
    assert not (tmp_path / "run").exists()


def test_doctor_and_version(capsys, monkeypatch):
    monkeypatch.setenv("FASTDREAMER_BACKEND", "native")
    assert main(["doctor"]) == 0
    text = output(capsys)
    assert "(FASTDREAMER_BACKEND=native is taken in auto's place)" in text
    assert f"NVIDIA driver {driver_state()[:20]}" in text
    for word in ("CPU", "threads", "amx", "rendering", "torch", "lambda_return", "imagine"):
        assert word in text
    for name, fp32, bf16 in _native.rates():
        assert f"{name} {fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16, one thread" in text
    taken = _native.choice()
    assert f"native core {describe_kernels(taken)}" in text
    assert f"fp32 takes {taken['fp32']}, " in text and "bf16 takes" in text
    assert f"precision auto is {_native.faster()}" in text
    assert main(["--version"]) == 0
    assert fastdreamer.__version__ in output(capsys)


RATES = [("avx2", 100.0, 75.0), ("avx512bf16", 160.0, 80.0)]


@pytest.mark.parametrize(
    ("told", "fp32", "bf16"),
    [
        ({}, "avx512bf16, by these rates", "the kernels of fp32, by these rates: avx512bf16's"),
        (
            {"FASTDREAMER_ISA": "avx2"},
            "avx2, as FASTDREAMER_ISA=avx2 says",
            "avx2, as FASTDREAMER_ISA=avx2 says: avx2's bf16 has 0.75 times the rate of fp32",
        ),
        (
            {"FASTDREAMER_ARITHMETIC": "bf16"},
            "avx512bf16, by these rates",
            "avx512bf16, as FASTDREAMER_ARITHMETIC=bf16 says: avx512bf16's bf16 has 0.50 times",
        ),
    ],
)
def test_doctor_says_why_kernels_are_taken(told, fp32, bf16):
    arguments = told.get("FASTDREAMER_ISA"), told.get("FASTDREAMER_ARITHMETIC")
    choice = _native.choose(RATES, *arguments)
    lines = dict(kernel_reasons(RATES, choice, choice["faster"], told))
    assert lines["fp32 takes"] == fp32
    assert lines["bf16 takes"].startswith(bf16)
    assert lines["precision auto is"] == "fp32"


def test_ctrl_c_saves_and_prints_how_to_go_on(tmp_path):
    run_dir = tmp_path / "stopped"
    argv = [sys.executable, "-m", "fastdreamer", "train", "walker", "--preset", "tiny"]
    process = subprocess.Popen(
        [*argv, "--train.frames", "100000", "--run", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/checkpoint-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert f"fastdreamer train --resume {run_dir}" in text and "Traceback" not in text
    saved = load_meta(list_checkpoints(run_dir / "checkpoints")[-1])["cursor"]["env_frames"]
    done = subprocess.run(
        [*argv[:4], "--resume", str(run_dir), "--train.frames", str(saved + 80)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout + done.stderr
