"""OPRD-Bridge: a teacher of any width and depth, compared in a shared low-rank space (Eq. 14-15).

oprd-bridge fit --student.path ./student --teacher.path ./teacher --output bridge.safetensors
oprd-train --bridge.path bridge.safetensors --distill.kind nmse ..
"""

from oprd.bridge.bank import Bridge, BridgeInfo, load_bridge, read_info, save_bridge

__all__ = ["Bridge", "BridgeInfo", "load_bridge", "read_info", "save_bridge"]
