"""Loading models and tokenizers, and checking that a pair fits together."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oprd.config import StudentConfig, TeacherConfig
from oprd.errors import ConfigError, Unreachable, is_unreachable

DEMO = Path(__file__).parents[1] / "demo"


def demo_path(path: str) -> str:
    """``demo:NAME`` is a file or directory that comes with the package."""
    return str(DEMO / path.removeprefix("demo:")) if path.startswith("demo:") else path


def teacher_path(teacher: TeacherConfig, student: StudentConfig) -> str:
    """Where a teacher's files are: the student's, if that teaches itself."""
    return student.path if teacher.is_self else teacher.path


def load_config(path: str) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        ConfigError: if there is none at ``path``.
    """
    try:
        return AutoConfig.from_pretrained(demo_path(path))
    except (OSError, ValueError) as error:
        raise _not_loadable("model", path, error) from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer; its padding token falls back to EOS.

    Raises:
        ConfigError: if there is none at ``path``, or it has no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo_path(path))
    except (OSError, ValueError) as error:
        raise _not_loadable("tokenizer", path, error) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {path} has no EOS token: responses could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _not_loadable(what: str, path: str, error: Exception) -> ConfigError:
    place = demo_path(path)
    if Path(place).is_dir():
        return ConfigError(f"the {what} in {place} can't be loaded: {error}")
    kind = Unreachable if is_unreachable(error) else ConfigError
    return kind(
        f"no {what} at {path!r}: it is not a directory on this machine, and loading it from the "
        f"hub failed: {str(error).splitlines()[0]}"
    )


def load_model(
    cfg: StudentConfig | TeacherConfig, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal LM in evaluation mode.

    Raises:
        ConfigError: if there is none at its path.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            demo_path(cfg.path),
            dtype=getattr(torch, cfg.dtype),
            attn_implementation=cfg.attn_implementation,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loadable("model", cfg.path, error) from error
    return model.to(device).eval()


def unwritten_model(
    config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A causal LM on the CPU whose weights and buffers hold nothing yet and, until they are
    written, take no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def empty_model(cfg: StudentConfig | TeacherConfig) -> PreTrainedModel:
    """The model that `load_model` would load, as an `unwritten_model`.

    Raises:
        ConfigError: as `load_config`.
    """
    dtype = getattr(torch, cfg.dtype)
    model = unwritten_model(load_config(cfg.path), dtype, cfg.attn_implementation)
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(demo_path(cfg.path))
    return model.eval()
