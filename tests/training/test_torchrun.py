"""A learner of two processes, as torchrun starts it: stopped, killed, resumed, refused."""

import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from logged import WALL_CLOCK, learned

from fastdreamer.cli import main
from fastdreamer.config import ConfigError, preset
from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
from fastdreamer.learning.ranks import Ranks
from fastdreamer.machine import device as machine_device
from fastdreamer.training import ranks as training_ranks
from fastdreamer.training.logger import read_metrics

FRAMES = ["--train.frames", "240"]
SLOWER = ["--optim.anneal", "80"]
TRAIN = ["train", "walker", "--preset", "tiny", *FRAMES, "--behavior.target-every", "7", *SLOWER]
ROOT = Path(__file__).parents[2]
TIMEOUT = 240


# A program that is fastdreamer but for what becomes of it at an update.
DISTURBED = """
import os, signal, sys, time
from fastdreamer.cli import main
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.trainer import StopSignals
update, note, calls, noted = Dreamer.update, StopSignals.note, [], []
def disturbed(*args, **how):
    calls.append(how)
    if os.environ["RANK"] == "{rank}" and len(calls) == {count}:
        {what}
    return update(*args, **how)
def noting(*about):
    noted.append(about)
    note(*about)
if __name__ == "__main__":
    Dreamer.update, StopSignals.note = disturbed, noting
    raise SystemExit(main(sys.argv[1:]))
"""
CTRL_C = """os.kill(os.getppid(), signal.SIGINT)  # torchrun, which hands it on
        while not noted:
            time.sleep(0.01)"""
KILL_9 = "os.kill(os.getpid(), signal.SIGKILL)"


def launch(*argv, program=("-m", "--", "fastdreamer")):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *launcher, *program, *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process):
    """What it said to its end, in one line, and the status of torchrun."""
    try:
        text, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return " ".join(text.split()), process.returncode


def undisturbed(run_dir):
    """A run of two ranks from its beginning to its end."""
    text, status = end(launch(*TRAIN, "--run", run_dir))
    assert status == 0, text
    assert text.count("done; try: fastdreamer eval") == 1, "of the first rank alone"
    assert "learning on 1 CPU thread in each of 2 processes" in text
    return run_dir


def begins_as_alone(reference, tmp_path):
    assert main([*TRAIN, "--train.frames", "160", "--run", str(tmp_path / "alone")]) == 0
    ours, alone = (read_metrics(run, "train")[0] for run in (reference, tmp_path / "alone"))
    assert ours["update"] == alone["update"] and ours.keys() == alone.keys()
    for name in ours.keys() - {*WALL_CLOCK, "kind"}:
        assert ours[name] == pytest.approx(alone[name], rel=0.02, abs=1e-3), name


def test_stopped_and_killed_and_resumed_it_is_the_same_run(tmp_path):
    reference = undisturbed(tmp_path / "reference")
    begins_as_alone(reference, tmp_path)
    run_dir = tmp_path / "run"
    program = tmp_path / "disturbed.py"
    program.write_text(DISTURBED.format(rank=0, count=10, what=CTRL_C))
    text, status = end(launch(*TRAIN, "--run", run_dir, program=["--", program]))
    assert status != 0 and "stopped, nothing is lost; go on with: torchrun " in text
    program.write_text(DISTURBED.format(rank=1, count=40, what=KILL_9))
    text, status = end(launch("train", "--resume", run_dir, program=["--", program]))
    assert status != 0 and read_metrics(run_dir, "train")[-1]["update"] >= 45, text
    told = r"another process of the learner is gone|stopped, nothing is lost; go on with"
    assert len(re.findall(told, text)) == 1 and "fastdreamer train --resume" in text, text
    text, status = end(launch("train", "--resume", run_dir))
    assert status == 0 and "resumed from" in text, text
    assert learned(run_dir) == learned(reference)


def test_all_ranks_learn_at_the_first_one_s_pace(monkeypatch):
    """As it is ordered, and heard."""
    said = []
    monkeypatch.setattr(training_ranks.dist, "broadcast", lambda order, src: said.append(order))
    lead = training_ranks.Lead(Ranks(0, 2))
    monkeypatch.setattr(training_ranks, "_scatter", lambda x, *about: x)
    monkeypatch.setattr(training_ranks.dist, "broadcast_object_list", lambda told, src: None)
    lead.deal({"reward": np.zeros((4, 2), np.float32)}, pace=0.3, health=True)
    what, pace, health = said[-1].tolist()
    assert (pace, health) == (0.3, True)

    class Agent:
        device = "cpu"

        def set_pace(self, optimizers, pace):
            said.append((optimizers, pace))

        def update(self, batch, optimizers, generator, *, health):
            said.append((optimizers, health))

    learning = training_ranks._Learning(Agent(), "theirs", None)
    training_ranks._update(learning, {}, pace, bool(health))
    assert said[-2:] == [("theirs", 0.3), ("theirs", True)]


def test_all_ranks_compute_by_the_first_one_s_kernels(monkeypatch):
    """Which it has measured, or a checkpoint has named."""
    chosen, told, settled = {"fp32": "scalar", "bf16": "scalar", "for_bf16": "fp32"}, [], []
    monkeypatch.setattr(machine_device, "kernel_choice", lambda: chosen)
    monkeypatch.setattr(training_ranks, "_order", lambda *about: None)
    tell = lambda what, src: told.extend(what)  # noqa: E731
    monkeypatch.setattr(training_ranks.dist, "broadcast_object_list", tell)
    monkeypatch.setattr(training_ranks, "_hear", told.pop)
    monkeypatch.setattr(training_ranks, "settle_kernels", settled.append)
    for backend, kernels in (("native", chosen), ("eager", None)):
        agent = Dreamer(preset("tiny", {"device": "cpu", "backend": backend}), {"state": (5,)}, 3)
        lead = training_ranks.Lead(Ranks(0, 2))
        lead.start(agent, agent.make_optimizers(), torch.Generator())
        with contextlib.ExitStack() as stack:
            training_ranks._begin(Ranks(1, 2), stack)
        assert settled.pop() == kernels


def test_what_ranks_cannot_learn_together_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_ranks, "current", lambda: Ranks(0, 3))
    with pytest.raises(ConfigError, match="replay.batch = 4 sequences cannot be split among 3"):
        training_ranks.check_ranks(preset("tiny"))
    assert main([*TRAIN, "--run", str(tmp_path / "run")]) == 1
    assert "cannot be split among 3 ranks" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(training_ranks, "current", lambda: Ranks(0, 2))
    training_ranks.check_ranks(preset("tiny"))
    for changes, what in (
        ({"explore": {"method": "ucb"}}, "--explore"),
        ({"safety": {"signal": "walker"}}, "--safety"),
    ):
        with pytest.raises(ConfigError, match=f"{what} learns in one process"):
            training_ranks.check_ranks(preset("tiny", changes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for gpus, device, what in (
        (1, "cuda", "2 ranks on this machine need a GPU each, and it has 1"),
        (2, "cuda:1", "ranks take the GPUs from the first on: leave out cuda:1"),
    ):
        monkeypatch.setattr(training_ranks.torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(ConfigError, match=what):
            training_ranks.check_ranks(preset("tiny", {"device": device}))
    training_ranks.check_ranks(preset("tiny", {"device": "cuda"}))


@pytest.mark.parametrize(
    ("error", "ordered"),
    [(None, True), (NonFiniteLoss("kl loss", math.inf), True), (MemoryError(), False)],
)
def test_others_are_told_to_end_where_they_listen(monkeypatch, error, ordered):
    """Within an update they do not: an order would wait for them, and they for the rest of it."""
    orders, patience = [], []
    monkeypatch.setattr(training_ranks, "_from_torchrun", lambda: True)
    monkeypatch.setattr(training_ranks, "_order", orders.append)
    group = training_ranks.dist
    monkeypatch.setattr(group, "init_process_group", lambda _, timeout: patience.append(timeout))
    monkeypatch.setattr(group, "get_rank", lambda: 0)
    monkeypatch.setattr(group, "get_world_size", lambda: 2)
    told = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with told, training_ranks.joined() as ranks, training_ranks.Lead(ranks).updating():
        if error:
            raise error
    assert orders == [training_ranks._END] * ordered
    assert patience[0] > datetime.timedelta(days=1)  # the default is over before long plans are


def test_a_mistake_ends_all_ranks(tmp_path):
    text, status = end(launch("train", "walker", "--preset", "tiny", "--replay.batch", "3"))
    assert status != 0 and "cannot be split among 2 ranks" in text, text
    assert json.dumps(text).count("cannot be split") == 1
