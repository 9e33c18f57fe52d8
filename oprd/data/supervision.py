"""Selection of the supervised tokens of a batch, and of the hidden states compared for them.

Shapes: B sequences of T tokens, M supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oprd.config.types import Positions, Reduction, Shift
from oprd.data.collate import queued_copy


@dataclass(frozen=True)
class Supervision:
    """The supervised tokens of a batch.

    Attributes:
        rows: (M,) int64, the rows of the student's (B * T, d) hidden states that are compared.
        teacher_rows: (M,) int64, the rows of the teacher's states that they are compared with.
        weights: (M,) float32 for ``seq-mean``; None for ``token-mean`` (all weights are 1).
        total: this batch's contribution to the denominator of the mean: the number of supervised
            tokens (``token-mean``), or of sequences with a supervised token (``seq-mean``).
    """

    rows: Tensor
    teacher_rows: Tensor
    weights: Tensor | None
    total: int

    def to(self, device: torch.device) -> Supervision:
        """Return it on a device; on a GPU the copies are queued, from pinned memory."""
        same = self.teacher_rows is self.rows
        rows = queued_copy(self.rows, device)
        theirs = rows if same else queued_copy(self.teacher_rows, device)
        return Supervision(rows, theirs, queued_copy(self.weights, device), self.total)


def generated_masks(
    sequences: Tensor, prompt_mask: Tensor, eos_token_id: int | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Return the masks of the sequences that Hugging Face's `generate` returned.

    A response is what follows the prompt, up to and including its first EOS. What follows that is
    padding, whatever the tokens: the padding token may be the EOS token.

    Args:
        sequences: (B, P + R) int64, the result of ``generate``.
        prompt_mask: (B, P), the attention mask that ``generate`` was given, 0 for padding on the
            left of the prompts.
        eos_token_id: the token that ends a response, or all of them
            (``model.generation_config.eos_token_id``); None: responses do not end.

    Returns:
        attention_mask: (B, P + R) int64, 0 for padding.
        response_mask: (B, P + R) bool, True for the tokens of the responses.

    Raises:
        ValueError: if ``prompt_mask`` is not (B, P) with P at most the length of the sequences, or
            has padding on the right of a prompt, between it and its response.
    """
    rows, width = sequences.shape
    if prompt_mask.dim() != 2 or len(prompt_mask) != rows or prompt_mask.shape[1] > width:
        raise ValueError(
            f"prompt_mask has shape {tuple(prompt_mask.shape)} for sequences "
            f"{tuple(sequences.shape)}: expected the (B, P) attention mask that generate was given"
        )
    if not prompt_mask[:, -1:].all():
        raise ValueError(
            "prompt_mask has padding on the right of a prompt: generate needs it on the left "
            "(tokenizer.padding_side = 'left')"
        )
    response = sequences[:, prompt_mask.shape[1] :]
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    is_end = torch.isin(response, torch.tensor(ends, dtype=torch.long, device=sequences.device))
    written = is_end.long().cumsum(-1) - is_end.long() == 0  # no EOS before this token
    attention_mask = torch.cat([prompt_mask.long(), written.long()], dim=-1)
    response_mask = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), written], dim=-1)
    return attention_mask, response_mask


def sequence_numbers(response_mask_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
    """Return the sequence that each token belongs to, counted from 0 over the batch.

    Args:
        response_mask_BT: the batch's response mask; only its shape and device are used.
        position_ids_BT: position ids of packed sequences. A new sequence begins wherever a position
            is not one more than the position before it. None: every row is one sequence.

    Returns:
        (B * T,) int64.
    """
    begins_BT = torch.zeros_like(response_mask_BT, dtype=torch.bool)
    begins_BT[:, 0] = True
    if position_ids_BT is not None:
        begins_BT[:, 1:] = position_ids_BT.diff(dim=-1) != 1
    return begins_BT.flatten().cumsum(0) - 1


def supervised_tokens(
    response_mask_N: Tensor, sequence_N: Tensor, positions: Positions, k: int
) -> Tensor:
    """Select the response tokens that ``positions`` names in each sequence.

    A sequence with fewer than k response tokens contributes all of them: k_eff = min(k, number of
    response tokens).

    Args:
        response_mask_N: (N,) bool, True for response tokens.
        sequence_N: (N,) int64, see `sequence_numbers`.
        positions, k: see `supervise`.

    Returns:
        (N,) bool.
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
    """Select the supervised states of a batch.

    Args:
        response_mask_BT: True for the tokens that the student sampled, including its first EOS.
        positions: ``all``, ``last``, ``last_k`` or ``first_k`` tokens of each response.
        k: number of tokens for ``last_k`` and ``first_k``.
        shift: ``after``: the state after token y_t has been read (the paper's results use this);
            ``before``: the state that predicts y_t, one position earlier (the paper's text says
            this).
        reduction: ``token-mean``: every token has the same weight; ``seq-mean``: every rollout has
            the same weight (Eq. 6 exactly).
        partner_BT: for each state of the student, the row of the teacher's states to compare it
            with. States with -1 are not supervised. None: the teacher has the same rows.
        position_ids_BT: position ids of packed sequences, see `sequence_numbers`. None: every row
            is one sequence.

    Raises:
        ValueError: if ``shift`` is ``before`` and a response starts at position 0, where no state
            precedes it.
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
