"""Loading of models, their configurations and tokenizers."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oprd import hub
from oprd.config import StudentConfig, TeacherConfig
from oprd.errors import ConfigError, Unreachable, is_unreachable
from oprd.models.liger import apply_liger

DEMO = Path(__file__).parents[1] / "demo"


def demo_path(path: str) -> str:
    """Replace ``demo:NAME`` by the path of that file or directory in the package."""
    return str(DEMO / path.removeprefix("demo:")) if path.startswith("demo:") else path


def teacher_path(teacher: TeacherConfig, student: StudentConfig) -> str:
    """Return the path of a teacher's files: the student's path if the student teaches itself."""
    return student.path if teacher.is_self else teacher.path


def load_config(path: str) -> PretrainedConfig:
    """Load a model's configuration.

    Raises:
        ConfigError: if it can't be loaded from ``path``.
    """
    try:
        return AutoConfig.from_pretrained(_place(path))
    except (OSError, ValueError) as error:
        raise _not_loadable("model", path, error) from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. If it has no padding token, EOS becomes the padding token.

    Raises:
        ConfigError: if it can't be loaded from ``path``, or if it has no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_place(path))
    except (OSError, ValueError) as error:
        raise _not_loadable("tokenizer", path, error) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {path} has no EOS token: responses could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _place(path: str) -> str:
    """Return what `transformers` calls ``path``. If it is no directory, it is taken for a name on
    the hub, which is left out if it can't be reached."""
    place = demo_path(path)
    if not Path(place).is_dir():
        hub.leave_out_if_unreachable()
    return place


def _not_loadable(what: str, path: str, error: Exception) -> ConfigError:
    place = Path(demo_path(path))
    if place.is_dir():
        return ConfigError(f"the {what} in {place} can't be loaded: {error}")
    missing = f"no {what} at {path!r}: there is no such directory on this machine{_similar(place)}"
    if is_unreachable(error):
        return Unreachable(f"{missing}, it is not in the hub's cache, and {hub.why_unreachable()}")
    return ConfigError(
        f"{missing}, and loading it from the hub failed: {str(error).splitlines()[0]}"
    )


def _similar(place: Path) -> str:
    """Ask whether a directory with a similar name is meant, if there is one."""
    above = place.absolute().parent
    with contextlib.suppress(OSError):
        names = [p.name for p in above.iterdir() if p.is_dir()]
        if close := difflib.get_close_matches(place.name, names, n=1):
            return f" (did you mean {place.with_name(close[0])}?)"
    return ""


def torch_dtype(cfg: StudentConfig | TeacherConfig) -> torch.dtype:
    """Return the dtype of a model's weights; ``auto``, before a run chooses, is float32."""
    return torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)


def load_model(
    cfg: StudentConfig | TeacherConfig, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a causal LM, in evaluation mode.

    Raises:
        ConfigError: if it can't be loaded from ``cfg.path``.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _place(cfg.path),
            dtype=torch_dtype(cfg),
            attn_implementation=cfg.attn_implementation,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _not_loadable("model", cfg.path, error) from error
    if cfg.liger:
        apply_liger(model)
    return model.to(device).eval()


NOISE = ("jitter_noise", "input_jitter_noise")
"""Attributes by which Mixtral's kind scales inputs of experts at random in training. (Phi-3.5-MoE's
``router_jitter_noise`` is not one: it is a threshold, in evaluation too.)"""


def switch_off_dropout(model: nn.Module) -> None:
    """Set all dropout probabilities of a model to 0, and the noise that experts' inputs get.

    The model's configuration stays as it is.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name in NOISE):
                setattr(module, name, 0.0)


def unwritten_model(
    config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Create a causal LM on the CPU with uninitialised weights and buffers.

    They take no memory until they are written.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def empty_model(cfg: StudentConfig | TeacherConfig) -> PreTrainedModel:
    """Create the model that `load_model` would load, as an `unwritten_model`.

    Raises:
        ConfigError: see `load_config`.
    """
    dtype = torch_dtype(cfg)
    model = unwritten_model(load_config(cfg.path), dtype, cfg.attn_implementation)
    if cfg.liger:
        apply_liger(model)
    with contextlib.suppress(OSError):  # not every model has a generation config
        model.generation_config = GenerationConfig.from_pretrained(demo_path(cfg.path))
    return model.eval()
