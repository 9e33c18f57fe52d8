"""On-Policy Representation Distillation (OPRD) for Hugging Face models.

The public names are imported on first use.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from oprd_kernels._version import __version__

if TYPE_CHECKING:
    from oprd.bridge.bank import load_bridge
    from oprd.config import TrainConfig
    from oprd.data.collate import Batch, collate
    from oprd.data.rollout import Rollout
    from oprd.data.supervision import Supervision, generated_masks, supervise
    from oprd.distill.distiller import Distiller, attach
    from oprd.distill.taps import RepOutput
    from oprd.errors import ConfigError
    from oprd.training.trainer import train

_HOMES = {
    "Batch": "oprd.data.collate",
    "ConfigError": "oprd.errors",
    "Distiller": "oprd.distill.distiller",
    "RepOutput": "oprd.distill.taps",
    "Rollout": "oprd.data.rollout",
    "Supervision": "oprd.data.supervision",
    "TrainConfig": "oprd.config",
    "attach": "oprd.distill.distiller",
    "collate": "oprd.data.collate",
    "generated_masks": "oprd.data.supervision",
    "load_bridge": "oprd.bridge.bank",
    "supervise": "oprd.data.supervision",
    "train": "oprd.training.trainer",
}

__all__ = [
    "Batch",
    "ConfigError",
    "Distiller",
    "RepOutput",
    "Rollout",
    "Supervision",
    "TrainConfig",
    "__version__",
    "attach",
    "collate",
    "generated_masks",
    "load_bridge",
    "supervise",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")  # oprd.config without importing it first
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
