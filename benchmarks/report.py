"""Results: JSON files, and from them tables and plots: `python -m benchmarks.report`.

A measurement is a module of this package with ``table(result)``, Markdown for this folder's
README.md or for its own ``PAGE``. It may have ``headline(result)``, the table of the repository's
README.md, ``plot(result, path)`` with its ``CAPTION``, and ``PER_CPU = True``, which keeps one
result of every CPU model.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.machine import ROOT, cpu, cpu_slug, describe

MEASUREMENTS = (
    "ops",
    "avx2",
    "categorical",
    "curves",
    "phases",
    "run",
    "ranks",
    "collection",
    "rendering",
    "pool",
    "planning",
    "rollout",
    "peers",
    "options",
    "memory",
    "random_policy",
    "graph_overhead",
)
"""In the order in which `python -m benchmarks` makes them."""
RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent / "README.md"
TOP_README = ROOT / "README.md"

# Okabe and Ito's palette, told apart with every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def publish(name: str, result: dict[str, Any], *, write: bool) -> None:
    """Print a measurement's table and, if asked, keep the result.

    Args:
        name: of the measurement, so of ``results/<name>.json`` (one a CPU model:
            ``results/<name>/<model>.json``) and of the table's place in README.md, which is
            between the lines ``<!-- <name> -->`` and ``<!-- end -->``.
        result: with the key ``machine``, as ``machine.record()`` returns it.
        write: keep it and bring everything made from it up to date; otherwise only print.

    Raises:
        ValueError: a README.md has no such place.
    """
    print(f"\n{text(name, result)}\n")
    if write:
        path = _path(name, result)
        results = stored(name) | {path: result}
        documents = filled(name, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(result, indent=1) + "\n")
        _publish(name, results, documents)


def text(name: str, result: dict[str, Any], kind: str = "table") -> str:
    """Return a table of a measurement and the circumstances below it."""
    table = getattr(_module(name), kind)(result)
    return f"{table}\n\nMeasured on: {describe(result['machine'])}."


def stored(name: str) -> dict[Path, dict[str, Any]]:
    """Return the results kept of a measurement by their files: at most one, or one a CPU model."""
    paths = (
        sorted((RESULTS / name).glob("*.json")) if _per_cpu(name) else [RESULTS / f"{name}.json"]
    )
    return {path: json.loads(path.read_text()) for path in paths if path.exists()}


def filled(name: str, results: Mapping[Path, dict[str, Any]]) -> dict[Path, str]:
    """Return the documents that show a measurement with its tables in their places.

    Args:
        name: of the measurement.
        results: at least one, by their files.
    """
    kinds = {getattr(_module(name), "PAGE", README): "table"}
    if hasattr(_module(name), "headline"):
        kinds[TOP_README] = "headline"
    documents = {}
    for document, kind in kinds.items():
        parts = []
        if _per_cpu(name):
            models = [cpu(result["machine"]) for _, result in sorted(results.items())]
            parts.append(f"CPU models measured: {', '.join(models)}.")
        for path, result in sorted(results.items()):
            parts.append(text(name, result, kind))
            if hasattr(_module(name), "plot"):
                picture = path.with_suffix(".png").relative_to(document.parent)
                parts.append(f"![{_module(name).CAPTION}]({picture})")
        documents[document] = fill(document.read_text(), name, "\n\n".join(parts))
    return documents


def _path(name: str, result: dict[str, Any]) -> Path:
    if _per_cpu(name):
        return RESULTS / name / f"{cpu_slug(result['machine'])}.json"
    return RESULTS / f"{name}.json"


def _per_cpu(name: str) -> bool:
    return getattr(_module(name), "PER_CPU", False)


def _publish(
    name: str, results: Mapping[Path, dict[str, Any]], documents: Mapping[Path, str]
) -> None:
    for path, document in documents.items():
        _replace(path, document)
    if hasattr(_module(name), "plot"):
        for path, result in results.items():
            _module(name).plot(result, path.with_suffix(".png"))


def _module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def fill(document: str, name: str, text: str) -> str:
    """Return the document with the text between its markers replaced."""
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(place.findall(document)) != 1:
        raise ValueError(f"README.md must have one place <!-- {name} --> … <!-- end -->")
    return place.sub(lambda found: f"{found[1]}{text}\n{found[2]}", document)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Every plot's fonts, lines and grid."""
    settings = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        yield


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    description = "Redraw every table and plot from results/*.json; nothing is measured."
    argparse.ArgumentParser(description=description).parse_args()
    for name in MEASUREMENTS:
        if results := stored(name):
            _publish(name, results, filled(name, results))
            print(f"{name}: from {', '.join(str(path.relative_to(ROOT)) for path in results)}")
        else:
            print(f"{name}: not measured yet")


if __name__ == "__main__":
    main()
