"""The weights' gradients where elements are more than 32 bits count.

The interpreter runs in a process of its own: it is chosen before triton is imported.
"""

import sys

import forked
import torch

WIDTH, ROWS = 1 << 26, 33  # row 32 begins at element 2³¹


def check_many_elements(path: str) -> None:
    """Row r of the gradients is r, of the input 1 + r; the file between the rows stays a hole."""
    from fastdreamer.ops.triton.weights import gradient_kernel

    grads = torch.from_file(path, shared=True, size=ROWS * WIDTH, dtype=torch.float16)
    n, k = 4, 3
    row = torch.arange(ROWS, dtype=torch.float16)
    grads.view(ROWS, WIDTH)[:, :n] = row[:, None] / 8
    x = (1 + row)[:, None].repeat(1, k).float()
    d_weight, d_bias = torch.zeros(1, n, k), torch.zeros(1, n)
    gradient_kernel[(1, 1, 1)](
        grads, x, None, d_weight, d_bias, ROWS, 48,
        GRADS=WIDTH, XS=k, K=k, IN=k, N=n, NP=16, GROUPS=1, LAST=0, BO=16, BI=16, BR=16,
    )  # fmt: skip
    expected = (row.double() / 8 * (1 + row.double())).sum().float()
    torch.testing.assert_close(d_weight, expected.expand(1, n, k), rtol=1e-5, atol=0)
    torch.testing.assert_close(d_bias, (row.sum() / 8).float().expand(1, n), rtol=1e-5, atol=0)


def test_more_elements_than_32_bits_count(tmp_path):
    done = forked.run(__file__, tmp_path / "grads", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    check_many_elements(sys.argv[1])
