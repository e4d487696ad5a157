"""Native results beside eager's and the truth, and for every number of threads."""

from unittest import mock

import torch

from fastdreamer import testing
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import Categorical
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import assert_accurate, evaluate

INPUTS = {
    "rssm_step": (rssm_step, lambda sizes, H, B: testing.rssm_step_inputs(sizes, B)),
    "observe": (observe, testing.observe_inputs),
    "open_loop": (open_loop, testing.open_loop_inputs),
    "imagine": (imagine, lambda *shape: testing.imagine_inputs(*shape, heads=True)),
}
"""An op by its name, and what makes inputs of sizes, steps and rows for it."""


def results(run, inputs, *, bf16=False, **options):
    """Of native, eager and the truth."""
    fp32 = {"dtype": torch.float32, "autocast": bf16, **options}
    return (
        evaluate(run, inputs, backend="native", **fp32),
        evaluate(run, inputs, backend="eager", **fp32),
        evaluate(run, inputs, backend="eager", dtype=torch.float64, **options),
    )


def compare(run, inputs, *, bf16=False, **options):
    """Native's results, found accurate; of categorical latents the very classes."""
    got, eager, truth = results(run, inputs, bf16=bf16, **options)
    for name in truth if isinstance(inputs["params"].latent, Categorical) else ():
        if name.endswith("stoch") and not name.startswith("grad"):
            assert torch.equal(got[name], truth[name].float()), name
            assert torch.equal(eager[name], truth[name].float()), name
    assert_accurate(run.__name__, got, eager, truth, bf16=bf16, native=True)
    return got


def compare_with_and_without_gradients(run, inputs, *, bf16, **options):
    """And without gradients, when nothing is kept, the same outputs."""
    got = compare(run, inputs, bf16=bf16, **options)
    with torch.no_grad():
        lean = evaluate(run, inputs, backend="native", dtype=torch.float32, autocast=bf16, wrt=())
    assert all(torch.equal(got[key], out) for key, out in lean.items())


def assert_threads_change_nothing(run, inputs, threads, lean=None, wrt=None):
    """The same bits of native for every number; lean: of bf16 or not, outputs to be among them."""
    for bf16 in (False, True):
        want = None
        for n in (1, 2, 3, 8):
            threads(n)
            given = {"dtype": torch.float32, "autocast": bf16, "wrt": wrt}
            got = evaluate(run, inputs, backend="native", **given)
            want = want or got
            for key in want:
                assert torch.equal(got[key], want[key]), (n, bf16, key)
            for key, out in lean(bf16).items() if lean else ():
                assert torch.equal(out, want[key]), (n, bf16, key)


def guarded(shape):
    """Memory of NaN, and that with as much before and behind."""
    whole = torch.full((torch.Size(shape).numel() + 64,), torch.nan)
    return whole[32:-32].view(shape), whole


def assert_only_outputs_are_written(run, inputs, call, place):
    """All of them and nothing beside; call: of the extension, its argument at place."""
    from fastdreamer import _native

    with torch.no_grad(), mock.patch.object(_native, call, wraps=getattr(_native, call)) as spy:
        run(**inputs, backend="native")
    (arguments,) = [list(c.args) for c in spy.call_args_list]
    outputs = arguments[place]
    given = [None if out is None else guarded(out.shape) for out in outputs]
    arguments[place] = tuple(None if g is None else g[0].numpy() for g in given)
    getattr(_native, call)(*arguments)
    for want, got in zip(outputs, given, strict=True):
        if got is not None:
            inner, whole = got
            assert torch.equal(inner, torch.from_numpy(want))
            assert torch.cat([whole[:32], whole[-32:]]).isnan().all()
