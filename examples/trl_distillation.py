"""TRL's on-policy `DistillationTrainer` with the representation loss.

    pip install 'trl==1.16.*'
    python examples/trl_distillation.py                 # the demo's models, on a CPU
    accelerate launch examples/trl_distillation.py --student DIR --teacher DIR \\
        --prompts prompts.jsonl --max_completion_length 4096 --lr 1e-5 --bf16 true

`OPRDDistillationTrainer` can be copied as it is. TRL samples the responses, with `generate` or
vLLM, and they are taken as they are; its options, logs and checkpoints stay. Its divergence between
next-token distributions is replaced by the representation loss, or added to it:

    loss = rep_weight * representation loss + logits_weight * TRL's divergence

With ``logits_weight=0`` neither LM head is computed; `examples/trl_memory.py` measures what that
saves. With both, the teacher runs twice: TRL runs it after the student, and the taps need it
before. And TRL 1.16 runs the student past accelerate's autocast: with ``bf16=True`` and a float32
student, its own loss, and so the sum of both, is computed in float32. The representation loss alone
is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from jsonargparse import auto_cli
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

import oprd

DEMO = Path(oprd.__file__).parent / "demo"
TRL = "1.16"


def check_trl(version: str = trl.__version__) -> None:
    """Check that TRL is the version whose internals this file was written for.

    Raises:
        ImportError: if it is not.
    """
    if version.rsplit(".", version.count(".") - 1)[0] != TRL:
        raise ImportError(
            f"OPRDDistillationTrainer overrides parts of TRL {TRL}'s DistillationTrainer, and TRL "
            f"{version} is installed: pip install 'trl=={TRL}.*', or compare "
            "_generate_and_score_completions and compute_loss of the two versions and change TRL"
        )


class OPRDDistillationTrainer(DistillationTrainer):
    """TRL's trainer with a representation loss between the student's and the teacher's states."""

    def __init__(
        self,
        *args: Any,
        rep_weight: float = 1.0,
        logits_weight: float = 0.0,
        distill: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            rep_weight, logits_weight: weights of the representation loss and of TRL's own.
            distill: options of `oprd.attach`.

        Raises:
            ImportError: if TRL is another version.
            ValueError: if there is no local teacher.
        """
        check_trl()
        super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError("teacher_model is None: hidden states need a teacher in this process")
        self.rep_weight, self.logits_weight = rep_weight, logits_weight
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        self.distiller = oprd.attach(self.model, teacher, **(distill or {}))
        if not logits_weight:
            self.distiller.freeze_unreached()  # DDP would wait for the LM head's gradient

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Count what is supervised in the responses of a whole step, as TRL counts their tokens."""
        output = super()._generate_and_score_completions(inputs)
        chosen = self.distiller.supervise(response_mask(output))
        count = torch.tensor(float(chosen.total), device=self.accelerator.device)
        output["num_supervised"] = self.accelerator.gather(count).sum()
        return output

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the weighted sum of both losses for a micro-batch."""
        if "pixel_values" in inputs:
            raise ValueError("prompts with images: oprd compares states of texts only")
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        response = response_mask(inputs)
        denominator = None
        if self.model.training:  # DDP averages gradients over processes
            total = inputs["num_supervised"].clamp(min=1)
            denominator = total / self.accelerator.num_processes
        if not self.logits_weight:
            out = self.distiller(ids, attention, response, denominator=denominator, model=model)
            loss = self.rep_weight * out.loss
        else:
            chosen = self.distiller.supervise(response)
            states = self.distiller.teacher_states(ids, attention, chosen.teacher_rows)
            if denominator is None:
                denominator = max(chosen.total, 1)
            taps = self.distiller.taps(states, chosen.rows, chosen.weights, denominator)
            with taps as session:  # inside, TRL runs the student as it always does
                divergence = super().compute_loss(model, inputs, False, num_items_in_batch)
            out = session.output()
            loss = self.rep_weight * out.loss + self.logits_weight * divergence
        mode = "train" if self.model.training else "eval"
        cosine = self.accelerator.gather_for_metrics(out.layer_cosine.mean()).mean().item()
        self._metrics[mode]["rep_cosine"].append(cosine)
        return (loss, None) if return_outputs else loss


def response_mask(inputs: dict[str, Tensor]) -> Tensor:
    """Return (B, P + R) bool: the tokens that the student wrote, without the results of tools."""
    written = inputs["completion_mask"]
    if "tool_mask" in inputs:
        written = written * inputs["tool_mask"]
    return torch.cat([torch.zeros_like(inputs["prompt_mask"]), written], dim=1).bool()


def main(
    student: Path = DEMO / "student",
    teacher: Path = DEMO / "teacher",
    prompts: Path = DEMO / "train.jsonl",
    output_dir: Path = Path("runs/trl"),
    steps: int = 20,
    batch_size: int = 16,
    accumulate: int = 2,
    max_completion_length: int = 5,
    lr: float = 1e-3,
    logits_weight: float = 0.0,
    bf16: bool = False,
) -> OPRDDistillationTrainer:
    """Train on the file's prompts, and save the student in ``output_dir``."""
    with prompts.open(encoding="utf-8") as file:
        asked = [json.loads(line)["prompt"] for line in file if line.strip()]
    trainer = OPRDDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(
            teacher, dtype=torch.bfloat16 if bf16 else torch.float32
        ),
        args=DistillationConfig(
            str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            max_completion_length=max_completion_length,
            learning_rate=lr,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=max(steps // 10, 1),
            save_strategy="no",
            report_to=[],
        ),
        processing_class=AutoTokenizer.from_pretrained(student, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": text} for text in asked]),
        logits_weight=logits_weight,
        distill={"layers": "all", "kind": "mse", "shift": "before"},
    )
    wanted = batch_size * accumulate * trainer.accelerator.num_processes
    if len(asked) < wanted:  # TRL leaves out the rest of the prompts, which would be all of them
        raise ValueError(
            f"{prompts} has {len(asked)} prompts, a step takes {wanted}: lower batch_size, "
            f"{batch_size}, or accumulate, {accumulate}"
        )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    auto_cli(main)
