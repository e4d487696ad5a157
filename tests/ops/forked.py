"""Programs in processes of their own, each a fork of one that has imported torch already.

The environment decides some things once a process. The instruction set is one of them, when a
kernel is first asked for, which the process that is forked does not; another is Triton's
interpreter, when triton is imported, so that there are two such processes.
"""

import atexit
import functools
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import fastdreamer

TIMEOUT = 300  # seconds


class Done(NamedTuple):
    """How a program ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run(file: str, *arguments: str, keep: bool = False, **environment: str) -> Done:
    """Run a file as a program, with this process's environment and what is given.

    Args:
        file: or ``-c``, and then the first argument is the program.
        keep: whether eager's results are kept for the file's other programs; see kept.py.
    """
    server = _server(environment.get("TRITON_INTERPRET", "0"))
    return server.run([file, *map(str, arguments)], keep, environment)


class _Server:
    """The process that is forked; its stdin takes programs, its stdout says how each ended."""

    def __init__(self, interpret: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        paths = os.pathsep.join(sys.path)
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._folder.name],
            env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": interpret},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)

    def run(self, argv: list[str], keep: bool, environment: dict[str, str]) -> Done:
        job = {"argv": argv, "keep": keep, "environment": os.environ | environment}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], TIMEOUT)[0]:
            self.close()
            raise subprocess.TimeoutExpired(argv, TIMEOUT)
        said = (Path(self._folder.name, name).read_text() for name in ("stdout", "stderr"))
        return Done(int(self._process.stdout.readline()), *said)

    def close(self) -> None:
        _server.cache_clear()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # a program that hangs, too
            self._process.wait()
        self._folder.cleanup()


@functools.cache
def _server(interpret: str) -> _Server:
    return _Server(interpret)


def _serve(folder: Path) -> None:
    """Fork for every program; returns in each fork."""
    kept, of = folder / "kept", None
    for line in sys.stdin:
        job = json.loads(line)
        if job["argv"][0] != of:
            of = job["argv"][0]
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
        pid = os.fork()
        if pid == 0:
            _become(job, folder, kept)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


def _become(job: dict, folder: Path, kept: Path) -> None:
    """Be as a process that was started for the program."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    # what is forked has computed nothing: no thread is missing here, and programs have their own
    assert "fastdreamer._native" not in sys.modules
    fastdreamer._forked = False
    if job["keep"]:
        from kept import keep_eager

        keep_eager(kept)


if __name__ == "__main__":
    import pytest  # noqa: F401  (as all of the programs do)
    import torch._dynamo  # noqa: F401  (and triton)

    import fastdreamer.testing  # noqa: F401

    _serve(Path(sys.argv[1]))
    if sys.argv[0] == "-c":
        exec(sys.argv[1])
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
