"""The C++ core's elementary functions: the errors that csrc/cpu/functions.h states, on every ISA.

The instruction set is chosen once a process, so each runs in one of its own.
"""

import re
from pathlib import Path

import forked
import numpy as np
import pytest

HEADER = Path(__file__).parents[2] / "csrc" / "cpu" / "functions.h"
NAMES = ("exp", "expm1", "sigmoid", "tanh", "softplus", "symexp", "gelu", "gelu_tanh", "mish")
OF_X = ("gelu", "gelu_tanh", "mish")
"""Whose errors are relative to x."""


def stated() -> dict[str, tuple[float, float]]:
    """The header's own limits: of float32 results, and of those for bfloat16 arithmetic."""
    row = re.compile(r"^//   (\w+) +([\d.e-]+) +([\d.e-]+)$", re.MULTILINE)
    found = row.findall(HEADER.read_text(encoding="utf-8"))
    return {name: (float(fp32), float(bf16)) for name, fp32, bf16 in found}


def points() -> np.ndarray:
    """The range of float32's exponential, densely around 0, and magnitudes down to 1e-30."""
    tiny = np.logspace(-30, 0, 4001)
    parts = [np.linspace(-100, 100, 200001), np.linspace(-3, 3, 200001), tiny, -tiny]
    return np.unique(np.concatenate(parts).astype(np.float32))


def evaluate(name: str, x: np.ndarray, bf16: bool) -> np.ndarray:
    import torch  # noqa: F401  (the extension shares its OpenMP runtime)

    from fastdreamer import _native

    out = np.full_like(x, np.nan)
    _native.evaluate(name, x, out, bf16)
    return out


def exact(name: str, x: np.ndarray) -> np.ndarray:
    import torch

    x = x.astype(np.float64)
    return {
        "exp": lambda: np.exp(x),
        "expm1": lambda: np.expm1(np.minimum(x, 0)),
        "sigmoid": lambda: 1 / (1 + np.exp(-x)),
        "tanh": lambda: np.tanh(x),
        "softplus": lambda: np.logaddexp(0, x),
        "symexp": lambda: np.sign(x) * np.expm1(np.abs(x)),
        "gelu": lambda: x * torch.special.ndtr(torch.from_numpy(x)).numpy(),
        "gelu_tanh": lambda: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "mish": lambda: x * np.tanh(np.logaddexp(0, x)),
    }[name]()


def check() -> None:
    x, limits = points(), stated()
    for name in NAMES:
        truth = exact(name, x)
        for bf16 in (False, True):
            got = evaluate(name, x, bf16)
            normal = (np.abs(truth) < 3e38) & ((np.abs(truth) > 1.2e-38) | (truth == 0))
            error = np.abs(got - truth)[normal]
            size = np.abs(x if name in OF_X else truth)[normal]
            if name != "tanh":
                error = error[size > 0] / size[size > 0]
            assert error.max() <= limits[name][bf16], (name, bf16, error.max())
            assert np.isinf(got[truth > 3.5e38]).all(), (name, bf16)


if __name__ == "__main__":
    check()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16", "amx", "amx_emulated"])
def test_errors_are_as_stated(isa):
    from fastdreamer import _native

    if reason := _native.isa_reasons()[isa]:
        pytest.skip(reason)
    done = forked.run(__file__, FASTDREAMER_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_header_and_documentation_state_the_same_limits():
    limits = stated()
    assert list(limits) == list(NAMES)
    for fp32, bf16 in limits.values():
        assert 0 < fp32 < 3e-7  # a few units in the last place
        assert fp32 <= bf16 < 2e-4  # finer than 8 bits
    text = (HEADER.parents[2] / "docs" / "native.md").read_text("utf-8")
    sentence = text.partition("Elementary functions:")[2].partition("`tests/")[0]
    order = ("exp", "expm1", "sigmoid", "softplus", "symexp", *OF_X, "tanh")
    want = [limits[name][bf16] for bf16 in (False, True) for name in order]
    assert [float(number) for number in re.findall(r"[\d.]+e-\d", sentence)] == want


@pytest.mark.parametrize("bf16", [False, True])
def test_the_ends_of_the_line(bf16):
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    ends = {
        "exp": (np.inf, 0, np.nan),
        "expm1": (0, -1, np.nan),
        "sigmoid": (1, 0, np.nan),
        "tanh": (1, -1, np.nan),
        "softplus": (np.inf, 0, np.nan),
        "symexp": (np.inf, -np.inf, np.nan),
        "gelu": (np.inf, np.nan, np.nan),
        "gelu_tanh": (np.inf, np.nan, np.nan),
        "mish": (np.inf, np.nan, np.nan),
    }
    for name, want in ends.items():
        np.testing.assert_array_equal(evaluate(name, x, bf16), np.float32(want), err_msg=name)


def test_wrong_arguments():
    from fastdreamer import _native

    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="there is no function 'sine'"):
        _native.evaluate("sine", x, x.copy(), False)
    with pytest.raises(ValueError, match="out overlaps x"):
        _native.evaluate("exp", x, x, False)
    with pytest.raises(ValueError, match="x must have 1 dimension"):
        _native.evaluate("exp", x.reshape(2, 2), x.copy(), False)
