"""Triton's own launcher and our loop give the driver the same bytes; run by test_layout.py.

Needs the stand-in as the process's libcuda.so.1 (LD_LIBRARY_PATH, TRITON_LIBCUDA_PATH and
FASTDREAMER_LIBCUDA), and no interpreter.
"""

import os

import standin
import toy
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

from fastdreamer import _native
from fastdreamer.ops.graph import Arg, affine
from fastdreamer.ops.triton.aot import checked, source

TARGET = GPUTarget("cuda", 90, 32)


def launches():
    """One launch of every kernel, with the loops' counts around it."""
    programs = [toy.forward(3, 5), toy.backward(3, 5), toy.search(2, 2, 2, 3)]
    seen = set()
    for program in programs:
        counts = {"t": 2, "i": 1}
        for launch, indices in program.launches():
            spec = launch.spec(counts)
            if spec not in seen:
                seen.add(spec)
                yield program, launch, indices, spec


def main():
    driver = standin.Driver(os.environ["FASTDREAMER_LIBCUDA"])
    got = []
    driver.on_launch(lambda _, *rest: got.append(rest))
    triton.runtime.driver.set_active(CudaDriver())
    utils = triton.runtime.driver.active.utils
    device = _native.CudaDevice(0)
    count = 0
    for program, launch, indices, spec in launches():
        src = source(spec)
        made = triton.compile(
            src,
            target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
            options=dict(spec.options),
        )
        addresses = {name: 0x7F0000000000 + 4096 * i for i, name in enumerate(program.slots)}

        def value(v, addresses=addresses, indices=indices):
            if isinstance(v, Arg):
                return addresses[v.slot.name] + v.offset.value(indices) * v.slot.dtype.itemsize
            return v if isinstance(v, float | bool) else affine(v).value(indices)

        values = {name: value(v) for name, v in launch.args.items()}
        given = [{**dict(spec.constants), **values}[name] for name in spec.fn.arg_names]
        _, function, *_ = utils.load_binary(
            made.metadata.name, made.asm["cubin"], made.metadata.shared, 0
        )
        launcher = CudaLauncher(src, made.metadata)
        launcher(*launch.grid, 0, function, made.packed_metadata, None, None, None, *given)

        ours = checked(spec, made.metadata, made.asm["ptx"], made.asm["cubin"])
        kernel = _native.CudaKernel(device, ours.name, ours.image, list(ours.kinds), ours.hidden,
                                    ours.threads, ours.shared_bytes)  # fmt: skip
        loop = _native.CudaLoop(device, [1 << 20] * len(addresses))
        places = list(addresses)
        arguments = []
        for name, v in launch.args.items():
            if isinstance(v, Arg):
                offset = v.offset.value(indices) * v.slot.dtype.itemsize
                arguments.append((places.index(v.slot.name), offset, ()))
            elif isinstance(v, float):
                arguments.append(v)
            else:
                arguments.append((int(values[name]), ()))
        loop.launch(kernel, launch.grid, tuple(arguments))
        loop.replay(list(addresses.values()), 0)
        theirs, mine = got[-2:]
        assert theirs == mine, f"{ours.name}: Triton gives {theirs}, the loop {mine}"
        assert len(mine[-1]) >= 8 * len(addresses) // 2
        count += 1
    assert len(got) == 2 * count
    print(f"{count} kernels agree")


if __name__ == "__main__":
    main()
