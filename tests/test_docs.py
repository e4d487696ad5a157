"""The documents are of this code: links lead somewhere, commands parse, Python uses what there is.

Numbers are those of results by ``benchmarks/test_numbers.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import textwrap
from pathlib import Path

from fastdreamer import cli
from fastdreamer.config import PRESETS
from fastdreamer.envs import make_env

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def blocks(*languages: str) -> list[tuple[Path, str]]:
    return [
        (page, textwrap.dedent(match[2]))
        for page in PAGES
        for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
        if match[1] in languages
    ]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}"


def commands() -> list[list[str]]:
    """What is behind ``fastdreamer`` in blocks of shell, where an option is one not met before."""
    met: set[tuple[str, str]] = set()
    found = []
    for _, text in blocks("", "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^| )fastdreamer ([a-z]+\b[^&;]*)", line):
                command, *words = shlex.split(match[1].replace("$seed", "0"), comments=True)
                new = {(command, word) for word in words if word.startswith("--")} | {(command, "")}
                if new - met:
                    found.append([command, *words])
                met |= new
    return found


def test_commands_parse(monkeypatch):
    monkeypatch.setattr(cli.train, "read_config", lambda run: PRESETS["walker-v3"])
    monkeypatch.setattr(cli.train, "read_settings", lambda file: {})
    told = commands()
    assert {command for command, *_ in told} == {
        "train", "eval", "dream", "watch", "report", "plot", "export", "bench", "compare", "tasks",
        "doctor",
    }  # fmt: skip
    for words in told:
        assert dataclasses.is_dataclass(cli._parse(words)), words  # else it exits, and says why


def test_python_uses_what_there_is():
    for page, text in blocks("python"):
        for node in ast.walk(ast.parse(text)):
            home, names = "fastdreamer", []
            if isinstance(node, ast.ImportFrom) and node.module.startswith(home):
                home, names = node.module, [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == home:
                names = [node.attr]
            for name in names:
                assert hasattr(importlib.import_module(home), name), f"{page.name}: {home}.{name}"


def test_an_agent_of_the_recipe_is_played_as_it_learned():
    told = inspect.signature(make_env).parameters
    found = 0
    for page, text in blocks("python"):
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and 'agent = fastdreamer.load("runs' in text):
                continue
            if ast.unparse(node.func) == "fastdreamer.make_env":
                given = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
                given["task"] = ast.literal_eval(node.args[0])
                whole = {name: given.get(name, told[name].default) for name in told}
                whole.pop("seed")
                assert whole == vars(PRESETS["walker-v3"].env), page.name
                found += 1
    assert found == 2


def test_every_variable_that_is_read_is_told():
    sources = [*ROOT.glob("fastdreamer/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    found = set(re.findall(r'"(FASTDREAMER_[A-Z_]+)"', text))
    read = found - {"FASTDREAMER_GL_SELECTED"}  # a note to our own child processes
    page = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    assert len(read) > 5 and read <= set(re.findall(r"`(FASTDREAMER_[A-Z_]+)", page)), read
