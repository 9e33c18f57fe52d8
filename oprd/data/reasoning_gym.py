"""Tasks of reasoning-gym as prompts: questions without end, and a scorer for each task.

The path of such a set is ``reasoning_gym:TASK``, or with settings of the task
``reasoning_gym:chain_sum?min_terms=3&seed=7``. ``limit`` is the number of questions. Training and
evaluation draw them with different seeds.

A question's answer is kept as a reference, from which the scorer makes the question again. Some
tasks have several right answers, and some go through Python's sets, so questions are made in
processes with a fixed hash seed: ``python -m oprd.data.reasoning_gym PATH`` prints them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

PREFIX = "reasoning_gym:"
SIZE = 500
EVALUATION_SEED = 1_000_000_000
"""What evaluation adds to the seed. A task draws question i with seed + i."""

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOX = "\\boxed{"


def is_task(text: str) -> bool:
    """Return whether a path names a task, or an answer refers to one."""
    return text.startswith(PREFIX)


def final_answer(response: str) -> str:
    """Return what a response answers: its last ``<answer>..</answer>``, or else its last box, or
    else all of it."""
    tags = ANSWER.findall(response)
    if tags:
        return tags[-1].strip()
    start = response.rfind(BOX)
    depth = 1
    for i in range(start + len(BOX), len(response) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(response[i], 0)
        if depth == 0:
            return response[start + len(BOX) : i].strip()
    return response.strip()


def questions(path: str, for_evaluation: bool, limit: int | None = None) -> list[dict[str, str]]:
    """Return the questions of a task.

    Args:
        path: ``reasoning_gym:TASK``, with settings behind ``?``.
        for_evaluation: True draws with other seeds than False.
        limit: the number of questions; None: ``size`` of the settings, or 500.

    Returns:
        For each question its ``prompt``, and as ``answer`` what `score` takes.

    Raises:
        ValueError: if there is no such task or setting. The message says which there are.
    """
    name, settings = _parsed(path)
    settings["size"] = limit if limit is not None else settings.get("size", SIZE)
    seed = settings.get("seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < EVALUATION_SEED // 2:
        raise ValueError(f"seed must lie in 0 .. {EVALUATION_SEED // 2 - 1}, got {seed!r}")
    settings["seed"] = seed + EVALUATION_SEED * for_evaluation
    text = "&".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    reference = f"{PREFIX}{name}?{text}"
    return [
        {"prompt": prompt, "answer": f"{reference}#{i}"}
        for i, prompt in enumerate(_made(reference))
    ]


@lru_cache(maxsize=32)
def _made(path: str) -> tuple[str, ...]:
    """Return the texts of a task's questions, made in a process of its own."""
    root = str(Path(__file__).parents[2])
    python_path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-m", "oprd.data.reasoning_gym", path],
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(lines[-1].removeprefix("ValueError: "))
    return tuple(json.loads(done.stdout))


def score(answer: str, reference: str) -> float:
    """Return the score of an answer by the task's own scorer, 0 to 1.

    Args:
        answer: see `final_answer`.
        reference: the question's ``answer``, from `questions`.

    Raises:
        Exception: of any kind: scorers can raise on answers that they can't read.
    """
    task, entry = prepare(reference)
    return float(task.score_answer(answer, entry))


def prepare(reference: str) -> tuple[Any, dict[str, Any]]:
    """Return the task and the entry that a reference names. Both are kept for `score`."""
    path, _, number = reference.rpartition("#")
    return _task(path), _entry(path, int(number))


@lru_cache(maxsize=8)
def _task(path: str) -> Any:
    """Create a task.

    Raises:
        ValueError: see `questions`.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name, settings = _parsed(path)
    if name not in DATASETS:
        from difflib import get_close_matches

        near = get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)
        raise ValueError(f"reasoning-gym has no task {name!r}: did you mean {', '.join(near)}?")
    known = [f.name for f in dataclasses.fields(DATASETS[name][1])]
    if other := sorted(settings.keys() - set(known)):
        raise ValueError(
            f"the task {name} has no setting {', '.join(other)}: it has {', '.join(known)}"
        )
    try:
        return reasoning_gym.create_dataset(name, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"the task {name} can't be made with {settings}: {error}") from error


@lru_cache(maxsize=64)
def _entry(path: str, number: int) -> dict[str, Any]:
    return _task(path)[number]


def _parsed(path: str) -> tuple[str, dict[str, Any]]:
    name, _, query = path.removeprefix(PREFIX).partition("?")
    return name, {key: yaml.safe_load(value) for key, value in parse_qsl(query)}


def main() -> None:
    """Print the questions of a task as a JSON list."""
    task = _task(sys.argv[1])
    written = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a task prints is no question
    json.dump([task[i]["question"] for i in range(len(task))], written)


if __name__ == "__main__":
    main()
