"""Categorical latents, every variant: `python -m benchmarks.categorical [--write]`.

The benches of `bench_categorical.py` as those of `ops` are timed; the loops compiled are single
steps.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import ops, report
from benchmarks.bench_categorical import CASES


def table(result: dict[str, Any]) -> str:
    """Return times, rates, and native's ratios to the baselines as Markdown."""
    return f"{ops.headline(result)}\n\n{ops.table(result)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="words in the names of cases; all without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    if args.only and args.write:
        parser.error("--write keeps everything or nothing")
    works = [c for c in CASES if not args.only or any(word in c.name for word in args.only)]
    result = ops.measure(args.threads, works, update=None, allow_missing=args.allow_missing)
    report.publish("categorical", result, write=args.write)


if __name__ == "__main__":
    main()
