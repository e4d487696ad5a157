"""How many threads learn beside the collector, and how torch's threads wait for work."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from fastdreamer import cli
from fastdreamer.config import preset
from fastdreamer.errors import ArgumentError
from fastdreamer.machine import device
from fastdreamer.machine.container import cpu_quota
from fastdreamer.machine.cores import (
    SPINS,
    bound_spinning,
    learner_threads,
    within_quota,
)
from fastdreamer.machine.device import resolve_config
from fastdreamer.training.trainer import Trainer, create_run, read_config


@pytest.mark.parametrize(
    ("cores", "convolutions", "threads"),
    [(1, False, 1), (1, True, 1), (2, False, 2), (2, True, 1), (8, False, 8), (8, True, 7)],
)
def test_the_rule(cores, convolutions, threads):
    assert learner_threads(cores, convolutions) == threads


def test_no_more_threads_than_a_quota_lets_run():
    assert [within_quota(8, quota) for quota in (None, 0.3, 1.0, 1.5, 4.0, 64.0)] == [
        8, 1, 1, 2, 4, 8,
    ]  # fmt: skip
    assert within_quota(device.TORCH_CORES, cpu_quota()) == device.CORES


def test_who_plays_keeps_to_it_too(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(device, "TORCH_CORES", 8)
    for allowed in (8, 2):
        monkeypatch.setattr(device, "CORES", allowed)
        assert cli.main(["eval", str(tmp_path / "none")]) == 1
    assert told == [2]


class Decode:
    """An op that decodes, in native or not."""

    def __init__(self, reason):
        self.why_not = lambda backend, device: reason if backend == "native" else None


@pytest.mark.parametrize(
    ("obs", "backend", "reason", "threads"),
    [
        ("state", "auto", None, 4),
        ("state", "eager", None, 4),
        ("pixels", "native", None, 4),
        ("pixels", "auto", None, 4),
        ("pixels", "auto", "not built", 3),
        ("both", "eager", None, 3),
    ],
)
def test_who_convolves_decides(obs, backend, reason, threads, monkeypatch):
    monkeypatch.setattr(device, "CORES", 4)
    monkeypatch.setattr(device, "why_slow", lambda: None)
    monkeypatch.setattr(device, "DECODE", Decode(reason))
    config = preset("walker")
    env = dataclasses.replace(config.env, obs=obs)
    config = dataclasses.replace(config, env=env, backend=backend, device="cpu")
    assert device.resolve_threads(config, "cpu") == threads
    assert device.resolve_threads(config, "cuda") == 4
    assert device.resolve_threads(dataclasses.replace(config, threads=9), "cpu") == 9


def test_a_run_keeps_and_says_how_many_threads_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "CORES", 1)
    create_run(tmp_path, dataclasses.replace(preset("tiny"), threads=0, device="cpu"))
    monkeypatch.setattr(device, "CORES", 5)  # resumed elsewhere
    assert read_config(tmp_path).threads == 1
    assert json.loads((tmp_path / "config.json").read_text())["threads"] == 1
    assert resolve_config(dataclasses.replace(read_config(tmp_path), threads=0)).threads == 5
    with pytest.raises(ArgumentError, match="until must be at least 1 env frame, got -1"):
        Trainer(tmp_path).train(until=-1)
    Trainer(tmp_path).train(until=40)
    assert "learning on 1 CPU thread\n" in capsys.readouterr().out


def test_spinning_is_bounded_before_torch_is_loaded(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(RuntimeError, match="torch is loaded already"):
        bound_spinning()
    monkeypatch.delitem(sys.modules, "torch")
    for given, want in (
        ({}, {"GOMP_SPINCOUNT": str(SPINS)}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ):
        monkeypatch.setattr(os, "environ", dict(given))
        bound_spinning()
        assert os.environ == want


def openmp_read(*argv: str) -> str:
    """What OpenMP says that it read from the environment, in the command's process."""
    unset = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-m", "fastdreamer", *argv],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP is not GNU's")
    return done.stderr


def test_openmp_reads_the_bound_in_every_command_but_bench():
    bound = f"GOMP_SPINCOUNT = '{SPINS}'"
    assert bound in openmp_read("--version")
    assert bound in openmp_read("train", "--help")
    assert bound not in openmp_read("bench", "--help")


FORK = """
import os, torch
from fastdreamer import testing
from fastdreamer.ops.imagine import imagine
torch.set_num_threads(8)
inputs = testing.imagine_inputs(testing.Sizes(2, 13, 5, 6, 17, 9, 1, 1, 1, "elu"), 3, 60)
with torch.no_grad():
    want = imagine(**inputs, backend="native").stoch
    pid = os.fork()
    if pid == 0:
        os._exit(not torch.equal(imagine(**inputs, backend="native").stoch, want))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_forked_child_computes_where_waiting_is_bounded():
    pytest.importorskip("fastdreamer._native")
    environment = {**os.environ, "GOMP_SPINCOUNT": str(SPINS)}
    assert subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=60).returncode == 0
