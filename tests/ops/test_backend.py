"""Resolution of backends: the order of the choices, explicit errors, logged fallbacks."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastdreamer import testing
from fastdreamer.ops import backend as backend_module
from fastdreamer.ops.backend import (
    OPS,
    BackendError,
    Op,
    check_backend,
    chosen_backend,
    last_backend,
    use_backend,
    why_slow,
)
from fastdreamer.ops.cem import cem
from fastdreamer.ops.checks import check_tensor
from fastdreamer.ops.gpu import driver_state
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.lambda_return import OP as LAMBDA_RETURN
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.rssm_step import rssm_step

CPU = torch.zeros(2, 3)


def missing():
    raise ModuleNotFoundError("No module named 'somewhere'", name="somewhere")


def broken():
    raise ImportError("undefined symbol")


@pytest.fixture
def make(monkeypatch):
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend_module, "why_slow", lambda: None)  # whatever CPU this is
    made = []

    def make(name="probe", **loaders):
        made.append(name)
        return Op(name, eager=lambda: "eager", **loaders)

    yield make
    for name in made:
        OPS.pop(name, None)


def native():
    return lambda: "native"


def triton():
    return lambda: "triton"


def test_argument_beats_context_beats_environment_beats_auto(make, monkeypatch):
    op = make(native=native)
    assert OPS["probe"] is op
    assert op.select(None, CPU)() == "native"
    monkeypatch.setenv("FASTDREAMER_BACKEND", "eager")
    assert op.select(None, CPU)() == "eager"
    with use_backend("native"):
        assert op.select(None, CPU)() == "native"
        assert op.select("eager", CPU)() == "eager"
        with use_backend("auto"):
            assert op.select(None, CPU)() == "native"
    assert op.select(None, CPU)() == "eager"
    assert op.select("auto", CPU)() == "native"


def test_context_ends_with_an_exception_and_stays_in_its_thread(make):
    op = make(native=native)
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    with use_backend("eager"):
        assert op.select(None, CPU)() == "eager"
        other = []

        def work():
            other.append(last_backend("probe"))
            other.append(op.select(None, CPU)())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert other == [None, "native"]
    assert last_backend("probe") == "eager"


@pytest.mark.parametrize("place", ["argument", "context", "environment"])
def test_unknown_names_list_the_valid_ones(make, monkeypatch, place):
    op = make()
    with pytest.raises(ValueError, match="eager, native, triton, auto, got 'cuda'"):
        if place == "argument":
            op.select("cuda", CPU)
        elif place == "context":
            use_backend("cuda").__enter__()
        else:
            monkeypatch.setenv("FASTDREAMER_BACKEND", "cuda")
            op.select(None, CPU)


@pytest.mark.parametrize(
    ("backend", "loaders", "tensor", "reason"),
    [
        ("native", {}, CPU, "probe has no native kernel"),
        ("native", {"native": missing}, CPU, "extension not built: No module named 'somewhere'"),
        ("native", {"native": broken}, CPU, "cannot be loaded: undefined symbol"),
        ("native", {"native": native}, CPU.double(), "tensor is float64, native needs float32"),
        ("native", {"native": native}, CPU.T, r"strides \(1, 3\), native needs it contiguous"),
        ("native", {"native": native}, CPU.to("meta"), "tensor is on meta, native needs the cpu"),
        ("triton", {"triton": triton}, CPU, "tensor is on cpu, triton needs a CUDA device"),
        ("triton", {}, CPU, "probe has no triton kernel"),
    ],
)
def test_an_explicit_choice_that_cannot_run_says_why(make, backend, loaders, tensor, reason):
    op = make(**loaders)
    with pytest.raises(BackendError, match=f"^probe: backend '{backend}' cannot run: .*{reason}"):
        op.select(backend, tensor)
    with use_backend(backend), pytest.raises(BackendError, match=reason):
        op.select(None, tensor)
    assert op.select("eager", tensor)() == "eager"


def test_tensors_on_different_devices_are_refused(make):
    op = make(native=native)
    with pytest.raises(BackendError, match="tensors are on cpu and meta"):
        op.select("native", CPU, CPU.to("meta"))


def test_integers_and_nones_are_no_obstacle(make):
    op = make(native=native)
    assert op.select("native", None, CPU, torch.zeros(2, dtype=torch.bool), None)() == "native"


def test_auto_warns_once_of_a_layout_and_says_the_remedy(monkeypatch, caplog):
    pytest.importorskip("fastdreamer._native")
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    caplog.set_level(logging.WARNING, logger="fastdreamer")
    monkeypatch.setattr(LAMBDA_RETURN, "_logged", set())
    H, B = 5, 7
    first = torch.rand(B, H)  # batch first
    expanded, transposed = torch.rand(1, B).expand(H, B), first.T
    cut = first[:, :4].T
    for reward, value in ((expanded, transposed), (transposed, transposed), (cut, cut)):
        discount = torch.full(value.shape, 0.99)
        got = lambda_return(reward, value, discount, 0.9)
        assert last_backend("lambda_return") == "eager"
        want = lambda_return(reward.contiguous(), value.contiguous(), discount, 0.9)
        assert last_backend("lambda_return") == "native"
        torch.testing.assert_close(got, want)
        with pytest.raises(BackendError, match=r"strides \(.*needs it contiguous.*contiguous\(\)"):
            lambda_return(reward, value, discount, 0.9, backend="native")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "auto takes eager, not native: tensor [5, 7] has strides" in said[0]
    assert "keep it so, or pass its .contiguous()" in said[0]


def test_the_interpreter_is_refused_in_bfloat16(make, monkeypatch):
    op = make(triton=triton)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(BackendError, match="multiplies bit patterns as if they were numbers"):
            op.select("triton", CPU)
        with torch.autocast("cpu", enabled=False):
            assert op.select("triton", CPU)() == "triton"
    with torch.autocast("cpu", torch.float16):
        assert op.select("triton", CPU)() == "triton"


def test_what_auto_chooses_is_said(monkeypatch):
    pytest.importorskip("fastdreamer._native")
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    assert (chosen_backend("cpu"), chosen_backend("meta")) == ("native", "eager")
    with use_backend("eager"):
        assert chosen_backend("cpu") == "eager"
    monkeypatch.setattr(LAMBDA_RETURN, "_loaded", {"native": "extension not built: gone"})
    assert chosen_backend("cpu") == "eager (extension not built: gone)"


def test_triton_takes_cpu_tensors_under_the_interpreter(make, monkeypatch):
    op = make(triton=triton)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.select("triton", CPU)() == "triton"
    assert op.select(None, CPU)() == "eager", "auto never interprets"


@pytest.fixture
def scalar_cpu(monkeypatch):
    """The real core, saying that this CPU has no vectors."""
    native = pytest.importorskip("fastdreamer._native")
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    monkeypatch.delenv("FASTDREAMER_ISA", raising=False)
    monkeypatch.setattr(native, "isa", lambda: "scalar")
    why_slow.cache_clear()
    yield monkeypatch
    why_slow.cache_clear()


def test_auto_passes_over_the_scalar_core_unless_it_is_asked_for(scalar_cpu, caplog):
    caplog.set_level(logging.INFO, logger="fastdreamer")
    scalar_cpu.setattr(LAMBDA_RETURN, "_logged", set())
    call = lambda backend=None: lambda_return(CPU, CPU, CPU, 0.9, backend=backend)  # noqa: E731
    for backend, took in ((None, "eager"), ("auto", "eager"), ("native", "native")):
        call(backend)
        assert last_backend("lambda_return") == took
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"lambda_return: auto takes eager, not native: {why_slow()}"]
    assert "no AVX2" in why_slow() and "FASTDREAMER_ISA=scalar" in why_slow()
    assert LAMBDA_RETURN.why_not("native", "cpu") is None, "it can run"
    why_slow.cache_clear()
    scalar_cpu.setenv("FASTDREAMER_ISA", "scalar")
    call()
    assert last_backend("lambda_return") == "native"


def test_doctor_says_why_auto_passes_over_the_scalar_core(scalar_cpu):
    doctor = pytest.importorskip("fastdreamer.machine.doctor")
    scalar_cpu.setattr(torch.cuda, "is_available", lambda: False)
    table = doctor._backends()
    takes, reasons = (list(column.cells) for column in table.columns[1:])
    assert set(takes) == {"eager"}
    assert all(f"native: {why_slow()}" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["native", "triton"])
def test_dynamo_does_not_trace_compiled_bodies(make, monkeypatch, name):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    traced = []

    def body(x):
        traced.append(torch.compiler.is_compiling())
        return x + x.data_ptr() % 2

    op = make(**{name: lambda: body})

    @torch.compile(backend="eager")
    def doubled(x):
        return 2 * op.select(name, x)(x)

    assert torch.equal(doubled(CPU + 1), 2 * (CPU + 1))
    assert traced == [False]


def test_why_not_answers_for_every_backend(make, monkeypatch):
    op = make(native=native, triton=triton)
    assert op.why_not("eager", "cpu") is None
    assert op.why_not("native", "cpu") is None
    needs = "tensor is on cpu, triton needs a CUDA device; no usable NVIDIA GPU: "
    assert op.why_not("triton", "cpu").startswith(needs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTDREAMER_LIBCUDA", "/nonexistent")
    reason = op.why_not("triton", "cuda")
    assert reason.startswith("no usable NVIDIA GPU: ")
    assert reason.endswith(driver_state())  # as doctor shows it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert op.why_not("native", "cuda") == "tensor is on cuda, native needs the cpu"
    with pytest.raises(ValueError, match="eager, native, triton, got 'auto'"):
        op.why_not("auto", "cpu")


def test_auto_logs_each_reason_once_and_warns_only_of_broken_kernels(make, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="fastdreamer")
    monkeypatch.setattr(backend_module, "how_to_build", lambda: "; do build it")
    bare, unbuilt = make("bare"), make("unbuilt", native=missing)
    for _ in range(3):
        assert bare.select(None, CPU)() == "eager"
        assert unbuilt.select(None, CPU)() == "eager"
        assert unbuilt.select(None, CPU.double())() == "eager"
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [
        ("INFO", "bare: auto takes eager, not native: bare has no native kernel"),
        (
            "WARNING",
            "unbuilt: auto takes eager, not native: extension not built: "
            "No module named 'somewhere'; do build it",
        ),
    ]


@pytest.mark.parametrize("installed", [False, True])
def test_a_clone_without_the_extension_says_how_to_build_it(tmp_path, installed):
    """Python started in a clone imports it, whatever `pip install .` put elsewhere."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    source = Path(backend_module.__file__).parents[1]
    shutil.copytree(source, clone / "fastdreamer", ignore=shutil.ignore_patterns("*.so"))
    (clone / "setup.py").touch()
    (site / "fastdreamer").mkdir(parents=True)
    (site / "fastdreamer-9.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: fastdreamer\nVersion: 9\n"
    (site / "fastdreamer-9.dist-info/METADATA").write_text(about)
    code = (  # without the finder of an editable installation, which knows where there is one
        "import sys\n"
        "own = lambda f: getattr(f, '__module__', '').startswith('__editable__')\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not own(f)]\n"
        "from fastdreamer.ops.imagine import OP\n"
        "print(OP.why_not('native', 'cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(site) if installed else str(clone)},
        capture_output=True,
        text=True,
        check=True,
    )
    reason = done.stdout.strip()
    assert reason.startswith("extension not built: ")
    assert reason.endswith(f"; `pip install -e {clone}` builds it in place")
    hides = f", and the source tree hides the package in {site / 'fastdreamer'};"
    assert (hides in reason) == installed


def test_an_installation_without_the_extension_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(backend_module, "__file__", str(tmp_path / "fastdreamer/ops/backend.py"))
    said = backend_module.how_to_build.__wrapped__()
    assert said.startswith("; installed again with a C++ compiler, without FASTDREAMER_NO_NATIVE")


def test_check_tensor_binds_letters_and_names_what_it_wants():
    dims: dict[str, int] = {}
    check_tensor("imagine", "noise", torch.zeros(15, 4, 2), ("H", "B", 2), dims)
    assert dims == {"H": 15, "B": 4}
    wrong = torch.zeros(15, 3, 6)
    with pytest.raises(ValueError) as caught:
        check_tensor(
            "imagine", "action", wrong, ("H", "B", "A"), dims, dtype=torch.float32, contiguous=True
        )
    assert str(caught.value) == (
        "imagine: action must be [H=15, B=4, A] float32 contiguous, got [15, 3, 6] float32"
    )
    assert dims == {"H": 15, "B": 4}, "a failed check must not bind letters"
    with pytest.raises(ValueError, match=r"got \[4, 15\] float32 with strides \[1, 4\]"):
        check_tensor("x", "y", torch.zeros(15, 4).T, ("B", "H"), dims, contiguous=True)
    with pytest.raises(ValueError, match="float32 on cpu, got .* on meta"):
        check_tensor("x", "y", torch.zeros(4, device="meta"), ("B",), dims, like=CPU)
    with pytest.raises(ValueError, match=r"must be \[D, D\] floating, got \[2, 3\] float32"):
        check_tensor("x", "y", torch.zeros(2, 3), ("D", "D"), {})


SIZES = testing.Sizes(2, 3, 2, 4, 5, 5, 1, 1, 1, "elu")
INPUTS = {
    cem: lambda: testing.cem_inputs(SIZES, 2, 1, 3, 1),
    imagine: lambda: testing.imagine_inputs(SIZES, 2, 1),
    lambda_return: lambda: testing.lambda_return_inputs(2, 1),
    observe: lambda: testing.observe_inputs(SIZES, 2, 1),
    open_loop: lambda: testing.open_loop_inputs(SIZES, 2, 1),
    rssm_step: lambda: testing.rssm_step_inputs(SIZES, 1),
}


@pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
def test_an_ops_contract_names_dtypes_and_what_it_raises(op):
    contract = op.__doc__.partition("Args:")[2]
    for word in ("dtype", "Returns:", "TypeError", "ValueError", "BackendError"):
        assert word in contract, word
    inputs = INPUTS[op]()
    name = next(name for name, value in inputs.items() if isinstance(value, torch.Tensor))
    says = f"^{op.__name__}: {name} must be "
    with pytest.raises(TypeError, match=f"{says}a tensor, got list"):
        op(**inputs | {name: inputs[name].tolist()})
    with pytest.raises(ValueError, match=f"{says}.* got .* int64"):
        op(**inputs | {name: inputs[name].long()})


def test_check_backend_names_what_cannot_run():
    check_backend("auto", "cpu")
    check_backend("eager", "cpu")
    with pytest.raises(BackendError, match="backend 'triton' cannot run: .*(CUDA|no triton)"):
        check_backend("triton", "cpu")
    with pytest.raises(ValueError, match="eager, native, triton, auto"):
        check_backend("cuda", "cpu")
