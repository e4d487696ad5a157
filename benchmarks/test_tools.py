"""The tools that measure: run as `pytest benchmarks/test_tools.py`; no time is judged."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import choice, compiled, flops, rendering, report, run, scale_model, subpixel
from benchmarks.race import Case, race
from benchmarks.timing import PhaseRecorder, cell, rate_cell, summary
from benchmarks.variants import VARIANTS, MissingVariant, check_complete
from fastdreamer import testing
from fastdreamer.ops.backend import OPS
from fastdreamer.ops.codec import decode, decode_error, encode
from fastdreamer.ops.lambda_return import OP
from fastdreamer.ops.params import Categorical


def test_time_of_nested_ranges_is_counted_once(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    recorder = PhaseRecorder()
    with (
        recorder.repeat(containers=["update"]),  # 0 … 28
        recorder.annotate("update"),  # 1 … 21
        recorder.annotate("backward"),  # 3 … 15
        recorder.annotate("optimizer"),  # 6 … 10
    ):
        pass
    assert recorder.samples == {
        "backward": [(6 - 3) + (15 - 10)],
        "optimizer": [10 - 6],
        "whole": [28],
        "other": [28 - 8 - 4],
    }


def test_a_range_that_raises_is_closed():
    recorder = PhaseRecorder()
    with recorder.repeat():
        with pytest.raises(KeyError), recorder.annotate("fails"):
            raise KeyError
        with recorder.annotate("next"):
            pass
    assert recorder.samples.keys() == {"fails", "next", "other", "whole"}
    assert sum(v[0] for k, v in recorder.samples.items() if k != "whole") == pytest.approx(
        recorder.samples["whole"][0]
    )


def test_summary_and_cell():
    times = summary([0.001 * n for n in range(1, 102)])
    assert times == pytest.approx(
        {"median_ms": 51.0, "p20_ms": 21.0, "p80_ms": 81.0, "repeats": 101}
    )
    assert cell(times) == "51.0 (21.0–81.0)"
    assert cell(None) == "–"


def test_fill_replaces_one_place_only():
    document = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nold\n<!-- end -->\n"
    filled = report.fill(document, "x", r"new \1")
    assert filled == document.replace("old", r"new \1", 1)
    with pytest.raises(ValueError, match="<!-- z -->"):
        report.fill(document, "z", "new")


@pytest.mark.parametrize("name", report.MEASUREMENTS)
def test_readmes_hold_the_results(name):
    results = report.stored(name)
    if not results:
        readmes = [report.README]
        if hasattr(importlib.import_module(f"benchmarks.{name}"), "headline"):
            readmes.append(report.TOP_README)
        for readme in readmes:
            assert f"<!-- {name} -->\nNot measured yet.\n<!-- end -->" in readme.read_text()
        return
    if hasattr(importlib.import_module(f"benchmarks.{name}"), "plot"):
        for path in results:
            assert 0 < path.with_suffix(".png").stat().st_size < 300_000
    for readme, expected in report.filled(name, results).items():
        assert readme.read_text() == expected, "run `python -m benchmarks.report`"


def test_the_page_of_rendering_holds_the_results():
    result = json.loads((report.RESULTS / "rendering.json").read_text())
    page = rendering.PAGE.read_text()
    assert report.fill(page, "rendering", report.text("rendering", result)) == page
    assert 0 < rendering.FIGURE.stat().st_size < 100_000


def test_a_result_of_every_cpu_is_kept_and_shown(monkeypatch, tmp_path):
    first = next(iter(report.stored("ops").values()))
    machine = first["machine"] | {"cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz"}
    second = first | {"machine": machine | {"cpu_family_model": "6/207"}}
    readmes = [tmp_path / "benchmarks" / "README.md", tmp_path / "README.md"]
    results = readmes[0].with_name("results")
    monkeypatch.setattr(report, "RESULTS", results)
    for attribute, path in zip(("README", "TOP_README"), readmes, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text("a\n<!-- ops -->\nNot measured yet.\n<!-- end -->\nb\n")
        monkeypatch.setattr(report, attribute, path)
    names = ["amd-epyc-25-17", "intel-xeon-6-207"]
    for made, result in enumerate((first, second, first), 1):
        report.publish("ops", result, write=True)
        kept = names[: min(made, 2)]
        for suffix in ("json", "png"):
            assert sorted(p.stem for p in (results / "ops").glob(f"*.{suffix}")) == kept
    measured = "measured: AMD EPYC (family/model 25/17), Intel(R) Xeon(R) Processor @ 2.60GHz (f"
    for path in readmes:
        text = path.read_text()
        assert measured in text and text.count("Measured on: ") == 2
        assert [f"ops/{name}.png" in text for name in names] == [True, True]
        assert text.startswith("a\n") and text.endswith("b\n")


# ---------------------------------------------------------------- floating point operations


SMALL = testing.Sizes(3, 10, 4, 7, 9, 11, 2, 3, 2, "elu")


def counted(case):
    """Operations of the eager work, as torch counts them."""
    inputs, groups = case._prepared(torch.float32)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(bool(groups)):
        out = case.call(**inputs, backend="eager")
        if groups:
            case._backward(VARIANTS["eager fp32"], out)
    return counter.get_total_flops()


def small(monkeypatch, bench):
    """The bench's module with cases of small sizes."""
    monkeypatch.setattr(testing, "REPORT", SMALL)
    module = importlib.import_module(f"benchmarks.bench_{bench}")
    values = {"T": 5, "H": 4, "B": 3, "N": 6, "I": 2, "K": 2}
    for name, value in values.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    return module


def small_imagine(monkeypatch):
    """The cases of ``bench_imagine`` in small sizes."""
    bench = small(monkeypatch, "imagine")
    make = functools.partial(bench.inputs, bench.H, bench.B, SMALL)
    return bench.cases(make(heads=True), make)


def test_flops_of_the_dynamics(monkeypatch):
    rssm, open_loop = small(monkeypatch, "rssm_step"), small(monkeypatch, "open_loop")
    step = rssm._case("", 3)
    assert counted(step) == step.flops
    loop = open_loop._case()
    assert counted(loop) == loop.flops == 4 * step.flops
    for case in (rssm._case("", 3, backward=True), open_loop._case(backward=True)):
        assert counted(case) == case.flops


def test_flops_of_observe(monkeypatch):
    bench = small(monkeypatch, "observe")
    for backward in (False, True):
        case = bench._case("", backward=backward)
        assert counted(case) == case.flops


def test_flops_of_imagine(monkeypatch):
    *single, both = small_imagine(monkeypatch)
    for case in single:
        assert counted(case) == case.flops, case.name
    # The eager critic runs again where a pass can share its values and input gradients.
    weights = case.inputs()["returns"].critic.weights
    again = 2 * sum(w.numel() for w in weights) - weights[0].numel()
    assert counted(both) == both.flops + 2 * (4 - 1) * 3 * again


def test_bins_of_heads_are_no_parameters(monkeypatch):
    bench = small(monkeypatch, "categorical")
    monkeypatch.setattr(bench, "SIZES", SMALL._replace(S=8))
    monkeypatch.setattr(bench, "LATENT", Categorical(4, 0.01))
    monkeypatch.setattr(bench, "ROWS", 3)
    monkeypatch.setattr(bench, "_imagined", bench._imagined.__wrapped__)
    for case in bench._with_two_hot():
        inputs, _ = case._prepared(torch.float32)
        returns = inputs["returns"]
        assert not returns.reward_as.bins.requires_grad
        assert returns.reward.weights[0].requires_grad == (case.leaves is None)
        assert case.call(**inputs, backend="native").returns.shape == (4, 3)


def test_flops_of_cem(monkeypatch):
    case = small(monkeypatch, "cem")._case()
    assert counted(case) == case.flops


CODEC = testing.CodecSizes(3, (2, 3, 4, 5), 6, 7, 8, True, (5, 4, 3))


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_the_codec(backward):
    inputs = testing.codec_inputs(CODEC, 2)
    encoder, decoder = inputs["encode"]["params"], inputs["decode"]["params"]
    leaves = [inputs["decode"]["feat"]]
    leaves += [t for t in pytree.tree_leaves((encoder, decoder)) if isinstance(t, torch.Tensor)]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    with FlopCounterMode(display=False) as counter:
        out = encode(**inputs["encode"], backend="eager").sum()
        out = out + decode(**inputs["decode"], backend="eager").sum()
        if backward:
            out.backward()
    assert counter.get_total_flops() == flops.codec(encoder, decoder, 2, backward=backward)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_fastest_decoder_of_pytorch_does_the_same_work(bf16):
    inputs = testing.codec_inputs(CODEC, 3, smooth=True)["decode_error"]

    def subpixels(*, backend, **arguments):
        return subpixel.decode_error(**arguments)

    subpixels.__name__ = "decode_error"
    options = {"backend": "eager", "dtype": torch.float32, "autocast": bf16}
    decode_error(**inputs, backend="eager")  # so that the op's last body is eager's
    eager = testing.evaluate(decode_error, inputs, **options)
    got = testing.evaluate(subpixels, inputs, **options)
    truth = testing.evaluate(decode_error, inputs, backend="eager", dtype=torch.float64)
    testing.assert_accurate("decode_error", got, eager, truth, bf16=bf16)
    inputs = {name: x for name, x in inputs.items() if name != "target"}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        images = [body(**inputs) for body in (subpixel.decode, OPS["decode"].eager)]
    torch.testing.assert_close(*images, rtol=0, atol=0.05 if bf16 else 1e-5)


# ------------------------------------------------------------------------------------ races


def test_a_race_is_interleaved_and_prepares_outside_the_clock():
    log = []

    def runner(name):
        def run():
            log.append(name)

        run.before = lambda: (log.append(f"before {name}"), time.sleep(0.01))
        return run

    times = race({"a": runner("a"), "b": runner("b")}, rounds=20, warmup=1, calls=2)
    assert log == ["before b", "b", "before a", "a"] * 21
    assert times.keys() == {"a", "b"}
    assert all(t["repeats"] == 20 and t["p80_ms"] < 5 for t in times.values())
    with pytest.raises(ValueError, match="at least 20"):
        race({"a": runner("a")}, rounds=19)


def wrong_case():
    """A case whose native and compiled bodies are off by a thousandth."""

    def call(*args, backend, **kwargs):
        return OP.eager(*args, **kwargs) * (1.001 if backend == "native" else 1)

    other = lambda *args, **kwargs: OP.eager(*args, **kwargs) * 1.001  # noqa: E731
    inputs = functools.partial(testing.lambda_return_inputs, 3, 2)
    return Case("case", OP, inputs, 0, call, other)


def test_a_wrong_baseline_is_left_out_and_a_wrong_native_body_fails(monkeypatch):
    names = ("native fp32", "eager fp32", "compiled fp32")
    variants = {name: VARIANTS[name] for name in names}
    monkeypatch.setattr(OP, "why_not", lambda *_: "not built")
    entries = wrong_case().entries(variants)
    assert list(entries.run) == ["eager fp32"]
    assert entries.left_out["native fp32"] == "not built"
    assert "error of out0" in entries.left_out["compiled fp32"]
    monkeypatch.setattr(OP, "why_not", lambda *_: None)
    with pytest.raises(AssertionError, match="error of out0"):
        wrong_case().entries(variants)


def not_built(monkeypatch):
    for op in OPS.values():
        monkeypatch.setattr(op, "why_not", lambda backend, _: "not built" * (backend == "native"))


def test_what_should_run_and_does_not_is_a_failure(monkeypatch):
    """Not what runs and does something else: baselines are left out for that."""
    from benchmarks import collection, curves, learner, ops, options, pool

    not_built(monkeypatch)
    case = dataclasses.replace(wrong_case(), flops=0)
    message = "native fp32: not built; .*native bf16: not built; --allow-missing"
    threads = torch.get_num_threads()
    try:
        with pytest.raises(MissingVariant, match=message):
            ops.measure(1, [case], update=None, rounds=20)
        with pytest.raises(MissingVariant, match=message):
            curves.measure(1, {"B": [1]}, rounds=20, sizes=SMALL)
    finally:
        torch.set_num_threads(threads)
    for measure in (options.measure, pool.measure, functools.partial(collection.measure, 20)):
        with pytest.raises(MissingVariant, match=r"auto takes eager \(not built\)"):
            measure(0)
    with pytest.raises(MissingVariant, match=message):
        learner.variants()
    assert learner.variants(allow_missing=True) == ["eager fp32", "eager bf16"]
    variants = {name: VARIANTS[name] for name in ("eager fp32", "compiled fp32")}
    entries = wrong_case().entries(variants)
    check_complete(entries, False)
    assert entries.left_out.keys() == {"compiled fp32"}


@pytest.mark.parametrize(("options", "code"), [((), 1), (("--allow-missing",), 0)])
def test_a_bench_without_native_fails(options, code):
    """As `pytest benchmarks/ --benchmark-only` runs it, where the extension cannot be imported."""
    hide = "import sys; sys.modules['fastdreamer._native'] = None; import pytest; "
    run_it = f"{hide}sys.exit(pytest.main(sys.argv[1:]))"
    bench = "benchmarks/bench_lambda_return.py"
    done = subprocess.run(
        [sys.executable, "-c", run_it, bench, "-q", "-x", "-p", "no:cacheprovider",
         "--benchmark-disable", *options],
        cwd=run.ROOT, capture_output=True, text=True,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},  # nothing is compiled
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert ("MissingVariant: native" in done.stdout) == bool(code)


def test_a_baseline_that_is_compiled_too_often_does_not_run_eager(monkeypatch):
    """It would be told as the compiled one."""
    config = torch._dynamo.config
    assert config.fail_on_recompile_limit_hit
    monkeypatch.setattr(config, "recompile_limit", 1)
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda body, *, dynamic, mode: compiler(body))
    body = compiled.compiled(lambda x: x.sin())
    sequence = torch.zeros(3, 2)
    for t in range(3):  # another place in memory is nothing else
        body(sequence[t])
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        body(sequence)


def test_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with VARIANTS["eager medium"].context():
        assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(KeyError), VARIANTS["eager medium"].context():
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_ops_are_measured_and_drawn(monkeypatch, tmp_path):
    from benchmarks import ops

    case = dataclasses.replace(
        small(monkeypatch, "rssm_step")._case("rssm_step", 2),
        compiled=lambda *args, **kwargs: OPS["rssm_step"].eager(*args, **kwargs),
    )
    threads = torch.get_num_threads()
    try:
        result = ops.measure(1, [case], update=None, rounds=20, allow_missing=True)
    finally:
        torch.set_num_threads(threads)
    work = result["works"]["rssm_step"]
    assert work["times"].keys() | work["left_out"].keys() == VARIANTS.keys()
    assert set(ops.BASELINES) <= work["times"].keys()
    for t in work["times"].values():
        assert t["gflop_per_s"] == pytest.approx(case.flops / t["median_ms"] / 1e6)
    result = json.loads(json.dumps(result))
    for text in (ops.table(result), ops.headline(result)):
        assert "| rssm_step |" in text
    ops.plot(result, tmp_path / "ops.png")
    assert 0 < (tmp_path / "ops.png").stat().st_size < 300_000


def times(**medians):
    return {name.replace("_", " "): {"median_ms": ms} for name, ms in medians.items()}


def test_what_auto_takes_is_judged_by_every_race():
    lost, won = times(auto=1.2, eager_bf16=1.0), times(auto=1.0, eager_bf16=1.0)
    other = times(auto=1.2, eager_bf16=1.2, eager_fp32=1.0)
    assert choice.slower(times(auto=1.04, eager_bf16=1.0, compiled_bf16=2.0)) == {}, "noise"
    assert choice.slower(lost) == {"eager bf16": pytest.approx(1.2)}

    def judged(*races):
        left = list(races)
        got, slower = choice.judge(lambda: left.pop(0))
        return len(races) - len(left), slower, got

    assert judged(won, lost) == (1, {}, won)
    assert judged(lost, won, lost) == (2, {}, won)
    assert judged(lost, other, lost) == (2, {}, other), "another baseline each time is noise"
    assert judged(lost, lost, lost) == (3, {"eager bf16": pytest.approx(1.2)}, lost)


@pytest.mark.parametrize("body", ["native", "eager"])
def test_the_choice_is_measured_and_complained_of(monkeypatch, body):
    case = dataclasses.replace(
        small(monkeypatch, "rssm_step")._case("rssm_step", 2),
        compiled=lambda *args, **kwargs: OPS["rssm_step"].eager(*args, **kwargs),
    )
    monkeypatch.setattr(choice, "why_slow", lambda: "asked to" if body == "eager" else None)
    threads = torch.get_num_threads()
    try:
        result = choice.measure(1, [case], rounds=20)
        fine = json.loads(json.dumps(result))
        monkeypatch.setattr(choice, "MARGIN", 0.0)  # then everything is faster
        lost = choice.measure(1, [case], rounds=20)
    finally:
        torch.set_num_threads(threads)
    work = fine["works"]["rssm_step"]
    assert work["times"].keys() == {choice.AUTO, *choice.BASELINES} and not work["left_out"]
    assert work["taken"][0] == body
    assert f"| rssm_step | {body} " in choice.table(fine)
    sentences = list(choice.complaints(lost))
    assert len(sentences) == (3 if body == "native" else 0), "eager is not ours to be faster"
    assert all(" times as long as " in sentence for sentence in sentences)
    work["left_out"]["compiled bf16"] = "no compiler"
    assert "rssm_step: compiled bf16 was not measured: no compiler" in choice.complaints(fine)


def test_every_op_is_among_the_choices():
    pytest.importorskip("fastdreamer._native")
    found = {case.op.name for case in choice.cases()}
    assert found == OPS.keys()


def test_curves_are_measured_and_drawn(tmp_path):
    from benchmarks import curves

    axes = {"B": [1, 2], "H": [2], "threads": [1], "D": [8, 16]}
    threads = torch.get_num_threads()
    try:
        result = curves.measure(1, axes, rounds=20, sizes=SMALL, allow_missing=True)
    finally:
        torch.set_num_threads(threads)
    result = json.loads(json.dumps(result))
    assert [len(r["times"]["eager bf16"]) for r in result["axes"].values()] == [2, 1, 1, 2]
    assert "| D = 16 |" in curves.table(result)
    curves.plot(result, tmp_path / "curves.png")
    assert 0 < (tmp_path / "curves.png").stat().st_size < 300_000


def test_rules_of_acting_without_chance_are_compared_by_episode(tmp_path):
    from benchmarks import greedy
    from fastdreamer.acting.play import config_env, episode_seed, evaluate
    from fastdreamer.config import preset, to_dict
    from fastdreamer.learning.dreamer import Dreamer
    from fastdreamer.training.checkpoint import save_checkpoint

    config = preset("tiny", {"env": {"time_limit": 0.2}})
    agent, path = Dreamer(config, {"state": (24,)}, 6), tmp_path / "snapshot.safetensors"
    about = {"config": to_dict(config), "obs_shapes": agent.obs_shapes, "action_dim": 6}
    weights = {f"agent/{name}": value for name, value in agent.state_dict().items()}
    save_checkpoint(path, weights, {**about, "cursor": {"update": 0, "env_frames": 0}})
    found = greedy.measure(path, 2)
    assert list(found) == ["median", "mode"] and (found["median"] != found["mode"]).any()
    env = config_env(config)  # of the preset's own rule, the median, one episode alone
    alone = [evaluate(agent.eval(), env, episode_seed(0, "evaluate", i)) for i in range(2)]
    assert found["median"].tolist() == pytest.approx(alone, rel=1e-3)
    assert "| mode − median |" in greedy.table({"snapshot": found})


# ------------------------------------------------------------------------------------ peers


def test_peers_are_timed_with_weights_that_have_changed(monkeypatch):
    """As in training: the fast loop packs them in every turn."""
    packs = pytest.importorskip("fastdreamer.ops.native.packs")
    from benchmarks import peers

    for name in peers.V1:
        monkeypatch.setattr(peers.first, name, None, raising=False)  # put back behind the test
    monkeypatch.setattr(peers, "V1", {"A": 3, "D": 5, "S": 4, "E": 6, "H": 7})
    monkeypatch.setattr(torch.distributions.Distribution, "set_default_validate_args", bool)
    packed, race_of_peers = [], peers.race

    def counting(*arguments):
        before = packs.counts()["packed"]
        result = race_of_peers(*arguments)
        packed.append(packs.counts()["packed"] - before)
        return result

    monkeypatch.setattr(peers, "race", counting)
    threads, arguments = torch.get_num_threads(), (["kc-ml2/SimpleDreamer"], 1, 4, 2, 3)
    try:
        result = peers.measure(*arguments)
        monkeypatch.setattr(peers, "last_backend", lambda op: "eager")
        with pytest.raises(MissingVariant, match="the fast loop runs eager; --allow-missing"):
            peers.measure(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert len(packed) == 2 and min(packed) >= 4, "three turns and the first"
    text = peers.table(json.loads(json.dumps(result)))
    assert text.startswith("Of each 3 turns.") and "| kc-ml2/SimpleDreamer | native | " in text


# ------------------------------------------------------------------------------------- runs


def cycle(seconds=2.0, waited=0.5, env_frames=40, updates=4, ran="native", **losses):
    return {
        "seconds": seconds,
        "waited": waited,
        "env_frames": env_frames,
        "updates": updates,
        "losses": {"model_loss": 1.0, "actor_loss": -2.0} | losses,
        "ran": {"observe": ran, "imagine": ran},
    }


def test_rates_of_cycles():
    rates = run.rates([cycle(seconds, waited=seconds / 4) for seconds in (1.0, 2.0, 5.0)])
    assert rates["env_frames_per_s"] == 3 * 40 / 8 and rates["updates_per_s"] == 3 * 4 / 8
    assert rates["waiting"] == 0.25 and rates["frames_per_cycle"] == 40
    assert rates["cycle"]["median_ms"] == 2000 and rates["cycle"]["repeats"] == 3
    assert rate_cell(rates["cycle"], 40) == "20.0 (10.5–28.6)"
    runs = {"native": rates, "old": run.rates([cycle(4.0, waited=1.0)])}
    commits = {"native": "abc", "old": "def"}
    text = run.table(
        {"machine": {"commit": "abc"}, "options": ["walker"], "commits": commits, "runs": runs}
    )
    assert "| native | 20.0 (10.5–28.6) | 1.00× | 1.50 | 25% |" in text
    assert "| old (def) | 10.0 (10.0–10.0) | 2.00× | 1.00 | 25% |" in text


def test_runs_take_turns(monkeypatch):
    log = []
    monkeypatch.setattr(time, "sleep", lambda seconds: log.append(seconds))
    turns = {name: lambda name=name: log.append(name) or len(log) for name in ("a", "b")}
    cycles = run.take_turns(turns, rounds=2, warmup=1)
    assert log == [run.PAUSE, "a", run.PAUSE, "b"] * 3
    assert cycles == {"a": [6, 10], "b": [8, 12]}
    with pytest.raises(ValueError, match="at least 1 round"):
        run.measure({}, [], rounds=0)


def test_runs_of_different_work_are_refused(tmp_path):
    here, there = run.Variant(run.ROOT, "native"), run.Variant(tmp_path, "auto")
    variants = {"native": here, "other": here, "old": there}
    same = {"native": cycle(), "other": cycle(actor_loss=-2.01), "old": cycle(model_loss=9.0)}
    run.check(same, variants)
    run.check(same | {"other": cycle(updates=8, env_frames=80)}, variants)  # rounds of two
    for name, wrong, message in [
        ("old", cycle(updates=5), "old makes 5 updates in 40 env frames, native 4"),
        ("other", cycle(actor_loss=-2.2), "other: actor_loss is -2.2, with native -2"),
        ("other", cycle(ran="eager"), "other: .*'imagine': 'eager'"),
    ]:
        with pytest.raises(AssertionError, match=message):
            run.check(same | {name: wrong}, variants)


def test_options_of_a_run(tmp_path, capsys):
    args, variants, options = run.parse(["--against", str(run.ROOT), "--threads", "1"])
    own = f"native of {run.ROOT.name}"
    assert list(variants) == ["native", "eager", own] and variants[own].backend == "native"
    assert options[0] == "walker" and options[-2:] == ["--threads", "1"] and args.rounds == 5
    pool = "--collect.envs 2 --ray local"
    _, variants, _ = run.parse(["--backends", "auto", "--beside", pool])
    own = ("--collect.envs", "2", "--ray", "local")
    assert variants[pool] == run.Variant(run.ROOT, "auto", own)
    with pytest.raises(SystemExit):
        run.parse(["--against", str(tmp_path)])
    assert "no checkout of fastdreamer" in capsys.readouterr().err


def test_real_runs_take_turns():
    """Two processes that train with a worker each, in turn, and a third that can't."""
    options = run.settings("walker", 1.0, ["--preset", "tiny", "--obs", "state"])
    variants = {"eager": run.Variant(run.ROOT, "eager"), "auto": run.Variant(run.ROOT, "auto")}
    result = json.loads(json.dumps(run.measure(variants, options, rounds=2, warmup=0)))
    for rates in result["runs"].values():
        assert rates["cycle"]["repeats"] == 2 and rates["frames_per_cycle"] == 40
        assert rates["updates_per_s"] / rates["env_frames_per_s"] == pytest.approx(20 / 40)
        assert 0 <= rates["waiting"] < 1
    assert set(result["runs"]["eager"]["ran"].values()) == {"eager"}
    with (
        pytest.raises(run.RunFailed, match="invalid choice 'sound'"),
        run.running(variants, [*options, "--obs", "sound"]),
    ):
        pass


# ----------------------------------------------------------------------------------- phases


def test_phases_of_a_tiny_update_add_up():
    from benchmarks import phases

    threads = torch.get_num_threads()
    try:
        result = phases.measure(20, 1, 1, "tiny", allow_missing=True)
    finally:
        torch.set_num_threads(threads)
    for measured in result["phases"].values():
        assert measured.keys() == phases.ROWS.keys()
        assert all(times["repeats"] == 20 for times in measured.values())
        assert measured["other"]["median_ms"] < measured["whole"]["median_ms"] / 2
    assert "whole update" in phases.table(result)


def test_phases_of_a_wrong_update_are_not_timed(monkeypatch):
    from benchmarks import phases

    class Wrong(phases.Learner):
        def step(self):
            factor = 1.1 if self.variant.bf16 else 1.0
            return {name: factor * loss for name, loss in super().step().items()}

    monkeypatch.setattr(phases, "Learner", Wrong)
    monkeypatch.setattr(phases, "variants", lambda missing: ["eager fp32", "eager bf16"])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(AssertionError, match="^eager bf16: reward_loss is .*, expected "):
            phases.measure(20, 1, 1, "tiny")
    finally:
        torch.set_num_threads(threads)


def test_too_few_repeats_are_refused():
    from benchmarks import phases

    with pytest.raises(ValueError, match="at least 20"):
        phases.measure(19, 1, 1)


# ---------------------------------------------------------------------------- scale_model


def test_the_simulation_of_scale_is_bounded_by_the_slower_side():
    costs = scale_model.Costs(
        decision=0.01, serial=0.0, parallel=0.1, weights=10**6, gradients=10**6, episode=10**6
    )
    setting = {"ratio": 64.0, "bandwidth": 1e9, "latency": 0.0, "spread": 0.0}
    frames = scale_model.DECISIONS * scale_model.ACTION_REPEAT
    rate, works = scale_model.simulate(costs, 1, 1, **setting | {"ratio": 1e-6})
    assert rate == pytest.approx(frames / (scale_model.DECISIONS * 0.01 + 2e6 / 1e9))
    assert works < 1e-3
    # 64 · 500 / (16 · 16) updates of 0.1 s an episode, however many collectors there are
    learn = 64 * scale_model.DECISIONS / 256 * 0.1
    for collectors in (8, 64):
        rate, works = scale_model.simulate(costs, collectors, 1, **setting)
        assert rate == pytest.approx(frames / learn) and works == pytest.approx(1.0)
    four, _ = scale_model.simulate(costs, 8, 4, **setting)
    ring = 2 * 3 * 10**6 / 4 / 1e9
    assert four == pytest.approx(frames / (learn / 0.1 * (0.1 / 4 + ring)))
    # a round waits for its slowest episode
    spread, _ = scale_model.simulate(costs, 64, 1, **setting | {"ratio": 1e-6, "spread": 0.1})
    even, _ = scale_model.simulate(costs, 64, 1, **setting | {"ratio": 1e-6})
    assert 0.7 * even < spread < 0.9 * even
