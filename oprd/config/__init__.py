"""The configuration of a run, as dataclasses.

Options can be set in a YAML file (``--config``) and on the command line (``--optim.lr 1e-5``). The
defaults are the method's; the demo has its own (`oprd.config.demo`), and ``recipes/`` contains
other configurations.
"""

from oprd.config.checkpoint import CheckpointConfig
from oprd.config.data import DataConfig, EvalConfig, EvalSetConfig, PromptsConfig
from oprd.config.fsdp import FsdpConfig
from oprd.config.logging import LoggingConfig
from oprd.config.models import SELF, BridgeConfig, DType, LoraConfig, StudentConfig, TeacherConfig
from oprd.config.objectives import OBJECTIVES, DistillConfig, DistillOptions, OpdConfig
from oprd.config.optim import OptimConfig
from oprd.config.rollout import RolloutConfig
from oprd.config.sampling import SamplingParams
from oprd.config.train import TrainConfig, check_values
from oprd.config.vllm import MAX_LOGPROB_GAP, VllmConfig
from oprd.config.watchdog import LengthWatch, LossWatch, WatchdogConfig

__all__ = [
    "MAX_LOGPROB_GAP",
    "OBJECTIVES",
    "SELF",
    "BridgeConfig",
    "CheckpointConfig",
    "DType",
    "DataConfig",
    "DistillConfig",
    "DistillOptions",
    "EvalConfig",
    "EvalSetConfig",
    "FsdpConfig",
    "LengthWatch",
    "LoggingConfig",
    "LoraConfig",
    "LossWatch",
    "OpdConfig",
    "OptimConfig",
    "PromptsConfig",
    "RolloutConfig",
    "SamplingParams",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "VllmConfig",
    "WatchdogConfig",
    "check_values",
]
