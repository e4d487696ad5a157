"""The largest Triton kernels, compiled ahead; ``python -m tests.triton_resources`` for all."""

import pytest
from triton_resources import compile_for, faults, kernels, label

from fastdreamer.ops.triton.build import Precision
from fastdreamer.testing import REPORT

WALKER = 50  # rows


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rssm_step.forward_kernel True with first/extra", (True, 90)),
        ("rssm_step.backward_kernel with first", (True, 90)),
        ("mlp.forward_kernel action True", (True, 80)),
        ("weights.gradient_kernel", (True, 90)),
        ("cem.refit_kernel", (True, 90)),
    ],
)
def test_kernel(name, options):
    bf16, arch = options
    found = [s for s in kernels(REPORT, WALKER, Precision(bf16, arch)) if label(s).startswith(name)]
    assert found, name
    used = compile_for(found[0], arch)
    assert not faults(found[0], used), used


def test_faults_are_seen():
    found = kernels(REPORT, WALKER, Precision(True, 90))
    spec = next(s for s in found if label(s).startswith("rssm_step.backward_kernel with first"))
    used = compile_for(spec, 90)
    for change, word in [
        ({"stack": 8}, "stack"),
        ({"local": 4}, "local"),
        ({"spills": 1}, "spills"),
        ({"shared": 100 * 1024}, "shared"),
        ({"matrix": ()}, "matrix"),
        ({"order": used.order.replace("BLS", "", 1)}, "order"),
        ({"order": used.order[1:]}, "order"),
        ({"order": used.order[:-1]}, "order"),
        ({"moved": ("L tape",)}, "moved"),
    ]:
        assert [f for f in faults(spec, used._replace(**change)) if word in f], change
