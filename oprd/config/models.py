"""The models of a run, and the bridge between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SELF = ("self:start", "self:current")
DType = Literal["float32", "bfloat16", "float16"]


@dataclass
class StudentConfig:
    """The model that learns.

    Attributes:
        path: a local directory, a hub name, or ``demo:student``.
        dtype: of its weights and optimizer state.
        attn_implementation: as `transformers` takes it (``sdpa``, ``flash_attention_2``, ..); null:
            its default.
        gradient_checkpointing: recompute activations in backward to save memory.
        compile: run every decoder layer through `torch.compile` in training.
    """

    path: str = "demo:student"
    dtype: DType = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass
class TeacherConfig:
    """The frozen model. Only its layers down to the deepest one compared are kept in memory.

    Attributes:
        path: a local directory, a hub name, ``demo:teacher``, or the student itself, which then
            needs prompts that tell it more (``teacher_prompt``): ``self:start``, a copy of the
            weights it begins with; ``self:current``, those it has at the time.
        dtype: of its weights (of ``self:current`` the student's).
        attn_implementation: as the student's.
        reads: where its tokenizer is another than the student's. ``text``: the response's text in
            its own tokens, compared where both end at the same byte (`oprd.alignment`).
            ``student_ids``: the student's token ids, whatever they mean to it, as public code does;
            for comparison with that code only.
        pairs: where its tokenizer is another and it reads ``text``. ``stable``: inside a number
            compared only where its tokens do not give away whether another digit follows
            (`oprd.boundaries`); ``all``: wherever tokens of both end.
    """

    path: str = "demo:teacher"
    dtype: DType = "float32"
    attn_implementation: str | None = None
    reads: Literal["text", "student_ids"] = "text"
    pairs: Literal["stable", "all"] = "stable"

    @property
    def is_self(self) -> bool:
        """Whether it is the student."""
        return self.path in SELF


@dataclass
class BridgeConfig:
    """Projectors into a shared space, for a teacher of any width and depth (see `oprd.bridge`).

    The loss is then taken there; the paper's is ``distill.kind: nmse``.

    Attributes:
        path: what ``oprd-bridge fit`` or ``import`` wrote; null: states are compared as they are.
        rank: use the first so many directions; null: all that the file has.
    """

    path: str | None = None
    rank: int | None = None
