"""The package builds with and without the native core, and says clearly what is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])('out'))"
DATA = {
    str(path.relative_to(ROOT)) for path in (ROOT / "fastdreamer/data").iterdir() if path.is_file()
}


@pytest.fixture
def source(tmp_path):
    """A copy of what the build reads, with a package of two files."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fastdreamer").mkdir()
    (tmp_path / "fastdreamer/__init__.py").touch()
    shutil.copy(ROOT / "fastdreamer/_version.py", tmp_path / "fastdreamer")
    (tmp_path / "fastdreamer/data").mkdir()
    for name in DATA:
        (tmp_path / name).touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "out").mkdir()
    return tmp_path


def build(source, what, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTDREAMER_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, what],
        cwd=source,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_compiler_one_sentence_says_what_to_do(source):
    done = build(source, "build_wheel", CXX="/nonexistent/g++")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "fastdreamer: no C++ compiler (/nonexistent/g++ not found): install one, on Debian with "
        "`apt-get install g++ python3-dev`, or set FASTDREAMER_NO_NATIVE=1 to install without "
        "the compiled CPU core."
    )


def test_a_failing_compiler_stops_the_build(source):
    done = build(source, "build_wheel", CXX="false")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "fastdreamer: the C++ compiler failed" in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # as for one that knows C++17, but no AMX
    assert last.startswith("It must know C++17") and "set CXX to one that does, or set" in last
    assert last.endswith("or set FASTDREAMER_NO_NATIVE=1 to install without the compiled CPU core.")


def test_no_native_makes_a_pure_wheel_without_a_compiler(source):
    done = build(source, "build_wheel", FASTDREAMER_NO_NATIVE="1", CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    wheel = source / "out" / done.stdout.split()[-1]
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert not [name for name in names if "_native" in name]
    assert len(DATA) > 1 and set(names) >= DATA
    version = (ROOT / "fastdreamer/_version.py").read_text().split('"')[1]
    assert f"Version: {version}\n" in metadata
    assert "License-Expression: MIT\n" in metadata


def test_source_distribution_holds_the_core(source):
    done = build(source, "build_sdist", FASTDREAMER_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    with tarfile.open(source / "out" / done.stdout.split()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")}
    assert wanted | DATA <= packed


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx", "amx_emulated"])
def test_kernels_of_an_isa_export_their_table_and_no_weak_symbol(isa, tmp_path):
    """A weak symbol compiled for AVX-512 could be the one the linker keeps for every CPU."""
    from fastdreamer import _native

    if _native.build_info()["architecture"] != "x86-64":
        pytest.skip("x86-64 only")
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    flags = {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": avx512,
        "avx512bf16": [*avx512, "-mavx512bf16"],
        "amx": [*avx512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        "amx_emulated": [*avx512, "-mavx512bf16"],
    }[isa]
    output = tmp_path / "kernels.o"
    # -O0: nothing is inlined away, so that what could be emitted is emitted
    subprocess.run(
        ["c++", "-std=c++17", "-O0", "-fno-exceptions", *flags, f"-I{ROOT / 'csrc'}", "-c"]
        + [ROOT / f"csrc/cpu/kernels_{isa}.cpp", "-o", output],
        check=True,
    )
    listed = subprocess.run(["nm", "-C", output], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2)[-2:] for line in listed.stdout.splitlines()]
    weak = [symbol for symbol in symbols if symbol[0] in "WwVvu"]
    exported = [symbol[1] for symbol in symbols if symbol[0].isupper() and symbol[0] != "U"]
    assert not weak
    assert exported == [f"fastdreamer::{isa}_kernels"]


@pytest.mark.parametrize("name", ["train", "test"])
def test_readmes_commands_build_the_core_where_python_finds_it(name):
    """In a clone Python imports the clone: an installation elsewhere would leave it without one."""
    block = (ROOT / "README.md").read_text().split(f"<!-- {name} command -->\n```sh\n")[1]
    command = block.partition("\n```")[0]
    assert "\n" not in command and " && pip install -e " in command
