"""The GPU benchmark without a GPU: every path behind its device check; no time is judged.

Stand-ins replace the narrow edge alone: torch's CUDA graphs (``graph_standin``), the compiler, and
the Triton kernels, which have tests of their own. What must not leave the device is run on torch's
device "meta", whose tensors have no numbers that could be read.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import (
    bench_codec,
    bench_lambda_return,
    bench_train,
    captured,
    compiled,
    gpu,
    graph_standin,
    subpixel,
)
from benchmarks import learner as learner_module
from benchmarks import race as race_module
from benchmarks.captured import CaptureError, capture
from benchmarks.learner import CapturedUpdate, Learner
from benchmarks.race import race
from benchmarks.synthetic import ACTION_DIM, OBS_SHAPES
from benchmarks.test_tools import CODEC, small, small_imagine, wrong_case
from benchmarks.variants import Variant, gpu_variants
from fastdreamer import testing
from fastdreamer.config import PRESETS, preset
from fastdreamer.learning import dreamer as agent_module
from fastdreamer.learning.dreamer import Dreamer, NonFiniteLoss
from fastdreamer.ops import backend as backend_module
from fastdreamer.ops.backend import OPS

ROOT = Path(__file__).parents[1]
GRAPH = "eager, torch's graph"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of work so small others would only be waited for
    yield
    torch.set_num_threads(before)


@pytest.fixture
def standins(monkeypatch):
    """A GPU's ways to run on CPU tensors; returns the modes that were compiled with."""
    graph_standin.install(monkeypatch)
    monkeypatch.setattr(captured, "gc", SimpleNamespace(collect=lambda: None))  # takes long
    monkeypatch.setattr(backend_module, "interpreting", lambda: True)
    monkeypatch.setattr(backend_module, "_why_not_interpreted", lambda: None)  # it is not asked
    for op in OPS.values():
        monkeypatch.setitem(op._loaded, "triton", op.eager)
    modes = []

    def compile(body, *, dynamic, mode):
        modes.append(mode)
        return body

    monkeypatch.setattr(torch, "compile", compile)
    compiled._compiled.cache_clear()
    yield modes
    compiled._compiled.cache_clear()


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    return bench_train.open_replay(tmp_path_factory.mktemp("episodes"))


def cases(monkeypatch):
    """One of each work of ``gpu.cases()``, small."""
    step, loop = small(monkeypatch, "rssm_step"), small(monkeypatch, "open_loop")
    observe = small(monkeypatch, "observe")
    return [
        step._case("rssm_step", 3, calls=2),
        step._case("rssm_step + backward", 3, backward=True),
        observe._case("observe"),
        observe._case("observe + backward", backward=True),
        *small_imagine(monkeypatch),
        loop._case(),
        loop._case("open_loop + backward", backward=True),
        small(monkeypatch, "cem")._case(),
        *(case for case in bench_lambda_return.CASES if "H 50 B 16" in case.name),
    ]


# ------------------------------------------------------------------------ the whole command


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    ready, reason = done.stdout.splitlines()
    assert ready.startswith("Ready: ") and "a whole update" in ready
    assert reason == f"No GPU, so nothing was measured: {backend_module.why_no_cuda()}"


def test_every_op_has_a_work():
    works = gpu.cases()
    assert {case.op.name for case in works} == OPS.keys()
    assert {case.op.name for case in works if case.leaves} == OPS.keys() - {"cem", "decide"}
    assert len({case.name for case in works}) == len(works)
    assert min(case.rounds for case in works) >= gpu.ROUNDS


def test_everything_is_checked_timed_and_told(monkeypatch, tmp_path, capsys, standins):
    """The command from end to end with every work and variant, the device apart."""
    monkeypatch.setattr(race_module, "MIN_REPEATS", 2)
    works = [dataclasses.replace(case, rounds=2) for case in cases(monkeypatch)]
    variants = gpu_variants("cpu")
    limits = gpu.ceilings("cpu", 64, 0.01)
    assert limits.keys() == {"gb_per_s", "fp32", "bf16"} and min(limits.values()) > 0
    waited = []
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: None)
    monkeypatch.setattr(gpu, "MIN_REPEATS", 2)
    monkeypatch.setattr(gpu, "gpu_variants", lambda device: variants)
    monkeypatch.setattr(gpu, "cases", lambda: works)
    monkeypatch.setattr(gpu, "ceilings", lambda device: limits)
    monkeypatch.setattr(gpu, "waiter", lambda device: lambda: waited.append(device))
    monkeypatch.setattr(gpu, "PRESET", "tiny")
    monkeypatch.setattr(gpu.report, "RESULTS", tmp_path / "results")
    gpu.main(["--write"])
    text = (tmp_path / "results" / "gpu.md").read_text()
    assert text.strip() in capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "gpu.json").read_text())
    told = {"machine", "device", "ceilings", "variants", "works", "not_reached"}
    assert result.keys() == told and not result["not_reached"]
    assert f"| {' | '.join(['ms: median (p20–p80)', *variants])} |" in text
    assert result["device"].keys() >= {"name", "driver", "cuda", "cudnn", "torch", "triton"}
    assert set(result["works"]) == {*(case.name for case in works), gpu.UPDATE}
    assert next(iter(result["works"])) == gpu.FIRST[0]
    for name, work in result["works"].items():
        assert work["wrong"] is None and work["bytes"] > 0 and not work["missing"], (name, work)
        products = "lambda_return" not in name
        assert (work["gflop"] > 0) == products
        expected = [n for n, v in variants.items() if products or not v.bf16]
        assert list(work["times"]) == expected, (name, work["left_out"])
        assert set(work["left_out"].values()) <= {gpu.NO_PRODUCTS}
        for times in work["times"].values():
            assert times["repeats"] == 2 and times["byte_share"] > 0
            assert ("flop_share" in times) == products
        assert f"| {name} |" in text
    assert "Wrong" not in text and gpu.NO_PRODUCTS in text and "Ceilings measured" in text
    assert set(standins) == {"reduce-overhead"}
    rounds = {
        name: 2 + (3 if name == gpu.UPDATE else 2) for name in result["works"]
    }  # warm-up, too
    runs = sum(rounds[name] * len(work["times"]) for name, work in result["works"].items())
    assert waited == ["cpu"] * 2 * runs  # before a run starts and until it is done


def only(monkeypatch, works, *names):
    """Let the command have these works and variants of the CPU."""
    monkeypatch.setattr(race_module, "MIN_REPEATS", 2)
    works = [dataclasses.replace(case, rounds=2) for case in works]
    variants = {n: v for n, v in gpu_variants("cpu").items() if n in names}
    monkeypatch.setattr(gpu, "cases", lambda: works)
    monkeypatch.setattr(gpu, "why_no_cuda", lambda: None)
    monkeypatch.setattr(gpu, "gpu_variants", lambda device: variants)
    limits = dict.fromkeys(("fp32", "bf16", "gb_per_s"), 1.0)
    monkeypatch.setattr(gpu, "ceilings", lambda device: limits)


def test_what_is_wrong_is_told_and_nothing_else_is_lost(monkeypatch, capsys, standins):
    case = wrong_case()

    def call(backend, **inputs):
        return case.op.eager(**inputs) * (1.001 if backend == "triton" else 1)

    def broken(backend, **inputs):
        if backend == "triton":
            raise LookupError("no tile")  # as Triton's own errors, none of RuntimeError's kind
        return right.call(**inputs, backend=backend)

    right = small(monkeypatch, "rssm_step")._case("rssm_step", 2)
    wrong = dataclasses.replace(case, call=call)
    other = dataclasses.replace(right, name="case 2", call=broken)
    only(monkeypatch, [wrong, other, right], "triton fp32", "eager fp32")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu", "case", "rssm_step"])
    assert stopped.value.code == 1
    out, told = capsys.readouterr()
    assert "Wrong, so not timed:\n- case: triton fp32: " in out and "error of out0" in out
    assert "\n- case 2: LookupError: no tile\n" in out and told.count("WRONG: ") == 2
    assert "| rssm_step |" in out


def test_a_variant_that_should_run_and_does_not_is_a_failure(monkeypatch, capsys, standins):
    """On a GPU; a rehearsal has what runs there."""
    works = [small(monkeypatch, "rssm_step")._case("rssm_step", 2)]
    only(monkeypatch, works, "triton fp32", "eager fp32")
    monkeypatch.setattr(OPS["rssm_step"], "why_not", lambda *_: "no such kernel")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["rssm_step"])
    assert stopped.value.code == 1
    assert "- rssm_step (triton fp32): no such kernel" in capsys.readouterr().out
    gpu.main(["rssm_step", "--allow-missing"])
    gpu.main(["rssm_step", "--device", "cpu"])


def test_a_rehearsal_in_little_time_keeps_what_it_had(monkeypatch, tmp_path, capsys, standins):
    """The most important work first; what is not reached is named; no variant that compiles."""
    monkeypatch.setattr(race_module, "MIN_REPEATS", 2)
    step = dataclasses.replace(small(monkeypatch, "rssm_step")._case("rssm_step", 2), rounds=2)
    works = [dataclasses.replace(step, name=name) for name in ("a", "open_loop", "b", "imagine")]
    monkeypatch.setattr(gpu, "cases", lambda: works)
    monkeypatch.setattr(gpu, "ceilings", lambda device: dict.fromkeys(("fp32", "bf16"), 1.0)
                        | {"gb_per_s": 1.0})  # fmt: skip
    monkeypatch.setattr(gpu, "FIRST", ("imagine", "no such work", "open_loop"))
    clock = iter([0.0, 1.0, 59.0, 61.0, 62.0, *[63.0] * 9])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    options = ["--minutes", "1", "--without", "reduce", "--out", str(tmp_path / "new" / "out")]
    gpu.main(["--device", "cpu", *options])
    result = json.loads((tmp_path / "new" / "out" / "gpu.json").read_text())
    assert list(result["works"]) == ["imagine", "open_loop"]
    assert result["not_reached"] == ["a", "b", gpu.UPDATE]
    assert not [name for name in result["variants"] if "reduce" in name]
    text = (tmp_path / "new" / "out" / "gpu.md").read_text()
    assert f"Not reached in time: a; b; {gpu.UPDATE}." in text
    assert text.strip() in capsys.readouterr().out


def test_a_rehearsal_is_not_kept(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--write"])
    assert "not a rehearsal" in capsys.readouterr().err


def test_the_device_is_described(monkeypatch, tmp_path):
    properties = SimpleNamespace(
        name="GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$#" = 2 ] && echo "550.54.15, 1980 MHz, 700.00 W"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = json.loads(json.dumps(gpu.describe("cuda")))
    assert found | {
        "name": "GPU", "capability": "9.0", "multiprocessors": 132, "memory_gib": 80.0,
        "driver_version": "550.54.15", "clocks.max.sm": "1980 MHz", "power.limit": "700.00 W",
        "torch": torch.__version__,
    } == found  # fmt: skip
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it has no driver'; exit 9\n")
    assert gpu.nvidia_smi() == {}


def test_a_race_waits_within_the_clock():
    log = []
    work = lambda: log.append("run")  # noqa: E731
    race({"a": work, "b": work}, rounds=20, warmup=1, wait=lambda: log.append("wait"))
    assert log == ["wait", "run", "wait"] * 2 * 21
    assert gpu.waiter("cuda") is torch.cuda.synchronize


# --------------------------------------------------------------------------- the first day


@pytest.fixture
def day(tmp_path):
    """Run gpu_day.sh with a stand-in for Python: exit status, summary, what Python was asked."""

    def run(python, *options, out="out", meanwhile=lambda script: None):
        stub, log = tmp_path / "python", tmp_path / "log"
        asked = 'echo "${*//$\'\\n\'/ }" >> "$LOG"\n'
        stub.write_text(f"#!/usr/bin/env bash\nREAL={sys.executable} LOG={log}\n{asked}{python}\n")
        stub.chmod(0o755)
        # What was started in the background ignores Ctrl-C, and so do all whom it starts.
        command = ["env", "--default-signal=INT", ROOT / "benchmarks" / "gpu_day.sh"]
        command += ["--out", tmp_path / out, *options]
        with subprocess.Popen(
            command,
            env={**os.environ, "PYTHON": str(stub)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as done:
            meanwhile(done)
            done.communicate()
        summary = (tmp_path / out / "summary.txt").read_text().splitlines()
        return done.returncode, [line[8:] for line in summary], log.read_text().splitlines()

    return run


def test_the_first_day_goes_from_what_is_there_to_what_is_fast(day, tmp_path):
    status, summary, asked = day('echo "says $3"', "--device", "cpu", "--minutes", "2")
    assert status == 0
    assert summary[0].startswith("missing, so that some of it will fail: says")  # what it is told
    steps = ["doctor", "correctness", "ops", "compiled"]
    assert summary[1:] == [*(f"{step}: done" for step in steps), f"results: {tmp_path / 'out'}"]
    assert "says" in (tmp_path / "out" / "doctor.txt").read_text()
    tests, ops, compiled = asked[-3:]
    asks = "-m pytest -v -n 4 -p no:cacheprovider tests/test_gpu.py"
    assert tests == f"{asks} -k under_the_interpreter"
    own = f"-m benchmarks.gpu --device cpu --out {tmp_path / 'out'}"
    assert re.fullmatch(rf"{own}/ops --minutes 1\.[89]\d* --without reduce-overhead", ops)
    assert re.fullmatch(rf"{own}/compiled --minutes 1\.[89]\d*", compiled)


def test_the_first_day_needs_no_xdist(day):
    status, _, asked = day('case "$*" in *xdist*) exit 1;; *importlib*) echo;; esac')
    tests = asked[-3]
    assert status == 0
    assert tests == "-m pytest -v -p no:cacheprovider tests/test_gpu.py -k on_the_gpu"


def test_the_first_day_fails_where_a_step_does_and_goes_on(day):
    python = 'case "$*" in "-m pytest"*) exit 3;; *importlib*) echo;; esac'
    status, summary, asked = day(python, "--device", "cpu")
    assert status == 1
    assert summary[1:3] == ["correctness: FAILED (3), see correctness.txt", "ops: done"]


def test_the_first_day_ends_where_there_is_no_gpu(day):
    python = 'case "$*" in *why_no_kernels*) echo no driver; exit 1;; *importlib*) echo;; esac'
    status, summary, asked = day(python)
    assert status == 1 and summary == ["doctor: done", "gpu: FAILED (1), see gpu.txt"]
    python = 'case "$*" in *_native*|*build_ext*) exit 1;; *importlib*) echo;; esac'
    status, summary, asked = day(python)
    assert status == 1 and summary == ["build: FAILED (1), see build.txt"]
    assert asked[-1] == "setup.py -q build_ext --inplace"


def test_the_first_day_fails_where_a_step_did_before_it_was_cut_off(day):
    python = 'case "$*" in *benchmarks.gpu*) echo "a FAILED"; sleep 60;; *importlib*) echo;; esac'
    status, summary, _ = day(python, "--device", "cpu", "--minutes", "0.1")
    assert status == 1 and summary[3] == "ops: FAILED before that, see ops.txt"


def test_a_step_that_is_killed_was_not_cut_off(day):
    """The system kills what has no memory left, with the same status as the time limit."""
    python = 'case "$*" in "-m pytest"*) kill -9 $$;; *importlib*) echo;; esac'
    status, summary, _ = day(python, "--device", "cpu")
    assert status == 1 and summary[1] == "correctness: FAILED (137), see correctness.txt"


def test_the_first_day_stops_by_itself(day):
    python = 'case "$*" in *benchmarks.gpu*) echo begun; sleep 60;; *importlib*) echo;; esac'
    begin = time.monotonic()
    status, summary, asked = day(python, "--device", "cpu", "--minutes", "0.1")
    assert status == 0 and time.monotonic() - begin < 30
    assert re.fullmatch(r"ops: cut off after \d s; what it had is kept", summary[2])
    assert summary[3] == "compiled: not reached"


def test_nobody_waits_for_whom_a_step_that_was_cut_off_left_behind(day, tmp_path):
    """A session of one's own is not reached by the time limit, and keeps what it has open."""
    left = 'setsid sh -c "echo behind; exec sleep 40" & sleep 60'
    python = f'case "$*" in *benchmarks.gpu*) {left};; *importlib*) echo;; esac'
    begin = time.monotonic()
    status, summary, _ = day(python, "--device", "cpu", "--minutes", "0.05")
    assert status == 0 and summary[2].startswith("ops: cut off")
    assert time.monotonic() - begin < 30
    assert (tmp_path / "out" / "ops.txt").read_text() == "behind\n"


@pytest.mark.parametrize("send", [os.killpg, os.kill])
def test_a_first_day_that_is_interrupted_takes_its_step_with_it(send, day, tmp_path):
    """Ctrl-C reaches the terminal's foreground processes; `timeout` is in a group of its own, and
    what has just been started may miss it."""
    told = tmp_path / "step"

    def interrupt(script):
        while not (told.exists() and told.read_text()):
            assert script.poll() is None
            time.sleep(0.05)
        send(script.pid, signal.SIGINT)

    python = (
        f'case "$*" in *benchmarks.gpu*) echo $$ > {told}; exec sleep 60;; *importlib*) echo;; esac'
    )
    status, summary, _ = day(python, "--device", "cpu", meanwhile=interrupt)
    assert status == -signal.SIGINT and summary[-1] == "correctness: done"
    deadline = time.monotonic() + 20
    while Path(f"/proc/{int(told.read_text())}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_first_day_takes_what_is_missing_from_wheels(day, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    program = zipfile.ZipInfo("carried/backends/bin/tool")  # as Triton's wheel has its assembler
    program.external_attr = 0o100755 << 16
    for name in ("carried-1.0", "numpy-99.0"):  # one of them is installed
        with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
            wheel.writestr(program, "")
    python = 'case "$*" in *zipfile*) exec $REAL "$@";; *importlib*) echo;; esac'
    status, summary, _ = day(python, "--device", "cpu", "--wheels", wheels)
    assert (status, summary[0]) == (0, "wheels: done")
    site = tmp_path / "out" / "site"
    assert sorted(path.name for path in site.iterdir()) == ["carried"]
    assert os.access(site / "carried" / "backends" / "bin" / "tool", os.X_OK)
    assert not os.access(site / "carried" / "__init__.py", os.X_OK)


def test_the_first_day_imports_what_there_is():
    script = (ROOT / "benchmarks" / "gpu_day.sh").read_text()
    found = re.findall(r"^from (fastdreamer[\w.]*) import (\w+)$", script, re.M)
    assert len(found) == 2
    for module, name in found:
        assert hasattr(importlib.import_module(module), name)
    assert all((ROOT / path).is_file() for path in re.findall(r"tests/\w+\.py|setup\.py", script))


def test_the_first_day_names_all_that_has_to_be_carried():
    """What it imports, and what that imports, but for what PyTorch brings."""
    script = (ROOT / "benchmarks" / "gpu_day.sh").read_text()
    (needs,) = re.findall(r"^needs = (\{.*?\})$", script, re.M | re.S)
    named = ast.literal_eval(needs)
    marks = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.0"}

    def with_needs(name, found):
        name = canonicalize_name(name)
        if name not in found:
            found.add(name)
            for need in map(Requirement, distribution(name).requires or ()):
                if need.marker is None or need.marker.evaluate(marks):
                    with_needs(need.name, found)
        return found

    carried = set()
    for name in named.values():
        with_needs(name, carried)
    assert carried <= set(named.values()) | with_needs("torch", set())
    assert all(importlib.util.find_spec(module) for module in named), "modules by other names"


@pytest.mark.parametrize(
    "options", [["--device", "tpu"], ["--minutes", "ten"], ["--fast"], ["--out"]]
)
def test_the_first_day_refuses(options):
    done = subprocess.run([ROOT / "benchmarks" / "gpu_day.sh", *options], capture_output=True)
    assert done.returncode == 2 and options[0].encode() in done.stderr


# --------------------------------------------------------------------------- captured work


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_update_learns_as_an_uncaptured_one(standins, replay, precision):
    variants = gpu_variants("cpu")
    plain = Learner(f"eager {precision}", replay, "tiny", variants)
    graphs = {n: Learner(n, replay, "tiny", variants) for n in variants if "graph" in n}
    graphs = {n: g for n, g in graphs.items() if n.endswith(precision)}
    assert len(graphs) == 2
    for step in range(1, 4):
        expected = plain.step()
        for name, learner in graphs.items():
            assert learner.step() == expected, name  # bit for bit: the same operations
            assert learner.agent.update._replay.graph.replays == step
    for learner in graphs.values():
        for name, tensor in plain.agent.state_dict().items():
            assert torch.equal(learner.agent.state_dict()[name], tensor), name


class _KeepsOldBatch(CapturedUpdate):
    def _capture(self, batch, *args):
        super()._capture(batch, *args)
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}


class _KeepsWarmUp(CapturedUpdate):
    def _capture(self, *args):
        with mock.patch.object(Tensor, "zero_", lambda tensor: tensor):
            super()._capture(*args)


def _one_long_autocast(work, *, generator):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return capture(work, generator=generator)


def _forgets_generator(work, *, generator):
    return capture(work)


def _reads(work, *, generator):
    def reading():
        metrics = work()
        return {name: x * float(x) for name, x in metrics.items()}

    return capture(reading, generator=generator)


@pytest.mark.parametrize(
    "fault", [_KeepsOldBatch, _KeepsWarmUp, _one_long_autocast, _forgets_generator, _reads]
)
def test_faults_of_a_captured_update_are_noticed(standins, monkeypatch, replay, fault):
    if isinstance(fault, type):
        monkeypatch.setattr(learner_module, "CapturedUpdate", fault)
    else:
        monkeypatch.setattr(learner_module, "capture", fault)
    variants = gpu_variants("cpu")
    plain = Learner("eager bf16", replay, "tiny", variants)
    learner = Learner(f"{GRAPH} bf16", replay, "tiny", variants)
    if fault in (_forgets_generator, _reads):
        with pytest.raises(CaptureError, match="generator|not permitted"):
            learner.step()
        return
    assert any(learner.step() != plain.step() for _ in range(3))


def test_an_update_that_cannot_be_captured_is_left_out(standins, monkeypatch, replay):
    monkeypatch.setattr(learner_module, "capture", _reads)
    names = ("eager fp32", f"{GRAPH} fp32")
    variants = {n: v for n, v in gpu_variants("cpu").items() if n in names}
    entries = bench_train.entries(replay, "tiny", variants)
    assert list(entries.run) == ["eager fp32"]
    assert "not permitted when a stream is capturing" in entries.left_out[f"{GRAPH} fp32"]


def test_a_captured_update_notices_what_is_not_finite(standins, replay):
    learner = Learner(f"{GRAPH} fp32", replay, "tiny", gpu_variants("cpu"))
    learner.step()
    with torch.no_grad():
        next(learner.agent.critic.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="became nan"):
        learner.step()


def test_work_that_depends_on_the_host_is_left_out(standins, monkeypatch):
    case = small(monkeypatch, "rssm_step")._case("rssm_step", 2)

    def other(backend, **inputs):
        factor = 1.1 if graph_standin.graph.active else 1.0
        return case.call(**inputs, backend=backend)[0].deter * factor

    def reading(backend, **inputs):
        state, _ = case.call(**inputs, backend=backend)
        return state.deter * max(state.deter.amax().item(), 1.0)

    names = ("eager fp32", f"{GRAPH} fp32")
    variants = {n: v for n, v in gpu_variants("cpu").items() if n in names}
    entries = dataclasses.replace(case, call=reading).entries(variants)
    assert list(entries.run) == ["eager fp32"]
    assert entries.left_out[f"{GRAPH} fp32"].startswith("cannot be captured: not permitted")
    entries = dataclasses.replace(case, call=other).entries(variants)
    assert "error of out0" in entries.left_out[f"{GRAPH} fp32"]


@pytest.mark.parametrize("backward", [False, True])
def test_a_captured_work_keeps_what_it_reads(standins, monkeypatch, backward):
    """torch's graph does not: what is at its addresses would be freed, and read all the same."""
    case = small(monkeypatch, "rssm_step")._case("rssm_step", 2, backward=backward)
    prepared = case._prepared(torch.float32)
    held = [weakref.ref(x) for x in pytree.tree_leaves(prepared) if isinstance(x, Tensor)]
    timed = case._timed(gpu_variants("cpu")[f"{GRAPH} fp32"], *prepared)
    del prepared
    gc.collect()
    assert held and all(there() is not None for there in held)
    timed()
    del timed
    gc.collect()
    assert all(there() is None for there in held)


def test_without_cuda_nothing_is_captured():
    if torch.cuda.is_available():
        pytest.skip("it is")
    with pytest.raises(CaptureError, match="no CUDA stream"):
        capture(lambda: None)


# --------------------------------------------------- on one device, and nothing read from it


class _OneDevice(TorchDispatchMode):
    """Refuses tensors elsewhere: a GPU cannot mix them, a capture cannot copy them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and x.device.type != "meta":
                raise RuntimeError(f"{func} with a tensor on {x.device}")
        return out


class _Generator(torch.Generator):
    device = torch.device("meta")


def update_on_meta(monkeypatch, config):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: None)
    monkeypatch.setattr(agent_module, "capturing", lambda device: True)
    shapes = {"state": (24,)} if config.env.obs == "state" else OBS_SHAPES
    agent = Dreamer(dataclasses.replace(config, backend="eager"), shapes, ACTION_DIM).to("meta")
    dtypes = {"pixels": torch.uint8, "is_first": torch.bool}
    sizes = shapes | {"action": (ACTION_DIM,), "reward": (), "is_first": ()}
    batch = {
        name: torch.empty(4, 2, *size, dtype=dtypes.get(name, torch.float32), device="meta")
        for name, size in sizes.items()
    }
    with _OneDevice(), graph_standin.NoHost():
        return agent.update(batch, agent.make_optimizers(), _Generator())


@pytest.mark.parametrize("name", PRESETS)
def test_an_update_stays_on_its_device(monkeypatch, name):
    metrics = update_on_meta(monkeypatch, preset(name))
    assert {"model_loss", "actor_loss", "critic_grad_norm"} <= metrics.keys()
    assert all(x.device.type == "meta" and not x.requires_grad for x in metrics.values())


def test_works_stay_on_their_device(monkeypatch):
    for case in cases(monkeypatch):
        inputs, groups = case._prepared(torch.float32, "meta")
        # what is kept between runs is made in the first
        for modes in ((), (_OneDevice(), graph_standin.NoHost())):
            with contextlib.ExitStack() as stack, torch.set_grad_enabled(bool(groups)):
                for mode in modes:
                    stack.enter_context(mode)
                out = case.call(**inputs, backend="eager")
                if groups:
                    case._backward(Variant("eager", device="meta"), out)


def test_decoders_on_a_device_are_torch_s_own(monkeypatch):
    """The faster way is one on a CPU, and it knows the CPU's autocast alone."""

    def faster(*args):
        raise LookupError

    monkeypatch.setattr(subpixel, "decode", faster)
    monkeypatch.setattr(subpixel, "decode_error", faster)
    monkeypatch.setattr(compiled, "compiled", lambda body: body)
    inputs = testing.codec_inputs(CODEC, 2)
    decoders = {
        "decode": (functools.partial(bench_codec._decode, backend="eager"), compiled.decode),
        "decode_error": (functools.partial(bench_codec._error, backend="eager"),
                         compiled.decode_error),
    }  # fmt: skip
    for name, ways in decoders.items():
        there = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), inputs[name])
        shape = inputs["encode"]["pixels"].shape if name == "decode" else ()
        for way in ways:
            assert way(**there).shape == shape
            with pytest.raises(LookupError):
                way(**inputs[name])


# ------------------------------------------------------------------------- torch's own names


def test_torch_has_every_name_that_is_used():
    """``torch.cuda…`` and ``torch.compiler…``, in benchmarks and package."""
    found = set()
    for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("fastdreamer/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                if re.fullmatch(r"torch\.(cuda|compiler|backends)\.[\w.]+", name):
                    found.add(name)
    assert {"torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.synchronize"} <= found
    for name in found:
        value = torch
        for part in name.split(".")[1:]:
            assert hasattr(value, part), name
            value = getattr(value, part)


def test_stand_ins_take_what_torch_takes():
    parameters = lambda function: list(inspect.signature(function).parameters)  # noqa: E731
    theirs = {
        "graph": torch.cuda.graph.__init__,
        "CUDAGraph": torch.cuda.CUDAGraph.__new__,
        "Stream": torch.cuda.Stream.__new__,
        "stream": torch.cuda.stream,
    }
    for name in ("graph", "CUDAGraph", "Stream"):
        ours = parameters(getattr(graph_standin, name).__init__)[1:]
        assert ours == parameters(theirs[name])[1:][: len(ours)], name
    assert parameters(torch.cuda.CUDAGraph.replay) == ["self"]
    assert parameters(torch.cuda.Stream.wait_stream) == ["self", "stream"]
    assert parameters(torch.cuda.stream)[0] == "stream"
    assert "capturable" in parameters(torch.optim.Adam.__init__)
    # Without CUDA torch has this one in its stubs alone.
    stubs = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    assert (
        "def register_generator_state(self, Generator) -> None"
        in stubs.partition("class _CUDAGraph")[2].partition("\nclass ")[0]
    )
