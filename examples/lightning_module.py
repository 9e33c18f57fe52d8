"""OPRD as a `LightningModule`: the student answers, the teacher reads, the states are compared.

    python examples/lightning_module.py                 # the demo's models, on a CPU
    python examples/lightning_module.py --student DIR --teacher DIR --prompts prompts.jsonl \\
        --lr 1e-5 --precision bf16-mixed

`OPRDModule` can be copied as it is. Lightning runs `training_step` inside its autocast and inside
DDP's forward, so the distiller needs to know of neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import oprd

DEMO = Path(oprd.__file__).parent / "demo"


class OPRDModule(lightning.LightningModule):
    """Trains ``student``. Batches are what a tokenizer returns for prompts, padded on the left."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, lr: float, max_new_tokens: int, **distill: Any
    ) -> None:
        """
        Args:
            distill: options of `oprd.attach`.
        """
        super().__init__()
        self.student, self.lr, self.max_new_tokens = student.train(), lr, max_new_tokens
        self.distiller = oprd.attach(student, teacher, **distill)
        self.distiller.freeze_unreached()  # DDP would wait for the LM head's gradient
        # In a list, or the teacher would be saved in every checkpoint and trained by DDP.
        self.teacher = [teacher]

    def setup(self, stage: str) -> None:
        """Bring the teacher to where the student is."""
        self.teacher[0].to(self.trainer.strategy.root_device)

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        """Sample a response to each prompt, and return the loss."""
        student: Any = self.student
        student.eval()
        sequences = student.generate(
            **batch, do_sample=True, top_k=0, max_new_tokens=self.max_new_tokens
        )
        student.train()
        ends = student.generation_config.eos_token_id
        attention, response = oprd.generated_masks(sequences, batch["attention_mask"], ends)
        # One mean over the tokens of all processes: DDP averages what each of them adds. (Lightning
        # averages the micro-batches of accumulate_grad_batches, so those weigh alike.)
        count = torch.tensor(float(self.distiller.supervise(response).total), device=self.device)
        total = self.all_gather(count).sum().clamp(min=1)
        denominator = total / self.trainer.world_size
        out = self.distiller(sequences, attention, response, denominator=denominator)
        self.log("rep_loss", out.loss, prog_bar=True, sync_dist=True)
        self.log("cosine", out.layer_cosine.mean(), prog_bar=True, sync_dist=True)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what the loss reaches."""
        trained = [p for p in self.student.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, self.lr, weight_decay=0.01)


def main(
    student: Path = DEMO / "student",
    teacher: Path = DEMO / "teacher",
    prompts: Path = DEMO / "train.jsonl",
    output_dir: Path = Path("runs/lightning"),
    steps: int = 30,
    batch_size: int = 64,
    max_new_tokens: int = 5,
    lr: float = 1e-3,
    precision: Any = "32-true",
    devices: int = 1,
) -> lightning.Trainer:
    """Train on the file's prompts, and save the student in ``output_dir``."""
    lightning.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    with prompts.open(encoding="utf-8") as file:
        asked = [json.loads(line)["prompt"] for line in file if line.strip()]
    loader: DataLoader = DataLoader(
        asked,  # type: ignore[arg-type]
        batch_size,
        shuffle=True,
        collate_fn=lambda rows: dict(tokenizer(rows, return_tensors="pt", padding=True)),
    )
    module = OPRDModule(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        lr,
        max_new_tokens,
        layers="all",
        kind="mse",
        shift="before",
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        devices=devices,
        precision=precision,
        default_root_dir=output_dir,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        module.student.save_pretrained(output_dir)  # type: ignore[operator]
    return trainer


if __name__ == "__main__":
    auto_cli(main)
