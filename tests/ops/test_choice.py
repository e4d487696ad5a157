"""The choice of kernels: a rule on measured rates, the environment's word, another process's."""

import os
import sys

import forked
import pytest
import torch

import fastdreamer
from fastdreamer import testing
from fastdreamer.ops.backend import (
    BackendError,
    describe_kernels,
    faster_precision,
    kernel_choice,
    settle_kernels,
    use_backend,
)
from fastdreamer.ops.codec import encode
from fastdreamer.ops.rssm_step import rssm_step

_native = pytest.importorskip("fastdreamer._native")

# GFLOP/s of one thread in fp32 and bf16, least instruction set first. A bfloat16 instruction that
# takes half as long as fp32's, or twice; widening that is free, or not.
SCALAR, AVX2 = ("scalar", 8, 14), ("avx2", 102, 75)
MACHINES = {
    "Zen 4": [SCALAR, AVX2, ("avx512", 110, 113), ("avx512bf16", 110, 220)],
    "Intel without AMX": [SCALAR, AVX2, ("avx512", 165, 120), ("avx512bf16", 165, 85)],
    "Intel with AMX": [
        SCALAR,
        AVX2,
        ("avx512", 165, 120),
        ("avx512bf16", 165, 85),
        ("amx", 165, 2400),
    ],
    "AVX-512 alone": [SCALAR, AVX2, ("avx512", 165, 163)],
    "AVX2 alone": [SCALAR, AVX2],
    "scalar": [SCALAR],
    "narrow AVX-512": [SCALAR, ("avx2", 102, 75), ("avx512", 90, 70)],
    "an even race": [SCALAR, ("avx2", 102, 75), ("avx512", 94, 87)],
}
CHOSEN = {  # fp32, bf16, for_bf16, faster
    "Zen 4": ("avx512bf16", "avx512bf16", "bf16", "bf16"),
    "Intel without AMX": ("avx512bf16", "avx512", "fp32", "fp32"),
    "Intel with AMX": ("amx", "amx", "bf16", "bf16"),
    "AVX-512 alone": ("avx512", "avx512", "bf16", "fp32"),
    "AVX2 alone": ("avx2", "avx2", "fp32", "fp32"),
    "scalar": ("scalar", "scalar", "bf16", "bf16"),
    "narrow AVX-512": ("avx2", "avx512", "fp32", "fp32"),
    "an even race": ("avx512", "avx512", "bf16", "fp32"),
}


def chosen(rates, **told):
    made = _native.choose(rates, **told)
    assert made.keys() == {"fp32", "bf16", "for_bf16", "faster"}
    return tuple(made.values())


@pytest.mark.parametrize("machine", MACHINES)
def test_the_rates_decide(machine):
    assert chosen(MACHINES[machine]) == CHOSEN[machine]


def test_a_tenth_is_no_win():
    def of(fp32, bf16):
        return chosen([("avx2", fp32, bf16)])[2:]

    assert of(100, 91) == ("bf16", "fp32"), "as asked; and no reason to ask"
    assert of(100, 90) == ("fp32", "fp32")
    assert of(100, 110) == ("bf16", "fp32")
    assert of(100, 111) == ("bf16", "bf16")


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_told_goes_before_what_is_measured(machine):
    rates = MACHINES[machine]
    for isa, fp32, bf16 in rates:
        faster = "bf16" if bf16 > 1.1 * fp32 else "fp32"
        assert chosen(rates, isa=isa) == (isa, isa, "bf16", faster), "the arithmetic as asked"
        assert chosen(rates, isa=isa, arithmetic="fp32") == (isa, isa, "fp32", "fp32")
    for arithmetic in ("fp32", "bf16"):
        assert chosen(rates, arithmetic=arithmetic)[:3] == (*CHOSEN[machine][:2], arithmetic)
    assert chosen(rates, arithmetic="fp32")[3] == "fp32", "bf16 would be fp32"


def test_an_emulation_is_taken_by_name_alone():
    if _native.isa_reasons()["amx_emulated"]:
        pytest.skip("the emulation needs avx512_bf16")
    assert "amx_emulated" not in [name for name, _, _ in _native.rates()]
    assert run("print(*n.choice().values())", FASTDREAMER_ISA="amx_emulated") == (
        "amx_emulated amx_emulated bf16"
    )


def test_rates_that_say_nothing_are_refused():
    for rates, told in (([], {}), ([SCALAR], {"isa": "avx2"}), ([("scalar", 0, 0)], {})):
        with pytest.raises(ValueError, match="no rates of such an instruction set"):
            _native.choose(rates, **told)
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _native.choose([SCALAR], isa="mmx")
    with pytest.raises(ValueError, match="no precision 'fp16'"):
        _native.choose([SCALAR], arithmetic="fp16")


def test_the_host_is_measured_once():
    rates = _native.rates()
    assert rates == _native.rates()
    assert [name for name, _, _ in rates] == _native.host_isas()
    assert all(fp32 > 0 and bf16 > 0 for _, fp32, bf16 in rates)


def run(code: str, **environment: str) -> str:
    unset = dict.fromkeys(("FASTDREAMER_ISA", ARITHMETIC), "")
    code = f"import torch; from fastdreamer import _native as n\n{code}"
    done = forked.run("-c", code, **unset | environment)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


ARITHMETIC = "FASTDREAMER_ARITHMETIC"


def test_the_environment_decides():
    isa = _native.host_isas()[-1]
    for told, want in (
        ({}, "n.choose(n.rates())"),
        ({"FASTDREAMER_ISA": isa}, f"n.choose(n.rates(), {isa!r})"),
        ({ARITHMETIC: "fp32"}, "n.choose(n.rates(), arithmetic='fp32')"),
        (
            {"FASTDREAMER_ISA": "scalar", ARITHMETIC: "fp32"},
            "n.choose(n.rates(), 'scalar', 'fp32')",
        ),
    ):
        got = "n.choice() | {'faster': n.faster()}"
        takes = f"n.takes_bf16() == ({want}['for_bf16'] == 'bf16')"
        assert run(f"print({got} == {want}, {takes})", **told) == "True True"
    error = "ValueError: FASTDREAMER_ARITHMETIC is 'int8'; it takes fp32 or bf16"
    assert run("n.choice()", FASTDREAMER_ARITHMETIC="int8") == error
    again = "try: n.isa()\nexcept ValueError: n.takes_bf16()"
    assert run(again, FASTDREAMER_ARITHMETIC="int8") == error, "as often as it is asked"


def test_another_process_is_followed_unless_it_is_too_late(monkeypatch):
    made = {"fp32": "scalar", "bf16": _native.host_isas()[-1], "for_bf16": "fp32"}
    assert run(f"n.settle(**{made}); n.settle(**{made}); print(n.choice())") == str(made)
    late = run(f"n.choice(); n.settle(**{made})")
    assert late == "ValueError: settle: another choice is in force already"
    settle_kernels(kernel_choice())  # nothing new
    settle_kernels(None)
    other = {"fp32": "scalar", "bf16": "scalar", "for_bf16": "fp32"}
    if kernel_choice() == other:
        other["for_bf16"] = "bf16"
    with pytest.raises(BackendError, match="cannot compute with the learner's kernels .*in force"):
        settle_kernels(other)
    monkeypatch.setitem(sys.modules, "fastdreamer._native", None)
    monkeypatch.delattr(fastdreamer, "_native")
    with pytest.raises(BackendError, match="learner's kernels .*scalar.*: extension not built"):
        settle_kernels(other)


def results(bf16: bool) -> torch.Tensor:
    inputs = testing.rssm_step_inputs(testing.REPORT, 3)
    tree = torch.utils._pytree.tree_map(
        lambda x: x.float() if isinstance(x, torch.Tensor) else x, inputs
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
        return rssm_step(**tree, backend="native")[0].deter


def test_bfloat16_in_fp32_arithmetic_is_fp32():
    fp32, bf16 = results(False), results(True)
    assert torch.equal(fp32, bf16) != _native.takes_bf16()
    file = os.path.abspath(__file__)
    code = f"import runpy; r = runpy.run_path({file!r})['results']"
    same = f"{code}\nprint(torch.equal(r(False), r(True)))"
    assert run(same, FASTDREAMER_ARITHMETIC="fp32") == "True"
    assert run(same, FASTDREAMER_ARITHMETIC="bf16") == "False"


def embedded(backend: str, autocast: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, with gradients by a bias, and those."""
    inputs = testing.codec_inputs(testing.REPORT_CODEC, 2)["encode"]
    bias = inputs["params"].biases[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embed = encode(**inputs, backend=backend)
        with torch.no_grad():
            assert torch.equal(encode(**inputs, backend=backend), embed)
    (grad,) = torch.autograd.grad(embed.float().square().sum(), bias)
    return embed.detach(), grad


def test_an_embedding_has_the_dtype_that_was_asked_for():
    """Eager's, whatever it is computed in; float32's is that one's rounded, and so its gradient."""
    code = f"""import runpy
embedded = runpy.run_path({os.path.abspath(__file__)!r})["embedded"]
(native, grad), (eager, _), (fp32, want) = (
    embedded("native"), embedded("eager"), embedded("native", False)
)
assert native.dtype == eager.dtype == torch.bfloat16 and fp32.dtype == torch.float32
near = (grad - want).norm() < 0.002 * want.norm()
print(torch.equal(native, fp32.bfloat16()), bool(near))"""
    assert run(code, FASTDREAMER_ARITHMETIC="fp32") == "True True"
    assert run(code, FASTDREAMER_ARITHMETIC="bf16") == "False False"


def test_the_faster_precision(monkeypatch):
    monkeypatch.delenv("FASTDREAMER_BACKEND", raising=False)
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr(_native, "faster", lambda p=precision: p)
        assert faster_precision("native") == precision
        other = "fp32" if precision == "bf16" else "bf16"
        monkeypatch.setattr("fastdreamer.ops.backend._torch_faster", lambda p=other: p)
        assert faster_precision("eager") == other
        with use_backend("eager"):
            assert faster_precision() == other
            assert faster_precision("native") == precision
    monkeypatch.setitem(sys.modules, "fastdreamer._native", None)
    monkeypatch.delattr("fastdreamer._native")
    assert kernel_choice() is None and faster_precision("native") == "fp32"


def test_torchs_own_products_are_measured_where_they_are_asked_for(monkeypatch):
    from fastdreamer.ops import backend

    backend._torch_faster.cache_clear()
    assert faster_precision("eager") in ("fp32", "bf16")
    for slow, faster in ((torch.float32, "bf16"), (torch.bfloat16, "fp32")):
        clock = [0.0]

        def linear(x, w, clock=clock, slow=slow):
            clock[0] += 2.0 if x.dtype == slow else 1.0

        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        monkeypatch.setattr(backend.time, "perf_counter", lambda clock=clock: clock[0])
        backend._torch_faster.cache_clear()
        assert faster_precision("eager") == faster
    backend._torch_faster.cache_clear()


def test_description():
    text = describe_kernels({"fp32": "avx2", "bf16": "avx512", "for_bf16": "bf16"})
    assert text == "fp32 by avx2, bf16 by avx512"
    text = describe_kernels({"fp32": "avx2", "bf16": "avx512", "for_bf16": "fp32"})
    assert text == "fp32 by avx2, bf16 in fp32 arithmetic"
