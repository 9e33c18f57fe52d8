"""Make models and prompts for further demos: ``python -m oprd.demo.more [--output_dir DIR]``.

Each model is the demo's student after some further training, so that all share one origin:

- ``carry/`` and ``plain/``: two specialists. One is right on sums in which every column carries,
  the other on sums in which none does; each is wrong on the other's sums
  (``recipes/demo_two_teachers.yaml``).
- ``hinted/``: a student that copies an answer given before the sum (``"207=483+219="``) and has
  forgotten how to add without one, for self-distillation (``recipes/demo_self.yaml``).

Writes the models ``carry``, ``plain`` and ``hinted``, and ``<name>.jsonl`` and
``<name>_test.jsonl`` for each of them. Takes about a minute and a half on two cores.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.config import StudentConfig
from oprd.demo.task import Sum, make_splits, sample_batches, write_sums
from oprd.models.loading import load_model, load_tokenizer
from oprd.observability.progress import duration
from oprd.output_paths import check_output_dir
from oprd.paper.learn import encode as encode_pairs

PROGRESS_SECONDS = 10.0

Text = Callable[[Sum], str]
"""A function that writes the prompt of a sum."""


def columns(s: Sum) -> list[int]:
    """Return the sums of the digits in each column, without carries."""
    return [int(x) + int(y) for x, y in zip(str(s.a), str(s.b), strict=True)]


def carries(s: Sum) -> bool:
    """Return whether every column carries by itself."""
    return all(c > 9 for c in columns(s))


def is_plain(s: Sum) -> bool:
    """Return whether no column carries."""
    return all(c < 10 for c in columns(s))


def with_hint(s: Sum) -> str:
    """Return the answer followed by the prompt, as a teacher sees it in self-distillation."""
    return f"{s.answer}={s.prompt}"


def without_hint(s: Sum) -> str:
    """Return the plain prompt."""
    return s.prompt


def encode(
    sums: list[Sum], text: Text, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts and responses with EOS, right-padded; labels are -100 outside responses."""
    return encode_pairs([text(s) for s in sums], [s.answer for s in sums], tokenizer)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[tuple[list[Sum], Text]],
    steps: int,
    lr: float,
    seed: int,
    warmup: int = 1,
    name: str = "model",
) -> None:
    """Train with supervision, on the tasks in turn. Every 10 seconds a line says how far it is.

    The learning rate rises linearly for ``warmup`` steps and falls linearly to 0.

    Args:
        name: the model's name in these lines.
    """
    print(f"{name}: {steps} steps", flush=True)
    begun = said = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    batches = [sample_batches(sums, 128, seed + i) for i, (sums, _) in enumerate(tasks)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, 1 - step / steps)
        turn = step % len(tasks)
        ids, labels = encode(next(batches[turn]), tasks[turn][1], tokenizer)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS or step + 1 == steps:
            said, left = now, (now - begun) / (step + 1) * (steps - step - 1)
            shown = f"step {step + 1}/{steps}  loss {loss.item():.4f}  eta {duration(left)}"
            print(f"{name}: {shown}", flush=True)


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sums: list[Sum], text: Text
) -> float:
    """Compute the share of sums that greedy decoding gets right."""
    ids, labels = encode(sums, text, tokenizer)
    guess = model(input_ids=ids[:, :-1]).logits.argmax(-1)
    right = (guess == labels[:, 1:]) | (labels[:, 1:] == -100)
    return right.all(-1).float().mean().item()


def make_more(
    output_dir: Path = Path("runs/demo_more"),
    seed: int = 0,
    specialist_steps: int = 300,
    hint_steps: int = 150,
    num_train: int = 3200,
    num_test: int = 500,
) -> None:
    """Train and write the models and their prompts.

    Args:
        output_dir: directory for the models and the ``.jsonl`` files.
        seed: seed of the splits' shuffle and the batches.
        specialist_steps: steps of supervised training of ``carry`` and ``plain``.
        hint_steps: steps of supervised training of ``hinted``.
        num_train: number of training prompts of each kind.
        num_test: number of test prompts of each kind.
    """
    check_output_dir(output_dir)
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("demo:student")
    origin = load_model(StudentConfig(path="demo:student"))
    known = make_splits()
    kinds = {"carry": carries, "plain": is_plain}
    sums: dict[str, tuple[list[Sum], list[Sum]]] = {}
    for kind, belongs in kinds.items():
        chosen = [s for s in known.rest if belongs(s)]
        random.Random(seed).shuffle(chosen)
        sums[kind] = (chosen[num_test:], chosen[:num_test])
    sums["hinted"] = (known.rest[num_test:], known.rest[:num_test])
    tasks: dict[str, list[tuple[list[Sum], Text]]] = {
        kind: [(sums[kind][0], without_hint)] for kind in kinds
    }
    tasks["hinted"] = [(sums["hinted"][0], with_hint)]
    for name, what in tasks.items():
        model = copy.deepcopy(origin).train()
        steps = hint_steps if name == "hinted" else specialist_steps
        train(model, tokenizer, what, steps, 1e-3, seed, name=name)
        model.eval()
        for kind, (_, test) in sums.items():
            texts = (without_hint, with_hint) if kind == name == "hinted" else (without_hint,)
            for text in texts:
                share = accuracy(model, tokenizer, test, text)
                hint = " with the answer before" if text is with_hint else ""
                print(f"{name} on {kind} sums{hint}: {share:.3f}", flush=True)
        model.to(torch.bfloat16).save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)
        write_sums(output_dir / f"{name}.jsonl", sums[name][0][:num_train])
        write_sums(output_dir / f"{name}_test.jsonl", sums[name][1])


if __name__ == "__main__":
    auto_cli(make_more)
