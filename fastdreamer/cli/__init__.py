"""The ``fastdreamer`` command: train, eval, dream, report, plot, export, ….

A file a command, which holds its options and what it does. Options come from typed dataclasses
through tyro: the configuration is one already, so every field is an option with its help text and
type, and nothing is declared twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import select
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler

from fastdreamer._version import __version__
from fastdreamer.cli.bench import Bench, run_bench
from fastdreamer.cli.compare import Compare, run_compare
from fastdreamer.cli.doctor import Doctor, run_doctor
from fastdreamer.cli.dream import Dream, run_dream
from fastdreamer.cli.eval import Eval, run_eval
from fastdreamer.cli.export import Export, run_export
from fastdreamer.cli.plot import Plot, run_plot
from fastdreamer.cli.report import Report, run_report
from fastdreamer.cli.run import allow_task, config_of, named_by_file, playing_backend
from fastdreamer.cli.tasks import Tasks, run_tasks
from fastdreamer.cli.train import Train, run_train, train_defaults
from fastdreamer.cli.watch import Watch, run_watch
from fastdreamer.config import Config
from fastdreamer.errors import FastdreamerError
from fastdreamer.machine.device import bound_threads
from fastdreamer.training.ranks import follow, is_follower, joined
from fastdreamer.training.trainer import Stopped

_COMMANDS = {
    Eval: run_eval,
    Dream: run_dream,
    Watch: run_watch,
    Report: run_report,
    Plot: run_plot,
    Export: run_export,
    Bench: run_bench,
    Compare: run_compare,
    Tasks: run_tasks,
    Doctor: run_doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 1 failed or refused, 2 no such command
    or option, 130 stopped, 141 nobody reads what it says any more, as behind ``| head``).

    What a user can mend (:mod:`fastdreamer.errors`) is said in one line, with ``--debug`` by its
    traceback; every other exception is a fault of ours and leaves with its traceback.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        if not pipe.poll(0):  # some other pipe's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to say
        return 141


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    errors = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_time=False, show_path=False)],
    )
    as_it_is = {"markup": False, "highlight": False, "soft_wrap": True}
    say = functools.partial(Console().print, **as_it_is)
    fail = functools.partial(errors.print, **as_it_is)
    if argv in (["--version"], ["-V"]):
        say(f"fastdreamer {__version__}")
        return 0
    try:
        if argv[:1] == ["train"] and not {"-h", "--help"} & {*argv} and is_follower():
            with joined() as ranks:  # the first reads what follows
                follow(ranks)
        command = _parse(argv)
        with contextlib.ExitStack() as stack:
            if isinstance(command, Eval | Dream | Watch | Report):
                bound_threads()
                config = config_of(command.run)
                if hasattr(command, "plan"):  # again: its options start from what the run says
                    command = _parse(argv, config)
                allow_task(config, command.run, command.task)
                stack.enter_context(playing_backend(config, command.backend))
            if isinstance(command, Train):
                return run_train(command, say, functools.partial(_parse, argv))
            return _COMMANDS[type(command)](command, say) or 0
    except Stopped:
        say(f"stopped; go on with: {shlex.join(['fastdreamer', *argv])}")
        return 130
    except KeyboardInterrupt:
        return 130
    except FastdreamerError as error:
        if debug:
            raise
        fail(f"fastdreamer: {error}")
        return 1


def _parse(argv: list[str], config: Config | None = None) -> Any:
    """The command; ``config`` is what its options start from, where that is known already."""
    subcommand, training = tyro.conf.subcommand, train_defaults(argv, config)
    config = config or Config()
    planned = {"run": tyro.MISSING, "plan": config.plan}
    safety = dataclasses.replace(named_by_file(config.safety), shield=False)
    commands = (
        Annotated[Train, subcommand("train", default=training)]
        | Annotated[Eval, subcommand("eval", default=Eval(**planned, safety=safety))]
        | Annotated[Dream, subcommand("dream")]
        | Annotated[Watch, subcommand("watch")]
        | Annotated[Report, subcommand("report", default=Report(**planned))]
        | Annotated[Plot, subcommand("plot")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Bench, subcommand("bench")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Tasks, subcommand("tasks")]
        | Annotated[Doctor, subcommand("doctor")]
    )
    return tyro.cli(
        commands,
        prog="fastdreamer",
        description="Dreamer with every recurrent loop compiled: train, evaluate, watch. "
        "--debug shows the traceback of what is otherwise said in one line.",
        args=argv,
    )
