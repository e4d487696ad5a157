"""Builds the one extension module, ``fastdreamer._native``; all metadata is in pyproject.toml.

Neither torch nor a CUDA toolkit is needed: only a C++17 compiler (``CXX``, else ``c++``), the
Python headers and pybind11. A source named ``*_<isa>.cpp`` is compiled with the flags of that
instruction set, everything else for the baseline; which kernels run is decided at run time.
``FASTDREAMER_NO_NATIVE=1`` leaves the extension out and makes a pure Python package.
``CXXFLAGS`` and ``LDFLAGS`` are appended, e.g. for sanitizers.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'"(.+)"', (ROOT / "fastdreamer/_version.py").read_text()).group(1)

# -ffp-contract=off: a multiply-add is fused where the source says so and nowhere else, so that
# results do not change with the compiler.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", f'-DFASTDREAMER_VERSION="{VERSION}"']
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
}
ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS["amx_emulated"] = ISA_FLAGS["avx512bf16"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Apple's compiler has no OpenMP of its own; the kernels then run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

KNOWN = "C++17 and AMX (g++ 11, clang 11 or newer)" if X86 else "C++17"
NEEDS = f"It must know {KNOWN}{' and OpenMP' if OPENMP else ''}: set CXX to one that does"
WITHOUT = "or set FASTDREAMER_NO_NATIVE=1 to install without the compiled CPU core."


def isa_of(source: str) -> str:
    named = [isa for isa in ISA_FLAGS if Path(source).stem.endswith(f"_{isa}")]
    return named[0] if named else "scalar"


class Build(build_ext):
    """Compiles the sources side by side, each with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        import pybind11  # only here: a pure installation does not need it

        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        flags = [*FLAGS, *OPENMP, *(f"-I{path}" for path in includes)]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            output = str(objects / "-".join(Path(source).with_suffix(".o").parts))
            # Kernels throw nothing; without this an ISA's object would hold weak symbols.
            kernels = ["-fno-exceptions"] if Path(source).stem.startswith("kernels_") else []
            run([*cxx, *flags, *kernels, *ISA_FLAGS[isa_of(source)], "-c", source, "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        mac = ["-bundle", "-undefined", "dynamic_lookup"]
        shared = mac if sys.platform == "darwin" else ["-shared"]
        extra = shlex.split(os.environ.get("LDFLAGS", ""))
        run([*cxx, *shared, *OPENMP, *compiled, *extra, "-o", str(target)])


def compiler() -> list[str]:
    """Return the compiler's command; where something is missing, end with one sentence."""
    if sys.platform == "win32":
        stop(f"the compiled CPU core builds on Linux and macOS only: use one of them, {WITHOUT}")
    cxx = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(cxx[0]) is None:
        stop(
            f"no C++ compiler ({cxx[0]} not found): install one, on Debian with "
            f"`apt-get install g++ python3-dev`, {WITHOUT}"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        stop(
            f"no Python headers ({header} not found): install them, on Debian with "
            f"`apt-get install python3-dev`, {WITHOUT}"
        )
    return cxx


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, file=sys.stderr)
    if done.returncode:
        stop(f"the C++ compiler failed (output above): {shlex.join(command)}\n{NEEDS}, {WITHOUT}")


def stop(sentence: str) -> None:
    raise SystemExit(f"fastdreamer: {sentence}")


def extensions() -> list[Extension]:
    if os.environ.get("FASTDREAMER_NO_NATIVE") == "1":
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    if not X86:
        sources = [source for source in sources if not ISA_FLAGS[isa_of(source)]]
    return [Extension("fastdreamer._native", sources, depends=headers)]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
