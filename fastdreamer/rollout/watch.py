"""What was read off modules that no loop calls, and has to stay so: looked at in every call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastdreamer.ops.backend import untraced
from fastdreamer.rollout.ask import parts_of
from fastdreamer.rollout.layers import MisfitError, describe, is_compiled

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_hooks_of = operator.attrgetter(*_HOOKS)
_global_hooks_of = operator.attrgetter(*_GLOBAL_HOOKS)


class Watch:
    """A module by a name for messages: no hook, its forward(), and the modules in it."""

    def __init__(self, name: str, module: nn.Module, *, called: bool = False) -> None:
        """``called``: it is still called itself, and so are its hooks."""
        self.name, self.module, self.called = name, module, called
        # those of scripts and of torch.compile's are made anew by the module itself
        self.own = not (is_compiled(module) or isinstance(module, torch.jit.ScriptModule))
        self.forward = self.parts = None
        if self.own:
            self.forward, self.parts = _forward_of(module), dict(module._modules)
            self.parts.pop("parametrizations", None)  # these are looked up, and may come and go

    def check(self) -> None:
        """Raise where calling the module would do something else than what was read.

        Raises:
            MisfitError: names the module, and what it has got.
        """
        module = self.module
        if any(_hooks_of(module)) and not self.called:
            _refuse_hooks(self.name, module)
        if not self.own:
            return
        if _forward_of(module) != self.forward:
            raise MisfitError(
                f"{self.name}: {describe(module)} has got another forward() since it was read, "
                "which would not run; make the loop anew"
            )
        now = module._modules
        if now != self.parts:
            lost = [name for name, part in self.parts.items() if now.get(name) is not part]
            if isinstance(module, nn.Sequential | nn.ModuleList):  # all that is in them counts
                lost += now.keys() - self.parts.keys() - {"parametrizations"}
            if lost:
                raise MisfitError(
                    f"{self.name}: {describe(module)} has got another module {lost[0]!r} since it "
                    "was read, which would not run; make the loop anew"
                )


class Answer:
    """A module that was asked what it computes, which may depend on whether it trains: dropout,
    noise on weights. In a mode that it was not asked in, it is asked again."""

    def __init__(self, name: str, module: nn.Module, ask: Callable[[], object]) -> None:
        """``ask`` says whether it computes what was read."""
        self.name, self.module, self.ask = name, module, ask
        self.parts = parts_of(module)
        self.modes = {self._mode()}

    def _mode(self) -> tuple[bool, ...]:
        return tuple([part.training for part in self.parts])

    def check(self) -> None:
        """Ask again where there is need to.

        Raises:
            MisfitError: it computes something else in this mode.
        """
        mode = self._mode()
        if mode in self.modes:
            return
        self.modes.add(mode)  # asking may come by here
        agrees, why = False, None
        try:
            agrees = bool(self.ask())
        except MisfitError as error:  # it cannot even be asked as before
            why = error
        finally:
            if not agrees:
                self.modes.discard(mode)
        if not agrees:
            when = "in training" if self.module.training else "in evaluation"
            raise MisfitError(
                f"{self.name}: {describe(self.module)} computes something else {when} than in the "
                "mode in which it was read (dropout? noise on its weights?); no loop has that"
                + (f" ({why})" if why else "")
            ) from why


def look(watched: Sequence[Watch], answers: Sequence[Answer]) -> None:
    """Check all of them, outside of what ``torch.compile`` traces: there a module that is asked
    would be compiled.

    Raises:
        MisfitError: the first that is not as it was read.
    """
    untraced(_look)(watched, answers)


def _look(watched: Sequence[Watch], answers: Sequence[Answer]) -> None:
    refuse_global_hooks()
    for watch in watched:
        watch.check()
    for answer in answers:
        answer.check()


def refuse_hooks(modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise where a hook would not run: the loops call no module.

    Raises:
        MisfitError: names the module and the kind of hook.
    """
    refuse_global_hooks()
    for name, module in modules:
        if any(_hooks_of(module)):
            _refuse_hooks(name, module)


def refuse_global_hooks() -> None:
    """The same of hooks of all modules."""
    if any(_global_hooks_of(torch_module)):
        kind = next(name for name in _GLOBAL_HOOKS if getattr(torch_module, name))
        raise MisfitError(f"torch.nn.modules.module has {_spoken(kind)}, which would not run")


def _refuse_hooks(name: str, module: nn.Module) -> None:
    kind = next(hooks for hooks in _HOOKS if getattr(module, hooks))
    raise MisfitError(f"{name}: {describe(module)} has {_spoken(kind)}, which would not run")


def _spoken(attribute: str) -> str:
    """``_forward_pre_hooks`` as "forward pre-hooks"."""
    return attribute.strip("_").replace("_pre_", " pre-").replace("_", " ")


def _forward_of(module: nn.Module) -> tuple[object, object]:
    """Its class's, and one of its own that stands before that."""
    return getattr(type(module), "forward", None), module.__dict__.get("forward")
