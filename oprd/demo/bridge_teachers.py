"""Make the teachers of the Bridge demos: ``python -m oprd.demo.bridge_teachers [--output_dir ..]``.

Both learn the demo's task from nothing, so that they share no origin with the demo's student, and
have another depth and width: five layers, 160 wide, against four and 128.

- ``other/`` has the student's tokenizer;
- ``pairs/`` reads digits two at a time: its vocabulary is another, so that distributions over the
  next token can't be compared at all.

Takes about six minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli

from oprd.demo.make import make_model
from oprd.demo.more import accuracy, train, without_hint
from oprd.demo.task import make_pair_tokenizer, make_splits, make_tokenizer


def make_teachers(
    output_dir: Path = Path("runs/demo_bridge"), seed: int = 1, steps: int = 1800
) -> None:
    """Train and write both.

    Args:
        output_dir: where.
        seed: of the initial weights and the batches.
        steps: of supervised training.
    """
    known = make_splits()
    for name, tokenizer in {"other": make_tokenizer(), "pairs": make_pair_tokenizer()}.items():
        torch.manual_seed(seed)
        model = make_model(tokenizer, width=160, layers=5).train()
        train(model, tokenizer, [(known.rest, without_hint)], steps, 1e-3, seed, warmup=50)
        model.eval()
        share = accuracy(model, tokenizer, known.val, without_hint)
        print(f"{name}: validation accuracy {share:.3f}", flush=True)
        model.to(torch.bfloat16).save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)


if __name__ == "__main__":
    auto_cli(make_teachers)
