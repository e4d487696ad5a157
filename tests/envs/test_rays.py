"""Pictures by rays: near OpenGL's, without OpenGL, the same in every process; what is refused."""

import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest

from fastdreamer import _native
from fastdreamer.config import sections
from fastdreamer.envs import dmc, make_env, rays
from fastdreamer.envs.gl import GLError, select_gl
from fastdreamer.envs.quality import QUALITIES, Quality

DECISIONS = 6


@pytest.fixture(scope="module")
def opengl():
    try:
        return select_gl()
    except GLError as error:
        pytest.skip(str(error))


def pictures(task="walker", seed=0, decisions=DECISIONS, **how):
    """Float images [decisions + 1, 64, 64, 3] of an episode of random actions."""
    env = make_env(task, **how)
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)["pixels"]]
    for _ in range(decisions):
        seen.append(env.step(rng.uniform(-1, 1, env.action_dim))[0]["pixels"])
    env.close()
    return np.array(seen)


def difference(a, b):
    """Mean absolute difference of each picture, of 255."""
    return np.abs(a.astype(float) - b.astype(float)).mean((1, 2, 3))


def digest(**how):
    return hashlib.sha256(pictures(render="rays", **how).tobytes()).hexdigest()


def test_the_setting_names_every_quality():
    assert get_args(sections.Quality) == tuple(QUALITIES)


# ---- near OpenGL's


@pytest.mark.parametrize("quality", QUALITIES)
def test_walker_is_near_opengl_s_picture(opengl, quality):
    expected = pictures(render_quality=quality)
    found = pictures(render="rays", render_quality=quality)
    assert difference(found, expected).max() < 1  # without the mirror image 1.1, without shadows 8
    others = [pictures(render="rays", render_quality=q, decisions=0) for q in QUALITIES]
    differences = [difference(found[:1], other)[0] for other in others]
    assert np.flatnonzero(np.array(differences) == 0) == list(QUALITIES).index(quality)


@pytest.mark.parametrize(
    "task",
    ["acrobot-swingup", "ball_in_cup-catch", "cartpole-swingup", "cheetah-run", "finger-turn_hard",
     "fish-swim", "hopper-hop", "humanoid-walk", "humanoid_CMU-run", "lqr-lqr_2_1",
     "manipulator-bring_ball", "pendulum-swingup", "point_mass-easy", "quadruped-fetch",
     "reacher-easy", "stacker-stack_2", "swimmer-swimmer6"],
)  # fmt: skip
def test_every_other_domain_is_near_opengl_s_picture(opengl, task):
    expected, found = pictures(task, decisions=2), pictures(task, decisions=2, render="rays")
    assert difference(found, expected).max() < 1.5


SHAPES = {
    "sphere": "<geom type='sphere' size='.4' pos='0 0 .6'/>",
    "capsule": "<geom type='capsule' size='.2 .4' pos='0 0 .7' euler='20 30 0'/>",
    "ellipsoid": "<geom type='ellipsoid' size='.2 .4 .6' pos='0 0 .7' euler='20 30 0'/>",
    "cylinder": "<geom type='cylinder' size='.3 .4' pos='0 0 .7' euler='20 30 0'/>",
    "box": "<geom type='box' size='.2 .3 .4' pos='0 0 .7' euler='20 30 0'/>",
    "veils": "<geom size='.3' pos='0 0 .5' rgba='1 0 0 .4'/><geom size='.2' pos='0 -.4 .5'/>"
    "<geom size='.3' pos='.2 -.9 .5' rgba='0 1 0 .6'/>",
    "behind a plane": "<geom type='plane' size='1 1 .1' pos='0 -1 .5' zaxis='0 1 0'/>"
    "<geom size='.3' pos='0 0 .5' rgba='1 0 0 1'/>",
    "directional": "<light directional='true' pos='0 0 3' dir='.3 .3 -1'/>"
    "<geom size='.3' pos='0 0 .5' rgba='1 0 0 1'/>",
    "cube texture": "<geom size='.5' pos='0 0 .6' material='cube'/>",
    "string": "<site name='a' pos='-.5 0 .3' size='.1'/><site name='b' pos='.5 0 1' size='.1'/>",
}
WORLD = """
<mujoco>
  <asset>
    <texture name="grid" type="2d" builtin="checker" rgb1=".1 .2 .3" rgb2=".2 .3 .4" width="300"
             height="300" mark="edge" markrgb=".2 .3 .4"/>
    <texture name="cube" builtin="checker" rgb1="1 0 0" rgb2="0 0 1" width="64" height="64"/>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".4 .6 .8" rgb2="0 0 0" width="100"
             height="100"/>
    <material name="grid" texture="grid" texrepeat="1 1" texuniform="true" reflectance=".3"/>
    <material name="cube" texture="cube"/>
  </asset>
  <worldbody>
    <camera pos="0 -2.5 1.2" euler="70 0 0"/>
    <light pos="0 0 2.5"/>
    <geom type="plane" size="3 2 .2" material="grid"/>
    {}
  </worldbody>
  {}
</mujoco>
"""
STRING = (
    "<tendon><spatial width='.05' rgba='0 1 0 1'><site site='a'/><site site='b'/></spatial>"
    "</tendon>"
)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lights_and_materials_as_in_opengl(opengl, shape):
    dmc._load_gl()
    from dm_control import mujoco

    xml = WORLD.format(SHAPES[shape], STRING if shape == "string" else "")
    physics = mujoco.Physics.from_xml_string(xml)
    found = rays.Rays(physics, 0, Quality()).draw(64, 64)
    expected = physics.render(64, 64, camera_id=0)
    empty = mujoco.Physics.from_xml_string(WORLD.format("", ""))
    drawn = difference(expected[None], empty.render(64, 64, camera_id=0)[None])[0]
    assert difference(found[None], expected[None])[0] < min(2.0, drawn / 3)


# ---- without OpenGL, and the same everywhere


@pytest.mark.parametrize("choice", ["disabled", "garbage", None])
def test_opengl_is_never_touched_and_other_processes_draw_the_same(choice):
    here = os.path.dirname(os.path.abspath(__file__))
    code = (
        f"import sys; sys.path.insert(0, {here!r})\n"
        "from test_rays import digest\n"
        "print(digest(), len({'OpenGL', 'glfw'} & set(sys.modules)))"
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environ |= {"MUJOCO_GL": choice} if choice else {}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(), "0"]


def test_a_picture_depends_on_the_state_alone():
    env = make_env("walker", render="rays")
    first = env.reset(seed=3)["pixels"]
    env.step(np.ones(6))
    large = env.render(240, 320)
    assert large.shape == (240, 320, 3) and large.dtype == np.uint8
    env.end_video()
    again = env.reset(seed=3)["pixels"]
    assert (first == again).all() and first is not again
    assert (first != env.reset(seed=4)["pixels"]).any()
    env.close()


def test_what_a_quality_leaves_out():
    dmc._suite()
    from dm_control import mujoco

    ball = "<geom size='.3' pos='0 0 .8'/>"
    dim = WORLD.replace("<light pos", "<light diffuse='.2 .2 .2' pos")  # no colour is clamped
    physics = mujoco.Physics.from_xml_string(dim.format(ball, ""))
    full, jagged, matte, unshadowed, bare = (
        rays.Rays(physics, 0, QUALITIES[name]).draw(64, 64).astype(int) for name in QUALITIES
    )
    assert (bare[0] == 0).all() and unshadowed[0].min() > 0  # the top row is sky
    assert (bare[32:] == unshadowed[32:]).all()
    for without, with_it in ((matte, unshadowed), (matte, jagged)):  # both take light away
        changed = (with_it - without).max(-1)
        assert (with_it - without).min() >= 0 and 20 < (changed > 5).sum() < 600
        assert (changed[:16] == 0).all()
    assert len(np.unique(full.reshape(-1, 3), axis=0)) > len(
        np.unique(jagged.reshape(-1, 3), axis=0)
    )


# ---- refusals


@pytest.mark.parametrize(
    ("task", "how", "text"),
    [
        ("dog-walk", {}, "dog-walk: rays cannot draw it, it has skins"),
        ("quadruped-escape", {}, "rays cannot draw it, it hands its terrain to OpenGL"),
        ("walker", {"render": "warp"}, "render must be one of opengl, rays, got 'warp'"),
        ("gym:Pendulum-v1", {}, "gym:Pendulum-v1 draws its own images: render=rays is for the sui"),
    ],
)
def test_what_rays_do_not_draw(task, how, text):
    with pytest.raises(ValueError, match=text):
        make_env(task, **{"render": "rays", **how})


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ("<geom type='plane' size='0 0 1'/>", "a plane without end"),
        ("<geom type='mesh' mesh='tetrahedron'/>", "meshes or height fields"),
        ("<geom size='1' material='flat'/>", "flat textures on solid bodies"),
        ("<light/>" * 8, "more than 7 lights"),
    ],
)
def test_models_that_rays_do_not_draw(shape, text):
    dmc._suite()
    from dm_control import mujoco

    assets = (
        "<asset><mesh name='tetrahedron' vertex='0 0 0 1 0 0 0 1 0 0 0 1'/>"
        "<texture name='flat' type='2d' builtin='flat' width='4' height='4'/>"
        "<material name='flat' texture='flat'/></asset>"
    )
    xml = f"<mujoco>{assets}<worldbody>{shape}<geom size='1'/></worldbody></mujoco>"
    assert text in rays.why_not(mujoco.Physics.from_xml_string(xml).model.ptr)


def test_without_the_core_rays_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdreamer._native", None)
    monkeypatch.delattr("fastdreamer._native")
    with pytest.raises(ValueError, match="cast by the compiled core, which is not available"):
        make_env("walker", render="rays")


def sphere(place=0, value=2):
    """The numbers of a sphere, one of them changed."""
    geom = np.zeros((1, 35), np.float32)
    geom[0, :4], geom[0, 7:10] = (2, -1, 0, 1), 1
    geom[0, place] = value
    return geom


def scene(**changes):
    camera = np.array([[0, -3, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0.1, 50, 0.6, 1]], np.float32)
    lights, pixels = np.zeros((0, 22), np.float32), np.zeros((8, 8, 3), np.uint8)
    given = {"geoms": sphere(), "lights": lights, "camera": camera, "pixels": pixels}
    flags = {"samples": 4, "reflection": True, "shadow": True, "sky": True}
    return given | flags | changes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"geoms": np.full((1, 35), np.nan, np.float32)}, "geoms must be finite"),
        ({"geoms": np.zeros((1, 34), np.float32)}, "geoms must be"),
        ({"geoms": np.zeros((1, 35), np.float32)}, "there is no such texture"),
        ({"geoms": sphere(9, 0)}, "size, and a plane's grid, must be positive"),
        ({"geoms": sphere(0, 0)}, "size, and a plane's grid, must be positive"),
        ({"geoms": np.ones((1, 35), np.float32)}, "there is no shape 1"),
        ({"lights": np.zeros((9, 22), np.float32)}, "at most 8 lights"),
        ({"camera": np.zeros((1, 15), np.float32)}, "camera's sizes must be positive"),
        ({"pixels": np.zeros((0, 8, 3), np.uint8)}, "none of them 0"),
        ({"pixels": np.zeros((8, 8, 3), np.float32)}, "pixels must be"),
        ({"samples": 2}, "samples must be 1 or 4"),
    ],
)
def test_the_core_checks_what_it_is_given(changes, text):
    caster = _native.RayCaster([], -1)
    caster.draw(**scene())
    with pytest.raises(ValueError, match=text):
        caster.draw(**scene(**changes))


def test_two_threads_draw_at_once():
    """Small pictures beside large ones, by one caster: each is that of a caster of its own."""
    geoms = np.repeat(sphere(), 20, 0)
    geoms[:, 4:7], geoms[:, 7:10] = np.random.default_rng(0).uniform(-1, 1, (20, 3)), 0.3
    geoms[:, 10:19], geoms[:, 19:24] = np.eye(3).ravel(), 1  # not turned; white,
    geoms[:, 23] = np.linspace(0.2, 1, 20)  # and of several brightnesses

    def draw(caster, size):
        pixels = np.zeros((size, size, 3), np.uint8)
        caster.draw(**scene(geoms=geoms, pixels=pixels))
        return pixels

    caster, done = _native.RayCaster([], -1), threading.Event()
    equal, beside = [], []
    large, small = (draw(_native.RayCaster([], -1), size) for size in (256, 64))
    assert len(np.unique(large)) > 15 and len(np.unique(small)) > 15

    def draw_small():
        while not done.is_set():
            beside.append(np.array_equal(draw(caster, 64), small))

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw_small)
        try:
            while not drawing.done() and (len(equal) < 50 or len(beside) <= 5):
                equal.append(np.array_equal(draw(caster, 256), large))
        finally:
            done.set()
        drawing.result()
    assert all(equal) and all(beside) and len(equal) >= 50 and len(beside) > 5


@pytest.mark.parametrize("samples", (1, 4))
def test_what_a_sample_has_met_has_a_colour(samples):
    rng, geoms = np.random.default_rng(0), np.zeros((60, 35), np.float32)
    geoms[:, 1], geoms[:, 19:24] = -1, 1  # no texture; white, and shining
    geoms[0, [0, 7, 8, 9]], geoms[0, 10:19] = (0, 9, 9, 1), np.eye(3).ravel()
    geoms[:, 29:] = 1, 1, 20, 1, 1, 20
    for row in geoms[1:]:  # turned, before that plane: at their edges rounding decides
        row[0], row[4:7], row[7:10] = rng.integers(2, 7), rng.normal(size=3), 0.2
        row[10:19] = np.linalg.qr(rng.normal(size=(3, 3)))[0].ravel()
    camera = np.array([[0, 0, 99, 0, 0, -1, 0, 1, 0, 0.04, 0.04, 1, 200, 0.6, 1]], np.float32)
    light = [0, 0, 0, 0, 99, 0, 0, -1, *[1] * 9, 1, 0, 0, 90, 0]  # a spot, at the eye
    pixels = np.zeros((512, 512, 3), np.uint8)
    given = scene(geoms=geoms, camera=camera, pixels=pixels, samples=samples)
    given["lights"] = np.array([light], np.float32)
    _native.RayCaster([], -1).draw(**given)
    assert (pixels == 255).all(), np.argwhere(pixels != 255)


@pytest.mark.parametrize(
    ("textures", "sky", "text"),
    [
        ([(np.zeros((4, 4, 3), np.uint8), True)], -1, "of a cube"),
        ([(np.zeros((4, 4, 4), np.uint8), False)], -1, "texture must be"),
        ([(np.zeros((4, 4, 3), np.uint8), False)], 0, "sky must be the index of a cube"),
        ([], 0, "sky must be the index of a cube"),
    ],
)
def test_the_core_checks_textures(textures, sky, text):
    with pytest.raises(ValueError, match=text):
        _native.RayCaster(textures, sky)
