"""Batches of rollouts, padded or packed.

Shapes: B sequences of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor

from oprd.data.rollout import Rollout
from oprd.tokenizers.alignment import Reading


@dataclass(frozen=True)
class Batch:
    """Rollouts padded on the right, or packed one after another into a single row (B = 1).

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64; None when packed.
        response_mask: (B, T) bool, True for response tokens.
        reading: the same rollouts in the teacher's tokens, T' tokens wide. None: the teacher reads
            this batch.
        partner: (B, T) int64: for each state of the student, the row of the teacher's (B * T', d)
            states that has read the same text; -1 if there is none. None without ``reading``.
        position_ids: (1, T) int64 when packed, beginning at 0 for each rollout; otherwise None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    response_mask: Tensor
    reading: Batch | None = None
    partner: Tensor | None = None
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; on a GPU the copies are queued, from pinned memory."""
        reading = None if self.reading is None else self.reading.to(device)
        return Batch(
            queued_copy(self.input_ids, device),
            queued_copy(self.attention_mask, device),
            queued_copy(self.response_mask, device),
            reading,
            queued_copy(self.partner, device),
            queued_copy(self.position_ids, device),
        )

    @property
    def for_teacher(self) -> Batch:
        """The batch that the teacher reads."""
        return self if self.reading is None else self.reading


@overload
def queued_copy(tensor: Tensor, device: torch.device) -> Tensor: ...
@overload
def queued_copy(tensor: None, device: torch.device) -> None: ...
def queued_copy(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a tensor of the CPU on a device, without waiting for a GPU to have copied it."""
    if tensor is None:
        return None
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(
    rollouts: Sequence[Rollout],
    pad_id: int,
    device: torch.device | str,
    teacher_pad_id: int | None = None,
    packed: bool = False,
) -> Batch:
    """Combine rollouts into one batch.

    A token is masked by its position, never because it has the padding id. Where the pad and EOS
    tokens are the same, the EOS of a response still counts.

    Args:
        rollouts: the rollouts. If empty, the batch is a single padding token without a response:
            every rank must run the model, even a rank without rollouts.
        pad_id: padding token id of the student.
        teacher_pad_id: padding token id of a teacher with another tokenizer.
        packed: put all rollouts into one row without padding, instead of one row a rollout.
    """
    if not rollouts:
        reading = None if teacher_pad_id is None else Reading([teacher_pad_id], [])
        rollouts = [Rollout([pad_id], [], truncated=True, reading=reading)]
    join = _pack if packed else _pad
    batch, starts = join(rollouts, pad_id, device)
    if all(r.reading is None for r in rollouts):
        return batch
    readings = [r.reading or Reading(r.prompt_ids, r.response_ids) for r in rollouts]
    teacher_pad_id = pad_id if teacher_pad_id is None else teacher_pad_id
    reading_batch, their_starts = join(readings, teacher_pad_id, device)
    partner = torch.full((batch.input_ids.numel(),), -1, dtype=torch.long)
    for ours, theirs, start, their_start in zip(
        rollouts, readings, starts, their_starts, strict=True
    ):
        pairs = theirs.pairs
        if pairs is None:
            pairs = [(j, j) for j in range(len(ours.response_ids))]
        # The last states of the two prompts are paired too: they predict the response's first token
        mine, its = torch.tensor([(-1, -1), *pairs]).T
        begin, its_begin = start + len(ours.prompt_ids), their_start + len(theirs.prompt_ids)
        partner[begin + mine] = its_begin + its
    partner_BT = partner.view_as(batch.input_ids).to(device)
    return replace(batch, reading=reading_batch, partner=partner_BT)


def _pad(
    rollouts: Sequence[Rollout | Reading], pad_id: int, device: torch.device | str
) -> tuple[Batch, list[int]]:
    """Return a padded batch, and where each rollout begins in the batch's flattened tokens."""
    length = max(len(r) for r in rollouts)
    ids = torch.full((len(rollouts), length), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    response = torch.zeros_like(ids, dtype=torch.bool)
    for i, r in enumerate(rollouts):
        ids[i, : len(r)] = torch.tensor(r.prompt_ids + r.response_ids)
        attention[i, : len(r)] = 1
        response[i, len(r.prompt_ids) : len(r)] = True
    starts = [i * length for i in range(len(rollouts))]
    return Batch(ids.to(device), attention.to(device), response.to(device)), starts


def _pack(
    rollouts: Sequence[Rollout | Reading], _pad_id: int, device: torch.device | str
) -> tuple[Batch, list[int]]:
    """Return a packed batch, and where each rollout begins in it. ``_pad_id`` is not used."""
    lengths = [len(r) for r in rollouts]
    ids = torch.tensor([[t for r in rollouts for t in (*r.prompt_ids, *r.response_ids)]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    prompts = torch.tensor([len(r.prompt_ids) for r in rollouts])
    response = positions >= prompts.repeat_interleave(torch.tensor(lengths))
    starts = [end - n for end, n in zip(accumulate(lengths), lengths, strict=True)]
    batch = Batch(ids.to(device), None, response.to(device), position_ids=positions.to(device))
    return batch, starts
