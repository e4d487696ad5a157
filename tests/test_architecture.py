"""docs/architecture.md is a picture of the code: what is there is here, and the other way."""

import re

import pytest
from test_imports import ALLOWED, FILES, PACKAGE, ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_file_has_its_line_and_every_line_its_file():
    tree = PAGE.split("```\n")[1]
    named, above = [], {0: ""}
    for line in tree.splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        if folder := re.match(r" +(\w+)/ ", line):
            above = {depth: name for depth, name in above.items() if depth < indent}
            above[indent] = f"{above[max(above)]}{folder[1]}/"
        place = above[max(depth for depth in above if depth <= indent)] if indent > 2 else ""
        place = above.get(indent, place) if folder else place
        text = re.sub(r"\([^)]*\)", "", line)  # what stands in brackets explains
        named += [f"{place}{name}.py" for name in re.findall(r"\b(\w+)\.py\b", text)]
    files = {path.relative_to(PACKAGE).as_posix() for path in FILES if path.name != "__init__.py"}
    assert len(named) == len(set(named)), "a file is named twice"
    assert set(named) == files


def test_the_table_says_what_the_rules_say():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ([^|]+) \|$", PAGE, re.M)
    said = {room: set(re.findall(r"`(\w+)`", may)) for room, _, may in rows}
    assert said == {room: allowed - {"_native"} for room, allowed in ALLOWED.items()}


def test_the_order_is_that_of_the_rules():
    chain = re.search(r"^    (config → .+)$", PAGE, re.M)[1].split(" → ")
    for i, name in enumerate(chain):
        assert not ALLOWED[name] & set(chain[i + 1 :]), name
        assert ALLOWED[name] & set(chain[:i]) or i < 2, name


@pytest.mark.parametrize(
    "what, place, name",
    re.findall(r"^\| ([^|`]+) \| `([\w/.]+)` \| `(\w*)` \|$", PAGE, re.M),
)
def test_things_are_where_the_page_says(what, place, name):
    text = (PACKAGE / place).read_text(encoding="utf-8")
    found = name and re.search(rf"^ *(def|class) {name}\b", text, re.M)
    assert found, f"{what}: no {name} in {place}"


def test_the_path_of_a_batch_is_one():
    path = PAGE.split("## A batch")[1].split("## ")[0]
    for place in re.findall(r"`([\w/]+\.py)`", path):
        assert (PACKAGE / place).is_file(), place
    sources = "".join(file.read_text(encoding="utf-8") for file in FILES)
    for owner, method in re.findall(r"`([A-Z]\w+)\.(\w+)`", path):
        assert re.search(rf"class {owner}\b", sources) and f"def {method}(" in sources


def test_an_op_s_name_finds_its_files():
    from fastdreamer import testing  # noqa: F401  (imports every op)
    from fastdreamer.ops import decide, open_loop  # noqa: F401
    from fastdreamer.ops.backend import OPS

    own = {"encode": "codec", "decode": "codec", "decode_error": "codec"}
    loops = {"open_loop": "imagine"}  # the same with the actions given
    for op in OPS:
        name = own.get(op, op)
        places = [f"fastdreamer/ops/{name}.py", f"fastdreamer/ops/native/{name}.py"]
        if name != "codec":  # on a GPU the eager body
            places.append(f"fastdreamer/ops/triton/{name}.py")
        places.append(f"csrc/cpu/{loops.get(name, name)}.cpp")
        places += [f"tests/ops/test_{name}.py", f"benchmarks/bench_{name}.py"]
        for place in places:
            assert (ROOT / place).is_file(), f"{op}: no {place}"
