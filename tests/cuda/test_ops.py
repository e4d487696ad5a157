"""The ops through the CUDA-graph loop without a GPU: see interpreted_ops.py and
interpreted_op_faults.py.

The launches are run by the interpreter, so that the default run needs no compiled kernels.
``FASTDREAMER_GRAPH_OPS=all pytest tests/cuda`` compiles each kernel, as a GPU would be given it;
``FASTDREAMER_GRAPH_OPS="imagine cem"`` those of some ops.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import standin

HERE = Path(__file__).parent
FILES = ("interpreted_ops.py", "interpreted_op_faults.py")


def test_ops_through_graphs_on_a_stand_in_driver(tmp_path):
    if reason := standin.why_not():
        pytest.skip(reason)
    library = standin.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES],
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1", "FASTDREAMER_LIBCUDA": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 48
