"""The CUDA-graph loop without a GPU.

The interpreted_*.py files run in a process with Triton's interpreter on and a stand-in libcuda.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import standin

HERE = Path(__file__).parent
FILES = [f"interpreted_{what}.py" for what in ("loop", "faults", "errors", "driver", "capture")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if reason := standin.why_not():
        pytest.skip(reason)
    return standin.build(tmp_path_factory.mktemp("libcuda"))


def test_the_loop_end_to_end_on_a_stand_in_driver(library):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", "FASTDREAMER_LIBCUDA": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 77
