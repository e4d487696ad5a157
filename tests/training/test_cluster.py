"""A pool of Ray actors on two nodes: the bytes of the local pool, whatever is lost."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from logged import learned

from fastdreamer import files
from fastdreamer.acting.parts import acting_weights
from fastdreamer.acting.policy import Policy
from fastdreamer.cli import main
from fastdreamer.config import preset
from fastdreamer.training import cluster as cluster_module
from fastdreamer.training import collector as collector_module
from fastdreamer.training.checkpoint import list_checkpoints, load_meta
from fastdreamer.training.cluster import Actor, Cluster, ClusterError, connected
from fastdreamer.training.collector import Collector, Job
from fastdreamer.training.episodes import episode_path
from fastdreamer.training.trainer import Trainer, read_config, write_config

TRAIN = ["train", "walker", "--preset", "tiny", "--collect.round", "2", "--collect.prefill", "2",
         "--train.frames", "320", "--train.checkpoint-every", "10", "--threads", "1"]  # fmt: skip
CONFIG = dataclasses.replace(
    preset("tiny"), collect=dataclasses.replace(preset("tiny").collect, round=3, workers=2)
)
JOB = Job(0, [0, 1, 2], False, 1, None)
TIMEOUT = 120
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray")


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes with a core each, which this process is connected to."""
    ray = cluster_module._ray()
    from ray.cluster_utils import Cluster as Nodes

    made = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        with connected(made.address):
            assert ray.is_initialized()
            yield made
    finally:
        made.shutdown()


@pytest.fixture(scope="module")
def agent():
    return Policy(CONFIG, {"state": (24,)}, 6)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run by the local pool."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    assert main([*TRAIN, "--run", str(run_dir)]) == 0
    return run_dir


def made(run_dir):
    """All that a run has learned, and the bytes of its episodes."""
    episodes = {path.name: path.read_bytes() for path in (run_dir / "episodes").iterdir()}
    assert episodes
    return learned(run_dir), episodes


def wait(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pids(collector):
    return [int(worker.carrier.where.split()[1]) for worker in collector.workers]


def collected(collector, directory, agent):
    collector.submit(JOB, acting_weights(agent))
    return took(collector, directory)


def took(collector, directory):
    result = collector.wait()
    files = [episode_path(directory, index).read_bytes() for index in JOB.episodes]
    return result.played, result.eval_returns, files


@with_ray
def test_actors_give_the_bytes_of_processes_also_where_one_dies_or_hangs(
    nodes, agent, tmp_path, monkeypatch, caplog
):
    alone = dataclasses.replace(CONFIG, collect=dataclasses.replace(CONFIG.collect, workers=1))
    with contextlib.closing(Collector(alone, tmp_path / "local")) as local:
        want = collected(local, tmp_path / "local", agent)
    place, directory = Cluster(cluster_module._ray()), tmp_path / "ray"
    with contextlib.closing(Collector(CONFIG, directory, place=place)) as pool:
        assert pool.obs_shapes == local.obs_shapes and pool.action_dim == local.action_dim
        assert len({worker.carrier._node for worker in pool.workers}) == 2, "spread"
        assert collected(pool, directory, agent) == want
        ours = {*pids(pool)}
        for path in directory.iterdir():
            path.unlink()
        pool.submit(dataclasses.replace(JOB, evaluations=10**6), acting_weights(agent))
        killed = pids(pool)[0]
        os.kill(killed, signal.SIGKILL)
        pool.workers[0].share.evaluations = 1  # done again, without the delay
        assert took(pool, directory) == want
        assert f"the collector 1 of 2 died (process {killed} on " in caplog.text

        stopped = pids(pool)[1]
        os.kill(stopped, signal.SIGSTOP)
        pool.submit(JOB, acting_weights(agent))
        monkeypatch.setattr(collector_module, "QUIET", 0.5)
        monkeypatch.setattr(collector_module, "SILENT", 1.0)
        while "the collector 2 of 2 gave no sign (in 1 s); starting it again" not in caplog.text:
            assert pool.ready(0.2) is False
        monkeypatch.setattr(collector_module, "SILENT", 1e9)
        assert took(pool, directory) == want
        ours |= {*pids(pool)}
    wait(lambda: not os.path.exists(f"/proc/{stopped}"))
    place = Path(tempfile.gettempdir())  # of others on this machine, too
    assert not [path for pid in ours for path in place.glob(f"fastdreamer-{pid}-*/episode-*")]


def test_what_an_actor_was_killed_over_goes_with_the_next(tmp_path, monkeypatch):
    """Between writing an episode and saying it: nobody else knows of the file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cluster_module, "converse", lambda *given: None)
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"fastdreamer-{pid}-{32 * '0'}" for pid in (ended.pid, os.getpid())]
    left, living, others = (tmp_path / name for name in (*names, "fastdreamer-of-mine"))
    for folder in (left, living, others):
        folder.mkdir()
        (folder / "episode-000000.safetensors").touch()
    worker = cluster_module._Worker({}, "{}", None, 1)
    assert sorted(tmp_path.iterdir()) == sorted([living, others])
    worker._folder.mkdir()  # as its first file makes it: of whoever is killed the next one knows
    monkeypatch.setattr(files, "_TMP_MAX_AGE", -1)
    cluster_module._Worker({}, "{}", None, 1)
    assert list(tmp_path.iterdir()) == [others]


@with_ray
def test_a_worker_waits_for_a_core_without_being_replaced(nodes, tmp_path, monkeypatch, caplog):
    class Asked(Exception):
        pass

    def leave():
        if "the collector 3 of 3 waits for its start: no core" in caplog.text:
            raise Asked

    monkeypatch.setattr(collector_module, "QUIET", 0.5)
    config = dataclasses.replace(CONFIG, collect=dataclasses.replace(CONFIG.collect, workers=3))
    with pytest.raises(Asked):
        Collector(config, tmp_path, leave, place=Cluster(cluster_module._ray()))


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(cluster_module, "__version__", "0.0.1")
    with pytest.raises(ClusterError, match="there has fastdreamer 0.0.2, and here is 0.0.1"):
        Actor._greet(None, pid=1, host="there", node="n", version="0.0.2")


@with_ray
def test_a_run_loses_a_node_in_mid_episode_and_is_the_same(
    nodes, reference, tmp_path, monkeypatch, caplog
):
    """By two workers; a third of its jobs sees one of two nodes end."""
    submit, jobs = Collector.submit, []

    def losing(self, job, weights):
        jobs.append(job)
        if len(jobs) != 3:
            return submit(self, job, weights)
        head = nodes.head_node.node_id
        (worker,) = [one for one in self.workers if one.carrier._node != head]
        pid = int(worker.carrier.where.split()[1])
        os.kill(pid, signal.SIGSTOP)  # so it is at it, and not done
        submit(self, job, weights)
        assert worker.share.batches
        (node,) = [one for one in nodes.list_all_nodes() if one.node_id == worker.carrier._node]
        nodes.remove_node(node, allow_graceful=False)
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(Collector, "submit", losing)
    run_dir = tmp_path / "run"
    told = ["--collect.workers", "2", "--ray", nodes.address, "--run", str(run_dir)]
    try:
        assert main([*TRAIN, *told]) == 0
    finally:
        nodes.add_node(num_cpus=1)
        # that the lost one is lost the cluster finds out in its own time
        wait(lambda: Cluster(cluster_module._ray()).describe() == "Ray: 2 nodes, 2 cores")
    assert re.search(r"of 2 died \(process \d+ on .*\); starting it again", caplog.text)
    assert made(run_dir) == made(reference)


@with_ray
def test_a_killed_run_goes_on_with_another_number_of_workers(nodes, reference, tmp_path):
    run_dir = tmp_path / "run"
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdreamer", *TRAIN, "--ray", nodes.address, "--run", run_dir],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    saved = lambda: list_checkpoints(run_dir / "checkpoints")  # noqa: E731
    wait(lambda: saved() or process.poll() is not None)
    process.kill()
    said, _ = process.communicate()
    assert "collecting on Ray: 2 nodes, 2 cores" in said and "raylet" not in said, said
    assert read_config(run_dir).collect.workers == 0
    Trainer(run_dir, ray=nodes.address).train()
    assert made(run_dir) == made(reference)


def test_without_ray_the_option_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    run_dir = tmp_path / "run"
    assert main([*TRAIN, "--ray", "local", "--run", str(run_dir)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said == "fastdreamer: ray is not installed: pip install 'fastdreamer[ray]'"
    assert not run_dir.exists()


@with_ray
@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://127.0.0.1:10001", "takes auto, local or the HOST:PORT"),
        ("here", "takes auto, local or the HOST:PORT"),
        ("127.0.0.1:1", r"nothing answers there \(.*refused\)"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(address, says, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main([*TRAIN, "--ray", address, "--run", str(run_dir)]) == 1
    said = capsys.readouterr().err
    assert re.search(says, said) and said.count("\n") == 1 and not run_dir.exists()


@with_ray
def test_seeds_as_tasks_are_stopped_and_go_on_as_if_they_had_not_been(nodes, tmp_path, capsys):
    folder = tmp_path / "seeds"
    seeds = [folder / "seed0", folder / "seed1"]
    before = signal.getsignal(signal.SIGTERM)

    def stop():
        wait(lambda: all(list_checkpoints(run / "checkpoints") for run in seeds))
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    longer = ["--train.frames", "100000", "--ray", nodes.address]
    assert main([*TRAIN, *longer, "--seeds", "0,1", "--run", str(folder)]) == 130
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"go on with: fastdreamer train --resume {folder} --ray" in capsys.readouterr().out
    reached = [load_meta(list_checkpoints(run / "checkpoints")[-1])["cursor"] for run in seeds]
    end = str(max(cursor["env_frames"] for cursor in reached) + 80)
    for run in seeds:  # where they would have ended
        config = read_config(run)
        write_config(
            run,
            dataclasses.replace(config, train=dataclasses.replace(config.train, frames=int(end))),
        )
    assert main(["train", "--resume", str(folder), "--ray", nodes.address]) == 0
    said = capsys.readouterr().out
    assert "seed 1 has ended" in said and "2 seeds: return" in said
    assert (folder / "curves.png").stat().st_size > 1000
    alone = tmp_path / "alone"
    assert main([*TRAIN, "--train.frames", end, "--run", str(alone)]) == 0
    assert made(seeds[0]) == made(alone) != made(seeds[1])


@with_ray
def test_a_comparison_as_tasks_goes_on_and_ends_in_one_picture(nodes, tmp_path, capsys):
    pytest.importorskip("stable_baselines3")
    argv = ["compare", "walker", "--methods", "ppo", "--preset", "tiny", "--frames", "40"]
    argv += ["--eval-every", "40", "--eval-episodes", "1", "--out", str(tmp_path)]
    argv += ["--ray", nodes.address, "--threads", "1"]
    assert main([*argv, "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    assert "ppo, seed 0: return" in said and (tmp_path / "compare.png").exists()
    evaluated = (tmp_path / "ppo-seed0" / "ppo.json").read_bytes()
    assert main([*argv, "--seeds", "2"]) == 0
    assert "ppo, seed 1: return" in capsys.readouterr().out
    assert (tmp_path / "ppo-seed0" / "ppo.json").read_bytes() == evaluated
