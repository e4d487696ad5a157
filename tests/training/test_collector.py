"""The collector: a job is a pure function of its inputs, and a dead worker is noticed."""

import dataclasses
import json
import multiprocessing
import multiprocessing.spawn
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_bytes

from fastdreamer.acting.parts import acting_weights
from fastdreamer.acting.play import agent_policy, collect, episode_seed, evaluate, on_cpu
from fastdreamer.acting.policy import Policy
from fastdreamer.config import preset, to_dict
from fastdreamer.envs import make_env
from fastdreamer.envs.gl import GLError, select_gl
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.backend import last_backend
from fastdreamer.training import collector as collector_module
from fastdreamer.training import processes
from fastdreamer.training import worker as worker_module
from fastdreamer.training.collector import (
    Collector,
    CollectorError,
    Job,
    pool_size,
    share_out,
)
from fastdreamer.training.episodes import episode_path, read_episode
from fastdreamer.training.worker import Lost, Result, Share, batches

CONFIG = preset("tiny")
DECISIONS, FRAMES = 20, 40


def job(episode, *, random=False, evaluations=0, video=None):
    return Job(0, [] if episode is None else [episode], random, evaluations, video)


@pytest.fixture(autouse=True, scope="module")
def workers_forked():
    """Here they are started as by a user."""


@pytest.fixture(scope="module")
def agent():
    return Dreamer(CONFIG, {"state": (24,)}, 6)


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    directory = tmp_path_factory.mktemp("episodes")
    made = Collector(CONFIG, directory)
    made.directory = directory
    yield made
    made.close()


@pytest.fixture
def env():
    return make_env("walker-walk", obs="state", action_repeat=2, time_limit=1.0)


def test_the_worker_says_what_the_environment_is(collector):
    assert collector.obs_shapes == {"state": (24,)}
    assert collector.action_dim == 6


def test_an_episode_depends_on_seed_index_and_weights_alone(collector, agent, env):
    """The same bytes from a fresh worker, after other episodes, and played in this process."""
    weights = acting_weights(agent)
    other = {k: v + 0.1 for k, v in weights.items()}
    contents = []
    for index, loaded, random in (
        (3, weights, False),
        (0, {}, True),
        (1, other, False),
        (3, weights, False),
        (3, other, False),
        (4, weights, False),
    ):
        collector.submit(job(index, random=random), loaded)
        result = collector.wait()
        path = episode_path(collector.directory, index)
        contents.append(path.read_bytes())
        arrays, meta = read_episode(path)
        assert result.eval_returns == []
        (played,) = result.played
        assert played.episode == index
        assert played.episode_return == meta["return"] == arrays["reward"].sum(dtype=np.float64)
        assert meta == {
            "env_frames": FRAMES,
            "return": played.episode_return,
            "task": "walker-walk",
            "action_repeat": 2,
            "time_limit": 1.0,
            "image_size": 64,
            "render": "opengl",
            "render_quality": "full",
            "seed": episode_seed(CONFIG.seed, "collect", index),
            "random": random,
        }
        assert len(arrays["reward"]) == DECISIONS + 1
    assert contents[0] == contents[3]
    assert len(set(contents)) == 5

    seed = episode_seed(CONFIG.seed, "collect", 4)
    policy = agent_policy(agent, seed, CONFIG.collect.noise, sample=True)
    played, frames = collect(env, policy, seed)
    assert frames == FRAMES and played.keys() == arrays.keys()
    assert all(np.array_equal(played[k], arrays[k]) for k in arrays)


def test_the_worker_samples_where_it_is_to(tmp_path, agent, env):
    config = dataclasses.replace(CONFIG, collect=dataclasses.replace(CONFIG.collect, sample=False))
    collector = Collector(config, tmp_path)
    try:
        collector.submit(job(4), acting_weights(agent))
        collector.wait()
    finally:
        collector.close()
    recorded, _ = read_episode(episode_path(tmp_path, 4))
    seed = episode_seed(config.seed, "collect", 4)
    for sample in (False, True):
        played, _ = collect(env, agent_policy(agent, seed, 0.3, sample=sample), seed)
        assert np.array_equal(played["action"], recorded["action"]) != sample


def test_evaluations_are_deterministic_and_leave_episodes_alone(collector, agent, env):
    weights = acting_weights(agent)
    collector.submit(job(8, evaluations=2), weights)
    both = collector.wait()
    content = episode_path(collector.directory, 8).read_bytes()
    collector.submit(job(None, evaluations=3), weights)
    alone = collector.wait()
    assert alone.played == []
    assert alone.eval_returns[:2] == both.eval_returns and len(set(alone.eval_returns)) == 3
    collector.submit(job(8), weights)
    collector.wait()
    assert episode_path(collector.directory, 8).read_bytes() == content
    here = evaluate(agent, env, episode_seed(CONFIG.seed, "evaluate", 1))
    assert here == alone.eval_returns[1]


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_worker_plays_with_the_runs_backend(backend, agent, tmp_path, monkeypatch):
    """Its own loop in this process, where what ran can be asked."""
    if backend == "native":
        pytest.importorskip("fastdreamer._native")
    monkeypatch.setenv("FASTDREAMER_BACKEND", {"eager": "native", "native": "eager"}[backend])
    monkeypatch.setattr(worker_module, "_exit_with_trainer", lambda: None)
    config = dataclasses.replace(CONFIG, backend=backend)
    trainer, worker = multiprocessing.Pipe()
    sent = [json.dumps(dataclasses.asdict(Share(False, [[0]], evaluations=1))).encode()]
    sent.append(save_bytes(acting_weights(agent)))
    answers = []

    def converse():
        answers.append(json.loads(trainer.recv_bytes()))
        for message in sent:
            trainer.send_bytes(message)
        while (answer := json.loads(trainer.recv_bytes())) == {"alive": True}:
            pass  # on a busy machine
        answers.append(answer)
        trainer.close()

    thread = threading.Thread(target=converse)
    thread.start()
    worker_module.work(worker, json.dumps(to_dict(config)), str(tmp_path), None, 1)
    thread.join()
    assert answers[0]["action_dim"] == 6 and len(answers[1]["eval_returns"]) == 1
    assert last_backend("decide") == backend
    assert episode_path(tmp_path, 0).exists()


def test_a_real_worker_takes_the_runs_backend_before_the_environments(agent, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDREAMER_BACKEND", "triton")  # which refuses CPU tensors
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answers = {}
    for backend in ("eager", "auto"):
        collector = Collector(dataclasses.replace(CONFIG, backend=backend), tmp_path)
        try:
            collector.submit(job(0), acting_weights(agent))
            answers[backend] = collector.wait()
        except CollectorError as error:
            answers[backend] = str(error)
        finally:
            collector.close()
    assert isinstance(answers["eager"].played[0].episode_return, float)
    assert "decide: backend 'triton' cannot run" in answers["auto"], "auto leaves it the choice"


def test_what_a_gpu_is_told_is_no_advice_to_the_worker():
    told = dataclasses.replace(CONFIG, device="cuda", backend="triton", precision="bf16")
    cpu = dataclasses.replace(CONFIG, device="cpu")
    assert on_cpu(told) == dataclasses.replace(cpu, backend="auto", precision="auto")
    assert on_cpu(dataclasses.replace(told, backend="eager")).backend == "eager"
    here = dataclasses.replace(cpu, backend="native", precision="fp32")
    assert on_cpu(here) == on_cpu(dataclasses.replace(here, device="auto")) == here


def test_one_job_at_a_time(collector, agent):
    with pytest.raises(CollectorError, match="no job is under way"):
        collector.wait()
    collector.submit(job(50, random=True), {})
    with pytest.raises(CollectorError, match="a job is already under way"):
        collector.submit(job(51, random=True), {})
    collector.wait()
    collector.submit(job(52, random=True), {})
    collector.wait()
    written = [episode_path(collector.directory, k).exists() for k in (50, 51, 52)]
    assert written == [True, False, True]


def test_ready_waits_no_longer_than_told(collector, agent):
    pid = collector.workers[0].carrier.process.pid
    os.kill(pid, signal.SIGSTOP)  # however long this process takes to ask
    try:
        collector.submit(job(None, evaluations=20), acting_weights(agent))
        assert collector.ready(0) is False
    finally:
        os.kill(pid, signal.SIGCONT)
    assert collector.ready(60) is True
    assert len(collector.wait().eval_returns) == 20


def test_a_killed_worker_is_replaced_and_the_job_done(collector, agent, caplog):
    weights = acting_weights(agent)
    collector.submit(job(5), weights)
    collector.wait()
    path = episode_path(collector.directory, 5)
    content = path.read_bytes()
    path.unlink()
    collector.submit(job(5, evaluations=10**6), weights)
    (worker,) = collector.workers
    os.kill(worker.carrier.process.pid, signal.SIGKILL)
    worker.share = Share(False, [[5]])  # done again, without the delay
    collector.wait()
    assert path.read_bytes() == content
    assert "the collector died (exit code -9); starting it again" in caplog.text


def test_a_worker_that_cannot_start_is_an_error(tmp_path, collector):
    # `collector` for its resource tracker: a second one would be started with this executable.
    executable = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable("/bin/false")
    try:
        with pytest.raises(CollectorError, match=r"died while it started \(exit code 1\)"):
            Collector(CONFIG, tmp_path)
    finally:
        multiprocessing.set_executable(executable)


class Nowhere:
    """A place whose workers are lost before they say where they are, nobody knows by whose doing;
    from some number of them on they live."""

    cores, patience = 1, 2

    def __init__(self, lost):
        self._lost, self.started = lost, 0

    def start(self, name, config, episodes, lanes, *, instead):
        self.started += 1
        assert self.started < 9
        return Unseen(lives=self.started > self._lost)

    def wait(self, carriers, timeout):
        return list(carriers)


class Unseen:
    where = None

    def __init__(self, lives):
        self._lives = lives

    def hear(self):
        if not self._lives:
            raise Lost("no word of it")
        self.where = "there"
        return {"obs_shapes": {"state": [24]}, "action_dim": 6}

    def is_to_blame(self):
        return False

    def kill(self):
        """It is gone already, or nothing of a process."""

    end = kill


def test_workers_lost_before_they_say_where_they_are_are_not_replaced_for_ever(tmp_path):
    place = Nowhere(lost=2)
    assert Collector(CONFIG, tmp_path, place=place).action_dim == 6 and place.started == 3
    with pytest.raises(CollectorError, match=r"died while it started \(no word of it\)"):
        Collector(CONFIG, tmp_path, place=Nowhere(lost=3))


def test_a_job_that_kills_the_worker_twice_is_an_error(tmp_path, agent, monkeypatch):
    collector = Collector(CONFIG, tmp_path)
    (worker,) = collector.workers
    send = worker._send

    def deadly():
        send()
        os.kill(worker.carrier.process.pid, signal.SIGKILL)

    monkeypatch.setattr(worker, "_send", deadly)
    collector.submit(job(None, evaluations=10**6), acting_weights(agent))
    with pytest.raises(CollectorError, match=r"died twice at the same job \(exit code -9\)"):
        collector.wait()
    collector.close()


def test_the_workers_error_arrives(tmp_path):
    config = dataclasses.replace(CONFIG, env=dataclasses.replace(CONFIG.env, task="walker-fly"))
    with pytest.raises(CollectorError, match="^unknown task 'walker-fly'.*-run"):
        Collector(config, tmp_path)  # one of ours: the reason alone
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_the_same_in_every_process(tmp_path):
    """Rendering too: a resumed run draws its frames in another process."""
    try:
        select_gl()
    except GLError as error:
        pytest.skip(str(error))
    config = dataclasses.replace(CONFIG, env=dataclasses.replace(CONFIG.env, obs="pixels"))
    env = make_env("walker-walk", obs="pixels", action_repeat=2, time_limit=1.0)
    agent = Dreamer(config, env.obs_shapes, env.action_dim)
    collector = Collector(config, tmp_path)
    try:
        assert collector.obs_shapes == {"pixels": (64, 64, 3)}
        collector.submit(job(1), acting_weights(agent))
        collector.wait()
    finally:
        collector.close()
    seed = episode_seed(config.seed, "collect", 1)
    played, _ = collect(env, agent_policy(agent, seed, config.collect.noise, sample=True), seed)
    recorded, _ = read_episode(episode_path(tmp_path, 1))
    assert recorded["pixels"].std() > 1  # something was drawn
    assert all(np.array_equal(played[k], recorded[k]) for k in recorded)
    replay_by_the_page(episode_path(tmp_path, 1))


@pytest.mark.parametrize("random", [False, True])
def test_an_episode_file_alone_can_be_replayed(random, tmp_path, agent):
    env = dataclasses.replace(CONFIG.env, time_limit=0.7, action_repeat=3, task="cartpole-swingup")
    collector = Collector(dataclasses.replace(CONFIG, env=env, seed=5), tmp_path)
    agent = Dreamer(CONFIG, collector.obs_shapes, collector.action_dim)
    try:
        collector.submit(job(2, random=random), {} if random else acting_weights(agent))
        collector.wait()
    finally:
        collector.close()
    replay_by_the_page(episode_path(tmp_path, 2))


def replay_by_the_page(path):
    """Run docs/replay.md's recipe; it asserts that all is the same, bit for bit."""
    page = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
    recipe = page.split("## Replaying one")[1].split("```python\n")[1].split("```")[0]
    steps: dict = {}
    exec(recipe.replace("RUN/episodes/episode-000000.safetensors", str(path)), steps)
    assert steps["t"] == len(steps["arrays"]["reward"]) - 1


# ------------------------------------------------------------------------ a pool


def pooled(workers, round_=4, envs=2, **more):
    values = {"workers": workers, "round": round_, "envs": envs, **more}
    return dataclasses.replace(CONFIG, collect=dataclasses.replace(CONFIG.collect, **values))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    directory = tmp_path_factory.mktemp("episodes")
    made = Collector(pooled(2), directory)
    made.directory = directory
    yield made
    made.close()


def test_batches_are_of_the_settings_and_of_one_controller():
    assert batches(pooled(1), [3, 4, 5, 6, 7]) == [[3, 4], [5, 6], [7]]
    assert batches(pooled(3, envs=4), [3, 4, 5]) == [[3, 4, 5]]
    assert batches(pooled(1, controller="mixed"), range(5)) == [[0, 2], [4], [1, 3]]


def test_whole_batches_are_shared_out_the_evaluations_first():
    shares = share_out(Job(0, [3, 4, 5, 6, 7], False, 0, None), pooled(1), 2)
    assert [share.batches for share in shares] == [[[3, 4], [7]], [[5, 6]]]
    shares = share_out(Job(0, [3, 4, 5, 6], False, 5, "film.mp4"), pooled(1), 3)
    assert [share.batches for share in shares] == [[], [[3, 4]], [[5, 6]]]
    assert [(share.evaluations, share.video) for share in shares] == [
        (5, "film.mp4"), (0, None), (0, None)
    ]  # fmt: skip
    (share,) = share_out(Job(0, [3, 4], True, 1, None), pooled(1), 1)
    assert share == Share(True, [[3, 4]], 1)


def test_auto_takes_the_cores_that_the_learner_leaves():
    auto = lambda threads, **how: pool_size(  # noqa: E731
        dataclasses.replace(pooled(0, **how), threads=threads), 8
    )
    assert auto(2, round_=12) == 6 and auto(5, round_=12) == 3
    assert auto(2) == 2, "a round has no more batches"
    assert auto(8, round_=12) == auto(9, round_=12) == 1
    assert auto(2, round_=0) == auto(2, round_=0, envs=7) == 1
    assert pool_size(pooled(5), 8) == 5


def test_a_pool_plays_what_one_worker_plays(pool, collector, agent):
    """The same bytes; who has nothing to do is not asked."""
    pytest.importorskip("fastdreamer._native")
    weights = acting_weights(agent)
    want = {}
    for index in range(60, 65):
        collector.submit(job(index, random=index < 62), weights)
        want |= {one.episode: one for one in collector.wait().played}
    pool.submit(Job(0, [60, 61], True, 0, None), {})
    assert pool.wait().played == [want[60], want[61]]
    pool.submit(Job(0, [62, 63, 64], False, 2, None), weights)
    result = pool.wait()
    assert result.played == [want[k] for k in (62, 63, 64)]
    for index in range(60, 65):
        mine, other = (episode_path(one.directory, index) for one in (pool, collector))
        assert mine.read_bytes() == other.read_bytes()
    collector.submit(job(None, evaluations=2), weights)
    assert collector.wait().eval_returns == result.eval_returns
    assert 0 <= time.time() - result.finished < 60


def test_a_stopped_worker_of_two_is_replaced_and_its_episodes_collected_again(
    pool, agent, monkeypatch, caplog
):
    weights = acting_weights(agent)
    round_ = Job(0, [70, 71, 72, 73], False, 0, None)
    pool.submit(round_, weights)
    want = pool.wait().played
    paths = [episode_path(pool.directory, index) for index in round_.episodes]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    stopped = pool.workers[1].carrier.process.pid
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr(collector_module, "QUIET", 1e9)  # of the other, which may be slow at work
    pool.submit(round_, weights)
    while not pool.workers[0].done:
        assert pool.ready(0.1) is False
    pool.workers[1]._silence = 0.0
    monkeypatch.setattr(collector_module, "QUIET", 1.0)
    while not caplog.records:
        assert pool.ready(0.1) is False
    assert re.match(
        rf"the collector 2 of 2 \(process {stopped}\) has given no sign for 1 s: it is stopped",
        caplog.records[0].getMessage(),
    )
    monkeypatch.setattr(collector_module, "SILENT", 0.0)
    while "the collector 2 of 2 gave no sign (in 0 s); starting it again" not in caplog.text:
        pool.ready(0)
    monkeypatch.setattr(collector_module, "SILENT", 300.0)
    assert pool.wait().played == want
    assert [path.read_bytes() for path in paths] == contents
    assert gone(stopped)


def test_from_pixels_episodes_side_by_side_can_be_replayed_alone(tmp_path, monkeypatch):
    """Each thread draws for its own environments."""
    try:
        select_gl()
    except GLError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(processes, "CORES", 2)
    config = pooled(1, envs=3, round_=3)
    env = dataclasses.replace(config.env, obs="both", render_quality="fast", time_limit=0.5)
    config = dataclasses.replace(config, env=env, eval=dataclasses.replace(config.eval, video=True))
    collector = Collector(config, tmp_path)
    agent = Policy(config, collector.obs_shapes, collector.action_dim)
    film = str(tmp_path / "film.mp4")
    try:
        collector.submit(Job(0, [0, 1, 2], False, 2, film), acting_weights(agent))
        assert len(collector.wait().eval_returns) == 2 and os.path.getsize(film) > 1000
        collector.submit(job(3), acting_weights(agent))  # after a video
        collector.wait()
    finally:
        collector.close()
    seeds = set()
    for index in range(4):
        seeds.add(read_episode(episode_path(tmp_path, index))[1]["seed"])
        replay_by_the_page(episode_path(tmp_path, index))
    assert seeds == {episode_seed(config.seed, "collect", index) for index in range(4)}


def test_a_fault_in_the_worker_arrives_with_its_traceback(tmp_path, agent):
    collector = Collector(CONFIG, tmp_path)
    try:
        collector.submit(job(0), {k: v[:1] for k, v in acting_weights(agent).items()})
        with pytest.raises(CollectorError, match="(?s)failed:\nTraceback.*size mismatch"):
            collector.wait()
    finally:
        collector.close()


UNPLUGGED = """
import gymnasium, numpy as np
from gymnasium import spaces

class Robot(gymnasium.Env):
    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}
    def step(self, action):
        raise ConnectionResetError("the robot hung up")

def made(): return Robot()
def never_made(): raise EOFError("no robot answers")
"""


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("made", "in step\n.*ConnectionResetError: the robot hung up"),
        ("never_made", "in never_made\n.*EOFError: no robot answers"),
    ],
)
def test_an_environment_that_loses_a_connection_of_its_own_is_a_fault(
    task, says, tmp_path, monkeypatch
):
    """And not taken for the trainer's end."""
    pytest.importorskip("gymnasium")
    (tmp_path / "robot_of_mine.py").write_text(UNPLUGGED)
    monkeypatch.chdir(tmp_path)
    env = dataclasses.replace(CONFIG.env, task=f"robot_of_mine:{task}")
    config = dataclasses.replace(CONFIG, env=env)
    with pytest.raises(CollectorError, match=f"(?s)failed:\nTraceback.*{says}"):
        collector = Collector(config, tmp_path / "episodes")
        try:
            collector.submit(job(0, random=True), {})
            collector.wait()
        finally:
            collector.close()


@pytest.mark.parametrize("said", [0, 1, 2])
def test_a_worker_ends_quietly_with_its_trainer(said, agent, tmp_path, monkeypatch):
    """Before it has said what the environment is, at a sign of life, or at its answer."""
    monkeypatch.setattr(worker_module, "_SIGN", 0.0 if said == 1 else 1e9)
    weights = save_bytes(acting_weights(agent))
    told = [json.dumps(dataclasses.asdict(Share(False, [[0]]))).encode(), weights]
    sent = []

    class Pipe:
        def send_bytes(self, message):
            sent.append(sorted(json.loads(message)))
            if len(sent) > min(said, 1):
                raise BrokenPipeError

        def recv_bytes(self):
            return told.pop(0)

    worker_module.converse(Pipe(), json.dumps(to_dict(CONFIG)), str(tmp_path), None, 1)
    header, result = ["action_dim", "obs_shapes"], sorted(dataclasses.asdict(Result()))
    assert sent == [[header], [header, ["alive"]], [header, result]][said], "and no word more"
    assert episode_path(tmp_path, 0).exists() == (said == 2)


def test_weights_that_acting_lacks_are_an_error_and_not_random_ones(tmp_path, agent):
    collector = Collector(CONFIG, tmp_path)
    weights = acting_weights(agent)
    lost = sorted(weights)[0]
    del weights[lost]
    try:
        collector.submit(job(0), weights)
        with pytest.raises(CollectorError, match=rf"(?s)Missing key\(s\) in .*{lost}"):
            collector.wait()
    finally:
        collector.close()
    assert list(tmp_path.iterdir()) == []


def gone(pid):
    return not os.path.exists(f"/proc/{pid}")


def test_a_stopped_worker_is_named_replaced_and_gone(tmp_path, agent, monkeypatch, caplog):
    monkeypatch.setattr(collector_module, "QUIET", 1e9)  # on a busy machine it may be slow at work
    monkeypatch.setattr(collector_module, "SILENT", 1e9)
    made = Collector(CONFIG, tmp_path)
    (worker,) = made.workers
    pid = worker.carrier.process.pid
    try:
        made.submit(job(None, evaluations=20_000), acting_weights(agent))
        worker._silence = 20.0
        while worker._silence >= 20:  # at work, it gives signs
            assert made.ready(1.0) is False
        os.kill(pid, signal.SIGSTOP)
        while made.ready(0.5) or worker._silence < 2:  # what it had said is heard
            pass
        monkeypatch.setattr(collector_module, "QUIET", 2.0)
        for _ in range(3):
            assert made.ready(0.1) is False
        (said,) = (record.getMessage() for record in caplog.records)  # once
        assert re.match(
            rf"the collector \(process {pid}\) has given no sign for \d+ s: it is", said
        )
        worker.share = Share(False, [[0]])
        monkeypatch.setattr(collector_module, "SILENT", 0.0)
        assert made.ready(0) is False
        monkeypatch.setattr(collector_module, "SILENT", 300.0)
        assert "the collector gave no sign (in 0 s); starting it again" in caplog.text
        assert isinstance(made.wait().played[0].episode_return, float)
        assert gone(pid)

        made.submit(job(1), acting_weights(agent))
        pid = worker.carrier.process.pid
        os.kill(pid, signal.SIGSTOP)
    finally:
        start = time.monotonic()
        made.close()
    assert time.monotonic() - start < 10 and gone(pid), "it does not wait for a stopped one"


def test_what_killed_workers_left_half_written_goes_with_them(tmp_path):
    episodes, videos = tmp_path / "episodes", tmp_path / "videos"
    for directory in (episodes, videos):
        directory.mkdir()
    made = Collector(CONFIG, episodes)
    alive = episodes / f".tmp-{os.getpid()}-episode-000001.safetensors"
    try:
        pid = made.workers[0].carrier.process.pid
        os.kill(pid, signal.SIGSTOP)
        made.submit(job(0, evaluations=1, video=str(videos / "film.mp4")), {})
        half = episodes / f".tmp-{pid}-episode-000000.safetensors"
        for path in (half, alive, videos / f".tmp-{pid}-film.mp4"):
            path.write_bytes(b"half")
    finally:
        made.close()
    assert list(episodes.iterdir()) == [alive] and list(videos.iterdir()) == []


def test_a_worker_killed_in_the_midst_of_a_word_is_lost(tmp_path):
    """A long answer goes through the pipe in pieces."""
    made = Collector(CONFIG, tmp_path)
    (worker,) = made.workers
    ours, theirs = multiprocessing.Pipe()
    try:
        os.write(theirs.fileno(), (1 << 20).to_bytes(4, "big") + b'{"played": [')
        theirs.close()
        worker.carrier.connection.close()
        worker.carrier.connection = ours
        worker.carrier.kill()
        with pytest.raises(Lost, match=r"exit code -9"):
            worker.carrier.hear()
    finally:
        made.close()


def test_more_than_a_pipe_holds_is_sent_to_a_stopped_worker_without_waiting(tmp_path, agent):
    made = Collector(CONFIG, tmp_path)
    os.kill(made.workers[0].carrier.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        made.submit(job(0), acting_weights(agent) | {"much": torch.zeros(1 << 22)})
        assert made.ready(0.1) is False and time.monotonic() - start < 5
    finally:
        made.close()


def stop_at_once(*given):
    """In the place of a worker's work."""
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_worker_that_never_starts_can_be_left(tmp_path, monkeypatch):
    """What `check` raises ends the wait, and a second silent worker is an error."""

    class Asked(Exception):
        pass

    others, started = multiprocessing.active_children(), []

    def look():
        started.extend({child.pid for child in multiprocessing.active_children()
                        if child not in others}.difference(started))  # fmt: skip

    def leave():
        look()
        raise Asked

    monkeypatch.setattr(processes, "work", stop_at_once)
    with pytest.raises(Asked):
        Collector(CONFIG, tmp_path, leave)
    assert len(started) == 1 and gone(started[0])
    monkeypatch.setattr(collector_module, "QUIET", 0.3)
    monkeypatch.setattr(collector_module, "SILENT", 0.5)
    with pytest.raises(CollectorError, match=r"gave no sign while it started \(in 0 s\)"):
        Collector(CONFIG, tmp_path, look)
    assert len(started) > 1 and all(gone(pid) for pid in started)
