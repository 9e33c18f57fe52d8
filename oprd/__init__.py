"""On-Policy Representation Distillation for Hugging Face models."""

from oprd.attach import Distiller, RepOutput, attach
from oprd_kernels._version import __version__

__all__ = ["Distiller", "RepOutput", "__version__", "attach"]
