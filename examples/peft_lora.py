"""A LoRA adapter (PEFT) trained by the representation loss; the weights of the model stay.

    python examples/peft_lora.py                        # the demo's models, on a CPU
    python examples/peft_lora.py --student DIR --teacher DIR --texts texts.jsonl --lr 1e-4

`attach` takes the PEFT model as it is. ``output_dir`` gets the adapter alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from jsonargparse import auto_cli
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import oprd

DEMO = Path(oprd.__file__).parent / "demo"


def main(
    student: Path = DEMO / "student",
    teacher: Path = DEMO / "teacher",
    texts: Path = DEMO / "train.jsonl",
    output_dir: Path | None = None,
    steps: int = 30,
    batch_size: int = 64,
    rank: int = 16,
    lr: float = 3e-3,
) -> list[float]:
    """Train on the file's ``prompt`` and ``answer``, and return the loss of each step."""
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(student)
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    # Not on lm_head, which this loss gives no gradient. Prompt tuning is refused: it adds tokens.
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))
    wise = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    distiller = oprd.attach(model, wise, layers="all", kind="mse", shift="before")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr)
    with texts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if len(rows) < batch_size:
        raise ValueError(f"{texts} has {len(rows)} texts: lower batch_size, {batch_size}")
    losses = []
    for step in range(steps):
        rollouts = []
        for row in random.sample(rows, batch_size):
            prompt = tokenizer(row["prompt"]).input_ids
            answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
            rollouts.append(
                oprd.Rollout(prompt, [*answer, tokenizer.eos_token_id], truncated=False)
            )
        batch = oprd.collate(rollouts, tokenizer.pad_token_id, model.device)
        loss = distiller(batch.input_ids, batch.attention_mask, batch.response_mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:3}  loss {losses[-1]:.4f}")
    distiller.detach()
    if output_dir is not None:
        model.save_pretrained(str(output_dir))
    return losses


if __name__ == "__main__":
    auto_cli(main)
