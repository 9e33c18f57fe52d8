"""The configuration of a fit, and everything that can be found wrong with it beforehand."""

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
    same_vocabulary,
)
from oprd.models.info import ModelInfo, model_info
from oprd.models.layer_pairs import corresponding_layer, select_layers
from oprd.models.loading import load_config, load_tokenizer
from oprd.tokenizers.alignment import Aligner


@dataclass
class Checked:
    """What the checks loaded on their way, and what they could not check.

    Attributes:
        tokenizer: the student's.
        prompts: chosen ones, in the order of the fit; the first ``held_out_prompts`` of them
            are held out.
        pairs: (student block, teacher block).
        student, teacher: as the bridge's file will describe them.
        notes: what the user should know.
        unchecked: what lies on a hub that is out of reach; only ever filled by a dry run. The rest
            may then be missing.
        aligner, teacher_tokenizer: if the teacher reads the responses' text in its own tokens.
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
        """As `BridgeInfo.teacher_input`."""
        if self.aligner is not None:
            return "text"
        assert self.student is not None
        assert self.teacher is not None
        same = self.student.vocabulary == self.teacher.vocabulary
        return "shared_ids" if same else "student_ids"


def pair_for_fit(layers: str | list[int], student: int, teacher: int) -> list[tuple[int, int]]:
    """(student block, teacher block) by Eq. 11. Unlike in training, two student layers may stand
    beside one layer of a shallower teacher: training chooses among them.

    Raises:
        ConfigError: if the layers asked for don't exist.
    """
    try:
        blocks = select_layers(layers, student)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [(block, corresponding_layer(block, student, teacher)) for block in blocks]


def check_fit(cfg: FitConfig, dry_run: bool = False) -> Checked:
    """Check configuration, models' configurations, tokenizers, prompts and output.

    Args:
        dry_run: go on where the hub is out of reach, and list what was therefore not checked.

    Raises:
        ConfigError: the first problem found (of the values: all of them).
    """
    check_values(cfg)
    check_new_file(cfg.output)
    check_device(cfg.device)
    found = Checked()
    attempt = attempts(found.unchecked, dry_run)
    student, teacher = (
        attempt(partial(load_config, path)) for path in (cfg.student.path, cfg.teacher.path)
    )
    found.tokenizer, theirs = (
        attempt(partial(load_tokenizer, path)) for path in (cfg.student.path, cfg.teacher.path)
    )
    _check_tokenizers(cfg, found, theirs, teacher)
    if student:
        found.student = model_info(student, cfg.student.path, found.tokenizer)
        limit = cfg.data.max_prompt_tokens
        check_length(student, limit, cfg.rollout.max_new_tokens, "student")
    if teacher:
        found.teacher = model_info(teacher, cfg.teacher.path, theirs)
        limit = max(cfg.data.max_prompt_tokens, cfg.data.teacher_prompt_limit)
        check_length(teacher, limit, cfg.rollout.max_new_tokens, "teacher")
    _check_shapes(cfg, found)
    if found.tokenizer is None:
        found.unchecked.append("the prompts: they need the student's tokenizer")
        return found
    others = {} if found.teacher_tokenizer is None else {"": found.teacher_tokenizer}
    load = partial(load_prompts, teacher_tokenizers=others)
    if prompts := attempt(partial(load, cfg.data.train, cfg.data, found.tokenizer)):
        _choose_prompts(cfg, found, prompts)
    return found


def _check_tokenizers(
    cfg: FitConfig,
    found: Checked,
    theirs: PreTrainedTokenizerBase | None,
    teacher: PretrainedConfig | None,
) -> None:
    """How the teacher will read responses."""
    ours = found.tokenizer
    if not ours or not theirs or not teacher:
        return
    if same_vocabulary(ours, theirs):
        check_vocabularies(ours, theirs, teacher)
    elif cfg.teacher.reads == "text":
        found.aligner = Aligner(ours, theirs, cfg.teacher.pairs)
        found.teacher_tokenizer = theirs
    else:
        check_student_ids(ours, teacher)


def _check_shapes(cfg: FitConfig, found: Checked) -> None:
    """Widths and depths; the pairs of layers."""
    widths = [model.width for model in (found.student, found.teacher) if model]
    if widths and cfg.rank > min(widths):
        raise ConfigError(f"rank must be at most the smaller width, {min(widths)}, got {cfg.rank}")
    if found.student and found.teacher:
        assert found.student.layers is not None
        assert found.teacher.layers is not None
        found.pairs = pair_for_fit(cfg.layers, found.student.layers, found.teacher.layers)


def _choose_prompts(cfg: FitConfig, found: Checked, prompts: PromptSet) -> None:
    if prompts.dropped:
        found.notes.append(
            f"{prompts.dropped} prompts dropped, longer than {cfg.data.max_prompt_tokens} tokens"
        )
    if len(prompts) < 2:
        raise ConfigError(
            f"{cfg.data.train.path} has {len(prompts)} prompt: at least 2 are needed, one is held "
            "out"
        )
    if len(prompts) < cfg.prompts:
        found.notes.append(f"prompts={cfg.prompts} is asked for, {len(prompts)} are there")
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(prompts), generator=generator)[: cfg.prompts].tolist()
    found.prompts = [prompts.prompts[i] for i in order]
    found.held_out_prompts = min(max(1, round(cfg.held_out * len(order))), len(order) - 1)
