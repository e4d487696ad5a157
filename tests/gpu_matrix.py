"""Everything about Triton kernels and CUDA graphs that needs no GPU, in one command.

``python -m tests.gpu_matrix`` compiles every kernel and tile for four architectures, runs every op
through captured graphs on the stand-in driver, and every case under Triton's interpreter. The exit
status is non-zero where any of them failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = {
    "resources": (["-m", "tests.triton_resources"], {}),
    "graphs": (["-m", "pytest", "-q", "tests/cuda"], {"FASTDREAMER_GRAPH_OPS": "all"}),
    "numbers": (["tests/ops/test_triton.py", "all"], {"TRITON_INTERPRET": "1"}),
}
"""By name: arguments of a Python, and what it finds in its environment."""


def run(names: list[str]) -> int:
    """Run some of :data:`PARTS`, print what each says and how long it took; return the status."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    lines, failed = [], []
    for name in names:
        arguments, more = PARTS[name]
        print(f"--- {name}", flush=True)
        start = time.monotonic()
        status = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**clean, "PYTHONPATH": os.pathsep.join(paths), **more},
            check=False,
        ).returncode
        seconds = time.monotonic() - start
        if status:
            failed.append(name)
        lines.append((name, seconds, "failed" if status else "passed"))
    lines.append(("total", sum(s for _, s, _ in lines), "failed" if failed else "passed"))
    for name, seconds, outcome in lines:
        print(f"{name:10} {seconds / 60:5.1f} min  {outcome}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_matrix", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    parts = parser.parse_args().parts
    if unknown := set(parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    return run(parts or list(PARTS))


if __name__ == "__main__":
    sys.exit(main())
