"""fastdreamer report: figures and numbers from snapshots, resumed wherever it was stopped."""

import csv
import dataclasses
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from fastdreamer.acting.parts import acting_weights
from fastdreamer.acting.policy import Policy
from fastdreamer.analysis import abreast
from fastdreamer.analysis.report import write_report
from fastdreamer.analysis.viz.dreams import state_figure
from fastdreamer.cli import main
from fastdreamer.config import ConfigError, preset
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.ops.backend import last_backend, use_backend
from fastdreamer.training.checkpoint import list_snapshots
from fastdreamer.training.trainer import RunError, Trainer, create_run
from fastdreamer.training.worker import Player, Share

TINY = preset("tiny")
FRAMES = [80, 120, 160]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run from state with three snapshots."""
    path = tmp_path_factory.mktemp("report") / "run"
    train = dataclasses.replace(TINY.train, frames=160, snapshot_every=40)
    evaluation = dataclasses.replace(TINY.eval, every=0)
    create_run(path, dataclasses.replace(TINY, train=train, eval=evaluation))
    Trainer(path).train()
    # the first falls to the prefill: nothing was learned by then
    assert list(list_snapshots(path / "snapshots")) == [120, 160]
    snapshot = path / "snapshots" / "snapshot-000000120.safetensors"
    shutil.copy(snapshot, snapshot.with_name("snapshot-000000080.safetensors"))
    return path


def table(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def test_every_figure_and_its_numbers(run, tmp_path):
    lines = []
    files = write_report(run, tmp_path, episodes=2, say=lines.append)
    names = ["episodes.csv", "actor.csv", "mpc.csv", "figure-3.png", "figure-5.png"]
    assert [f.name for f in files] == [*names, "figure-5.csv", "figure-4.png"]
    assert all(f.stat().st_size > 0 for f in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)
    rows = table(tmp_path / "episodes.csv")
    keys = [(r["controller"], int(r["env_frames"]), int(r["episode"])) for r in rows]
    assert keys == [(c, f, i) for c in ("actor", "mpc") for f in FRAMES for i in range(2)]
    returns = {key: float(r["return"]) for key, r in zip(keys, rows, strict=True)}
    # the copied snapshot plays the same episodes; the two controllers do not
    assert all(returns["mpc", 80, i] == returns["mpc", 120, i] for i in range(2))
    assert any(returns["mpc", 160, i] != returns["actor", 160, i] for i in range(2))
    for controller in ("actor", "mpc"):
        for row in table(tmp_path / f"{controller}.csv"):
            some = [returns[controller, int(row["env_frames"]), i] for i in range(2)]
            assert float(row["return_mean"]) == pytest.approx(np.mean(some))
            assert float(row["return_std"]) == pytest.approx(np.std(some))
            # A curve's seconds are those of training, which an episode's are not.
            assert row["episodes"] == "2" and not row["seconds"]
    for row in table(tmp_path / "figure-5.csv"):
        pairs = [
            [returns[c, int(row["env_frames"]), i] for i in range(2)] for c in ("actor", "mpc")
        ]
        gain = np.subtract(pairs[1], pairs[0])
        assert float(row["mpc_minus_actor"]) == pytest.approx(gain.mean(), abs=1e-3)
        assert float(row["mpc_minus_actor_se"]) == pytest.approx(gain.std(), abs=1e-3)
    assert re.fullmatch(r"12 episodes to play, about \d+ s", lines[0])
    assert len(lines) == 13 and lines[-1].endswith("(12 of 12, 0 s left)")


def test_it_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_report(run, whole, episodes=2, say=str)
    played = []
    evaluate = abreast.evaluate

    def stopping(*args, **options):
        if len(played) == 5:
            raise KeyboardInterrupt
        played.append(args)
        return evaluate(*args, **options)

    monkeypatch.setattr(abreast, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_report(run, cut, episodes=2, say=str)
    with (cut / "episodes.csv").open("a") as file:
        file.write("mpc,120,4")  # a line that a kill cut short
    played.clear()
    counting = lambda *args, **options: played.append(args) or evaluate(*args, **options)  # noqa: E731
    monkeypatch.setattr(abreast, "evaluate", counting)
    lines = []
    write_report(run, cut, episodes=2, say=lines.append)
    assert len(played) == 7 and lines[0].startswith("5 of 12 episodes are in")
    write_report(run, cut, episodes=2, say=str)
    assert len(played) == 7
    kept = [{k: v for k, v in r.items() if k != "seconds"} for r in table(cut / "episodes.csv")]
    want = [{k: v for k, v in r.items() if k != "seconds"} for r in table(whole / "episodes.csv")]
    assert kept == want
    # more of it plays what is missing
    write_report(run, cut, episodes=3, points=2, say=str)
    assert len(played) == 7 + 4
    with pytest.raises(ConfigError, match="holds episodes with another seed"):
        write_report(run, cut, episodes=2, seed=1, say=str)
    with pytest.raises(ConfigError, match="holds episodes with another plan"):
        write_report(run, cut, plan=dataclasses.replace(TINY.plan, iterations=1), say=str)
    (cut / "episodes.csv").write_text("something else\n")
    with pytest.raises(ConfigError, match="is not a report's episodes"):
        write_report(run, cut, say=str)


def test_episodes_of_another_run_of_that_name_are_not_this_one_s(run, tmp_path):
    """As folders of seeds hold: a seed0 each, of one task and with snapshots at the same frames."""
    other = shutil.copytree(run, tmp_path / "other" / run.name)
    first, second = (other / "snapshots" / f"snapshot-000000{n}.safetensors" for n in (120, 160))
    shutil.copy(second, first)
    some, out = {"controllers": ["actor"], "episodes": 1, "say": str}, tmp_path / "out"
    write_report(run, out, **some)
    before = (out / "episodes.csv").read_bytes()
    with pytest.raises(ConfigError, match=f"holds episodes of another agent than {first}; choose"):
        write_report(other, out, **some)
    assert (out / "episodes.csv").read_bytes() == before
    # Where nobody has written down whose they are, as once, they are taken and kept.
    whole = before.decode().splitlines()
    (out / "episodes.csv").write_text(
        "".join(f"{line if line[0] == '#' else line.rpartition(',')[0]}\n" for line in whole)
    )
    write_report(run, out, **some | {"episodes": 2})
    rows = table(out / "episodes.csv")
    assert [bool(row["crc32"]) for row in rows] == [False] * 3 + [True] * 3
    assert [",".join(row.values()) for row in rows[:3]] == [
        f"{line.rpartition(',')[0]}," for line in whole[2:]
    ]


def test_hours_are_told_first_and_a_long_episode_says_where_it_is(run, tmp_path, monkeypatch):
    evaluate, lines = abreast.evaluate, []

    def slow(*args, watch, **options):
        time.sleep(0.02)
        return evaluate(*args, watch=watch, **options)

    monkeypatch.setattr(abreast, "evaluate", slow)
    monkeypatch.setattr(abreast, "_QUIET", 0.0)
    monkeypatch.setattr(abreast, "_rehearse", lambda *_: {"actor": 7200.0, "mpc": 0.0})
    write_report(run, tmp_path, episodes=1, points=1, say=lines.append)
    assert lines[0] == "2 episodes to play, about 2 h 00 min"
    assert "mpc at 160 env frames, episode 1 of 1: decision 20 of 20" in lines


# ---------------------------------------------------------------- side by side


def outcome(path):
    """What an episode returned, whoever played it when."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in table(path)]
    return sorted(rows, key=lambda row: [row[k] for k in ("controller", "env_frames", "episode")])


def nobody_plays():
    return not [t for t in threading.enumerate() if t.name.startswith("fastdreamer-play")]


def test_episodes_side_by_side_are_those_alone(run, tmp_path, monkeypatch):
    evaluate, met, seen = abreast.evaluate, threading.Barrier(3, timeout=60), set()

    def together(*args, **options):
        if threading.get_ident() not in seen:  # until three are at it at once
            seen.add(threading.get_ident())
            met.wait()
        try:
            return evaluate(*args, **options)
        finally:
            assert torch.get_num_threads() == 1 and last_backend("decide") == "eager"

    with use_backend("eager"):
        write_report(run, tmp_path / "alone", episodes=2, threads=1, say=str)
        monkeypatch.setattr(abreast, "evaluate", together)
        torch.set_num_threads(2)
        files = write_report(run, tmp_path / "together", episodes=2, threads=3, say=str)
    assert len(seen) == 3 and threading.get_ident() not in seen
    assert torch.get_num_threads() == 2 and nobody_plays()
    assert outcome(files[0]) == outcome(tmp_path / "alone" / "episodes.csv")
    figures = [(tmp_path / name / "figure-5.csv").read_text() for name in ("alone", "together")]
    assert figures[0] == figures[1]


def test_who_is_stopped_or_fails_stops_the_others(run, tmp_path, monkeypatch):
    evaluate, failing = abreast.evaluate, threading.Event()
    write_report(run, tmp_path / "whole", episodes=2, say=str)
    first = threading.Lock()

    def endless(*args, watch, **options):
        if first.acquire(blocking=False):
            if failing.is_set():
                raise ValueError("an episode fell")
            return evaluate(*args, watch=watch, **options)
        while True:  # until the watch ends it
            watch(1)
            time.sleep(1e-3)

    def stop(line):
        if ": return " in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(abreast, "evaluate", endless)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_report(run, out, episodes=2, threads=2, say=stop)
    assert nobody_plays() and len(table(out / "episodes.csv")) == 1
    first.release()
    failing.set()
    with pytest.raises(ValueError, match="an episode fell"):
        write_report(run, out, episodes=2, threads=2, say=str)
    assert nobody_plays() and len(table(out / "episodes.csv")) == 1
    monkeypatch.setattr(abreast, "evaluate", evaluate)
    write_report(run, out, episodes=2, threads=2, say=str)
    assert outcome(out / "episodes.csv") == outcome(tmp_path / "whole" / "episodes.csv")


def test_what_is_measured_in_milliseconds_has_all_threads(run, tmp_path, monkeypatch):
    who, plan = [], dataclasses.replace(TINY.plan, budget_ms=1e4)

    def look(*args, **options):
        who.append((threading.current_thread(), torch.get_num_threads()))
        return 1.0

    monkeypatch.setattr(abreast, "evaluate", look)
    few = {"controllers": ["mpc"], "points": 1, "episodes": 2, "plan": plan, "say": str}
    write_report(run, tmp_path / "asked", threads=2, **few)
    torch.set_num_threads(3)
    write_report(run, tmp_path / "all", **few)
    main = threading.main_thread()
    assert who == [(main, 2), (main, 2), (main, 3), (main, 3)]
    with pytest.raises(ConfigError, match="threads >= 0, got 2, 1 and -1"):
        write_report(run, tmp_path / "none", threads=-1, **few)


def test_an_episode_outlives_its_snapshot(run, tmp_path, monkeypatch):
    """A run that goes on thins its snapshots out while an episode is played with one."""
    own, evaluate = shutil.copytree(run, tmp_path / "run"), abreast.evaluate

    def thinned(*args, **options):
        (own / "snapshots" / "snapshot-000000080.safetensors").unlink(missing_ok=True)
        return evaluate(*args, **options)

    monkeypatch.setattr(abreast, "evaluate", thinned)
    lines = []
    write_report(
        own, tmp_path / "out", controllers=["actor", "planet"], episodes=1, say=lines.append
    )
    played = [(r["controller"], r["env_frames"]) for r in table(tmp_path / "out" / "episodes.csv")]
    assert played == [("actor", str(f)) for f in FRAMES] + [("planet", str(f)) for f in FRAMES[1:]]
    assert len([line for line in lines if line.startswith("skipped: ")]) == 1


def test_points_are_spread_and_damaged_snapshots_skipped(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    some = {"controllers": ["actor"], "episodes": 1}
    files = write_report(own, tmp_path / "two", points=2, say=str, **some)
    assert [f.name for f in files] == ["episodes.csv", "actor.csv", "figure-3.png", "figure-4.png"]
    assert [r["env_frames"] for r in table(tmp_path / "two" / "actor.csv")] == ["80", "160"]
    (own / "snapshots" / "snapshot-000000160.safetensors").write_bytes(b"torn")
    lines = []
    write_report(own, tmp_path / "torn", say=lines.append, **some)
    assert [line for line in lines if line.startswith("skipped:") and "000000160" in line]
    assert [r["env_frames"] for r in table(tmp_path / "torn" / "actor.csv")] == ["80", "120"]
    # a run without snapshots: its checkpoints
    shutil.rmtree(own / "snapshots")
    write_report(own, tmp_path / "old", say=str, **some)
    assert table(tmp_path / "old" / "actor.csv")[-1]["env_frames"] == "160"
    shutil.rmtree(own / "checkpoints")
    with pytest.raises(RunError, match="holds no snapshot and no checkpoint yet"):
        write_report(own, tmp_path / "none", say=str, **some)


def test_commands(run, tmp_path, capsys):
    def said():
        captured = capsys.readouterr()
        return re.sub(r"\s+", " ", captured.out + captured.err)

    out = ["--out", str(tmp_path / "out")]
    few = ["--plan.iterations", "1", "--points", "1", "--episodes", "1"]
    assert main(["report", str(run), *out, *few, "--controllers", "actor", "planet"]) == 0
    text = said()
    assert "planet at 160 env frames, episode 1 of 1: return" in text
    assert "figure-5.png" in text and (tmp_path / "out" / "planet.csv").exists()
    assert main(["report", str(run), *out, "--episodes", "0"]) == 1
    assert "episodes must be >= 1" in said()
    assert main(["report", "nowhere", *out]) == 1
    assert "nowhere: no such run or checkpoint" in said()

    snapshot = str(run / "snapshots" / "snapshot-000000160.safetensors")
    short = ["--episodes", "1"]
    for path, controller, name in [
        (str(run), "mpc", "MPC ranked by λ-return"),
        (snapshot, "planet", "MPC ranked by reward"),
        (snapshot, "auto", "deterministic actor"),
    ]:
        assert main(["eval", path, "--controller", controller, *short, "--plan-ms", "9000"]) == 0
        assert re.search(rf"return \d+\.\d \(1 episode of .*{name}\)", said())
    assert main(["eval", snapshot, "--controller", "mpc", "--plan.num-elites", "9"]) == 1
    assert "plan.num_elites must be <= plan.num_samples = 8" in said()  # the run's own samples


def test_a_plan_by_the_clock_is_one_environment_s(run, tmp_path, monkeypatch):
    """By eval as in training: ten that share its milliseconds have a tenth of the iterations."""
    plan, planned = Policy.plan, []

    def counted(self, state, *args, **options):
        planned.append(len(state.deter))
        return plan(self, state, *args, **options)

    monkeypatch.setattr(Policy, "plan", counted)
    evaluate = ["eval", str(run), "--episodes", "2", "--plan.iterations", "1"]
    assert main([*evaluate, "--controller", "mpc"]) == 0
    assert set(planned) == {2}
    planned.clear()
    assert main([*evaluate, "--controller", "mpc", "--plan-ms", "9000"]) == 0
    assert planned == [1] * 40
    planned.clear()
    config = dataclasses.replace(
        TINY,
        plan=dataclasses.replace(TINY.plan, iterations=1, budget_ms=9000.0),
        eval=dataclasses.replace(TINY.eval, controller="planet"),
    )
    weights = acting_weights(Dreamer(config, {"state": (24,)}, 6))
    share = Share(random=False, evaluations=2)
    assert len(Player(config, tmp_path, 1, lambda: None).play(share, weights).eval_returns) == 2
    assert planned == [1] * 40


def test_where_results_cannot_go_is_said_before_anything_is_played(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Policy, "act", lambda *_, **__: pytest.fail("an episode is played"))
    (tmp_path / "file").write_text("mine")
    inside = str(tmp_path / "file" / "below")
    for argv, says in [
        (["report", str(run), "--out", str(tmp_path / "file")], "file is a file"),
        (["report", str(run), "--out", inside], "below cannot be a directory: "),
        (["eval", str(run), "--video", f"{inside}/episode.mp4"], "below cannot be a directory: "),
        (["eval", str(run), "--video", str(tmp_path)], "name must end in .mp4, got"),
        (["plot", str(run), "--out", f"{inside}/curve.png"], "below cannot be a directory: "),
        (["export", str(run), f"{inside}.safetensors"], "file cannot be a directory: "),
    ]:
        assert main(argv) == 1
        said = re.sub(r"\s+", "", capsys.readouterr().err)
        assert says.replace(" ", "") in said and "Traceback" not in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_planet_from_the_command_line(tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = [
        "--preset",
        "tiny",
        "--agent",
        "planet",
        "--train.frames",
        "120",
        "--eval.every",
        "0",
    ]
    assert main(["train", "walker", *options, "--run", str(run_dir)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run_dir), "--episodes", "1"]) == 0
    assert "MPC ranked by reward" in capsys.readouterr().out.replace("\n", " ")
    assert main(["eval", str(run_dir), "--controller", "mpc"]) == 1
    assert "controller must be one of planet" in capsys.readouterr().err.replace("\n", " ")
    files = write_report(run_dir, tmp_path / "out", episodes=1, say=str)
    assert [f.name for f in files] == ["episodes.csv", "planet.csv", "figure-3.png", "figure-4.png"]
    argv = ["train", "--resume", str(run_dir), "--agent", "dreamer"]
    assert main(argv) == 1
    assert "is fixed when a run starts" in capsys.readouterr().err.replace("\n", " ")
    argv = ["train", "walker", "--preset", "tiny", "--agent", "planet", "--collect", "mpc"]
    assert main([*argv, "--run", str(tmp_path / "no")]) == 1
    assert "collect.controller must be 'auto' for planet" in capsys.readouterr().err


def test_state_figure(tmp_path):
    real = np.cumsum(np.random.default_rng(0).normal(size=(20, 9)), 0)
    assert state_figure(real + 0.1, real, tmp_path / "a.png").stat().st_size > 0
    assert state_figure(real[:1, :3], real[:1, :3], tmp_path / "b.png").stat().st_size > 0
    with pytest.raises(ValueError, match="state_figure: imagined and real must both be"):
        state_figure(real[:5], real, tmp_path / "c.png")
