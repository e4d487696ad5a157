"""The newest agent acting: pictures, a file, and the page over real HTTP and in a real browser."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import fastdreamer
from fastdreamer.acting.play import config_env, episode_seed, evaluate
from fastdreamer.analysis import watch
from fastdreamer.analysis.viz.panels import panels
from fastdreamer.analysis.watch import DREAM, episode
from fastdreamer.cli import main
from fastdreamer.config import preset, to_dict
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.checkpoint import checkpoint_path, save_checkpoint
from fastdreamer.training.trainer import write_config

CONFIG = preset(
    "tiny", {"env": {"obs": "pixels", "render_quality": "fast", "time_limit": 2.6}, "device": "cpu"}
)
DECISIONS = 52
SHAPES = {"pixels": (64, 64, 3)}


def save(run, update, config=CONFIG, shapes=SHAPES):
    """A checkpoint of so many updates, whose agent is another each time."""
    agent = Dreamer(dataclasses.replace(config, seed=update), shapes, 6)
    meta = {
        "config": to_dict(config),
        "obs_shapes": shapes,
        "action_dim": 6,
        "cursor": {"update": update, "env_frames": 2 * update},
    }
    tensors = {f"agent/{name}": value for name, value in agent.state_dict().items()}
    save_checkpoint(checkpoint_path(run / "checkpoints", update), tensors, meta)
    return agent


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    save(path, 1)
    write_config(path, CONFIG)
    return path


def test_panels_are_named_and_of_one_size():
    small = {name: np.full((64, 64, 3), i, np.uint8) for i, name in enumerate(("a", "b"))}
    whole = panels(small)
    assert whole.shape == (16 + 256, 2 * 256 + 8, 3) and whole.dtype == np.uint8
    assert (whole[16:, :256] == 0).all() and (whole[16:, 264:] == 1).all()
    assert (whole[:16] < 128).any() and (whole[16:, 256:264] == 255).all()
    odd = panels({"a": np.zeros((301, 333, 3), np.uint8)})
    assert odd.shape == (16 + 302, 334, 3)
    for wrong in ({}, {"a": np.zeros((2, 2, 3))}, small | {"c": np.zeros((9, 9, 3), np.uint8)}):
        with pytest.raises(ValueError, match="must be uint8"):
            panels(wrong)


def test_an_episode_is_an_evaluations_and_the_dream_is_blind(run):
    """Return and decisions are those of ``evaluate``; the dream starts where the filter is."""
    agent = fastdreamer.load(run)
    env = config_env(agent.config)
    seed = episode_seed(0, "evaluate", 0)
    pictures, decisions, returns = zip(*episode(agent, env, seed), strict=True)
    assert decisions == tuple(range(DECISIONS + 1))
    assert returns[-1] == evaluate(agent, env, seed)
    part = lambda i, p: pictures[i][16:, 264 * p : 264 * p + 256]  # noqa: E731
    for i in range(DECISIONS + 1):
        same = np.array_equal(part(i, 1), part(i, 2))
        assert same == (i % DREAM == 0), f"after {i} decisions"
    assert not np.array_equal(part(0, 0), part(9, 0))


def test_the_dream_is_the_dynamics_under_the_actions(run, monkeypatch):
    agent = fastdreamer.load(run)
    obs = {"pixels": np.zeros((64, 64, 3), np.uint8)}
    _, state = agent.act(obs, generator=torch.Generator().manual_seed(0))
    ahead = agent.foresee(state, torch.Generator().manual_seed(5))
    _, dreamt = agent.dream(state, 1, torch.Generator().manual_seed(5))
    assert np.array_equal(agent.decode(ahead)["pixels"], dreamt["pixels"])
    assert torch.equal(ahead.action, state.action)


@pytest.mark.parametrize("name", ["watch.gif", "watch.mp4"])
def test_one_episode_as_a_file(run, name, tmp_path, capsys):
    out = tmp_path / "new" / name
    assert main(["watch", str(run), "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out.replace("\n", "")
    if out.suffix == ".gif":
        with Image.open(out) as film:
            seen = (film.n_frames, film.size, film.info["duration"])
        assert seen == (DECISIONS + 1, (784, 272), 50)
    else:
        frames, _ = imageio_ffmpeg.count_frames_and_secs(str(out))
        assert frames == DECISIONS + 1


def test_the_newest_acts_in_the_next_episode(run):
    told = []
    for frame in watch.Show(run, seed=0).frames(2):
        if not told:
            save(run, 2)
        told.append(tuple(frame.about[name] for name in ("episode", "update", "env_frames")))
    assert told == [(1, 1, 2)] * (DECISIONS + 1) + [(2, 2, 4)] * (DECISIONS + 1)


def test_mistakes_are_explained(run, tmp_path, capsys):
    def says(*argv):
        assert main(["watch", *map(str, argv)]) == 1
        return " ".join(capsys.readouterr().err.split())

    assert "--out must end in .gif or .mp4" in says(run, "--out", "film.avi")
    (tmp_path / "film.gif").mkdir()
    assert "it is a directory" in says(run, "--out", tmp_path / "film.gif")
    (tmp_path / "file").touch()
    assert "a file is where its own" in says(run, "--out", tmp_path / "file" / "film.gif")
    assert "no such run or checkpoint" in says(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint yet" in says(tmp_path / "empty")
    state = dataclasses.replace(CONFIG, env=dataclasses.replace(CONFIG.env, obs="state"))
    save(tmp_path / "state", 1, state, {"state": (24,)})
    assert "was trained from state" in says(tmp_path / "state")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "choose another --port" in says(run, "--port", port)
    assert "--port must be from 0 to 65535, got 99999" in says(run, "--port", 99999)


@pytest.fixture
def page(run):
    """The command as a user starts it, and its address."""
    command = [sys.executable, "-m", "fastdreamer", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "COLUMNS": "200"},
        # A shell's background jobs ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    line = process.stdout.readline()
    address = re.match(r"http://127\.0\.0\.1:\d+", line)
    assert address, line + process.stdout.read()
    yield address[0]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and not rest, rest


def get(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.status, answer.headers, answer.read()


def next_frame(page, after):
    """A busy machine may take longer for one than a request waits."""
    for _ in range(12):
        status, headers, body = get(f"{page}/frame?after={after}")
        if status != 204:
            return json.loads(headers["X-About"]), headers, body
    raise AssertionError("no picture")


def test_the_page_over_http(page, run):
    status, headers, body = get(f"{page}/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"fastdreamer watch" in body and b"/frame?after=" in body
    told = []
    for _ in range(3):
        after = told[-1]["number"] if told else -1
        about, headers, body = next_frame(page, after)
        assert headers["Content-Type"] == "image/jpeg"
        assert Image.open(io.BytesIO(body)).size == (784, 272)
        assert about["number"] > after
        told.append(about)
    keys = {"number", "update", "env_frames", "episode", "decision", "return"}
    assert told[0].keys() == keys and told[0]["update"] == 1
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{page}/etc/passwd")
    assert get(f"{page}/frame?after=--5")[0] in (200, 204)
    rude = socket.create_connection(("127.0.0.1", int(page.rpartition(":")[2])))
    rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rude.send(b"GET /frame")
    rude.close()  # a reset, of which nothing is said: see the fixture
    save(run, 2)  # that acts in the next episode, or the one after where the next has just begun
    under_way = next_frame(page, told[-1]["number"])[0]["episode"]
    deadline = time.monotonic() + 120
    while told[-1]["episode"] <= under_way + 1:
        assert time.monotonic() < deadline
        told.append(next_frame(page, told[-1]["number"])[0])
    assert (told[-1]["update"], told[-1]["env_frames"]) == (2, 4)
    by = {about["episode"]: about["update"] for about in told}
    assert all(by[about["episode"]] == about["update"] for about in told)


def test_nobody_looks_nobody_acts(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watch, "_PATIENCE", 0.1)
    stage = watch._Stage()
    for _ in range(2):
        waits = watch.threading.Thread(target=stage.wait_for_someone, daemon=True)
        waits.start()
        waits.join(0.3)
        assert waits.is_alive()
        assert stage.get(-1) is None  # somebody asks, and nothing comes for a while
        waits.join(60)
        assert not waits.is_alive()
        now[0] += watch._LOOKED


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_the_page_in_a_browser(page, tmp_path):
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update",
               f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=4000"]  # fmt: skip
    done = subprocess.run(
        ["chromium", *options, "--dump-dom", f"{page}/"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert re.search(r"update 1, 2 env frames; episode \d+: return [\d.]+ after", done.stdout)
    assert re.search(r'<img id="picture"[^>]* src="blob:http', done.stdout)
    subprocess.run(
        ["chromium", *options, "--window-size=900,600", f"--screenshot={picture}", f"{page}/"],
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    with Image.open(picture) as seen:
        colours = np.asarray(seen.convert("RGB"))
    assert colours[150:350].std() > 10  # not an empty page
