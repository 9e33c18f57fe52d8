"""Jobs of ``oprd-paper`` side by side. The slow tests do real ones, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from oprd.paper import jobs as jobs_module
from oprd.paper.command import SHIPPED, PaperConfig, run_paper
from oprd.paper.jobs import JobsFailed, log_file, run_jobs
from oprd.paper.one import Job
from oprd.paper.recipe import Level, Places
from oprd.paper.task import write_prompts

TINY = Level(steps=2, seeds=(0,), rows=("oprd",))


@pytest.fixture
def places(tmp_path):
    places = Places(tmp_path / "models", tmp_path / "prompts", tmp_path / "bridges")
    write_prompts(places.prompts)
    shutil.copytree(SHIPPED, places.models)
    return places


def job(places, tmp_path, name="oprd", **changes):
    directory = tmp_path / "tuning" / name
    return replace(Job("tuning", name, directory, places, TINY, 100, 1e-3), **changes)


def test_a_job_waits_for_what_it_needs_and_never_begins_if_that_failed(places, tmp_path):
    first = job(places, tmp_path)
    second = job(places, tmp_path, "opd_top1", needs=(first.title,))
    assert jobs_module._ready([first, second], {}, {}) == [first]
    assert jobs_module._ready([second], {object(): (first, 0.0)}, {}) == []
    assert jobs_module._ready([second], {}, {}) == [second]
    assert jobs_module._ready([second], {}, {first.title: "it broke"}) == []


def test_the_estimate_counts_what_jobs_cost_and_how_many_run_at_a_time(places, tmp_path):
    small, large = job(places, tmp_path), job(places, tmp_path, "opd_top1", weight=3.0)
    clock = jobs_module._Clock([small, large, large], at_once=2)
    assert clock.left(small, 10.0, [large, large]) == pytest.approx(30.0)


def test_jobs_that_are_done_are_not_done_again(places, tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "done", property(lambda _: True))
    run_jobs([job(places, tmp_path)], at_once=1, threads=1)
    assert not (tmp_path / "tuning").exists()


@pytest.mark.slow
def test_a_failed_job_does_not_end_the_others_and_its_log_is_shown(places, tmp_path):
    good = job(places, tmp_path)
    bad = job(places, tmp_path, "shape_top1")  # its teacher is not there
    after = job(places, tmp_path, "opd_top4", needs=(bad.title,))
    with pytest.raises(JobsFailed) as failed:
        run_jobs([bad, after, good], at_once=2, threads=1)
    assert f"failed: {bad.title}; not begun: {after.title}" in str(failed.value)
    assert "teacher_of_other_shape" in str(failed.value)  # from the log of the process
    assert good.done
    assert "finished; student" in Path(log_file(good)).read_text()


@pytest.mark.slow
def test_a_signal_ends_the_jobs_with_checkpoints_and_the_command_goes_on(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "oprd.cli.paper", "--output_dir", str(out), "--quick", "true"]
    command += ["--rows", "[oprd]", "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = out / "rows/oprd/seed_0/metrics.jsonl"
    end = time.monotonic() + 240
    while time.monotonic() < end and not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "run the same command again" in output
    assert not (out / "rows/oprd/seed_0/measured.json").exists()
    run_paper(PaperConfig(str(out), quick=True, rows=["oprd"], jobs=1))
    log = (out / "rows/oprd/seed_0.log.txt").read_text()
    assert "interrupted after step" in log
    assert log.count("step 1/40") == 1  # it went on
    results = json.loads((out / "results.json").read_text())
    (row,) = results["rows"]
    (run,) = row["runs"]
    assert [step for step, *_ in run["curve"]] == [0, 10, 20, 30, 40]
    assert (
        run["results"]["three_digits"]["avg"] > results["models"]["student"]["three_digits"]["avg"]
    )
    assert (out / "report/index.html").stat().st_size > 10_000
    assert os.listdir(out / "report")
