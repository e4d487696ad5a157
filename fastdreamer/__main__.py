"""``python -m fastdreamer`` is the ``fastdreamer`` command."""

from fastdreamer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
