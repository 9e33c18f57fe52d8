"""What oprd-bridge shows of a bridge."""

import json

import torch

from oprd.bridge.bank import Bridge, BridgeInfo, RankReport, save_bridge
from oprd.bridge.show import tables
from oprd.bridge.sweep import sweep_rows, table
from oprd.cli import bridge as cli
from oprd.models.info import ModelInfo
from tests.support.screens import check_fits


def info(path="org/some-student"):
    cosines = [-0.1234] * 3
    return BridgeInfo(
        student=ModelInfo(6, 3, path),
        teacher=ModelInfo(8, 4, "org/teacher"),
        pairs=[(0, 0), (1, 2), (2, 3)],
        rank=2,
        solver="ridge",
        ridge=1e-6,
        rows=100,
        held_out_rows=11,
        positions="last_k",
        k=2000,
        shift="after",
        teacher_input="text",
        teacher_pairs="stable",
        ranks=[RankReport(rank, cosines, [0.9] * 3, [0.8] * 3, [0.7] * 3) for rank in (1, 2)],
    )


def test_tables_fit():
    lines = check_fits([*tables(info()), table(sweep_rows(info()))])
    words = [line.split() for line in lines]
    assert ["student", "org/some-student", "(3", "layers,", "6", "wide)"] in words
    assert ["1", "2", "-0.1234", "0.9000", "0.8000", "0.7000"] in words
    assert any("the rows fitted" in line for line in lines)


def test_show_prints_tables_or_json(tmp_path, capsys):
    file = tmp_path / "bridge.safetensors"
    long = "/a/very/long/path" * 6
    maps = ({i: torch.zeros(shape) for i in range(3)} for shape in ((2, 6), (2, 8), 8))
    save_bridge(Bridge(*maps, info(long)), str(file))
    cli.main(["show", str(file)])
    shown = capsys.readouterr().out
    assert long in "".join(line[15:].strip() for line in shown.splitlines()[1:5])  # folded, not cut
    cli.main(["show", str(file), "--rank", "1", "--json"])
    described = json.loads(capsys.readouterr().out)
    assert described["rank"] == 1
    assert described["student"]["path"] == long
    assert described["ranks"][-1]["cosine_after"] == [0.9] * 3
