"""Tasks of the DeepMind Control suite as environments of single control steps.

Importing this module and running a task from state never imports or initialises OpenGL; the
first image asked for does.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
from functools import cache
from importlib.metadata import version

import numpy as np

from fastdreamer.envs.gl import GL, GLError, forget, select_gl
from fastdreamer.envs.quality import QUALITIES, RENDERERS
from fastdreamer.envs.rays import Rays, why_not
from fastdreamer.errors import ArgumentError, FastdreamerError, how_to_install

DEFAULT_TASKS = {"walker": "walker-walk"}  # names that stand for a task
SHADOW_SIZE = 256  # texels a side; the suite's own 2048 costs about as much as all the rest
MAX_STEPS = 1000  # control steps of an episode: those of every task of the suite

# Camera 0 looks from far away there, or (dog-fetch) at a ball; elsewhere at the body.
_CAMERAS = {"dog": "y-axis", "quadruped": "y"}
_NEEDS_GL = {"quadruped-escape": "it hands its terrain to OpenGL"}  # drawn or not, at every reset
_SHADOW, _REFLECTION, _SKYBOX = 0, 2, 4  # mjtRndFlag
_log = logging.getLogger("fastdreamer")


class EnvError(FastdreamerError, RuntimeError):
    """The simulator cannot be used as asked; the message says why and what would work."""


@contextlib.contextmanager
def _fitting_pair():
    """What dm_control says that meets a MuJoCo it was not made for, in one line with both names."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvError(how_to_install(error) or str(error)) from error
    except (AttributeError, ImportError, TypeError) as error:
        pair = " with ".join(f"{name} {version(name)}" for name in ("dm_control", "mujoco"))
        raise EnvError(
            f"{pair} cannot load a task ({type(error).__name__}: {error}): install versions that "
            "fit each other, for example by `pip install --upgrade dm_control mujoco`"
        ) from error


@cache
def _suite():
    """`dm_control.suite`, imported without starting OpenGL.

    dm_control chooses and initialises a GL backend when it is imported, and raises if the one
    named by MUJOCO_GL does not work. Told "disable" it leaves GL alone; `_load_gl` hands it the
    backend later.
    """
    if "dm_control._render" in sys.modules:  # the user's own choice came first
        from dm_control import suite

        return suite
    wanted = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disable"
    try:
        with _fitting_pair():
            from dm_control import suite
    finally:
        if wanted is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = wanted
    return suite


def _load_gl() -> GL:
    """Select a GL backend and make dm_control draw with it."""
    gl = select_gl()
    if "llvmpipe" in gl.renderer:
        # Mesa's llvmpipe and Triton each bring an LLVM. In this order both work; once Mesa's is in
        # use, importing triton (as torch.compile does) ends the process with a segmentation fault.
        with contextlib.suppress(ImportError):
            import triton._C.libtriton  # noqa: F401
    from dm_control import _render

    if gl.name != _render.BACKEND:
        try:
            importlib.reload(_render)  # in place, so that dm_control.mujoco sees it
        except Exception as error:
            raise _failed_after_all(gl, error) from error
    return gl


def _load_terrain_gl(task: str) -> GL:
    """Of a task that needs it without being drawn."""
    try:
        return _load_gl()
    except GLError as error:
        raise GLError(f"{error}, but {task} does: {_NEEDS_GL[task]} at every reset") from error


def _failed_after_all(gl: GL, error: Exception) -> GLError:
    forget(gl)
    return GLError(
        f"the GL backend {gl} passed its probe but failed in this process: {error}. "
        f"The remembered answer was dropped; start again to probe anew, or choose another "
        f"backend with MUJOCO_GL"
    )


@cache
def _tasks() -> dict[str, tuple[str, str]]:
    names = {f"{domain}-{task}": (domain, task) for domain, task in _suite().ALL_TASKS}
    return dict(sorted(names.items()))


def list_tasks() -> tuple[str, ...]:
    """Names of all tasks of the suite, sorted: "acrobot-swingup", …, "walker-walk"."""
    return tuple(_tasks())


def canonical_suite_task(name: str) -> str:
    """The full name of a task of the suite: "walker" and "walker_walk" both mean "walker-walk".

    Raises ValueError, listing the valid tasks with the nearest first, if there is none.
    """
    tasks = {_plain(task): task for task in list_tasks()}
    plain = _plain(DEFAULT_TASKS.get(name.strip().lower(), name))
    if plain in tasks:
        return tasks[plain]
    near = [tasks[p] for p in difflib.get_close_matches(plain, tasks, n=5, cutoff=0.5)]
    rest = [task for task in list_tasks() if task not in near]
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ArgumentError(
        f"unknown task {name!r}{hint}; valid tasks: gym:ID of a gymnasium environment, "
        f"module:function, and of the suite: {', '.join(near + rest)}"
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def check_drawing(render: str, render_quality: str) -> None:
    """Raise ValueError where there is no such renderer or quality."""
    for name, value, known in (
        ("render", render, RENDERERS),
        ("render_quality", render_quality, tuple(QUALITIES)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _no_rays(name: str, reason: str) -> str:
    return f"{name}: rays cannot draw it, {reason}; take render=opengl (--render opengl)"


def _frees_contexts(physics) -> bool:
    """Whether this dm_control lets a GL context be made anew, with another framebuffer."""
    return hasattr(physics, "_free_rendering_contexts")


def _free_contexts(physics) -> None:
    """Give up the GL context, which is made again at the next use; nothing where there is none."""
    if getattr(physics, "_contexts", None):
        physics._free_rendering_contexts()


def steps_in(time_limit: float, control_step: float, name: str) -> int:
    """Control steps in so many seconds; ArgumentError where they are less than one of the task."""
    if not time_limit >= control_step:
        raise ArgumentError(
            f"time_limit must be at least one control step of {name} ({control_step:g} s), got "
            f"{time_limit}"
        )
    return round(time_limit / control_step)


class SuiteTask:
    """One task, stepped in control steps, with actions in the units of its actuators.

    name: full task name; time_limit: seconds, or None for the task's own (1000 control steps
    for every task of the suite); render: who draws, "opengl" or "rays"; render_quality: a name of
    `quality.QUALITIES`.

    Attributes: `name`, `control_step` (seconds), `action_min`, `action_max` (float64 [A]),
    `max_steps` (control steps until the time limit), `state_size` (numbers in `state()`).

    Raises ValueError for an unknown task, renderer or quality, a time limit below one control step,
    or a task that rays cannot draw.
    """

    def __init__(
        self,
        name: str,
        *,
        seed: int = 0,
        time_limit: float | None = None,
        render: str = "opengl",
        render_quality: str = "full",
    ):
        self.name = canonical_suite_task(name)
        check_drawing(render, render_quality)
        if render == "rays" and self.name in _NEEDS_GL:
            raise ArgumentError(_no_rays(self.name, _NEEDS_GL[self.name]))
        self._gl = _load_terrain_gl(self.name) if self.name in _NEEDS_GL else None
        domain, task = _tasks()[self.name]
        # The model itself may be drawn at random (lqr): always from the same generator, so that
        # an episode depends on nothing but the seed given to reset and the actions.
        # The limit is ours: in whole steps, whatever seconds round to.
        with _fitting_pair():
            self._env = _suite().load(
                domain, task, task_kwargs={"random": 0, "time_limit": float("inf")}
            )
        self._env.task.random.seed(seed)
        self._diverged = importlib.import_module("dm_control.rl.control").PhysicsError

        self.control_step = control_step = self._env.control_timestep()
        self.max_steps = MAX_STEPS
        if time_limit is not None:
            self.max_steps = steps_in(time_limit, control_step, self.name)
        self._steps = 0

        spec = self._env.action_spec()
        unbounded = spec.maximum - spec.minimum > 1e9  # lqr: no limits, written as ±1e10
        self.action_min = np.where(unbounded, -1.0, spec.minimum)
        self.action_max = np.where(unbounded, 1.0, spec.maximum)
        self.state_size = sum(int(np.prod(s.shape)) for s in self._env.observation_spec().values())

        physics = self._env.physics
        if render == "rays" and (reason := why_not(physics.model.ptr)):
            raise ArgumentError(_no_rays(self.name, reason))
        self._render, self._quality = render, QUALITIES[render_quality]
        self._rays: Rays | None = None  # made at the first image
        camera = _CAMERAS.get(domain)
        self._camera_id = 0 if camera is None else physics.model.name2id(camera, "camera")
        self._cameras = {}  # (height, width) -> camera; a new one costs 2 ms a frame
        visual = physics.model.vis
        visual.quality.shadowsize = SHADOW_SIZE
        if not self._quality.multisampling:
            visual.quality.offsamples = 0
        # A framebuffer of the size in use (see render) is faster than the suite's 640 × 480.
        if _frees_contexts(physics):
            visual.global_.offwidth = visual.global_.offheight = 1

    def reset(self, seed: int | None = None) -> None:
        """Start an episode; with a seed it depends on nothing that happened before."""
        if seed is not None:
            self._env.task.random.seed(seed)
        self._state, self._steps = self._env.reset().observation, 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """One control step: reward, terminated (a true end), truncated (the time limit).

        Where the simulation diverges, as that of dog or humanoid_CMU rarely does, the episode is
        truncated as it was before the step: MuJoCo has put another state in the place of what it
        could not compute.
        """
        self._steps += 1
        before = self._env.physics.get_state()
        try:
            result = self._env.step(action)
        except self._diverged as error:
            self._restore(before)
            _log.warning("%s: an episode is cut off at step %d: %s", self.name, self._steps, error)
            return 0.0, False, True
        self._state = result.observation
        late = self._steps >= self.max_steps
        terminated = result.last() and result.discount == 0.0 and not late
        return float(result.reward), terminated, (result.last() or late) and not terminated

    def _restore(self, state: np.ndarray) -> None:
        physics = self._env.physics
        physics.set_state(state)
        with physics.suppress_physics_errors():
            physics.forward()

    def state(self) -> np.ndarray:
        """The task's observations, flattened in its own order: float32 [state_size]."""
        parts = [np.ravel(value) for value in self._state.values()]
        return np.concatenate(parts).astype(np.float32)

    def render(self, height: int, width: int) -> np.ndarray:
        """The scene from the task's camera: uint8 [height, width, 3], a fresh array.

        Raises GLError if nothing on this machine can draw, ValueError for a size below 1.
        """
        if min(height, width) < 1:
            raise ValueError(f"image size must be at least 1 × 1, got {height} × {width}")
        if self._render == "rays":
            if self._rays is None:
                self._rays = Rays(self._env.physics, self._camera_id, self._quality)
            return self._rays.draw(height, width)
        camera = self._cameras.get((height, width))
        if camera is None:
            camera = self._cameras[height, width] = self._make_camera(height, width)
        return camera.render().copy()

    def keep_only(self, height: int, width: int) -> None:
        """Draw in a framebuffer of that size again, if images of another were asked for.

        A large one costs every image, however small: all of it is cleared and resolved.
        """
        others = [size for size in self._cameras if size != (height, width)]
        if not others or not _frees_contexts(self._env.physics):
            return
        for size in others:
            self._cameras.pop(size).scene.free()
        buffer = self._env.physics.model.vis.global_
        buffer.offheight, buffer.offwidth = (height, width) if self._cameras else (1, 1)
        _free_contexts(self._env.physics)

    def _make_camera(self, height: int, width: int):
        if self._gl is None:
            self._gl = _load_gl()
        from dm_control import mujoco

        physics = self._env.physics
        buffer = physics.model.vis.global_
        if height > buffer.offheight or width > buffer.offwidth:
            if not _frees_contexts(physics):
                raise GLError(
                    f"images of {width} × {height} do not fit the {buffer.offwidth} × "
                    f"{buffer.offheight} that dm_control {version('dm_control')} draws in"
                )
            buffer.offheight = max(height, buffer.offheight)
            buffer.offwidth = max(width, buffer.offwidth)
            _free_contexts(physics)
        try:
            camera = mujoco.Camera(physics, height, width, self._camera_id)
            flags = camera.scene.flags
            flags[_REFLECTION] &= self._quality.mirror
            flags[_SHADOW] &= self._quality.shadows
            flags[_SKYBOX] &= self._quality.sky
            camera.render()
        except Exception as error:
            raise _failed_after_all(self._gl, error) from error
        return camera

    def close(self) -> None:
        """Free the simulation and its GL context."""
        for camera in self._cameras.values():
            camera.scene.free()
        self._cameras.clear()
        self._env.close()
        self._env.physics.free()
