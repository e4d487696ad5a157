"""Triton's own launcher and our loop give the driver the same bytes; run by test_layout.py.

For every launch of every program of the ops: both run on the stand-in driver, ours as a replay of
the whole program, Triton's launch by launch; function, grid, block, shared memory and the block of
parameters have to be the same. The parameters' types have been compared with the PTX ``.entry``
before that (``aot.checked``).

The default is one kernel of each layout (function and types of its arguments), for one architecture
and precision; ``launcher.py all`` compiles every kernel of both precisions for all architectures.
Needs the stand-in as the process's libcuda.so.1 (LD_LIBRARY_PATH, TRITON_LIBCUDA_PATH and
FASTDREAMER_LIBCUDA), and no interpreter.
"""

import os
import struct
import sys
from collections.abc import Iterator, Sequence

import standin
import torch
import toy
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

sys.path.insert(0, str(standin.HERE.parent))

import triton_resources  # noqa: E402

from fastdreamer import _native  # noqa: E402
from fastdreamer.ops.triton import lambda_return  # noqa: E402
from fastdreamer.ops.triton.aot import checked, source  # noqa: E402
from fastdreamer.ops.triton.build import Precision  # noqa: E402
from fastdreamer.ops.triton.cuda_graph import Graphs  # noqa: E402
from fastdreamer.ops.triton.program import (  # noqa: E402
    Arg,
    Compiled,
    Launch,
    Loop,
    Program,
    Spec,
    affine,
)
from fastdreamer.ops.triton.run import run_direct  # noqa: E402

ROWS = 33  # three blocks of the step's kernels


def programs(precision: Precision) -> Iterator[Program]:
    yield from (toy.forward(3, 5), toy.backward(3, 5), toy.search(2, 2, 2, 3))
    yield lambda_return.forward_program(5, 7, 0.9)
    yield lambda_return.backward_program(5, 7, 0.9)
    yield from triton_resources.programs(standin.SMALL, ROWS, precision)


class Kernels:
    """Compiled kernels and Triton's launchers of them.

    Args:
        every: compile each kernel; otherwise one stands for all of its layout.
    """

    def __init__(self, arch: int, *, every: bool) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        self._every = every
        self._known: dict = {}

    def __call__(self, spec: Spec, capability: int) -> Compiled:
        """As ``compile_kernel`` of :class:`Graphs`."""
        assert capability == self._target.arch
        return self._get(spec)[1]

    def launch(self, spec: Spec, grid: Sequence[int], arguments: Sequence) -> None:
        made, _, launcher, function = self._get(spec)
        launcher(*grid, 0, function, made.packed_metadata, None, None, None, *arguments)

    def __len__(self) -> int:
        return len(self._known)

    def _get(self, spec: Spec) -> tuple:
        key = spec if self._every else (spec.fn, spec.types, spec.options)
        if key not in self._known:
            src = source(spec)
            made = triton.compile(src, target=self._target, options=dict(spec.options))
            ours = checked(spec, made.metadata, made.asm["ptx"], made.asm["cubin"])
            utils = triton.runtime.driver.active.utils
            _, function, *_ = utils.load_binary(
                made.metadata.name, made.asm["cubin"], made.metadata.shared, 0
            )
            self._known[key] = made, ours, CudaLauncher(src, made.metadata), function
        return self._known[key]


def counts(body: Sequence[Launch | Loop]) -> dict[str, int]:
    """How often each loop runs, by its name."""
    found: dict[str, int] = {}
    for item in body:
        if isinstance(item, Loop):
            for name, count in {item.name: item.count, **counts(item.body)}.items():
                assert found.setdefault(name, count) == count, f"two loops {name}"
    return found


def compare(program: Program, kernels: Kernels, got: list, *, jit: bool) -> int:
    """Run a program both ways, and by ``run_direct`` with Triton's JIT; return its launches."""
    graphs = Graphs(compile_kernel=kernels, on_host=True)
    inputs = {s.name: torch.empty(s.shape, dtype=s.dtype) for s in program.of_kind("input")}
    got.clear()
    outputs = graphs.run(program, inputs)
    (entry,) = graphs._graphs.values()
    addresses = {n: x.data_ptr() for n, x in {**inputs, **outputs, **entry._scratch}.items()}
    mine = list(got)
    loops = counts(program.body)

    def resolve(value, indices):
        if isinstance(value, Arg):
            size = value.slot.dtype.itemsize
            return addresses[value.slot.name] + value.offset.value(indices) * size
        return value if isinstance(value, float | bool) else affine(value).value(indices)

    theirs = []
    for launch, indices in program.launches():
        spec = launch.spec({name: loops[name] for name in indices})
        given = {name: resolve(value, indices) for name, value in launch.args.items()}
        given |= dict(spec.constants)
        got.clear()
        kernels.launch(spec, launch.grid, [given[name] for name in spec.fn.arg_names])
        theirs += got
    assert len(mine) == len(theirs)
    for ours, other in zip(mine, theirs, strict=True):
        assert ours == other, f"{program.name}: Triton gives {other}, the loop {ours}"
    if jit:
        tensors = {**inputs, **outputs, **entry._scratch}
        program.tensors = lambda _: tensors
        got.clear()
        run_direct(program, inputs)
        del program.tensors
        for (_, *ours), (_, *other) in zip(mine, got, strict=True):
            ours.pop(-2), other.pop(-2)  # shared memory may differ: integers are specialised
            assert ours == other, f"{program.name}: kernel by kernel {other}, the loop {ours}"
    return len(mine)


def check_lambda_return(got: list) -> None:
    """The op by itself, kernel by kernel."""
    reward, following, discount = torch.randn(3, 5, 7).unbind()
    discount.requires_grad_()
    got.clear()
    returns = lambda_return.lambda_return(reward, following, discount, 0.9)
    (grad,) = torch.autograd.grad(returns, discount, torch.ones(5, 7))
    assert grad.shape == (5, 7)
    for (_, name, grid, block, _, data), inputs in zip(got, (4, 7), strict=True):
        pointers, numbers = data[: 8 * inputs], data[8 * inputs : 8 * inputs + 16]
        assert numbers == struct.pack("<iiff", 5, 7, 0.9, 1.0 - 0.9)
        assert all(pointers[i : i + 8].strip(b"\0") for i in range(0, 8 * inputs, 8))
        assert name == ("forward_kernel" if inputs == 4 else "backward_kernel")
        assert (grid, block) == ((1, 1, 1), (32 * lambda_return.NUM_WARPS, 1, 1))
        assert not any(data[8 * inputs + 16 :]), "hidden pointers are null"


JITTED = ("rssm_step", "toy forward", "toy backward", "toy search")
"""Programs that the default run launches by Triton's JIT, too."""


def main() -> None:
    driver = standin.Driver(os.environ["FASTDREAMER_LIBCUDA"])
    got: list[tuple] = []  # of each launch: image, name, grid, block, shared memory, parameters
    driver.on_launch(lambda *launch: got.append(launch))
    every = sys.argv[1:] == ["all"]
    _native.CudaDevice(0)  # initialises the driver, as torch does where there is a GPU
    for arch in triton_resources.ARCHS if every else (90,):
        driver.device(capability=arch)
        activate(arch)
        check_lambda_return(got)
        for bf16 in (True, False) if every else (True,):
            kernels = Kernels(arch, every=every)
            made = [
                compare(p, kernels, got, jit=arch == 90 and (every or p.name in JITTED))
                for p in programs(Precision(bf16, arch))
            ]
            print(
                f"sm_{arch}, {'bf16' if bf16 else 'fp32'}: {len(made)} programs, {sum(made)} "
                f"launches, {len(kernels)} kernels agree",
                flush=True,
            )


def activate(arch: int) -> None:
    """Make the stand-in Triton's current device, which it asks torch for."""
    driver = CudaDriver()
    driver.get_current_device = driver.get_current_stream = lambda *_: 0
    driver.get_device_capability = lambda *_: divmod(arch, 10)
    triton.runtime.driver.set_active(driver)


if __name__ == "__main__":
    main()
