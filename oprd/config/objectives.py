"""Options for the objectives that a run minimises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from oprd.config.types import BackendName, Form, Kind, Positions, Reduction, Shift
from oprd.errors import Problems


@dataclass(frozen=True)
class DistillOptions:
    """The representation loss: which hidden states are compared, and how.

    The defaults are those of the paper, and of `oprd.attach`. (`oprd_kernels.fused_rep_loss` has
    another default for ``kind``: ``nmse``, whose scale does not depend on the norms of the states.)

    Attributes:
        kind: loss: ``mse`` (Eq. 6), ``nmse`` or ``cosine``. Their scales differ: ``nmse`` is 2/d
            times ``cosine``.
        layers: compared layers: ``last``, ``all``, ``even``, ``odd`` or a list of student blocks,
            counted from 0.
        positions: supervised response tokens: ``all``, ``last``, ``last_k`` or ``first_k``.
        k: number of tokens for ``last_k`` and ``first_k``.
        shift: hidden state that is compared for a token. ``after``: the state that has read the
            token. ``before``: the state that predicts it.
        reduction: ``token-mean`` or ``seq-mean`` over the global batch.
        backend: kernel backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.
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
    """The representation loss in a training run.

    Attributes:
        init_head_from_teacher: copy the teacher's LM head into the student before training. OPRD
            gives an untied LM head no gradient. (This option is not in the paper.)
    """

    init_head_from_teacher: bool = False

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
        problems.need_at_least_one({"distill.k": self.k})


OBJECTIVES: dict[str, Form | None] = {
    "oprd": None,
    "opd_top1": "top1",
    "opd_topk": "topk",
    "opd_topk_advantage": "topk_advantage",
    "opd_topk_raw": "topk_raw",
    "opd_full": "full",
    "opd_full_forward": "full_forward",
    "opd_jsd": "jsd",
}
"""Names of the objectives, with the `oprd.distill.vocab_losses` form of output-space ones."""


@dataclass
class OpdConfig:
    """Output-space objectives, the baselines (see `oprd.distill.vocab_losses.VocabLoss`).

    Attributes:
        k: number of tokens in the top-k objectives; at most the size of the vocabulary (the demo's
            has 15 tokens).
        support: the model whose k most probable tokens are used.
        implementation: ``chunked``: compute LM head, loss and gradients for one chunk of tokens at
            a time. ``materialised``: compute [B, T, V] logits and log-softmax, as other trainers
            do.
        chunk_tokens: number of tokens in a chunk; None: as many as 1 GiB of temporaries allows
            (on a CPU: 256 MiB).
    """

    k: int = 16
    support: Literal["student", "teacher"] = "student"
    implementation: Literal["chunked", "materialised"] = "chunked"
    chunk_tokens: int | None = None

    def form(self, objective: str) -> Form:
        """Return the form of an output-space objective."""
        form = OBJECTIVES[objective]
        assert form is not None
        return form

    def check(self, problems: Problems, objectives: Collection[str]) -> None:
        """Add a problem for every value that is out of range for the run's ``objectives``."""
        problems.need_at_least_one({"opd.k": self.k, "opd.chunk_tokens": self.chunk_tokens})
        problems.need(
            "opd_topk" not in objectives or self.k >= 2,
            f"opd.k must be at least 2 for opd_topk, got {self.k}: on one "
            "token the loss is always 0. Use opd_top1",
        )


def check_weights(problems: Problems, weights: Mapping[str, float]) -> None:
    """Add a problem for every unknown objective and every weight that is not above 0."""
    need = problems.need
    need(bool(weights), f"objectives is empty: name at least one of {[*OBJECTIVES]}")
    for name, weight in weights.items():
        need(name in OBJECTIVES, f"objectives: {name!r} is not one of {[*OBJECTIVES]}")
        need(weight > 0, f"objectives.{name} must be above 0, got {weight}: leave it out instead")
