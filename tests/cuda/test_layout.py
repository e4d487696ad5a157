"""How kernels take their parameters: by PTX, by Triton's launcher, by NVIDIA's header."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import standin
import torch

from fastdreamer import _native
from fastdreamer.ops.triton.program import Kernel, Launch, Slot

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("flag", [None, "-D__CUDA_API_VERSION_INTERNAL"])
def test_the_prototypes_are_those_of_cuda_h(flag):
    header = standin.cuda_header()
    if header is None:
        pytest.skip("no cuda.h: the Triton wheel is not installed or has none")
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{header}"]
    done = subprocess.run(
        [*command, *([flag] if flag else []), HERE / "prototypes.cpp"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("unsigned shared_bytes;", "unsigned long shared_bytes;"),
        ("kDeinitialized = 4;", "kDeinitialized = 5;"),
        ("(Exec exec, Stream stream)", "(Exec exec)"),
        ("(Module * module, const void* image)", "(Module * module, void* image)"),
        ("(int* count)", "(long* count)"),
    ],
)
def test_a_wrong_prototype_does_not_compile(change, tmp_path):
    header = standin.cuda_header()
    if header is None:
        pytest.skip("no cuda.h: the Triton wheel is not installed or has none")
    text = (ROOT / "csrc/cuda/api.h").read_text()
    assert change[0] in text
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/api.h").write_text(text.replace(*change))
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{tmp_path}", f"-I{header}"]
    done = subprocess.run([*command, HERE / "prototypes.cpp"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "static assertion failed" in done.stderr


def test_the_extension_needs_no_driver_to_be_imported():
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", _native.__file__], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("no nm")
    assert not [line for line in listed.stdout.splitlines() if line.split()[-1].startswith("cu")]


def test_triton_s_launcher_gives_the_same_bytes(tmp_path):
    if reason := standin.why_not():
        pytest.skip(reason)
    library = standin.build(tmp_path)
    path = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    paths |= {"FASTDREAMER_LIBCUDA": str(library), "PYTHONPATH": path}
    every = ["all"] if os.environ.get("FASTDREAMER_GRAPH_OPS") == "all" else []
    done = subprocess.run(
        [sys.executable, HERE / "launcher.py", *every],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | paths,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"sm_\d+, \w+: (\d+) programs, (\d+) launches, (\d+) kernels", done.stdout)
    assert len(found) == (8 if every else 1)
    for programs, launches, kernels in found:
        assert int(programs) == 22 and int(launches) >= 352 and int(kernels) >= 39


# ---------------------------------------------------------------- PTX

PTX = """
.visible .entry f(
	.param .u64 .ptr .global .align 1 f_param_0,
	.param .u32 f_param_1,
	.param .f32 f_param_2,
	.param .u64 f_param_3,
	.param .u8 f_param_4,
	.param .u64 .ptr .global .align 1 f_param_5
)
.reqntid 128
"""
METADATA = {"name": "f", "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False,
            "global_scratch_size": 0, "profile_scratch_size": 0, "num_warps": 4,
            "shared": 64}  # fmt: skip


def spec_of_f():
    names = ["x", "n", "scale", "big", "flag"]
    fn = SimpleNamespace(arg_names=names, __name__="f")
    slot = Slot("x", (4,), torch.float32)
    args = {"x": slot, "n": 3, "scale": 1.0, "big": 2**40, "flag": True}
    return Launch(Kernel(fn), (1,), args).spec({})


def check(ptx=PTX, **metadata):
    pytest.importorskip("triton")
    from fastdreamer.ops.triton.aot import checked

    return checked(spec_of_f(), SimpleNamespace(**METADATA | metadata), ptx, b"cubin")


def test_the_layout_is_derived_from_the_signature():
    made = check()
    assert made.kinds == ("pointer", "i32", "f32", "i64", "u8")
    assert (made.hidden, made.threads, made.shared_bytes) == (1, 128, 64)


@pytest.mark.parametrize(
    "change",
    [
        (".u32 f_param_1", ".u64 f_param_1"),
        (".f32 f_param_2", ".u32 f_param_2"),
        (".u64 f_param_3", ".u32 f_param_3"),
        ("	.param .u8 f_param_4,\n", ""),
        (".u64 .ptr .global .align 1 f_param_5", ".u32 f_param_5"),
        ("f_param_5", "f_param_5,\n.param .u64 a,\n.param .u64 b"),
        (".param .u32 f_param_1", ".reg .u32 f_param_1"),
        (".entry f(", ".entry g("),
        (".reqntid 128", ".reqntid 256"),
        (".reqntid 128", ".maxntid 128"),
    ],
)
def test_a_kernel_with_another_layout_is_refused(change):
    from fastdreamer.ops.triton.aot import LayoutError

    assert change[0] in PTX
    with pytest.raises(LayoutError, match="f: "):
        check(PTX.replace(*change))


@pytest.mark.parametrize(
    "name, value",
    [("num_ctas", 2), ("launch_cooperative_grid", True), ("launch_pdl", True),
     ("global_scratch_size", 128), ("profile_scratch_size", 8)],
)  # fmt: skip
def test_what_the_loop_does_not_give_is_refused(name, value):
    from fastdreamer.ops.triton.aot import LayoutError

    with pytest.raises(LayoutError, match=f"f: {name} is {value}, the loop can run it with"):
        check(**{name: value})


def test_a_kernel_without_its_ptx_is_refused(monkeypatch):
    """Triton keeps the cubin alone where it is told to."""
    pytest.importorskip("triton")
    from fastdreamer.ops.triton import aot

    made = SimpleNamespace(metadata=SimpleNamespace(**METADATA), asm={"cubin": b"cubin"})
    monkeypatch.setattr(aot, "source", lambda spec: None)
    monkeypatch.setattr(aot.triton, "compile", lambda *_, **__: made)
    with pytest.raises(aot.LayoutError, match="f: Triton kept no PTX .* TRITON_STORE_BINARY_ONLY"):
        aot.compile_kernel.__wrapped__(spec_of_f(), 90)
