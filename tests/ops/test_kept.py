"""What kept.py keeps is what would be computed, of these inputs and no others."""

import torch
from kept import keep_eager

from fastdreamer import testing
from fastdreamer.ops.lambda_return import lambda_return
from fastdreamer.testing import Exact, lambda_return_inputs

EAGER = {"backend": "eager", "dtype": torch.float32}
EXACT = EAGER | {"dtype": torch.float64}


def test_it_is_computed_once(tmp_path, monkeypatch):
    compute, computed = testing.evaluate, []

    def counted(op, inputs, **options):
        computed.append(options["backend"])
        return compute(op, inputs, **options)

    monkeypatch.setattr(testing, "evaluate", counted)
    keep_eager(tmp_path)
    inputs = lambda_return_inputs(3, 4)
    for again in (False, True):
        for options in (EAGER, EXACT):
            got = testing.evaluate(lambda_return, inputs, **options)
            want = compute(lambda_return, inputs, **options)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
        assert isinstance(got, Exact) and got.spread == want.spread
        assert computed == ["eager"] * 3, again  # float64's once more for its spread
    computed.clear()
    inputs["reward"][2, 3] += 1e-9
    for wrt in (None, ("reward",)):
        changed = testing.evaluate(lambda_return, inputs, wrt=wrt, **EXACT)
        assert not torch.equal(changed["out"], got["out"])
    testing.evaluate(lambda_return, inputs | {"lam": 0.5}, **EXACT)
    assert len(computed) == 3
    for _ in range(2):
        testing.evaluate(lambda_return, inputs, backend="native", dtype=torch.float32)
    assert computed[3:] == ["native"] * 2
