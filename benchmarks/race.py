"""Variants of the same work: checked against float64, then timed in turn.

``Case`` says what an op does in one benchmark; ``Case.entries`` builds, checks and returns what is
to be timed; ``race`` times it. The benches under pytest and the measurements of the command line
(``ops``, ``curves``) go this way, so that no number comes from unchecked code or lone runs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks import compiled
from benchmarks.captured import CaptureError, capture
from benchmarks.timing import MIN_REPEATS, summary
from benchmarks.variants import OURS, VARIANTS, Entries, Variant
from fastdreamer import testing
from fastdreamer.ops.backend import BackendError, Op
from fastdreamer.ops.params import Readout


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work of an op.

    Args:
        name: of the row in a table.
        op: whose limits hold, and whose native body is asked for.
        inputs: returns its arguments by name, named tuples of float32 tensors among them.
        flops: see ``flops.py``.
        call: the work itself: ``call(**inputs, backend="native" | "eager")`` returns tensors in
            named tuples or tuples.
        compiled: the same work by ``torch.compile`` of the eager body; see ``compiled.py``.
        leaves: returns, out of the inputs, groups of tensors that get gradients; None: forward
            only, without gradients.
        loss: of the outputs; None: standard normal gradients reach every output.
        learning_rate: if given, ``leaves`` are clipped (by group) and stepped by Adam.
        compare: returns what is compared of the outputs, by name; None: everything.
        fresh: every parameter's version is bumped before each timed call, as the optimisers' steps
            of an update would, so that a backend's own layout of them is never reused.
        calls: in one timed round; the time is divided by it.
        pause: seconds of sleep before each timed round.
        rounds: timed ones.
    """

    name: str
    op: Op
    inputs: Callable[[], dict[str, Any]]
    flops: int
    call: Callable[..., Any]
    compiled: Callable[..., Any]
    leaves: Callable[[dict[str, Any]], list[list[Tensor]]] | None = None
    loss: Callable[[Any], Tensor] | None = None
    learning_rate: float | None = None
    compare: Callable[[Any], dict[str, Tensor]] | None = None
    fresh: bool = True
    calls: int = 1
    pause: float = 0.0
    rounds: int = 20

    def __str__(self) -> str:
        return self.name

    def entries(self, variants: Mapping[str, Variant] = VARIANTS) -> Entries:
        """Build every variant and check it; return those that are right.

        Native and triton are held to the limits of their op. A baseline is not ours to make
        accurate (compiled code sums biases' gradients row by row, for one, with ten times eager's
        error); it must do the same work. One that does not, or that torch cannot compile or
        capture, is left out with the reason. Of a graph, what a replay leaves is checked.

        Raises:
            AssertionError: a variant of native or triton is outside its limits.
        """
        device = next(iter(variants.values())).device
        reference = Variant("eager", device=device)
        truth = testing.Exact(
            lambda: self._results(reference, *self._prepared(torch.float64, device))
        )
        eager = {
            bf16: self._results(
                reference._replace(bf16=bf16), *self._prepared(torch.float32, device)
            )
            for bf16 in (False, True)
        }
        run, left_out, missing = {}, {}, []
        for name, variant in variants.items():
            ours = variant.backend in OURS
            try:
                if ours and (reason := self.op.why_not(variant.backend, device)):
                    raise BackendError(reason)
                reduced = variant.bf16 or variant.medium
                prepared = self._prepared(torch.float32, device)  # checked and timed: the same
                got = self._results(variant, *prepared)
                if ours:
                    testing.assert_accurate(self.op.name, got, eager[reduced], truth, bf16=reduced)
                else:
                    _assert_same_work(got, eager[reduced], truth)
                run[name] = self._timed(variant, *prepared)
            except AssertionError as error:
                if ours:
                    raise AssertionError(f"{name}: {error}") from error
                left_out[name] = str(error)
            except RuntimeError as error:
                if not refused(variant, error):
                    raise
                left_out[name] = first_line(error)
                missing.append(name)
        return Entries(run, left_out, tuple(missing))

    def _function(self, variant: Variant) -> Callable[..., Any]:
        if variant.backend == "compiled":
            return self.compiled
        if variant.backend == "reduced":
            return _with_mode(self.compiled, "reduce-overhead")
        return functools.partial(self.call, backend=variant.backend)

    def _prepared(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[dict[str, Any], list[list[Tensor]]]:
        """Inputs of its own, every parameter as an ``nn.Parameter`` is (autocast caches those)."""

        def cast(x: Any) -> Any:
            if _floating(x):
                return x.detach().to(device, dtype, copy=True)
            return x.to(device) if isinstance(x, Tensor) else x

        inputs = pytree.tree_map(cast, self.inputs())
        if self.leaves is None:
            for parameter in self._parameters(inputs):
                parameter.requires_grad_()
            return inputs, []
        groups = self.leaves(inputs)
        for leaf in (leaf for group in groups for leaf in group):
            leaf.requires_grad_()
        return inputs, groups

    def _parameters(self, inputs: dict[str, Any]) -> list[Tensor]:
        held = [inputs[name] for name in ("params", "actor", "returns") if name in inputs]
        constant = lambda x: isinstance(x, Readout)  # noqa: E731 (its bins are no parameters)
        return [x for x in pytree.tree_leaves(held, is_leaf=constant) if _floating(x)]

    def _results(
        self, variant: Variant, inputs: dict[str, Any], groups: list[list[Tensor]]
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        function = self._function(variant)
        leaves = [leaf for group in groups for leaf in group]

        def work() -> Any:
            for leaf in leaves:
                leaf.grad = None
            with variant.context(), torch.set_grad_enabled(bool(groups)):
                out = function(**inputs)
            if groups:
                self._backward(variant, out)
            return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out)

        if variant.graph:
            replay, out = capture(work)
            replay()
        else:
            out = work()
        if self.compare is not None:
            named = self.compare(out)
        else:
            named = {f"out{i}": x for i, x in enumerate(_tensors(out))}
        results = named | {f"grad{i}": leaf.grad for i, leaf in enumerate(leaves)}
        return {name: tensor.detach().clone() for name, tensor in results.items()}

    def _backward(self, variant: Variant, out: Any) -> None:
        if self.loss is not None:
            # autocast belongs around the forward pass alone; "medium" holds for both
            with variant._replace(bf16=False).context():
                self.loss(out).backward()
            return
        outputs = [x for x in _tensors(out) if x.requires_grad]
        like = tuple((tuple(x.shape), x.dtype) for x in outputs)
        weights = _weights(like, variant.device)
        with variant._replace(bf16=False).context():
            torch.autograd.backward(outputs, weights)

    def _timed(
        self, variant: Variant, inputs: dict[str, Any], groups: list[list[Tensor]]
    ) -> Callable[[], object]:
        function = self._function(variant)
        leaves = [leaf for group in groups for leaf in group]
        optimizers = []
        if self.learning_rate is not None:
            make = functools.partial(torch.optim.Adam, lr=self.learning_rate, fused=True)
            optimizers = [make(group, capturable=variant.graph) for group in groups]

        def once() -> None:
            for leaf in leaves:
                leaf.grad = None
            with variant.context():
                out = function(**inputs)
            self._backward(variant, out)
            for group, optimizer in zip(groups, optimizers, strict=bool(optimizers)):
                nn.utils.clip_grad_norm_(group, 100.0)
                optimizer.step()

        def run() -> None:
            if groups:
                for _ in range(self.calls):
                    once()
                return
            with variant.context(), torch.no_grad():
                for _ in range(self.calls):
                    function(**inputs)

        timed = functools.partial(capture(run)[0]) if variant.graph else run
        fresh = self._parameters(inputs) if self.fresh else []

        def before() -> None:
            with torch.no_grad():
                for parameter in fresh:
                    parameter.mul_(1)  # a new version of the same numbers

        timed.before = before  # type: ignore[attr-defined]  # race() calls it before the clock
        return timed


def _assert_same_work(
    got: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> None:
    """Assert that a baseline's results differ from eager's by roundings alone."""
    eps = torch.finfo(torch.float32).eps
    for name, exact in truth.items():
        assert got[name].shape == exact.shape, f"{name} has shape {list(got[name].shape)}"
        norm = float(torch.linalg.vector_norm(exact))
        allowed = 10 * (testing.error(eager[name], exact) + eps * norm)
        actual = testing.error(got[name], exact)
        assert actual <= allowed, f"error of {name} is {actual:.3g}, allowed {allowed:.3g}"


def refused(variant: Variant, error: RuntimeError) -> bool:
    """Whether the error says that there is no such variant here, and not that it is wrong.

    Of the variants that torch compiles or captures, nothing is ours but what Triton's kernels do.
    """
    if variant.backend in OURS:
        return isinstance(error, (BackendError, CaptureError))
    return variant.by_torch


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a table."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _with_mode(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # its outputs are overwritten by the next call
        with compiled.mode(mode):
            return function(**inputs)

    return call


def race(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = MIN_REPEATS,
    warmup: int = 2,
    calls: int = 1,
    pause: float = 0.0,
    wait: Callable[[], object] = lambda: None,
    drive: Callable[[Callable[[], object], Callable[[], object], int], object] | None = None,
    kept: dict[str, list[float]] | None = None,
) -> dict[str, dict[str, float]]:
    """Time functions in turn, round by round, so that a change of the machine's load meets all.

    Args:
        variants: by name. What a function has as its attribute ``before`` is called before it,
            outside the clock.
        rounds: timed ones of each.
        warmup: rounds before them.
        calls: how many calls one run of a function makes; its time is divided by it.
        pause: seconds of sleep before each run, which lets the other threads fall asleep.
        wait: until what a function has started is done; within the clock, and before it starts.
        drive: runs the rounds: ``drive(first, others, rounds)`` calls ``others`` and then
            ``first``, the first variant, that often; for a harness that wants to time it itself.
        kept: is given the seconds of each variant, round by round.

    Returns:
        A ``timing.summary`` for each variant.

    Raises:
        ValueError: fewer than 20 rounds.
    """
    if rounds < MIN_REPEATS:
        raise ValueError(f"at least {MIN_REPEATS} rounds, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    first, *rest = variants

    def prepare(name: str) -> None:
        getattr(variants[name], "before", lambda: None)()
        if pause:
            time.sleep(pause)
        wait()

    def run(name: str) -> None:
        start = time.perf_counter()
        variants[name]()
        wait()
        seconds[name].append((time.perf_counter() - start) / calls)

    def others() -> None:
        for name in rest:
            prepare(name)
            run(name)
        prepare(first)

    def alone(run_first: Callable[[], object], others: Callable[[], object], rounds: int) -> None:
        for _ in range(rounds):
            others()
            run_first()

    alone(lambda: run(first), others, warmup)
    for times in seconds.values():
        times.clear()
    (drive or alone)(lambda: run(first), others, rounds)
    if kept is not None:
        kept.update(seconds)
    return {name: summary(times) for name, times in seconds.items()}


def round_trip(variants: Mapping[str, Callable[[], object]]) -> None:
    """Run each variant once, untimed."""
    for function in variants.values():
        getattr(function, "before", lambda: None)()
        function()


def peak(threads: int, seconds: float = 0.25) -> dict[str, float] | None:
    """Return the machine's GFLOP/s of multiply-adds that nothing holds up, ``fp32`` and ``bf16``.

    The latter in the arithmetic that calls under autocast to bfloat16 compute in. None where the
    native core is not built.
    """
    try:
        from fastdreamer import _native

        probe, bf16 = _native.peak, _native.takes_bf16()
    except (ImportError, AttributeError):
        return None
    return {"fp32": probe(False, threads, seconds), "bf16": probe(bf16, threads, seconds)}


@functools.cache
def _weights(
    like: tuple[tuple[tuple[int, ...], torch.dtype], ...], device: str = "cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype in like]


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
