"""Small runs of the demo pair, and what they leave behind."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from oprd.checkpoint.state import stored_tensors
from oprd.config import DistillOptions, EvalSetConfig, TrainConfig
from oprd.config.demo import demo_config
from oprd.observability.run_log import RunLog

ROOT = Path(__file__).parents[2]


C = TypeVar("C")


def set_options(cfg: C, changes: Mapping[str, Any]) -> C:
    """``{"optim__lr": 1e-3}`` sets ``cfg.optim.lr``."""
    for name, value in changes.items():
        *path, last = name.split("__")
        target = reduce(getattr, path, cfg)
        if isinstance(target, DistillOptions):  # frozen
            setattr(reduce(getattr, path[:-1], cfg), path[-1], replace(target, **{last: value}))
        else:
            setattr(target, last, value)
    return cfg


def small_run(directory, **changes) -> TrainConfig:
    """Three steps of eight prompts."""
    cfg = replace(demo_config(), output_dir=str(directory), steps=3, log_every=1)
    cfg.rollout.prompts_per_step = 8
    cfg.eval.sets = {"val": EvalSetConfig("demo:val.jsonl", limit=40, every=2)}
    return set_options(cfg, changes)


def lines(directory) -> list[dict]:
    """Of ``metrics.jsonl``."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def measured(directory) -> list[dict]:
    """The lines without what no two runs have alike: time and memory."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "mem/", "perf/"))}
        for line in lines(directory)
    ]


def stop_after(monkeypatch, step, signum=signal.SIGTERM) -> None:
    """Send this process a signal when a step has been logged."""
    log = RunLog.step

    def logged(self, number, metrics):
        log(self, number, metrics)
        if number == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(RunLog, "step", logged)


def limits_of_two_ranks(monkeypatch) -> list[timedelta]:
    """Of the process groups that are asked for from now on, instead of making them."""
    limits: list[timedelta] = []
    store = dist.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda _url: iter([(store, 0, 2)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *_, timeout=None, **__: limits.append(timeout)
    )
    return limits


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whole."""
    state = {
        name: torch.empty(m.size, dtype=m.properties.dtype)
        for name, m in stored_tensors(path).items()
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return state


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
