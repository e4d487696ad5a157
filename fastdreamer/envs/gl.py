"""Find an OpenGL backend with which MuJoCo can draw on this machine, without opening a window.

Which of EGL, OSMesa and GLFW works differs from machine to machine, and one that does not work
may crash the process instead of raising. So each is tried in a subprocess that draws a tiny
model, and the answer is remembered in a file under the user's cache directory.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from fastdreamer.errors import FastdreamerError

BACKENDS = ("egl", "osmesa", "glfw")  # the order in which they are tried
PROBE_TIMEOUT = 60.0  # seconds; a cold import of MuJoCo from a slow disk takes about ten
_SELECTED = "FASTDREAMER_GL_SELECTED"  # marks a MUJOCO_GL set here, for child processes
_MAX_REMEMBERED = 32
_MAX_DEVICES = 8
# Failures that no other EGL device would mend; the last one says that there is no such device.
_SAME_ON_ALL_DEVICES = ("missing (package", "no answer within", "MUJOCO_EGL_DEVICE_ID must be")
_selected: dict[str, GL] = {}  # answers of this process, by request

# What decides whether a backend works, besides the machine, the interpreter and MuJoCo itself.
_KEY_VARIABLES = (
    "MUJOCO_EGL_DEVICE_ID",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XDG_SESSION_TYPE",
    "LD_LIBRARY_PATH",
    "EGL_PLATFORM",
    "GALLIUM_DRIVER",
    "LIBGL_ALWAYS_SOFTWARE",
    "LIBGL_DRIVERS_PATH",
    "MESA_LOADER_DRIVER_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "__EGL_VENDOR_LIBRARY_DIRS",
    "__EGL_VENDOR_LIBRARY_FILENAMES",
)

_INSTALL = (
    "install one of them, on Debian or Ubuntu: "
    "`apt install libegl1 libopengl0 libgl1-mesa-dri` (EGL) or `apt install libosmesa6` (OSMesa); "
    "training with pictures by rays (`--render rays`) or from state (`--obs state`) needs none"
)

# Draws the way the environments do, through dm_control, and prints one line of JSON.
_PROBE = """
import ctypes, json, os, sys
name = sys.argv[1]
try:
    from dm_control import mujoco
    physics = mujoco.Physics.from_xml_string(
        "<mujoco><worldbody><light pos='0 0 2'/><geom size='.3' rgba='1 0 0 1'/></worldbody>"
        "</mujoco>")
    image = physics.render(64, 64)
    if image.max() == image.min():
        raise RuntimeError("the drawn image is blank")
    def strings():
        from OpenGL import GL
        return [GL.glGetString(s).decode() for s in (GL.GL_RENDERER, GL.GL_VERSION)]
    with physics.contexts.gl.make_current() as context:
        try:
            renderer, detail = context.call(strings)
        except Exception as error:  # PyOpenGL may lack the platform that GLFW drew with
            renderer, detail = "renderer unknown", "version unknown"
    answer = {"renderer": renderer, "detail": "OpenGL " + detail}
except Exception as error:
    text = type(error).__name__ + ": " + " ".join(str(error).split())
    if "headless EGL display" in text:
        text = "no EGL device has a working driver (package libgl1-mesa-dri)"
    # A missing library shows as all kinds of errors in PyOpenGL; name it instead.
    needed = {"egl": {"libegl1": ["libEGL.so.1"], "libopengl0": ["libOpenGL.so.0", "libGL.so.1"]},
              "osmesa": {"libosmesa6": ["libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"]}}
    for package, libraries in needed.get(name, {}).items():
        for library in libraries:
            try:
                ctypes.CDLL(library)
                break
            except OSError:
                pass
        else:
            text = f"{libraries[0]} is missing (package {package})"
            break
    answer = {"error": text}
print(json.dumps(answer), flush=True)
os._exit(0)  # tearing down a half-made GL context may crash; the answer is already out
"""


class GLError(FastdreamerError, RuntimeError):
    """No usable OpenGL: the message says what failed and which package to install."""


@dataclass(frozen=True)
class GL:
    """A backend that draws: its MUJOCO_GL name, GL_RENDERER, GL_VERSION, variables to set."""

    name: str
    renderer: str
    detail: str
    environ: dict[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.renderer})"


def select_gl() -> GL:
    """The GL backend of this process, with its variables set in `os.environ`.

    Sets MUJOCO_GL, PYOPENGL_PLATFORM (and MUJOCO_EGL_DEVICE_ID where another than EGL's own
    choice of device is needed); LP_NUM_THREADS too, unless the user has.
    A MUJOCO_GL set by the user is the only candidate; otherwise EGL, OSMesa and GLFW are tried
    in this order and the first that draws is taken. Answers are remembered between processes;
    failures are not, so that installing a package takes effect at once.

    Raises GLError, with the reason of each backend in one line, if none works.
    """
    requested = requested_backend()
    request = requested or "auto"
    candidates = BACKENDS if requested is None else (requested,)
    gl = _selected.get(request) or _recall(request)
    if gl is None:
        reasons = {}
        for name in candidates:
            result = probe(name)
            if isinstance(result, GL):
                gl = result
                break
            reasons[name] = result
        else:
            raise GLError(_no_backend(requested, reasons))
        _remember({request: gl, gl.name: gl})
    _selected[request] = gl
    os.environ.update(gl.environ)
    # llvmpipe draws in the calling thread: for images this small, handing the work to its own
    # threads costs more than they save, and twice the time while training keeps the cores busy.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if requested is None:
        os.environ[_SELECTED] = gl.name
    return gl


def requested_backend() -> str | None:
    """The backend that the user asks for with MUJOCO_GL, or None.

    A value that `select_gl` put there (here or in the parent process) is not a request.
    Raises GLError for a value that names no backend.
    """
    value = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not value or value == os.environ.get(_SELECTED):
        return None
    if value not in BACKENDS:
        raise GLError(
            f"MUJOCO_GL={os.environ['MUJOCO_GL']!r} names no offscreen GL backend; unset it to "
            f"let one be chosen, or set one of: {', '.join(BACKENDS)}; "
            "training with --render rays needs none"
        )
    return value


def probe_all() -> dict[str, GL | str]:
    """Each backend's GL, or why it does not work in one line; always probes afresh."""
    return {name: probe(name) for name in BACKENDS}


def probe(name: str) -> GL | str:
    """Draw a tiny model with backend `name` in a subprocess: its GL, or why not in one line.

    With EGL the first device that initialises may still fail to draw (a GPU whose driver lacks
    its graphics half, as in many containers), so the devices are tried one by one then.
    """
    if name == "glfw" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "no display (neither DISPLAY nor WAYLAND_DISPLAY is set)"
    environ = {"MUJOCO_GL": name}
    if name != "glfw":
        environ["PYOPENGL_PLATFORM"] = name
    result = _probe_with(name, environ)
    if name == "egl" and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
        other, device = result, 0
        while device < _MAX_DEVICES and isinstance(other, str) and not _final(other):
            other = _probe_with(name, {**environ, "MUJOCO_EGL_DEVICE_ID": str(device)})
            device += 1
        if isinstance(other, GL):
            return other
    return result


def forget(gl: GL) -> None:
    """Drop remembered answers that name this backend (it failed after all)."""
    _selected.clear()
    entries = _read_cache()
    kept = {key: entry for key, entry in entries.items() if entry.get("name") != gl.name}
    if len(kept) != len(entries):
        _write_cache(kept)


def cache_file() -> Path:
    """Where answers are remembered: `$XDG_CACHE_HOME/fastdreamer/gl.json`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "fastdreamer" / "gl.json"


def _final(reason: str) -> bool:
    return any(text in reason for text in _SAME_ON_ALL_DEVICES)


def _probe_command(name: str) -> list[str]:
    return [sys.executable, "-c", _PROBE, name]


def _probe_with(name: str, environ: dict[str, str]) -> GL | str:
    env = {**os.environ, **environ}
    if name == "glfw":
        env.pop("PYOPENGL_PLATFORM", None)
    try:
        done = subprocess.run(
            _probe_command(name),
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_TIMEOUT:.0f} s"
    except OSError as error:
        return f"the probe did not start: {error}"
    if done.returncode < 0:
        return f"the probe was killed by {signal.Signals(-done.returncode).name}"
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if "error" in answer:
            return str(answer["error"])
        return GL(name, answer["renderer"], answer["detail"], environ)
    except (IndexError, KeyError, TypeError, ValueError):
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        return f"the probe ended with status {done.returncode}: {lines[-1]}"


def _no_backend(requested: str | None, reasons: dict[str, str]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in reasons.items()]
    if requested is not None:
        head = f"MUJOCO_GL={requested} is set, but this backend cannot draw here"
        return "\n".join([f"{head}; unset it to let another be chosen, or:", *lines, _INSTALL])
    return "\n".join(["no OpenGL backend can draw on this machine:", *lines, _INSTALL])


def _key(request: str) -> str:
    parts = {
        "request": request,
        "host": platform.node(),
        "python": sys.executable,
        "mujoco": version("mujoco"),
        "dm_control": version("dm_control"),
        **{name: os.environ[name] for name in _KEY_VARIABLES if name in os.environ},
    }
    return json.dumps(parts, sort_keys=True)


def _recall(request: str) -> GL | None:
    entry = _read_cache().get(_key(request))
    try:
        gl = GL(**entry) if entry else None
    except TypeError:
        return None
    return gl if gl and gl.name in BACKENDS else None


def _remember(answers: dict[str, GL]) -> None:
    entries = _read_cache()
    for request, gl in answers.items():
        entries[_key(request)] = asdict(gl)
    _write_cache(dict(list(entries.items())[-_MAX_REMEMBERED:]))


def _read_cache() -> dict[str, dict]:
    try:
        entries = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}  # absent, unreadable or damaged: probing again costs a second
    if not isinstance(entries, dict):
        return {}
    return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}


def _write_cache(entries: dict[str, dict]) -> None:
    path = cache_file()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(entries, indent=1))
        os.replace(temporary, path)
    except OSError:
        pass  # a read-only home: every process probes for itself
