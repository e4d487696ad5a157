"""Results as JSON files, and as tables in README.md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent / "README.md"


def publish(name: str, result: dict[str, Any], table: str, *, write: bool) -> None:
    """Print a table and, if asked, keep it.

    Args:
        name: of ``results/<name>.json`` and of the table's place in README.md, which is between
            the lines ``<!-- <name> -->`` and ``<!-- end -->``.
        result: with the key ``machine``, as ``machine.record()`` returns it.
        table: Markdown.
        write: update both files; otherwise only print.

    Raises:
        ValueError: README.md has no such place.
    """
    text = f"{table}\n\nMeasured on: {describe(result['machine'])}."
    print(f"\n{text}\n")
    if not write:
        return
    readme = fill(README.read_text(), name, text)
    RESULTS.mkdir(exist_ok=True)
    _replace(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
    _replace(README, readme)


def fill(document: str, name: str, text: str) -> str:
    """Return the document with the text between its markers replaced."""
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(place.findall(document)) != 1:
        raise ValueError(f"{README.name} must have one place <!-- {name} --> … <!-- end -->")
    return place.sub(lambda found: f"{found[1]}{text}\n{found[2]}", document)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)
