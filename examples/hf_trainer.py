"""OPRD's loss in Hugging Face's `Trainer`, on texts that are already there (off-policy).

    python examples/hf_trainer.py                       # the demo's models, on a CPU
    accelerate launch --multi_gpu --num_processes 2 examples/hf_trainer.py   # on CPUs too (gloo)
    accelerate launch examples/hf_trainer.py --student DIR --teacher DIR --texts texts.jsonl \\
        --lr 1e-5 --bf16 true

(``accelerate launch --cpu`` starts a single process, whatever ``--num_processes`` is.)

`OPRDTrainer` can be copied as it is. With it, the loss and the gradient do not depend on how a step
is split into micro-batches and over processes, and ``bf16=True`` holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import oprd

DEMO = Path(oprd.__file__).parent / "demo"


class OPRDTrainer(Trainer):
    """A `Trainer` whose loss compares the student's hidden states with a teacher's.

    Batches hold ``input_ids``, ``attention_mask`` and ``response_mask``, each (B, T).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        teacher: nn.Module,
        distill: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            teacher: load it in the dtype it should run in.
            distill: options of `oprd.attach`.
        """
        args.remove_unused_columns = False  # the model's signature knows no response_mask
        args.label_names = ["response_mask"]  # so that evaluation asks for the loss
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True  # divides by `get_batch_samples`' count, nothing else
        self.distiller = oprd.attach(self.model, teacher.to(args.device), **(distill or {}))
        self.distiller.freeze_unreached()  # DDP would wait for the LM head's gradient

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Count the supervised tokens of a whole step, where the `Trainer` counts labels."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = sum(self.distiller.supervise(b["response_mask"]).total for b in batches)
        everywhere = self.accelerator.reduce(torch.tensor(float(total), device=device), "sum")
        return batches, everywhere / self.accelerator.num_processes  # DDP averages gradients

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``model`` is the student as accelerate has wrapped it; its autocast and DDP hold."""
        denominator = num_items_in_batch if model.training else None
        out = self.distiller(**inputs, model=model, denominator=denominator)
        return (out.loss, {}) if return_outputs else out.loss


def main(
    student: Path = DEMO / "student",
    teacher: Path = DEMO / "teacher",
    texts: Path = DEMO / "train.jsonl",
    output_dir: Path = Path("runs/hf_trainer"),
    steps: int = 20,
    batch_size: int = 16,
    accumulate: int = 2,
    lr: float = 1e-3,
    bf16: bool = False,
) -> OPRDTrainer:
    """Train on the file's ``prompt`` and ``answer``, and save the student in ``output_dir``."""
    cpu = not torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="right")
    dtype = torch.bfloat16 if bf16 else torch.float32

    with texts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]

    def collate(rows: list[dict[str, str]]) -> dict[str, Tensor]:
        rollouts = []
        for row in rows:
            prompt = tokenizer(row["prompt"]).input_ids
            answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
            rollouts.append(
                oprd.Rollout(prompt, [*answer, tokenizer.eos_token_id], truncated=False)
            )
        batch = oprd.collate(rollouts, tokenizer.pad_token_id, "cpu")
        assert batch.attention_mask is not None
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "response_mask": batch.response_mask,
        }

    trainer = OPRDTrainer(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        TrainingArguments(
            str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            learning_rate=lr,
            bf16=bf16,
            use_cpu=cpu,
            logging_steps=max(steps // 10, 1),
            save_strategy="no",
            report_to=[],
        ),
        teacher=AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype),
        distill={"layers": "all", "kind": "mse", "shift": "before"},
        data_collator=collate,
        train_dataset=rows,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    auto_cli(main)
