"""Every op where the CPU has AVX2 and nothing wider: `python -m benchmarks.avx2 [--write]`.

The benches of ``ops``, native and eager alone, in a process whose native core, ATen, oneDNN and MKL
are all held to AVX2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from benchmarks import ops, report
from benchmarks.machine import ROOT
from benchmarks.timing import cell
from benchmarks.variants import VARIANTS

HELD = {
    "FASTDREAMER_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Read once, when each library is loaded."""
COMPARED = {name: VARIANTS[name] for name in ("native fp32", "eager fp32")}


def measure(threads: int) -> dict[str, Any]:
    """``ops.measure`` of the two variants, with what held the instruction sets.

    Raises:
        AssertionError: a native result is wrong.
        RuntimeError: this process is not held to AVX2.
    """
    if any(os.environ.get(name) != value for name, value in HELD.items()):
        raise RuntimeError(f"start the process with {HELD}")
    result = ops.measure(threads, ops.cases(), update=None, variants=COMPARED)
    return result | {"environment": HELD}


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    names = list(COMPARED)
    rows = [
        [name, *(cell(work["times"].get(v)) for v in names), ops.ratio(work["times"], *names)]
        for name, work in result["works"].items()
    ]
    return report.table(["ms: median (p20–p80)", *names, "eager / native"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    if os.environ.get("FASTDREAMER_ISA") != "avx2":
        command = [sys.executable, "-m", "benchmarks.avx2", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, cwd=ROOT, env=os.environ | HELD).returncode)
    report.publish("avx2", measure(args.threads), write=args.write)


if __name__ == "__main__":
    main()
