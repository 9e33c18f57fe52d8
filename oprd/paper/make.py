"""Make the models of ``oprd-paper`` from scratch: ``python -m oprd.paper.make [--output_dir DIR]``.

- ``student``: the first checkpoint of one supervised run that gets a quarter of the validation
  problems right, as it samples at temperature 1.
- ``teacher``: the end of the same run, then rounds of rejection sampling: of several sampled
  responses the shortest right one is learned. So it shares its origin with the student and was made
  by reinforcement of right answers, as JustRL-1.5B and DeepSeek-R1-Distill-Qwen-1.5B, and it
  answers in fewer tokens.
- ``teacher_of_other_shape``: another width and depth, another origin.
- ``teacher_of_other_tokenizer``: another shape and a tokenizer that cuts the text elsewhere.

A model that is there already is kept. The student and the first teacher come with the package.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from oprd.atomic_files import write_json
from oprd.output_paths import check_output_dir
from oprd.paper.learn import BATCH, Example, Said, accuracy, learn, make_model, respond
from oprd.paper.task import (
    CHECKS,
    Splits,
    make_other_tokenizer,
    make_splits,
    make_tokenizer,
    sample_problems,
)

MADE = "made.json"
"""Says how good a model was when it was made; written last."""
MODELS = ("student", "teacher", "teacher_of_other_shape", "teacher_of_other_tokenizer")
WIDTH, LAYERS = 128, 4


def is_made(directory: Path) -> bool:
    """Return whether a model is complete."""
    return (directory / MADE).exists()


def worked(splits: Splits, seed: int, checks: float = CHECKS) -> Iterator[Example]:
    """Yield endless problems with worked responses."""
    rng = random.Random(seed)
    for problem in sample_problems(splits.held_out, seed):
        yield problem, problem.response(rng, checks)


def rising_and_falling(steps: int, peak: float, warmup: int) -> Callable[[int], float | None]:
    """Return a schedule that rises linearly for ``warmup`` steps and then falls linearly to 0."""

    def rate(step: int) -> float | None:
        if step > steps:
            return None
        return peak * min(step / warmup, (steps - step + 1) / (steps - warmup + 1))

    return rate


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    splits: Splits,
    **how: Any,
) -> None:
    """Write a model in bfloat16 with its tokenizer, and how good it is."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    right, length = accuracy(model.float(), tokenizer, splits.val)
    print(f"{directory.name}: right {right:.3f}, {length:.1f} tokens", flush=True)
    write_json(directory / MADE, how | {"accuracy": right, "length": length})


def make_pair(
    directory: Path, splits: Splits, steps: int, rounds: int, student_accuracy: float
) -> None:
    """Make ``student`` and ``teacher``."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model, said = make_model(tokenizer, WIDTH, LAYERS), Said("supervised")
    student: LlamaForCausalLM | None = None

    def after(step: int, loss: float) -> None:
        nonlocal student
        said(step, loss)
        if student is not None or step % 10 or loss > 0.6:
            return
        right, length = accuracy(model, tokenizer, splits.val)
        print(f"supervised: step {step}  right {right:.3f}, {length:.1f} tokens", flush=True)
        if right >= student_accuracy:
            student = copy.deepcopy(model)
            save(student, tokenizer, directory / "student", splits, step=step)

    learn(model, tokenizer, worked(splits, 0), rising_and_falling(steps, 2e-3, 50), after)
    for number in range(rounds):
        right, length = accuracy(model, tokenizer, splits.val)
        print(f"round {number}: right {right:.3f}, {length:.1f} tokens", flush=True)
        chosen = shortest_right(model, tokenizer, splits, seed=1 + number)
        schedule = rising_and_falling(len(chosen) // BATCH, 3e-4, 5)
        learn(model, tokenizer, iter([*chosen, *chosen[: 8 * BATCH]]), schedule)
    save(model, tokenizer, directory / "teacher", splits, steps=steps, rounds=rounds)


def shortest_right(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    splits: Splits,
    seed: int,
    problems: int = 2304,
    responses: int = 4,
) -> list[Example]:
    """Sample several responses to each of fresh problems; return the shortest right ones."""
    torch.manual_seed(seed)
    source = sample_problems(splits.held_out, 1000 + seed)
    drawn = [next(source) for _ in range(problems)]
    best: dict[int, tuple[int, str]] = {}
    for _ in range(responses):
        for i, (rollout, text, right) in enumerate(respond(model, tokenizer, drawn)):
            found = (len(rollout.response_ids), text)
            if right and (i not in best or found < best[i]):
                best[i] = found
    return [(drawn[i], text) for i, (_, text) in best.items()]


def make_teacher(
    directory: Path,
    splits: Splits,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    width: int,
    layers: int,
    steps: int,
    seed: int,
) -> None:
    """Make a teacher of another origin, by supervision on responses with few checks."""
    torch.manual_seed(seed)
    model = make_model(tokenizer, width, layers)
    examples = worked(splits, seed, checks=0.1)
    learn(model, tokenizer, examples, rising_and_falling(steps, 2e-3, 50), Said(name))
    save(model, tokenizer, directory / name, splits, steps=steps)


def make(
    output_dir: Path = Path("runs/paper_models"),
    only: Sequence[str] = MODELS,
    steps: int = 700,
    rounds: int = 3,
    student_accuracy: float = 0.25,
) -> None:
    """Train and write the models.

    Args:
        output_dir: directory for the models.
        only: the models to make; the first two are made together.
        steps: steps of supervised training.
        rounds: rounds of rejection sampling.
        student_accuracy: accuracy at temperature 1 at which the student is kept.
    """
    check_output_dir(output_dir)
    splits = make_splits()
    wanted = [name for name in only if not is_made(output_dir / name)]
    if {"student", "teacher"} & {*wanted}:  # one run makes both
        make_pair(output_dir, splits, steps, rounds, student_accuracy)
    if "teacher_of_other_shape" in wanted:
        name, tokenizer = "teacher_of_other_shape", make_tokenizer()
        make_teacher(output_dir, splits, name, tokenizer, 144, 5, steps, seed=10)
    if "teacher_of_other_tokenizer" in wanted:
        name, tokenizer = "teacher_of_other_tokenizer", make_other_tokenizer()
        make_teacher(output_dir, splits, name, tokenizer, 144, 5, steps, seed=20)


if __name__ == "__main__":
    auto_cli(make)
