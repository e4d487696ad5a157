"""A Rollout against the loop that its modules' own ``forward`` makes: errors and speed."""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer.ops.observe import RESETS
from fastdreamer.ops.params import (
    Categorical,
    Latent,
    Normal,
    State,
    StdTransform,
    bounded,
    choose,
    latent_dist,
    noise_of,
    noise_size,
    policy_dist,
    read_out,
    stack,
)
from fastdreamer.rollout.ask import still

_TOLERANCE = 32  # eps, beside twice the loop's own error: sums in another order


class Line(NamedTuple):
    """One output or gradient: relative errors against float64, and whether that is well."""

    name: str
    error: float  # of the fast loop, or of the caller's function
    loop: float  # of the loop over the caller's modules
    ok: bool


class Verification(NamedTuple):
    """What :meth:`Rollout.verify` found; prints as a table."""

    lines: list[Line]
    seconds: dict[str, tuple[float, float]]  # forward + backward of the fast and the own loop

    @property
    def ok(self) -> bool:
        """Whether every error is in the order of the loop's, the caller's functions' too."""
        return all(line.ok for line in self.lines)

    def __str__(self) -> str:
        width = max(len(line.name) for line in self.lines)
        rows = [f"{'':{width}}  {'error':>9}  {'own loop':>9}   (relative, against float64)"]
        for line in self.lines:
            mark = "" if line.ok else "   <- does not agree"
            rows.append(f"{line.name:{width}}  {line.error:9.1e}  {line.loop:9.1e}{mark}")
        for name, (fast, loop) in self.seconds.items():
            rows.append(
                f"{name}, forward and backward: {fast * 1e3:.2f} ms, own loop {loop * 1e3:.2f} ms: "
                f"{loop / fast:.2f}x"
            )
        rows.append("agrees" if self.ok else "DOES NOT AGREE")
        return "\n".join(rows)


@contextlib.contextmanager
def comparable(rollout: Any) -> Iterator[None]:
    """With gradients, whatever the caller's block says, and parametrizations held still."""
    parts = [part for net in rollout.nets.values() for part in net.modules]
    with torch.inference_mode(False), torch.enable_grad(), still(*parts):
        yield


def verify(
    rollout: Any,
    batch: Mapping[str, Tensor] | None,
    own: Callable | None,
    own_dream: Callable | None,
    seed: int,
    repeats: int,
) -> Verification:
    """See :meth:`fastdreamer.rollout.Rollout.verify`, within :func:`comparable`."""
    time_major = copy.copy(rollout)
    time_major.batch_first = False
    wide = copy.copy(rollout)
    wide.nets, wide.watched, wide.answers = _double(rollout.nets), [], []
    given = _inputs(rollout, dict(batch or {}), seed)
    cases: dict[str, tuple[Callable, Callable]] = {}
    if "post" in rollout.nets:
        cases["observe"] = _observe_fast, _observe_loop
    else:
        cases["open_loop"] = _open_loop_fast, _open_loop_loop
    if "actor" in rollout.nets:
        cases["imagine"] = _imagine_fast, _imagine_loop
    functions = {"observe": own and partial(_own, own)}
    functions["imagine"] = own_dream and partial(_own_dream, own_dream)
    functions = {name: function for name, function in functions.items() if function}
    for name in functions.keys() - cases.keys():
        raise ValueError(f"verify: this Rollout was made without the layers that {name} needs")
    lines, seconds = [], {}
    double = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    for name, (fast, loop) in cases.items():
        sides = (loop, wide, double), (loop, time_major, given)
        truth, read = (_results(*side) for side in sides)
        lines += _lines(name, _results(fast, time_major, given), truth, read)
        if name in functions:
            outputs = functions[name](rollout, given)
            values = {key for key in truth if not key.startswith("gradient")}
            if not outputs or outputs.keys() - values:
                got = ", ".join(sorted(outputs.keys() - values)) or "nothing"
                raise ValueError(
                    f"verify: of {', '.join(sorted(values))} the own {name} returned {got}"
                )
            truth, read = (_results(*side, tuple(outputs)) for side in sides)
            their = _results(lambda *_, found=outputs: found, rollout, given)
            if not any(out.requires_grad for out in outputs.values()):
                their = {key: their[key] for key in outputs}
            lines += _lines(f"your {name}", their, truth, read)
        seconds[name] = _race(
            lambda fast=fast: _results(fast, time_major, given),
            lambda loop=loop: _results(loop, time_major, given),
            repeats,
        )
    return Verification(lines, seconds)


def _lines(
    case: str, got: dict[str, Tensor], truth: dict[str, Tensor], loop: dict[str, Tensor]
) -> list[Line]:
    """The errors of what was got beside those of the loop."""
    lines = []
    for name, x in got.items():
        norm, eps = max(float(truth[name].norm()), 1e-30), torch.finfo(x.dtype).eps
        of_got, of_loop = (
            float((y[name].double() - truth[name]).norm()) / norm for y in (got, loop)
        )
        ok = of_got <= 2 * of_loop + _TOLERANCE * eps
        lines.append(Line(f"{case}: {name}", of_got, of_loop, ok))
    return lines


def _double(nets: dict[str, Any]) -> dict[str, Any]:
    """Copies in float64; what is shared stays so."""
    with torch.no_grad():  # a script's parameters are cloned, and have to stay leaves
        given = copy.deepcopy({name: net.given for name, net in nets.items()})
    copies = {name: net.again(given[name]) for name, net in nets.items()}
    for name, net in copies.items():
        for module, original in zip(net.modules, nets[name].modules, strict=True):
            module.double()
            for p, q in zip(module.parameters(), original.parameters(), strict=True):
                p.requires_grad_(q.requires_grad)
    return copies


def _inputs(rollout: Any, batch: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """The batch, time-major, and what it lacks, drawn."""
    like, dims, options = rollout.like, rollout.dims, rollout.options
    generator = torch.Generator().manual_seed(seed)
    unknown = set(batch) - {"embed", "action", "is_first"}
    if unknown:
        raise ValueError(f"verify: batch has {', '.join(sorted(unknown))}; embed, action and "
                         "is_first are read")  # fmt: skip
    # a backward pass takes no inference tensor
    own = {name: x.clone() if x.is_inference() else x for name, x in batch.items()}
    given = {name: rollout._inward(x) for name, x in own.items()}
    T, B = given["action"].shape[:2] if "action" in given else (20, 8)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(like)

    given.setdefault("action", randn(T, B, dims["A"]).tanh())
    if "E" in dims:
        given.setdefault("embed", randn(T, B, dims["E"]))
    if "is_first" not in given:
        first = torch.rand(T, B, generator=generator, device="cpu") < 0.1
        given["is_first"] = first.to(like.device)

    def drawn(of: StdTransform | Categorical, size: int, *lead: int) -> Tensor:
        _, draw = noise_of(of)
        return draw((*lead, noise_size(of, size)), generator=generator, device="cpu").to(like)

    given |= {"noise": drawn(options.latent, dims["S"], T, B), "deter": randn(B, dims["D"]).tanh()}
    given |= {"stoch": randn(B, dims["S"])}
    action_noise = drawn(options.action_std, dims["A"], 15, B)
    state_noise = drawn(options.latent, dims["S"], 15, B)
    return given | {"state_noise": state_noise, "action_noise": action_noise}


def _results(
    run: Callable, rollout: Any, given: dict[str, Any], chosen: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Outputs (the chosen), and all parameters' gradients for a fixed weighting of them."""
    outputs = run(rollout, given)
    outputs = {name: outputs[name] for name in chosen or outputs}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (torch.randn(out.shape, generator=generator, device="cpu").to(out) * out).sum()
        for out in outputs.values()
    )
    tensors = {
        f"{name}.{i}.{label}": p
        for name, net in rollout.nets.items()
        for i, module in enumerate(net.modules)
        for label, p in module.named_parameters()
        if p.requires_grad
    }
    grads = [None] * len(tensors)
    if tensors and loss.requires_grad:
        grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    result = {name: out.detach() for name, out in outputs.items()}
    for name, p, grad in zip(tensors, tensors.values(), grads, strict=True):
        result[f"gradient of {name}"] = torch.zeros_like(p) if grad is None else grad
    return result


# ---------------------------------------------------------------- the two sides


def _observe_fast(r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    start = State(x["deter"], x["stoch"])
    seen = r.observe(x["embed"], x["action"], x["is_first"], start, x["noise"])
    return _named(seen.state, seen.post, seen.prior)


def _open_loop_fast(r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    return r.open_loop(State(x["deter"], x["stoch"]), x["action"], x["noise"])._asdict()


def _imagine_fast(r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    start = State(x["deter"], x["stoch"])
    dream = r.imagine(start, state_noise=x["state_noise"], action_noise=x["action_noise"])
    return {name: out for name, out in dream._asdict().items() if out is not None}


def _own(function: Callable, r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    """The caller's filter with the batch's noise, time-major."""
    inputs = [r._outward(x[name]) for name in ("embed", "action", "is_first")]
    start = State(x["deter"], x["stoch"])
    seen = r.serve(lambda: function(*inputs, start), x["noise"])
    return {name: r._inward(out) for name, out in seen.items()}


def _own_dream(function: Callable, r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    """The caller's imagination likewise."""
    start, horizon = State(x["deter"], x["stoch"]), len(x["action_noise"])
    dream = r.serve(lambda: function(start, horizon), x["state_noise"], x["action_noise"])
    return {name: r._inward(out) for name, out in dream.items()}


def _observe_loop(r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    deter, stoch = x["deter"], x["stoch"]
    keep = (~x["is_first"]).unsqueeze(-1).to(deter)
    begins = *_begin(r, deter, stoch), torch.zeros_like(x["action"][0])
    states, posts, priors = [], [], []
    for t in range(len(x["action"])):
        parts = zip((deter, stoch, x["action"][t]), begins, RESETS[r.reset], strict=True)
        deter, stoch, action = (
            part * keep[t] + begin * (1 - keep[t]) if zero else part for part, begin, zero in parts
        )
        deter = _next(r, deter, stoch, action)
        priors.append(_dist(r, r.nets["prior"](deter)))
        seen = (x["embed"][t], deter) if r.options.embed_first else (deter, x["embed"][t])
        posts.append(_dist(r, r.nets["post"](torch.cat(seen, -1))))
        stoch = posts[-1].sample(x["noise"][t])
        states.append(State(deter, stoch))
    return _named(State(*map(torch.stack, zip(*states, strict=True))), stack(posts), stack(priors))


def _open_loop_loop(r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    deter, stoch, states = x["deter"], x["stoch"], []
    for action, noise in zip(x["action"], x["noise"], strict=True):
        deter = _next(r, deter, stoch, action)
        stoch = _dist(r, r.nets["prior"](deter)).sample(noise)
        states.append(State(deter, stoch))
    return State(*map(torch.stack, zip(*states, strict=True)))._asdict()


def _imagine_loop(r: Any, x: dict[str, Any]) -> dict[str, Tensor]:
    o, state, steps = r.options, State(x["deter"], x["stoch"]), []
    for state_noise, action_noise in zip(x["state_noise"], x["action_noise"], strict=True):
        feat = state.concat(o.stoch_first)
        raw = r.nets["actor"](feat if o.through_feat else feat.detach())
        dist = policy_dist(raw, o.mean_scale, o.action_std)
        action = choose(dist, o.squash, action_noise)
        deter = _next(r, *state, action)
        state = State(deter, _dist(r, r.nets["prior"](deter)).sample(state_noise))
        steps.append((*state, action))
    deter, stoch, action = map(torch.stack, zip(*steps, strict=True))
    outputs = {"deter": deter, "stoch": stoch, "action": action}
    if "reward" not in r.nets or "critic" not in r.nets:
        return outputs
    feat = State(deter, stoch).concat(o.stoch_first)
    first = State(x["deter"], x["stoch"]).concat(o.stoch_first)
    before, critic = torch.cat([first[None], feat[:-1]]), r.nets["critic"]
    paid = before if o.pairing == "departure" else feat
    outputs["reward"] = reward = read_out(r.readout("reward"), r.nets["reward"](paid))
    outputs["value"] = read_out(r.readout("critic"), critic(before.detach()))
    bootstrap = r.nets.get("target", critic)
    frozen = [p for m in bootstrap.modules for p in m.parameters() if p.requires_grad]
    for p in frozen:  # its parameters get no gradient from the returns
        p.requires_grad_(False)
    try:
        following = read_out(r.readout("target"), bootstrap(feat))
    finally:
        for p in frozen:
            p.requires_grad_(True)
    discount = torch.full_like(reward, o.gamma)
    if "discount" in r.nets:
        logit = r.nets["discount"](feat)[..., 0]
        discount = o.gamma * ((logit > 0).to(logit) if o.hard_discount else torch.sigmoid(logit))
    total, returns = following[-1], []
    for t in reversed(range(len(reward))):
        total = reward[t] + discount[t] * ((1 - o.lam) * following[t] + o.lam * total)
        returns.append(total)
    outputs["returns"] = torch.stack(returns[::-1])
    return outputs | ({"discount": discount} if "discount" in r.nets else {})


def _next(r: Any, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
    gru = r.nets["gru"]
    if gru.branches is not None:  # bounds the action itself
        return gru(stoch, deter, action)
    action = bounded(action) if r.options.bound_action else action
    x = torch.cat((action, stoch) if r.options.action_first else (stoch, action), -1)
    return gru(r.nets["inp"](x) if "inp" in r.nets else x, deter)


def _begin(r: Any, deter: Tensor, stoch: Tensor) -> tuple[Tensor, Tensor]:
    """What an episode begins with."""
    if "begin" not in r.nets:
        return torch.zeros_like(deter), torch.zeros_like(stoch)
    h = torch.tanh(r.nets["begin"].params())[None]
    mode = _dist(r, r.nets["prior"](h)).mode()
    return h.expand_as(deter), (mode if r.options.begin_through else mode.detach()).expand_as(stoch)


def _dist(r: Any, raw: Tensor) -> Latent:
    return latent_dist(raw, r.options.latent, raw.dtype)


def _named(state: State, post: Latent, prior: Latent) -> dict[str, Tensor]:
    dists = {"post": post, "prior": prior}
    fields = ("mean", "std") if isinstance(post, Normal) else ("logits",)
    return state._asdict() | {f"{n}_{x}": getattr(d, x) for n, d in dists.items() for x in fields}


def _race(fast: Callable, loop: Callable, repeats: int) -> tuple[float, float]:
    times: dict[Callable, list[float]] = {fast: [], loop: []}
    for _ in range(repeats):
        for run, seconds in times.items():
            if packs := sys.modules.get("fastdreamer.ops.native.packs"):
                packs.forget()  # as behind an optimiser's step: weights are packed for every call
            begin = time.perf_counter()
            *_, last = run().values()
            last.flatten()[:1].tolist()  # a GPU is through when it can be read
            seconds.append(time.perf_counter() - begin)
    return statistics.median(times[fast]), statistics.median(times[loop])
