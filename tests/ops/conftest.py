"""A small float64 RSSM, and gradcheck over everything that an op can differentiate."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import forked
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdreamer.nn import RSSM, Actor
from fastdreamer.ops.backend import OPS, BackendError, last_backend, use_backend
from fastdreamer.ops.params import State

A, D, S, E, HIDDEN = 2, 3, 2, 4, 5


class Case:
    """Parameters and inputs of the recurrent ops, float64, a function of the seed alone."""

    def __init__(self, activation: str = "elu", seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rssm = RSSM(
                action_dim=A, deter=D, stoch=S, hidden=HIDDEN, input_hidden=HIDDEN, embed=E,
                activation=activation, min_std=0.1,
            ).double()  # fmt: skip
            # std_offset 0: the report's 5 saturates the tanh and would hide its gradient
            self.actor = Actor(
                [D + S, HIDDEN, A], activation, mean_scale=5.0, std_offset=0.0, min_std=0.1
            ).double()
        self.params = self.rssm.params().detach()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def state(self, batch: int) -> State:
        return State(self.randn(batch, D), self.randn(batch, S))

    def action(self, *lead: int) -> Tensor:
        return self.randn(*lead, A).tanh()


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.fixture
def new_case() -> type[Case]:
    return Case


@pytest.fixture
def check_gradients() -> Callable[..., None]:
    """``check(op, *arguments)``: gradcheck w.r.t. every floating tensor in the arguments."""

    def check(op: Callable, *arguments: Any) -> None:
        leaves, spec = tree_flatten(arguments)
        inputs = [
            leaf.detach().clone().requires_grad_()
            for leaf in leaves
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            filled = [
                next(given) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
                for leaf in leaves
            ]
            outputs, _ = tree_flatten(op(*tree_unflatten(filled, spec)))
            return tuple(x for x in outputs if x is not None)

        assert torch.autograd.gradcheck(run, inputs)
        # and none of the gradients is zero by construction
        norms = torch.autograd.grad(sum(x.square().sum() for x in run(*inputs)), inputs)
        assert all(float(norm.abs().max()) > 0 for norm in norms)

    return check


@pytest.fixture
def check_backends() -> Callable[..., None]:
    """``check(op, *arguments)``: a backend without a kernel refuses and says why; eager runs."""

    def check(op: Callable, *arguments: Any) -> None:
        name = op.__name__
        op(*arguments, backend="eager")
        assert last_backend(name) == "eager"
        with use_backend("auto"):
            op(*arguments)
        assert last_backend(name) == "eager"  # float64 is eager's alone, whatever kernels exist
        reasons = {b: OPS[name].why_not(b, "cpu") for b in ("native", "triton")}
        for backend, reason in reasons.items():
            if reason is not None:
                message = f"{name}: backend {backend!r} cannot run: {reason}"
                with pytest.raises(BackendError, match=re.escape(message)):
                    op(*arguments, backend=backend)
                with use_backend(backend), pytest.raises(BackendError, match=re.escape(message)):
                    op(*arguments)
        if not any(reasons.values()):
            pytest.skip(f"{name} has a kernel for every backend here")

    return check


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)``: from here to the test's end."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512bf16", "amx", "amx_emulated"])
def run_on_isa(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``run(file)``: the file as a program, its native core held to each instruction set."""
    isa = request.param

    def run(file: str) -> None:
        from fastdreamer import _native

        if reason := _native.isa_reasons()[isa]:
            pytest.skip(f"no {isa} here ({reason}); {file} runs there by itself")
        done = forked.run(file, keep=True, FASTDREAMER_ISA=isa)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip() == isa

    return run
