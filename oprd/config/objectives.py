"""What a run minimises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from oprd.config.types import BackendName, Form, Kind, Positions, Reduction, Shift
from oprd.errors import Problems


@dataclass(frozen=True)
class DistillOptions:
    """The representation loss: which hidden states are compared, and how.

    These are the defaults of `oprd.attach`, and the paper's. `oprd_kernels.fused_rep_loss`, which
    knows nothing of layers and tokens, defaults to ``nmse``, whose scale does not depend on the
    states' norms.

    Attributes:
        kind: ``mse`` (Eq. 6), ``nmse`` or ``cosine``. Their scales differ: ``nmse`` is 2/d of
            ``cosine``.
        layers: ``last``, ``all``, ``even``, ``odd`` or a list of student blocks counted from 0.
        positions: ``all``, ``last``, ``last_k`` or ``first_k`` response tokens.
        k: for ``last_k`` and ``first_k``.
        shift: ``after``: the state that has read the token; ``before``: the one that predicts it.
        reduction: ``token-mean`` or ``seq-mean`` over the global batch.
        backend: of the kernels: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.
    """

    kind: Kind = "mse"
    layers: str | list[int] = "all"
    positions: Positions = "last_k"
    k: int = 2000
    shift: Shift = "after"
    reduction: Reduction = "token-mean"
    backend: BackendName = "auto"


@dataclass(frozen=True)
class DistillConfig(DistillOptions):
    """The representation loss, as `oprd.config.DistillOptions`. The demo answers in five tokens, of
    which the first matters most, so all tokens are supervised there, by the state that predicts
    them.

    Attributes:
        kind: ``mse`` (Eq. 6), ``nmse`` or ``cosine``. Their scales differ: ``nmse`` is 2/d of
            ``cosine``.
        layers: ``last``, ``all``, ``even``, ``odd`` or a list of student blocks counted from 0.
        positions: ``all``, ``last``, ``last_k`` or ``first_k`` response tokens.
        k: for ``last_k`` and ``first_k``.
        shift: ``after``: the state that has read the token; ``before``: the one that predicts it.
        reduction: ``token-mean`` or ``seq-mean`` over the global batch.
        backend: of the kernels: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.
        init_head_from_teacher: copy the teacher's LM head into the student before training. OPRD
            itself gives an untied head no gradient. (Not in the paper.)
    """

    positions: Positions = "all"
    shift: Shift = "before"
    init_head_from_teacher: bool = False

    def check(self, problems: Problems) -> None:
        """Note every value that is out of range."""
        problems.need_at_least_one({"distill.k": self.k})


OBJECTIVES: dict[str, Form | None] = {
    "oprd": None,
    "opd_top1": "top1",
    "opd_topk": "topk",
    "opd_topk_advantage": "topk_advantage",
    "opd_topk_raw": "topk_raw",
    "opd_full": "full",
    "opd_full_forward": "full_forward",
}
"""Names of objectives; of output-space ones with their `oprd.distill.vocab_losses` form."""


@dataclass
class OpdConfig:
    """Output-space objectives, the baselines (see `oprd.distill.vocab_losses.VocabLoss`).

    Attributes:
        k: of the top-k objectives; at most the size of the vocabulary (the demo's has 15 tokens).
        support: whose k most probable tokens they look at.
        implementation: ``chunked``: LM head and loss in chunks of tokens, gradients formed on the
            way; ``materialised``: [B, T, V] logits and log-softmax, as other trainers do.
        chunk_tokens: rows in a chunk.
    """

    k: int = 16
    support: Literal["student", "teacher"] = "student"
    implementation: Literal["chunked", "materialised"] = "chunked"
    chunk_tokens: int = 256

    def form(self, objective: str) -> Form:
        """The form of an output-space objective."""
        form = OBJECTIVES[objective]
        assert form is not None
        return form

    def check(self, problems: Problems, objectives: Collection[str]) -> None:
        """Note every value that is out of range, for the ``objectives`` of a run."""
        problems.need_at_least_one({"opd.k": self.k, "opd.chunk_tokens": self.chunk_tokens})
        problems.need(
            "opd_topk" not in objectives or self.k >= 2,
            f"opd.k must be at least 2 for opd_topk, got {self.k}: on one "
            "token the loss is always 0. Use opd_top1",
        )


def check_weights(problems: Problems, weights: Mapping[str, float]) -> None:
    """Note unknown objectives and weights that are not above 0."""
    need = problems.need
    need(bool(weights), f"objectives is empty: name at least one of {[*OBJECTIVES]}")
    for name, weight in weights.items():
        need(name in OBJECTIVES, f"objectives: {name!r} is not one of {[*OBJECTIVES]}")
        need(weight > 0, f"objectives.{name} must be above 0, got {weight}: leave it out instead")
