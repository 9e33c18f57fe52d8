"""Checks of a fit's configuration, models and data, before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from oprd.bridge.bank import check_new_file
from oprd.bridge.config import FitConfig, check_values
from oprd.data.prompts import Prompt, PromptSet, load_prompts
from oprd.distributed.device import check_device
from oprd.errors import ConfigError, attempts
from oprd.models.compatibility import (
    check_length,
    check_student_ids,
    check_vocabularies,
    shares_ids,
)
from oprd.models.defaults import choose_dtypes, choose_lengths
from oprd.models.fast_parts import check_fast_parts
from oprd.models.info import ModelInfo, model_info
from oprd.models.layer_pairs import corresponding_layer, select_layers
from oprd.models.loading import load_config, load_tokenizer
from oprd.tokenizers.alignment import Aligner


@dataclass
class Checked:
    """The result of the checks: what they loaded, and what they could not check.

    Attributes:
        tokenizer: the student's tokenizer.
        prompts: the prompts chosen, in the order of the fit. The first ``held_out_prompts`` of them
            are held out.
        held_out_prompts: number of held-out prompts.
        pairs: (student block, teacher block).
        student, teacher: the models as the bridge's file will describe them.
        notes: messages for the user.
        unchecked: messages about what could not be checked because the hub is unreachable. Only a
            dry run fills it; other attributes may then be missing.
        aligner, teacher_tokenizer: set if the teacher reads the responses' text in its own tokens.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: list[Prompt] = field(default_factory=list)
    held_out_prompts: int = 0
    pairs: list[tuple[int, int]] = field(default_factory=list)
    student: ModelInfo | None = None
    teacher: ModelInfo | None = None
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    aligner: Aligner | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def teacher_input(self) -> str:
        """The value of `BridgeInfo.teacher_input`."""
        if self.aligner is not None:
            return "text"
        assert self.student is not None
        assert self.teacher is not None
        same = self.student.vocabulary == self.teacher.vocabulary
        return "shared_ids" if same else "student_ids"


def pair_for_fit(layers: str | list[int], student: int, teacher: int) -> list[tuple[int, int]]:
    """Return (student block, teacher block) for every selected layer, by Eq. 11.

    Unlike in training, two student layers may be paired with the same layer of a shallower teacher:
    training chooses among them.

    Raises:
        ConfigError: if ``layers`` names layers that don't exist.
    """
    try:
        blocks = select_layers(layers, student)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [(block, corresponding_layer(block, student, teacher)) for block in blocks]


def check_fit(cfg: FitConfig, dry_run: bool = False) -> Checked:
    """Check a fit: its configuration, the models' configurations, tokenizers, prompts and output.

    Args:
        cfg: the configuration.
        dry_run: continue if the hub is unreachable, and list what was not checked for this reason.

    Raises:
        ConfigError: at the first problem. All problems of the configuration's own values are
            reported together.
    """
    check_values(cfg)
    check_new_file(cfg.output)
    device = check_device(cfg.device)
    choose_dtypes(cfg.student, [cfg.teacher], device.type == "cuda", trains=False)
    cfg.autocast = None if cfg.autocast == "auto" else cfg.autocast
    checked = Checked()
    attempt = attempts(checked.unchecked, dry_run)
    student, teacher = (
        attempt(partial(load_config, path)) for path in (cfg.student.path, cfg.teacher.path)
    )
    sides = (("student", cfg.student, student), ("teacher", cfg.teacher, teacher))
    for who, model, config in sides:
        products = cfg.autocast or model.dtype
        attempt(partial(check_fast_parts, model, config, who, products, device))
    pairs = [(student, cfg.student.context_length), (teacher, cfg.teacher.context_length)]
    checked.notes += choose_lengths(cfg.data, cfg.rollout, None, pairs)
    checked.tokenizer, theirs = (
        attempt(partial(load_tokenizer, path)) for path in (cfg.student.path, cfg.teacher.path)
    )
    _check_tokenizers(cfg, checked, theirs, teacher)
    if student:
        checked.student = model_info(student, cfg.student.path, checked.tokenizer)
        limit = cfg.data.max_prompt_tokens
        check_length(
            student, limit, cfg.rollout.max_new_tokens, "student", cfg.student.context_length
        )
    if teacher:
        checked.teacher = model_info(teacher, cfg.teacher.path, theirs)
        limit = max(cfg.data.max_prompt_tokens, cfg.data.teacher_prompt_limit)
        check_length(
            teacher, limit, cfg.rollout.max_new_tokens, "teacher", cfg.teacher.context_length
        )
    _check_shapes(cfg, checked)
    if checked.tokenizer is None:
        checked.unchecked.append("the prompts: they need the student's tokenizer")
        return checked
    others = {} if checked.teacher_tokenizer is None else {"": checked.teacher_tokenizer}
    load = partial(load_prompts, teacher_tokenizers=others)
    if prompts := attempt(partial(load, cfg.data.train, cfg.data, checked.tokenizer)):
        _choose_prompts(cfg, checked, prompts)
    return checked


def _check_tokenizers(
    cfg: FitConfig,
    checked: Checked,
    theirs: PreTrainedTokenizerBase | None,
    teacher: PretrainedConfig | None,
) -> None:
    """Check the tokenizers, and set the aligner if the teacher reads text in its own tokens."""
    ours = checked.tokenizer
    if not ours or not theirs or not teacher:
        return
    if shares_ids(ours, theirs):
        check_vocabularies(ours, theirs, teacher)
    elif cfg.teacher.reads == "text":
        checked.aligner = Aligner(ours, theirs, cfg.teacher.pairs)
        checked.teacher_tokenizer = theirs
    else:
        check_student_ids(ours, teacher)


def _check_shapes(cfg: FitConfig, checked: Checked) -> None:
    """Check the rank against the models' widths, and set the layer pairs."""
    widths = [model.width for model in (checked.student, checked.teacher) if model]
    if widths and cfg.rank > min(widths):
        raise ConfigError(f"rank must be at most the smaller width, {min(widths)}, got {cfg.rank}")
    if checked.student and checked.teacher:
        assert checked.student.layers is not None
        assert checked.teacher.layers is not None
        checked.pairs = pair_for_fit(cfg.layers, checked.student.layers, checked.teacher.layers)


def _choose_prompts(cfg: FitConfig, checked: Checked, prompts: PromptSet) -> None:
    checked.notes += prompts.lost
    if prompts.dropped:
        checked.notes.append(
            f"{prompts.dropped} prompts dropped, longer than {cfg.data.max_prompt_tokens} tokens"
        )
    if len(prompts) < 2:
        raise ConfigError(
            f"{cfg.data.train.path} has {len(prompts)} prompt: at least 2 are needed, because one "
            "is held out"
        )
    if len(prompts) < cfg.prompts:
        checked.notes.append(f"prompts={cfg.prompts}, but data.train has only {len(prompts)}")
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(prompts), generator=generator)[: cfg.prompts].tolist()
    checked.prompts = [prompts.prompts[i] for i in order]
    checked.held_out_prompts = min(max(1, round(cfg.held_out * len(order))), len(order) - 1)
