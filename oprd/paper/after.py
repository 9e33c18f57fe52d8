"""Measurements of a student against its teacher, on held-out responses that the student samples.

Shapes: B sequences of T tokens, M response tokens (rows), V vocabulary, d hidden width, P weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd import attach
from oprd.bridge import load_bridge
from oprd.bridge.bank import Bridge
from oprd.bridge.project import Projectors, project_rows
from oprd.config import DataConfig, PromptsConfig, SamplingParams, TeacherConfig
from oprd.config.types import Form, Kind, Shift
from oprd.data.collate import Batch, collate
from oprd.data.prompts import load_prompts
from oprd.data.rollout import Rollout
from oprd.data.supervision import supervise
from oprd.distill.vocab_losses import VocabLoss, weighted_mean
from oprd.distributed.device import check_device
from oprd.engines.continuous import sample
from oprd.evaluation.closeness import Comparer, spread
from oprd.models.compatibility import check_pair, shares_ids
from oprd.models.decoder import find_decoder, watch
from oprd.models.info import model_info
from oprd.models.loading import load_model, load_tokenizer
from oprd.paper.task import RESPONSE_TOKENS
from oprd.paper.theory import GradientNoise, means_by_k, sampled_gradient_moments

COUNTS = (1, 2, 4, 8, 16, 32, 64, RESPONSE_TOKENS)
"""The k's of the first and last k tokens; the last one stands for all."""
TOP = 4
"""Tokens of the top-k overlap."""
AT_ONCE = 32
"""Responses in a forward pass."""
RESAMPLED = 8
"""Positions at which OPRD's token is resampled."""


def measure(
    student: Path,
    teacher: Path,
    prompts: Path,
    bridge: Path | None = None,
    rank: int | None = None,
    responses: int = 96,
    batches: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a student against a teacher.

    The student samples at temperature 1. All means over tokens are at the positions that predict
    them. Where the tokenizers differ, only ``tokens``, ``length`` and ``entropy`` are measured;
    where the widths differ and there is no bridge, nothing that compares hidden states is.

    Args:
        student, teacher: directories of models with their tokenizers; computed with in float32.
        prompts: a ``.jsonl`` file of prompts with answers.
        bridge: a bridge of the two models, through which their states are compared.
        rank: number of the bridge's directions; None: all.
        responses: number of responses, to the first prompts of the file, from its beginning again
            if there are fewer.
        batches: number of batches that the responses are split into for ``snr``.
        seed: of the sampling; the caller's random numbers are left as they are.

    Returns:
        - ``tokens``, ``length``: number of response tokens, in all and in the mean.
        - ``kl`` (student || teacher), ``overlap``, ``entropy``, ``teacher_entropy``: see
          `oprd.evaluation.closeness.Closeness`.
        - ``cosine``, ``cosine_last_layer``: of the hidden states, over all layers and at the last
          (after the final norm). ``cosine_first_k``, ``cosine_last_k``: at the last layer over the
          first or last k tokens, ``[k, cosine]`` (Figure 8).
        - ``token_variance``: of a gradient by the final hidden state, given what precedes it, over
          the token sampled there: ``top1`` of OPD top-1, exact, ``mean_square`` the squared norm of
          its expectation, means over positions; ``oprd`` of OPRD, see
          `Comparison.resampling_variance`.
        - ``snr``: signal-to-noise ratios of a batch's gradient by all weights, see `GradientNoise`.

    Raises:
        ConfigError: if a model, the prompts or the bridge can't be loaded or do not fit.
        ValueError: if there are fewer than two batches or fewer responses than batches, or a rank
            without a bridge.
    """
    if not 2 <= batches <= responses:
        raise ValueError(
            f"batches={batches} with responses={responses}: choose 2 batches at least, and a "
            "response for each"
        )
    if rank is not None and bridge is None:
        raise ValueError(f"rank={rank} is a bridge's, but there is no bridge: pass bridge=FILE")
    device = check_device("auto")
    tokenizer, other = load_tokenizer(str(student)), load_tokenizer(str(teacher))
    model = load_model(TeacherConfig(str(student), "float32"), device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        rollouts = _respond(model, tokenizer, prompts, responses)
        rollouts.sort(key=len)  # so that batches have little padding
        lengths = [len(r.response_ids) for r in rollouts]
        found: dict[str, Any] = {"tokens": sum(lengths), "length": sum(lengths) / len(lengths)}
        if not shares_ids(tokenizer, other):
            return found | {"entropy": _entropy(model, tokenizer.pad_token_id, rollouts)}
        comparison = Comparison(
            model,
            load_model(TeacherConfig(str(teacher), "float32"), device),
            tokenizer.pad_token_id,
            max(tokenizer.get_vocab().values()) + 1,
            None if bridge is None else load_bridge(bridge, rank),
        )
        comparison.check()
        found |= comparison.closeness(rollouts) | comparison.by_token(rollouts)
        if comparison.has_states:
            found["token_variance"]["oprd"] = comparison.resampling_variance(rollouts, seed)
        return found | {"snr": comparison.signal_to_noise(rollouts, batches, seed)}


def _respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Path, responses: int
) -> list[Rollout]:
    """Sample ``responses`` responses, one to each prompt, at temperature 1."""
    source = PromptsConfig(str(prompts), limit=responses)
    read = load_prompts(source, DataConfig(), tokenizer, for_evaluation=True).prompts
    ids = [read[i % len(read)].token_ids for i in range(responses)]
    with torch.no_grad():
        return sample(model, tokenizer, ids, SamplingParams(RESPONSE_TOKENS), 256)


def _batches(rollouts: Sequence[Rollout], pad_id: int, device: torch.device) -> Iterator[Batch]:
    for start in range(0, len(rollouts), AT_ONCE):
        yield collate(rollouts[start : start + AT_ONCE], pad_id, device)


def _rows(batch: Batch) -> Tensor:
    """Return the rows (M,) of a batch's B * T states that predict response tokens."""
    return supervise(batch.response_mask, "all", shift="before").rows


def _predict(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the final states (M, d) that predict the response tokens, and their logits (M, V)."""
    states = find_decoder(model).forward(batch.input_ids, batch.attention_mask)
    h_Md = states.flatten(0, 1)[_rows(batch)]
    return h_Md, model.get_output_embeddings()(h_Md)


@torch.no_grad()
def _entropy(model: PreTrainedModel, pad_id: int, rollouts: Sequence[Rollout]) -> float:
    """Return the mean entropy at the positions of the response tokens, in nats."""
    logits = [_predict(model, b)[1] for b in _batches(rollouts, pad_id, model.device)]
    return Categorical(logits=torch.cat(logits)).entropy().double().mean().item()


@dataclass(frozen=True)
class Comparison:
    """A student and a teacher with the same tokens.

    Attributes:
        pad_id: padding token id.
        vocabulary: number of tokens that both models have; tables may be padded beyond.
        bridge: projectors through which the states are compared; None: the states themselves.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    pad_id: int
    vocabulary: int
    bridge: Bridge | None = None

    def check(self) -> None:
        """Check the bridge.

        Raises:
            ConfigError: if it was fitted for other models or lacks a layer.
        """
        if self.bridge is not None:
            ours, theirs = (model_info(m.config) for m in (self.student, self.teacher))
            pairs = check_pair(self.student.config, self.teacher.config, "all", bridged=True)
            self.bridge.info.check(ours, theirs, pairs)

    @cached_property
    def has_states(self) -> bool:
        """Whether hidden states can be compared."""
        widths = [find_decoder(model).width for model in (self.student, self.teacher)]
        return self.bridge is not None or widths[0] == widths[1]

    @property
    def kind(self) -> Kind:
        """OPRD's loss: ``mse`` (Eq. 6), through a bridge ``nmse`` (Eq. 15)."""
        return "mse" if self.bridge is None else "nmse"

    def closeness(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Compare distributions and, if possible, hidden states."""
        args = (self.student, self.teacher, self.pad_id, 1.0, TOP, self.bridge, self.vocabulary)
        found = Comparer(*args)(rollouts, AT_ONCE)
        values: dict[str, Any] = {
            name: getattr(found, name) for name in ("kl", "overlap", "entropy", "teacher_entropy")
        }
        if found.layer_cosine is not None:
            values |= {"cosine": found.cosine, "cosine_last_layer": found.layer_cosine[-1]}
        return values

    @torch.no_grad()
    def by_token(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Measure ``cosine_first_k``, ``cosine_last_k`` and ``token_variance`` of OPD top-1."""
        head_Vd = self.student.get_output_embeddings().weight[: self.vocabulary]
        cosines: list[Tensor] = []
        moments: list[Tensor] = []
        for batch in _batches(rollouts, self.pad_id, self.student.device):
            s_Md, s_MV = _predict(self.student, batch)
            t_Md, t_MV = _predict(self.teacher, batch)
            s_MV, t_MV = s_MV[:, : self.vocabulary], t_MV[:, : self.vocabulary]
            moments.append(torch.stack(sampled_gradient_moments(s_MV, t_MV, head_Vd)))
            if self.has_states:
                cosines.append(self._cosine(s_Md, t_Md))
        variance, mean_square = torch.cat(moments, dim=1).mean(1).tolist()
        found: dict[str, Any] = {"token_variance": {"top1": variance, "mean_square": mean_square}}
        if cosines:
            cosine_M, lengths = torch.cat(cosines), [len(r.response_ids) for r in rollouts]
            found["cosine_first_k"] = means_by_k(cosine_M, lengths, COUNTS)
            found["cosine_last_k"] = means_by_k(cosine_M, lengths, COUNTS, last=True)
        return found

    def _cosine(self, s_Md: Tensor, t_Md: Tensor) -> Tensor:
        """Return the cosine (M,) of final states, of the projected ones if bridged."""
        if self.bridge is not None:
            projectors, rows_M = Projectors(self.bridge), torch.arange(len(s_Md)).to(s_Md.device)
            last = find_decoder(self.student).num_layers - 1
            s_Md = project_rows(s_Md, rows_M, projectors.student(last, s_Md.device))
            t_Md = projectors.teacher(last, t_Md, rows_M)
        return cosine_similarity(s_Md, t_Md, dim=-1)

    def resampling_variance(
        self, rollouts: Sequence[Rollout], seed: int, shift: Shift = "before"
    ) -> float:
        """Measure the variance of OPRD's gradient over the token that is sampled at a position.

        At a random position of each of a few responses, the token is replaced by each of the two
        that the student thinks most probable. Both models read both versions, and the gradients of
        the loss at that position by the student's final states are compared.

        Args:
            shift: state that is compared at the position. With ``before`` the variance is 0,
                because the state has not read the token; with ``after`` it is not.

        Returns:
            The mean over positions of the variance, given that one of the two tokens is sampled.
        """
        rng = random.Random(seed)
        chosen = [rollouts[i] for i in spread(len(rollouts), RESAMPLED)]
        cut = [rng.randint(1, len(r.response_ids)) for r in chosen]
        prefixes = [
            replace(r, response_ids=r.response_ids[:n]) for r, n in zip(chosen, cut, strict=True)
        ]
        batch = collate(prefixes, self.pad_id, self.student.device)
        with torch.no_grad():
            logits_MV = _predict(self.student, batch)[1]
        logits_BV = logits_MV[torch.tensor(cut).cumsum(0) - 1, : self.vocabulary]
        top_B2 = logits_BV.softmax(-1).topk(2)
        p_B2 = top_B2.values.double() / top_B2.values.double().sum(-1, keepdim=True)
        at = torch.tensor([len(r) - 1 for r in prefixes])
        gradients = []
        for tokens_B in top_B2.indices.T:
            ids_BT = batch.input_ids.clone()
            ids_BT[torch.arange(len(at)), at] = tokens_B
            gradients.append(self._gradient_by_state(replace(batch, input_ids=ids_BT), shift))
        gap_B = (gradients[0] - gradients[1]).double().square().sum((1, 2))
        return (p_B2.prod(-1) * gap_B).mean().item()

    def _gradient_by_state(self, batch: Batch, shift: Shift) -> Tensor:
        """Return the gradient of OPRD at the last tokens by the student's final states, (B, T, d).

        The loss is summed over sequences.
        """
        distiller = attach(
            *(self.student, self.teacher),
            layers="last",
            kind=self.kind,
            positions="last",
            shift=shift,
            bridge=self.bridge,
        )
        last = distiller.student.num_layers - 1
        states: list[Tensor] = []
        try:
            with watch(distiller.student, [last], last + 1, lambda _, h: states.append(h)):
                out = distiller(
                    batch.input_ids, batch.attention_mask, batch.response_mask, denominator=1.0
                )
        finally:
            distiller.detach()
        return torch.autograd.grad(out.loss, states)[0]

    def signal_to_noise(
        self, rollouts: Sequence[Rollout], batches: int, seed: int
    ) -> dict[str, float]:
        """Measure signal-to-noise ratios of the gradient by all of the student's weights.

        The responses are split into batches at random. An objective whose gradients are all equal
        (0, as of a student that is its own teacher) is left out.

        Returns:
            The ratio for ``opd_top1``, ``opd_full`` and, if states can be compared, ``oprd`` (all
            layers and positions, the states before the tokens).
        """
        order = random.Random(seed).sample(rollouts, len(rollouts))
        parts = [
            collate(order[i::batches], self.pad_id, self.student.device) for i in range(batches)
        ]
        noises: dict[str, GradientNoise] = {}
        for part in parts:
            for name, gradient_P in self._opd_gradients(part):
                noises.setdefault(name, GradientNoise()).add(gradient_P)
        if self.has_states:
            noises["oprd"] = self._oprd_noise(parts)
        ratios = {name: noise.ratio() for name, noise in noises.items()}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def _opd_gradients(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of the mean losses of a batch by all weights, with their names."""
        tokens_M = batch.input_ids.flatten()[_rows(batch) + 1]
        with torch.no_grad():
            t_MV = _predict(self.teacher, batch)[1][:, : self.vocabulary]
        s_MV = _predict(self.student, batch)[1][:, : self.vocabulary]
        forms: tuple[Form, ...] = ("top1", "full")
        for form in forms:
            losses_M = VocabLoss(form).row_losses(s_MV, t_MV, tokens_M)
            yield f"opd_{form}", self._gradient(weighted_mean(losses_M, None, len(tokens_M)))

    def _oprd_noise(self, parts: Sequence[Batch]) -> GradientNoise:
        distiller = attach(
            *(self.student, self.teacher),
            kind=self.kind,
            positions="all",
            shift="before",
            bridge=self.bridge,
        )
        noise = GradientNoise()
        try:
            for part in parts:
                out = distiller(part.input_ids, part.attention_mask, part.response_mask)
                noise.add(self._gradient(out.loss))
        finally:
            distiller.detach()
        return noise

    def _gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient by all of the student's weights, (P,); its graph is kept."""
        weights = [*self.student.parameters()]
        gradients = torch.autograd.grad(
            loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in gradients])
