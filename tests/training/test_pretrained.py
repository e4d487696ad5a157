"""Agents as single files, and those that come with the package."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch

import fastdreamer
from fastdreamer.cli import main
from fastdreamer.config import (
    ConfigError,
    EnvConfig,
    ExploreConfig,
    SafetyConfig,
    from_dict,
    preset,
    to_dict,
)
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training import pretrained
from fastdreamer.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastdreamer.training.pretrained import export_agent, find_agent
from fastdreamer.training.trainer import Trainer, create_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run from both kinds of observation."""
    path, tiny = tmp_path_factory.mktemp("pretrained") / "run", preset("tiny")
    env = EnvConfig(obs="both", time_limit=0.5)
    train = dataclasses.replace(tiny.train, frames=100)
    evaluation = dataclasses.replace(tiny.eval, every=0)
    create_run(path, dataclasses.replace(tiny, env=env, train=train, eval=evaluation))
    Trainer(path).train()
    return path


def observation(agent):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, agent.obs_shapes["pixels"], dtype=np.uint8)
    return {"pixels": pixels, "state": rng.normal(size=agent.obs_shapes["state"]).astype("f4")}


def test_an_exported_agent_acts_as_the_run_s(run, tmp_path):
    own = fastdreamer.load(run)
    whole = fastdreamer.load(export_agent(run, tmp_path / "whole.safetensors", half=False))
    half = fastdreamer.load(export_agent(run, tmp_path / "half.safetensors"))
    for (name, a), b, c in zip(
        own.state_dict().items(), whole.state_dict().values(), half.state_dict().values(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b), name
        assert c.dtype == a.dtype and torch.equal(c, a.half().float()), name
    actions = [agent.act(observation(own), None)[0] for agent in (own, whole, half)]
    assert np.array_equal(actions[0], actions[1])
    assert np.allclose(actions[0], actions[2], atol=2e-3)
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("whole", "half")]
    assert sizes[1] < 0.65 * sizes[0]
    tensors, meta = load_checkpoint(tmp_path / "half.safetensors")
    assert {name.partition("/")[0] for name in tensors} == {"agent"}
    assert set(meta["cursor"]) == {"update", "env_frames"}
    assert meta["cursor"]["env_frames"] == 100


def test_of_critic_and_target_half_an_agent_has_the_one_that_plans(tmp_path):
    config = preset("tiny", {"behavior": {"target_every": 7}})
    agent = Dreamer(config, {"state": (24,)}, 6)
    with torch.no_grad():
        for critic in (agent.critic, agent.target_critic):
            for parameter in critic.parameters():
                parameter.normal_()
    about = {"config": to_dict(config), "obs_shapes": agent.obs_shapes, "action_dim": 6}
    about["cursor"] = {"update": 0, "env_frames": 0}
    weights = {f"agent/{name}": value for name, value in agent.state_dict().items()}
    save_checkpoint(tmp_path / "own.safetensors", weights, about)
    for half in (False, True):
        export_agent(tmp_path / "own.safetensors", tmp_path / "out.safetensors", half=half)
        loaded = fastdreamer.load(tmp_path / "out.safetensors")
        target = agent.target_critic.state_dict()
        for name, value in (target if half else agent.critic.state_dict()).items():
            expected = value.half().float() if half else value
            assert torch.equal(loaded.critic.state_dict()[name], expected), name
        for name, value in target.items():
            expected = value.half().float() if half else value
            assert torch.equal(loaded.target_critic.state_dict()[name], expected), name


@pytest.mark.parametrize("rounds", [4097, 100_001])
def test_half_an_agent_has_counted_as_far_as_the_whole(tmp_path, rounds):
    """Float16 holds whole numbers up to 2048 only, and nothing beyond 65504."""
    optimist = dataclasses.replace(preset("tiny"), explore=ExploreConfig("ucb", schedule="gp-ucb"))
    agent = Dreamer(optimist, {"state": (24,)}, 6)
    agent.explorer.rounds += rounds
    about = {"config": to_dict(optimist), "obs_shapes": agent.obs_shapes, "action_dim": 6}
    about["cursor"] = {"update": 0, "env_frames": 0}
    weights = {f"agent/{name}": value for name, value in agent.state_dict().items()}
    save_checkpoint(tmp_path / "whole.safetensors", weights, about)
    export_agent(tmp_path / "whole.safetensors", tmp_path / "half.safetensors")
    half = fastdreamer.load(tmp_path / "half.safetensors")
    assert half.explorer.rounds == rounds and half.explorer.beta == agent.explorer.beta
    stored, _ = load_checkpoint(tmp_path / "half.safetensors")
    kinds = {str(value.dtype): name for name, value in stored.items()}
    assert kinds.keys() == {"torch.float16", "torch.int64"}
    assert kinds["torch.int64"] == "agent/explorer.rounds"


def test_violations_of_who_learns_no_barrier_are_counted_where_the_state_is_seen(tmp_path, capsys):
    """PlaNet's, which a run with a signal would be refused for."""
    planet = preset("tiny", {"agent": "planet", "env": {"time_limit": 0.2}})
    agent = Dreamer(planet, {"state": (24,)}, 6)
    about = {"config": to_dict(planet), "obs_shapes": agent.obs_shapes, "action_dim": 6}
    about["cursor"] = {"update": 0, "env_frames": 0}
    weights = {f"agent/{name}": value for name, value in agent.state_dict().items()}
    path = tmp_path / "planet.safetensors"
    save_checkpoint(path, weights, about)
    assert main(["eval", str(path), "--episodes", "1", "--safety", "walker"]) == 0
    assert "violations: " in capsys.readouterr().out
    for safety, says in (
        (SafetyConfig("walker", alpha=2.0), "safety.alpha must be"),
        (SafetyConfig("height"), "safety.signal must be none, walker or"),
    ):
        with pytest.raises(ConfigError, match=says):
            fastdreamer.load(path, safety=safety)
    about["config"]["env"]["obs"] = "pixels"
    sees = Dreamer(from_dict(about["config"]), {"pixels": (64, 64, 3)}, 6)
    about["obs_shapes"] = sees.obs_shapes
    weights = {f"agent/{name}": value for name, value in sees.state_dict().items()}
    save_checkpoint(path, weights, about)
    with pytest.raises(ConfigError, match="env.obs must be state or both with safety"):
        fastdreamer.load(path, safety=SafetyConfig("walker"))


def test_what_float16_cannot_hold_is_refused(run, tmp_path, monkeypatch):
    tensors, meta = pretrained.load_newest(run / "checkpoints")[1:]
    name = next(n for n in tensors if n.startswith("agent/"))
    tensors[name] = torch.full_like(tensors[name], 1e6)
    monkeypatch.setattr(pretrained, "load_newest", lambda _: (None, tensors, meta))
    with pytest.raises(CheckpointError, match=f"{name} does not fit float16"):
        export_agent(run, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_and_commands(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(pretrained, "_SHIPPED", shipped)
    assert main(["export", str(run), str(shipped / "small.safetensors")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert find_agent("small") == shipped / "small.safetensors"
    agent = fastdreamer.load("small")
    assert set(agent.obs_shapes) == {"pixels", "state"}
    assert main(["eval", "small", "--episodes", "1", "--video", "small.mp4"]) == 0
    assert (tmp_path / "small.mp4").stat().st_size > 0
    assert main(["dream", "small", "--context", "3", "--decisions", "3"]) == 0
    assert (tmp_path / "dream.png").exists()
    capsys.readouterr()
    # a run of that name goes before what comes with the package
    shutil.copytree(run, tmp_path / "small")
    assert find_agent("small").is_dir()
    assert main(["eval", "large"]) == 1
    assert "agents that come with fastdreamer: small" in capsys.readouterr().err.replace("\n", " ")
    assert main(["export", "small", "small.pt"]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        export_agent(tmp_path / "empty", tmp_path / "no.safetensors")
    folder = run / "checkpoints"
    file = sorted(folder.iterdir())[-1]
    with pytest.raises(CheckpointError, match=f"{folder} is no run; .* a file of it, as {file}"):
        fastdreamer.load(folder)


def test_the_agent_that_comes_with_the_package_walks(tmp_path, monkeypatch, capsys):
    """Two episodes from pixels, by name, from anywhere."""
    monkeypatch.chdir(tmp_path)
    path = pretrained.pretrained()["walker-walk"]
    assert path.stat().st_size <= 5_000_000
    assert main(["eval", "walker-walk", "--episodes", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    returns = [float(value) for value in re.findall(r"episode \d: return (\d+\.\d)", text)]
    assert len(returns) == 2 and np.mean(returns) >= 800, returns
