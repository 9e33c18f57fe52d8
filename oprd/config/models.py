"""Options for the models of a run and the bridge between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.config.types import Checkpointing
from oprd.errors import Problems

SHARED = ("self:current", "self:base")
SELF = ("self:start", *SHARED)
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class LoraConfig:
    """A low-rank adapter on frozen weights: W + alpha / rank * B A (arXiv 2106.09685).

    The saved student has the adapter merged into its weights; ``student/adapter`` contains the
    adapter alone.

    Attributes:
        rank: rank of A and B; null: no adapter, all weights are trained.
        alpha: numerator of the scale alpha / rank.
        dropout: dropout probability of the adapter's input during training.
        target_modules: ``all-linear``: adapt every linear layer of the blocks; or a list of layer
            names, e.g. ``[q_proj, v_proj]``.
    """

    rank: int | None = None
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"

    @property
    def given(self) -> list[str]:
        """The names of the options that differ from their defaults."""
        return [name for name, value in vars(self).items() if value != getattr(LoraConfig(), name)]

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
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
                f"student.lora.{', '.join(given)} given without student.lora.rank: give a rank, "
                "for example 16",
            )


@dataclass
class StudentConfig:
    """The trained model.

    Attributes:
        path: a local directory, a hub name, or ``demo:student``.
        dtype: dtype of the weights and the optimizer state. ``auto``: float32 (see ``autocast``);
            on a GPU bfloat16 for the frozen weights under an adapter. A LoRA adapter is always
            float32.
        attn_implementation: attention implementation of `transformers` (``sdpa``,
            ``flash_attention_2``, ..); null: the default of `transformers`.
        context_length: number of tokens that the model can read and write together; null: what its
            configuration says.
        gradient_checkpointing: recompute activations in backward to save memory. A number: those
            of the first so many blocks. ``auto``: of as many as the memory plan says are needed to
            fit the device; if an allocation fails nevertheless, of more.
        compile: compile every decoder layer with `torch.compile` for training; sampling and
            evaluation run it uncompiled.
        liger: run the norms, the MLPs' activation and RoPE by Liger's Triton kernels (``pip install
            liger-kernel``), which needs a GPU. Results are equal up to rounding.
        dropout: keep the model's own dropout (GPT-2's 0.1) and noise in updates. Without it, the
            states that are compared are those of the model that sampled, as the teacher's are.
        lora: train a LoRA adapter instead of all weights.
    """

    path: str = "demo:student"
    dtype: DType = "auto"
    attn_implementation: str | None = None
    context_length: int | None = None
    gradient_checkpointing: Checkpointing = False
    compile: bool = False
    liger: bool = False
    dropout: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class TeacherConfig:
    """The frozen model that the student learns from.

    If only hidden states are compared, the layers above the deepest compared one are not kept in
    memory.

    Attributes:
        path: a local directory, a hub name, ``demo:teacher``, or one of the following for
            self-distillation, which needs a ``teacher_prompt``. ``self:start``: a copy of the
            student's initial weights. ``self:current``: the student's current weights.
            ``self:base``: a LoRA student without its adapter; it equals ``self:start`` but needs no
            memory.
        dtype: dtype of the weights; ``auto``: bfloat16 on a GPU, float32 on a CPU. Not used with
            ``self:current`` and ``self:base``, which have the student's dtype.
        attn_implementation, context_length, compile, liger: as in ``student``. Not used with
            ``self:current`` and ``self:base``, which are the student.
        fp8: run the linear layers of the teacher's blocks in float8 by torchao (``pip install
            torchao``), which needs a GPU of compute capability 8.9 or later (Ada, Hopper). The
            error that this makes in the states is logged when a run starts.
        reads: what the teacher reads if it has another tokenizer. ``text``: the text of the
            response in its own tokens. Hidden states are compared where tokens of both tokenizers
            end at the same byte (`oprd.tokenizers.alignment`). ``student_ids``: the student's token
            ids, although they have another meaning for the teacher. Use it only for comparison
            with the public OPRD code (github.com/ShenzhiYang2000/OPRD), which does the same.
        pairs: which of these positions are compared if the teacher reads ``text``. ``stable``:
            inside a number, only where the teacher's tokens do not reveal whether another digit
            follows (`oprd.tokenizers.digit_boundaries`). ``all``: all of them.
    """

    path: str = "demo:teacher"
    dtype: DType = "auto"
    attn_implementation: str | None = None
    context_length: int | None = None
    compile: bool = False
    liger: bool = False
    fp8: bool = False
    reads: Literal["text", "student_ids"] = "text"
    pairs: Literal["stable", "all"] = "stable"

    @property
    def shares_student(self) -> bool:
        """Whether the teacher uses the student's weights without a copy."""
        return self.path in SHARED

    @property
    def is_self(self) -> bool:
        """Whether the teacher is the student itself or a copy of it."""
        return self.path in SELF


@dataclass
class BridgeConfig:
    """Projectors into a shared space, for a teacher of any width and depth (see `oprd.bridge`).

    The loss is computed in this space. The paper uses ``distill.kind: nmse`` with a bridge.

    Attributes:
        path: a file written by ``oprd-bridge fit`` or ``import``; null: compare hidden states
            without projection.
        rank: number of directions to use, from the first; null: all directions in the file.
    """

    path: str | None = None
    rank: int | None = None
