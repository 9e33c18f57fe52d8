"""A checkpoint's student in Hugging Face's layout."""

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

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


def choose(path: Path, best: bool) -> Checkpoint:
    """The checkpoint that the command line means.

    Raises:
        ConfigError: if there is none.
    """
    found, torn = locate(path)
    for other, why in torn.items():
        logger.info(f"{other} is not whole and left out: {why}")
    if not best:
        return found[0]
    kept = read_best(path / CHECKPOINTS)
    if kept is None:
        raise ConfigError(
            f"--best: {path} keeps no best checkpoint: expected the directory of a run with "
            "checkpoint.keep_best"
        )
    return locate(path / CHECKPOINTS / step_name(kept["step"]))[0][0]


def adapted_student(checkpoint: Checkpoint) -> StudentConfig | None:
    """The configuration of a checkpoint's student, if that was trained by LoRA."""
    values = checkpoint.document.get("settings", {}).get("student", {})
    if values.get("lora", {}).get("rank") is None:
        return None
    return StudentConfig(**values | {"lora": LoraConfig(**values["lora"])})


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A LoRA student as a model without an adapter, with weights of its own."""
    plain = unwritten_model(model.config, model.dtype)
    plain.load_state_dict(dict(merged_weights(model)), strict=False)  # a tied head comes once
    for name, buffer in model.named_buffers():
        plain.get_buffer(name.replace(".base_layer", "")).copy_(buffer)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def load_student(checkpoint: Checkpoint) -> PreTrainedModel:
    """The student of a checkpoint, on the CPU.

    Raises:
        ConfigError: if the checkpoint is of another model than its own configuration says.
    """
    directory = checkpoint.path / STUDENT
    if (adapted := adapted_student(checkpoint)) is not None:
        model = load_model(adapted)  # of which the checkpoint holds the adapter alone
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
    """Write a checkpoint's student in Hugging Face's layout.

    Args:
        dtype: of the weights; None: as they were trained. (With one, a LoRA student is written
            merged alone, without ``adapter/``.)

    Raises:
        ConfigError: if ``output`` holds anything, or the checkpoint can't be loaded.
    """
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and would be lost: choose a new directory")
    model = load_student(checkpoint)
    if dtype is not None:
        if is_adapted(model):  # rounded once, after the adapter was added
            model = merged(model)
        model.to(getattr(torch, dtype))
    save_student(model, load_tokenizer(str(checkpoint.path / STUDENT)), output)
