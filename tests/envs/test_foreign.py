"""Environments from elsewhere: gymnasium's, registered or made by a function, and episodes that
end."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from fastdreamer.acting.parts import acting_parts
from fastdreamer.acting.play import collect, episode_seed, evaluate
from fastdreamer.analysis.report import EpisodeOver, dream_and_live
from fastdreamer.cli import main
from fastdreamer.config import ConfigError, preset, to_dict
from fastdreamer.envs import canonical_task, make_env
from fastdreamer.learning import losses
from fastdreamer.learning.dreamer import Dreamer
from fastdreamer.training.checkpoint import checkpoint_path, save_checkpoint
from fastdreamer.training.episodes import episode_path, read_episode
from fastdreamer.training.trainer import Trainer, write_config
from fastdreamer.training.worker import Player, Share

pytest.importorskip("gymnasium")

# One step right is worth 1; the episode ends, for good, beyond 3.
MODULE = """
import gymnasium, numpy as np
from gymnasium import spaces

print("imported")

class Line(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"
    def __init__(self, observations=None, actions=None):
        self.observation_space = observations or spaces.Box(-9, 9, (1,), np.float64)
        self.action_space = actions or spaces.Box(-1.0, 3.0, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(0, 1)
        return self._see(), {}
    def step(self, action):
        self.x += float(action[0])
        return self._see(), float(action[0]), self.x > 3, False, {}
    def _see(self):
        space = self.observation_space
        if space.dtype == np.uint8:
            return np.full(space.shape, int(abs(self.x) * 10), np.uint8)
        return np.full(space.shape, self.x)
    def render(self):
        return np.full((20, 30, 3), int(abs(self.x) * 10), np.uint8)

class Reused(Line):
    # its observations are one array, which it writes again and again
    seen = None
    def _see(self):
        now = super()._see().astype(self.observation_space.dtype)
        self.seen = now if self.seen is None else self.seen
        self.seen[...] = now
        return self.seen

class Brief(Line):
    # ends by a limit of its own, of which nobody is told
    def reset(self, **how):
        self.left = 5
        return super().reset(**how)
    def step(self, action):
        self.left -= 1
        seen, reward, over, _, info = super().step(action)
        return seen, reward, over, self.left == 0, info

class Shimmed(Line):
    # dm_control's environment inside, as in shimmy: 25 "frames a second" for steps of 25 ms
    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    def __init__(self, **how):
        super().__init__(**how)
        from dm_control import suite
        self._env = suite.load("walker", "walk")

class Veiled(Line):
    def render(self): return np.zeros((20, 30, 4), np.uint8)

def line(): return Line()
def reused(): return Reused(spaces.Box(-9, 9, (1,), np.float32))
def reused_images(): return Reused(spaces.Box(0, 255, (64, 64, 3), np.uint8))
def images(): return Line(spaces.Box(0, 255, (32, 32, 1), np.uint8))
def choices(): return Line(actions=spaces.Discrete(2))
def whole(): return Line(actions=spaces.Box(0, 3, (1,), np.int64))
def brief(): return Brief(actions=spaces.Box(-1, 0, (1,)))
def shimmed(): return gymnasium.wrappers.TimeLimit(Shimmed(actions=spaces.Box(-1, 0, (1,))), 1000)
def limited(): return gymnasium.wrappers.TimeLimit(Line(actions=spaces.Box(-1, 0, (1,))), 1500)
def channels_first(): return Line(spaces.Box(0, 255, (3, 32, 32), np.uint8))
def grey(): return Line(spaces.Box(0, 255, (32, 32), np.uint8))
def memory(): return Line(spaces.Box(0, 255, (128,), np.uint8))
def veiled(): return Veiled()
def endless(): return Line(actions=spaces.Box(-np.inf, np.inf, (1,), np.float32))
def huge(): return Line(actions=spaces.Box(-3.4e38, 3.4e38, (1,), np.float32))
def parts(): return Line(spaces.Dict({"a": spaces.Box(0, 1, (1,))}))
def nothing(): return None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "line_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "line_of_mine", raising=False)
    yield tmp_path
    sys.modules.pop("line_of_mine", None)


def test_a_registered_environment_is_played_as_gymnasium_plays_it():
    import gymnasium

    ours = make_env("gym:Pendulum-v1", obs="state", action_repeat=1, seed=5)
    theirs = gymnasium.make("Pendulum-v1")
    assert ours.max_decisions == 200 and ours.obs_shapes == {"state": (3,)}
    for seed in (3, 4):
        obs, (seen, _) = ours.reset(seed=seed), theirs.reset(seed=seed)
        rng, over, count = np.random.default_rng(seed), False, 0
        while not over:
            assert obs["state"].dtype == np.float32 and np.array_equal(obs["state"], seen)
            action = rng.uniform(-1, 1, 1).astype(np.float32)
            obs, reward, terminated, over, frames = ours.step(action)
            seen, theirs_reward, _, theirs_over, _ = theirs.step(2 * action)  # in its own units
            assert reward == pytest.approx(theirs_reward, rel=1e-6)
            assert (terminated, over, frames) == (False, theirs_over, 1)
            count += 1
        assert count == 200
    first = [ours.reset()["state"] for _ in range(2)]
    assert not np.array_equal(*first), "without a seed it goes on with its generator"
    again = make_env("gym:Pendulum-v1", obs="state", seed=5)
    other = make_env("gym:Pendulum-v1", obs="state", seed=5)
    assert np.array_equal(again.reset()["state"], other.reset()["state"])


def test_repeats_limits_and_ends(module):
    env = make_env("line_of_mine:line", obs="both", action_repeat=3, time_limit=0.8)
    assert env.max_decisions == 3 and env.decision_seconds == pytest.approx(0.3)
    obs = env.reset(seed=0)
    assert obs["pixels"].shape == (64, 64, 3) and obs["state"].shape == (1,)
    assert obs["pixels"][0, 0, 0] == int(obs["state"][0] * 10)
    # -1 is -1 and 1 is 3 in its units: two steps reach beyond 3 and end it for good
    _, reward, terminated, truncated, frames = env.step([0.0])
    assert (reward, terminated, truncated, frames) == (3.0, True, False, 3)
    env.reset(seed=0)
    outcomes = [env.step([-0.5])[1:] for _ in range(3)]
    assert outcomes == [(0.0, False, False, 3)] * 2 + [(0.0, False, True, 2)]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step([0.0])
    assert env.render(24, 48).shape == (24, 48, 3)


@pytest.mark.parametrize(
    ("task", "seconds", "steps"),
    [
        ("shimmed", 2.5, 100),
        ("limited", None, 1500),  # a wrapper's, of an environment without a specification
        ("limited", 100, 1000),
        ("limited", 200, 1500),  # ten steps a second: it would be longer than that
        ("line", None, 1000),
        ("line", 200, 2000),
        ("brief", 200, 2000),
    ],
)
def test_an_episode_is_as_long_as_it_may_be(module, task, seconds, steps):
    env = make_env(f"line_of_mine:{task}", obs="state", action_repeat=4, time_limit=seconds)
    assert env.max_decisions == -(-steps // 4)
    if task == "limited":
        env.reset(seed=0)
        over, frames = False, 0
        while not over:
            *_, over, made = env.step([0.0])
            frames += made
        assert frames == steps


def test_bytes_of_one_axis_are_numbers_and_images_have_three_channels(module):
    env = make_env("line_of_mine:memory", obs="state")
    assert env.reset(seed=0)["state"].shape == env.obs_shapes["state"] == (128,)
    with pytest.raises(ValueError, match=r"line_of_mine:veiled draws images of 4 channels"):
        make_env("line_of_mine:veiled", obs="pixels").reset(seed=0)


def test_observed_images_are_resized_and_grey_becomes_rgb(module):
    env = make_env("line_of_mine:images", obs="pixels")
    pixels = env.reset(seed=0)["pixels"]
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0, 0]).all()
    with pytest.raises(ValueError, match="observations are images; obs must be pixels, not state"):
        make_env("line_of_mine:images", obs="state")


@pytest.mark.parametrize(
    ("task", "kind", "rise"), [("reused", "state", 0.5), ("reused_images", "pixels", 5)]
)
def test_an_observation_stays_what_it_was_where_the_environment_reuses_its_array(
    module, task, kind, rise
):
    env = make_env(f"line_of_mine:{task}", obs=kind, action_repeat=1)
    seen = []
    policy = lambda obs: seen.append(obs[kind]) or np.full(1, -0.25, np.float32)  # noqa: E731
    arrays, frames = collect(env, policy, seed=3)  # in its units the action is 0.5
    rows = arrays[kind].reshape(frames + 1, -1)[:, 0].astype(float)
    assert frames >= 5 and np.allclose(np.diff(rows), rise, atol=1e-6)
    assert all(np.array_equal(*pair) for pair in zip(seen, arrays[kind], strict=False))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gym:CartPole-v1", r"actions are Discrete\(2\); only continuous ones"),
        ("gym:Pendulm-v1", "Did you mean: `Pendulum`"),
        ("gym:line_of_mine:Line-v0", "gymnasium would import a module for it"),
        ("line_of_mine:choices", "only continuous ones"),
        ("line_of_mine:whole", r"Box\(.*int64\); only continuous ones \(a Box of floats\)"),
        ("line_of_mine:channels_first", "bytes of several axes, but no images .*TransformObs"),
        ("line_of_mine:grey", "bytes of several axes, but no images .* FlattenObservation"),
        ("line_of_mine:endless", "range of an action is unbounded .* module:function"),
        ("line_of_mine:huge", "range of an action is unbounded .* module:function"),
        ("line_of_mine:parts", "observations are Dict.*FlattenObservation"),
        ("line_of_mine:nothing", "must return a gymnasium environment, got None"),
        ("line_of_mine:no", "cannot be loaded: .*no attribute 'no'"),
        ("no_such_module:line", "cannot be loaded: No module named"),
        ("a:b:c", "a task is domain-task, gym:ID or module:function"),
    ],
)
def test_what_cannot_be_played_says_why(module, task, message):
    with pytest.raises(ValueError, match=message):
        make_env(canonical_task(task))


def test_without_gymnasium_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ValueError, match="gym:Pendulum-v1 needs gymnasium: pip install 'fastd"):
        canonical_task("gym:Pendulum-v1")


def test_our_tasks_are_gymnasium_s():
    import gymnasium

    import fastdreamer.envs.gymnasium  # noqa: F401  (registers them)

    theirs = gymnasium.make("fastdreamer/walker-walk-v0", obs="state", time_limit=0.5)
    ours = make_env("walker-walk", obs="state", time_limit=0.5)
    assert np.array_equal(theirs.reset(seed=1)[0], ours.reset(seed=1)["state"])
    action = np.full(6, 0.5, np.float32)
    assert np.array_equal(theirs.step(action)[0], ours.step(action)[0]["state"])
    assert theirs.render() is None
    with pytest.raises(ValueError, match="render_mode must be rgb_array or None"):
        gymnasium.make("fastdreamer/walker-walk-v0", render_mode="ansi")
    starts = [
        gymnasium.make("fastdreamer/walker-walk-v0", obs="state", **seed).reset()[0].tobytes()
        for seed in ({}, {}, {"seed": 3}, {"seed": 3})
    ]
    assert len(set(starts)) == 3 and starts[2] == starts[3]


@pytest.mark.parametrize("task", ["gym:Pendulum-v1", "walker-walk"])
def test_random_actions_are_no_draws_of_the_environment(task, tmp_path):
    """The suite draws from another kind of generator, and its actions are what they always were."""
    from gymnasium.utils import seeding

    tiny = preset("tiny")
    config = dataclasses.replace(tiny, env=dataclasses.replace(tiny.env, task=task))
    player = Player(config, tmp_path, 1, lambda: None)
    player.play(Share(random=True, batches=[[0, 1]]), {})
    for episode in (0, 1):
        arrays, meta = read_episode(episode_path(tmp_path, episode))
        count = len(arrays["action"]) - 1
        theirs, _ = seeding.np_random(meta["seed"])
        drawn = theirs.uniform(-1, 1, (count, player.action_dim)).astype(np.float32)
        same = np.isin(arrays["action"][1:], drawn)
        assert not same.any() if task.startswith("gym:") else same.all()


# ---- ends are learned


def test_the_loss_of_continuations_by_hand():
    odds = torch.tensor([[2.0, -1.0]])
    got = losses.discount_loss(odds, torch.tensor([[False, True]]))
    want = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))) / 2
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_weights_are_the_probability_to_come_so_far():
    gamma = 0.9
    discount = gamma * torch.tensor([[0.5, 1.0], [0.25, 1.0], [0.1, 0.5]], requires_grad=True)
    weights = losses.survival_weights(discount, torch.tensor([False, True]), gamma)
    assert not weights.requires_grad
    assert weights == pytest.approx(np.array([[1, 0], [0.5, 0], [0.125, 0]]), rel=1e-6)


def batch_of(agent, T, B, terminated, seed=0):
    rng = np.random.default_rng(seed)
    state = np.where(terminated[..., None], 3.0, -3.0) + rng.normal(size=(T, B, 2)) / 10
    return {
        "state": torch.from_numpy(state.astype("f4")),
        "action": torch.from_numpy(rng.uniform(-1, 1, (T, B, 1)).astype("f4")),
        "reward": torch.ones(T, B),
        "terminated": torch.from_numpy(terminated),
        "is_first": torch.arange(T)[:, None].expand(T, B) == 0,
    }


def ending_agent(**behavior):
    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, discount=True),
        behavior=dataclasses.replace(tiny.behavior, **behavior),
        optim=dataclasses.replace(tiny.optim, model_lr=3e-3),
    )
    return Dreamer(config, {"state": (2,)}, 1)


def test_an_agent_learns_where_episodes_end():
    agent, rng = ending_agent(), np.random.default_rng(1)
    optimizers, generator = agent.make_optimizers(), torch.Generator().manual_seed(0)
    seen = [
        agent.update(batch_of(agent, 6, 8, rng.random((6, 8)) < 0.5, i), optimizers, generator)
        for i in range(150)
    ]
    assert seen[0]["discount_loss"] > 0.5 and seen[-1]["discount_loss"] < 0.1
    assert agent.return_params().discount is not None


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_is_learned_behind_an_end(weighted):
    agent = ending_agent(discount_weights=weighted)
    optimizers, generator = agent.make_optimizers(), torch.Generator().manual_seed(0)
    over = batch_of(agent, 4, 3, np.ones((4, 3), bool))
    values = agent.update(over, optimizers, generator)
    assert values["actor_loss"] == values["critic_loss"] == 0
    going = batch_of(agent, 4, 3, np.zeros((4, 3), bool))
    values = agent.update(going, optimizers, generator)
    assert values["actor_loss"] != 0 and values["critic_loss"] > 0


def test_a_planner_in_the_worker_gets_the_head():
    tiny = preset("tiny")
    mpc = dataclasses.replace(tiny.collect, controller="mpc")
    assert "model.discount" in acting_parts(dataclasses.replace(tiny, collect=mpc))


def test_gamma_0_and_ends_are_refused():
    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, discount=True),
        behavior=dataclasses.replace(tiny.behavior, gamma=0.0),
    )
    with pytest.raises(ConfigError, match="behavior.gamma must be > 0 with model.discount"):
        config.validate()


# ---- from the command line


def test_a_function_s_task_from_the_shell(module, capsys):
    """Trained, resumed and evaluated; a file alone has nothing imported."""
    options = ["--preset", "tiny", "--train.frames", "120", "--env.time-limit", "2"]
    assert main(["train", "line_of_mine:line", *options, "--run", "run"]) == 0
    config = json.loads((module / "run" / "config.json").read_text())
    assert config["env"]["task"] == "line_of_mine:line" and config["model"]["discount"] is True
    lines = (module / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("discount_loss" in line for line in lines)
    more = ["--resume", "run", "--train.frames", "160"]
    for command in (["eval", "run", "--episodes", "1"], ["report", "run"], ["train", *more]):
        sys.modules.pop("line_of_mine", None)
        capsys.readouterr()
        assert main(command) == 1
        captured = capsys.readouterr()
        text = " ".join((captured.out + captured.err).split())
        assert "not imported unasked" in text and "name it as well: line_of_mine:line" in text
        assert "imported\n" not in captured.out and "line_of_mine" not in sys.modules
    with pytest.raises(ConfigError, match=r"name it again by Trainer\(run_dir, config\)"):
        Trainer("run").train()
    assert "line_of_mine" not in sys.modules
    assert main(["train", "line_of_mine:line", *more]) == 0
    tiny = preset("tiny", {"env": {"task": "line_of_mine:line", "time_limit": 2.0}})
    Trainer("run", tiny).train(until=160)  # it is there already: nothing is refused
    assert main(["eval", "run", "--episodes", "1", "--task", "line_of_mine:line"]) == 0
    assert "line_of_mine:line: return" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("told", [None, "walker-walk"])
def test_a_checkpoint_s_task_is_not_imported_for_what_config_json_says(module, capsys, told):
    """Without one, or beside one of a task that may be imported."""
    config = preset("tiny", {"env": {"task": "line_of_mine:line", "time_limit": 2.0}})
    agent = Dreamer(config, {"state": (1,)}, 1)
    about = {"config": to_dict(config), "obs_shapes": agent.obs_shapes, "action_dim": 1}
    about["cursor"] = {"update": 1, "env_frames": 2}
    weights = {f"agent/{name}": value for name, value in agent.state_dict().items()}
    save_checkpoint(checkpoint_path(module / "run" / "checkpoints", 1), weights, about)
    if told:
        write_config(module / "run", preset("tiny", {"env": {"task": told}}))
    for command in (["eval", "run", "--episodes", "1"], ["dream", "run"], ["watch", "run"]):
        capsys.readouterr()
        assert main(command) == 1
        text = " ".join(capsys.readouterr().err.split())
        assert "not imported unasked" in text and "name it as well: line_of_mine:line" in text
        assert "line_of_mine" not in sys.modules
    assert main(["eval", "run", "--episodes", "1", "--task", "line_of_mine:line"]) == 0
    assert "line_of_mine:line: return" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("task", ["line_of_mine:line", "line_of_mine:brief"])
def test_a_report_of_episodes_that_are_over_early(module, capsys, task):
    """For good, or by a limit of the environment's that is not told before."""
    options = ["--preset", "tiny", "--train.frames", "40", "--env.time-limit", "20"]
    assert main(["train", task, *options, "--run", "run"]) == 0
    few = ["--episodes", "1", "--points", "1", "--plan.iterations", "1"]
    assert main(["report", "run", "--task", task, *few]) == 0, capsys.readouterr().err
    files = ["episodes.csv", "actor.csv", "mpc.csv", "figure-3.png", "figure-5.png"]
    files += ["figure-5.csv", "figure-4.png"]
    assert {path.name for path in (module / "report").iterdir()} == set(files)
    assert (module / "report" / "figure-4.png").stat().st_size > 0


@pytest.mark.parametrize("task", ["line_of_mine:line", "line_of_mine:brief"])
def test_a_dream_of_an_episode_that_is_over_early(module, task):
    env = make_env(task, obs="state", action_repeat=2)
    agent, told = Dreamer(preset("tiny"), env.obs_shapes, env.action_dim), []
    evaluate(agent, env, episode_seed(0, "evaluate", 0), watch=lambda *step: told.append(step[0]))
    length = told[-1]
    for context in range(length):
        imagined, real = dream_and_live(agent, env, context=context, decisions=50, seed=0)
        assert imagined["state"].shape == real["state"].shape
        if task.endswith("brief"):
            assert len(real["state"]) == length - context == 3 - context
        else:
            assert real["state"][-1] > 3 and (real["state"][:-1] <= 3).all()
    for context in (length, 50):
        says = rf"ended after {length} decisions?, within the context of {context}: choose"
        with pytest.raises(EpisodeOver, match=says) as over:
            dream_and_live(agent, env, context=context, decisions=50, seed=0)
        assert over.value.decisions == length


def test_the_command_dream_says_which_context_is_too_long(module, capsys):
    tiny = preset("tiny")
    env = dataclasses.replace(tiny.env, task="line_of_mine:brief", obs="pixels", time_limit=20.0)
    config = dataclasses.replace(tiny, env=env)
    agent = Dreamer(config, {"pixels": (64, 64, 3)}, 1)
    about = {"config": to_dict(config), "obs_shapes": agent.obs_shapes, "action_dim": 1}
    weights = {f"agent/{name}": value for name, value in agent.state_dict().items()}
    save_checkpoint(module / "agent.safetensors", weights, about)
    command = ["dream", "agent.safetensors", "--task", "line_of_mine:brief", "--decisions", "9"]
    assert main(command) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the episode ended after 3 decisions, within the context of 50: choose a smaller" in said
    assert main([*command, "--context", "1"]) == 0
    assert (module / "dream.png").stat().st_size > 0


def test_the_suite_learns_no_ends_unless_asked(tmp_path):
    short = ["--preset", "tiny", "--train.frames", "120", "--run", str(tmp_path / "run")]
    assert main(["train", "walker", *short]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["discount"] is False
