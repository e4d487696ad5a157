"""Programs with faults, for the tests of the tests."""

from fastdreamer.ops.triton.program import Kernel, Launch, Loop, Program


def changed(program, change, *, loop=lambda loop: loop):
    """The program with ``change(launch, number)`` in place of each launch, None to leave it out,
    and ``loop(loop)`` in place of each loop."""
    count = 0

    def copy(body):
        nonlocal count
        items = []
        for item in body:
            if isinstance(item, Loop):
                items.append(loop(Loop(item.name, item.count, copy(item.body))))
                continue
            items.append(change(item, count))
            count += 1
        return [item for item in items if item is not None]

    return Program(program.name, list(program.slots.values()), copy(program.body))


def with_args(launch, **args):
    return Launch(launch.kernel, launch.grid, {**launch.args, **args})


def without(launch, name):
    """The launch with None for a pointer."""
    kernel = launch.kernel
    args = {key: value for key, value in launch.args.items() if key != name}
    return Launch(Kernel(kernel.fn, {**kernel.constants, name: None}, **kernel.options),
                  launch.grid, args)  # fmt: skip
