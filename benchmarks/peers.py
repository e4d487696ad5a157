"""The fast rollout in public Dreamers' places: `python -m benchmarks.peers`.

Each peer's own filter and the one that ``adapt`` puts in its place: compared first (values and all
gradients, with the same noise), then timed, forward and backward, interleaved. torchrl's and
sheeprl's own classes where they are installed, the minimal models of ``tests/rollout`` for the
others, all at the sizes of the repositories; rows of a package name it. Where a peer has faster
loops of its own (torchrl's over plain tensors, with a compiled step, by a compiled scan), they run
by turns with these. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks import machine, report
from benchmarks.timing import cell, summary
from benchmarks.variants import MissingVariant
from fastdreamer.ops.backend import last_backend
from fastdreamer.rollout import adapt
from fastdreamer.rollout.draws import relative_difference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "rollout"))
import modern  # noqa: E402
import peers as first  # noqa: E402

V1 = {"A": 6, "D": 200, "S": 30, "E": 1024, "H": 200}
V3 = modern.Sizes(6, 512, 32, 32, 4096, 512)
TOLERANCE = 1e-4, 2e-3
"""Relative differences of values and gradients in float32, over a few steps: one rounding apart."""
Inputs = Callable[[int, int], tuple[Any, ...]]
"""Of steps and rows: the arguments of a peer's filter."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def resets(*shape: int) -> Tensor:
    return (torch.rand(*shape) < 0.05).float()


def following(*names: str) -> list[tuple[str, str]]:
    """TensorDict's keys of the next step."""
    return [("next", name) for name in names]


def onehot(s: modern.Sizes, *lead: int) -> Tensor:
    index = torch.randint(s.classes, (*lead, s.latents))
    return nn.functional.one_hot(index, s.classes).float()


# ---------------------------------------------------------------- Gaussian latents, torch's GRU


def transition(model: Any, masked: bool = True) -> tuple[Any, Inputs]:
    A, D, S, E = (V1[n] for n in "ADSE")

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        goes_on = (1 - resets(T, B, 1),) if masked else ()
        return normal(B, S), normal(T, B, A).tanh(), normal(B, D).tanh(), normal(T, B, E), *goes_on

    return model, inputs


def grusa() -> tuple[Any, Inputs]:
    given = lambda T, B: (normal(B, T, V1["E"]), normal(B, T - 1, V1["A"]).tanh())  # noqa: E731
    return first.GrusaRSSM(0.1), given


def representation() -> tuple[Any, Inputs]:
    A, D, S, E = (V1[n] for n in "ADSE")

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        state = first.RSSMState(*(normal(B, S) for _ in range(3)), normal(B, D).tanh())
        return T, normal(T, B, E), normal(T, B, A).tanh(), state

    return first.RSSMRollout(), inputs


def nonterms() -> tuple[Any, Inputs]:
    A, D, S, E = (V1[n] for n in "ADSE")

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        state = {"stoch": normal(B, S), "deter": normal(B, D).tanh()}
        return normal(T, B, E), normal(T, B, A).tanh(), 1 - resets(T, B, 1), state, T

    return first.NontermsRSSM(), inputs


def simple() -> tuple[Any, Inputs]:
    given = lambda T, B: (normal(B, T + 1, V1["E"]), normal(B, T + 1, V1["A"]).tanh())  # noqa: E731
    return first.SimpleRSSM(), given


def sheeprl_v1() -> tuple[Any, Inputs]:
    A, D, S, E = (V1[n] for n in "ADSE")
    try:
        from sheeprl.algos.dreamer_v1 import agent
        from sheeprl.models.models import MLP
    except ImportError:
        model: Any = first.SheepRSSMOfToday()
    else:
        mlps = (MLP(n, 2 * S, [V1["H"]], activation=nn.ELU) for n in (D + E, D))
        model = agent.RSSM(agent.RecurrentModel(S + A, D), *mlps, {"validate_args": False})

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        sequences = normal(T, B, A).tanh(), normal(T, B, E), resets(T, B, 1)
        return normal(1, B, S), normal(1, B, D).tanh(), *sequences

    return model, inputs


def torchrl_v1() -> tuple[Any, Inputs]:
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules.models.model_based import RSSMPosterior, RSSMPrior, RSSMRollout

    A, D, S, E, H = V1.values()
    sizes = {"hidden_dim": H, "rnn_hidden_dim": D, "state_dim": S}
    prior = TensorDictModule(
        RSSMPrior(action_spec=torch.zeros(A), action_dim=A, **sizes), ["state", "belief", "action"],
        following("prior_mean", "prior_std") + ["_"] + following("belief"),
    )  # fmt: skip
    post = TensorDictModule(
        RSSMPosterior(hidden_dim=H, state_dim=S, rnn_hidden_dim=D, obs_embed_dim=E),
        following("belief", "encoded_latents"),
        following("posterior_mean", "posterior_std", "state"),
    )  # fmt: skip

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        data = {"state": normal(B, T, S), "belief": normal(B, T, D).tanh()}
        data |= {"action": normal(B, T, A).tanh(), ("next", "encoded_latents"): normal(B, T, E)}
        return (TensorDict(data, [B, T]),)

    return RSSMRollout(prior, post), inputs


# ---------------------------------------------------------------- today's


def stats(kind: Any, s: modern.Sizes, masked: bool, **options: Any) -> tuple[Any, Inputs]:
    def inputs(T: int, B: int) -> tuple[Any, ...]:
        state = {"logit": normal(B, s.latents, s.classes), "stoch": onehot(s, B)}
        state["deter"] = normal(B, s.deter).tanh()
        first = (resets(B, T),) if masked else ()
        return normal(B, T, s.embed), normal(B, T, s.action).tanh(), *first, state

    return kind(s, **options), inputs


def mlps() -> tuple[Any, Inputs]:
    s = V3

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        state = {"logits": normal(B, s.latents, s.classes), "stoch": onehot(s, B)}
        state["deter"] = normal(B, s.deter).tanh()
        return normal(B, T, s.embed), normal(B, T, s.action).tanh(), resets(B, T), state

    return modern.MlpsRSSM(s), inputs


def blocks() -> tuple[Any, Inputs]:
    s = modern.Sizes(6, 2048, 32, 16, 4096, 256, 8)  # its size12M

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        state = onehot(s, B), normal(B, s.deter).tanh()
        return normal(B, T, s.embed), normal(B, T, s.action), state, resets(B, T) > 0

    return modern.BlocksRSSM(s), inputs


def natural() -> tuple[Any, Inputs]:
    s = modern.Sizes(3, 512, 16, 16, 1024, 200)
    given = lambda T, B: (normal(B, T + 1, s.embed), normal(B, T + 1, s.action).tanh())  # noqa: E731
    return modern.Natural(s), given


def sheeprl_later(third: bool) -> tuple[Any, Inputs]:
    s = V3 if third else modern.Sizes(6, 600, 32, 32, 1536, 400)
    try:
        from sheeprl.algos.dreamer_v2 import agent as v2
        from sheeprl.algos.dreamer_v3 import agent as v3
        from sheeprl.models.models import MLP, LayerNorm
    except ImportError:
        model: Any = (modern.SheepV3 if third else modern.SheepV2)(s)
    else:
        agent = v3 if third else v2
        recurrent = agent.RecurrentModel(s.stoch + s.action, s.deter, s.hidden)
        kind: dict[str, Any] = {"activation": nn.SiLU if third else nn.ELU}
        if third:
            kind |= {"layer_args": {"bias": False}, "norm_layer": [LayerNorm]}
            kind |= {"norm_args": [{"normalized_shape": s.hidden, "eps": 1e-3}]}
        widths = s.deter + s.embed, s.deter
        nets = (MLP(n, s.stoch, [s.hidden], **kind) for n in widths)
        model = agent.RSSM(recurrent, *nets, {"validate_args": False}, discrete=s.classes)

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        sequences = normal(T, B, s.action).tanh(), normal(T, B, s.embed), resets(T, B, 1)
        return onehot(s, 1, B), normal(1, B, s.deter).tanh(), *sequences

    return model, inputs


def torchrl_v3(recurrent: str) -> tuple[Any, Inputs]:
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules.models.model_based import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3

    s, rms = V3._replace(embed=1024), recurrent == "block_gru"
    sizes = {"num_categoricals": s.latents, "num_classes": s.classes, "rnn_hidden_dim": s.deter}
    sizes |= {"hidden_dim": s.hidden}
    prior = RSSMPriorV3(action_shape=(s.action,), action_dim=s.action, recurrent_model=recurrent,
                        **sizes)  # fmt: skip
    post = RSSMPosteriorV3(obs_embed_dim=s.embed, use_rms_norm=rms, **sizes)
    # another name of the logits: its loop over TensorDicts, whose draws can be served
    names = following("belief", "encoded_latents"), following("logits", "state")
    model = RSSMRolloutV3(
        TensorDictModule(
            prior, ["state", "belief", "action"], following("prior_logits", "state", "belief")
        ),
        TensorDictModule(post, *names),
    )

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        data = {"state": onehot(s, B, T).flatten(-2), "belief": normal(B, T, s.deter).tanh()}
        data |= {"action": normal(B, T, s.action).tanh(), "is_init": resets(B, T, 1) > 0}
        return (TensorDict(data | {("next", "encoded_latents"): normal(B, T, s.embed)}, [B, T]),)

    return model, inputs


def torchrl_v3_loops(model: Any) -> dict[str, Callable[..., Any]]:
    """The other loops of torchrl's own over the modules of its ``RSSMRolloutV3``."""
    from tensordict.nn import TensorDictModule
    from torchrl.modules.models.model_based import RSSMRolloutV3

    named = {"rssm_prior": following("prior_logits", "state", "belief")}
    named["rssm_posterior"] = following("posterior_logits", "state")
    parts = (getattr(model, name) for name in named)
    wired = [
        TensorDictModule(part.module, part.in_keys, keys)
        for part, keys in zip(parts, named.values(), strict=True)
    ]
    torch.compiler.reset()  # one limit of recompilations for every model
    torch._dynamo.config.recompile_limit = 64  # and behind it no eager step: see compiled.py
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    loops = {name: RSSMRolloutV3(*wired) for name in ("tensors", "step compiled", "scan compiled")}
    loops["step compiled"].compile_rollout("step")
    loops["scan compiled"].compile_rollout("scan", options={"fallback_random": True})
    return loops


def scripted() -> tuple[Any, Inputs]:
    return transition(first.ScriptedTransition())


PEERS: dict[str, Callable[[], tuple[Any, Inputs]]] = {
    "bstars/Dreamer-Walker": grusa,
    "yusukeurakami/dreamer-pytorch": scripted,
    "juliusfrost/dreamer-pytorch": representation,
    "Kaixhin/PlaNet": scripted,
    "zhaoyi11/dreamer-pytorch": lambda: transition(first.TransitionModel(lag=True)),
    "adityabingi/Dreamer": nonterms,
    "jsikyoon/dreamer-torch": functools.partial(stats, modern.OldStatsRSSM, V3, False),
    "NM512/dreamerv3-torch": functools.partial(stats, modern.StatsRSSM, V3, True),
    "NM512/r2dreamer": blocks,
    "burchim/DreamerV3-PyTorch": mlps,
    "InexperiencedMe/NaturalDreamer": natural,
    "kc-ml2/SimpleDreamer": simple,
    "sheeprl V1": sheeprl_v1,
    "sheeprl V2": functools.partial(sheeprl_later, False),
    "sheeprl V3": functools.partial(sheeprl_later, True),
    "torchrl V1": torchrl_v1,
    "torchrl V3, gru": functools.partial(torchrl_v3, "gru"),
    "torchrl V3, block_gru": functools.partial(torchrl_v3, "block_gru"),
}
LOOPS = {f"torchrl V3, {kind}": torchrl_v3_loops for kind in ("gru", "block_gru")}
"""Of a peer's model: the faster loops of its own."""


# ---------------------------------------------------------------- the two loops


def fresh(part: Any) -> Any:
    """Arguments that a loop may change."""
    if isinstance(part, Tensor) or hasattr(part, "batch_size"):
        return part.clone()
    if isinstance(part, dict):
        return {key: fresh(value) for key, value in part.items()}
    if isinstance(part, tuple):
        parts = map(fresh, part)
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return part


def outputs(result: Any) -> Iterator[Tensor]:
    """What a loop returns and gradients flow from."""
    if isinstance(result, Tensor):
        if result.requires_grad:
            yield result
    elif isinstance(result, torch.distributions.Distribution):
        yield from (result.mean, result.stddev)
    elif hasattr(result, "batch_size"):
        for key in sorted(result.keys(True, True), key=str):
            yield from outputs(result[key])
    else:
        for part in [result[k] for k in sorted(result)] if isinstance(result, dict) else result:
            yield from outputs(part)


def gradients(result: Any, parameters: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the parameters' gradients for a fixed weighting of them."""
    found = list(outputs(result))
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in found)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = (
        torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)
    )
    return [x.detach() for x in found], list(zeros)


def differences(loop: Any, given: tuple[Any, ...], noise: Tensor) -> tuple[float, float]:
    """The largest of values and gradients between the two loops, with the same noise."""
    parameters = [p for p in loop.parameters() if p.requires_grad]
    sides = (
        gradients(loop.rollout.serve(lambda run=run: run(*fresh(given)), noise), parameters)
        for run in (loop, loop.own)
    )
    (got, of_got), (want, of_want) = sides
    assert len(got) == len(want), "another number of outputs"
    pairs = [zip(got, want, strict=True), zip(of_got, of_want, strict=True)]
    return tuple(max(relative_difference(a, b) for a, b in side) for side in pairs)  # type: ignore[return-value]


def agreeing(loops: dict[str, Callable[..., Any]], given: tuple[Any, ...]) -> dict[str, Any]:
    """The loops over TensorDicts, once they have given what the first gives."""

    def values(loop: Callable[..., Any]) -> dict[Any, Tensor]:
        torch.manual_seed(0)  # all draw alike
        result = loop(*fresh(given))
        return {key: result[key].detach().float() for key in result.keys(True, True)}

    want = values(next(iter(loops.values())))
    for name, loop in loops.items():
        got = values(loop)
        assert got.keys() == want.keys(), f"{name}: other keys"
        off = max(relative_difference(got[key], want[key]) for key in want)
        assert off <= TOLERANCE[0], f"{name}: values differ by {off:.1e}"
    return loops


def race(
    sides: dict[str, Callable[..., Any]],
    parameters: list[nn.Parameter],
    given: tuple[Any, ...],
    bf16: bool,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of every side, forward and backward, by turns."""

    def run(side: Callable[..., Any]) -> float:
        arguments = fresh(given)
        with torch.no_grad():
            for p in parameters:
                p.mul_(1)  # as after an optimiser's step: weights are packed again
                p.grad = None
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            result = side(*arguments)
        sum(x.float().sum() for x in outputs(result)).backward()
        return time.perf_counter() - begin

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            taken = run(side)
            if turn:  # the first warms up
                seconds[name].append(taken)
    return {name: summary(values) for name, values in seconds.items()}


def package_of(model: Any) -> str | None:
    """The package, with its version, that the model's class is from; None: a minimal model."""
    name = type(model).__module__.partition(".")[0]
    return f"{name} {version(name)}" if name in ("sheeprl", "torchrl") else None


def measure(
    names: list[str],
    threads: int,
    steps: int,
    rows: int,
    repeats: int,
    *,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Compare and time the peers by name; with no repeats compare alone.

    Raises:
        AssertionError: the two loops differ. MissingVariant: the fast one is timed and would not
            run natively.
    """
    torch.set_num_threads(threads)
    # Some of the repositories switch these checks off; probabilities in bfloat16 don't pass them.
    torch.distributions.Distribution.set_default_validate_args(False)
    for name, size in V1.items():
        setattr(first, name, size)
    result: dict[str, Any] = {"machine": machine.record(), "sizes": [steps, rows], "peers": {}}
    for name in names:
        torch.manual_seed(0)
        try:
            model, inputs = PEERS[name]()
        except ImportError as error:
            result["peers"][name] = {"missing": str(error)}
            continue
        loop = adapt(model)
        few = inputs(8, 4)
        values, grads = differences(loop, few, loop.rollout._state_noise(None, (8, 4), None))
        assert values <= TOLERANCE[0], f"{name}: values differ by {values:.1e}"
        assert grads <= TOLERANCE[1], f"{name}: gradients differ by {grads:.1e}"
        found = {"values": values, "gradients": grads, "backend": last_backend("observe")}
        found["package"] = package_of(model)
        if repeats and found["backend"] != "native" and not allow_missing:
            raise MissingVariant(
                f"{name}: the fast loop runs {found['backend']}; --allow-missing goes on with that"
            )
        sides = {"own": loop.own, "fast": loop}
        if repeats and name in LOOPS:
            sides |= agreeing(LOOPS[name](model), few)
        parameters = [p for p in loop.parameters() if p.requires_grad]
        for precision, bf16 in (("fp32", False), ("bf16", True)) if repeats else ():
            found[precision] = race(sides, parameters, inputs(steps, rows), bf16, repeats)
        result["peers"][name] = found
        print(name, found, file=sys.stderr, flush=True)
    return result


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table, without the times where none were taken."""
    timed = [p for p in ("fp32", "bf16") if any(p in found for found in result["peers"].values())]
    lines = []
    for name, found in result["peers"].items():
        if "missing" in found:
            lines.append([name, "not installed", *["–"] * (2 + 3 * len(timed))])
            continue
        package = found.get("package")  # older results lack it
        line = [f"{name} ({package})" if package else name, found["backend"]]
        line += [f"{found['values']:.0e}", f"{found['gradients']:.0e}"]
        for precision in timed:
            own, fast = (found[precision][side] for side in ("own", "fast"))
            line += [cell(own), cell(fast), f"{own['median_ms'] / fast['median_ms']:.2f}×"]
        lines.append(line)
    steps, rows = result["sizes"]
    what = f"observe, T {steps}, B {rows}, forward and backward, ms" if timed else "observe"
    heads = [what, "runs", "values", "gradients"]
    heads += [f"{side} {p}" for p in timed for side in ("own", "fast", "ratio")]
    parts = [report.table(heads, lines), *loops_tables(result, timed)]
    if timed:
        turns = {
            side["repeats"]
            for found in result["peers"].values()
            for precision in timed
            for side in found.get(precision, {}).values()
        }
        parts.insert(0, f"Of each {', '.join(map(str, sorted(turns)))} turns.")
    return "\n\n".join(parts)


def loops_tables(result: dict[str, Any], timed: list[str]) -> Iterator[str]:
    """The fast rollout against the faster loops of the peers' own, where they were timed."""
    lines = []
    for name, found in result["peers"].items():
        for loop in [x for x in found.get("fp32", {}) if x not in ("own", "fast")]:
            line = [name, loop]
            for precision in timed:
                own, fast = (found[precision][side] for side in (loop, "fast"))
                line += [cell(own), f"{own['median_ms'] / fast['median_ms']:.2f}×"]
            lines.append(line)
    if lines:
        heads = [f"{head} {p}" for p in timed for head in ("its", "against fast")]
        yield report.table(["peer", "its other loops, ms", *heads], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of peers; all by default", metavar="PEER")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="0: compare alone")
    parser.add_argument("--allow-missing", action="store_true", help="go on without what can't run")
    parser.add_argument("--write", action="store_true", help="keep the result: JSON and README")
    args = parser.parse_args()
    if unknown := set(args.names) - PEERS.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; of {', '.join(PEERS)}")
    if args.write and (args.names or not args.repeats):
        parser.error("--write keeps everything or nothing")
    sizes = args.threads, args.steps, args.rows, args.repeats
    result = measure(args.names or list(PEERS), *sizes, allow_missing=args.allow_missing)
    report.publish("peers", result, write=args.write)


if __name__ == "__main__":
    main()
