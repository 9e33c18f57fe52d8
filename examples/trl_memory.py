"""What the representation loss saves in TRL's `DistillationTrainer`: peak memory of one update.

    python examples/trl_memory.py
    python examples/trl_memory.py --width 1536 --layers 28 --vocabulary 151936 --tokens 4096

Each loss gets a process of its own, the same random models and tokens, and one update before the
one that is measured. "Peak" is how far memory rises above what was in use when the update began
(the models are there already, gradients are not): on a GPU by its allocator, on a CPU by the
kernel's high-water mark of the process. On a CPU, TRL's chunks go through plain PyTorch, with
copies of a chunk that its Triton kernels do not make: only a GPU tells what is saved there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Literal

import torch
from datasets import Dataset
from jsonargparse import auto_cli
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl import DistillationConfig
from trl.experimental.gkd import GKDTrainer
from trl_distillation import OPRDDistillationTrainer

from oprd.demo.task import make_tokenizer
from oprd.observability.memory import PeakMemory, freed_at_once

LOSSES = {
    "rep": "representation loss, all layers",
    "trl": "DistillationTrainer's own, logits in chunks",
    "both": "the sum of these two",
    "gkd": "GKDTrainer's, logits of all tokens",
}


def peak_mib(
    loss: str, width: int, layers: int, vocabulary: int, batch: int, tokens: int, prompt: int
) -> float:
    """Return the peak of one forward and backward pass of the student, in MiB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def model(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=width // 64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        return Qwen2ForCausalLM(config).bfloat16().to(device)

    with tempfile.TemporaryDirectory() as directory:
        trainer = OPRDDistillationTrainer(
            model=model(0),
            teacher_model=model(1),
            args=DistillationConfig(
                directory, bf16=False, use_cpu=device.type == "cpu", report_to=[]
            ),
            processing_class=make_tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
            rep_weight=0.0 if loss == "trl" else 1.0,
            logits_weight=0.0 if loss == "rep" else 1.0,
            distill={"positions": "all"},
        )
    student = trainer.model
    student.gradient_checkpointing_enable({"use_reentrant": False})  # TRL's default
    student.train()
    ids = torch.randint(2, vocabulary, (batch, tokens), device=device)
    mask = torch.ones_like(ids)
    count = torch.tensor(float(batch * (tokens - prompt)), device=device)
    inputs = {
        "prompt_ids": ids[:, :prompt], "completion_ids": ids[:, prompt:],
        "prompt_mask": mask[:, :prompt], "completion_mask": mask[:, prompt:],
        "num_items_in_batch": count, "num_supervised": count,
    }  # fmt: skip

    def update() -> None:
        student.zero_grad(set_to_none=True)
        if loss == "gkd":
            at = slice(prompt - 1, -1)
            with torch.no_grad():
                theirs = trainer.teacher_model(ids, attention_mask=mask).logits[:, at]
            ours = student(ids, attention_mask=mask, use_cache=False).logits[:, at]
            value = GKDTrainer.generalized_jsd_loss(ours, theirs, beta=1.0)
        elif loss == "trl":  # without the taps, which a weight of 0 would leave in
            value = super(OPRDDistillationTrainer, trainer).compute_loss(student, inputs)
        else:
            value = trainer.compute_loss(student, inputs)
        value.backward()

    with freed_at_once():
        update()
        student.zero_grad(set_to_none=True)
        with PeakMemory(device) as peak:
            update()
    if peak.delta is None:
        raise RuntimeError("this system does not report its peak memory")
    return peak.delta / 2**20


def main(
    loss: Literal["rep", "trl", "both", "gkd"] | None = None,
    width: int = 256,
    layers: int = 4,
    vocabulary: int = 32768,
    batch: int = 2,
    tokens: int = 1024,
    prompt: int = 128,
) -> dict[str, float]:
    """Measure one loss, or print a table of all of them. Returns MiB by loss."""
    if loss is not None:
        found = peak_mib(loss, width, layers, vocabulary, batch, tokens, prompt)
        print(f"MiB {found:.1f}")
        return {loss: found}
    sizes = {"width": width, "layers": layers, "vocabulary": vocabulary}
    sizes |= {"batch": batch, "tokens": tokens, "prompt": prompt}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    print(
        f"{batch} x {tokens} tokens, width {width}, {layers} layers, vocabulary {vocabulary}, bf16"
    )
    table = {}
    for name, what in LOSSES.items():
        command = [sys.executable, __file__, "--loss", name, *options]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        table[name] = float(result.stdout.split("MiB ")[1])
        print(f"{what:45} {table[name]:8.0f} MiB", flush=True)
    return table


if __name__ == "__main__":
    auto_cli(main)
