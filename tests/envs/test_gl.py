"""Choosing a GL backend: order, memory, and what is said when nothing draws."""

import json
import os
import sys

import pytest

from fastdreamer.envs import dmc, gl, make_env

WORKS = {"renderer": "fake", "detail": "OpenGL 4.5"}
MISSING = {"error": "libX.so is missing (package libx)"}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, no answers of this process, and an environment that is put back."""
    before = dict(os.environ)
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", gl._SELECTED, *gl._KEY_VARIABLES):
        os.environ.pop(name, None)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    monkeypatch.setattr(gl, "_selected", {})
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replaces the probes: `fake(egl=answer, …)`; returns a function that lists those run."""
    log = tmp_path / "probes"
    log.touch()

    def install(**answers):
        def command(name):
            answer = answers.get(name, MISSING)
            body = answer if isinstance(answer, str) else f"print({json.dumps(answer)!r})"
            note = f"open({str(log)!r}, 'a').write({name!r} + '\\n')"
            return [sys.executable, "-S", "-c", f"import os, time\n{note}\n{body}"]

        monkeypatch.setattr(gl, "_probe_command", command)
        return lambda: log.read_text().split()

    return install


def test_first_that_draws_in_order(fake):
    os.environ["DISPLAY"] = ":0"
    probed = fake(glfw=WORKS)
    assert gl.select_gl() == gl.GL("glfw", "fake", "OpenGL 4.5")
    assert probed() == ["egl", "osmesa", "glfw"]
    assert os.environ["MUJOCO_GL"] == "glfw"
    assert "PYOPENGL_PLATFORM" not in os.environ


def test_egl_comes_first_and_sets_the_environment(fake):
    probed = fake(egl=WORKS, osmesa=WORKS)
    assert str(gl.select_gl()) == "egl (fake)"
    assert probed() == ["egl"]
    assert (os.environ["MUJOCO_GL"], os.environ["PYOPENGL_PLATFORM"]) == ("egl", "egl")


@pytest.mark.parametrize("threads", [None, "2"])
def test_software_rendering_stays_in_one_thread_unless_told(fake, threads):
    os.environ.pop("LP_NUM_THREADS", None)
    if threads:
        os.environ["LP_NUM_THREADS"] = threads
    fake(egl=WORKS)
    gl.select_gl()
    assert os.environ["LP_NUM_THREADS"] == (threads or "0")


def test_without_a_display_glfw_is_not_even_tried(fake):
    probed = fake(glfw=WORKS)
    with pytest.raises(gl.GLError, match="glfw: no display"):
        gl.select_gl()
    assert "glfw" not in probed()


def test_nothing_draws_names_packages_and_reasons(fake):
    fake(egl={"error": "libEGL.so.1 is missing (package libegl1)"})
    with pytest.raises(gl.GLError) as caught:
        gl.select_gl()
    text = str(caught.value)
    assert "apt install libegl1 libopengl0 libgl1-mesa-dri" in text
    assert "libosmesa6" in text
    assert "  egl: libEGL.so.1 is missing (package libegl1)\n" in text
    assert "  osmesa: libX.so is missing" in text
    assert "MUJOCO_GL" not in os.environ
    assert not gl.cache_file().exists()  # a failure is not remembered


def test_a_failing_egl_device_gives_way_to_the_next(fake):
    device = "os.environ.get('MUJOCO_EGL_DEVICE_ID')"
    probed = fake(
        egl=f"print('{json.dumps(WORKS)}' if {device} == '1' else '{{\"error\": \"cannot draw\"}}')"
    )
    assert gl.select_gl().name == "egl"
    assert probed() == ["egl"] * 3  # the driver's choice, device 0, device 1
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "1"


def test_a_device_set_by_the_user_is_the_only_one_tried(fake):
    os.environ["MUJOCO_EGL_DEVICE_ID"] = "3"
    probed = fake(egl={"error": "cannot draw"}, osmesa=WORKS)
    assert gl.select_gl().name == "osmesa"
    assert probed() == ["egl", "osmesa"]


def test_user_choice_is_respected(fake):
    os.environ["MUJOCO_GL"] = "osmesa"
    probed = fake(egl=WORKS, osmesa=WORKS)
    assert gl.select_gl().name == "osmesa"
    assert probed() == ["osmesa"]


def test_user_choice_that_fails_is_not_replaced(fake):
    os.environ["MUJOCO_GL"] = "osmesa"
    probed = fake(egl=WORKS)
    with pytest.raises(gl.GLError, match="(?s)MUJOCO_GL=osmesa.*libX.so is missing.*libosmesa6"):
        gl.select_gl()
    assert probed() == ["osmesa"]


@pytest.mark.parametrize("value", ["garbage", "disable"])
def test_user_choice_that_names_nothing(fake, value):
    os.environ["MUJOCO_GL"] = value
    probed = fake(egl=WORKS)
    with pytest.raises(gl.GLError, match=f"MUJOCO_GL='{value}'.*egl, osmesa, glfw"):
        gl.select_gl()
    assert probed() == []


def test_our_own_setting_is_no_request_of_the_user(fake):
    fake(egl=WORKS)
    assert gl.requested_backend() is None
    gl.select_gl()
    assert os.environ["MUJOCO_GL"] == "egl"
    assert gl.requested_backend() is None  # here, and in a child that inherits this environment
    os.environ["MUJOCO_GL"] = "osmesa"
    assert gl.requested_backend() == "osmesa"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("time.sleep(30)", "no answer within"),
        ("os.abort()", "killed by SIGABRT"),
        ("print('hello')", "ended with status 0"),
        ("raise SystemExit('no good')", "ended with status 1: no good"),
        ("print('[1, 2]')", "ended with status 0"),
    ],
)
def test_probes_that_break(fake, monkeypatch, body, reason):
    if "sleep" in body:  # the others may take their time
        monkeypatch.setattr(gl, "PROBE_TIMEOUT", 0.5)
    fake(osmesa=body)
    assert reason in gl.probe("osmesa")


def test_remembered_between_processes(fake):
    probed = fake(egl=WORKS)
    gl.select_gl()
    gl.select_gl()
    assert probed() == ["egl"]
    gl._selected.clear()  # as in another process
    assert gl.select_gl() == gl.GL("egl", "fake", "OpenGL 4.5")
    assert probed() == ["egl"]


@pytest.mark.parametrize(
    "change",
    [
        lambda monkeypatch: os.environ.update(LIBGL_ALWAYS_SOFTWARE="1"),
        lambda monkeypatch: os.environ.update(DISPLAY=":9"),
        lambda monkeypatch: monkeypatch.setattr(gl, "version", lambda package: "0.0.0"),
        lambda monkeypatch: monkeypatch.setattr(gl.platform, "node", lambda: "elsewhere"),
    ],
)
def test_remembered_answer_is_not_used_elsewhere(fake, monkeypatch, change):
    probed = fake(egl=WORKS)
    gl.select_gl()
    gl._selected.clear()
    change(monkeypatch)
    gl.select_gl()
    assert probed() == ["egl", "egl"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"KEY": 3}', '{"KEY": {"name": "x"}}'])
def test_damaged_cache_is_ignored_and_mended(fake, content):
    probed = fake(egl=WORKS)
    gl.cache_file().parent.mkdir(parents=True)
    gl.cache_file().write_text(content.replace('"KEY"', json.dumps(gl._key("auto"))))
    assert gl.select_gl().name == "egl"
    gl._selected.clear()
    assert gl.select_gl().name == "egl"
    assert probed() == ["egl"]


def test_unwritable_cache_is_fine(fake, tmp_path):
    (tmp_path / "file").touch()
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "file")
    probed = fake(egl=WORKS)
    assert gl.select_gl().name == "egl"
    assert gl.select_gl().name == "egl"
    assert probed() == ["egl"]  # still once a process


def test_the_cache_does_not_grow_without_end(fake):
    fake(egl=WORKS)
    for i in range(40):
        os.environ["DISPLAY"] = f":{i}"
        gl._selected.clear()
        gl.select_gl()
    assert len(json.loads(gl.cache_file().read_text())) == gl._MAX_REMEMBERED


def test_failure_after_a_good_probe_drops_the_answer(monkeypatch):
    env = make_env("walker")
    from dm_control import mujoco

    def fails(*args):
        raise RuntimeError("the GPU has gone")

    monkeypatch.setattr(mujoco, "Camera", fails)
    with pytest.raises(gl.GLError, match="passed its probe but failed.*the GPU has gone"):
        env.reset(seed=0)
    assert json.loads(gl.cache_file().read_text()) == {}
    assert gl._selected == {}
    monkeypatch.undo()
    assert env.reset(seed=0)["pixels"].std() > 0  # and the next attempt may succeed


def test_real_probe_on_this_machine():
    found = gl.select_gl()
    assert found.name in gl.BACKENDS
    assert found.renderer
    assert "OpenGL" in found.detail
    assert gl._recall("auto") == found == gl._recall(found.name)


def test_real_probe_without_a_driver():
    os.environ["MUJOCO_GL"] = "egl"
    os.environ["__EGL_VENDOR_LIBRARY_FILENAMES"] = "/dev/null"
    with pytest.raises(gl.GLError, match="MUJOCO_GL=egl is set, but this backend cannot draw") as e:
        gl.select_gl()
    assert "libgl1-mesa-dri" in str(e.value)


def test_probe_all_says_something_of_each():
    results = gl.probe_all()
    assert tuple(results) == gl.BACKENDS
    assert any(isinstance(result, gl.GL) for result in results.values())
    assert results["glfw"].startswith("no display")
    assert all("\n" not in str(result) for result in results.values())


def test_dm_control_draws_with_the_selected_backend():
    dmc._load_gl()
    from dm_control import _render

    assert os.environ["MUJOCO_GL"] == _render.BACKEND
