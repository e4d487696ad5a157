"""AMX: what decides whether it can be used, and its kernels, emulated where the CPU has none.

Everything that the other files check of an instruction set they check of ``amx`` and
``amx_emulated``, too; here are the sizes around tiles (16 rows, 16 columns, 32 of what is summed
over), the semantics of the instructions, and the company that disturbs a thread's tiles. An
instruction set is chosen by the environment, so those checks run this file as a script.
"""

import gc
import itertools
import math
import os
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import forked
import numpy as np
import pytest
import torch
from torch import Tensor

from fastdreamer import _native
from fastdreamer.ops.cem import cem
from fastdreamer.ops.codec import decode, decode_error, encode, pixels_to_float
from fastdreamer.ops.imagine import imagine
from fastdreamer.ops.layers import MLPParams
from fastdreamer.ops.native import packs
from fastdreamer.ops.observe import observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import DecoderParams
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.testing import (
    REPORT_CODEC,
    CodecSizes,
    Sizes,
    assert_accurate,
    cem_inputs,
    codec_inputs,
    evaluate,
    imagine_inputs,
    observe_inputs,
    open_loop_inputs,
    rssm_step_inputs,
)  # fmt: skip

OPS = {"imagine": imagine, "observe": observe, "open_loop": open_loop, "rssm_step": rssm_step}
CODEC = {"encode": encode, "decode": decode, "decode_error": decode_error}

# A CPU with AMX under Linux: Emerald Rapids, as its CPUID reads.
FACTS = {
    "leaf_1_ecx": 0xFFFA3203 | 1 << 12 | 1 << 27 | 1 << 28 | 1 << 29,
    "leaf_7_ebx": 0xF1BF07AB,
    "leaf_7_edx": 0xFFD14410,
    "leaf_7_1_eax": 1 << 4 | 1 << 5,
    "leaf_1d_eax": 1,
    "leaf_1d_1_eax": 1024 << 16 | 8192,
    "leaf_1d_1_ebx": 8 << 16 | 64,
    "leaf_1d_1_ecx": 16,
    "xcr0": 0x602E7,
    "tile_permission": 0,
}


# --- whether it can be used ----------------------------------------------------------------------


def test_a_cpu_with_amx_has_everything():
    assert set(_native.isa_reasons(FACTS).values()) == {None}
    assert _native.best_isa(FACTS) == "amx"  # and not the last of all, which is emulated


@pytest.mark.parametrize(
    ("change", "best", "reason"),
    [
        ({"tile_permission": 1}, "avx512bf16",
         "Linux refused permission to use tile registers: Operation not permitted"),
        ({"tile_permission": 22}, "avx512bf16",
         "Linux refused permission to use tile registers: Invalid argument"),
        ({"tile_permission": -2}, "avx512bf16", "only Linux gives permission to use tile"),
        ({"leaf_7_edx": FACTS["leaf_7_edx"] & ~(1 << 24)}, "avx512bf16",
         "the CPU has no AMX-TILE"),
        ({"leaf_7_edx": FACTS["leaf_7_edx"] & ~(1 << 22)}, "avx512bf16",
         "the CPU has no AMX-BF16"),
        ({"xcr0": 0xE7}, "avx512bf16", "the operating system does not save tile registers"),
        ({"xcr0": 0x202E7}, "avx512bf16", "the operating system does not save tile registers"),
        ({"leaf_1d_eax": 0}, "avx512bf16", "the CPU claims AMX but has no palette of tiles"),
        ({"leaf_1d_1_ebx": 0, "leaf_1d_1_eax": 0, "leaf_1d_1_ecx": 0}, "avx512bf16",
         "has 0 tiles of 0 rows of 0 bytes, not 8 of 16 of 64"),
        ({"leaf_1d_1_ecx": 8}, "avx512bf16", "has 8 tiles of 8 rows of 64 bytes"),
        ({"leaf_7_1_eax": 0}, "avx512", "the CPU has no AVX-512 BF16"),
        ({"xcr0": 0x60007}, "avx2", "the operating system does not save AVX-512 registers"),
        ({"leaf_7_ebx": FACTS["leaf_7_ebx"] & ~(1 << 30)}, "avx2",
         "the CPU has no AVX-512 F, DQ, BW and VL"),
        ({"xcr0": 1}, "scalar", "the operating system does not save AVX registers"),
        ({"leaf_7_ebx": 0}, "scalar", "the CPU has no AVX2 with FMA, F16C and BMI2"),
        (dict.fromkeys(FACTS, 0), "scalar", "the CPU has no AVX2"),
    ],
)  # fmt: skip
def test_every_no_has_its_reason(change, best, reason):
    facts = FACTS | change
    reasons = _native.isa_reasons(facts)
    assert reason in reasons["amx"]
    assert _native.best_isa(facts) == best
    order = ["scalar", "avx2", "avx512", "avx512bf16", "amx"]
    usable = order[: order.index(best) + 1]
    assert [name for name in order if reasons[name] is None] == usable
    assert reasons["amx_emulated"] == reasons["avx512bf16"]


def test_this_machine_s_facts_and_reasons_agree():
    facts, reasons = _native.cpu_facts(), _native.isa_reasons()
    assert reasons == _native.isa_reasons(facts)
    assert [name for name in _native.host_isas() if reasons[name]] == []
    assert "amx_emulated" not in _native.host_isas()
    assert ("amx" in _native.host_isas()) == (reasons["amx"] is None)
    # permission is asked for where all else is there, and only there
    granted = _native.isa_reasons(facts | {"tile_permission": 0})["amx"] is None
    assert (facts["tile_permission"] != -1) == granted
    if sys.platform == "linux" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
        if "amx_tile" not in flags:
            assert reasons["amx"]


def run_self(isa: str, *checks: str) -> forked.Done:
    return forked.run(__file__, *checks, keep=True, FASTDREAMER_ISA=isa)


def test_asked_for_in_vain_it_says_why():
    reason = _native.isa_reasons()["amx"]
    if reason is None:
        pytest.skip("this machine has amx")
    done = run_self("amx")
    assert done.returncode != 0
    assert "FASTDREAMER_ISA is 'amx'; this machine has scalar" in done.stderr
    assert f": {reason}" in done.stderr


def test_without_the_environment_nothing_is_emulated():
    assert run_self("").stdout.strip() in _native.host_isas()


# --- the kernels ---------------------------------------------------------------------------------

# A, D, S, E, hidden, units; steps, rows. Around 16 and 32 in all of them, and around the 512 rows
# of a block of weight gradients.
AROUND = [
    ((1, 15, 1, 31, 17, 16), 2, 16),
    ((2, 16, 7, 32, 31, 33), 2, 17),
    ((3, 17, 15, 33, 32, 31), 1, 31),
    ((16, 31, 17, 63, 33, 15), 16, 32),
    ((1, 32, 16, 65, 47, 32), 2, 33),
    ((5, 33, 8, 1, 63, 17), 1, 47),
    ((2, 47, 31, 2, 65, 63), 11, 49),
    ((33, 64, 33, 17, 16, 65), 2, 65),
    ((3, 33, 5, 17, 31, 33), 2, 1),
    ((3, 33, 5, 17, 31, 33), 2, 15),
]


# Images of a tile are 16. Runs of 32 elements, of fewer, of several blocks and a rest, and odd
# ones; channels around 16 and 32; rows of pixels shorter than the pairs of images, and longer.
NARROW = CodecSizes(3, (4, 4, 4, 4), 16, 20, 16, True, (4, 4, 4))
IMAGES = [
    (REPORT_CODEC, 16),
    (CodecSizes(2, (6, 10, 34, 18), None, 13, 33, False, (24, 40, 8)), 47),
    (CodecSizes(4, (20, 40, 72, 5), 7, 1, 3, True, (70, 48, 18)), 18),
    (CodecSizes(2, (17, 16, 33, 3), None, 13, 33, False, (9, 7, 5)), 33),
    (CodecSizes(1, (5, 7, 9, 11), None, 13, 33, False, (16, 31, 2)), 31),
    (NARROW, 323),  # two tiles of each chunk of the batch, whose gradients are added
    (NARROW, 17),
    (NARROW, 15),
    (NARROW, 1),
]


def inputs_of(op: str, sizes: Sizes, H: int, B: int, seed: int = 0) -> dict[str, Any]:
    if op == "rssm_step":
        return rssm_step_inputs(sizes, B, seed=seed)
    if op == "imagine":
        return imagine_inputs(sizes, H, B, heads=True, seed=seed)
    return {"observe": observe_inputs, "open_loop": open_loop_inputs}[op](sizes, H, B, seed=seed)


def run(
    op: str, inputs: dict[str, Any], backend: str = "native", wrt: Collection[str] | None = None
) -> dict[str, Tensor]:
    body = {**OPS, **CODEC}[op]
    got = evaluate(body, inputs, backend=backend, dtype=torch.float32, autocast=True, wrt=wrt)
    return {name: t.float() for name, t in got.items()}  # an embedding is bfloat16


def check_sizes() -> None:
    """Outputs and all gradients, within bfloat16's limits of float64's."""
    for widths, H, B in AROUND:
        for op in OPS:
            inputs = inputs_of(op, Sizes(*widths, 2, 1, 1, "elu"), H, B)
            truth = evaluate(OPS[op], inputs, backend="eager", dtype=torch.float64)
            assert_accurate(op, run(op, inputs), run(op, inputs, "eager"), truth, bf16=True)


def check_images() -> None:
    """The codec's outputs and all gradients, likewise; without gradients the same outputs."""
    for sizes, N in IMAGES:
        for op, inputs in codec_inputs(sizes, N, smooth=True).items():
            truth = evaluate(CODEC[op], inputs, backend="eager", dtype=torch.float64)
            got = run(op, inputs)
            assert_accurate(op, got, run(op, inputs, "eager"), truth, bf16=True, native=True)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                lean = CODEC[op](**inputs, backend="native").float()
            assert torch.equal(lean, got["out"]), (op, sizes, N)


def check_kernels() -> None:
    """Of a decoder's last convolution any, 1 included, whose pixels no tap reaches in every second
    row and column: the error is that of the pixels, each once."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    # the coarse images are as wide as the first kernel: around the 4 pixels of a product
    for first, last, N in itertools.product(range(1, 9), range(1, 5), (16, 17)):
        side = 2 * (first - 1) + last
        feat = uniform(N, 5)
        weights = uniform(16, 4, first, first), uniform(4, 3, last, last)
        linear, biases = (uniform(16, 5), uniform(16)), (uniform(4), uniform(3))
        params = DecoderParams(linear, True, weights, biases)
        target = torch.randint(256, (N, side, side, 3), generator=generator, dtype=torch.uint8)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            images = decode(params, feat, backend="native")
            got = decode_error(params, feat, target, backend="native")
        want = (images.double() - pixels_to_float(target, torch.float64)).square().sum()
        assert abs(float(got) / float(want) - 1) < 1e-5, (first, last, N)


def check_threads() -> None:
    """The same for every number of them, though their tiles of rows end elsewhere."""
    for B in (15, 16, 17, 33, 70):
        for op in OPS:
            inputs = inputs_of(op, Sizes(3, 33, 5, 17, 31, 33, 1, 1, 1, "silu"), 2, B)
            torch.set_num_threads(1)
            want = run(op, inputs)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                got = run(op, inputs)
                assert all(torch.equal(got[name], want[name]) for name in want), (op, B, threads)
    for N in (16, 17, 70):
        for op, inputs in codec_inputs(IMAGES[1][0], N).items():
            want = run(op, inputs)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                got = run(op, inputs)
                assert all(torch.equal(got[name], want[name]) for name in want), (op, N, threads)
            torch.set_num_threads(1)
    given = cem_inputs(Sizes(3, 33, 5, 17, 31, 33, 1, 1, 1, "silu"), 2, 3, 19, 2)
    plans = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16):
            plans.append(cem(**given, backend="native"))
    torch.set_num_threads(1)
    assert all(all(map(torch.equal, plan, plans[0])) for plan in plans)


def embedded(weight: Tensor, embed: Tensor) -> Tensor:
    """``weight`` · bfloat16 ``embed`` [rows, E] as the core multiplies them: the mean of
    a posterior of one layer that looks at nothing else."""
    S, E = weight.shape
    inputs = observe_inputs(Sizes(1, 3, S, E, 2, 2, 1, 1, 1, "elu"), 1, len(embed))
    both = torch.zeros(2 * S, 3 + E)
    both[:S, 3:] = weight
    post = MLPParams((both,), (torch.zeros(2 * S),), "elu")
    inputs |= {"params": inputs["params"]._replace(post=post), "embed": embed[None]}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return observe(**inputs, backend="native").post.mean[0]


def by_the_reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [m, k] · b [k, n] as TDPBF16PS sums it: for each 32 of k the products of even and of odd
    ones apart, each fused into a float32, then both, then with the sum before."""
    # float64 holds a product exactly and rounds its sum before float32 does: no matter here
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for begin in range(0, a.shape[1], 32):
        sums = [np.zeros_like(total) for _ in range(2)]
        for k in range(begin, min(begin + 32, a.shape[1])):
            product = a[:, k, None].astype(np.float64) * b[k]
            sums[k % 2] = (sums[k % 2] + product).astype(np.float32)
        total = total + (sums[0] + sums[1])
    return total


def check_order() -> None:
    """Emulated, to the bit."""
    generator = torch.Generator().manual_seed(0)
    for rows, E, S in [(16, 1, 1), (17, 31, 8), (31, 32, 16), (33, 33, 17), (40, 64, 24),
                       (50, 97, 33), (64, 130, 32), (70, 63, 50)]:  # fmt: skip
        embed = torch.randn(rows, E, generator=generator).bfloat16()
        weight = torch.randn(S, E, generator=generator).bfloat16().float()
        got = embedded(weight, embed).numpy()
        want = by_the_reference(embed.float().numpy(), weight.numpy().T)
        if _native.isa() == "amx_emulated":
            np.testing.assert_array_equal(got, want, err_msg=str((rows, E, S)))
        else:
            # as many roundings, wherever they are
            bound = np.abs(embed.float().numpy()) @ np.abs(weight.numpy().T) * 2.0**-24 * (E + 4)
            assert (np.abs(got - want) <= bound).all()


def check_denormals() -> None:
    """They count as zero, and come out as zero."""
    for rows in (4, 40):
        tiny, huge = torch.full((rows, 5), 1e-39).bfloat16(), torch.full((3, 5), 1e38)
        assert tiny.count_nonzero() == tiny.numel()
        assert embedded(huge, tiny).count_nonzero() == 0
        small = torch.full((rows, 5), 2.0**-70).bfloat16()
        assert embedded(small.float()[:3], small).count_nonzero() == 0
        assert (embedded(torch.full((3, 5), 2.0**-50), small) == 5 * 2.0**-120).all()


def check_nan() -> None:
    """NaN and infinity stay in their row, however the last blocks of k and of rows are filled."""
    poisoned = [("observe", "embed"), ("observe", "action"), ("observe", "start.deter")]
    poisoned += [("imagine", "start.stoch"), ("open_loop", "action"), ("rssm_step", "state.deter")]
    for op, name in poisoned:
        for widths, B in [((3, 33, 5, 17, 31, 33), 19), ((1, 17, 4, 31, 63, 15), 40)]:
            inputs = inputs_of(op, Sizes(*widths, 1, 1, 1, "elu"), 1, B)
            clean = by_row(op, inputs, B)
            head, _, tail = name.partition(".")
            for value in (float("nan"), float("inf")):
                part = (getattr(inputs[head], tail) if tail else inputs[head]).clone()
                part[..., 3, 0] = value
                given = inputs[head]._replace(**{tail: part}) if tail else part
                got = by_row(op, inputs | {head: given}, B)
                others = torch.arange(B) != 3
                for key, want in clean.items():
                    assert torch.equal(got[key][others], want[others]), (op, name, value, key)
                assert any(not torch.equal(got[key][3], want[3]) for key, want in clean.items())


BACKENDS = ("native", "eager")
OF_NAN = ("params.weights[3]", "params.biases[3]", "feat")


def check_nan_images() -> None:
    """An image's stay its own, forward and backward; of a weight they go where eager's do; and
    nothing of them is left in memory that is used again."""
    for sizes, N in (IMAGES[1], (NARROW, 21)):
        inputs = codec_inputs(sizes, N)
        clean = {op: run(op, given) for op, given in inputs.items()}
        others = torch.arange(N) != 3
        for value in (float("nan"), float("inf")):
            feat = inputs["decode"]["feat"].clone()
            feat[3, 0] = value
            got = run("decode", inputs["decode"] | {"feat": feat})
            for key in ("out", "grad_feat"):
                assert torch.equal(got[key][others], clean["decode"][key][others]), (value, key)
                assert not torch.equal(got[key][3], clean["decode"][key][3])
            for op, given in inputs.items():
                # no infinite weights: outside the image eager adds 0 · w
                for name in ("biases", "weights")[: 1 + math.isnan(value)]:
                    spoiled = [t.clone() for t in getattr(given["params"], name)]
                    spoiled[1][0] = value
                    given = given | {"params": given["params"]._replace(**{name: tuple(spoiled)})}
                    got, eager = (run(op, given, backend, OF_NAN) for backend in BACKENDS)
                    for key, want in eager.items():
                        assert torch.equal(got[key].isnan(), want.isnan()), (op, name, value, key)
        for op, given in inputs.items():
            again = run(op, given)
            assert all(torch.equal(again[key], clean[op][key]) for key in again), op


def by_row(op: str, inputs: dict[str, Any], B: int) -> dict[str, Tensor]:
    """Outputs and gradients of the inputs, the batch first."""
    wrt = [name for name in ("start", "state", "action", "embed") if name in inputs]
    got = evaluate(
        OPS[op], inputs, backend="native", dtype=torch.float32, autocast=True, wrt=wrt
    )  # fmt: skip
    return {name: t.movedim(t.shape.index(B), 0) for name, t in got.items()}


def check_stale() -> None:
    """What lay before where weights are packed, and where rows are gathered, is not multiplied."""
    rows = torch.Generator().manual_seed(0)
    for E in (33, 31, 1):
        embed = torch.randn(40, E, generator=rows).bfloat16()
        weight = torch.randn(20, E, generator=rows)
        want = embedded(weight, embed)
        whole = (E + 31) // 32 * 32
        for _ in range(2):
            packs.forget()
            gc.collect()
            nan = torch.full((20, whole), float("nan"))  # takes the same memory
            assert embedded(nan, torch.ones(40, whole).bfloat16()).isnan().all()
            packs.forget()
            gc.collect()
            assert torch.equal(embedded(weight, embed), want)


SIZES = Sizes(2, 33, 5, 6, 17, 9, 1, 1, 1, "elu")


def results() -> list[Tensor]:
    return [t for op in OPS for t in run(op, inputs_of(op, SIZES, 2, 40)).values()]


def images(inputs: dict[str, dict[str, Any]]) -> list[Tensor]:
    return [t for op, given in inputs.items() for t in run(op, given).values()]


def embeddings(inputs: dict[str, dict[str, Any]]) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return encode(**inputs["encode"], backend="native")


def check_company() -> None:
    """torch's own products between ours, two threads at once, forks: nothing changes."""
    torch.set_num_threads(2)
    want = results()
    given = codec_inputs(NARROW, 20)
    seen, embed = images(given), embeddings(given)
    a = torch.randn(256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        product = a @ a
    for _ in range(3):  # on this thread and on those of the pool
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(a @ a, product)
        assert all(map(torch.equal, results(), want))
        assert all(map(torch.equal, images(given), seen))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(a @ a, product)

    def work(_: int) -> bool:
        torch.set_num_threads(2)
        return all(
            all(map(torch.equal, results(), want)) and all(map(torch.equal, images(given), seen))
            for _ in range(2)
        )

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(4)))
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            # all else of images is long enough for threads of torch's, which a child has not
            same = torch.equal(embeddings(given), embed)
            os._exit(0 if same and all(map(torch.equal, results(), want)) else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(map(torch.equal, results(), want))


CHECKS: dict[str, Callable[[], None]] = {
    "sizes": check_sizes,
    "images": check_images,
    "kernels of images": check_kernels,
    "threads": check_threads,
    "order": check_order,
    "denormals": check_denormals,
    "nan": check_nan,
    "nan images": check_nan_images,
    "stale": check_stale,
    "fork and company": check_company,
}


# Those with instructions for bfloat16; in company any may be disturbed.
OF_BF16 = ("avx512bf16", "amx", "amx_emulated")
OF_ALL = ("scalar", "avx2", "avx512", *OF_BF16)


@pytest.mark.parametrize(
    ("check", "isa"),
    [(name, isa) for name in CHECKS for isa in (OF_ALL if "company" in name else OF_BF16)],
)
def test_kernels(check, isa):
    if reason := _native.isa_reasons()[isa]:
        pytest.skip(reason)
    done = run_self(isa, check)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == isa


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        CHECKS[name]()
    print(_native.isa())
