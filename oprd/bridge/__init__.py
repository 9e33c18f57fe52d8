"""OPRD-Bridge: distillation from a teacher of any width and depth (Eq. 14-15).

Student and teacher states are compared in a shared low-rank space.

oprd-bridge fit --student.path ./student --teacher.path ./teacher --output bridge.safetensors
oprd-train --bridge.path bridge.safetensors --distill.kind nmse ..
"""

from oprd.bridge.bank import Bridge, BridgeInfo, load_bridge, read_info, save_bridge

__all__ = ["Bridge", "BridgeInfo", "load_bridge", "read_info", "save_bridge"]
