"""Trackers get what ``metrics.jsonl`` holds, and can't end a run."""

import json
import os
import struct
import subprocess
import sys

import pytest

from oprd.config import LoggingConfig
from oprd.errors import ConfigError
from oprd.observability import trackers
from oprd.observability.trackers import TRACKERS, Trackers
from oprd.training.preflight import preflight
from oprd.training.trainer import train
from tests.oprd.training.test_trainer import ROOT, lines, small_run, steps_of
from tests.support.logs import listen

RECORDS = [{"step": i, "actor/rep_loss": 1.0 / i, "rep/layer_loss": [0.5, 2.0]} for i in (1, 2, 3)]


def open_trackers(directory, *kinds, step=0):
    directory.mkdir(exist_ok=True)
    return Trackers(LoggingConfig([*kinds], project="tests"), directory, {"steps": 3}, step)


@pytest.fixture(autouse=True)
def warned():
    """What trackers warn of; a test that expects a warning takes it out."""
    messages = listen(trackers)
    yield messages
    assert not messages


def scalars(directory):
    """By tag, (step, value) in the order of the steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory / "tensorboard")).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_shows_a_whole_run(tmp_path):
    cfg = small_run(tmp_path / "run", logging=LoggingConfig(["tensorboard"]))
    found = (train(cfg), scalars(tmp_path / "run"))[1]
    steps = steps_of(tmp_path / "run")
    for name in ("actor/rep_loss", "actor/grad_norm", "perf/tokens_per_second"):
        assert [step for step, _ in found[name]] == [s["step"] for s in steps]
        assert [x for _, x in found[name]] == pytest.approx([s[name] for s in steps])
    assert [x for _, x in found["rep/layer_loss/3"]] == pytest.approx(
        [s["rep/layer_loss"][3] for s in steps]
    )
    evaluations = [e for e in lines(tmp_path / "run") if "model" in e]
    accuracy = [(e["step"], e["val/val/avg@1"]) for e in evaluations]
    measured = found["teacher/val/val/avg@1"] + found["val/val/avg@1"]
    assert [step for step, _ in measured] == [step for step, _ in accuracy] == [0, 0, 2, 3]
    assert [x for _, x in measured] == pytest.approx([x for _, x in accuracy])


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    first = open_trackers(tmp_path / "run", "tensorboard")
    for record in RECORDS:
        first.log(record)
    first.close()
    again = open_trackers(tmp_path / "run", "tensorboard", step=1)  # from the checkpoint of step 1
    again.log({"step": 2, "actor/rep_loss": 7.0})
    again.close()
    assert scalars(tmp_path / "run")["actor/rep_loss"] == [(1, 1.0), (2, 7.0)]


def wandb_history(file):
    """(step, loss) of an offline run, whose records lie in a LevelDB log: each a checksum, its
    length, its kind (1: whole) and itself, after seven bytes of the file's own."""
    from wandb.proto import wandb_internal_pb2

    data, at, found = file.read_bytes(), 7, []
    assert len(data) < 32768  # beyond the first block records are cut
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        row = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        if row:
            found.append((json.loads(row["step"]), json.loads(row["actor/rep_loss"])))
    return found


SESSION = """
import sys
from pathlib import Path
from tests.oprd.observability.test_trackers import RECORDS, open_trackers

step = int(sys.argv[2])
trackers = open_trackers(Path(sys.argv[1]), "wandb", step=step)
for record in RECORDS[step:]:
    trackers.log(record)
trackers.close()
"""


@pytest.mark.slow
def test_wandb_continues_its_run(tmp_path):
    pytest.importorskip("wandb")
    for step in (0, 1):
        subprocess.run(
            [sys.executable, "-c", SESSION, str(tmp_path / "run"), str(step)],
            check=True, cwd=ROOT, timeout=120,
            env=os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    identity = (tmp_path / "run" / "tracker_id").read_text().strip()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(files) == 2
    found = [row for file in files for row in wandb_history(file)]
    assert found == [(r["step"], r["actor/rep_loss"]) for r in [*RECORDS, *RECORDS[1:]]]


@pytest.mark.slow
def test_trackio_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for step, records in [(0, RECORDS[:2]), (2, RECORDS[2:])]:
        opened = open_trackers(tmp_path / "run", "trackio", step=step)
        for record in records:
            opened.log(record)
        opened.close()
    identity = (tmp_path / "run" / "tracker_id").read_text().strip()
    logs = SQLiteStorage.get_logs("tests", identity)
    assert [(x["step"], x["actor/rep_loss"]) for x in logs] == [
        (r["step"], r["actor/rep_loss"]) for r in RECORDS
    ]


class Broken:
    """Opens, takes one record, and then its server is gone."""

    calls = 0

    def __init__(self, *arguments):
        pass

    def log(self, step, values):
        Broken.calls += 1
        if step > 1:
            raise ConnectionError("no route to host")

    def close(self):
        raise AssertionError("a tracker that has failed is left alone")


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys, warned
):
    monkeypatch.setitem(TRACKERS, "wandb", Broken)
    monkeypatch.setattr("oprd.training.preflight.check_trackers", lambda cfg: None)
    cfg = small_run(tmp_path / "run", eval__sets={}, logging=LoggingConfig(["wandb"]))
    assert train(cfg).steps == 3
    assert Broken.calls == 2
    assert "no route to host" in warned.pop()
    assert capsys.readouterr().out.count("ConnectionError: no route to host") == 1
    assert len(steps_of(tmp_path / "run")) == 3


def test_a_tracker_that_can_not_be_opened(tmp_path, warned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRACKERS, "trackio", lambda *a: 1 / 0)
        opened = open_trackers(tmp_path / "run", "trackio")
    opened.log(RECORDS[0])
    opened.close()
    assert "ZeroDivisionError" in warned.pop()


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("oprd.errors.importlib.util.find_spec", lambda name: None)
    cfg = small_run(tmp_path / "run", logging=LoggingConfig(["wandb"]))
    with pytest.raises(ConfigError, match=r"report_to=wandb .* pip install 'oprd\[wandb\]'"):
        preflight(cfg)
