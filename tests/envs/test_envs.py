"""Environments: tasks by name, actions, repeats, observations, time limits, seeds."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from fastdreamer.envs import EnvError, canonical_task, dmc, list_tasks, make_env
from fastdreamer.envs.gl import GLError


def play(env, seed, decisions=4):
    """Observations (as bytes) and rewards of one episode of random actions."""
    rng = np.random.default_rng(seed)
    observations, rewards = [env.reset(seed=seed)], []
    for _ in range(decisions):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, env.action_dim).astype(np.float32))
        observations.append(obs)
        rewards.append(reward)
    return [b"".join(v.tobytes() for v in obs.values()) for obs in observations], rewards


def digest(env, seed):
    observations, rewards = play(env, seed)
    return hashlib.sha256(b"".join(observations) + np.array(rewards).tobytes()).hexdigest()


def run_python(code, **environ):
    """The words that `code` prints in a fresh process without a GL choice of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environ}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ---- names


def test_list_tasks():
    tasks = list_tasks()
    assert {"walker-walk", "walker-stand", "walker-run", "cheetah-run"} <= set(tasks)
    assert {"ball_in_cup-catch", "humanoid_CMU-run"} <= set(tasks)
    assert list(tasks) == sorted(set(tasks))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("walker", "walker-walk"),
        ("walker_walk", "walker-walk"),
        (" Walker-Run ", "walker-run"),
        ("ball-in-cup-catch", "ball_in_cup-catch"),
        ("humanoid_cmu_stand", "humanoid_CMU-stand"),
        ("cartpole-swingup_sparse", "cartpole-swingup_sparse"),
    ],
)
def test_canonical_task(name, task):
    assert canonical_task(name) == task


def test_every_task_is_its_own_canonical_name():
    assert [canonical_task(task) for task in list_tasks()] == list(list_tasks())


def test_unknown_task_lists_all_with_the_nearest_first():
    with pytest.raises(ValueError, match="unknown task 'walker-wlak'") as caught:
        make_env("walker-wlak")
    listed = str(caught.value).split("of the suite: ")[1].split(", ")
    assert listed[0] == "walker-walk"
    assert sorted(listed) == list(list_tasks())


def test_unknown_task_like_no_other():
    with pytest.raises(
        ValueError, match="unknown task '' *; valid tasks: .*of the suite: acrobot-swingup"
    ):
        canonical_task("")


# ---- actions


class Recorder:
    """Stands in for a suite task: records the control steps, ends after `length` of them."""

    name = "recorder"
    action_min = np.array([-1.0, 0.0, -4.0])
    action_max = np.array([1.0, 2.0, 0.0])
    state_size = 1
    control_step = 0.01

    def __init__(self, length, discount=1.0):
        self.max_steps, self._discount = length, discount
        self.controls, self.renders = [], 0

    def reset(self, seed=None):
        self.controls = []

    def step(self, control):
        self.controls.append(control)
        last = len(self.controls) == self.max_steps
        end = last and self._discount == 0.0
        return float(len(self.controls)), end, last and not end

    def state(self):
        return np.array([len(self.controls)], np.float32)

    def render(self, height, width):
        self.renders += 1
        return np.full((height, width, 3), len(self.controls), np.uint8)


def recorded(length=100, obs="both", action_repeat=2, **kwargs):
    from fastdreamer.envs import Env

    task = Recorder(length, **kwargs)
    return task, Env(task, obs=obs, action_repeat=action_repeat, image_size=8)


def test_actions_are_mapped_to_the_range_of_each_actuator():
    task, env = recorded(action_repeat=1)
    env.reset()
    for value, expected in [(-1, [-1, 0, -4]), (0, [0, 1, -2]), (1, [1, 2, 0])]:
        env.step(np.full(3, value, np.float32))
        np.testing.assert_array_equal(task.controls[-1], expected)


def test_a_task_that_needs_opengl_from_state_says_so(monkeypatch):
    def nothing_draws():
        raise GLError("no GL; from state none is needed")

    monkeypatch.setattr(dmc, "select_gl", nothing_draws)
    with pytest.raises(GLError, match=r"none is needed, but quadruped-escape does: it hands"):
        make_env("quadruped-escape", obs="state")


def test_quadruped_reaches_the_real_limits():
    env = make_env("quadruped-walk", obs="state")
    spec = env._task._env.action_spec()
    assert spec.maximum.max() > 1  # not already normalised
    env.reset(seed=0)
    for value, limit in [(1, spec.maximum), (-1, spec.minimum)]:
        env.step(np.full(env.action_dim, value, np.float32))
        np.testing.assert_allclose(env._task._env.physics.control(), limit, atol=1e-12)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (np.zeros(2), r"shape \(3,\), got \(2,\)"),
        (np.zeros((1, 3)), r"shape \(3,\), got \(1, 3\)"),
        (np.float32(0), r"shape \(3,\), got \(\)"),
        (np.array([0, np.nan, 0]), "not finite"),
        (np.array([0, np.inf, 0]), "not finite"),
        (np.array([0, 1.01, 0]), r"lie in \[-1, 1\]"),
    ],
)
def test_bad_action(action, text):
    task, env = recorded()
    env.reset()
    with pytest.raises(ValueError, match=text):
        env.step(action)
    assert task.controls == []  # nothing was done


def test_unbounded_actuators_get_unit_range():
    env = make_env("lqr-lqr_2_1", obs="state")
    env.reset(seed=0)
    env.step(np.array([0.5], np.float32))
    assert env._task._env.physics.control() == [0.5]
    assert env.max_decisions == 500  # and a time limit, which the task does not have


# ---- repeats, rendering, ends


def test_reward_is_summed_and_one_image_is_drawn_a_decision():
    task, env = recorded(action_repeat=3)
    env.reset()
    assert task.renders == 1
    obs, reward, terminated, truncated, env_frames = env.step(np.zeros(3))
    assert (reward, terminated, truncated, env_frames) == (1 + 2 + 3, False, False, 3)
    assert (obs["pixels"][0, 0, 0], obs["state"][0]) == (3, 3)  # as after the last control step
    env.step(np.zeros(3))
    assert task.renders == 3


def test_one_real_render_a_decision(monkeypatch):
    from dm_control import mujoco

    env = make_env("walker", action_repeat=4)
    env.reset(seed=0)
    calls = []
    render = mujoco.Camera.render
    monkeypatch.setattr(mujoco.Camera, "render", lambda self: calls.append(1) or render(self))
    for _ in range(3):
        env.step(np.zeros(6))
    assert len(calls) == 3


def test_state_alone_draws_nothing():
    task, env = recorded(obs="state")
    env.reset()
    env.step(np.zeros(3))
    assert task.renders == 0


@pytest.mark.parametrize(("discount", "end"), [(1.0, (False, True)), (0.0, (True, False))])
def test_an_episode_may_end_within_a_repeat(discount, end):
    _, env = recorded(length=5, discount=discount)
    env.reset()
    assert env.max_decisions == 3
    results = [env.step(np.zeros(3))[1:] for _ in range(3)]
    assert results == [(3, False, False, 2), (7, False, False, 2), (5, *end, 1)]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(3))
    env.reset()
    env.step(np.zeros(3))


def test_step_before_reset():
    with pytest.raises(RuntimeError, match="call reset"):
        recorded()[1].step(np.zeros(3))


def test_walker_episode_is_1000_frames_in_500_decisions():
    env = make_env("walker", obs="state")
    assert (env.max_decisions, env.action_repeat, env.action_dim) == (500, 2, 6)
    assert env.decision_seconds == pytest.approx(0.05)
    env.reset(seed=0)
    results = [env.step(np.zeros(6))[2:] for _ in range(500)]
    assert results == [(False, False, 2)] * 499 + [(False, True, 2)]


@pytest.mark.parametrize("seconds", [0.075, 0.3, 0.7])  # 3, 12, 28 steps of 25 ms
def test_time_limit(seconds):
    env = make_env("walker", obs="state", time_limit=seconds)
    env.reset(seed=0)
    frames, decisions, over = 0, 0, False
    while not over:
        _, _, terminated, over, env_frames = env.step(np.zeros(6))
        frames, decisions = frames + env_frames, decisions + 1
        assert not terminated
    assert frames == round(seconds / 0.025)
    assert decisions == env.max_decisions == -(-frames // 2)


def test_a_true_end_is_no_time_limit(monkeypatch):
    env = make_env("walker", obs="state")
    env.reset(seed=0)
    monkeypatch.setattr(env._task._env.task, "get_termination", lambda physics: 0.0)
    assert env.step(np.zeros(6))[2:] == (True, False, 1)
    env = make_env("walker", obs="state", time_limit=0.1)  # four control steps
    env.reset(seed=0)
    env.step(np.zeros(6))
    monkeypatch.setattr(env._task._env.task, "get_termination", lambda physics: 1.0)
    assert env.step(np.zeros(6))[2:] == (False, True, 1)  # given up, neither end nor limit
    env.reset(seed=0)
    monkeypatch.undo()
    env.step(np.zeros(6))
    count = iter([None, 0.0])  # at the limit itself nobody asks for an end
    monkeypatch.setattr(env._task._env.task, "get_termination", lambda physics: next(count))
    assert env.step(np.zeros(6))[2:] == (False, True, 2)


def test_a_simulation_that_diverges_cuts_its_episode_off(monkeypatch, caplog):
    """Else a run could not go on: the episode is a function of its seed, and fails again."""
    env = make_env("walker", obs="both", render="rays", action_repeat=3)
    env.reset(seed=0)
    last = env.step(np.full(6, 0.5))[0]
    physics = env._task._env.physics
    step = physics.step

    def diverge(steps):
        physics.data.qvel[:] = 1e12
        step(steps)

    monkeypatch.setattr(physics, "step", diverge)
    obs, *outcome = env.step(np.ones(6))
    assert outcome == [0.0, False, True, 1]
    assert all(np.array_equal(obs[kind], last[kind]) for kind in ("state", "pixels"))
    assert "walker-walk: an episode is cut off at step 4: Physics state is invalid" in caplog.text
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(6))
    monkeypatch.undo()
    env.reset(seed=0)
    again = env.step(np.full(6, 0.5))[0]
    assert all(np.array_equal(again[kind], last[kind]) for kind in ("state", "pixels"))


# ---- observations


@pytest.mark.parametrize("obs", ["pixels", "state", "both"])
def test_observations_have_the_promised_shapes(obs):
    env = make_env("walker", obs=obs, image_size=32)
    promised = {"pixels": (32, 32, 3), "state": (24,)}
    kinds = ["pixels", "state"] if obs == "both" else [obs]
    assert env.obs_shapes == {kind: promised[kind] for kind in kinds}
    for values in (env.reset(seed=0), env.step(np.zeros(6))[0]):
        assert {k: v.shape for k, v in values.items()} == env.obs_shapes
        for kind, value in values.items():
            assert value.dtype == (np.uint8 if kind == "pixels" else np.float32)
            assert value.flags.c_contiguous
            assert value.flags.owndata  # not a buffer that the next step overwrites


def test_state_is_the_observation_dict_in_its_order():
    env = make_env("cheetah-run", obs="state")
    state = env.reset(seed=5)["state"]
    suite = env._task._env
    obs = suite.task.get_observation(suite.physics)
    assert list(obs) == ["position", "velocity"]
    expected = np.concatenate([obs["position"], obs["velocity"]]).astype(np.float32)
    np.testing.assert_array_equal(state, expected)


def test_scalars_and_matrices_are_flattened():
    assert make_env("humanoid-walk", obs="state").obs_shapes == {"state": (67,)}
    env = make_env("manipulator-bring_ball", obs="state")  # has an 8 × 2 observation
    assert env.reset(seed=0)["state"].shape == env.obs_shapes["state"] == (44,)


def test_cheetah_runs_from_both():
    env = make_env("cheetah-run", obs="both", time_limit=0.1)
    env.reset(seed=0)
    over, frames = False, 0
    while not over:
        obs, reward, terminated, truncated, env_frames = env.step(np.ones(6))
        over, frames = terminated or truncated, frames + env_frames
        assert 0 <= reward <= 2
        assert obs["pixels"].std() > 5
    assert frames == 10


def test_pixels_are_the_suite_own_with_a_smaller_shadow_map():
    env = make_env("walker")
    pixels = env.reset(seed=0)["pixels"].astype(float)
    reference = dmc._suite().load("walker", "walk", task_kwargs={"random": 0})
    reference.task.random.seed(0)
    reference.reset()
    expected = reference.physics.render(64, 64, camera_id=0).astype(float)
    assert np.abs(pixels - expected).mean() < 0.2  # of 255; 0.05 over an episode
    others = [
        make_env("walker", render_quality=quality).reset(seed=0)["pixels"].astype(float)
        for quality in ("fast", "matte", "unshadowed", "bare")
    ]
    differences = [np.abs(other - expected).mean() for other in others]
    assert 0.2 < differences[0] < 3 and differences == sorted(differences)
    fast, matte, unshadowed, bare = others
    assert matte.sum() < fast.sum()  # a mirror image adds light
    assert (bare[0] == 0).all() and unshadowed[0].min() > 0  # the top row is sky
    assert (unshadowed[0] == matte[0]).all() and (unshadowed[-1] != matte[-1]).any()


@pytest.mark.parametrize("task", ["dog-fetch", "dog-walk", "quadruped-fetch"])
def test_the_camera_follows_the_body_where_it_roams(task):
    """Of dog-fetch camera 0 looks at the ball from a fixed place, where no dog is."""
    env = make_env(task, obs="state")
    model = env._task._env.physics.model
    assert model.id2name(model.cam_bodyid[env._task._camera_id], "body") == "torso"


@pytest.mark.parametrize("obs", ["state", "pixels"])
def test_render_for_videos(obs):
    env = make_env("walker", obs=obs)
    first = env.reset(seed=0)
    small = env.render(48, 64)
    large = env.render(480, 1000)  # wider than the suite's own framebuffer
    assert env.render().shape == (240, 320, 3)
    assert (small.shape, large.shape) == ((48, 64, 3), (480, 1000, 3))
    assert large.dtype == np.uint8
    np.testing.assert_array_equal(env.render(48, 64), small)  # the larger one changed nothing
    assert env.reset(seed=0).keys() == first.keys()
    for kind, value in env.reset(seed=0).items():
        np.testing.assert_array_equal(value, first[kind])


def test_a_dm_control_that_keeps_its_framebuffer(monkeypatch):
    """It draws in the suite's own from the start; what does not fit there is refused."""
    expected = make_env("walker").reset(seed=0)["pixels"]
    monkeypatch.setattr(dmc, "_frees_contexts", lambda physics: False)
    monkeypatch.setattr(dmc, "_free_contexts", lambda physics: pytest.fail("it cannot"))
    env = make_env("walker")
    np.testing.assert_array_equal(env.reset(seed=0)["pixels"], expected)
    assert env.render().shape == (240, 320, 3)
    env.end_video()
    np.testing.assert_array_equal(env.reset(seed=0)["pixels"], expected)
    with pytest.raises(GLError, match="1000 × 480 do not fit the 640 × 480 that dm_control"):
        env.render(480, 1000)


def test_the_framebuffer_after_a_video():
    """Larger images than observations make it grow, end_video gives it back; no image changes."""
    env = make_env("walker", obs="pixels")
    buffer = env._task._env.physics.model.vis.global_
    size = lambda: (buffer.offheight, buffer.offwidth)  # noqa: E731
    first = env.reset(seed=0)["pixels"]
    assert size() == (64, 64)
    env.end_video()  # there was none
    contexts = env._task._env.physics.contexts
    assert size() == (64, 64)
    large = env.render(240, 320)
    assert size() == (240, 320) and env._task._env.physics.contexts is not contexts
    env.end_video()
    assert size() == (64, 64)
    np.testing.assert_array_equal(env.reset(seed=0)["pixels"], first)
    contexts = env._task._env.physics.contexts
    env.step(np.zeros(6))
    env.end_video()
    assert env._task._env.physics.contexts is contexts  # nothing to give back
    env.reset(seed=0)
    np.testing.assert_array_equal(env.render(240, 320), large)
    env.close()
    state = make_env("walker", obs="state")
    state.reset(seed=0)
    state.render(48, 64)
    state.end_video()
    buffer = state._task._env.physics.model.vis.global_
    assert (buffer.offheight, buffer.offwidth) == (1, 1)
    assert state.render(48, 64).any()
    state.close()


def test_environments_draw_side_by_side():
    """Contexts of their own in one process: what one draws does not depend on another."""
    alone = []
    for seed in range(3):
        env = make_env("walker", obs="pixels")
        alone.append(play(env, seed))
        env.close()
    envs = [make_env("walker", obs="pixels") for _ in range(3)]
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    together = [[env.reset(seed=seed)] for seed, env in enumerate(envs)]
    for _ in range(4):
        for env, rng, seen in zip(envs, rngs, together, strict=True):
            action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
            seen.append(env.step(action)[0])
    for (images, _), seen in zip(alone, together, strict=True):
        assert images == [obs["pixels"].tobytes() for obs in seen]
    for env in envs:
        env.close()


def test_render_does_not_disturb_the_episode():
    plain, watched = make_env("walker", obs="state"), make_env("walker", obs="state")
    plain.reset(seed=1)
    watched.reset(seed=1)
    for _ in range(5):
        watched.render(32, 32)
        a, b = plain.step(np.ones(6) / 2), watched.step(np.ones(6) / 2)
        np.testing.assert_array_equal(a[0]["state"], b[0]["state"])
        assert a[1] == b[1]


# ---- seeds


@pytest.mark.parametrize(
    "task", ["walker-walk", "point_mass-hard", "finger-turn_hard", "lqr-lqr_6_2"]
)
def test_an_episode_is_a_function_of_its_seed(task):
    used, new = make_env(task, obs="both", seed=1), make_env(task, obs="both", seed=2)
    play(used, seed=3)
    assert play(used, seed=9) == play(new, seed=9)
    assert play(used, seed=9) != play(used, seed=10)


def test_make_env_seed_starts_the_generator():
    states = [make_env("walker", obs="state", seed=s).reset()["state"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(states[0], states[1])
    assert (states[0] != states[2]).any()
    env = make_env("walker", obs="state", seed=0)
    assert (env.reset()["state"] != env.reset()["state"]).any()  # and goes on


def test_frames_are_equal_in_every_process():
    here = os.path.dirname(os.path.abspath(__file__))
    code = (
        f"import sys; sys.path.insert(0, {here!r})\n"
        "from test_envs import digest, make_env\n"
        "print(digest(make_env('walker', obs='both'), 4))"
    )
    mine = digest(make_env("walker", obs="both"), 4)
    assert run_python(code) == [mine]
    assert run_python(code, LP_NUM_THREADS="2") == [mine]  # llvmpipe on other threads


# ---- without OpenGL


@pytest.mark.parametrize("choice", ["garbage", None])
def test_state_never_touches_gl(choice):
    code = (
        "import sys, os\n"
        "from fastdreamer.envs import make_env\n"
        "env = make_env('walker', obs='state')\n"
        "env.reset(seed=0); env.step([0] * 6); env.close()\n"
        "loaded = {'OpenGL', 'glfw'} & set(sys.modules)\n"
        "print(len(loaded), os.environ.get('MUJOCO_GL'))"
    )
    words = run_python(code, **({"MUJOCO_GL": choice} if choice else {}))
    assert words == ["0", str(choice)]  # and the user's variable is as it was


# ---- bad arguments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"obs": "sound"}, "obs must be one of pixels, state, both"),
        ({"action_repeat": 0}, "action_repeat must be at least 1"),
        ({"time_limit": 0.0}, "time_limit must be at least one control step"),
        ({"time_limit": float("nan")}, "time_limit must be at least one control step"),
        ({"render": "vulkan"}, "render must be one of opengl, rays, got 'vulkan'"),
        (
            {"render_quality": "ultra"},
            "render_quality must be one of full, fast, matte, un",
        ),
        ({"image_size": 0}, "image_size must be at least 1"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        make_env("walker", **arguments)


def test_close_twice():
    env = make_env("walker", obs="both")
    env.reset(seed=0)
    env.close()
    env.close()
    for call in (
        env.reset, env.render, env.end_video, lambda: env.reset(seed=1),
        lambda: env.step(np.zeros(6)),
    ):  # fmt: skip
        with pytest.raises(EnvError, match=r"^walker-walk: \w+\(\) after close\(\): make another"):
            call()


def test_triton_can_be_imported_after_rendering():
    """Mesa's LLVM and Triton's in one process: a segmentation fault in the wrong order."""
    pytest.importorskip("triton")
    words = run_python(
        "from fastdreamer.envs import make_env\n"
        "make_env('walker-walk', time_limit=0.5).reset()\n"
        "import triton\n"
        "print('survived')"
    )
    assert "survived" in words
