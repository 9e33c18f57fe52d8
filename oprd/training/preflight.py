"""Everything that can be found wrong with a run before its first weight is loaded."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from oprd import distributed
from oprd.bridge.bank import BridgeInfo, read_info
from oprd.checkpoint.resume import Candidates, find_candidates, is_run
from oprd.config import TrainConfig, check_values
from oprd.data.prompts import Prompt, PromptSet, load_prompts, load_training_prompts
from oprd.distributed.device import check_device
from oprd.engines.vllm.preflight import check_vllm
from oprd.errors import Attempt, ConfigError, Problems, attempts
from oprd.models.compatibility import (
    check_length,
    check_pair,
    check_student_ids,
    check_vocabularies,
    same_vocabulary,
)
from oprd.models.info import model_info
from oprd.models.loading import load_config, load_tokenizer, teacher_path
from oprd.models.lora import check_targets
from oprd.observability.trackers import check_trackers
from oprd.tokenizers.alignment import Aligner
from oprd_kernels.backends import registry


@dataclass
class Preflight:
    """What the checks loaded on their way, and what they could not check.

    Attributes:
        tokenizer: the student's.
        train, eval_sets: tokenised prompts.
        aligners, teacher_tokenizers, teacher_sets: by teacher, of those with other tokenizers: who
            pairs tokens, and the evaluation sets in their tokens.
        layer_pairs: by teacher, (student block, teacher block).
        resume: the checkpoints that the run can go on from.
        notes: what the user should know.
        unchecked: what lies on a hub that is out of reach, or yet to be made; filled by dry runs
            alone.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    train: PromptSet | None = None
    eval_sets: dict[str, PromptSet] = field(default_factory=dict)
    aligners: dict[str, Aligner] = field(default_factory=dict)
    teacher_tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    teacher_sets: dict[str, dict[str, PromptSet]] = field(default_factory=dict)
    layer_pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    bridge_ranks: dict[str, int] = field(default_factory=dict)
    resume: Candidates = field(default_factory=Candidates)
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def asked(self, teacher: str | None, name: str) -> list[Prompt]:
        """The prompts of an evaluation set, for the student (None) or as a teacher is told them."""
        if teacher is None:
            return self.eval_sets[name].prompts
        prompts = self.teacher_sets.get(teacher, self.eval_sets)[name].prompts
        return [replace(p, token_ids=p.teacher_ids or p.token_ids) for p in prompts]


def preflight(cfg: TrainConfig, dry_run: bool = False, ranks: int | None = None) -> Preflight:
    """Check configuration, models' configurations, tokenizers, prompts and output directory.

    Args:
        dry_run: go on where the hub is out of reach, and list what was therefore not checked.
        ranks: that the run is to have; None: those that there are.

    Raises:
        ConfigError: the first problem found (of the values: all of them).
    """
    check_values(cfg)
    found = Preflight()
    attempt = attempts(found.unchecked, dry_run)
    _check_world(cfg, distributed.world_size() if ranks is None else ranks)
    check_output_dir(cfg)
    found.resume = find_candidates(cfg, output_dir(cfg))
    found.notes += found.resume.notes
    device, backend = check_device(cfg.device), cfg.distill.backend
    if backend != "auto" and (reason := registry.unavailable(backend, device)):
        raise ConfigError(f"distill.backend={backend} can't run: {reason}")

    check_trackers(cfg.logging)
    found.notes += _packing_notes(cfg)
    bridges = _read_bridges(cfg, found, dry_run)

    student = attempt(lambda: load_config(cfg.student.path))
    if student and cfg.student.lora.rank is not None:
        check_targets(student, cfg.student.lora)
    _check_length(cfg, student, "student", cfg.data.max_prompt_tokens, bool(cfg.eval.sets))
    if cfg.rollout.engine == "vllm":
        found.notes += attempt(lambda: check_vllm(cfg, student, device)) or []
    found.tokenizer = tokenizer = attempt(lambda: load_tokenizer(cfg.student.path))
    for name in cfg.all_teachers:
        _check_teacher(cfg, found, name, student, bridges.get(name), attempt)

    if tokenizer is None:
        found.unchecked.append("the prompts: they need the student's tokenizer")
        return found
    tokenizers = found.teacher_tokenizers
    found.train = attempt(lambda: load_training_prompts(cfg.data, tokenizer, tokenizers))
    if found.train:
        _check_sources(cfg, found.train)
    for name, source in cfg.eval.sets.items():
        load = partial(load_prompts, source, cfg.data, tokenizer, for_evaluation=True)
        prompts = attempt(load)
        if prompts:
            found.eval_sets[name] = prompts
        for who, other in tokenizers.items() if cfg.eval.teacher else ():
            theirs = attempt(partial(load_prompts, source, cfg.data, other, for_evaluation=True))
            if theirs:
                found.teacher_sets.setdefault(who, {})[name] = theirs
    train = {"data.sources" if cfg.data.sources else "data.train": found.train}
    for name, prompts in {**train, **found.eval_sets}.items():
        if prompts and prompts.dropped:
            found.notes.append(
                f"{name}: {prompts.dropped} of {prompts.dropped + len(prompts)} prompts dropped, "
                f"longer than {cfg.data.max_prompt_tokens} tokens"
            )
        if prompts and prompts.repeated:
            found.notes.append(f"{name}: {prompts.repeated} repetitions of prompts left out")
    return found


def _packing_notes(cfg: TrainConfig) -> list[str]:
    """Whether sequences are kept apart at all is tried on the models (`models.packing_check`)."""
    chosen = {cfg.student.attn_implementation}
    chosen |= {teacher.attn_implementation for teacher in cfg.all_teachers.values()}
    if not cfg.packing or not chosen & {None, "sdpa", "eager"}:
        return []
    return [
        "packing with sdpa or eager attention costs as much as one sequence of "
        f"{cfg.micro_batch_tokens} tokens (micro_batch_tokens): on a GPU set attn_implementation "
        "to flash_attention_2 or flex_attention"
    ]


def _read_bridges(cfg: TrainConfig, found: Preflight, dry_run: bool) -> dict[str, BridgeInfo]:
    """What the teachers' bridges say of themselves, by teacher. One that is yet to be fitted stops
    no dry run."""
    bridges, ranks = {}, found.bridge_ranks
    for name, b in cfg.all_bridges.items():
        if b.path is None:
            continue
        if dry_run and not Path(b.path).exists():
            found.unchecked.append(f"the bridge {b.path}: it is not there")
            continue
        bridges[name] = info = read_info(b.path)
        ranks[name] = info.check_rank(b.rank)
        found.notes += _bridge_notes(cfg, name, info)
    if len(set(ranks.values())) > 1:
        raise ConfigError(
            f"bridges have different ranks ({', '.join(f'{n}: {r}' for n, r in ranks.items())}), "
            f"and losses of another scale: set bridges.{next(iter(ranks))}.rank and the others' to "
            f"{min(ranks.values())}"
        )
    return bridges


def _bridge_notes(cfg: TrainConfig, teacher: str, bridge: BridgeInfo) -> list[str]:
    notes, pairs = [], cfg.all_teachers[teacher].pairs
    if bridge.shift is not None and bridge.shift != cfg.distill.shift:
        notes.append(
            f"the bridge was fitted on states {bridge.shift!r} a token, this run compares those "
            f"{cfg.distill.shift!r} it (distill.shift)"
        )
    if bridge.teacher_pairs not in (None, pairs):
        option = f"teachers.{teacher}.pairs" if teacher else "teacher.pairs"
        notes.append(
            f"the bridge was fitted on pairs {bridge.teacher_pairs!r} of the two tokenizers' "
            f"tokens, this run compares {pairs!r} ({option})"
        )
    return notes


def _check_world(cfg: TrainConfig, ranks: int) -> None:
    problems = Problems()
    own = any(not teacher.is_self for teacher in cfg.all_teachers.values())
    cfg.fsdp.check(problems, cfg.autocast, ranks, own)
    problems.refuse()
    if cfg.rollout.prompts_per_step % ranks:
        raise ConfigError(
            f"rollout.prompts_per_step={cfg.rollout.prompts_per_step} can't be shared equally by "
            f"{ranks} ranks: choose a multiple"
        )


def _check_teacher(
    cfg: TrainConfig,
    found: Preflight,
    name: str,
    student: PretrainedConfig | None,
    bridge: BridgeInfo | None,
    attempt: Attempt,
) -> None:
    """One teacher beside the student; adds to ``found`` what the run needs of it."""
    path = teacher_path(cfg.all_teachers[name], cfg.student)
    teacher = attempt(lambda: load_config(path))
    unread = cfg.all_bridges[name].path is not None and bridge is None
    if student and teacher and "oprd" in cfg.objectives and not unread:
        pairs = check_pair(student, teacher, cfg.distill.layers, bridged=bridge is not None)
        if bridge is not None:
            bridge.check(model_info(student), model_info(teacher), pairs)
        found.layer_pairs[name] = pairs
    if student and teacher:
        _check_top_k(cfg, student, teacher)
    if student and teacher and cfg.distill.init_head_from_teacher:
        widths = [model_info(c).width for c in (student, teacher)]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"distill.init_head_from_teacher: the student is {widths[0]} wide and the "
                f"teacher {widths[1]}, so the teacher's head does not fit: leave it off"
            )
    who = f"teacher of {name}" if name else "teacher"
    longest = max(cfg.data.max_prompt_tokens, cfg.data.teacher_prompt_limit)
    _check_length(cfg, teacher, who, longest, bool(cfg.eval.sets) and cfg.eval.teacher)
    ours, theirs = found.tokenizer, attempt(lambda: load_tokenizer(path))
    if not ours or not theirs or not teacher:
        return
    reads = "shared_ids"
    if same_vocabulary(ours, theirs):
        check_vocabularies(ours, theirs, teacher)
        found.notes += _vocabulary_notes(student, teacher, ours, theirs)
    else:
        reads = cfg.all_teachers[name].reads
        _other_tokenizer(cfg, found, name, theirs, teacher)
    if bridge is not None and student and name in found.layer_pairs:
        bridge.check(
            model_info(student, tokenizer=ours),
            model_info(teacher, tokenizer=theirs),
            found.layer_pairs[name],
        )
        bridge.check_input(reads)


def _check_top_k(cfg: TrainConfig, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    tops = [name for name in cfg.objectives if name.startswith("opd_topk")]
    rows = min(c.get_text_config().vocab_size for c in (student, teacher))
    if tops and cfg.opd.k > rows:
        raise ConfigError(
            f"opd.k={cfg.opd.k}, but {', '.join(tops)} can't look at more tokens than the "
            f"vocabulary has, {rows}: set opd.k to that or less, or take opd_full"
        )


def _other_tokenizer(
    cfg: TrainConfig,
    found: Preflight,
    name: str,
    theirs: PreTrainedTokenizerBase,
    teacher: PretrainedConfig,
) -> None:
    """What a teacher whose tokenizer is not the student's needs."""
    ours = found.tokenizer
    assert ours is not None
    others = [o for o in cfg.objectives if o != "oprd"]
    if others:
        raise ConfigError(
            f"student and teacher have different vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens): {', '.join(others)} compare distributions over one. Train with oprd alone, "
            "or choose a teacher that shares the student's tokenizer"
        )
    if cfg.distill.init_head_from_teacher:
        raise ConfigError(
            "distill.init_head_from_teacher: the teacher has another vocabulary: leave it off"
        )
    if cfg.all_teachers[name].reads == "student_ids":
        check_student_ids(ours, teacher)
        found.notes.append(
            "the teacher reads the student's token ids, which mean something else to it "
            "(reads=student_ids)"
        )
        return
    found.aligners[name] = Aligner(ours, theirs, cfg.all_teachers[name].pairs)
    found.teacher_tokenizers[name] = theirs
    found.notes.append(
        "the teacher has another tokenizer: it reads the responses' text, compared where tokens of "
        "both end together (align/ratio)"
    )


def _check_length(
    cfg: TrainConfig, config: PretrainedConfig | None, who: str, prompt: int, evaluated: bool
) -> None:
    if config is not None:
        new = max(cfg.rollout.max_new_tokens, cfg.eval.max_new_tokens if evaluated else 0)
        check_length(config, prompt, new, who)


def _check_sources(cfg: TrainConfig, train: PromptSet) -> None:
    """Every source has a teacher, every teacher a source, and something to say."""
    sources = {p.source for p in train.prompts}
    if cfg.teachers and (missing := sorted(sources - set(cfg.teachers))):
        raise ConfigError(
            f"no teacher for the prompts of {', '.join(missing)}: teachers has "
            f"{', '.join(cfg.teachers)}"
        )
    if cfg.teachers and (idle := sorted(set(cfg.teachers) - sources)):
        raise ConfigError(
            f"no prompts for the teacher of {', '.join(idle)}: their sources are "
            f"{', '.join(sorted(sources))} (data.sources, or source_field)"
        )
    selves = {name for name, teacher in cfg.all_teachers.items() if teacher.is_self}
    blind = {p.source for p in train.prompts if p.teacher_ids is None}
    if selves and (same := sorted(blind if "" in selves else blind & selves)):
        raise ConfigError(
            f"the teacher is the student itself and reads the same prompts ({', '.join(same)}): it "
            "has nothing to teach. Tell it more by teacher_prompt of these prompts"
        )


def _vocabulary_notes(
    student: PretrainedConfig | None,
    teacher: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    notes = []
    if student is not None:
        rows = [c.get_text_config().vocab_size for c in (student, teacher)]
        if rows[0] != rows[1]:
            notes.append(
                f"embedding tables of {rows[0]} and {rows[1]} rows for the same {len(tokenizer)} "
                "tokens: padded differently, which does not matter here"
            )
    if tokenizer.eos_token != teacher_tokenizer.eos_token:
        notes.append(
            f"the student ends with {tokenizer.eos_token!r}, the teacher with "
            f"{teacher_tokenizer.eos_token!r}: watch response_length/mean, students have been seen "
            "to stop ending their responses"
        )
    return notes


def output_dir(cfg: TrainConfig) -> Path:
    """Where the run writes; a default is named after the run and the time."""
    if cfg.output_dir is not None:
        return Path(cfg.output_dir)
    return Path("runs") / f"{cfg.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _goes_on(cfg: TrainConfig, directory: Path) -> bool:
    """Whether ``cfg.resume`` asks to go on with the run in a directory."""
    if cfg.resume is None or cfg.resume == "auto":
        return cfg.resume == "auto"
    directory, asked = directory.resolve(), Path(cfg.resume).resolve()
    return asked == directory or directory in asked.parents


def check_output_dir(cfg: TrainConfig) -> None:
    """Refuse a directory with anything in it but a run to go on with, or one that can't be written.

    Raises:
        ConfigError: saying what is there.
    """
    path = output_dir(cfg)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir {path} is a file: choose a new directory")
    if path.is_dir() and any(path.iterdir()) and not (is_run(path) and _goes_on(cfg, path)):
        what = "another run" if is_run(path) else "other files"
        raise ConfigError(
            f"output_dir {path} already holds {what}, which would be lost: choose a new directory"
            + (", or go on with it by resume=auto" if is_run(path) else "")
        )
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"output_dir {path} can't be written: no permission in {parent}")
