"""What one step of staleness does to a student, and what it saves.

The demo is trained with ``rollout.staleness`` 0 and 1, seed by seed:

    python -m benchmarks.staleness                         # accuracy: three seeds with `generate`
    python -m benchmarks.staleness --engine vllm           # and seconds, where vLLM is installed
    python -m benchmarks.staleness --steps 4 --seeds 0     # a trial

A run that has finished is read, not repeated. Printed are the accuracy on the validation set during
training and on the test set after it, and seconds by phase. ``rollout`` is the time that a run has
waited for responses. Only with ``--engine vllm`` can staleness save any.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from oprd.config.demo import demo_config
from oprd.observability.summary import finished
from oprd.training.trainer import train

PHASES = ("rollout", "weight sync", "gap check", "teacher", "student update")


def run(args: argparse.Namespace, staleness: int, seed: int) -> Path:
    """Train with a staleness and a seed, unless that was done; return the run's directory."""
    directory: Path = args.output_dir / f"{args.engine}_{args.steps}_stale_{staleness}_seed_{seed}"
    if not finished(directory):
        cfg = demo_config()
        cfg.output_dir, cfg.steps, cfg.seed = str(directory), args.steps, seed
        cfg.rollout.engine, cfg.rollout.staleness = args.engine, staleness
        cfg.eval.teacher, cfg.resume = False, "auto"
        cfg.eval.sets["val"].every = max(args.steps // 5, 1)
        train(cfg)
    return directory


def results(directory: Path) -> dict[str, float]:
    """Return a run's accuracies (by step, and ``test``) and its seconds by phase."""
    lines = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {f"step {x['step']}": x["val/val/avg@1"] for x in lines if x.get("model") == "student"}
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    found["test"] = summary["evaluations"]["student after"]["test"]["avg"]
    return found | {f"{phase}, s": summary["seconds"].get(phase, 0.0) for phase in PHASES}


def main(argv: list[str] | None = None) -> None:
    """Train, and print the means over seeds and each seed's test accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["generate", "continuous", "vllm"], default="generate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/staleness"))
    args = parser.parse_args(argv)
    rows = {
        staleness: [results(run(args, staleness, seed)) for seed in args.seeds]
        for staleness in (0, 1)
    }
    print(f"\n{args.engine}, {args.steps} steps, means over the seeds {args.seeds}")
    print(f"{'':<18}{'staleness 0':>14}{'staleness 1':>14}")
    for name in rows[0][0]:
        means = [statistics.mean(r[name] for r in rows[staleness]) for staleness in (0, 1)]
        shown = [f"{x:.1f}" if name.endswith(", s") else f"{x:.4f}" for x in means]
        print(f"{name:<18}{shown[0]:>14}{shown[1]:>14}")
    for staleness, found in rows.items():
        each = ", ".join(f"{r['test']:.4f}" for r in found)
        print(f"test by seed, staleness {staleness}: {each}")


if __name__ == "__main__":
    main()
