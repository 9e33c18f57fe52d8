"""Types of option values that several packages use."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["auto", "cuda", "triton", "cpu", "reference"]
Kind = Literal["mse", "nmse", "cosine"]
Positions = Literal["all", "last", "last_k", "first_k"]
Shift = Literal["after", "before"]
Reduction = Literal["token-mean", "seq-mean"]
Form = Literal["top1", "topk", "topk_advantage", "topk_raw", "full", "full_forward", "jsd"]
Checkpointing = bool | int | Literal["auto"]
