"""Where a run computes: --device and --backend on machines with and without a GPU."""

import dataclasses
import json

import pytest
import torch

from fastdreamer import _native
from fastdreamer.cli import main
from fastdreamer.config import PRESETS, ConfigError
from fastdreamer.machine.device import (
    describe_device,
    resolve_config,
    resolve_device,
    resolve_threads,
)
from fastdreamer.ops import gpu
from fastdreamer.ops.backend import OPS, BackendError, describe_kernels, kernel_choice
from fastdreamer.ops.gpu import driver_state
from fastdreamer.ops.triton import tiles
from fastdreamer.training.checkpoint import list_checkpoints, list_snapshots, load_meta
from fastdreamer.training.trainer import create_run, read_config

TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FASTDREAMER_GRAPH", raising=False)
    gpu._why_no_kernels.cache_clear()
    yield
    gpu._why_no_kernels.cache_clear()


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine whose torch has GPUs, as far as choices go: ``with_gpu(capability, ...)``."""

    def make(*capabilities, driver=None, hip=None, triton=(3, 7)):
        def cuda_driver():
            if driver is not None:
                raise _native.DriverError(driver)
            return {"path": "libcuda.so.1", "version": (13, 0), "devices": len(capabilities)}

        asked = lambda ordinal: 0 if ordinal is None else torch.device("cuda", ordinal).index  # noqa: E731
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_capability": lambda ordinal=None: capabilities[asked(ordinal)],
            "get_device_name": lambda ordinal=None: "some GPU",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(tiles, "triton_version", lambda: triton)
        monkeypatch.setattr(_native, "cuda_driver", cuda_driver)

    return make


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def settings(**values):
    return dataclasses.replace(TINY, **values)


def test_auto_without_a_gpu_is_the_cpu(without_gpu):
    assert TINY.device == "auto"
    for backend in ("auto", "eager", "native"):
        assert resolve_config(settings(backend=backend)).device == "cpu"
    with pytest.raises(BackendError, match="'triton' cannot run: no usable NVIDIA GPU") as caught:
        resolve_config(settings(backend="triton"))
    assert driver_state() in str(caught.value), "the reason that doctor shows"
    assert describe_device("cpu") == "cpu"


def test_auto_with_a_gpu_is_the_gpu(with_gpu):
    with_gpu((9, 0))
    for backend in ("auto", "eager", "triton"):
        assert resolve_config(settings(backend=backend)).device == "cuda"
    assert resolve_config(settings(backend="native")).device == "cpu"
    for device in ("cpu", "cuda", "cuda:1"):
        assert resolve_device(device) == device
    assert describe_device("cpu") == "cpu (there is a GPU: --device cuda takes it)"


OLD = "some GPU is of compute capability 7.5, triton needs 8.0"
NOT_CAPABLE = {
    "old": (((7, 5),), {}, OLD),
    "rocm": (((9, 0),), {"hip": "6.4"}, "this PyTorch is built for ROCm 6.4, triton needs NVIDIA"),
    "triton": (((9, 0),), {"triton": (3, 5)}, "Triton is 3.5, the kernels need 3.6 or newer"),
    "driver": (((9, 0),), {"driver": "the NVIDIA driver is too old"}, "the NVIDIA driver is too"),
}


@pytest.mark.parametrize("name", NOT_CAPABLE)
def test_a_gpu_that_the_kernels_cannot_use(name, with_gpu):
    capabilities, more, reason = NOT_CAPABLE[name]
    with_gpu(*capabilities, **more)
    assert resolve_config(TINY).device == "cpu"
    assert describe_device("cpu").startswith(f"cpu (not on the GPU: {reason}")
    with pytest.raises(BackendError, match=f"cannot run: {reason}"):
        resolve_config(settings(backend="triton"))
    with pytest.raises(BackendError, match=f"cannot run: {reason}"):
        resolve_config(settings(backend="triton", device="cuda"))
    assert resolve_config(settings(device="cuda")).device == "cuda", "asked for: eager there"
    for op in OPS.values():  # what doctor prints
        assert op.why_not("triton", "cuda").startswith(reason)
        assert op.why_not("eager", "cuda") is None


def test_auto_takes_eager_on_such_a_gpu(with_gpu, monkeypatch):
    class OnGPU:
        device, dtype, requires_grad = torch.device("cuda", 1), torch.float32, False

        def __getattr__(self, name):
            return getattr(torch.zeros(3), name)

    with_gpu((9, 0), (7, 5))
    op = OPS["lambda_return"]
    assert op.select("auto", OnGPU()) is op.eager
    with pytest.raises(BackendError, match=OLD):
        op.select("triton", OnGPU())
    monkeypatch.setattr(OnGPU, "device", torch.device("cuda", 0))
    assert op.select("auto", OnGPU()) is not op.eager
    with_gpu((9, 0), triton=(3, 5))
    gpu._why_no_kernels.cache_clear()
    assert op.select("auto", OnGPU()) is op.eager
    with pytest.raises(BackendError, match=r"cannot run: Triton is 3\.5, the kernels need 3\.6"):
        op.select("triton", OnGPU())


def test_without_the_extension_graphs_cannot_be_replayed(with_gpu, monkeypatch):
    import sys

    import fastdreamer

    with_gpu((9, 0))
    monkeypatch.setitem(sys.modules, "fastdreamer._native", None)
    monkeypatch.delattr(fastdreamer, "_native")
    assert gpu.why_no_kernels().startswith("extension not built, it replays the CUDA graphs: ")
    monkeypatch.setenv("FASTDREAMER_GRAPH", "0")  # kernel by kernel, by Triton's launcher
    assert gpu.why_no_kernels() is None


def test_backend_and_device_that_contradict_each_other(with_gpu):
    with_gpu((9, 0))
    for backend, device in (("triton", "cpu"), ("native", "cuda"), ("native", "cuda:1")):
        with pytest.raises(ConfigError, match=f"backend '{backend}' .* device is '{device}'"):
            resolve_config(settings(backend=backend, device=device))


def test_a_run_keeps_the_device_that_it_starts_on(tmp_path, with_gpu, monkeypatch):
    with_gpu((9, 0))
    create_run(tmp_path / "gpu", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    create_run(tmp_path / "cpu", TINY)
    assert read_config(tmp_path / "gpu").device == "cuda"
    assert read_config(tmp_path / "cpu").device == "cpu"


def test_what_auto_chose_is_in_the_output_and_in_config_json(
    tmp_path, capsys, monkeypatch, without_gpu
):
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    run, auto = tmp_path / "run", ["--precision", "auto", "--threads", "0"]
    few = ["--train.frames", "120", "--eval.every", "0"]
    assert main(["train", "walker", "--preset", "tiny", *auto, *few, "--run", str(run)]) == 0
    chosen = json.loads((run / "config.json").read_text())["chosen"]
    assert chosen == {
        "device": "cpu",
        "precision": _native.faster(),
        "threads": resolve_threads(dataclasses.replace(TINY, threads=0), "cpu"),
        "backend": "native",
        "kernels": describe_kernels(kernel_choice()),
    }
    said = f"computing on cpu in {chosen['precision']} by native, {chosen['kernels']}"
    assert said in " ".join(capsys.readouterr().out.split())
    assert read_config(run).backend == "auto", "which goes on meaning what is fast"
    monkeypatch.setenv("FASTDREAMER_BACKEND", "eager")
    assert main(["train", "--resume", str(run), "--train.frames", "160"]) == 0
    assert f"in {chosen['precision']} by eager" in " ".join(capsys.readouterr().out.split())
    chosen = json.loads((run / "config.json").read_text())["chosen"]
    assert (chosen["backend"], chosen["kernels"]) == ("eager", None)


def test_a_run_of_a_gpu_goes_on_without_one_when_told_to(tmp_path, capsys, without_gpu):
    run = tmp_path / "run"
    assert main(["train", "walker", "--preset", "tiny", "--run", str(run)]) == 0
    assert "computing on cpu" in capsys.readouterr().out
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"device": "cuda"}))
    more = ["--train.frames", "440"]
    assert main(["train", "--resume", str(run), *more]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "was trained on cuda, and here is no usable NVIDIA GPU" in text
    assert "--device cpu goes on without it" in text
    assert main(["train", "--resume", str(run), *more, "--device", "cpu"]) == 0
    assert "trained on cuda so far: from here on not bit for bit" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["device"] == "cpu"


def test_a_run_keeps_the_precision_that_it_starts_in(tmp_path, monkeypatch, without_gpu):
    for precision in ("bf16", "fp32"):
        monkeypatch.setattr(_native, "faster", lambda p=precision: p)
        create_run(tmp_path / precision, settings(precision="auto", backend="native"))
        assert read_config(tmp_path / precision).precision == precision
    assert resolve_config(settings(precision="bf16")).precision == "bf16", "as asked"


def test_a_resume_says_that_the_kernels_are_others(tmp_path, capsys, monkeypatch, without_gpu):
    run = tmp_path / "run"
    assert main(["train", "walker", "--preset", "tiny", "--run", str(run)]) == 0
    assert "other kernels" not in capsys.readouterr().out
    for path in (
        *list_checkpoints(run / "checkpoints"),
        *list_snapshots(run / "snapshots").values(),
    ):
        assert load_meta(path)["kernels"] == kernel_choice()
    resume = lambda frames: main(["train", "--resume", str(run), "--train.frames", str(frames)])  # noqa: E731
    assert resume(440) == 0
    assert "other kernels" not in capsys.readouterr().out
    other = {"fp32": "avx2", "bf16": "avx2", "for_bf16": "fp32"}
    monkeypatch.setattr("fastdreamer.training.trainer.kernel_choice", lambda: other)
    assert resume(480) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"({describe_kernels(kernel_choice())}; now fp32 by avx2, bf16 in fp32 arith" in text
    assert load_meta(list_checkpoints(run / "checkpoints")[-1])["kernels"] == other
