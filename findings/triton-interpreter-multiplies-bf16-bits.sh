#!/bin/sh
# triton 3.7.1: under its interpreter tl.dot multiplies bfloat16 matrices by their bits, as if they
# were whole numbers, without a word; float16 and float32 come out right.
#
# The interpreter holds bfloat16 in NumPy arrays of uint16, which has no such type, and its product
# takes them as they are: 1.0 is 0x3f80 = 16256, and a sum of 16 products of ones is
# 16 * 16256**2 = 4228120576 instead of 16. Kernels whose tests run under TRITON_INTERPRET=1 look
# broken in bfloat16, or, compared with nothing but themselves, right.
#
# Seen with triton 3.7.1 and torch 2.13.0, Python 3.11, 16 x 16 matrices of ones on the CPU:
#   torch.float32: ones @ ones = [16.0]
#   torch.float16: ones @ ones = [16.0]
#   torch.bfloat16: ones @ ones = [4228120576.0]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "triton==3.7.1" "numpy==2.2.6"
cat > "$folder/ask.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, out):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


for dtype in (torch.float32, torch.float16, torch.bfloat16):
    ones, out = torch.ones(16, 16, dtype=dtype), torch.zeros(16, 16)
    product[(1,)](ones, ones, out)
    print(f"{dtype}: ones @ ones = {out.unique().tolist()}")
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/ask.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch.float32: ones @ ones = [16.0]
torch.float16: ones @ ones = [16.0]
torch.bfloat16: ones @ ones = [4228120576.0]
SEEN
