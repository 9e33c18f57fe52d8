"""Export of a checkpoint's student in Hugging Face format."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from oprd.checkpoint import Checkpoint, save_student
from oprd.checkpoint.files import read_best, step_name
from oprd.checkpoint.resume import CHECKPOINTS, locate
from oprd.checkpoint.state import load
from oprd.checkpoint.writer import STUDENT
from oprd.config import LoraConfig, StudentConfig
from oprd.errors import ConfigError
from oprd.models.loading import load_model, load_tokenizer, unwritten_model
from oprd.models.lora import add_adapter, is_adapted, merged_weights
from oprd.output_paths import check_writable

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


def choose(path: Path, best: bool) -> Checkpoint:
    """Return the newest checkpoint at ``path``, or the best one.

    Args:
        path: a checkpoint or the directory of a run.
        best: return the checkpoint that ``checkpoint.keep_best`` keeps.

    Raises:
        ConfigError: if there is no such checkpoint.
    """
    checkpoints, torn = locate(path)
    for other, why in torn.items():
        logger.info(f"{other} is not whole and left out: {why}")
    if not best:
        return checkpoints[0]
    kept = read_best(path / CHECKPOINTS)
    if kept is None:
        raise ConfigError(
            f"--best: {path} keeps no best checkpoint: expected the directory of a run with "
            "checkpoint.keep_best"
        )
    return locate(path / CHECKPOINTS / step_name(kept["step"]))[0][0]


def adapted_student(checkpoint: Checkpoint) -> StudentConfig | None:
    """Return the configuration of a checkpoint's student, or None if it has no LoRA adapter."""
    values = checkpoint.document.get("settings", {}).get("student", {})
    if values.get("lora", {}).get("rank") is None:
        return None
    return StudentConfig(**values | {"lora": LoraConfig(**values["lora"])})


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a LoRA student with the adapter merged into the weights."""
    plain = unwritten_model(model.config, model.dtype)
    plain.load_state_dict(dict(merged_weights(model)), strict=False)  # a tied head is missing
    for name, buffer in model.named_buffers():
        plain.get_buffer(name.replace(".base_layer", "")).copy_(buffer)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def load_student(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the student of a checkpoint on the CPU.

    Raises:
        ConfigError: if the checkpoint's weights do not fit the model that its configuration
            describes.
    """
    directory = checkpoint.path / STUDENT
    if (adapted := adapted_student(checkpoint)) is not None:
        model = load_model(adapted)  # the checkpoint holds only the adapter
        add_adapter(model, adapted.lora)
        load(checkpoint.path, model)
        return model
    config = AutoConfig.from_pretrained(directory)
    model = unwritten_model(config, config.dtype or torch.float32)
    load(checkpoint.path, model)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def export(checkpoint: Checkpoint, output: Path, dtype: str | None = None) -> None:
    """Write a checkpoint's student to ``output`` in Hugging Face format.

    Args:
        dtype: dtype of the written weights; None: the dtype they were trained in. If a dtype is
            given, a LoRA student is written only in merged form, without ``adapter/``.

    Raises:
        ConfigError: if ``output`` is not empty, or the checkpoint can't be loaded.
    """
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and would be lost: choose a new directory")
    check_writable(output)
    model = load_student(checkpoint)
    if dtype is not None:
        if is_adapted(model):  # merge first, so that the sum is rounded only once
            model = merged(model)
        model.to(getattr(torch, dtype))
    save_student(model, load_tokenizer(str(checkpoint.path / STUDENT)), output)
