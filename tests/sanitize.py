"""Builds the extension with a sanitizer, in a copy, and runs the native tests under it.

    python tests/sanitize.py [address|undefined|thread] [pytest arguments]

``address`` finds accesses out of bounds and after free (of tensors and of the extension's own
memory; leaks are not asked for, Python has too many), ``undefined`` undefined behaviour, and
``thread`` data races. libgomp is not instrumented, so that the thread sanitizer cannot see its
barriers and would report every parallel region: that build runs the same regions on ``std::thread``
instead (``parallel.h``). Everything that is not the extension (Python, torch, NumPy) is not
instrumented either, and races inside of it are ignored. Needs g++ with its sanitizer runtimes.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = "-O1 -g -fno-omit-frame-pointer -Wno-uninitialized -Wno-maybe-uninitialized"
FLAGS = {
    "address": f"{COMMON} -fsanitize=address",
    "undefined": f"{COMMON} -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all",
    "thread": f"{COMMON} -fsanitize=thread",
}
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66",
}
TESTS = ["tests/ops/test_functions.py", "tests/ops/test_native.py",
         "tests/ops/test_lambda_return.py", "tests/ops/test_packs.py", "tests/ops/test_safety.py",
         "tests/ops/test_company.py",
         "tests/ops/test_variants.py", "tests/ops/test_cem_native.py", "tests/ops/test_amx.py",
         "tests/ops/test_codec.py", "tests/ops/test_decide.py",
         "tests/ops/test_categorical_native.py", "tests/ops/test_normed_native.py",
         "tests/ops/test_readout_native.py", "tests/ops/test_blocks_native.py",
         "tests/envs/test_rays.py"]  # fmt: skip
# Triton, dynamo and OpenGL load compilers of their own; forked children and exits are no work of
# ours under a preloaded runtime.
SKIPPED = "not triton and not compiled and not opengl and not fork and not exit"


def main(kind: str, arguments: list[str]) -> int:
    cxx = os.environ.get("CXX", "g++")
    runtime = subprocess.run(
        [*shlex.split(cxx), f"-print-file-name={RUNTIMES[kind]}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if not os.path.isabs(runtime):
        raise SystemExit(f"{cxx} has no {RUNTIMES[kind]}: install g++ with its sanitizers")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        skip = shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", "results")
        shutil.copytree(ROOT, copy, ignore=skip)
        build = {**os.environ, "CXX": cxx, "CXXFLAGS": FLAGS[kind], "LDFLAGS": FLAGS[kind]}
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "-q"]
        subprocess.run(command, cwd=copy, env=build, check=True)
        environment = {
            **os.environ,
            **OPTIONS,
            # libstdc++ beside it: the runtime looks for C++'s throw when it is loaded
            "LD_PRELOAD": f"{runtime} {_libstdcpp(cxx)}",
            "PYTHONPATH": str(copy),
            "PYTHONMALLOC": "malloc",  # Python's own would hide the bounds of small objects
            "FASTDREAMER_FUZZ": os.environ.get("FASTDREAMER_FUZZ", "60"),
        }
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        if not any(argument.startswith("-k") for argument in arguments):
            tests += ["-k", SKIPPED]
        if not any("tests/" in argument for argument in arguments):
            tests += TESTS
        # without address randomisation: the runtimes have fixed places for their shadow memory
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        return subprocess.run([*fixed, *tests, *arguments], cwd=copy, env=environment).returncode


def _libstdcpp(cxx: str) -> str:
    found = subprocess.run(
        [*shlex.split(cxx), "-print-file-name=libstdc++.so.6"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return found if os.path.isabs(found) else ""


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
        raise SystemExit(f"usage: python tests/sanitize.py {'|'.join(FLAGS)} [pytest arguments]")
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
