"""``pytest benchmarks/ --benchmark-only [--full] [--benchmark-json out.json]``.

All variants of a case are run in turns by its first test (`benchmarks.measure`); the tests then
hand their own times to pytest-benchmark, so that its tables and JSON hold them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from benchmarks import measure, regimes
from benchmarks.machine import threads
from benchmarks.replay import replay
from oprd_kernels import native

ALL_THREADS = torch.get_num_threads()
IDENTITY = ["oprd", "oprd, new gradient", "compile", "eager", "upstream", "copy"]
TAP = ["oprd", "compile", "eager", "copy"]
LIGER = ("liger",) if find_spec("liger_kernel") else ()
BRIDGE = ["oprd", "compile", "eager", "three sgemms", "copy"]

BUILDERS = {
    "identity": (regimes.identity, IDENTITY),
    "tap": (regimes.tap, TAP),
    "last_k": (regimes.last_k, ["oprd", "upstream", "copy"]),
    "layers_28": (regimes.layers_28, ["oprd", "eager", "upstream", "copy"]),
} | {f"bridge_{r}": (functools.partial(regimes.bridge, r), BRIDGE) for r in (4, 8, 64, 256)}
# (regime, M, d, dtype, mode, threads, variants)
Setting = tuple[str, int, int, str, str, int, tuple[str, ...]]


def settings(full: bool) -> Iterator[Setting]:
    """What is run: a few minutes' worth, or everything."""
    dtypes = ("fp32", "bf16")
    if regimes.device().type == "cuda":  # its allocator is always warm, its threads its own
        for m in (1024, 8192, 65536, 131072) if full else (8192, 65536):
            for d in (1536, 2048, 2560, 4096) if full else (2048,):
                for regime in (r for r in BUILDERS if r not in ("last_k", "layers_28")):
                    for dtype in dtypes:
                        wanted = (*BUILDERS[regime][1], *LIGER * regime.startswith("bridge"))
                        yield regime, m, d, dtype, "warm", ALL_THREADS, wanted
        for dtype in dtypes:
            yield "last_k", 16000, 1536, dtype, "warm", ALL_THREADS, tuple(BUILDERS["last_k"][1])
        return

    def cases(regime, m, d, modes, n_threads, only=None):
        variants = tuple(only or BUILDERS[regime][1])
        for dtype in dtypes:
            for mode in modes:
                yield regime, m, d, dtype, mode, n_threads, variants

    if full:
        for n in dict.fromkeys((1, ALL_THREADS)):
            for m in (1024, 4096, 16384, 65536, 131072):
                for d in (1536, 2048, 2560, 4096):
                    for regime in ("identity", "tap"):
                        yield from cases(regime, m, d, ("warm", "fresh"), n)
            for m in (1024, 8192, 32768):
                for d in (1536, 2048):
                    for r in (4, 8, 64, 256):
                        yield from cases(f"bridge_{r}", m, d, ("warm", "fresh"), n)
            yield from cases("last_k", 16000, 1536, ("warm",), n)
            yield from cases("layers_28", 28 * 1024, 1536, ("warm", "fresh"), n)
        return
    one = (1,) if ALL_THREADS > 1 else ()  # else they would be the same cases again
    for regime in ("identity", "tap"):
        yield from cases(regime, 8192, 1536, ("warm", "fresh"), ALL_THREADS)
        for n in one:
            yield from cases(regime, 8192, 1536, ("warm",), n, ("oprd", "eager", "copy"))
        for m in (1024, 32768, 131072):
            yield from cases(regime, m, 1536, ("warm",), ALL_THREADS, ("oprd", "copy"))
    for r in (8, 256):
        yield from cases(f"bridge_{r}", 8192, 2048, ("warm",), ALL_THREADS)
        for n in one:
            only = ("oprd", "three sgemms", "copy")
            yield from cases(f"bridge_{r}", 8192, 2048, ("warm",), n, only)
    for r in (4, 64):
        yield from cases(
            f"bridge_{r}",
            8192,
            2048,
            ("warm",),
            ALL_THREADS,
            ("oprd", "eager", "three sgemms", "copy"),
        )
    yield from cases("last_k", 16000, 1536, ("warm",), ALL_THREADS)
    yield from cases("layers_28", 28 * 256, 1536, ("warm",), ALL_THREADS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = dict.fromkeys(settings(metafunc.config.getoption("--full")))
    params = [
        pytest.param(s, variant, id="-".join(map(str, [*s[:5], f"{s[5]}threads", variant])))
        for s in chosen
        for variant in s[6]
    ]
    metafunc.parametrize(("setting", "variant"), params)


@functools.lru_cache(maxsize=1)
def run(setting: Setting) -> tuple[regimes.Case, dict[str, measure.Measured], float]:
    """One case, all its variants in turns, and the GEMM peak of the same minute."""
    regime, m, d, dtype, mode, n_threads, wanted = setting
    build = BUILDERS[regime][0]
    with threads(n_threads):
        case = build(m, d, dtype, mode == "fresh", "compile" in wanted)
        for name in set(case.variants) - set(wanted):
            del case.variants[name]
        return case, measure.measure(case, mode), measure.gemm_flops(dtype)


MISSING = native.problem() if regimes.device().type == "cpu" else None


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_rep_loss(benchmark, setting: Setting, variant: str) -> None:
    _, m, d, dtype, mode, n_threads, _ = setting
    case, measured, flops = run(setting)
    ours = measured[variant]
    benchmark.group = f"{case.name} {mode}, {n_threads} threads"
    benchmark.name = variant
    benchmark.extra_info.update(
        regime=case.regime,
        m=m,
        d=d,
        dtype=dtype,
        mode=mode,
        threads=n_threads,
        variant=variant,
        floor_seconds=measure.floor_seconds(case, measured["copy"].median, flops),
        copy_bytes_per_second=2 * case.activation_bytes / measured["copy"].median,
        gemm_flops_per_second=flops,
        extra_bytes=ours.extra_bytes,
        host_seconds=ours.host_seconds,
        activation_bytes=case.activation_bytes,
        floor_bytes=case.floor_bytes,
    )
    replay(benchmark, ours.seconds)
