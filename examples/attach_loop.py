"""On-policy distillation of all layers of a Hugging Face model, in a loop of one's own.

    python examples/attach_loop.py                      # the demo's models, on a CPU
    python examples/attach_loop.py --student DIR --teacher DIR --prompts prompts.jsonl --lr 1e-5

Each step the student answers some prompts, the teacher reads the answers, and the student's hidden
states are pulled towards the teacher's. No logits are formed for training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

import oprd

DEMO = Path(oprd.__file__).parent / "demo"


def main(
    student: Path = DEMO / "student",
    teacher: Path = DEMO / "teacher",
    prompts: Path = DEMO / "train.jsonl",
    steps: int = 30,
    batch_size: int = 64,
    max_new_tokens: int = 5,
    lr: float = 1e-3,
    output_dir: Path | None = None,
) -> list[float]:
    """Train, and return the mean cosine between student and teacher at each step."""
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    wise = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with prompts.open(encoding="utf-8") as file:
        asked = [json.loads(line)["prompt"] for line in file if line.strip()]
    if len(asked) < batch_size:
        raise ValueError(f"{prompts} has {len(asked)} prompts: lower batch_size, {batch_size}")

    distiller = oprd.attach(model, wise, layers="all", kind="mse", shift="before")
    del wise  # the distiller keeps what it needs of the teacher
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    cosines = []
    for step in range(steps):
        batch = tokenizer(random.sample(asked, batch_size), return_tensors="pt", padding=True)
        model.eval()
        sequences = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_new_tokens
        )
        model.train()
        ends = model.generation_config.eos_token_id
        masks = oprd.generated_masks(sequences, batch["attention_mask"], ends)
        out = distiller(sequences, *masks)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cosines.append(out.layer_cosine.mean().item())
        print(f"step {step:3}  loss {out.loss.item():.4f}  cosine {cosines[-1]:.3f}")
    distiller.detach()
    if output_dir is not None:
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    return cosines


if __name__ == "__main__":
    auto_cli(main)
