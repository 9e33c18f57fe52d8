"""The benchmark harness runs: a tiny case of every regime, and its report."""

import json
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_time, measure, regimes, report, test_overhead, test_rep_loss
from benchmarks.test_rep_loss import BUILDERS, LIGER, settings

TINY = dict.fromkeys(BUILDERS, (16, 32)) | {"layers_28": (28, 16)}


@pytest.mark.parametrize("mode", ["warm", "fresh"])
@pytest.mark.parametrize("regime", [name for name in BUILDERS if name != "last_k"])
def test_every_variant_of_every_regime_runs(regime, mode):
    build, expected = BUILDERS[regime]
    case = build(*TINY[regime], "fp32", mode == "fresh", False)
    liger = set(LIGER) if regime.startswith("bridge") else set()
    assert set(case.variants) == (set(expected) - {"compile"}) | liger
    measured = measure.measure(case, mode, budget=0.0, min_rounds=2)
    assert all(len(m.seconds) >= 2 for m in measured.values())
    assert measure.floor_seconds(case, measured["copy"].median, 1e9) > 0


def test_variants_agree_on_the_gradient():
    """The peers do the same work: equal gradients flow out of the tap."""
    case = regimes.identity(16, 32, "fp32", False, False)
    ours, new = case.variants["oprd, new gradient"](), case.variants["eager"]()
    assert ours[0].allclose(new[0], rtol=1e-4, atol=1e-7)


def test_settings_are_distinct_and_full_has_more():
    quick, full = list(settings(False)), list(settings(True))
    assert len(set(quick)) == len(quick)
    assert len(full) > 2 * len(quick)


class MockedEvent:
    """A CUDA event that tells the wall clock's time, in milliseconds as they do."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def mocked_cuda(monkeypatch):
    """As much of torch.cuda as the harness uses, over the CPU."""

    def refuse():
        raise RuntimeError("there is nothing to capture")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(gpu_time, "cold_cache", lambda: lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", MockedEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 356)


def test_gpu_harness_runs_on_mocked_events(monkeypatch, mocked_cuda):
    monkeypatch.setattr(regimes, "device", lambda: torch.device("cpu"))
    case = regimes.bridge(8, 16, 32, "bf16", False, False)
    measured = measure.measure_gpu(case, budget=0.0, min_rounds=3)
    assert set(measured) == set(case.variants)
    for m in measured.values():
        assert len(m.seconds) == 3
        assert 0 < m.median < 1
        assert m.extra_bytes == 256
        assert 0 < m.host_seconds < 1


def test_gpu_settings_build(monkeypatch):
    """What would be run where there is a GPU names regimes and variants that exist."""
    monkeypatch.setattr(regimes, "device", lambda: torch.device("cuda"))
    chosen = list(settings(False))
    assert len(set(chosen)) == len(chosen) >= 20
    for regime, m, _, dtype, mode, _, wanted in chosen:
        assert m >= 8192
        assert dtype in regimes.DTYPES
        assert mode == "warm"
        assert set(wanted) <= {*BUILDERS[regime][1], "liger"}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_two_rows_are_of_the_same_case(monkeypatch, threads, full):
    """Also where PyTorch has one thread, so that "one" and "all" are the same."""
    monkeypatch.setattr(test_rep_loss, "ALL_THREADS", threads)
    cases = [setting[:6] for setting in dict.fromkeys(test_rep_loss.settings(full))]
    assert len(cases) == len(set(cases)) > 20


def test_overhead_is_measured_for_all():
    seconds = test_overhead.measure(rounds=2, per_round=2)
    assert set(seconds) == {*test_overhead.EMPTY, *test_overhead.EMPTY.values()}
    assert {"empty", "fused_rep_loss", "rep_tap"} < set(seconds)
    assert all(len(values) == 2 for values in seconds.values())


def entry(variant, m, median):
    info = {
        "regime": "identity in place",
        "m": m,
        "d": 8,
        "dtype": "fp32",
        "mode": "warm",
        "threads": 2,
        "variant": variant,
        "floor_seconds": 0.001,
        "extra_bytes": 1024,
        "activation_bytes": 2048,
        "floor_bytes": 4096,
    }
    return {"stats": {"median": median}, "extra_info": info}


def test_report_writes_table_and_plot(tmp_path, monkeypatch):
    entries = [entry(v, m, t * m) for m in (10, 100) for v, t in (("oprd", 2e-4), ("eager", 1e-3))]
    source = tmp_path / "run.json"
    source.write_text(json.dumps({"benchmarks": entries, "machine_info": {"oprd": {"cpu": "x"}}}))
    report.report(source, tmp_path)
    table = (tmp_path / "run.md").read_text()
    assert "Machine: cpu x" in table
    line = next(x for x in table.splitlines() if x.startswith("| identity in place | 10 |"))
    assert "| 0.00205 | 2.00x | 5.00x |" in line  # GB/s; of the floor; eager over ours
    assert "| 0.500 |" in line  # extra memory over M d e
    assert (tmp_path / "run.png").stat().st_size > 1000
    monkeypatch.chdir(tmp_path)
    report.report(source)
    assert (tmp_path / "runs" / "benchmarks" / "run.md").read_text() == table


class MockedGraph:
    """A CUDA graph whose replay does again what was called during the capture."""

    invalid = False

    def __init__(self):
        self.capturing = False

    def capture_begin(self, pool):
        assert pool == (0, 7)
        self.capturing = True

    def capture_end(self):
        self.capturing = False
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        assert not self.capturing


@pytest.fixture
def mocked_graph(monkeypatch, mocked_cuda):
    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MockedGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


def test_calls_are_captured_and_their_results_kept(mocked_graph):
    recorded = gpu_time.record([lambda: "a", lambda: "b"])
    assert (recorded.method, recorded.calls, recorded.kept) == ("graph", 2, ["a", "b"])
    seconds = gpu_time.in_turns({"both": recorded}, 0.0, 3, lambda: None)
    assert len(seconds["both"]) == 3


@pytest.mark.parametrize("invalid", [False, True])
def test_what_cannot_be_captured_is_queued(mocked_graph, monkeypatch, invalid):
    """If the error has ended the capture, the allocator is told."""
    calls, told = [], []
    monkeypatch.setattr(MockedGraph, "invalid", invalid)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args: told.append(args), raising=False)

    def waits_for_the_device():
        calls.append(1)
        if len(calls) == 2:  # the first is the warm one
            raise RuntimeError("operation not permitted when stream is capturing")

    recorded = gpu_time.record([waits_for_the_device])
    assert recorded.method == "queued"
    recorded.run()
    assert len(calls) == 5
    assert told == ([(3, (0, 7))] * 2 if invalid else [])


def test_what_is_known_not_to_be_captured_is_queued(mocked_graph):
    assert gpu_time.record([lambda: None], in_graph=False).method == "queued"
