"""``python -m fastdreamer`` is the ``fastdreamer`` command."""

import sys

from fastdreamer.errors import how_to_install
from fastdreamer.machine.cores import bound_spinning


def main() -> int:
    """Run the command line in a process that is its own; return the exit status."""
    if sys.argv[1:2] != ["bench"]:  # which times other people's loops, as they run by themselves
        bound_spinning()  # before anything imports torch
    try:
        from fastdreamer.cli import main as run
    except ModuleNotFoundError as error:
        if (remedy := how_to_install(error)) is None:
            raise
        print(f"fastdreamer: {remedy}", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
