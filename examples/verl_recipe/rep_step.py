"""The representation loss of an actor update, on batches as verl makes them.

It needs no verl, and is what `oprd_actor.py` calls. verl's batches are jagged: N tokens of all
sequences behind one another, each sequence a prompt and its response.

Shapes: B sequences of N tokens together, R the longest response's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oprd import Distiller
from oprd.data.supervision import Supervision
from oprd.distill.taps import RepOutput, TapSession


def response_tokens(response_mask: Tensor, response_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Return (N,) bool, True for the tokens that the student wrote.

    Args:
        response_mask: (B, R), 1 for the response's tokens that the student wrote and 0 for the
            results of tools and padding on the right; or the same jagged, without padding.
        response_lengths: (B,) int64, tokens of each response, with the results of tools.
        lengths: (B,) int64, tokens of each sequence, prompt and response.
    """
    written = response_mask.unbind() if response_mask.is_nested else response_mask
    parts = []
    triples = zip(written, response_lengths.tolist(), lengths.tolist(), strict=True)
    for mask, response, length in triples:
        parts += [mask.new_zeros(length - response, dtype=torch.bool), mask[:response].bool()]
    return torch.cat(parts)


@dataclass(frozen=True)
class Inputs:
    """A micro-batch in the form in which the student reads it.

    Attributes:
        input_ids: (1, N + P) int64, packed, with P tokens of padding behind; or (B, T), padded on
            the right.
        attention_mask: (B, T), 0 for padding; None: packed.
        position_ids: (1, N + P) int64, from 0 in each sequence; None: padded.
        response: (1, N + P) or (B, T) bool, True for the tokens that the student wrote.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    response: Tensor

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, written: Tensor
    ) -> Inputs:
        """Lay out ``written`` (N,), the result of `response_tokens`, as the student's inputs are.

        Args:
            input_ids, attention_mask, position_ids: what the student is called with.
        """
        response = torch.zeros_like(input_ids, dtype=torch.bool)
        written = written.to(input_ids.device)
        if attention_mask is None:
            response[0, : len(written)] = written
            return cls(input_ids, None, position_ids, response)
        response[attention_mask.bool()] = written
        return cls(input_ids, attention_mask, None, response)


@dataclass
class RepStep:
    """The representation loss of one update of the student, split into micro-batches.

    Call `begin` with all of the update's sequences, then `alone` or `beside` for each micro-batch.
    The gradients then sum up to that of the mean over the update, however it is split.

    Attributes:
        distiller: student, teacher and options, from `oprd.attach`.
        ranks: number of data-parallel processes, over which gradients are averaged.
        everywhere: sums a tensor over these processes, in place.
    """

    distiller: Distiller
    ranks: int = 1
    everywhere: Callable[[Tensor], object] = lambda _: None
    denominator: Tensor = field(default_factory=lambda: torch.ones(()))
    states: Tensor = field(default_factory=lambda: torch.ones(()))

    def begin(self, written: Tensor, position_ids: Tensor) -> None:
        """Count what is compared in the whole update.

        Args:
            written: (N,) bool, see `response_tokens`; of this process.
            position_ids: (N,) int64, from 0 in each sequence.
        """
        chosen = self.distiller.supervise(written[None], position_ids=position_ids[None])
        counts = torch.tensor([chosen.total, len(chosen.rows)], dtype=torch.float32)
        counts = counts.to(written.device)
        self.everywhere(counts)
        self.denominator, self.states = counts.clamp(min=1) / self.ranks

    def _teacher(self, inputs: Inputs) -> tuple[Supervision, list[Tensor]]:
        chosen = self.distiller.supervise(inputs.response, position_ids=inputs.position_ids)
        return chosen, self.distiller.teacher_states(
            inputs.input_ids, inputs.attention_mask, chosen.teacher_rows, inputs.position_ids
        )

    def alone(self, inputs: Inputs) -> RepOutput:
        """Run teacher and student, neither with its LM head, and return the loss."""
        chosen, states = self._teacher(inputs)
        return self.distiller.student_loss(
            inputs.input_ids,
            inputs.attention_mask,
            chosen.rows,
            states,
            chosen.weights,
            self.denominator,
            inputs.position_ids,
        )

    @contextmanager
    def beside(self, inputs: Inputs) -> Iterator[TapSession]:
        """Run the teacher, and compare the student's next forward pass with it.

        The context yields a session, whose ``output()`` is the loss once the student has run.
        """
        chosen, states = self._teacher(inputs)
        tokens = inputs.input_ids.numel()
        with self.distiller.taps(
            states, chosen.rows, chosen.weights, self.denominator, tokens
        ) as session:
            yield session

    def summary(self, out: RepOutput) -> dict[str, Tensor]:
        """Return this micro-batch's share of the update's figures.

        Their sum over micro-batches, averaged over processes, is the figure of the update.
        """
        share = out.num_valid / self.states
        return {
            "rep_loss": out.loss.detach(),
            "rep_cosine": torch.where(share > 0, out.layer_cosine.mean() * share, 0.0),
        }
