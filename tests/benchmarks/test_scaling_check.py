"""What checks `oprd-scaling` and `overlap` on a machine: that it measures what it says."""

import json

import pytest
import torch

from benchmarks import overlap, scaling_check
from oprd.benchmark.scaling import Measured, Model
from oprd.benchmark.scaling_inputs import traffic
from oprd.config.demo import demo_config
from oprd.memory_plan.config import PlanConfig
from oprd.memory_plan.report import shapes


def test_a_line_through_timed_collectives():
    sizes = [4096, 2**20, 2**22]
    launch, slope = scaling_check.line(sizes, [1e-3 + 2e-9 * size for size in sizes])
    assert (launch, slope) == pytest.approx((1e-3, 2e-9))
    assert scaling_check.line(sizes, [2e-9 * size for size in sizes])[0] < 1e-9


@pytest.mark.exhaustive
def test_a_step_sends_the_bytes_that_are_planned(tmp_path):
    cfg = demo_config()
    student, teachers = shapes(cfg, PlanConfig())
    ours, theirs = traffic(cfg, student, teachers, sharded=True)
    measured = Measured(1, 64, 4.5, 1, 1.0, 1.0)
    for name, found in scaling_check.bytes_of(tmp_path, Model(measured, ours, theirs)).items():
        # Norms and biases are not in the plan.
        assert found["planned"] < found["counted"] < 1.01 * found["planned"], name


def test_overlap_is_compared_with_its_absence(tmp_path, monkeypatch, capsys):
    file = tmp_path / "overlap.json"
    monkeypatch.setattr("sys.argv", ["overlap", "--rounds", "1", "--batches", "2", "--tokens", "64",
                                     "--device", "cpu", "--output", str(file)])  # fmt: skip
    overlap.main()
    found = json.loads(file.read_text())
    assert found["equal"]
    assert found["micro_batches"] == 2
    assert found["rows"].keys() == {"in turn", "ahead"}
    shown = capsys.readouterr().out
    assert "equal, bit for bit" in " ".join(shown.split())  # machines' names fold it elsewhere
    assert max(map(len, shown.splitlines())) <= 80


def test_unequal_losses_would_be_told(monkeypatch):
    own = overlap.passes

    def wrong(update, work, ahead):
        found = own(update, work, ahead)
        return found | {"loss": [x + ahead for x in found["loss"]]}

    monkeypatch.setattr(overlap, "passes", wrong)
    found = overlap.compare(overlap.SMALL, 2, 64, 1, torch.device("cpu"))
    assert not found["equal"]
