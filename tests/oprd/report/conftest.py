"""Synthetic runs: what a run of some steps leaves, without training."""

import json
import math
from pathlib import Path

import pytest


def step_record(step, steps, seed, layers):
    """A line of metrics.jsonl as a run writes it."""
    done = step / steps
    return {
        "step": step,
        "actor/rep_loss": math.exp(-3 * done) + 0.01 * seed,
        "actor/grad_norm": 1.0 / (1 + done),
        "actor/lr": 1e-3 * (1 - done),
        "response_length/mean": 100 + 10 * math.sin(step + seed),
        "rep/cosine_similarity": 0.7 + 0.29 * done,
        "rep/layer_cosine": [0.6 + 0.3 * done + 0.01 * i for i in range(layers)],
        "actor/grad_norm/blocks_0-1": 0.5 / (1 + done),
        "perf/tokens_per_second": 1000.0 + step % 7,
        "time/rollout_s": 0.5,
        "time/student_update_s": 0.25,
        "mem/actor_update_delta_peak_GB": 0.25,
    }


def evaluation(step, model, accuracy, name="val", k=1):
    """A line of metrics.jsonl of an evaluation."""
    values = {f"avg@{k}": accuracy, f"best@{k}": accuracy, "len": 90.0, f"avg@{k}_stderr": 0.01}
    return {"step": step, "model": model} | {f"val/{name}/{n}": v for n, v in values.items()}


@pytest.fixture
def make_run(tmp_path):
    """Returns a function that writes a run's files and returns its directory."""

    def make(
        where, *, name=None, seed=0, steps=20, layers=4, final=0.8, finished=True, config=None
    ) -> Path:
        directory = tmp_path / where
        directory.mkdir(parents=True)
        lines = [evaluation(0, "teacher", 0.9), evaluation(0, "student before", 0.2)]
        for step in range(1, steps + 1):
            lines.append(step_record(step, steps, seed, layers))
            if step % max(steps // 4, 1) == 0 and step < steps:
                accuracy = 0.2 + (final - 0.2) * step / steps
                lines.append(evaluation(step, "student", accuracy))
        lines += [evaluation(steps, "student after", final)] if finished else []
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text)
        settings = {"name": name or Path(where).name, "seed": seed, "steps": steps}
        (directory / "config.yaml").write_text(json.dumps(settings | (config or {})))
        if finished:
            result = {
                "avg": final, "best": final, "dist_4g": None, "length": 90.0, "truncated": 0.0,
                "samples": 1, "problems": 100, "stderr": 0.04,
            }  # fmt: skip
            summary = {
                "student": "student",
                "steps": steps,
                "interrupted": False,
                "evaluations": {
                    "teacher": {"val": result | {"avg": 0.9}},
                    "student before": {"val": result | {"avg": 0.2}},
                    "student after": {"val": result},
                },
                "seconds": {"rollout": steps * 0.5, "student update": steps * 0.25},
                "mem/actor_update_delta_peak_GB": 0.25,
            }
            (directory / "summary.json").write_text(json.dumps(summary))
        return directory

    return make
