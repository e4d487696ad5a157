"""Methods are compared on the same episodes, and a stopped comparison goes on where it was."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from rich.console import Console

from fastdreamer import load, make_env
from fastdreamer.acting.play import config_env, episode_seed, evaluate
from fastdreamer.analysis.compare import compare
from fastdreamer.analysis.compare.records import Settings
from fastdreamer.analysis.compare.results import comparison_table, write_results
from fastdreamer.analysis.viz.comparison import comparison_figure
from fastdreamer.cli import main
from fastdreamer.config import ConfigError
from fastdreamer.envs import EnvError
from fastdreamer.training.trainer import RunError, Stopped

# Episodes of 40 env frames, 20 decisions.
TINY = Settings("walker-stand", frames=160, eval_every=80, eval_episodes=2, preset="tiny")
# SAC draws 100 decisions, 200 env frames, at random before its first update.
LEARNING = dataclasses.replace(TINY, frames=320, eval_every=160)


def run(out, settings, methods, seeds=1):
    return compare(out, settings, methods, seeds, console=Console(quiet=True))


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()[1:]))


def outcomes(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(path)]


@pytest.fixture(scope="module")
def dreamer(tmp_path_factory):
    """A finished comparison of Dreamer's actor and planner."""
    out = tmp_path_factory.mktemp("compare") / "dreamer"
    run(out, TINY, ["dreamer", "dreamer-mpc"])
    return out


# ----------------------------------------------------------------------- world models


def test_dreamer_is_trained_to_the_frame_and_evaluated_on_fixed_episodes(dreamer):
    rows = rows_of(dreamer / "compare.csv")
    assert [(row["method"], int(row["env_frames"])) for row in rows] == [
        ("dreamer", 80), ("dreamer", 160), ("dreamer-mpc", 80), ("dreamer-mpc", 160),
    ]  # fmt: skip
    assert 0 < float(rows[0]["seconds"]) < float(rows[1]["seconds"])
    assert [row["seconds"] for row in rows[2:]] == [row["seconds"] for row in rows[:2]]
    assert not (dreamer / "dreamer-mpc-seed0").exists()  # the same run
    for row in rows:
        agent = load(dreamer / "dreamer-seed0" / f"stage-{int(row['env_frames']):09d}.safetensors")
        env = config_env(agent.config)
        controller = {"dreamer": "actor", "dreamer-mpc": "mpc"}[row["method"]]
        seeds = [episode_seed(0, "evaluate", i) for i in range(2)]
        returns = [evaluate(agent, env, seed, controller=controller) for seed in seeds]
        assert float(row["return_mean"]) == np.mean(returns)
        assert float(row["return_std"]) == np.std(returns)
        assert int(row["episodes"]) == 2
    about = json.loads((dreamer / "compare.csv").read_text().splitlines()[0].removeprefix("# "))
    assert about["task"] == "walker-stand" and len(about["machines"]) == 1
    assert f"torch {metadata.version('torch')}" in about["machines"][0]
    assert not list(dreamer.rglob(".tmp-*"))


def test_what_is_done_is_not_done_again(dreamer, capsys):
    def times():
        files = (dreamer / "dreamer-seed0").rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.name != "lock"}

    before = times()
    argv = ["compare", "walker-stand", "--methods", "dreamer-mpc,dreamer", "--preset", "tiny"]
    argv += ["--frames", "160", "--eval-every", "80", "--eval-episodes", "2", "--seeds", "1"]
    assert main([*argv, "--out", str(dreamer)]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "| Dreamer, actor | 1 |" in text and str(dreamer / "compare.png") in text
    assert times() == before


def test_planet_collects_and_is_evaluated_with_its_planner(tmp_path):
    settings = dataclasses.replace(TINY, frames=120, eval_every=120, eval_episodes=1)
    table, *_ = run(tmp_path, settings, ["planet"])
    (row,) = rows_of(table)
    agent = load(tmp_path / "planet-seed0" / "stage-000000120.safetensors")
    assert agent.config.agent == "planet" and agent.actor is None
    value = evaluate(agent, config_env(agent.config), episode_seed(0, "evaluate", 0))
    assert (row["method"], float(row["return_mean"])) == ("planet", value)


@pytest.mark.parametrize("method", ["dreamer", "planet"])
def test_on_a_task_from_outside_the_suite_ends_are_learned(tmp_path, method):
    """As in a run of `fastdreamer train`; on the suite's own they are not."""
    pytest.importorskip("gymnasium")
    few = {"frames": 100, "eval_every": 100, "eval_episodes": 1}
    for task, ends in (("gym:Pendulum-v1", True), ("walker-stand", False)):
        settings = dataclasses.replace(TINY, task=task, **few)
        run(tmp_path / task, settings, [method])
        directory = tmp_path / task / f"{method}-seed0"
        config = json.loads((directory / "run" / "config.json").read_text())
        assert config["model"]["discount"] is ends
        agent = load(*directory.glob("stage-*.safetensors"))
        assert (agent.discount_params() is not None) is ends


# ------------------------------------------------------------------------- model-free


@pytest.mark.parametrize("method", ["sac", "ppo"])
def test_a_stopped_model_free_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, method):
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    from fastdreamer.envs.gymnasium import GymnasiumEnv

    class ShortRollouts(stable_baselines3.PPO):
        """Learns from 64 decisions at a time instead of 2048."""

        def __init__(self, *args, n_steps=64, **kwargs):
            super().__init__(*args, n_steps=n_steps, **kwargs)

    monkeypatch.setattr(stable_baselines3, "PPO", ShortRollouts)
    whole, *_ = run(tmp_path / "whole", LEARNING, [method])
    frames = [int(row["env_frames"]) for row in rows_of(whole)]
    assert frames == {"sac": [160, 320], "ppo": [256, 384]}[method]
    policies = [path.read_bytes() for path in sorted(whole.parent.rglob("stage-*.zip"))]
    assert len(set(policies)) == 2

    step, steps = GymnasiumEnv.step, []

    def signalled(self, action):
        steps.append(action)
        if len(steps) == frames[0] // 2 + 30:  # in the second stage
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, action)

    monkeypatch.setattr(GymnasiumEnv, "step", signalled)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", LEARNING, [method])
    assert len(json.loads((tmp_path / f"stopped/{method}-seed0/stages.json").read_text())) == 1
    stopped, *_ = run(tmp_path / "stopped", LEARNING, [method])
    assert outcomes(stopped) == outcomes(whole)
    # The stage that was there is not trained again, the stopped one is.
    assert len(steps) == 30 + frames[1] // 2
    replays = sorted(path.name for path in stopped.parent.rglob("replay-*"))
    assert replays == ([f"replay-{n:09d}.pkl" for n in frames] if method == "sac" else [])


def test_methods_and_seeds_can_be_added(dreamer, tmp_path):
    pytest.importorskip("stable_baselines3")
    out = shutil.copytree(dreamer, tmp_path / "more")
    run(out, TINY, ["sac"])
    first = outcomes(out / "compare.csv")
    table, plot, text = run(out, TINY, ["sac"], seeds=2)
    rows = outcomes(table)
    assert [(row["method"], row["seed"], row["env_frames"]) for row in rows] == [
        (method, seed, frames)
        for method, seed in (("dreamer", "0"), ("dreamer-mpc", "0"), ("sac", "0"), ("sac", "1"))
        for frames in ("80", "160")
    ]
    assert rows[:6] == first and rows[:4] == outcomes(dreamer / "compare.csv")
    assert [row["return_mean"] for row in rows[4:6]] != [row["return_mean"] for row in rows[6:]]
    assert plot.stat().st_size > 10_000
    assert "| Dreamer, actor | 1 |" in text.read_text() and "| SAC | 2 |" in text.read_text()


@pytest.mark.filterwarnings("ignore:.*A Box observation space:UserWarning")  # no bounds: so it is
@pytest.mark.filterwarnings("ignore:.*not having a spec:UserWarning")
@pytest.mark.parametrize("obs", ["state", "pixels", "both"])
@pytest.mark.parametrize(
    "checker", ["gymnasium.utils.env_checker", "stable_baselines3.common.env_checker"]
)
def test_the_checkers_of_others_pass_rendering_included(checker, obs):
    check_env = pytest.importorskip(checker).check_env
    from fastdreamer.envs.gymnasium import GymnasiumEnv

    env = GymnasiumEnv(make_env("walker-stand", obs=obs, time_limit=0.5))
    check_env(env)
    env.close()
    for call in (env.reset, env.render):
        with pytest.raises(EnvError, match=r"after close\(\)"):
            call()


@pytest.mark.filterwarnings("ignore:.*A Box observation space:UserWarning")  # no bounds: so it is
def test_gymnasium_sees_the_same_environment():
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    from fastdreamer.envs.gymnasium import GymnasiumEnv

    ours = make_env("walker-stand", obs="state", time_limit=0.5)
    theirs = GymnasiumEnv(make_env("walker-stand", obs="state", time_limit=0.5))
    check_env(theirs, skip_render_check=True)
    obs, (seen, _) = ours.reset(seed=3), theirs.reset(seed=3)
    assert np.array_equal(obs["state"], seen)
    rng, ended = np.random.default_rng(0), False
    while not ended:
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        obs, *rest, env_frames = ours.step(action)
        seen, *same, info = theirs.step(action)
        assert np.array_equal(obs["state"], seen) and rest == same
        assert info == {"env_frames": env_frames}
        ended = same[2]
    both = GymnasiumEnv(make_env("walker-stand", obs="both"))
    assert {kind: box.dtype for kind, box in both.observation_space.items()} == {
        "pixels": np.uint8, "state": np.float32,
    }  # fmt: skip


# ---------------------------------------------------------------------------- results

CURVES = """# {"task": "walker-stand", "obs": "state", "frames": 4000, "eval_every": 1000, \
"eval_episodes": 5}
method,seed,env_frames,seconds,return_mean,return_std,episodes
dreamer,0,1000,60,100,1,5
dreamer,0,4000,240,400,1,5
dreamer,1,1000,60,200,1,5
dreamer,1,4000,240,600,1,5
ppo,0,2000,20,50,1,5
ppo,0,6000,40,90,1,5
"""


def test_the_table_interpolates_and_leaves_open_what_was_not_measured(tmp_path):
    path = tmp_path / "compare.csv"
    path.write_text(CURVES)
    head, _, dreamer, ppo = comparison_table(path).splitlines()
    assert head.split(" | ")[2:] == [
        *(f"return at {n},000 env frames" for n in (1, 2, 3, 4)),
        *(f"after {t} of training" for t in ("30 s", "1 min 00 s", "2 min 00 s")),
        "env frames per hour |",
    ]
    # Seeds 0 and 1 at 2000: 200 and 333; mean 267, standard deviation 67.
    assert dreamer == (
        "| Dreamer, actor | 2 | 150 ± 50 | 267 ± 67 | 383 ± 83 | 500 ± 100 | – | 150 ± 50 | "
        "267 ± 67 | 60,000 |"
    )
    assert ppo == "| PPO | 1 | – | 50 | 60 | 70 | 70 | – | – | 540,000 |"


def test_the_plot_names_methods_seeds_and_units(tmp_path):
    path = tmp_path / "compare.csv"
    path.write_text(CURVES)
    text = comparison_figure(path, tmp_path / "c.svg", {"ppo": "PPO"}).read_text("utf-8")
    for part in ("PPO (1 seed)", "dreamer (2 seeds)", "env frames", "minutes of training",
                 "walker-stand from state", "return (mean of 5 episodes)", "±1 std"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("text", ["", "method,seed\n", CURVES.replace("seconds,", "time,")])
def test_what_is_no_comparison_is_named(tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.csv: not a comparison"):
        comparison_table(path)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--methods", "dreamer,sax"], "methods must be among dreamer, "),
        (["--methods", ","], "got none"),
        (["--methods", "dreamer,dreamer"], "named twice"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--frames", "0"], "frames must be at least 1, got 0"),
        (["--eval-every", "-5"], "eval_every must be at least 1, got -5"),
        (["--eval-episodes", "0"], "eval_episodes must be at least 1"),
        (["--preset", "huge"], "valid presets"),
        (["--threads", "-1"], "threads must be >= 0"),
        (["--obs", "pixels", "--methods", "dreamer,ppo"], "ppo: from state only"),
        pytest.param(
            ["--device", "cuda"],
            "cannot be used: no usable NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here"),
        ),
    ],
)
def test_mistakes_are_explained(options, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "walker", "--methods", "dreamer", *options]) == 1
    text = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert says in text and "Traceback" not in text, text
    assert not list(tmp_path.iterdir())  # a refused command leaves nothing behind


def test_a_missing_extra_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ConfigError, match=r"sac and ppo: .*pip install 'fastdreamer\[compare\]'"):
        run(tmp_path / "out", TINY, ["dreamer", "sac", "ppo"])
    assert not (tmp_path / "out").exists()


def test_another_setting_in_the_same_directory_is_refused(dreamer):
    with pytest.raises(ConfigError, match="was started with frames 160, not 400"):
        run(dreamer, dataclasses.replace(TINY, frames=400), ["dreamer"])


def test_damage_and_emptiness_are_named(tmp_path):
    (tmp_path / "dreamer-seed0-old").mkdir()  # somebody's, and no run of the comparison
    with pytest.raises(RunError, match="holds no evaluation yet"):
        write_results(tmp_path)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(RunError, match=r"compare\.json: damaged"):
        run(tmp_path, TINY, ["dreamer"])
