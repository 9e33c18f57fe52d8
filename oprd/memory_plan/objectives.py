"""What each objective keeps and reads, from which its memory is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossForm = Literal["top1", "topk", "topk_set", "full"]
TeacherOutputs = Literal["states", "last", "logits"]


@dataclass(frozen=True)
class Objective:
    """Something that can be measured and predicted.

    Attributes:
        title: its title in tables.
        taps: the blocks whose states it compares with the teacher's; None: no states are compared.
        is_projected: it compares projections of the states (Bridge).
        loss: its loss on logits; None: it has none.
        is_chunked: the loss goes through the LM head in chunks of rows.
        has_backward: it is an update. Otherwise it is a forward without gradients.
    """

    title: str
    taps: Literal["all", "last"] | None = None
    is_projected: bool = False
    loss: LossForm | None = None
    is_chunked: bool = False
    has_backward: bool = True

    @property
    def teacher_outputs(self) -> TeacherOutputs | None:
        """The teacher's outputs that it reads: the supervised rows of every block's states
        (``states``), those of the last block (``last``), or ``logits``."""
        if self.is_materialised:
            return "logits"
        if self.is_chunked:
            return "last"
        return "states" if self.taps == "all" else self.taps

    @property
    def is_materialised(self) -> bool:
        """Whether it reads [B, T, V] logits, the student's and the teacher's."""
        return self.loss is not None and not self.is_chunked


PLANNER_OBJECTIVES = {
    "backbone": Objective("backbone alone"),
    "oprd": Objective("OPRD, all layers", taps="all"),
    "oprd_last": Objective("OPRD, last layer", taps="last"),
    "bridge": Objective("Bridge, all layers", taps="all", is_projected=True),
    "opd_top1": Objective("OPD top-1, materialised", loss="top1"),
    "opd_topk": Objective("OPD top-k, materialised", loss="topk"),
    "opd_full": Objective("OPD full, materialised", loss="full"),
    "opd_top1_chunked": Objective("OPD top-1, chunked", loss="top1", is_chunked=True),
    "opd_topk_chunked": Objective("OPD top-k, chunked", loss="topk", is_chunked=True),
    "opd_topk_set_chunked": Objective("OPD top-k set, chunked", loss="topk_set", is_chunked=True),
    "opd_full_chunked": Objective("OPD full, chunked", loss="full", is_chunked=True),
    "logprob": Objective("log-prob forward", has_backward=False),
}
"""Everything that can be measured and predicted, in the order of tables."""
