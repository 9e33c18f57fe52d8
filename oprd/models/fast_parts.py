"""What makes models fast here: which of it can run on this machine, and checks before a run."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from oprd.config import StudentConfig, TeacherConfig
from oprd.models.attention import NAMES, attention_problem, attention_source, check_attention
from oprd.models.float8 import check_float8, float8_problem
from oprd.models.liger import check_liger, liger_problem
from oprd_kernels.doctor import version_of


def check_fast_parts(
    cfg: StudentConfig | TeacherConfig,
    config: PretrainedConfig | None,
    who: str,
    products: str,
    device: torch.device,
) -> None:
    """Check the options of a model that need a GPU or packages. No weights are loaded.

    Args:
        config: the model's configuration, if it is known.
        who: ``student`` or ``teacher``, for error messages.
        products: dtype of the model's matrix products.

    Raises:
        ConfigError: for the first problem. As `Unreachable`: if this machine lacks what an option
            needs, which another may have.
    """
    if cfg.liger:
        check_liger(config, who, device)
    if isinstance(cfg, TeacherConfig) and cfg.fp8:
        check_float8(who, cfg.dtype, device)
    check_attention(cfg.attn_implementation, config, who, products, device)


def live_parts(device: torch.device) -> list[str]:
    """Return for each part one line that says whether it can run on ``device``, or why not."""
    lines = [_line(name, attention_problem(name, device), attention_source(name)) for name in NAMES]
    liger = _line("liger", liger_problem(device), f"liger-kernel {version_of('liger-kernel')}")
    float8 = _line("teacher.fp8", float8_problem(device), f"torchao {version_of('torchao')}")
    return ["attention (attn_implementation):", *lines, "parts of models:", liger, float8]


def _line(name: str, problem: str | None, live: str = "") -> str:
    state = f"missing: {problem}" if problem else f"live{live and ': '}{live}"
    return f"  {name:<18} {state}"
