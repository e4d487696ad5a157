"""Programs as data: what they compute of indices, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from fastdreamer.ops.triton.cuda_graph import GRAPHS
from fastdreamer.ops.triton.program import Kernel, Launch, Loop, Program, Slot, index
from fastdreamer.ops.triton.run import run

F32 = torch.float32
FN = SimpleNamespace(arg_names=["x", "n"], __name__="f")
KERNEL = Kernel(FN)
X = Slot("x", (4, 3), F32)


def values(expression, **counts):
    (name, count), = counts.items()  # fmt: skip
    return [expression.value({name: i}) for i in range(count)]


def test_indices():
    t = index("t")
    assert values(t * 5 + 2, t=3) == [2, 7, 12]
    assert values(3 - t, t=3) == [3, 2, 1]
    assert values((t + 1) % 2 * 10, t=4) == [10, 0, 10, 0]
    assert values((3 - t) % 2, t=4) == [1, 0, 1, 0]
    assert values(2 * t - (1 + t % 3), t=4) == [-1, 0, 1, 5]
    assert (index("i") * 4 + t).value({"i": 2, "t": 1}) == 9
    with pytest.raises(ValueError, match="only one loop's index"):
        (t + index("i")) % 2
    with pytest.raises(ValueError, match="only one loop's index"):
        (t % 2) % 2


def launch(offset=0, n=1, grid=(1,), slot=X):
    return Launch(KERNEL, grid, {"x": slot.at(offset), "n": n})


def test_a_launch_names_every_argument():
    with pytest.raises(ValueError, match=r"f: arguments missing \['n'\], unknown \['m'\]"):
        Launch(KERNEL, (1,), {"x": X, "m": 1})
    with pytest.raises(ValueError, match="grid must be 1 to 3 positive sizes"):
        launch(grid=(1, 0))
    with pytest.raises(ValueError, match="grid must be 1 to 3 positive sizes"):
        launch(grid=(1, 1, 1, 1))
    with pytest.raises(TypeError, match="n is a str"):
        launch(n="1")
    with pytest.raises(ValueError, match=r"f has no arguments \['y'\]"):
        Kernel(FN, {"y": 1})


def test_a_program_stays_in_its_slots():
    t = index("t")
    Program("p", [X], [Loop("t", 4, [launch(t * 3)]), Loop("t", 4, [launch((3 - t) * 3)])])
    with pytest.raises(ValueError, match="p: f's x goes from 0 to 12, slot x has 12 elements"):
        Program("p", [X], [Loop("t", 5, [launch(t * 3)])])
    with pytest.raises(ValueError, match="goes from -3 to 6"):
        Program("p", [X], [Loop("t", 4, [launch((2 - t) * 3)])])
    with pytest.raises(ValueError, match="uses the index of loop t, which is not around it"):
        Program("p", [X], [launch(t)])
    with pytest.raises(ValueError, match="uses the index of loop t"):
        Program("p", [X], [launch(n=t)])
    with pytest.raises(ValueError, match="is in slot y, not a slot of it"):
        Program("p", [X], [launch(slot=Slot("y", (2,), F32))])
    with pytest.raises(ValueError, match="two slots share a name"):
        Program("p", [X, Slot("x", (1,), F32)], [])
    with pytest.raises(ValueError, match="loop t is inside one of its name"):
        Program("p", [X], [Loop("t", 1, [Loop("t", 1, [launch()])])])
    with pytest.raises(ValueError, match="slot y cannot be torch.float64"):
        Program("p", [Slot("y", (1,), torch.float64)], [])
    with pytest.raises(ValueError, match="count must not be negative"):
        Loop("t", -1, [])


def test_what_is_compiled_follows_from_the_arguments():
    t = index("t")
    spec = launch(t * 4, n=t * 2**30).spec({"t": 2})
    assert dict(spec.types) == {"x": "*fp32", "n": "i32"}
    assert spec.aligned == {"x"}
    assert dict(launch(n=t * 2**30).spec({"t": 3}).types)["n"] == "i64"
    assert dict(launch(n=True).spec({}).types)["n"] == "i1"
    assert dict(launch(n=1.0).spec({}).types)["n"] == "fp32"
    assert launch(t * 3).spec({"t": 2}).aligned == set()
    assert launch().spec({}, misaligned=["x"]).aligned == set()
    assert launch().spec({}) == launch(n=7).spec({})
    assert Launch(Kernel(FN, num_warps=8), (1,), {"x": X, "n": 1}).spec({}) != launch().spec({})


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match="p: a CUDA graph needs CUDA tensors, got cpu"):
        GRAPHS.run(Program("p", [X], [launch()]), {"x": torch.zeros(4, 3)})


def test_launches_come_in_order():
    t, i = index("t"), index("i")
    body = [launch(), Loop("i", 2, [Loop("t", 2, [launch(i * 6 + t * 3)]), launch(n=i)])]
    at = [x.args["x"].offset.value(ix) for x, ix in Program("p", [X], body).launches()]
    assert at == [0, 0, 3, 0, 6, 9, 0]


def test_run_takes_cpu_tensors_launch_by_launch(monkeypatch):
    calls = []

    class Recorder(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda **args: calls.append((grid, args))

    kernel = Kernel(Recorder(arg_names=["x", "n", "C"], __name__="f"), {"C": 8}, num_warps=2)
    y = Slot("y", (2, 3), F32, "output")
    t = index("t")
    body = [Loop("t", 2, [Launch(kernel, (5,), {"x": y.at(t * 3), "n": t})])]
    x = torch.zeros(4, 3)
    outputs = run(Program("p", [X, y], body), {"x": x})
    assert [grid for grid, _ in calls] == [(5, 1, 1)] * 2
    first, second = (args for _, args in calls)
    assert first["x"].data_ptr() == outputs["y"].data_ptr()
    assert second["x"].data_ptr() == outputs["y"][1].data_ptr()
    assert (first["n"], second["n"], first["C"], first["num_warps"]) == (0, 1, 8, 2)
    assert first["enable_fp_fusion"] is True


def test_inputs_are_checked_once(monkeypatch):
    """By what runs the program: launch by launch, a graph, or the launches of a capture."""
    checked, taken, check = [], [], Program.check
    counted = lambda self, inputs: checked.append(inputs) or check(self, inputs)  # noqa: E731
    monkeypatch.setattr(Program, "check", counted)
    program, given = Program("p", [X], []), {"x": torch.zeros(4, 3)}
    run(program, given)
    assert checked == [given]
    with pytest.raises(ValueError, match=r"p: inputs must be \['x'\], got \[\]"):
        run(program, {})
    checked.clear()
    with pytest.raises(ValueError, match="a CUDA graph needs CUDA tensors"):
        GRAPHS.run(program, given)
    assert checked == [given]
    for name in ("run", "enqueue"):
        monkeypatch.setattr(GRAPHS, name, lambda *_, name=name: taken.append(name))
        capturing = lambda _, name=name: name == "enqueue"  # noqa: E731
        monkeypatch.setattr("fastdreamer.ops.triton.run.capturing", capturing)
        run(program, {"x": SimpleNamespace(is_cuda=True, device=torch.device("cuda"))})
    assert checked == [given] and taken == ["run", "enqueue"]
