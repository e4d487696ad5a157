"""Imports point one way, in Python and in C++, and ``import fastdreamer`` stays light."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastdreamer import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastdreamer"

MODEL = {"config", "errors", "ops", "nn"}
RUN = MODEL | {"_version", "acting", "envs", "files", "learning", "machine", "training"}

# What each room (a file or folder of the package) may import of ours, beside itself; imports
# inside functions count. config → ops → nn → acting → learning → training → analysis → cli.
ALLOWED = {
    "_version": set(),
    "errors": set(),
    "named": set(),
    "files": {"errors"},
    "video": {"errors", "files"},
    "config": {"errors"},
    "ops": {"_native", "errors"},
    "nn": {"config", "errors", "ops"},
    "envs": {"_native", "config", "_version", "errors", "named"},
    "machine": {"_native", "_version", "config", "envs", "errors", "ops"},
    "acting": MODEL | {"envs", "machine", "named", "video"},
    "learning": MODEL | {"acting", "machine"},
    "training": RUN - {"training"} | {"named"},
    "analysis": RUN | {"video"},
    "rollout": {"errors", "ops"},
    "testing": {"ops", "nn"},
    "cli": RUN | {"analysis", "named", "rollout"},
    "adapters": {"rollout"},  # this one and the next two: other names, that the manual has used
    "episodes": {"training"},
    "planning": {"acting"},
    "__main__": {"cli", "errors", "machine"},
    "__init__": RUN,
}

# Places within a room that may import less of ours than the room: files, folders or rooms.
NARROW = {
    "acting/noise": {"ops/params"},
    "analysis/viz": {"analysis/viz", "errors", "files", "training/logger", "video"},  # reads files
    "machine/cores": set(),  # runs before torch is loaded
    "machine/container": set(),
    "machine/nvtx": set(),
    "ops/cells": {"ops/layers"},
    "ops/layers": set(),
    "ops/params": {"ops/cells", "ops/layers"},
    "ops/private": set(),
    "ops/triton/program": set(),
    "rollout/ask": {"rollout/draws"},
    "rollout/draws": set(),
    "training/checkpoint": {"config", "_version", "errors", "files"},
    "training/episodes": {"errors", "files"},
    "training/logger": {"config", "_version", "errors", "files"},
    "training/replay": {"errors", "files", "training/episodes"},
}

# Imports that close a ring of files, and why they may: (from, to) -> reason.
RINGS: dict[tuple[str, str], str] = {}

# Heavy or optional packages, and the only places that import them.
THIRD_PARTY = {
    "dm_control": {"envs"},
    "mujoco": {"envs"},
    "matplotlib": {"analysis/viz"},
    "imageio_ffmpeg": {"video"},
    "tensorboard": {"training/logger"},
    "triton": {"ops/triton", "testing", "envs"},  # envs: before Mesa loads its LLVM
    "tyro": {"cli", "config/sections"},
    "rich": {"cli", "analysis/compare", "machine/doctor", "training/logger"},
    "gymnasium": {"envs/gymnasium", "envs/foreign"},
    "tensordict": {"rollout/adapters/torchrl", "rollout/adapters/torchrl_v3"},
    "stable_baselines3": {"analysis/compare/methods"},
    "ray": {"training/cluster"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def place_of(path: Path) -> str:
    """A file by its path in the package, an ``__init__`` by its folder's; "" is the package's."""
    place = path.relative_to(PACKAGE).with_suffix("").as_posix()
    return place.removesuffix("__init__").rstrip("/")


def imports(path: Path) -> list[tuple[int, str]]:
    """Every module that a file imports, anywhere in it: line number and absolute dotted name.

    ``from a import b`` counts as ``a.b``; relative names are made absolute; a constant name given
    to ``importlib.import_module`` or ``__import__`` counts too.
    """
    package = list(path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *([node.module] if node.module else []), alias.name])
                     for alias in node.names]  # fmt: skip
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                found.append((node.lineno, str(name.value)))
    return found


def rooms_imported(path: Path) -> list[tuple[int, str]]:
    """Line number and room of each import of our own; the package's surface is ``__init__``."""
    found = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "fastdreamer":
            target = parts[1] if len(parts) > 1 else "__init__"
            found.append((line, target if target in ALLOWED | {"_native": 0} else "__init__"))
    return found


def file_imported(name: str) -> str | None:
    """The file or folder of ours that an absolute dotted name is in; "" is the package itself."""
    parts = name.split(".")
    if parts[0] != "fastdreamer" or parts[1:2] == ["_native"]:
        return None
    while parts and not (
        ROOT.joinpath(*parts).with_suffix(".py").is_file() or ROOT.joinpath(*parts).is_dir()
    ):
        parts.pop()
    return "/".join(parts[1:])


def files_imported(path: Path) -> set[str]:
    """The files and folders (their ``__init__``) of ours that a file imports, other than itself."""
    found = {file_imported(name) for _, name in imports(path)}
    return {name for name in found if name is not None} - {place_of(path)}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_of_our_own_point_one_way(path):
    name = room(path)
    assert name in ALLOWED, f"no rule for {name}: decide what it may import and add it here"
    allowed = ALLOWED[name] | {name}
    wrong = [f"line {line}: {target}" for line, target in rooms_imported(path)
             if target not in allowed]  # fmt: skip
    assert not wrong, f"{path.relative_to(ROOT)} may import {sorted(allowed)}, not {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_in_one_place(path):
    place = path.relative_to(PACKAGE).with_suffix("").as_posix()
    for line, name in imports(path):
        name = "tensorboard" if name.startswith("torch.utils.tensorboard") else name
        owners = THIRD_PARTY.get(name.partition(".")[0])
        fits = owners is None or any(f"{place}/".startswith(f"{owner}/") for owner in owners)
        assert fits, f"{path.relative_to(ROOT)}, line {line}: {name} belongs to {owners}"


def test_compiled_bodies_are_imported_lazily():
    """``ops/<op>.py`` must import without triton and the extension: inside a function."""
    for path in FILES:
        if path.parent.name in ("triton", "native"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert not re.search(r"triton|_native|ops\.native", text), f"{path}: {text}"


@pytest.mark.parametrize("place", NARROW)
def test_narrow_places_import_less(place):
    paths = [path for path in FILES if f"{place_of(path)}/".startswith(f"{place}/")]
    assert paths, f"no such place: {place}"
    for path in paths:
        wrong = [name for name in files_imported(path)
                 if not any(f"{name}/".startswith(f"{one}/") for one in NARROW[place])]  # fmt: skip
        assert not wrong, f"{place_of(path)} may import {sorted(NARROW[place])}, not {wrong}"


def ring(edges: dict[str, set[str]]) -> list[str]:
    """Some ring of a graph, empty where there is none."""
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if found := walk(target, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def test_no_files_import_each_other_in_a_ring():
    edges = {place_of(path): files_imported(path) for path in FILES}
    for (source, target), reason in RINGS.items():
        assert reason and target in edges[source], f"{source} does not import {target}"
        edges[source].remove(target)
    assert not ring(edges), " → ".join(ring(edges))


def test_a_ring_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "fastdreamer")
    ops = tmp_path / "fastdreamer" / "ops"
    ops.mkdir(parents=True)
    (ops / "__init__.py").touch()
    (ops / "a.py").write_text("from fastdreamer.ops import b\n")
    (ops / "b.py").write_text("def f():\n    from fastdreamer.ops.c import name\n")
    (ops / "c.py").write_text("import fastdreamer.ops.a\n")
    edges = {place_of(path): files_imported(path) for path in ops.iterdir()}
    assert ring(edges) == ["ops/a", "ops/b", "ops/c", "ops/a"]
    (ops / "c.py").write_text("from fastdreamer import ops, _native\n")
    assert not ring({place_of(path): files_imported(path) for path in ops.iterdir()})


def test_whoever_loads_the_core_has_loaded_torch():
    """Else both run on whatever OpenMP the system has, and without one the core does not load."""
    for path in FILES:
        lines = {}
        for line, name in imports(path):
            lines.setdefault(name.split(".")[0] if name.startswith("torch") else name, line)
        if core := lines.get("fastdreamer._native"):
            assert lines.get("torch", core) < core, path


def test_the_rules_have_no_cycle():
    reached: dict[str, set[str]] = {name: set(allowed) for name, allowed in ALLOWED.items()}
    for _ in ALLOWED:
        for targets in reached.values():
            targets |= set().union(*(reached.get(target, set()) for target in targets))
    assert not [name for name, targets in reached.items() if name in targets]


def test_the_parser_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "fastdreamer" / "ops" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import fastdreamer.learning.dreamer\n"
        "from fastdreamer import config, Dreamer\n"
        "from ..nn import rssm\n"
        "from .. import cli\n"
        "from . import y\n"
        "def f():\n    from fastdreamer.training.trainer import Trainer\n"
        "    import importlib\n    importlib.import_module('fastdreamer.analysis.viz')\n"
    )
    assert [target for _, target in sorted(rooms_imported(file))] == [
        "learning", "__init__", "config", "nn", "cli", "ops", "training", "analysis",
    ]  # fmt: skip


def test_import_is_light():
    """No simulator, plotting, logging or kernel compiler is loaded before it is asked for."""
    heavy = ["dm_control", "mujoco", "matplotlib", "tensorboard", "triton"]
    code = (
        "import json, sys, fastdreamer\n"
        "assert 'torch' not in sys.modules\n"
        "for name in fastdreamer.__all__:\n    getattr(fastdreamer, name)\n"
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == []
    assert out.stderr == ""


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without(modules, code):
    """What code prints where packages are not installed, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=sorted(modules)) + code],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_drop_in_needs_pytorch_and_numpy_alone():
    extras = {module for modules in errors._EXTRAS.values() for module in modules}
    code = (
        "sys.path.insert(0, 'examples')\n"
        "import rollout\n"
        "assert rollout.make().verify(repeats=1).ok\n"
        "import fastdreamer, fastdreamer.adapters\n"
        "from fastdreamer.ops.lambda_return import OP\n"
        "print(OP.why_not('triton', 'cpu') or OP._load('triton'))\n"
        "for name in ('load', 'make_env'):\n"
        "    try:\n        getattr(fastdreamer, name)('walker')\n"
        "    except (ImportError, RuntimeError) as error:\n        print(error)\n"
    )
    status, out, err = without(extras, code)
    assert status == 0, err
    needs = "is not installed: pip install 'fastdreamer[train]'"
    assert re.search(rf"^fastdreamer.load needs a package: \w+ {re.escape(needs)}$", out, re.M), out
    assert needs in out.splitlines()[-1]


def test_the_doctor_does_without_a_simulator():
    """As on a machine that is lent with PyTorch and little else."""
    code = (
        "sys.modules.update(mujoco=None, dm_control=None)\n"  # absent to find_spec, too
        "from rich.console import Console\n"
        "from fastdreamer.machine import doctor\n"
        "doctor._backends = lambda: ''\n"  # takes seconds
        "doctor.report(Console(width=200))\n"
    )
    status, out, err = without({"tyro"}, code)
    assert status == 0, err
    needs = "is not installed: pip install 'fastdreamer[train]'"
    lines = [line.strip().split(maxsplit=1) for line in out.splitlines() if line]
    assert ["rendering", f"no: mujoco {needs}"] in lines
    assert ["simulator", f"no: dm_control {needs}"] in lines


def test_the_command_line_says_once_what_to_install():
    code = "from fastdreamer.__main__ import main\nsys.argv[1:] = ['--version']\nsys.exit(main())"
    told = without({"tyro"}, code)
    says = "fastdreamer: tyro is not installed: pip install 'fastdreamer[train]'\n"
    assert told == (1, "", says)


def test_extras_bring_what_is_named():
    """Every third-party import of the package is a dependency or of an extra, and no more is."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = lambda words: {re.match(r"[\w.-]+", word)[0].lower() for word in words}  # noqa: E731
    renamed = {"PIL": "pillow", "imageio_ffmpeg": "imageio-ffmpeg"}
    for extra, modules in errors._EXTRAS.items():
        wanted = project["optional-dependencies"][extra]
        # What dm_control needs, where it cannot be installed with its needs.
        found = named(word for word in wanted if "python_version >= '3.13'" not in word)
        assert found - {"fastdreamer"} == {renamed.get(module, module) for module in modules}
    base = named(project["dependencies"])
    assert base == {"torch", "numpy"}
    third = {name.partition(".")[0] for path in FILES for _, name in imports(path)}
    third -= {*sys.stdlib_module_names, "fastdreamer", "gymnasium", "stable_baselines3"}
    third -= {"torchrl", "tensordict", *base}
    # OpenGL and its like come with dm_control.
    assert third <= {m for modules in errors._EXTRAS.values() for m in modules}
    assert {m for modules in errors._EXTRAS.values() for m in modules} - third <= {
        "mujoco", "tensorboard",  # dm_control's and torch's needs
    }  # fmt: skip


def test_where_dm_control_cannot_be_installed_with_its_needs_it_is_said_how(monkeypatch):
    missing = ModuleNotFoundError("No module named 'dm_control'", name="dm_control")
    usual = "dm_control is not installed: pip install 'fastdreamer[train]'"
    monkeypatch.setattr(errors.sys, "version_info", (3, 12))
    assert errors.how_to_install(missing) == usual
    monkeypatch.setattr(errors.sys, "version_info", (3, 13))
    more = " && pip install --no-deps 'dm_control>=1.0.50,<2'"
    assert errors.how_to_install(missing) == usual + more
    other = ModuleNotFoundError("No module named 'rich'", name="rich.console")
    assert "--no-deps" not in errors.how_to_install(other)
    assert errors.how_to_install(ImportError("x", name="dm_control")) is None


def test_every_public_name_exists_and_nothing_else_is_promised():
    import fastdreamer

    assert len(set(fastdreamer.__all__)) == len(fastdreamer.__all__)
    for name in fastdreamer.__all__:
        assert getattr(fastdreamer, name) is not None
    # Those that type checkers see are those that are imported when they are asked for.
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        (node.module.removeprefix("fastdreamer."), alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    found = {(home, name) for home, names in fastdreamer._HOMES.items() for name in names}
    assert seen == found
    bound = {name for _, name in found} | {"__version__"}
    assert bound == set(fastdreamer.__all__)


# ---------------------------------------------------------------- C++

SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))
# The C library's headers have nothing to be compiled twice; <cmath> adds inline functions.
C_HEADERS = {"cstddef", "cstdint", "cstring", "cassert", "cfloat"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_includes_point_one_way(path):
    """common ← cpu, cuda ← bindings; Python headers in bindings/ alone; no STL in kernels."""
    place = path.relative_to(ROOT / "csrc").parts[0]
    text = path.read_text(encoding="utf-8")
    ours = re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.M)
    system = re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.M)
    folders = {"common", "cpu", "cuda"}
    if place in folders:
        allowed = {"common", place}
        for name in ours:
            assert name.split("/")[0] in allowed or "/" not in name, f"{path.name}: {name}"
            assert ".." not in name
        for name in [*ours, *system]:
            assert not re.match(r"pybind11|Python\.h|torch|ATen|c10", name), f"{path.name}: {name}"
    per_isa = path.name in ("vec.h", "amx.h", "functions.h") or path.name.endswith("-inl.h")
    if per_isa or path.name.startswith("kernels"):
        for name in system:
            assert name.endswith(".h") or name in C_HEADERS, f"{path.name}: {name} is the STL's"


def test_the_documentation_lists_every_file_of_the_core():
    text = (ROOT / "docs" / "native.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| `.*\|$", text, re.M))
    named = {name for name in re.findall(r"`([\w.<>/-]+)`", rows) if not name.endswith("/")}
    files = [
        {re.sub(r"_(scalar|avx\w+|amx\w*)\.", "_<isa>.", path.name), path.stem}
        for path in (ROOT / "csrc" / "cpu").iterdir()
    ]
    assert not [names for names in files if not names & named], "not in docs/native.md"
    assert not named - set().union(*files), "of docs/native.md, no such file"
