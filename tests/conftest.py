"""Settings for every test."""

import contextlib
import multiprocessing
import os
from unittest import mock

import pytest
import torch
import workers

# The tests' tensors are tiny: waking a second thread takes many times longer than their sums, the
# more so when the machine is busy. Tests about threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever another test, or a run that it made, has set was its own."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def workers_forked():
    """Workers of runs in this process don't each import torch anew; a file that is about how they
    start has a fixture of this name that does nothing."""
    with mock.patch.object(multiprocessing, "get_context", workers.forked):
        yield


def pytest_collection_modifyitems(items):
    """Files whose tests share most come first, where no other worker takes from."""
    items.sort(key=lambda item: item.path.parent.name != "training")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each worker begins with a half of the files, and takes from the other's end when it is
    through: runs that a file's tests share are then made once, not once a worker."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


# Native's bfloat16 is to be tested, also where the CPU computes faster in float32.
os.environ.setdefault("FASTDREAMER_ARITHMETIC", "bf16")

# Where the CPU has no vectors for it, auto would pass over the core that is to be tested.
with contextlib.suppress(ImportError):
    from fastdreamer import _native

    if not os.environ.get("FASTDREAMER_ISA") and _native.isa() == "scalar":
        os.environ["FASTDREAMER_ISA"] = "scalar"

# Tests are about the CPU, also where there is a GPU, which ``device: auto`` would take. Those about
# a GPU (test_gpu.py) run in processes of their own, which see what is visible here.
os.environ.setdefault("FASTDREAMER_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
