"""Settings for every test."""

import torch

# The tests' tensors are tiny: waking a second thread takes many times longer than their sums, the
# more so when the machine is busy. Tests about threads set their own number.
torch.set_num_threads(1)
