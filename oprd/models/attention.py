"""Which attention implementations of `transformers` can run here, and what they need."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_kernels_available

from oprd.errors import ConfigError, Unreachable

NAMES = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
    "flash_attention_4",
)  # fmt: skip
"""The implementations that `transformers` has names for."""

FLASH_PACKAGES = {2: ("flash_attn", "flash-attn"), 3: ("flash_attn_interface", "flash-attn-3"),
                  4: ("flash_attn.cute", "flash-attn-4")}  # fmt: skip
"""By version of FlashAttention, the module and the distribution that contain it."""
FLASH_CAPABILITY = {2: (8, 0), 3: (8, 0), 4: (9, 0)}
"""By version, the least compute capability of a GPU that `transformers` runs it on."""
FLAGS = {"flash": "_supports_flash_attn", "sdpa": "_supports_sdpa", "flex": "_supports_flex_attn"}


def is_flash(implementation: str | None) -> bool:
    """Return whether it is a FlashAttention, by name or as a kernel of the hub."""
    return implementation is not None and "flash" in implementation


def attention_problem(implementation: str | None, device: torch.device) -> str | None:
    """Return why an attention implementation can't run on ``device``, and what to do; or None.

    Args:
        implementation: as in ``attn_implementation``; None: the default of `transformers`.
    """
    name = (implementation or "sdpa").removeprefix("paged|")
    version = re.fullmatch(r"flash_attention_(\d)", name)
    if version and int(version[1]) in FLASH_PACKAGES:
        return _flash_problem(int(version[1]), device)
    if "/" in name:  # a kernel of the hub
        return (_gpu_problem(device) if is_flash(name) else None) or _kernels_problem()
    if name == "eager" or name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return None
    return (
        f"transformers has no such implementation: choose {', '.join(NAMES)}, or a kernel of the "
        "hub such as kernels-community/flash-attn2"
    )


def _flash_problem(version: int, device: torch.device) -> str | None:
    module, distribution = FLASH_PACKAGES[version]
    if problem := _gpu_problem(device):
        return problem
    capability, least = torch.cuda.get_device_capability(device), FLASH_CAPABILITY[version]
    if torch.version.hip is None and capability < least:
        return (
            f"it needs a GPU of compute capability {_version(least)}, and this one has "
            f"{_version(capability)}: use sdpa"
        )
    if _installed(module) or _kernels_problem() is None:
        return None
    return (
        f"it needs the package kernels (pip install 'transformers[kernels]'), which loads "
        f"it from the hub, or {distribution}, and neither is installed"
    )


def attention_source(name: str) -> str:
    """Return what contains a FlashAttention that has no problem; empty for the others."""
    if not is_flash(name):
        return ""
    module, distribution = FLASH_PACKAGES[int(name[-1])]
    return distribution if _installed(module) else "kernels, which loads it from the hub"


def _gpu_problem(device: torch.device) -> str | None:
    return None if device.type != "cpu" else "it needs a GPU, and the device is the CPU: use sdpa"


def _kernels_problem() -> str | None:
    if is_kernels_available():
        return None
    return (
        "it needs the package kernels in a version that transformers takes: "
        "pip install 'transformers[kernels]'"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def check_attention(
    implementation: str | None,
    config: PretrainedConfig | None,
    who: str,
    products: str,
    device: torch.device,
) -> None:
    """Check that a model can run with an attention implementation. No weights are loaded.

    Args:
        implementation: the option ``attn_implementation``.
        config: the model's configuration, if it is known.
        who: what the option belongs to, ``student`` or ``teacher``.
        products: dtype in which attention will get its inputs.

    Raises:
        ConfigError: if the model or the dtype does not fit the implementation. As `Unreachable`:
            if this machine lacks what it needs, which another may have.
    """
    if implementation is None:
        return
    asked = f"{who}.attn_implementation={implementation}"
    if is_flash(implementation) and products == "float32":
        raise ConfigError(
            f"{asked} computes in bfloat16 or float16 only, and this run in float32: set "
            f"autocast=bfloat16 (under FSDP2 fsdp.param_dtype=bfloat16) or {who}.dtype=bfloat16, "
            "or use sdpa"
        )
    cls: Any = None if config is None else MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    flag = next((flag for name, flag in FLAGS.items() if name in implementation), None)
    if cls is not None and flag is not None and not getattr(cls, flag, True):
        raise ConfigError(
            f"{asked}: {cls.__name__} has no such attention in transformers: use eager"
            + (" or sdpa" if flag != "_supports_sdpa" and cls._supports_sdpa else "")
        )
    if problem := attention_problem(implementation, device):
        raise Unreachable(f"{asked} can't run: {problem}")


def varlen_inputs(position_ids: Tensor) -> dict[str, Any]:
    """Return where packed sequences begin and end, as FlashAttention takes it.

    Without these, `transformers` derives them from the positions in every layer, each time with
    the host waiting for the GPU.

    Args:
        position_ids: (1, T) int64, beginning at 0 in each sequence.

    Returns:
        ``cu_seq_lens_q`` and ``cu_seq_lens_k``, (sequences + 1,) int32, and ``max_length_q`` and
        ``max_length_k``, integers.
    """
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    bounds = torch.nn.functional.pad(starts, (0, 1), value=position_ids.shape[1])
    longest = int(bounds.diff().max())
    bounds = bounds.to(torch.int32)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
