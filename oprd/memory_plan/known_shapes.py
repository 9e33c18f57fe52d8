"""Shapes of the models in the shipped recipes, for a plan where the hub is out of reach."""

from __future__ import annotations

from dataclasses import replace

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
_QWEN25_0_5B = Shape(
    d=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    intermediate=4864,
    vocab=151936,
    tied=True,
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
_SMOLLM2_135M = Shape(
    d=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49152,
    tied=True,
)
_SMOLLM2_360M = Shape(
    d=960,
    layers=32,
    heads=15,
    kv_heads=5,
    head_dim=64,
    intermediate=2560,
    vocab=49152,
    tied=True,
)
KNOWN_SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN25_1_5B,
    "hbx/JustRL-DeepSeek-1.5B": _QWEN25_1_5B,
    "Qwen/Qwen3-1.7B-Base": _QWEN3_1_7B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN25_0_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": replace(_QWEN25_1_5B, tied=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _SMOLLM2_360M,
    "microsoft/Phi-4-mini-reasoning": _PHI4_MINI,
}
"""By name on the hub, what the models' ``config.json`` says."""
EXAMPLE = (
    "'{d: 1536, layers: 28, heads: 12, kv_heads: 2, head_dim: 128, intermediate: 8960, "
    "vocab: 151936, tied: false}'"
)
"""How a shape is given as an option; the values are DeepSeek-R1-Distill-Qwen-1.5B's."""
