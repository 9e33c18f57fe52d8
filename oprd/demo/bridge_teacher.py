"""Make the teacher of the Bridge demo: ``python -m oprd.demo.bridge_teacher [--output_dir DIR]``.

It learns the demo's task from nothing, so that it shares no origin with the demo's student, and has
another depth and width: five layers, 160 wide, against four and 128. The tokenizer is the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli

from oprd.demo.make import make_model
from oprd.demo.more import accuracy, train, without_hint
from oprd.demo.task import make_splits, make_tokenizer


def make_teacher(
    output_dir: Path = Path("runs/demo_bridge"), seed: int = 1, steps: int = 1800
) -> None:
    """Train it and write it to ``other/``.

    Args:
        output_dir: where.
        seed: of the initial weights and the batches.
        steps: of supervised training.
    """
    known, tokenizer = make_splits(), make_tokenizer()
    torch.manual_seed(seed)
    model = make_model(tokenizer, width=160, layers=5).train()
    train(model, tokenizer, [(known.rest, without_hint)], steps, 1e-3, seed, warmup=50)
    share = accuracy(model.eval(), tokenizer, known.val, without_hint)
    print(f"validation accuracy {share:.3f}")
    model.to(torch.bfloat16).save_pretrained(output_dir / "other")
    tokenizer.save_pretrained(output_dir / "other")


if __name__ == "__main__":
    auto_cli(make_teacher)
