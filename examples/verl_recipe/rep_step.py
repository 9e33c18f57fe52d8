"""The representation loss of an actor update, on batches as verl makes them. Needs no verl.

verl's batches are jagged: the N tokens of B sequences behind one another, each sequence a prompt
and its response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oprd import Distiller, RepOutput
from oprd.distill.taps import TapSession


def written_tokens(data: Mapping[str, Any]) -> Tensor:
    """Return (N,) bool, True for the tokens that the student wrote.

    Args:
        data: a batch of verl's. ``input_ids`` are jagged. ``responses`` and ``response_mask`` (0
            for the results of tools) are jagged as well; or they are (B, R), padded on the right,
            and there is an ``attention_mask`` (B, P + R).
    """
    lengths, responses = data["input_ids"].offsets().diff(), data["responses"]
    if responses.is_nested:
        response_lengths = responses.offsets().diff()
    else:
        response_lengths = data["attention_mask"][:, -responses.shape[1] :].sum(1)
    parts = []
    for mask, length, response in zip(
        data["response_mask"].unbind(), lengths.tolist(), response_lengths.tolist(), strict=True
    ):
        parts += [mask.new_zeros(length - response, dtype=torch.bool), mask[:response].bool()]
    return torch.cat(parts)


def distiller_inputs(
    model_inputs: Mapping[str, Tensor | None], written: Tensor
) -> dict[str, Tensor | None]:
    """Return a batch in the form in which the student reads it, as a `Distiller` takes it.

    Args:
        model_inputs: what verl calls the student with. Without an ``attention_mask``, ``input_ids``
            and ``position_ids`` are (1, N + P): the sequences, and P tokens of padding behind them.
            Otherwise all are (B, T), padded on the right.
        written: (N,) bool, see `written_tokens`.
    """
    ids, attention = model_inputs["input_ids"], model_inputs["attention_mask"]
    assert ids is not None
    response = torch.zeros_like(ids, dtype=torch.bool)
    if attention is None:
        response[0, : len(written)] = written
    else:
        response[attention.bool()] = written
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "response_mask": response,
        "position_ids": model_inputs["position_ids"] if attention is None else None,
    }


@dataclass
class RepStep:
    """The representation loss of one update of the student, split into micro-batches.

    Call `begin` with all of the update's tokens, then `alone` or `beside` for each micro-batch. The
    gradients add up to that of the mean over the update, however it is split.

    Attributes:
        distiller: student, teacher and options, from `oprd.attach`.
        ranks: number of data-parallel processes, over which gradients are averaged.
        everywhere: sums a tensor over these processes, in place.
        denominator: what each micro-batch's sum is divided by.
        states: the number of compared states of the update, over ``ranks``.
    """

    distiller: Distiller
    ranks: int = 1
    everywhere: Callable[[Tensor], object] = lambda _: None
    denominator: Tensor = field(init=False)
    states: Tensor = field(init=False)

    def begin(self, written: Tensor, position_ids: Tensor) -> None:
        """Count what is compared in the whole update.

        Args:
            written: (N,) bool, see `written_tokens`; this process's part of the update.
            position_ids: (N,) int64, from 0 in each sequence.
        """
        chosen = self.distiller.supervise(written[None], position_ids=position_ids[None])
        counts = torch.tensor(
            [chosen.total, len(chosen.rows)], dtype=torch.float32, device=written.device
        )
        self.everywhere(counts)
        self.denominator, self.states = counts.clamp(min=1) / self.ranks

    def alone(self, inputs: dict[str, Any]) -> RepOutput:
        """Run teacher and student, neither with its LM head, and return the loss.

        Args:
            inputs: a micro-batch, see `distiller_inputs`.
        """
        return self.distiller(**inputs, denominator=self.denominator)

    def beside(self, inputs: dict[str, Any]) -> AbstractContextManager[TapSession]:
        """Run the teacher, and return a context in which the student runs for another loss, too.

        After it, ``output()`` of the session that it yields is the representation loss.

        Args:
            inputs: a micro-batch, see `distiller_inputs`.
        """
        ids, places = inputs["input_ids"], inputs["position_ids"]
        chosen = self.distiller.supervise(inputs["response_mask"], position_ids=places)
        states = self.distiller.teacher_states(
            ids, inputs["attention_mask"], chosen.teacher_rows, places
        )
        return self.distiller.taps(
            states, chosen.rows, chosen.weights, self.denominator, ids.numel()
        )

    def summary(self, out: RepOutput) -> dict[str, Tensor]:
        """Return a micro-batch's share of the update's figures.

        Their sum over micro-batches, averaged over processes, is the figure of the update.
        """
        share = out.num_valid / self.states
        return {
            "rep_loss": out.loss.detach(),
            "rep_cosine": torch.where(share > 0, out.layer_cosine.mean() * share, 0.0),
        }
