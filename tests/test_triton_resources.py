"""The largest Triton kernels, compiled ahead; ``python -m tests.triton_resources`` for all."""

import threading
from importlib.metadata import version as version_of

import pytest
from triton_resources import MODELS, compile_for, faults, kernels, label, memory_order

from fastdreamer.ops.triton import aot, tiles
from fastdreamer.ops.triton.build import Precision
from fastdreamer.testing import REPORT

WALKER = 50  # rows


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cells.forward_kernel True with first/extra", ("report", True, 90)),
        ("cells.backward_kernel with first", ("report", True, 90)),
        ("cells.backward_kernel with i_norms/g_norm/l_norms/first", ("today", True, 90)),
        ("blocks.forward_kernel with own", ("late", True, 120)),
        ("blocks.gates_backward_kernel with norm", ("late", True, 90)),
        ("mlp.forward_kernel action True", ("report", True, 80)),
        ("weights.gradient_kernel", ("report", True, 90)),
        ("cem.refit_kernel", ("report", True, 90)),
        ("categorical.gumbel_backward_kernel with d_more", ("gumbel", True, 90)),
    ],
)
def test_kernel(name, options):
    model, bf16, arch = options
    specs = kernels(MODELS[model], WALKER, Precision(bf16, arch))
    found = [spec for spec in specs if label(spec).startswith(name)]
    assert found, name
    used = compile_for(found[0], arch)
    assert not faults(found[0], used), used


def test_a_tile_may_be_of_newer_versions_alone(monkeypatch):
    def columns(kind, arch, rows):
        return tiles.choose(kind, rows, bf16=True, arch=arch).columns

    taken = {}
    for version in ((3, 6), (3, 7), (3, 9), (3, 10)):
        monkeypatch.setattr(tiles, "triton_version", lambda version=version: version)
        taken[version] = [columns("step_backward", 90, rows) for rows in (50, 2500)]
        others = [columns("step_backward", arch, 50) for arch in (80, 100, 120)]
        assert others == [64, 64, 64]
        assert tiles.choose("step", 50, bf16=True, arch=100).registers is None
    assert taken == {(3, 6): [64, 64], (3, 7): [64, 64], (3, 9): [32, 32], (3, 10): [32, 32]}
    monkeypatch.undo()
    assert tiles.triton_version() == tuple(map(int, version_of("triton").split(".")[:2]))


def test_faults_are_seen():
    found = kernels(REPORT, WALKER, Precision(True, 90))
    spec = next(s for s in found if label(s).startswith("cells.backward_kernel with first"))
    used = compile_for(spec, 90)
    for change, word in [
        ({"stack": 8}, "stack"),
        ({"local": 4}, "local"),
        ({"spills": 1}, "spills"),
        ({"shared": 100 * 1024}, "shared"),
        ({"matrix": ()}, "matrix"),
        ({"order": used.order.replace("BLS", "", 1)}, "order"),
        ({"order": used.order[1:]}, "order"),
        ({"order": used.order[:-1]}, "order"),
        ({"moved": ("L tape",)}, "moved"),
    ]:
        assert [f for f in faults(spec, used._replace(**change)) if word in f], change


SOURCE = """#loc = loc("k.py":1:0)
module {
  tt.func public @k(%p: !tt.ptr<f32> loc("p"(#loc))) {
    scf.for %layer = %c0 to %c2 step %c1  : i32 {
      %acc = scf.for %k = %c0 to %c9 step %c1 iter_args(%a = %zero) -> (tensor<16xf32>)  : i32 {
        %x = tt.load %below, %mask : tensor<16x!tt.ptr<f32>> loc(#loc2)
        scf.yield %x : tensor<16xf32> loc(#loc3)
      } loc(#loc4)
      tt.store %above, %acc : tensor<16x!tt.ptr<f32>> loc(#loc5)
      ttg.barrier all loc(#loc6)
    } loc(#loc7)
    %y = tt.load %last : tensor<16x!tt.ptr<f32>> loc(#loc8)
    tt.store %out, %y : tensor<16x!tt.ptr<f32>> loc(#loc9)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
#loc1 = loc("k.py":3:1)
#loc2 = loc(callsite("xk"(#loc1) at #loc4))
#loc4 = loc("k.py":4:0)
#loc5 = loc("k.py":5:0)
#loc8 = loc("k.py":8:0)
#loc9 = loc("k.py":9:0)
"""
COPY = "%c = ttg.async_copy_global_to_local %below, %s : tensor<16x!tt.ptr<f32>> loc(#loc2)\n"
READ = "    %y = tt.load %last : tensor<16x!tt.ptr<f32>> loc(#loc8)\n"


def test_a_load_that_crossed_a_barrier_is_seen():
    assert memory_order(SOURCE, SOURCE) == ("LSBLS", ())
    begin, inner = "    scf.for %layer", "      %acc = scf.for"
    pipelined = SOURCE.replace(inner, COPY + inner).replace("%x = tt.load", COPY + "%x = tt.load")
    assert memory_order(SOURCE, pipelined) == ("LSBLS", ()), "a loop without barriers may be"
    for changed in (
        SOURCE.replace(begin, COPY + begin),  # so that a round loads for the next
        SOURCE.replace("      ttg.barrier", READ + "      ttg.barrier"),
        SOURCE.replace(READ, READ + COPY),
        SOURCE.replace(READ, "").replace(begin, READ + begin),
    ):
        (moved,) = memory_order(SOURCE, changed)[1]
        assert moved.startswith("L ") and "k.py" in moved


def test_kernels_are_compiled_side_by_side_and_a_long_wait_is_announced_once(monkeypatch, caplog):
    compile_kernel, wait, waited = aot.compile_kernel, aot.wait, threading.Event()

    def held(spec, capability):
        assert waited.wait(60), "what is in Triton's cache would be there before the wait"
        return compile_kernel(spec, capability)

    def let_go(*arguments, **options):
        try:
            return wait(*arguments, **options)
        finally:
            waited.set()

    monkeypatch.setattr(aot, "_LONG", 0.0)
    monkeypatch.setattr(aot, "compile_kernel", held)
    monkeypatch.setattr(aot, "wait", let_go)
    aot._announce.cache_clear()
    found = [s for s in kernels(REPORT, WALKER, Precision(False, 90)) if "cem." in label(s)][:2]
    assert len(found) == 2
    for _ in range(2):
        compile_kernel.cache_clear()
        waited.clear()
        made = aot.compile_kernels([*found, found[0]], 90)
        assert made == {spec: compile_kernel(spec, 90) for spec in found}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compiling kernels for sm_90, once")
