"""The ops through the CUDA-graph loop without a GPU: see interpreted_ops.py.

``FASTDREAMER_GRAPH_OPS="imagine cem"`` chooses ops; without it the default run has the shortest.
All of them: ``FASTDREAMER_GRAPH_OPS=all pytest tests/cuda``, a few minutes of compiling.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import standin

HERE = Path(__file__).parent


def test_ops_through_graphs_on_a_stand_in_driver(tmp_path):
    if reason := standin.why_not():
        pytest.skip(reason)
    library = standin.build(tmp_path)
    ops = os.environ.get("FASTDREAMER_GRAPH_OPS", "rssm_step")
    environment = {"TRITON_INTERPRET": "1", "FASTDREAMER_LIBCUDA": str(library)}
    environment["FASTDREAMER_GRAPH_OPS"] = "" if ops == "all" else ops
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_ops.py"],
        cwd=HERE,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 2
