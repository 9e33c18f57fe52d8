"""Fused kernels for On-Policy Representation Distillation.

`fused_rep_loss` compares the hidden states of a student and a teacher. `fused_rep_losses` compares
several layers at once. `rep_tap` attaches the loss to hidden states inside a model.
"""

from oprd_kernels._version import __version__
from oprd_kernels.api import RepLossStats, fused_rep_loss
from oprd_kernels.backends.protocol import BackendUnavailable
from oprd_kernels.backends.registry import BACKENDS
from oprd_kernels.multi_layer_loss import fused_rep_losses
from oprd_kernels.tap import rep_tap

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "RepLossStats",
    "__version__",
    "fused_rep_loss",
    "fused_rep_losses",
    "rep_tap",
]
