"""Every measurement behind README.md's tables: `python -m benchmarks [--write]`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.machine import ROOT
from benchmarks.report import MEASUREMENTS

INCOMPLETE = ("ops", "categorical", "curves", "phases", "memory")
"""Those that can go on without a variant; the others need none but native, or no native at all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument("--write", action="store_true", help="keep the results: JSON and README")
    args = parser.parse_args()
    for name in MEASUREMENTS:  # a process each: none starts with another's memory or threads
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--write"] * args.write)]
        command += ["--allow-missing"] * (args.allow_missing and name in INCOMPLETE)
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
