"""Shapes of the models in the shipped recipes, for a plan where the hub is out of reach."""

from __future__ import annotations

from oprd.memory_plan.shapes import Shape

_QWEN25_1_5B = Shape(
    d=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    head_dim=128,
    intermediate=8960,
    vocab=151936,
    tied=False,
)
_QWEN3_1_7B = Shape(
    d=2048,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    intermediate=6144,
    vocab=151936,
    tied=True,
)
_QWEN3_4B = Shape(
    d=2560,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=9728,
    vocab=151936,
    tied=True,
)
_PHI4_MINI = Shape(
    d=3072,
    layers=32,
    heads=24,
    kv_heads=8,
    head_dim=128,
    intermediate=8192,
    vocab=200064,
    tied=True,
)
KNOWN_SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN25_1_5B,
    "hbx/JustRL-DeepSeek-1.5B": _QWEN25_1_5B,
    "Qwen/Qwen3-1.7B-Base": _QWEN3_1_7B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "microsoft/Phi-4-mini-reasoning": _PHI4_MINI,
}
"""By name on the hub, what the models' ``config.json`` says."""
EXAMPLE = (
    "'{d: 1536, layers: 28, heads: 12, kv_heads: 2, head_dim: 128, intermediate: 8960, "
    "vocab: 151936, tied: false}'"
)
"""How a shape is given as an option; the values are DeepSeek-R1-Distill-Qwen-1.5B's."""
