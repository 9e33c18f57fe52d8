"""Make the demo's two models from scratch: ``python -m oprd.demo.make [--output_dir DIR]``.

One supervised run on the addition task (see `oprd.demo.task`) gives both models. The student is the
run's first checkpoint that gets a fifth of the validation sums right. The teacher is the end of the
same run, which gets (nearly) all of them right. The two share their origin, as
DeepSeek-R1-Distill-Qwen-1.5B and JustRL-1.5B do; plain representation distillation relies on that.

Writes ``student/`` and ``teacher/`` (Hugging Face layout, bfloat16 weights) and ``train.jsonl``,
``val.jsonl``, ``test.jsonl``. Takes about two minutes on two cores.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from oprd.demo.task import (
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Sum,
    make_splits,
    make_tokenizer,
    sample_batches,
    write_sums,
)
from oprd.output_paths import check_output_dir


def make_model(
    tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 4
) -> Qwen2ForCausalLM:
    """Make a Qwen2 with 4 heads and an untied head; by default it has 1.06 M parameters."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.06,  # at 0.02, for wider models, it learns three times slower
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def encode(sums: list[Sum], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Encode prompt, answer and EOS, right-padded: (B, PROMPT_TOKENS + RESPONSE_TOKENS)."""
    texts = [s.prompt + s.answer + tokenizer.eos_token for s in sums]
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    encoded = tokenizer(
        texts, padding="max_length", max_length=length, padding_side="right", return_tensors="pt"
    )
    return encoded["input_ids"]


def supervised_loss(model: Qwen2ForCausalLM, ids_BT: torch.Tensor, pad: int) -> torch.Tensor:
    """Compute the mean cross-entropy of the response tokens."""
    logits = model(input_ids=ids_BT[:, :-1]).logits[:, PROMPT_TOKENS - 1 :].flatten(0, 1)
    return cross_entropy(logits, ids_BT[:, PROMPT_TOKENS:].flatten(), ignore_index=pad)


@torch.no_grad()
def greedy_accuracy(model: Qwen2ForCausalLM, ids_BT: torch.Tensor, pad: int) -> float:
    """Compute the share of sums whose response tokens, EOS included, are all the most likely ones.

    This equals greedy decoding, in one forward: a sum is right only if each prefix was.
    """
    guess = model(input_ids=ids_BT[:, :-1]).logits[:, PROMPT_TOKENS - 1 :].argmax(-1)
    target = ids_BT[:, PROMPT_TOKENS:]
    return ((guess == target) | (target == pad)).all(-1).float().mean().item()


def make_pair(
    output_dir: Path = Path(__file__).parent,
    seed: int = 0,
    student_accuracy: float = 0.2,
    decay_accuracy: float = 0.9,
    decay_steps: int = 250,
    max_steps: int = 2000,
    batch_size: int = 128,
    lr: float = 1e-3,
    warmup_steps: int = 50,
) -> None:
    """Train, and write both models with their tokenizer and the three prompt files.

    Args:
        output_dir: directory for ``student``, ``teacher`` and the ``.jsonl`` files.
        seed: seed of the initial weights and the batches.
        student_accuracy: the student is the first checkpoint with this accuracy on ``val``.
        decay_accuracy: accuracy on ``val`` at which the learning rate begins to fall.
        decay_steps: steps in which the learning rate falls linearly to 0; the teacher is the model
            after these steps.
        max_steps: raise an error if ``decay_accuracy`` is not reached after so many steps.
        batch_size: number of sums per step.
        lr: peak learning rate of AdamW.
        warmup_steps: steps in which the learning rate rises linearly to ``lr``.
    """
    check_output_dir(output_dir)
    torch.manual_seed(seed)
    splits, tokenizer = make_splits(), make_tokenizer()
    pad = tokenizer.pad_token_id
    val_ids = encode(splits.val, tokenizer)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    batches = sample_batches(splits.rest, batch_size, seed)
    student, decay_from = None, None
    for step in range(1, max_steps + decay_steps + 1):
        factor = min(1.0, step / warmup_steps)
        if decay_from is not None:
            factor = 1 - (step - decay_from) / decay_steps
        optimizer.param_groups[0]["lr"] = lr * factor
        loss = supervised_loss(model, encode(next(batches), tokenizer), pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10:
            continue
        accuracy = greedy_accuracy(model, val_ids, pad)
        print(f"step {step}  loss {loss.item():.4f}  val accuracy {accuracy:.3f}", flush=True)
        if student is None and accuracy >= student_accuracy:
            student = copy.deepcopy(model)
            print(f"student: step {step}")
        if decay_from is None and accuracy >= decay_accuracy:
            decay_from = step
        if decay_from is not None and step >= decay_from + decay_steps:
            print(f"teacher: step {step}")
            break
        if decay_from is None and step >= max_steps:
            raise RuntimeError(
                f"after {max_steps} steps the validation accuracy is {accuracy:.3f}, below "
                f"{decay_accuracy}: raise --max_steps or choose another --seed"
            )

    assert student is not None
    for name, net in {"student": student, "teacher": model}.items():
        net.to(torch.bfloat16).save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)
    for name in ("train", "val", "test"):
        write_sums(output_dir / f"{name}.jsonl", getattr(splits, name))


if __name__ == "__main__":
    auto_cli(make_pair)
