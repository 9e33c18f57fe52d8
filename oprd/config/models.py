"""The models of a run, and the bridge between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.errors import Problems

SHARED = ("self:current", "self:base")
SELF = ("self:start", *SHARED)
DType = Literal["float32", "bfloat16", "float16"]


@dataclass
class LoraConfig:
    """Train a low-rank adapter beside frozen weights: W + alpha / rank * B A (arXiv 2106.09685).

    The student that is saved has it merged; the adapter alone is in ``student/adapter``.

    Attributes:
        rank: of A and B; null: no adapter, all weights are trained.
        alpha: of the scale alpha / rank.
        dropout: of the adapter's input while training.
        target_modules: ``all-linear``: every linear layer of the blocks; or a list of their names,
            ``[q_proj, v_proj]``.
    """

    rank: int | None = None
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"

    @property
    def given(self) -> list[str]:
        """The entries that are not at their defaults."""
        return [name for name, value in vars(self).items() if value != getattr(LoraConfig(), name)]

    def check(self, problems: Problems) -> None:
        """Note every value that is out of range."""
        problems.need_at_least_one(
            {"student.lora.rank": self.rank, "student.lora.alpha": self.alpha}
        )
        problems.need(
            0 <= self.dropout < 1, f"student.lora.dropout must lie in [0, 1), got {self.dropout}"
        )
        problems.need(
            bool(self.target_modules),
            "student.lora.target_modules is empty: name layers or all-linear",
        )
        if self.rank is None:
            given = self.given
            problems.need(
                not given,
                f"student.lora.{', '.join(given)} given without student.lora.rank: give a rank, 16 "
                "say",
            )


@dataclass
class StudentConfig:
    """The model that learns.

    Attributes:
        path: a local directory, a hub name, or ``demo:student``.
        dtype: of its weights and optimizer state. A LoRA adapter is float32 in any case.
        attn_implementation: as `transformers` takes it (``sdpa``, ``flash_attention_2``, ..); null:
            its default.
        gradient_checkpointing: recompute activations in backward to save memory.
        compile: run every decoder layer through `torch.compile` in training.
        lora: train an adapter instead of all weights.
    """

    path: str = "demo:student"
    dtype: DType = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class TeacherConfig:
    """The frozen model. Only its layers down to the deepest one compared are kept in memory.

    Attributes:
        path: a local directory, a hub name, ``demo:teacher``, or the student itself, which then
            needs prompts that tell it more (``teacher_prompt``): ``self:start``, a copy of the
            weights it begins with; ``self:current``, those it has at the time; ``self:base``, those
            of a LoRA student with its adapter off: as ``self:start``, at no memory.
        dtype: of its weights (of ``self:current`` and ``self:base`` the student's).
        attn_implementation: as the student's.
        reads: where its tokenizer is another than the student's. ``text``: the response's text in
            its own tokens, compared where both end at the same byte (`oprd.tokenizers.alignment`).
            ``student_ids``: the student's token ids, whatever they mean to it, as public code does;
            for comparison with that code only.
        pairs: where its tokenizer is another and it reads ``text``. ``stable``: inside a number
            compared only where its tokens do not give away whether another digit follows
            (`oprd.tokenizers.digit_boundaries`); ``all``: wherever tokens of both end.
    """

    path: str = "demo:teacher"
    dtype: DType = "float32"
    attn_implementation: str | None = None
    reads: Literal["text", "student_ids"] = "text"
    pairs: Literal["stable", "all"] = "stable"

    @property
    def shares_student(self) -> bool:
        """Whether it is the student's own weights, and no copy of them."""
        return self.path in SHARED

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
