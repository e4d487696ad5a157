"""Native results beside eager's and the truth, and for every number of threads."""

from unittest import mock

import torch
from torch import Tensor

from fastdreamer import testing
from fastdreamer.ops.decide import decide
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


def parameters(part):
    """The tensors of a tuple of parameters."""
    if isinstance(part, Tensor):
        return [part]
    return [t for p in part for t in parameters(p)] if isinstance(part, tuple) else []


def in_order(sizes, T, H, B, action_first, embed_first, stoch_first):
    """Ops and inputs of a model whose columns stand in that order, stoch_first of the heads."""
    for run, inputs in [
        (observe, testing.observe_inputs(sizes, T, B)),
        (imagine, testing.imagine_inputs(sizes, H, B, heads=True)),
        (decide, testing.decide_inputs(sizes, B)),
    ]:
        columns = {"action_first": action_first, "embed_first": embed_first}
        inputs["params"] = inputs["params"]._replace(**columns)
        for part in {"actor", "returns"} & inputs.keys():
            inputs[part] = inputs[part]._replace(stoch_first=stoch_first)
        yield run, inputs


def cem_inputs(sizes, H, B):
    """Of a search with everyone elite: all of its iterations are comparable."""
    return testing.cem_inputs(sizes, H, B, 5, 2) | {"num_elites": 5}


def decide_inputs(sizes, B):
    """Of decisions that see a vector, too, where it is narrower than the embedding."""
    return testing.decide_inputs(sizes, B, sees="both" if sizes.units < sizes.E else "embed")


def assert_a_nan_stays_in_its_row(run, inputs):
    """Of an embedding, in ``observe``: it reaches its own sequence alone."""
    inputs["is_first"][:] = False
    clean = run(**inputs, backend="native")
    inputs["embed"][0, 2] = torch.nan
    seen = run(**inputs, backend="native")
    rest = [row for row in range(inputs["embed"].shape[1]) if row != 2]
    assert seen.state.stoch[0, 2].isnan().all() and seen.state.deter[1, 2].isnan().all()
    assert torch.equal(seen.state.deter[:, rest], clean.state.deter[:, rest])


def assert_gradients_of_some(run, inputs, trained):
    """Of ``observe``, by these parameters while the others are frozen: native's are eager's."""
    for t in trained:
        t.requires_grad_()
    grads = []
    for backend in ("native", "eager"):
        seen = run(**inputs, backend=backend)
        loss = seen.state.deter.square().sum() + seen.prior.logits.square().sum()
        grads.append(torch.autograd.grad(loss, trained, allow_unused=True))
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def assert_packs_follow(run, inputs, changed_params, changed_in_place):
    """Of ``observe``: other parameters, and tensors doubled in place, change what native gives."""
    before = run(**inputs, backend="native").state.deter

    def assert_seen(given):
        after = run(**given, backend="native").state.deter
        torch.testing.assert_close(after, run(**given, backend="eager").state.deter)
        assert not torch.allclose(after, before, atol=1e-3)

    for params in changed_params:
        assert_seen(inputs | {"params": params})
    with torch.no_grad():
        for tensor in changed_in_place:
            tensor.mul_(2)
            assert_seen(inputs)


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
