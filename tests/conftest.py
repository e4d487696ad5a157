"""Settings for every test."""

import contextlib
import os

import torch

# The tests' tensors are tiny: waking a second thread takes many times longer than their sums, the
# more so when the machine is busy. Tests about threads set their own number.
torch.set_num_threads(1)

# Where the CPU has no vectors for it, auto would pass over the core that is to be tested.
with contextlib.suppress(ImportError):
    from fastdreamer import _native

    if not os.environ.get("FASTDREAMER_ISA") and _native.isa() == "scalar":
        os.environ["FASTDREAMER_ISA"] = "scalar"
