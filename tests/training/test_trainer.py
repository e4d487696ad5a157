"""A run survives what happens to it: resumed after anything, it equals the undisturbed run.

Runs are children of a launcher, a process that has imported everything and forks; and so are their
workers, but where starting one is what is tested.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import types
import unittest.mock
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from logged import WALL_CLOCK

from fastdreamer import _native
from fastdreamer.acting.play import agent_policy, collect, episode_seed, random_policy
from fastdreamer.acting.policy import Policy
from fastdreamer.cli import main
from fastdreamer.config import ConfigError, preset, to_dict
from fastdreamer.envs import make_env
from fastdreamer.envs.gl import GLError, select_gl
from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
from fastdreamer.ops.backend import kernel_choice
from fastdreamer.training import trainer as trainer_module
from fastdreamer.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    list_snapshots,
    load_checkpoint,
    save_checkpoint,
)
from fastdreamer.training.collector import Collector, Job, read_job
from fastdreamer.training.episodes import episode_path, read_episode
from fastdreamer.training.logger import Logger, Progress
from fastdreamer.training.pretrained import load
from fastdreamer.training.trainer import (
    RunError,
    Trainer,
    create_run,
    lock_run,
    read_config,
    write_config,
)
from fastdreamer.training.worker import Result

TINY = preset("tiny")
# 10 episodes of 20 decisions; 5 + 8 · 20 updates. Every 7 updates a checkpoint, so that they fall
# all over the cycles; episodes are evicted; the target critic and the return range have state;
# over the second half of the run the learning rates fall.
CONFIG = dataclasses.replace(
    TINY,
    seed=3,
    replay=dataclasses.replace(TINY.replay, capacity=200),
    behavior=dataclasses.replace(TINY.behavior, target_every=15, return_norm=True),
    optim=dataclasses.replace(TINY.optim, anneal=200),
    train=dataclasses.replace(TINY.train, pretrain=5, checkpoint_every=7),
)
UPDATES, PREFILL, CYCLE = 165, 2, 20
KINDS = ["state", "pixels", "both"]  # what a run sees: whether it has convolutions
KILLS, SEED = ["seconds"] * 2 + ["updates"] * 5 + ["call"] * 3, 1  # of each of two runs
FEW_KILLS = ["seconds"] + ["updates"] * 2 + ["call"]  # from pixels a start takes longer
TIMEOUT = 240  # seconds; a run takes a few, but ten times that on a machine that others load

LAUNCHER = """
import fcntl, json, os, signal, socket, sys, traceback
from multiprocessing import util
from pathlib import Path
import torch._dynamo, torch.utils.tensorboard  # what training would import later
from fastdreamer.training import trainer

spares, spawn = [], util.spawnv_passfds

def start(path, args, fds):
    if not spares or "--multiprocessing-fork" not in args:  # a helper of multiprocessing's
        return spawn(path, args, fds)
    pid, channel = spares.pop()
    job = {"code": args[args.index("-c") + 1], "fds": fds, "environment": dict(os.environ)}
    socket.send_fds(channel, [json.dumps(job).encode()], fds)
    channel.close()
    return pid

def add_spare():
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for channel in (ours, *(other for _, other in spares)):
            channel.close()
        job, fds, _, _ = socket.recv_fds(theirs, 1 << 20, 16)
        if not job:
            os._exit(0)  # the run is over
        theirs.close()
        become(**json.loads(job), received=fds)
    theirs.close()
    spares.append((pid, ours))

def become(code, fds, environment, received):
    os.environ.clear()
    os.environ.update(environment)
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, number in zip(aside, fds):
        os.dup2(fd, number)
        os.close(fd)
    sys.argv = ["-c", "--multiprocessing-fork"]
    status = 1
    try:
        exec(code, {})
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)

util.spawnv_passfds = start
print(os.getpid(), flush=True)
for line in sys.stdin:
    run_dir, hook, count = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()  # the trainer and its children: a session that one can look for
        log = os.open(run_dir + "/log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for _ in range(count):
            add_spare()
        code = 1
        try:
            exec(hook, {"trainer": trainer})
            trainer.Trainer(Path(run_dir)).train()
            code = 0
        except trainer.Stopped:
            code = 3
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
STOPPED = 3

# Code that a run executes before it trains.
STARTED = """
run = trainer.Trainer._run
def _run(self):
    (self.run_dir / "started").touch()
    run(self)
trainer.Trainer._run = _run
"""
ARCHIVE = """
import os
save = trainer.checkpoint.save_checkpoint
def save_checkpoint(path, tensors, meta):
    save(path, tensors, meta)
    archive = path.parent.parent / "archive"
    archive.mkdir(exist_ok=True)
    os.link(path, archive / path.name)
trainer.checkpoint.save_checkpoint = save_checkpoint
"""
KILL_AFTER_UPDATES = """
import os, signal, time
from functools import wraps
read, write = os.pipe()
victim = os.getpid()
if os.fork() == 0:  # the killer, a process of its own: its victim's pace does not slow it
    os.close(write)
    if os.read(read, 1):
        time.sleep({seconds})
        if os.getppid() == victim:
            os.kill(victim, signal.SIGKILL)
    os._exit(0)
os.close(read)
calls = []
def counted(function):
    @wraps(function)
    def call(*args, **kwargs):
        if len(calls) == {count}:
            os.write(write, b"x")
        if len(calls) == {count} + 7:  # no further: a killer that is late is waited for
            signal.pause()
        calls.append(function)
        result = function(*args, **kwargs)
        if function is run and len(calls) > {count}:
            signal.pause()
        return result
    return call
run = trainer.Trainer._run
trainer.Trainer._run = counted(run)
trainer.Dreamer.update = counted(trainer.Dreamer.update)
"""
KILL_AT_CALL = """
import os, signal
original, calls = os.{name}, []
def killing(*args):
    calls.append(args)
    if len(calls) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
os.{name} = killing
"""
SIGNAL_AT_UPDATE = """
import os, signal
update, calls = trainer.Dreamer.update, []
def signalled(*args, **kwargs):
    calls.append(args)
    if len(calls) == {count}:
        os.kill(os.getpid(), signal.{name})
    return update(*args, **kwargs)
trainer.Dreamer.update = signalled
"""
SIGNAL_AT_START = """
import os, signal
from fastdreamer.training.collector import _Worker
start = _Worker._start
def signalled(self):
    start(self)
    os.killpg(os.getpid(), signal.SIGINT)  # a terminal's Ctrl-C: the collector gets it too
_Worker._start = signalled
"""
SIGNAL_WHILE_WAITING = """
import os, signal
ready, calls = trainer.Collector.ready, []
def signalled(self, timeout):
    share = self.workers[0].share
    if share and sum(share.batches, []) == {episodes} and not calls:
        calls.append(timeout)
        os.killpg(os.getpid(), signal.SIGINT)
        return False
    return ready(self, timeout)
trainer.Collector.ready = signalled
"""
KILL_COLLECTOR = """
import os, signal
submit, calls = trainer.Collector.submit, []
def killing(self, *args):
    calls.append(args)
    if len(calls) == 6:  # idle
        os.kill(self.workers[0].carrier.process.pid, signal.SIGKILL)
        self.workers[0].carrier.process.join()
    submit(self, *args)
    if len(calls) == 4:  # at work
        os.kill(self.workers[0].carrier.process.pid, signal.SIGKILL)
trainer.Collector.submit = killing
"""
STOP_WORKER = """
import os, signal
from fastdreamer.training.collector import _Worker
start, submit, jobs = _Worker._start, trainer.Collector.submit, []
def stopped(self):
    start(self)
    if {job} == 0:
        os.kill(self.carrier.process.pid, signal.SIGSTOP)
def stopping(self, job, weights):
    submit(self, job, weights)
    jobs.append(job)
    if len(jobs) == {job}:
        os.kill(self.workers[0].carrier.process.pid, signal.SIGSTOP)
        (self.workers[0]._episodes.parent / "stopped").touch()
_Worker._start, trainer.Collector.submit = stopped, stopping
"""
LIMITED_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
train = trainer.Trainer.train
def told(self):
    try:
        train(self)
    except Exception as error:
        (self.run_dir / "said").write_text(type(error).__name__ + ": " + str(error))
        raise
trainer.Trainer.train = told
"""
ENDLESS_UPDATE = """
import time
def endless(self, *args, **kwargs):
    (self_dir / "updating").touch()
    while True:
        time.sleep(0.01)
self_dir = trainer.Path({run_dir!r})
trainer.Dreamer.update = endless
"""
IN_STAGES = """
train = trainer.Trainer.train
def staged(self):
    for until in (40, 120, 130, None):  # among random episodes, before an evaluation, any
        train(trainer.Trainer(self.run_dir), until)
trainer.Trainer.train = staged
"""
BACKENDS = """
from fastdreamer.ops.backend import last_backend
train = trainer.Trainer.train
def first(self):
    train(self, 120)  # behind random episodes
    assert (last_backend("observe"), last_backend("imagine")) == ("native", "native")
trainer.Trainer.train = first
"""
ENDLESS_JOB = """
import dataclasses
submit = trainer.Collector.submit
def endless(self, job, weights):
    many = dataclasses.replace(job, episodes=[], evaluations=20_000)
    submit(self, job if job.random else many, weights)
trainer.Collector.submit = endless
"""


class Launcher:
    """Starts runs quickly, one at a time.

    A run has spares, forks that wait to be its workers: as long as there are, a worker is not
    started but what would be its command is done by one. So little is new to its trainer: the
    spare is its child, in its session, and has of its files what a worker is given.
    """

    def __init__(self):
        # Unbuffered: of two lines that are there, one that was read ahead is none to select().
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip

    def prepare(self):
        """Wait until everything is imported; call it once."""
        self._answer(TIMEOUT)

    def start(self, run_dir, hook="", spares=4):
        self._process.stdin.write(json.dumps([str(run_dir), hook, spares]).encode() + b"\n")
        return self._answer(TIMEOUT)

    def wait(self):
        """Exit code of the run; negative: the signal that killed it."""
        return self._answer(TIMEOUT)

    def run(self, run_dir, hook="", spares=4):
        self.start(run_dir, hook, spares)
        return self.wait()

    def _answer(self, timeout):
        if not self.ended(timeout):
            raise TimeoutError("a run did not end")
        return int(self._process.stdout.readline())

    def ended(self, timeout):
        """Whether `wait` would return at once; gives it up to so many seconds."""
        return bool(select.select([self._process.stdout], [], [], timeout)[0])

    def close(self):
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()


def session(leader):
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended
            continue
        if int(sid) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def eventually(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def newest(run_dir):
    """Tensors (as bytes) and JSON document of the newest checkpoint, which must be sound."""
    tensors, meta = load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    as_bytes = {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in tensors.items()}
    return as_bytes, meta


def same_tensors(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def lasting(meta):
    """What a checkpoint says, without how many play: that changes nothing."""
    config = dict(meta["config"])
    config["collect"] = {k: v for k, v in config["collect"].items() if k not in ("workers", "envs")}
    return {**meta, "config": config}


def assert_equals(run_dir, reference):
    """The run's result is the reference's, bit for bit."""
    tensors, meta = newest(run_dir)
    want_tensors, want_meta = newest(reference)
    same_tensors(tensors, want_tensors)
    assert lasting(meta) == lasting(want_meta)
    assert metrics(run_dir) == metrics(reference)
    for index in meta["cursor"]["replay"]:
        mine, other = (episode_path(d / "episodes", index) for d in (run_dir, reference))
        assert mine.read_bytes() == other.read_bytes(), f"episode {index}"
    snapshots, others = (list_snapshots(d / "snapshots") for d in (run_dir, reference))
    assert snapshots.keys() == others.keys()
    for frames, path in snapshots.items():
        same, other = (load_checkpoint(p) for p in (path, others[frames]))
        assert lasting(same[1]) == lasting(other[1]) and same[0].keys() == other[0].keys()
        assert all(torch.equal(same[0][k], other[0][k]) for k in same[0]), f"snapshot {frames}"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def new_run(path, config=CONFIG):
    create_run(path, config)
    return path


@pytest.fixture(scope="module")
def launcher():
    with contextlib.closing(Launcher()) as made:
        made.prepare()
        yield made


@pytest.fixture(scope="module")
def launchers(launcher):
    with contextlib.closing(Launcher()) as second:
        second.prepare()
        yield [launcher, second]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, launcher):
    """Of what a run sees: the undisturbed run, and the seconds it took to start."""

    @functools.cache
    def reference(kind):
        if kind != "state":
            try:
                select_gl()
            except GLError as error:
                pytest.skip(str(error))
        run_dir = new_run(tmp_path_factory.mktemp("reference") / "run", seeing(kind))
        start = time.monotonic()
        launcher.start(run_dir, STARTED + ARCHIVE, spares=0)
        assert eventually((run_dir / "started").exists, TIMEOUT)
        seconds = time.monotonic() - start
        assert launcher.wait() == 0
        return run_dir, seconds

    return reference


@pytest.fixture(scope="module")
def reference(undisturbed):
    return undisturbed("state")


def seeing(kind):
    return dataclasses.replace(CONFIG, env=dataclasses.replace(CONFIG.env, obs=kind))


def copy_of(reference, path):
    return Path(shutil.copytree(reference[0], path, ignore=shutil.ignore_patterns("archive")))


# ------------------------------------------------------------------ the schedule


def test_undisturbed_run_follows_the_schedule(reference):
    run_dir = reference[0]
    _, meta = newest(run_dir)
    cursor = meta["cursor"]
    assert (cursor["update"], cursor["episodes"], cursor["env_frames"]) == (UPDATES, 10, 400)
    assert cursor["replay"] == [5, 6, 7, 8, 9]  # capacity 200
    lines = metrics(run_dir)
    entered = [(m["episode"], m["update"], m["random"]) for m in lines if m["kind"] == "episode"]
    # Episode k is collected with the weights of update 5 + 20 (k - 2), enters 20 updates later.
    policy = [(k, 5 + CYCLE * (k - PREFILL) + CYCLE, 0) for k in range(PREFILL, 10)]
    assert entered == [(0, 0, 1), (1, 0, 1), *policy]
    # At the first cycle at or past each multiple of 120 env frames, and at the end.
    evaluated = [(m["env_frames"], m["update"]) for m in lines if m["kind"] == "eval"]
    assert evaluated == [(120, 25), (240, 85), (360, 145), (400, UPDATES)]
    assert [m["update"] for m in lines if m["kind"] == "train"] == list(range(5, UPDATES + 1, 5))
    for line in lines:
        assert all(np.isfinite(v) for k, v in line.items() if k != "kind")
        health = {"prior_entropy", "post_entropy", "actor_entropy", "actor_std", "action_saturated"}
        assert line["kind"] != "train" or health <= line.keys()


def test_from_pixels_evaluations_show_what_the_model_predicts(tmp_path):
    try:
        select_gl()
    except GLError as error:
        pytest.skip(str(error))
    config = dataclasses.replace(
        TINY,
        env=dataclasses.replace(TINY.env, obs="pixels", render_quality="fast"),
        replay=dataclasses.replace(TINY.replay, length=30),  # longer than an episode
        train=dataclasses.replace(TINY.train, frames=160),
        eval=dataclasses.replace(TINY.eval, every=80, video=True),
    )
    shown = []
    with unittest.mock.patch.object(
        Logger, "log_video", lambda self, name, frames, **how: shown.append((name, frames, how))
    ):
        Trainer(new_run(tmp_path / "run", config)).train()
    names = sorted(path.name for path in (tmp_path / "run" / "videos").iterdir())
    assert names == [f"eval-{frames:09d}.mp4" for frames in (80, 160)]  # 80 and the end
    assert [(name, how["env_frames"]) for name, _, how in shown] == [
        ("eval/open_loop", 80), ("eval/open_loop", 160)
    ]  # fmt: skip
    for _, frames, _ in shown:  # 21 steps, what happened over what was predicted, thrice
        assert frames.dtype == np.uint8 and frames.shape == (21, 128, 192, 3)
        recorded = np.concatenate([
            read_episode(episode_path(tmp_path / "run" / "episodes", i))[0]["pixels"]
            for i in range(4)
        ]).reshape(4, 21, 64, 64, 3)  # fmt: skip
        for column in range(3):
            real = frames[:, :64, 64 * column : 64 * column + 64]
            assert any((real == episode).all() for episode in recorded)
        assert (frames[:, :64] != frames[:, 64:]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_stages_equals_one_in_one_go(kind, tmp_path, undisturbed, launcher):
    want, _ = undisturbed(kind)
    run_dir = new_run(tmp_path / "run", seeing(kind))
    assert launcher.run(run_dir, IN_STAGES) == 0
    assert_equals(run_dir, want)
    assert (run_dir / "log.txt").read_text().count("resumed from") == 3


def test_training_on_a_cpu_is_native(tmp_path, launcher):
    assert launcher.run(new_run(tmp_path / "run"), BACKENDS) == 0


def test_checkpoints_come_on_time_and_few_are_kept(reference):
    run_dir = reference[0]
    saved = [int(p.stem[-9:]) for p in list_checkpoints(run_dir / "archive")]
    assert saved == [*range(7, UPDATES, 7), UPDATES]
    kept = [int(p.stem[-9:]) for p in list_checkpoints(run_dir / "checkpoints")]
    assert kept == [161, UPDATES]
    # Episode 4 left with the last update, but the checkpoint of update 161 still needs it.
    names = sorted(p.name for p in (run_dir / "episodes").iterdir())
    assert names == [f"episode-{k:06d}.safetensors" for k in range(4, 10)]


def test_snapshots_hold_the_weights_that_evaluations_had(reference):
    run_dir = reference[0]
    snapshots = list_snapshots(run_dir / "snapshots")
    # At the first cycle at or past each multiple of 120 env frames, and at the end.
    updates = {120: 25, 240: 85, 360: 145, 400: UPDATES}
    assert list(snapshots) == list(updates)
    final = load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])[0]
    for frames, path in snapshots.items():
        tensors, meta = load_checkpoint(path)
        assert meta["cursor"] == {"update": updates[frames], "env_frames": frames}
        assert all(name.startswith("agent/") for name in tensors)
    for name, value in tensors.items():
        assert torch.equal(value, final[name])
    assert weights_of(snapshots[240]) != weights_of(snapshots[360])


def weights_of(path):
    return {k: v.numpy().tobytes() for k, v in load(path).state_dict().items()}


def test_snapshots_are_thinned_as_the_run_goes(tmp_path, launcher):
    train = dataclasses.replace(CONFIG.train, frames=400, snapshot_every=40, keep_snapshots=4)
    run_dir = new_run(tmp_path / "run", dataclasses.replace(CONFIG, train=train))
    assert launcher.run(run_dir) == 0
    assert list(list_snapshots(run_dir / "snapshots")) == [160, 320, 360, 400]


def test_episodes_come_from_the_weights_of_their_cycles_first_update(reference):
    run_dir = reference[0]
    saved = {}
    for path in list_checkpoints(run_dir / "archive"):
        tensors, meta = load_checkpoint(path)
        saved[meta["cursor"]["update"]] = tensors, meta
        job = meta["cursor"]["job"]
        if path.stem.endswith(f"{UPDATES:09d}"):
            assert job is None
            continue
        cycle = (meta["cursor"]["update"] - 5) // CYCLE
        assert job["update"] == 5 + CYCLE * cycle
        assert job["episodes"] == [PREFILL + cycle]
        weights = {k[12:]: v for k, v in tensors.items() if k.startswith("job_weights/")}
        assert weights.keys() == Policy(CONFIG, {"state": (24,)}, 6).state_dict().keys()

    # The job of update 105 (checkpoint 105 = 15 · 7, the first update of a cycle), played here.
    tensors, meta = saved[105]
    weights = {k[12:]: v for k, v in tensors.items() if k.startswith("job_weights/")}
    assert all(torch.equal(v, tensors[f"agent/{k}"]) for k, v in weights.items())
    agent = Policy(CONFIG, meta["obs_shapes"], meta["action_dim"])
    agent.load_state_dict(weights)
    env = make_env("walker-walk", obs="state", action_repeat=2, time_limit=1.0)
    seed = episode_seed(CONFIG.seed, "collect", 7)
    policy = agent_policy(agent, seed, CONFIG.collect.noise, sample=True)
    played, frames = collect(env, policy, seed)
    recorded, about = read_episode(episode_path(run_dir / "episodes", 7))
    assert frames == about["env_frames"] == 40
    for name, array in played.items():
        assert array.tobytes() == recorded[name].tobytes(), name


# ------------------------------------------------------------------- disturbances


def moment(rng, kind, start, left, kills):
    """What kills one attempt: so many seconds after its launch (and no hook), or a hook.

    The hook counts updates, the beginning of the schedule being the first, and then seconds; or
    calls of a function that makes something permanent. Not seconds alone: how far a run gets in
    them differs tenfold between machines, and all kills would fall into one phase. Updates are
    drawn such that the last of these `kills` comes near the end of the `left` updates.
    """
    if kind == "seconds":
        return rng.uniform(0, start), ""
    if kind == "updates":
        count = min(left, int(rng.uniform(0, 2 * left / kills)))
        return None, KILL_AFTER_UPDATES.format(count=count, seconds=rng.uniform(0, 0.04))
    name, count = rng.choice(("fsync", "replace")), rng.randint(1, 6)
    return None, KILL_AT_CALL.format(name=name, count=count)


def kill_over_and_over(launcher, run_dir, kinds, seed, start):
    """Kill a run so often, resuming it after each; return the killed.

    All that a kill leaves under a final name is sound, and checkpoints find their episodes.
    """
    rng, killed, update = random.Random(seed), [], 0
    left = rng.sample(kinds, len(kinds))
    for _ in range(3 * len(kinds)):
        if not left:
            break
        seconds, hook = moment(rng, left[0], start, UPDATES - update, left.count("updates"))
        pid = launcher.start(run_dir, hook, spares=0 if seconds else 4)
        if seconds is not None and not launcher.ended(seconds):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)
        code = launcher.wait()
        assert code in (0, -signal.SIGKILL), (run_dir / "log.txt").read_text()
        if code:  # else the run was over before
            killed.append(pid)
            left.pop(0)
        before = update
        for path in list_checkpoints(run_dir / "checkpoints"):
            cursor = load_checkpoint(path)[1]["cursor"]
            for index in cursor["replay"]:
                read_episode(episode_path(run_dir / "episodes", index))
            update = cursor["update"]
        assert update >= before, "a kill lost a checkpoint"
    return killed


@pytest.mark.parametrize(
    ("kinds", "kills"),
    [(("state", "state"), KILLS), (("pixels", "both"), FEW_KILLS)],
    ids=["state", "pixels"],
)
def test_kill_9_at_random_moments(kinds, kills, tmp_path, undisturbed, launchers):
    """Two runs beside each other: twenty kills from state, eight with convolutions."""
    references = [undisturbed(kind) for kind in kinds]
    run_dirs = [new_run(tmp_path / f"run-{i}", seeing(kind)) for i, kind in enumerate(kinds)]

    def disturbed(i):
        start = references[i][1]
        killed = kill_over_and_over(launchers[i], run_dirs[i], kills, SEED + i, start)
        return killed, launchers[i].run(run_dirs[i])

    with ThreadPoolExecutor(2) as pool:  # both cores: what takes time is the starting
        outcomes = list(pool.map(disturbed, range(2)))
    assert sum(len(killed) for killed, _ in outcomes) == 2 * len(kills)
    for run_dir, (want, _), (killed, code) in zip(run_dirs, references, outcomes, strict=True):
        assert code == 0
        assert_equals(run_dir, want)
        for room in ("checkpoints", "episodes"):  # nothing missing, nothing left behind
            assert names(run_dir / room) == names(want / room)
        assert eventually(lambda pids=killed: not any(map(session, pids)), 20), "orphans live on"


def test_dreamerv3_s_parts_through_kills_and_a_move(tmp_path, launcher, capsys):
    """A run of them from pixels and state equals one that is killed twice, and moved with an
    evaluation under way; it evaluates along the way, and acts, plans and dreams afterwards."""
    v3 = preset("walker-v3")
    parts = ("classes", "unimix", "cell", "activation", "norm", "readout")
    config = dataclasses.replace(
        CONFIG,
        env=dataclasses.replace(CONFIG.env, obs="both", render="rays", render_quality="bare"),
        model=dataclasses.replace(
            CONFIG.model, stoch=3, **{name: getattr(v3.model, name) for name in parts}
        ),
        loss=v3.loss,
        behavior=dataclasses.replace(CONFIG.behavior, entropy=v3.behavior.entropy),
        train=dataclasses.replace(CONFIG.train, frames=240),
        eval=dataclasses.replace(CONFIG.eval, video=True),
    )
    want, run_dir = (new_run(tmp_path / name, config) for name in ("reference", "run"))
    assert launcher.run(want) == 0, (want / "log.txt").read_text()
    kills = [KILL_AFTER_UPDATES.format(count=20, seconds=0.01)]
    kills.append(SIGNAL_AT_UPDATE.format(count=27, name="SIGKILL"))
    for kill in kills:
        assert launcher.run(run_dir, kill) == -signal.SIGKILL
    assert newest(run_dir)[1]["cursor"]["job"]["video"] == f"{run_dir}/videos/eval-000000120.mp4"
    run_dir = run_dir.rename(tmp_path / "moved")
    assert launcher.run(run_dir) == 0, (run_dir / "log.txt").read_text()
    assert_equals(run_dir, want)
    assert names(run_dir / "videos") == names(want / "videos")
    assert names(tmp_path) == ["moved", "reference"], "nothing where it was"
    assert [line["env_frames"] for line in metrics(run_dir) if line["kind"] == "eval"] == [120, 240]
    for controller in ("actor", "mpc"):
        asked = ["--episodes", "1", "--controller", controller]
        assert main(["eval", str(run_dir), *asked]) == 0, capsys.readouterr().err
    out = ["--context", "3", "--decisions", "3", "--out", str(tmp_path / "dream")]
    assert main(["dream", str(run_dir), *out]) == 0, capsys.readouterr().err
    assert main(["train", "--resume", str(run_dir), "--model.norm", "rms"]) == 1
    assert "model.norm, 'layer' here, 'rms' asked for" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", KINDS)
def test_signals_stop_cleanly_wherever_they_arrive(kind, tmp_path, undisturbed, launcher):
    want, _ = undisturbed(kind)
    run_dir = new_run(tmp_path / "run", seeing(kind))
    # Ctrl-C while the collector starts.
    assert launcher.run(run_dir, SIGNAL_AT_START, spares=0) == STOPPED
    assert list_checkpoints(run_dir / "checkpoints") == []

    # In the middle of an update on the prefill alone, then with a job under way.
    assert launcher.run(run_dir, SIGNAL_AT_UPDATE.format(count=3, name="SIGINT")) == STOPPED
    cursor = newest(run_dir)[1]["cursor"]
    assert (cursor["update"], cursor["left"], cursor["job"]) == (3, 2, None)
    assert launcher.run(run_dir, SIGNAL_AT_UPDATE.format(count=49, name="SIGTERM")) == STOPPED
    cursor = newest(run_dir)[1]["cursor"]
    assert (cursor["update"], cursor["left"], cursor["job"]["episodes"]) == (52, 13, [4])

    # While the trainer waits for an episode, and while it waits for the final evaluation.
    assert launcher.run(run_dir, SIGNAL_WHILE_WAITING.format(episodes=[5])) == STOPPED
    cursor = newest(run_dir)[1]["cursor"]
    assert (cursor["update"], cursor["left"], cursor["job"]["episodes"]) == (85, 0, [5])
    assert launcher.run(run_dir, SIGNAL_WHILE_WAITING.format(episodes=[])) == STOPPED
    assert newest(run_dir)[1]["cursor"]["update"] == UPDATES
    assert metrics(run_dir)[-1]["kind"] == "episode"

    assert launcher.run(run_dir) == 0
    assert_equals(run_dir, want)


def test_ctrl_c_ends_a_run_whose_collector_is_stopped(tmp_path, reference, launcher):
    run_dir = new_run(tmp_path / "run")
    pid = launcher.start(run_dir, STOP_WORKER.format(job=0), spares=0)  # while it starts
    assert eventually(lambda: len(session(pid)) > 1, TIMEOUT)
    os.killpg(pid, signal.SIGINT)
    assert launcher.ended(20) and launcher.wait() == STOPPED
    assert eventually(lambda: not session(pid), 5)

    pid = launcher.start(run_dir, STOP_WORKER.format(job=5))  # at work: everything is saved
    assert eventually((run_dir / "stopped").exists, TIMEOUT)
    os.killpg(pid, signal.SIGINT)
    assert launcher.ended(20) and launcher.wait() == STOPPED
    assert eventually(lambda: not session(pid), 5)
    assert newest(run_dir)[1]["cursor"]["update"] > 0
    assert launcher.run(run_dir) == 0
    assert_equals(run_dir, reference[0])


def test_a_second_signal_leaves_at_once(tmp_path, launcher):
    run_dir = new_run(tmp_path / "run")
    pid = launcher.start(run_dir, ENDLESS_UPDATE.format(run_dir=str(run_dir)))
    assert eventually((run_dir / "updating").exists, TIMEOUT)
    os.kill(pid, signal.SIGINT)
    assert not launcher.ended(1), "the first waits for the update"
    os.kill(pid, signal.SIGTERM)
    assert launcher.ended(20) and launcher.wait() == STOPPED
    assert eventually(lambda: not session(pid), 5)
    assert list_checkpoints(run_dir / "checkpoints") == []


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, reference, launcher):
    """A limit on a file's size: the system's own refusal, as of a disk that has no more room."""
    run_dir = new_run(tmp_path / "run")
    checkpoint = list_checkpoints(reference[0] / "checkpoints")[-1]
    sizes = {
        "checkpoint": checkpoint.stat().st_size - 1,
        "episode": episode_path(reference[0] / "episodes", 9).stat().st_size - 1,
    }
    for what, size in sizes.items():
        (run_dir / "log.txt").unlink(missing_ok=True)
        # spares were there before the limit
        assert launcher.run(run_dir, LIMITED_FILES.format(size=size), spares=0) == 1
        last = (run_dir / "said").read_text()
        assert re.search(
            rf"(DiskFull|Collector)Error: {run_dir}/.*{what}.*: cannot be written", last
        )
        assert "MiB are free there. Make room: all that was written before is whole" in last
        assert not list(run_dir.rglob(".tmp-*"))
    (run_dir / "log.txt").unlink()
    assert launcher.run(run_dir) == 0
    assert_equals(run_dir, reference[0])


def test_learning_rates_fall_at_the_end_alone(tmp_path, monkeypatch):
    seen = {}
    update = Dreamer.update

    def watched(agent, batch, optimizers, generator, **how):
        rates = {n: group["lr"] for n, o in optimizers.items() for group in o.param_groups}
        seen.setdefault(trainer.env_frames, []).append(rates)
        return update(agent, batch, optimizers, generator, **how)

    monkeypatch.setattr(Dreamer, "update", watched)
    trainer = Trainer(new_run(tmp_path / "run"))
    trainer.train()
    full = {"model": TINY.optim.model_lr, "actor": TINY.optim.actor_lr}
    full["critic"] = TINY.optim.critic_lr
    assert list(seen) == list(range(80, 400, 40))
    for frames, rates in seen.items():
        left = min(1, (400 - frames) / 200)
        for each in rates:
            assert each == pytest.approx({n: lr * (0.1 + 0.9 * left) for n, lr in full.items()})


def test_a_killed_collector_changes_nothing(tmp_path, reference, launcher):
    run_dir = new_run(tmp_path / "run")
    assert launcher.run(run_dir, KILL_COLLECTOR) == 0
    assert (run_dir / "log.txt").read_text().count("the collector died (exit code -9)") == 2
    assert_equals(run_dir, reference[0])


def test_the_collector_leaves_with_a_killed_trainer_in_the_middle_of_a_job(tmp_path, launcher):
    run_dir = new_run(tmp_path / "run")
    pid = launcher.start(run_dir, STARTED + ENDLESS_JOB, spares=0)
    assert eventually((run_dir / "started").exists, TIMEOUT)
    assert not launcher.ended(0.5) and len(session(pid)) > 1
    os.kill(pid, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    assert eventually(lambda: not session(pid), 20)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, reference, launcher):
    run_dir = copy_of(reference, tmp_path / "run")
    last = list_checkpoints(run_dir / "checkpoints")[-1]
    content = bytearray(last.read_bytes())
    content[-100] ^= 1
    last.write_bytes(content)
    assert launcher.run(run_dir) == 0
    log = (run_dir / "log.txt").read_text()
    assert f"{last}: damaged checkpoint (checksum differs); trying the one before" in log
    assert "at update 161" in log
    assert_equals(run_dir, reference[0])  # the episode that had been evicted since included


def test_no_good_checkpoint_left_is_an_error(tmp_path, reference):
    run_dir = copy_of(reference, tmp_path / "run")
    for path in list_checkpoints(run_dir / "checkpoints"):
        os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="checkpoints: every checkpoint is damaged"):
        Trainer(run_dir).train()


def test_damaged_episode_is_named_and_skipped(tmp_path, reference, launcher):
    run_dir = copy_of(reference, tmp_path / "run")
    list_checkpoints(run_dir / "checkpoints")[-1].unlink()
    damaged = episode_path(run_dir / "episodes", 6)
    os.truncate(damaged, damaged.stat().st_size - 1)
    assert launcher.run(run_dir) == 0
    assert f"skipped: {damaged}: " in (run_dir / "log.txt").read_text()
    cursor = newest(run_dir)[1]["cursor"]
    assert (cursor["update"], cursor["replay"]) == (UPDATES, [4, 5, 7, 8, 9])


def test_checkpoints_of_a_lost_future_do_not_displace_good_ones(tmp_path, reference, launcher):
    """Damaged files with high numbers, few places: what is saved next must stay."""
    run_dir = copy_of(reference, tmp_path / "run")
    for update in (164, UPDATES):
        (run_dir / f"checkpoints/checkpoint-{update:09d}.safetensors").write_bytes(b"damaged")
    (run_dir / "checkpoints/.tmp-1-checkpoint-000000170.safetensors").write_bytes(b"unfinished")
    assert launcher.run(run_dir, SIGNAL_AT_UPDATE.format(count=1, name="SIGTERM")) == STOPPED
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == [f"checkpoint-000000{update}.safetensors" for update in (161, 162)]
    assert newest(run_dir)[1]["cursor"]["update"] == 162


def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, reference, launcher, monkeypatch
):
    run_dir = new_run(tmp_path / "run")
    update, calls = Dreamer.update, []

    def poisoned(self, batch, *args, **kwargs):
        calls.append(1)
        if len(calls) == 31:
            batch["reward"][0, 0] = torch.nan
        return update(self, batch, *args, **kwargs)

    monkeypatch.setattr(Dreamer, "update", poisoned)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(NonFiniteLoss, match="reward loss became nan") as caught:
        Trainer(run_dir).train()
    assert caught.value.name == "reward loss"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert multiprocessing.active_children() == []
    tensors, meta = newest(run_dir)
    assert meta["cursor"]["update"] == 28
    assert all(np.isfinite(np.frombuffer(b, np.float32)).all()
               for dtype, _, b in tensors.values() if dtype == torch.float32)  # fmt: skip
    assert launcher.run(run_dir) == 0  # without the poison
    assert_equals(run_dir, reference[0])


# -------------------------------------------------------------------------- a pool


def pooled(workers, envs=2, **more):
    """Rounds of 4: one random episode, 4 more, then two rounds by the actor."""
    collect = dataclasses.replace(CONFIG.collect, prefill=5, round=4, envs=envs, workers=workers)
    return dataclasses.replace(CONFIG, collect=collect, **more)


KILL_ONE_OF_TWO = """
import os, signal
submit, calls = trainer.Collector.submit, []
def killing(self, job, weights):
    pid = self.workers[1].carrier.process.pid
    if not job.random:
        os.kill(pid, signal.SIGSTOP)  # so it is at it, and not done
    submit(self, job, weights)
    if not job.random:
        os.kill(pid, signal.SIGKILL)
trainer.Collector.submit = killing
"""


@pytest.fixture(scope="module")
def rounds(tmp_path_factory, launcher):
    """By backend, a run of rounds by one worker."""

    @functools.cache
    def run(backend):
        run_dir = new_run(tmp_path_factory.mktemp("rounds") / "run", pooled(1, backend=backend))
        assert launcher.run(run_dir) == 0, (run_dir / "log.txt").read_text()
        return run_dir

    return run


def test_a_run_of_rounds_follows_the_schedule(rounds):
    lines = metrics(rounds("auto"))
    entered = [(m["episode"], m["update"], m["random"]) for m in lines if m["kind"] == "episode"]
    # 32 replayed decisions a collected one, by 4 · 8 an update: 80 for 4 episodes of 20.
    assert entered == [
        *((k, 0, 1) for k in range(5)), *((k, 85, 0) for k in range(5, 9)),
        *((k, 165, 0) for k in range(9, 13)),
    ]  # fmt: skip
    assert [m["env_frames"] for m in lines if m["kind"] == "episode"] == [*range(40, 521, 40)]
    evaluated = [(m["env_frames"], m["update"]) for m in lines if m["kind"] == "eval"]
    assert evaluated == [(200, 5), (360, 85), (520, 165)]
    assert list(list_snapshots(rounds("auto") / "snapshots")) == [360, 520]
    raw = [json.loads(line) for line in (rounds("auto") / "metrics.jsonl").read_text().splitlines()]
    for name in ("wait_collector_s", "wait_learner_s"):  # once a round
        assert [m["episode"] for m in raw if name in m] == [0, 1, 5, 9]
        assert all(m[name] >= 0 for m in raw if name in m)
    seeds = {
        read_episode(episode_path(rounds("auto") / "episodes", k))[1]["seed"] for k in range(9, 13)
    }
    assert seeds == {episode_seed(CONFIG.seed, "collect", k) for k in range(9, 13)}


@pytest.mark.parametrize(
    ("backend", "workers", "envs"),
    [("auto", 2, 2), ("auto", 3, 2), ("auto", 1, 4), ("eager", 2, 2)],
)
def test_a_run_is_the_same_by_whatever_pool(backend, workers, envs, tmp_path, rounds, launcher):
    """By every number of workers; where the ops run native, of environments in each, too."""
    if backend == "auto" and envs != 2:
        pytest.importorskip("fastdreamer._native")
    run_dir = new_run(tmp_path / "run", pooled(workers, envs, backend=backend))
    assert launcher.run(run_dir) == 0, (run_dir / "log.txt").read_text()
    assert_equals(run_dir, rounds(backend))
    said = f"collecting 4 episodes a round by {workers} worker"
    assert said in (run_dir / "log.txt").read_text()


def test_a_pool_through_kills_and_resumes(tmp_path, rounds, launcher):
    run_dir = new_run(tmp_path / "run", pooled(1))
    pid = launcher.start(run_dir, KILL_AFTER_UPDATES.format(count=60, seconds=0.01))
    assert launcher.wait() == -signal.SIGKILL
    assert eventually(lambda: not session(pid), 20), "orphans live on"
    assert newest(run_dir)[1]["cursor"]["job"]["episodes"] == [5, 6, 7, 8]
    write_config(run_dir, dataclasses.replace(pooled(2), device="cpu"))  # two do what one began
    assert launcher.run(run_dir, KILL_ONE_OF_TWO) == 0
    log = (run_dir / "log.txt").read_text()
    assert log.count("the collector 2 of 2 died (exit code -9); starting it again") == 2
    assert_equals(run_dir, rounds("auto"))


def test_a_run_of_before_there_were_rounds_goes_on(tmp_path, reference, launcher):
    run_dir = new_run(tmp_path / "run")
    assert launcher.run(run_dir, SIGNAL_AT_UPDATE.format(count=49, name="SIGTERM")) == STOPPED
    younger = ("round", "envs", "workers")
    for path in list_checkpoints(run_dir / "checkpoints"):
        tensors, meta = load_checkpoint(path)
        for name in younger:
            del meta["config"]["collect"][name]
        job = meta["cursor"]["job"]
        (job["episode"],) = job.pop("episodes")
        save_checkpoint(path, tensors, meta)
    config = json.loads((run_dir / "config.json").read_text())
    for name in younger:
        del config["collect"][name]
    (run_dir / "config.json").write_text(json.dumps(config))
    before = (run_dir / "config.json").read_bytes()
    assert launcher.run(run_dir) == 0, (run_dir / "log.txt").read_text()
    assert (run_dir / "config.json").read_bytes() == before
    assert_equals(run_dir, reference[0])
    assert read_job({**job, "episode": None}).episodes == []


# ------------------------------------------------------------------------ refusals


def change(section, **values):
    return dataclasses.replace(
        CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **values)}
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (change("behavior", actor_layers=3), "behavior.actor_layers, 2 here, 3 asked for"),
        (change("behavior", critic_layers=1), "behavior.critic_layers, 2 here, 1 asked for"),
        (change("behavior", target_every=0), "behavior.target_every > 0, True here, False asked"),
        (change("model", deter=17), "model.deter, 16 here, 17 asked for"),
        (change("env", action_repeat=4), "env.action_repeat, 2 here, 4 asked for"),
        (change("env", render="rays"), "env.render, 'opengl' here, 'rays' asked for"),
        (change("env", render_quality="bare"), "env.render_quality, 'full' here, 'bare' asked for"),
        (dataclasses.replace(CONFIG, seed=4), "seed, 3 here, 4 asked for"),
        (dataclasses.replace(CONFIG, agent="planet"), "agent, 'dreamer' here, 'planet' asked for"),
        (change("train", frames=200), "has 400 env frames already.*nothing to do up to"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("age", ["new", "old"])
def test_what_a_run_cannot_go_on_with_is_refused_and_nothing_changed(
    asked, says, age, tmp_path, reference, launcher
):
    run_dir = copy_of(reference, tmp_path / "run")
    if age == "old":  # of before the architecture was written into checkpoints
        for path in list_checkpoints(run_dir / "checkpoints"):
            tensors, meta = load_checkpoint(path)
            del meta["architecture"]
            save_checkpoint(path, tensors, meta)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=says):
        Trainer(run_dir, asked).train()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert load(run_dir).config == dataclasses.replace(CONFIG, device="cpu")


@pytest.mark.parametrize(
    "asked",
    [change("optim", model_lr=-1.0), change("train", log_every=0), change("behavior", gamma=2.0)],
)
def test_settings_that_cannot_run_are_never_a_run_s_own(asked, tmp_path):
    run_dir = new_run(tmp_path / "run")
    before = (run_dir / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="must be"):
        Trainer(run_dir, asked).train()
    assert (run_dir / "config.json").read_bytes() == before


def test_a_run_from_before_renderers_could_be_chosen_is_of_opengl(tmp_path, reference, launcher):
    run_dir = copy_of(reference, tmp_path / "run")
    for path in list_checkpoints(run_dir / "checkpoints"):
        tensors, meta = load_checkpoint(path)
        del meta["architecture"]["env.render"], meta["config"]["env"]["render"]
        save_checkpoint(path, tensors, meta)
    with pytest.raises(RunError, match="env.render, 'opengl' here, 'rays' asked for"):
        Trainer(run_dir, change("env", render="rays")).train()
    assert launcher.run(run_dir) == 0, (run_dir / "log.txt").read_text()


def test_a_run_goes_on_after_refusals_and_takes_what_may_change(tmp_path, reference, launcher):
    run_dir = copy_of(reference, tmp_path / "run")
    with pytest.raises(RunError):
        Trainer(run_dir, change("behavior", actor_layers=3)).train()
    assert launcher.run(run_dir) == 0
    assert_equals(run_dir, reference[0])
    # Settings that no longer fit, as an older version left them: named, and mended by options.
    write_config(run_dir, change("behavior", actor_layers=3))
    with pytest.raises(RunError, match="behavior.actor_layers, 2 here, 3 asked for"):
        Trainer(run_dir).train()
    write_config(run_dir, dataclasses.replace(CONFIG, seed=4))
    with pytest.raises(RunError, match="seed, 3 here, 4 asked for"):
        Trainer(run_dir).train()
    write_config(run_dir, CONFIG)
    more = dataclasses.replace(
        change("train", frames=440),
        collect=dataclasses.replace(CONFIG.collect, noise=0.1, controller="mpc"),
        behavior=dataclasses.replace(CONFIG.behavior, target_every=7),
    )
    hook = f"from fastdreamer.config import from_dict\nasked = from_dict({to_dict(more)!r})\n"
    hook += "trainer.Trainer.__init__.__defaults__ = (asked,)"
    assert launcher.run(run_dir, hook) == 0, (run_dir / "log.txt").read_text()
    assert read_config(run_dir) == dataclasses.replace(more, device="cpu")
    assert newest(run_dir)[1]["cursor"]["env_frames"] == 440


def test_a_job_under_way_is_played_with_all_that_its_new_controller_needs(
    tmp_path, reference, launcher
):
    run_dir = new_run(tmp_path / "run")
    assert launcher.run(run_dir, SIGNAL_AT_UPDATE.format(count=49, name="SIGTERM")) == STOPPED
    assert newest(run_dir)[1]["cursor"]["job"]["episodes"] == [4]
    write_config(run_dir, change("collect", controller="mpc"))
    assert launcher.run(run_dir) == 0, (run_dir / "log.txt").read_text()
    assert newest(run_dir)[1]["cursor"]["env_frames"] == 400


def test_settings_are_written_under_the_lock_alone(tmp_path):
    run_dir = new_run(tmp_path / "run")
    before = (run_dir / "config.json").read_bytes()
    with lock_run(run_dir), pytest.raises(RunError, match="is being trained by another process"):
        Trainer(run_dir, change("optim", model_lr=1e-3)).train()
    assert (run_dir / "config.json").read_bytes() == before


@pytest.mark.parametrize("metrics", [True, False], ids=["", "metrics gone too"])
def test_lost_checkpoints_are_not_a_new_run(metrics, tmp_path, reference):
    run_dir = copy_of(reference, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    if not metrics:
        (run_dir / "metrics.jsonl").unlink()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    says = "has made 165 updates, but .*checkpoints holds no checkpoint.*start afresh with"
    with pytest.raises(RunError, match=says):
        Trainer(run_dir).train()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_agent_than_its_settings_is_refused(tmp_path, reference):
    path = list_checkpoints(reference[0] / "checkpoints")[-1]
    tensors, meta = load_checkpoint(path)
    assert meta["architecture"]["behavior.actor_layers"] == 2
    meta["config"]["behavior"]["actor_layers"] = 3
    other = tmp_path / path.name
    save_checkpoint(other, tensors, meta)
    with pytest.raises(CheckpointError, match=f"{other.name}: .*actor_layers, 2 here, 3 asked for"):
        load(other)


def test_a_second_trainer_of_a_run_is_refused(tmp_path):
    run_dir = new_run(tmp_path / "run")
    with (
        lock_run(run_dir),
        pytest.raises(RunError, match="is being trained by another process"),
    ):
        Trainer(run_dir).train()


def test_a_run_that_cannot_be_locked_is_not_trained(tmp_path, monkeypatch):
    run_dir = new_run(tmp_path / "run")

    def none(file, operation):  # as some shares of a network answer
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(RunError, match="run cannot be locked: No locks available"):
        Trainer(run_dir).train()
    (run_dir / "lock").unlink()
    (run_dir / "lock").mkdir()
    with pytest.raises(RunError, match="run cannot be locked: Is a directory"):
        Trainer(run_dir).train()


@pytest.mark.parametrize("changed", [{"obs_shapes": {"state": [25]}}, {"action_dim": 7}])
def test_a_task_that_is_another_by_now_is_said(changed, tmp_path, reference, monkeypatch):
    run_dir = copy_of(reference, tmp_path / "run")
    path = list_checkpoints(run_dir / "checkpoints")[-1]
    tensors, meta = load_checkpoint(path)
    save_checkpoint(path, tensors, meta | changed)
    place = unittest.mock.Mock(obs_shapes={"state": (24,)}, action_dim=6)
    monkeypatch.setattr(trainer_module, "Collector", lambda *about: place)
    says = r"learned walker-walk of state \[2[45]\], action \[[67]\]; the task has now state \[24\]"
    with pytest.raises(RunError, match=says):
        Trainer(run_dir).train()
    place.close.assert_called_once()


def test_create_run_refuses_a_place_that_a_file_has(tmp_path):
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=f"cannot be a run directory: {tmp_path}/file is a file"):
            create_run(run_dir, preset("tiny"))


def test_create_run_refuses_a_directory_that_holds_one(tmp_path):
    run_dir = new_run(tmp_path / "deep" / "run")
    resolved = dataclasses.replace(CONFIG, device="cpu")
    assert read_config(run_dir) == resolved
    with pytest.raises(RunError, match="holds a run already; resume it with .*--resume"):
        create_run(run_dir, TINY)
    assert read_config(run_dir) == resolved


def test_a_trainer_with_settings_makes_the_run_that_is_not_there(tmp_path):
    env = dataclasses.replace(CONFIG.env, task="walker")
    made = Trainer(str(tmp_path / "run"), dataclasses.replace(CONFIG, env=env))
    assert made.config == read_config(tmp_path / "run")
    assert (made.config.env.task, made.config.model.discount) == ("walker-walk", False)
    other = dataclasses.replace(CONFIG, threads=2)
    assert Trainer(tmp_path / "run", other).config == made.config  # its own until it trains
    with pytest.raises(ConfigError, match="model.deter must be > 0"):
        Trainer(tmp_path / "new", change("model", deter=0))
    assert not (tmp_path / "new").exists()


def test_a_script_goes_on_with_what_its_settings_came_to(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    env = dataclasses.replace(TINY.env, task="walker")
    script = dataclasses.replace(TINY, env=env, precision="auto", threads=0)
    monkeypatch.setattr(_native, "faster", lambda: "bf16")
    Trainer(run_dir, script).train(until=120)
    came_to = read_config(run_dir)
    assert (came_to.env.task, came_to.model.discount) == ("walker-walk", False)
    assert came_to.precision == "bf16" and came_to.threads >= 1
    monkeypatch.setattr(_native, "faster", lambda: "fp32")  # another measurement
    Trainer(run_dir, script).train(until=160)
    assert read_config(run_dir) == came_to
    Trainer(run_dir, dataclasses.replace(script, precision="fp32")).train(until=200)
    assert read_config(run_dir) == dataclasses.replace(came_to, precision="fp32")
    assert newest(run_dir)[1]["cursor"]["env_frames"] == 200


UNNAMED = """
import os
for name in ("FASTDREAMER_ARITHMETIC", "FASTDREAMER_ISA"):
    os.environ.pop(name, None)
"""
SCALAR = {"fp32": "scalar", "bf16": "scalar", "for_bf16": "fp32"}


@pytest.mark.parametrize("cpu", ["the same", "another"])
def test_a_run_goes_on_with_its_kernels_on_the_cpu_that_it_had(cpu, tmp_path, launcher):
    run_dir = new_run(tmp_path / "run", dataclasses.replace(CONFIG, backend="native"))
    measured = UNNAMED + f"from fastdreamer import _native\n_native.settle(**{SCALAR})\n"
    hook = measured + SIGNAL_AT_UPDATE.format(count=49, name="SIGTERM")
    assert launcher.run(run_dir, hook) == STOPPED, (run_dir / "log.txt").read_text()
    path = list_checkpoints(run_dir / "checkpoints")[-1]
    tensors, meta = load_checkpoint(path)
    assert meta["kernels"] == SCALAR
    if cpu == "another":
        save_checkpoint(path, tensors, {**meta, "cpu": "another"})
    assert launcher.run(run_dir, UNNAMED) == 0, (run_dir / "log.txt").read_text()
    went_on, text = newest(run_dir)[1]["kernels"], (run_dir / "log.txt").read_text()
    if cpu == "the same":
        assert went_on == SCALAR and "other kernels" not in text
    elif kernel_choice()["fp32"] != "scalar":
        assert went_on != SCALAR and "other kernels" in text


def test_what_a_killed_process_left_is_removed(tmp_path, reference, launcher):
    run_dir = copy_of(reference, tmp_path / "run")
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [
        run_dir / place / f".tmp-{gone.pid}-left.bin"
        for place in (".", "checkpoints", "snapshots", "episodes")
    ]
    for path in left:
        path.touch()
    assert launcher.run(run_dir) == 0, (run_dir / "log.txt").read_text()
    assert not any(path.exists() for path in left)


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"is not a run directory \(no config.json\)"):
        Trainer(tmp_path)
    for text in ("{", "[]", '{"sead": 1}', '{"seed": -1}', '{"env": {"obs": "sound"}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RunError, match="config.json: "):
            Trainer(tmp_path)
    new_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="run holds no checkpoint yet"):
        load(tmp_path / "run")


def test_load_gives_the_trained_agent(reference):
    run_dir = reference[0]
    path = list_checkpoints(run_dir / "checkpoints")[-1]
    tensors, meta = load_checkpoint(path)
    obs = np.linspace(-1, 1, *meta["obs_shapes"]["state"], dtype=np.float32)
    actions = []
    for source in (run_dir, str(path)):
        agent = load(source)
        state = agent.state_dict()
        assert all(torch.equal(v, tensors[f"agent/{k}"]) for k, v in state.items())
        assert agent.config == dataclasses.replace(CONFIG, device="cpu")
        actions.append(agent.act(obs)[0])
    assert actions[0].shape == (6,) and np.array_equal(*actions)
    untrained = Dreamer(CONFIG, meta["obs_shapes"], 6).act(obs)[0]
    assert not np.array_equal(actions[0], untrained)


def test_random_episodes_depend_on_seed_and_index_alone(reference):
    """Nothing of a run's own enters the prefill: seeds, not weights."""
    policy = random_policy(6, episode_seed(CONFIG.seed, "collect", 0))
    again = random_policy(6, episode_seed(CONFIG.seed, "collect", 0))
    other = random_policy(6, episode_seed(CONFIG.seed, "collect", 1))
    assert np.array_equal(policy({}), again({})) and not np.array_equal(policy({}), other({}))


def test_the_display_says_what_it_waits_for_and_counts_it(tmp_path, monkeypatch):
    """A collector that is slower than the learner: who waits is said, and time left holds it."""
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, frames=240))
    create_run(tmp_path / "run", config)
    shown = []

    at_hand = Collector.ready

    def ready(collector, timeout):
        if timeout == 0:
            return False
        time.sleep(0.4)
        return at_hand(collector, timeout)

    monkeypatch.setattr(Collector, "ready", ready)
    update = Progress.update
    monkeypatch.setattr(
        Progress, "update", lambda self, **fields: shown.append(fields) or update(self, **fields)
    )
    Trainer(tmp_path / "run").train()
    phases = [fields["phase"] for fields in shown if "phase" in fields]
    assert "waiting for episode 3" in phases
    assert "waiting for episode 4 and its evaluation" in phases
    assert phases.index("learning") < phases.index("waiting for episode 3")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    waits = [line["wait_collector_s"] for line in lines if line["kind"] == "episode"]
    assert all(wait >= 0.4 for wait in waits)
    shares = [fields["waits"] for fields in shown if fields.get("waits")]
    assert shares and all(0 < learner <= 1 and 0 <= other < 1 for learner, other in shares)
    # after 120 of 240 frames three episodes are still to come
    left = [f["seconds_left"] for f in shown if f.get("seconds_left")]
    assert max(left[1:]) >= 3 * 0.4


def test_the_first_update_is_no_measure_of_the_time_left(tmp_path, monkeypatch):
    """It prepares what others use; four others tell the time, before the first line of metrics."""
    train = dataclasses.replace(TINY.train, frames=120, log_every=50)
    trainer = Trainer(tmp_path / "run", dataclasses.replace(TINY, train=train))
    told, calls, update, learn = {}, [], Progress.update, Dreamer.update
    clock = [1000.0]
    timer = types.SimpleNamespace(**vars(time) | {"monotonic": lambda: clock[0]})
    monkeypatch.setattr(trainer_module, "time", timer)

    def show(progress, **fields):
        told.setdefault(len(calls), {}).update(fields)
        return update(progress, **fields)

    def slow(*args, **kwargs):
        calls.append(1)
        clock[0] += 0.5 if len(calls) > 1 else 100.0
        return learn(*args, **kwargs)

    monkeypatch.setattr(Progress, "update", show)
    monkeypatch.setattr(Dreamer, "update", slow)
    trainer.train()
    assert len(calls) > 5 and told[1]["losses"] and told[5]["losses"]
    timed = [count for count, fields in told.items() if "updates_per_s" in fields]
    assert timed == [5]
    assert told[5]["updates_per_s"] == 2.0 and 0 < told[5]["seconds_left"] < 100


def test_a_collector_that_waits_for_the_learner_is_counted(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, frames=120))
    trainer, update, calls = Trainer(tmp_path / "run", config), Dreamer.update, []

    def slow(*args, **kwargs):
        if not calls:
            while not trainer.collector.ready(1.0):
                pass
            time.sleep(0.5)
        calls.append(1)
        return update(*args, **kwargs)

    monkeypatch.setattr(Dreamer, "update", slow)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (line,) = (m for m in lines if m["kind"] == "episode" and not m["random"])
    assert line["wait_collector_s"] < 0.5 <= line["wait_learner_s"] < line["seconds"]


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_a_clock_that_was_set_makes_nobody_wait_longer_than_the_cycle(ahead, tmp_path):
    trainer = Trainer(new_run(tmp_path / "run"))
    trainer._submitted = time.monotonic() - 5.0
    result = Result(finished=time.time() + ahead)
    trainer.collector = unittest.mock.Mock(ready=lambda timeout: True, wait=lambda: result)
    _, waits = trainer._wait(Job(0, [0], False, 0, None))
    assert 0 <= waits.learner <= waits.cycle < 60
