"""Triton body of :mod:`fastdreamer.ops.observe`: one program forward, one backward.

The loop is the posterior's step alone. The embeddings' part of the posterior's first layer comes
before it and the priors behind it, both for all T·B rows at once; backward likewise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.params import Latent, RSSMParams, State
from fastdreamer.ops.triton import before, tiles
from fastdreamer.ops.triton.build import (
    Precision,
    autocast_bf16,
    first_order,
    gru_named,
    named,
)
from fastdreamer.ops.triton.layout import (
    MlpShape,
    StagedShape,
    StepShape,
    embed_shape,
    prior_shape,
    step_shape,
)
from fastdreamer.ops.triton.program import Arg, Program, Slot
from fastdreamer.ops.triton.rollout import chosen, latent_of
from fastdreamer.ops.triton.run import run
from fastdreamer.ops.triton.staged import Builder


class _Spec(NamedTuple):
    """All that the programs depend on."""

    T: int
    B: int
    precision: Precision
    step: StepShape | StagedShape
    prior: MlpShape
    embed: MlpShape
    wide: bool  # whether the embedding is float32, bfloat16 otherwise
    save: bool
    # halves of the state, deter or stoch, in whose place episodes begin with a learned one
    learned: tuple[str, ...] = ()

    @property
    def zeroed(self) -> tuple[str, ...]:
        """Of deter, stoch and action those in whose place episodes begin with zeros that a step
        taken in stages does not put there itself."""
        if not isinstance(self.step, StagedShape):
            return ()
        parts = zip(("deter", "stoch", "action"), self.step.resets, strict=True)
        return tuple(name for name, reset in parts if reset)

    @property
    def sizes(self) -> dict[str, int]:
        """Columns of the halves of the state that are replaced before the step."""
        sizes = {"deter": self.step.D, "stoch": self.step.S}
        return {name: sizes[name] for name in sizes if name in (*self.learned, *self.zeroed)}

    def begin(self, b: Builder, name: str) -> Arg | None:
        """What episodes begin with in the place of one of them; None: zeros."""
        if name not in self.learned:
            return None
        return b.slot(f"begin.{name}", (1, self.sizes[name])).at(0)

    @property
    def embed_dtype(self) -> torch.dtype:
        return torch.float32 if self.wide else torch.bfloat16


class _Wants(NamedTuple):
    """What the backward pass computes gradients of, beside the start and the actions."""

    dynamics: bool  # input layer, GRU, posterior
    prior: bool
    embed: bool


def outputs(step: StepShape | StagedShape) -> list[str]:
    moments = [f"{part}.{name}" for part in ("post", "prior") for name in step.moments]
    return ["deter", "stoch", *moments]


@functools.lru_cache(maxsize=64)
def forward_program(spec: _Spec) -> Program:
    T, B, step, prior = spec.T, spec.B, spec.step, spec.prior
    A, D, S, E = step.A, step.D, step.S, spec.embed.pieces[0]
    b = Builder("observe", spec.precision)
    start = b.slot("start.deter", (B, D)), b.slot("start.stoch", (B, S))
    embed = b.slot("embed", (T, B, E), dtype=spec.embed_dtype)
    noise = b.slot("noise", (T, B, step.noise))
    is_first = b.slot("is_first", (T, B), dtype=torch.bool)
    deter, stoch = (
        b.slot("deter", (T + 1, B, D), "output"),
        b.slot("stoch", (T + 1, B, S), "output"),
    )
    moments = {name: b.slot(name, (T, B, S), "output") for name in outputs(step)[2:]}
    keep = "output" if spec.save else "scratch"
    stride = B if spec.save else 0
    tape = b.operands("tape", (T * B if spec.save else B, step.tape), keep)
    prior_tape = b.operands("prior.tape", (T * B, prior.tape), keep)

    taken = _taken(b, spec)
    columns = spec.embed.total
    extra = b.slot("extra", (T * B, columns), "scratch")
    b.mlp_forward(
        spec.embed, b.pack_embed(spec.embed), (embed.at(0), None), extra.at(0), tape.at(0), T * B,
        save=False, columns=columns,
    )  # fmt: skip
    dynamics = b.pack_step("step", step, "post")
    b.copy(start[0], deter, B, D)
    b.copy(start[1], stoch, B, S)
    with b.loop("t", T) as t:
        given = {"deter": deter.at(t * B * D), "stoch": stoch.at(t * B * S)}
        for name, size in spec.sizes.items():
            room = b.slot(f"before.{name}", (B, size), "scratch").at(0)
            _begin(b, spec.begin(b, name), is_first.at(t * B), given[name], room, B, size)
            given[name] = room
        b.step_forward(
            step,
            dynamics,
            {
                **given, "action": taken.at(t * B * A), "noise": noise.at(t * B * step.noise),
                "first": is_first.at(t * B), "extra": extra.at(t * B * columns),
                "new_deter": deter.at((t + 1) * B * D), "new_stoch": stoch.at((t + 1) * B * S),
                **{name: moments[f"post.{name}"].at(t * B * S) for name in step.moments},
                "tape": tape.at(t * stride * step.tape),
            },
            B,
            save=spec.save,
        )  # fmt: skip
    out, *std = (moments[f"prior.{name}"].at(0) for name in step.moments)
    b.mlp_forward(
        prior, b.pack_mlp("prior", prior), (deter.at(B * D), None), out, prior_tape.at(0), T * B,
        save=spec.save, **_prior_head(step, *std),
    )  # fmt: skip
    return b.program()


@functools.lru_cache(maxsize=64)
def backward_program(spec: _Spec, wants: _Wants, given: frozenset[str]) -> Program:
    """``given`` names the outputs that a gradient reaches: inputs ``d_out.`` and the name."""
    T, B, step, prior = spec.T, spec.B, spec.step, spec.prior
    A, D, S, E = step.A, step.D, step.S, spec.embed.pieces[0]
    rows = T * B
    b = Builder("observe backward", spec.precision)
    deter, stoch = b.slot("deter", (T + 1, B, D)), b.slot("stoch", (T + 1, B, S))
    is_first = b.slot("is_first", (T, B), dtype=torch.bool)
    tape = b.operands("tape", (rows, step.tape))
    grads = b.operands("grads", (rows, step.grads), "scratch")

    def reaching(name: str, size: int = S) -> Any:
        return b.slot(f"d_out.{name}", (T, B, size)) if name in given else None

    d_deter = b.slot("d_deter", (T + 1, B, D), "output")
    d_stoch = b.slot("d_stoch", (T + 1, B, S), "output")
    d_action = b.slot("d_action", (T, B, A), "output")
    for target, name, size in ((d_deter, "deter", D), (d_stoch, "stoch", S)):
        b.copy(None, target, B, size)
        b.copy(reaching(name, size), target.at(B * size), rows, size)
    d_bounded = b.slot("d_bounded", (T, B, A), "scratch") if step.bound else d_action
    d_zeroed = d_bounded
    if "action" in spec.zeroed:
        d_zeroed = b.slot("d_before.action", (T, B, A), "scratch")
    for target in dict.fromkeys((d_action, d_bounded, d_zeroed)):
        b.copy(None, target, rows, A)
    # what the steps took, and the gradients by that
    taken, d_taken = {"deter": deter, "stoch": stoch}, {"deter": d_deter, "stoch": d_stoch}
    for name, size in spec.sizes.items():
        room, d_room = (b.slot(f"{of}before.{name}", (T, B, size), "scratch") for of in ("", "d_"))
        of = taken[name].at(0)
        _begin(b, spec.begin(b, name), is_first.at(0), of, room.at(0), rows, size)
        b.copy(None, d_room, rows, size)
        taken[name], d_taken[name] = room, d_room

    if f"prior.{step.moments[0]}" in given:
        prior_tape = b.operands("prior.tape", (rows, prior.tape))
        prior_grads = b.operands("prior.grads", (rows, prior.grads), "scratch")
        d_out, *d_std = (reaching(f"prior.{name}").at(0) for name in step.moments)
        b.mlp_backward(
            prior, b.pack_mlp("prior", prior, transposed=True), d_out, prior_tape.at(0),
            prior_grads.at(0), rows, d_x=(d_deter.at(B * D), None),
            **_prior_head(step, *d_std, of="d_"),
        )  # fmt: skip
        if wants.prior:
            b.mlp_gradients(
                "prior", prior, [(deter.at(B * D), D, None)], prior_tape.at(0),
                prior_grads.at(0), rows,
            )  # fmt: skip

    dynamics = b.pack_step("step", step, "post", transposed=True)
    sampling = b.sampling(step, "noise", "post.logits", (T, B))
    moments = {f"d_{name}": reaching(f"post.{name}") for name in step.moments}
    with b.loop("t", T) as i:
        t = T - 1 - i
        b.step_backward(
            step,
            dynamics,
            {
                "deter": taken["deter"].at(t * B * D), **sampling(t * B),
                "first": is_first.at(t * B),
                "tape": tape.at(t * B * step.tape), "grads": grads.at(t * B * step.grads),
                "d_new_deter": d_deter.at((t + 1) * B * D),
                "d_new_stoch": d_stoch.at((t + 1) * B * S),
                **{name: slot and slot.at(t * B * S) for name, slot in moments.items()},
                "d_deter": d_taken["deter"].at(t * B * D),
                "d_stoch": d_taken["stoch"].at(t * B * S),
                "d_action": d_zeroed.at(t * B * A),
            },
            B,
        )  # fmt: skip
        for name, size in spec.sizes.items():
            d_state = {"deter": d_deter, "stoch": d_stoch}[name]
            _begin_backward(
                b, is_first.at(t * B), d_taken[name].at(t * B * size),
                d_state.at(t * B * size), B, size,
            )  # fmt: skip
    for name in spec.learned:
        begin = f"begin.{name}", is_first.at(0), d_taken[name].at(0)
        b.begin_gradient(*begin, rows, spec.sizes[name])
    if d_zeroed is not d_bounded:
        _begin_backward(b, is_first.at(0), d_zeroed.at(0), d_bounded.at(0), rows, A)
    if step.bound:
        action = b.slot("action", (T, B, A)).at(0)
        b.bound(action, d_bounded.at(0), d_action.at(0), rows * A)
    if wants.dynamics:
        embed = b.slot("embed", (T, B, E), dtype=spec.embed_dtype)
        b.step_gradients(
            step, "post", taken["deter"].at(0), taken["stoch"].at(0), _taken(b, spec).at(0),
            deter.at(B * D), tape.at(0), grads.at(0), rows, first=is_first.at(0),
            more=(embed.at(0), E, E, spec.embed.begins[0], None),
        )  # fmt: skip
    if wants.embed:
        d_embed = b.slot("d_embed", (T, B, E), "output")
        b.copy(None, d_embed, rows, E)
        b.mlp_backward(
            spec.embed, b.pack_embed(spec.embed, transposed=True), None, tape.at(0),
            grads.at(step.latents), rows, d_x=(d_embed.at(0), None), grads_width=step.grads,
            head="ready",
        )  # fmt: skip
    return b.program()


def _taken(b: Builder, spec: _Spec) -> Slot:
    """Actions as the steps take them."""
    T, B, A, rows = spec.T, spec.B, spec.step.A, spec.T * spec.B
    action = b.slot("action", (T, B, A))
    taken = b.bounded(action) if spec.step.bound else action
    if "action" not in spec.zeroed:
        return taken
    room = b.slot("before.action", (T, B, A), "scratch")
    is_first = b.slot("is_first", (T, B), dtype=torch.bool)
    _begin(b, None, is_first.at(0), taken.at(0), room.at(0), rows, A)
    return room


def _begin(
    b: Builder, begin: Arg | None, first: Arg, state: Arg, out: Arg, rows: int, size: int
) -> None:
    """Half of a state, or actions, with what episodes begin with; None: zeros."""
    b.launch(
        before.begin_kernel,
        (-(-rows * size // before.BLOCK),),
        {
            "first": first, "state": state, "begin": begin, "out": out, "size": rows * size,
        },
        {"WIDTH": size, "BLOCK": before.BLOCK},
    )  # fmt: skip


def _begin_backward(b: Builder, first: Arg, d_out: Arg, d_state: Arg, rows: int, size: int) -> None:
    b.launch(
        before.begin_backward_kernel,
        (-(-rows * size // before.BLOCK),),
        {"first": first, "d_out": d_out, "d_state": d_state, "size": rows * size},
        {"WIDTH": size, "BLOCK": before.BLOCK},
    )


def _prior_head(step: StepShape | StagedShape, *std: Arg, of: str = "") -> dict[str, Any]:
    """What the kernels of priors make of their sums; ``of`` is before the name of std."""
    return {"head": "normal", f"{of}std": std[0], "normal": step.std} if std else {}


def observe(
    params: RSSMParams,
    start: State,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    noise: Tensor,
    resets: tuple[bool, bool, bool],
) -> tuple[State, Latent, Latent]:
    """See ``fastdreamer.ops.observe``: posterior states, posterior and prior."""
    device = noise.device
    given = {
        "start.deter": start.deter, "start.stoch": start.stoch, "embed": embed,
        "action": action, "is_first": is_first, "noise": noise,
    }  # fmt: skip
    learned: tuple[str, ...] = ()
    if params.begin is not None:
        begin = params.begin.state(params)._asdict()
        learned = tuple(name for name, reset in zip(begin, resets, strict=False) if reset)
        given |= {f"begin.{name}": begin[name] for name in learned}
        resets = False, False, resets[2]
    groups = {
        "inp": named("inp", params.inp),
        "gru": gru_named(params.gru),
        "post": named("post", params.post),
        "prior": named("prior", params.prior),
    }
    parameters = {name: t for group in groups.values() for name, t in group.items()}
    save = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*given.values(), *parameters.values())
    )
    spec = _Spec(
        *noise.shape[:2],
        Precision(autocast_bf16(device), tiles.capability(device)),
        step_shape(params, posterior=True, resets=resets),
        prior_shape(params),
        embed_shape(params),
        embed.dtype == torch.float32,
        save,
        learned,
    )
    tensors = {**given, **parameters}
    deter, stoch, *rest = _Observe.apply(spec, list(tensors), *tensors.values())
    each = len(rest) // 2
    return State(deter, stoch), latent_of(params, *rest[:each]), latent_of(params, *rest[each:])


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, names, *tensors):
        inputs = {n: t.detach().contiguous() for n, t in zip(names, tensors, strict=True)}
        found = run(forward_program(spec), inputs)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.names = spec, names
        ctx.needs = dict(zip(names, ctx.needs_input_grad[2:], strict=True))
        ctx.kept = [*names, *found]
        if spec.save:
            # saved, so that autograd refuses if they are changed
            ctx.save_for_backward(*tensors, *found.values())
        shown = {**found, "deter": found["deter"][1:], "stoch": found["stoch"][1:]}
        return tuple(shown[name] for name in outputs(spec.step))

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        spec, needs = ctx.spec, ctx.needs
        reached = {
            name: grad.contiguous()
            for name, grad in zip(outputs(spec.step), grads, strict=True)
            if grad is not None
        }
        for one in list(reached):
            if "." in one and not spec.step.classes:  # mean and std go together
                part, name = one.split(".")
                other = f"{part}.{'std' if name == 'mean' else 'mean'}"
                reached.setdefault(other, torch.zeros_like(reached[one]))
        if not reached:
            return (None,) * (2 + len(ctx.names))

        def any_of(*groups: str) -> bool:
            return any(need and name.startswith(groups) for name, need in needs.items())

        wants = _Wants(any_of("inp.", "gru.", "post."), any_of("prior."), needs["embed"])
        program = backward_program(spec, wants, frozenset(reached))
        tensors = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
        tensors |= {f"d_out.{name}": grad for name, grad in reached.items()}
        found = run(program, chosen(program, tensors))
        found = {name.removeprefix("d_"): grad for name, grad in found.items()}
        found["start.deter"], found["start.stoch"] = found.pop("deter")[0], found.pop("stoch")[0]
        if "embed" in found:
            found["embed"] = found["embed"].to(spec.embed_dtype)
        return (None,) * 2 + tuple(found.get(n) if needs[n] else None for n in ctx.names)
