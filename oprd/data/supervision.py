"""Which tokens of a rollout are supervised, and which hidden states stand for them.

Shapes: B sequences of T tokens, M supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oprd.config.types import Positions, Reduction, Shift


@dataclass(frozen=True)
class Supervision:
    """The supervised tokens of a batch.

    Attributes:
        rows: (M,) int64, the rows of the (B * T, d) hidden states that are compared.
        teacher_rows: (M,) int64, the rows of the teacher's states that these are compared with.
        weights: (M,) float32 for ``seq-mean``, None for ``token-mean`` (all 1).
        total: what this batch adds to the denominator of the mean: its supervised tokens
            (``token-mean``) or its sequences that have any (``seq-mean``).
    """

    rows: Tensor
    teacher_rows: Tensor
    weights: Tensor | None
    total: int


def sequence_numbers(response_mask_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
    """(B * T,) int64: which sequence each token belongs to, counted from 0 over the batch.

    Args:
        response_mask_BT: of the batch, for its shape.
        position_ids_BT: of packed sequences: another one begins wherever a position is not one more
            than that before it. None: every row is one sequence.
    """
    begins_BT = torch.zeros_like(response_mask_BT, dtype=torch.bool)
    begins_BT[:, 0] = True
    if position_ids_BT is not None:
        begins_BT[:, 1:] = position_ids_BT.diff(dim=-1) != 1
    return begins_BT.flatten().cumsum(0) - 1


def supervised_tokens(
    response_mask_N: Tensor, sequence_N: Tensor, positions: Positions, k: int
) -> Tensor:
    """(N,) bool: the response tokens that ``positions`` picks of each sequence, k_eff = min(k,
    their number).

    Args:
        sequence_N: see `sequence_numbers`.
    """
    if positions == "all":
        return response_mask_N
    length_S = sequence_N[response_mask_N].bincount(minlength=int(sequence_N[-1]) + 1)
    before_S = length_S.cumsum(0) - length_S
    order_N = response_mask_N.cumsum(0) - before_S[sequence_N]  # 1 for the first response token
    if positions == "first_k":
        return response_mask_N & (order_N <= k)
    k = 1 if positions == "last" else k
    return response_mask_N & (order_N > length_S[sequence_N] - k)


def supervise(
    response_mask_BT: Tensor,
    positions: Positions = "last_k",
    k: int = 2000,
    shift: Shift = "after",
    reduction: Reduction = "token-mean",
    partner_BT: Tensor | None = None,
    position_ids_BT: Tensor | None = None,
) -> Supervision:
    """Pick the supervised states of a batch.

    Args:
        response_mask_BT: True for the student's own tokens, its first EOS included.
        positions: ``all``, ``last``, ``last_k`` or ``first_k`` tokens of each response.
        k: for ``last_k`` and ``first_k``.
        shift: ``after``: the state once token y_t has been read (what the paper's results were
            made with); ``before``: the state that predicts y_t, one position earlier (the paper's
            text).
        reduction: ``token-mean``: every token counts the same; ``seq-mean``: every rollout does
            (Eq. 6 to the letter).
        partner_BT: where the teacher has other rows: by state of the student, the teacher's row, or
            -1: such a state is not supervised. None: the same rows.
        position_ids_BT: of packed sequences, see `sequence_numbers`. None: every row is one.

    Raises:
        ValueError: if ``before`` meets a response that starts at position 0: nothing precedes it.
    """
    sequence_N = sequence_numbers(response_mask_BT, position_ids_BT)
    chosen_N = supervised_tokens(response_mask_BT.flatten(), sequence_N, positions, k)
    rows = chosen_N.nonzero().squeeze(1)
    sequence = sequence_N[rows]
    if shift == "before":
        begins_N = sequence_N.diff(prepend=sequence_N.new_full((1,), -1)) == 1
        if (chosen_N & begins_N).any():
            raise ValueError(
                "shift='before' supervises the state before a token, but a response starts at "
                "position 0: give every prompt at least one token"
            )
        rows = rows - 1
    teacher_rows = rows
    if partner_BT is not None:
        teacher_rows = partner_BT.flatten()[rows]
        paired = teacher_rows >= 0
        rows, teacher_rows, sequence = rows[paired], teacher_rows[paired], sequence[paired]
    if reduction == "token-mean":
        return Supervision(rows, teacher_rows, None, rows.numel())
    per_sequence = sequence.bincount()
    weights = 1.0 / per_sequence[sequence].to(torch.float32)
    return Supervision(rows, teacher_rows, weights, int((per_sequence > 0).sum()))
