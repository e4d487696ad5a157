"""What the Triton bodies of imagine and, with given actions, open_loop and rssm_step share.

Each is one program forward and one backward; the critic's values hang on a second autograd node
over the same tapes, so that actor and critic can be differentiated together or one after the other.
Backward, the recurrence alone is a loop; what waits for nothing (heads, actor, gradients of
weights) is computed for all H·B rows at once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.params import (
    ActorParams,
    Categorical,
    Latent,
    Normal,
    OneHot,
    ReturnParams,
    RSSMParams,
    State,
)
from fastdreamer.ops.triton import lambda_return, tiles
from fastdreamer.ops.triton.build import (
    Action,
    Precision,
    autocast_bf16,
    bins_of,
    first_order,
    gru_named,
    named,
)
from fastdreamer.ops.triton.layout import (
    NO_STD,
    Classes,
    MlpShape,
    Read,
    StagedShape,
    Std,
    StepShape,
    feat_shape,
    make_std,
    step_shape,
)
from fastdreamer.ops.triton.program import Program
from fastdreamer.ops.triton.run import run
from fastdreamer.ops.triton.staged import Builder


class _Heads(NamedTuple):
    reward: MlpShape
    critic: MlpShape
    target: MlpShape | None
    discount: MlpShape | None
    gamma: float
    lam: float
    reward_as: Read | None = None
    value_as: Read | None = None  # of critic and target
    hard: bool = False  # whether a discount is gamma or 0
    departure: bool = False  # whether rewards are those of states 0..H-1

    @property
    def bootstrap(self) -> tuple[str, MlpShape]:
        """Name and shape of the head that the λ-return ends in."""
        return ("target", self.target) if self.target else ("critic", self.critic)

    @property
    def read_reward(self) -> tuple[Read | None, str]:
        """How rewards are read, and the input with the bins."""
        return self.reward_as, "reward.bins"

    @property
    def read_value(self) -> tuple[Read | None, str]:
        return self.value_as, "value.bins"

    @property
    def factor(self) -> Std:
        """γ where the discount head's kernels look for it."""
        return NO_STD._replace(scale=self.gamma)


class _Spec(NamedTuple):
    """All that a rollout's programs depend on."""

    op: str
    H: int
    B: int
    precision: Precision
    step: StepShape | StagedShape
    actor: MlpShape | None
    policy: Action | Classes | None  # one-hot actions have classes
    through_feat: bool  # whether gradients pass through what the actor looks at
    heads: _Heads | None
    prior: bool  # whether the prior's mean and std are asked for
    through: bool  # whether a gradient goes through the rollout
    critic: bool  # whether one goes to the critic

    @property
    def bounds(self) -> bool:
        """Whether actions have to be bounded: most policies' are."""
        given = self.policy is None
        normal = not given and isinstance(self.policy, Action)
        return self.step.bound and (given or (normal and self.policy.squash == "none"))

    @property
    def action_noise(self) -> int:
        """Numbers that an action takes."""
        one_hot = isinstance(self.policy, Classes)
        return self.policy.noise(self.step.A) if one_hot else self.step.A


class _Wants(NamedTuple):
    """Which parameters the backward pass computes gradients of."""

    actor: bool
    rssm: bool
    reward: bool
    discount: bool


@functools.lru_cache(maxsize=64)
def forward_program(spec: _Spec) -> Program:
    """Inputs and outputs are named as in ``Call``; see ``fastdreamer.ops.imagine``."""
    H, B, step = spec.H, spec.B, spec.step
    A, D, S = step.A, step.D, step.S
    b = Builder(spec.op, spec.precision)
    start = b.slot("start.deter", (B, D)), b.slot("start.stoch", (B, S))
    state_noise = b.slot("state_noise", (H, B, step.noise))
    deter, stoch = (
        b.slot("deter", (H + 1, B, D), "output"),
        b.slot("stoch", (H + 1, B, S), "output"),
    )
    action = b.slot("action", (H, B, A), "output" if spec.actor else "input")
    rows, keep = (H * B, "output") if spec.through else (B, "scratch")
    tape = b.operands("tape", (rows, step.tape), keep)
    stride = B if spec.through else 0  # without a backward pass, every step uses the same rows
    dynamics = b.pack_step("step", step, "prior")
    if spec.actor:
        action_noise = b.slot("action_noise", (H, B, spec.action_noise))
        actor = b.pack_mlp("actor", spec.actor)
        actor_tape = b.operands("actor.tape", (rows, spec.actor.tape), keep)
        if isinstance(spec.policy, Classes):
            drawn_of = b.slot("action.logits", (rows, A), keep)
    b.copy(start[0], deter, B, D)
    b.copy(start[1], stoch, B, S)
    taken = action
    if spec.bounds:
        taken = b.slot("taken", (H, B, A), "scratch") if spec.actor else b.bounded(action)
    moments: dict[str, Any] = {}
    if spec.prior or (step.classes and spec.through):
        moments = {name: b.slot(name, (H, B, S), "output").at for name in step.moments}
    elif step.classes:
        room = b.slot("logits", (B, S), "scratch")
        moments = {"logits": lambda _: room.at(0)}
    with b.loop("t", H) as t:
        if spec.actor:
            feat = deter.at(t * B * D), stoch.at(t * B * S)
            kept = actor_tape.at(t * stride * spec.actor.tape)
            drawn, noise = action.at(t * B * A), action_noise.at(t * B * spec.action_noise)
            if isinstance(spec.policy, Classes):
                logits = drawn_of.at(t * stride * A)
                b.mlp_forward(spec.actor, actor, feat, logits, kept, B, save=spec.through)
                b.sample(spec.policy, logits, noise, drawn, B * A)
            else:
                b.mlp_forward(
                    spec.actor, actor, feat, drawn, kept, B,
                    save=spec.through, head="action", noise=noise, action=spec.policy,
                )  # fmt: skip
            if spec.bounds:
                b.bound(drawn, None, taken.at(t * B * A), B * A)
        b.step_forward(
            step,
            dynamics,
            {
                "deter": deter.at(t * B * D), "stoch": stoch.at(t * B * S),
                "action": taken.at(t * B * A), "noise": state_noise.at(t * B * step.noise),
                "new_deter": deter.at((t + 1) * B * D), "new_stoch": stoch.at((t + 1) * B * S),
                "tape": tape.at(t * stride * step.tape),
                **{name: at(t * B * S) for name, at in moments.items()},
            },
            B,
            save=spec.through,
        )  # fmt: skip
    if spec.heads:
        _heads_forward(b, spec, deter, stoch)
    return b.program()


def _heads_forward(b: Builder, spec: _Spec, deter: Any, stoch: Any) -> None:
    H, B, heads = spec.H, spec.B, spec.heads
    arrived = deter.at(B * spec.step.D), stoch.at(B * spec.step.S)  # states 1..H
    before = deter.at(0), stoch.at(0)  # states 0..H-1
    paid = before if heads.departure else arrived
    reward, next_value, value, returns = (
        b.slot(name, (H, B), "output") for name in ("reward", "next_value", "value", "returns")
    )
    packed = {
        name: b.pack_mlp(name, shape)
        for name, shape in zip(("reward", "critic", "target", "discount"), heads[:4], strict=True)
        if shape
    }
    discount = b.slot("discount", (H, B), "output" if heads.discount else "scratch")
    name, bootstrap = heads.bootstrap
    for of, shape, out, x, tape, save, read, bins in (
        ("reward", heads.reward, reward, paid, "reward.tape", spec.through, *heads.read_reward),
        (name, bootstrap, next_value, arrived, "next_value.tape", spec.through, *heads.read_value),
        ("critic", heads.critic, value, before, "critic.tape", spec.critic, *heads.read_value),
    ):
        kept = b.operands(tape, (H * B, shape.tape), "output" if save else "scratch")
        b.head_forward(
            shape, packed[of], x, out, kept, H * B, save=save, read=read, bins=bins
        )  # fmt: skip
    if heads.discount:
        kept = b.operands(
            "discount.tape", (H * B, heads.discount.tape),
            "output" if spec.through and not heads.hard else "scratch",
        )  # fmt: skip
        b.mlp_forward(
            heads.discount, packed["discount"], arrived, discount.at(0), kept.at(0), H * B,
            save=spec.through and not heads.hard, head="hard" if heads.hard else "discount",
            normal=heads.factor,
        )  # fmt: skip
    else:
        b.copy(None, discount, H, B, value=heads.gamma)
    slots = {"reward": reward, "next_value": next_value, "discount": discount, "returns": returns}
    b.add(lambda_return.launch(lambda_return.forward_kernel, H, B, heads.lam, **slots))


@functools.lru_cache(maxsize=64)
def backward_program(spec: _Spec, wants: _Wants, given: frozenset[str]) -> Program:
    """``given`` names the outputs that a gradient reaches: inputs ``d_out.`` and the name."""
    H, B, step = spec.H, spec.B, spec.step
    A, D, S = step.A, step.D, step.S
    rows = H * B
    b = Builder(f"{spec.op} backward", spec.precision)
    deter, stoch = b.slot("deter", (H + 1, B, D)), b.slot("stoch", (H + 1, B, S))
    action = b.slot("action", (H, B, A))
    tape = b.operands("tape", (rows, step.tape))
    grads = b.operands("grads", (rows, step.grads), "scratch")

    def reaching(name: str, *shape: int) -> Any:
        return b.slot(f"d_out.{name}", shape) if name in given else None

    # gradients by the states, what reaches them from outside first; state 0 is the start
    d_deter = b.slot("d_deter", (H + 1, B, D), "output")
    d_stoch = b.slot("d_stoch", (H + 1, B, S), "output")
    d_action = b.slot("d_action", (H, B, A), "scratch" if spec.actor else "output")
    taken = b.bounded(action) if spec.bounds else action
    d_taken = b.slot("d_taken", (H, B, A), "scratch") if spec.bounds else d_action
    for target, name, size in ((d_deter, "deter", D), (d_stoch, "stoch", S)):
        b.copy(None, target, B, size)
        b.copy(reaching(name, H, B, size), target.at(B * size), rows, size)
    b.copy(reaching("action", H, B, A), d_action, rows, A)
    if spec.bounds:
        b.copy(None, d_taken, rows, A)
    arrived = deter.at(B * D), stoch.at(B * S)
    if given & {"reward", "returns", "discount"}:
        states = deter, stoch, d_deter, d_stoch
        _heads_backward(b, spec, wants, reaching, states)

    dynamics = b.pack_step("step", step, "prior", transposed=True)
    sampling = b.sampling(step, "state_noise", "logits", (H, B))
    moments = {f"d_{name}": reaching(name, H, B, S) for name in step.moments}
    by_actor = wants.actor or spec.through_feat
    by_noise = not isinstance(spec.policy, Classes) or spec.policy.gumbel
    if by_actor:
        shape = spec.actor
        actor = b.pack_mlp("actor", shape, transposed=True)
        actor_tape = b.operands("actor.tape", (rows, shape.tape))
        actor_grads = b.operands("actor.grads", (rows, shape.grads), "scratch")
        if isinstance(spec.policy, Classes):
            logits, d_logits = (
                b.slot(name, (rows, A), kind)
                for name, kind in (("action.logits", "input"), ("d_action.logits", "scratch"))
            )
        if by_noise:
            action_noise = b.slot("action_noise", (H, B, A))

    def actor_backward(t: Any, count: int, d_x: tuple) -> None:
        at = t * B * A
        tapes = actor_tape.at(t * B * shape.tape), actor_grads.at(t * B * shape.grads)
        if isinstance(spec.policy, Classes):
            noise = action_noise.at(at) if by_noise else None
            found = logits.at(at), noise, d_action.at(at), None, d_logits.at(at)
            b.sample_backward(spec.policy, *found, count * A)
            b.mlp_backward(shape, actor, d_logits.at(at), *tapes, count, d_x=d_x)
        else:
            b.mlp_backward(
                shape, actor, d_action.at(at), *tapes, count, d_x=d_x, head="action",
                noise=action_noise.at(at), drawn=action.at(at), action=spec.policy,
            )  # fmt: skip

    with b.loop("t", H) as i:
        t = H - 1 - i
        b.step_backward(
            step,
            dynamics,
            {
                "deter": deter.at(t * B * D), **sampling(t * B),
                "tape": tape.at(t * B * step.tape), "grads": grads.at(t * B * step.grads),
                "d_new_deter": d_deter.at((t + 1) * B * D),
                "d_new_stoch": d_stoch.at((t + 1) * B * S),
                **{name: slot and slot.at(t * B * S) for name, slot in moments.items()},
                "d_deter": d_deter.at(t * B * D), "d_stoch": d_stoch.at(t * B * S),
                "d_action": d_taken.at(t * B * A),
            },
            B,
        )  # fmt: skip
        if spec.bounds:
            b.bound(action.at(t * B * A), d_taken.at(t * B * A), d_action.at(t * B * A), B * A)
        if spec.through_feat:
            actor_backward(t, B, (d_deter.at(t * B * D), d_stoch.at(t * B * S)))
    if wants.rssm:
        b.step_gradients(
            step, "prior", deter.at(0), stoch.at(0), taken.at(0), arrived[0],
            tape.at(0), grads.at(0), rows,
        )  # fmt: skip
    if by_actor and not spec.through_feat:  # nothing waits for it: all rows at once
        actor_backward(0, rows, (None, None))
    if wants.actor:
        b.mlp_gradients(
            "actor", shape, [(deter.at(0), D, None), (stoch.at(0), S, None)],
            actor_tape.at(0), actor_grads.at(0), rows,
        )  # fmt: skip
    return b.program()


def _heads_backward(b: Builder, spec: _Spec, wants: _Wants, reaching, states) -> None:
    H, B, heads, step = spec.H, spec.B, spec.heads, spec.step
    rows = H * B
    deter, stoch, d_deter, d_stoch = states  # 0..H, and the gradients by them
    d_reward, d_returns = reaching("reward", H, B), reaching("returns", H, B)
    d_discount = reaching("discount", H, B)
    discount = b.slot("discount", (H, B), "input" if heads.discount else "scratch")
    over: list[tuple[str, MlpShape, str, Any]] = []
    if d_returns is not None:
        from_outside = d_reward, d_discount
        d_reward, d_next, d_discount = (
            b.slot(name, (H, B), "scratch") for name in ("by_reward", "by_next", "by_discount")
        )
        if not heads.discount:
            b.copy(None, discount, H, B, value=heads.gamma)
        slots = {
            "grad": d_returns, "next_value": b.slot("next_value", (H, B)),
            "discount": discount, "returns": b.slot("returns", (H, B)),
            "grad_reward": d_reward, "grad_next_value": d_next, "grad_discount": d_discount,
        }  # fmt: skip
        b.add(lambda_return.launch(lambda_return.backward_kernel, H, B, heads.lam, **slots))
        for source, target in zip(from_outside, (d_reward, d_discount), strict=True):
            if source is not None:
                b.copy(source, target, H, B, add=True)
        over.append((*heads.bootstrap, "next_value", d_next))
    if d_reward is not None:
        over.append(("reward", heads.reward, "reward", d_reward))
    if d_discount is not None and heads.discount and not heads.hard:
        over.append(("discount", heads.discount, "discount", d_discount))
    for name, shape, of, d_out in over:
        packed = b.pack_mlp(name, shape, transposed=True)
        tape = b.operands(f"{of}.tape", (rows, shape.tape))
        grads = b.operands(f"{name}.grads", (rows, shape.grads), "scratch")
        first = 0 if name == "reward" and heads.departure else B  # row of the states it looks at
        d_x = d_deter.at(first * step.D), d_stoch.at(first * step.S)
        if name == "discount":
            b.mlp_backward(
                shape, packed, d_out.at(0), tape.at(0), grads.at(0), rows, d_x=d_x,
                head=name, drawn=discount.at(0), normal=heads.factor,
            )  # fmt: skip
        else:
            read, bins = heads.read_reward if name == "reward" else heads.read_value
            b.head_backward(
                shape, packed, of, d_out, tape, grads, rows, d_x=d_x, read=read, bins=bins
            )
        if (name == "reward" and wants.reward) or (name == "discount" and wants.discount):
            x = [
                (deter.at(first * step.D), step.D, None),
                (stoch.at(first * step.S), step.S, None),
            ]
            b.mlp_gradients(name, shape, x, tape.at(0), grads.at(0), rows)


@functools.lru_cache(maxsize=64)
def critic_program(spec: _Spec) -> Program:
    """The critic's gradients from that of ``value``."""
    H, B, shape = spec.H, spec.B, spec.heads.critic
    D, S, rows = spec.step.D, spec.step.S, spec.H * spec.B
    b = Builder("critic backward", spec.precision)
    x = [
        (b.slot("deter", (H + 1, B, D)).at(0), D, None),
        (b.slot("stoch", (H + 1, B, S)).at(0), S, None),
    ]
    tape = b.operands("critic.tape", (rows, shape.tape))
    grads = b.operands("critic.grads", (rows, shape.grads), "scratch")
    packed = b.pack_mlp("critic", shape, transposed=True)
    read, bins = spec.heads.read_value
    d_out = b.slot("d_out.value", (H, B))
    b.head_backward(shape, packed, "value", d_out, tape, grads, rows, read=read, bins=bins)
    b.mlp_gradients("critic", shape, x, tape.at(0), grads.at(0), rows)
    return b.program()


def chosen(program: Program, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that a program takes."""
    return {slot.name: tensors[slot.name] for slot in program.of_kind("input")}


# autograd -----------------------------------------------------------------------------------------


class Call:
    """One rollout: what it was asked, and what its backward passes share."""

    def __init__(
        self,
        op: str,
        params: RSSMParams,
        actor: ActorParams | None = None,
        returns: ReturnParams | None = None,
        *,
        prior: bool = False,
    ) -> None:
        self.op, self.prior = op, prior
        dynamics = params.like.device
        self.precision = Precision(autocast_bf16(dynamics), tiles.capability(dynamics))
        self.step = step_shape(params)
        D, S = self.step.D, self.step.S
        # parameters by group and name, in the order in which autograd sees them
        self.groups: dict[str, dict[str, Tensor]] = {
            "inp": named("inp", params.inp),
            "gru": gru_named(params.gru),
            "prior": named("prior", params.prior),
        }
        self.actor = self.policy = self.heads = None
        self.through_feat = False
        if actor is not None:
            std = make_std(actor.std)
            one_hot = isinstance(std, Classes)
            self.actor = feat_shape(
                actor.mlp, D, S, groups=1 if one_hot else 2, stoch_first=actor.stoch_first
            )
            self.policy = std if one_hot else Action(float(actor.mean_scale), std, actor.squash)
            self.through_feat = actor.through_feat
            self.groups["actor"] = named("actor", actor.mlp)
        if returns is not None:
            four = (returns.reward, returns.critic, returns.target, returns.discount)
            order = {"stoch_first": returns.stoch_first}
            shapes = (head and feat_shape(head, D, S, **order) for head in four)
            reads = (
                Read.of(returns.reward_as, returns.reward),
                Read.of(returns.value_as, returns.critic),
            )
            flags = returns.hard_discount, returns.departure
            self.heads = _Heads(*shapes, float(returns.gamma), float(returns.lam), *reads, *flags)
            self.groups["bins"] = bins_of(returns)
            self.groups["reward"] = named("reward", returns.reward)
            self.groups["critic"] = named("critic", returns.critic)
            if returns.target is not None:
                self.groups["target"] = named("target", returns.target)
            if returns.discount is not None:
                self.groups["discount"] = named("discount", returns.discount)

    def spec(self, noise: Tensor, through: bool, critic: bool) -> _Spec:
        return _Spec(
            self.op, noise.shape[0], noise.shape[1], self.precision, self.step,
            self.actor, self.policy, self.through_feat, self.heads, self.prior, through, critic,
        )  # fmt: skip

    def parameters(self) -> dict[str, Tensor]:
        return {name: t for group in self.groups.values() for name, t in group.items()}

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        """Run on start.deter, start.stoch, state_noise, action_noise or action; by name."""
        if not torch.is_grad_enabled():
            spec = self.spec(given["state_noise"], False, False)
            return _shown(run(forward_program(spec), self.inputs(given)))
        critic = any(t.requires_grad for t in self.groups.get("critic", {}).values())
        names = list(given)
        for group, parameters in self.groups.items():
            if group not in ("critic", "target"):
                names += parameters
        tensors = {**given, **self.parameters()}
        results: dict[str, Tensor] = {}
        through = any(tensors[name].requires_grad for name in names)
        spec = self.spec(given["state_noise"], through, critic)
        outputs = _Rollout.apply(self, spec, names, results, *(tensors[n] for n in names))
        found = dict(zip(_outputs(spec), outputs, strict=True))
        if critic:
            parameters = self.groups["critic"]
            found["value"] = _Value.apply(
                found["value"], spec, results, list(parameters), *parameters.values()
            )
        return found

    def inputs(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: t.detach().contiguous() for name, t in self.parameters().items()}
        return {**{name: t.detach() for name, t in given.items()}, **parameters}


def _shown(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The states without the start."""
    return {**found, "deter": found["deter"][1:], "stoch": found["stoch"][1:]}


def _outputs(spec: _Spec) -> list[str]:
    names = ["deter", "stoch"]
    names += ["action"] if spec.actor else []
    names += spec.step.moments if spec.prior else []
    names += ["reward", "returns", "next_value", "value"] if spec.heads else []
    return names + (["discount"] if spec.heads and spec.heads.discount else [])


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, spec, names, results, *tensors):
        given, parameters = dict(zip(names, tensors, strict=True)), call.parameters()
        inputs = call.inputs({n: t for n, t in given.items() if n not in parameters})
        found = run(forward_program(spec), inputs)
        shown = _shown(found)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.names = spec, names
        groups = call.groups
        needs = dict(zip(names, ctx.needs_input_grad[4:], strict=True))
        ctx.needs = needs
        ctx.wants = _Wants(
            actor=any(needs[n] for n in groups.get("actor", ())),
            rssm=any(needs[n] for g in ("inp", "gru", "prior") for n in groups[g]),
            reward=any(needs[n] for n in groups.get("reward", ())),
            discount=any(needs[n] for n in groups.get("discount", ())),
        )
        of_critic = ("value", "value.raw", "critic.tape")
        kept = {**inputs, **{n: found[n] for n in found if n not in of_critic}}
        ctx.kept = list(kept)
        # saved, so that autograd refuses if they are changed; the inputs before they were copied
        ctx.save_for_backward(*(given.get(n, t) for n, t in kept.items()))
        of_value = ("critic.tape", "value.raw", "value.bins", "deter", "stoch")
        results.update({n: t for n, t in {**inputs, **found}.items() if n in of_value})
        hard = ("discount",) if spec.heads and spec.heads.hard else ()
        plain = [shown[n] for n in ("next_value", "value", *hard) if n in shown]
        ctx.mark_non_differentiable(*plain)
        return tuple(shown[name] for name in _outputs(spec))

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        spec, needs = ctx.spec, ctx.needs
        reached = {
            name: grad.contiguous()
            for name, grad in zip(_outputs(spec), grads, strict=True)
            if grad is not None and name not in ("next_value", "value")
        }
        for one, other in (("mean", "std"), ("std", "mean")):
            if one in reached and other not in reached:
                reached[other] = torch.zeros_like(reached[one])
        if not reached:
            return (None,) * (4 + len(ctx.names))
        program = backward_program(spec, ctx.wants, frozenset(reached))
        tensors = {
            n: t.detach().contiguous() for n, t in zip(ctx.kept, ctx.saved_tensors, strict=True)
        }
        tensors |= {f"d_out.{name}": grad for name, grad in reached.items()}
        found = run(program, chosen(program, tensors))
        found = {name.removeprefix("d_"): grad for name, grad in found.items()}
        found["start.deter"], found["start.stoch"] = found.pop("deter")[0], found.pop("stoch")[0]
        return (None,) * 4 + tuple(found.get(name) if needs[name] else None for name in ctx.names)


class _Value(torch.autograd.Function):
    """The critic's values of a rollout, differentiable by the critic's parameters."""

    @staticmethod
    def forward(ctx, value, spec, results, names, *critic):
        ctx.spec, ctx.names, ctx.results = spec, names, list(results)
        ctx.save_for_backward(*critic, *results.values())
        return value.view_as(value)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        tensors = dict(zip([*ctx.names, *ctx.results], ctx.saved_tensors, strict=True))
        tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
        tensors["d_out.value"] = grad.contiguous()
        program = critic_program(ctx.spec)
        found = run(program, chosen(program, tensors))
        return None, None, None, None, *(found[f"d_{name}"] for name in ctx.names)


def latent_of(params: RSSMParams, *moments: Tensor) -> Latent:
    """Mean and std or logits as a distribution."""
    latent = params.latent
    if not isinstance(latent, Categorical):
        return Normal(*moments)
    logits = moments[0].unflatten(-1, (-1, latent.classes))
    return OneHot(logits, latent.unimix, latent.gumbel)


def start_of(state: State) -> dict[str, Tensor]:
    return {"start.deter": state.deter, "start.stoch": state.stoch}


def states_of(found: dict[str, Tensor]) -> State:
    return State(found["deter"], found["stoch"])
