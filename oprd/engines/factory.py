"""Construction of a run's engine, and the check of its log-prob gap."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.config import TrainConfig
from oprd.data.rollout import Rollout
from oprd.distributed.fsdp import input_device
from oprd.engines.base import Engine
from oprd.engines.cached_rows import why_not
from oprd.engines.continuous import ContinuousEngine
from oprd.engines.generate import Autocast, GenerateEngine, eos_ids
from oprd.engines.logprob_gap import LogprobGap, logprob_gap
from oprd.engines.vllm.engine import VllmEngine, engine_dtype, longest_sequence, max_logprob_gap
from oprd.engines.vllm.environment import engine_threads
from oprd.models.weights import full_weights


def make_engine(
    cfg: TrainConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    directory: Path,
    autocast: Autocast,
) -> Engine:
    """Make the engine that samples the student's responses. Collective.

    Args:
        directory: the run's directory; vLLM's configurations and logs go to its ``vllm/rank_N``.
        autocast: makes the autocast context that the student runs in.

    Raises:
        EngineFailure: if the engine does not start.
    """
    if cfg.rollout.engine != "vllm":
        size = cfg.rollout.batch_size
        return engine_on(student, tokenizer, cfg.rollout.engine, size, autocast)
    return VllmEngine(
        replace(cfg.rollout.vllm, sleep=cfg.rollout.sleeps),
        model_config=student.config,
        weights=lambda: full_weights(student),
        ends=eos_ids(student, tokenizer),
        device=device,
        dtype=engine_dtype(cfg),
        max_model_len=longest_sequence(cfg),
        directory=directory / "vllm",
        threads=engine_threads(cfg, device),
    )


def kind_on(kind: str, device: torch.device) -> str:
    """Return the kind of engine that ``auto`` is on a device; other kinds as they are."""
    if kind != "auto":
        return kind
    return "continuous" if device.type == "cpu" else "generate"


def engine_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    batch_size: int | None = None,
    autocast: Autocast = contextlib.nullcontext,
) -> GenerateEngine:
    """Make an engine that samples with a model itself.

    Args:
        kind: ``continuous``, and ``auto`` on a CPU: `ContinuousEngine`, if it can sample from the
            model; else, and for other kinds: `GenerateEngine`.
    """
    wanted = kind_on(kind, input_device(model)) == "continuous"
    continuous = wanted and why_not(model.config, type(model)) is None
    cls = ContinuousEngine if continuous else GenerateEngine
    return cls(model, tokenizer, batch_size, autocast)


def rollout_gap(
    cfg: TrainConfig,
    student: PreTrainedModel,
    rollouts: Sequence[Rollout],
    device: torch.device,
) -> LogprobGap | None:
    """Compute `logprob_gap` with the settings of the run. Collective."""
    return logprob_gap(
        student,
        rollouts,
        last=cfg.rollout.vllm.gap_tokens,
        max_tokens=cfg.micro_batch_tokens,
        pad_id=rollouts[0].prompt_ids[0] if rollouts else 0,
        device=device,
    )


def too_wide(cfg: TrainConfig, gap: LogprobGap, version: int) -> str | None:
    """Return an error message if the gap exceeds the run's threshold, else None.

    Args:
        version: the engine's ``policy_version``.
    """
    limit = max_logprob_gap(cfg)
    if gap.mean <= limit:
        return None
    return (
        "the vLLM engine samples from other probabilities than the student's: the log-probs of "
        f"{gap.tokens} tokens differ by {gap.mean:.3g} on average (at most {gap.max:.3g}), more "
        f"than {limit:g}. Either the engine's weights are not those of step {version}, or vLLM "
        "computes this model differently. Compare with a run with rollout.engine=generate; if "
        "only rounding differs, raise rollout.vllm.max_logprob_gap"
    )
