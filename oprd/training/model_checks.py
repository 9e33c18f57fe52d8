"""Checks that the models of a run fit together. No weights are loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from oprd.bridge.bank import BridgeInfo, read_info
from oprd.config import TrainConfig
from oprd.distributed.device import check_device
from oprd.engines.cached_rows import check_continuous, why_not
from oprd.engines.factory import kind_on
from oprd.engines.vllm.preflight import check_vllm
from oprd.errors import Attempt, ConfigError
from oprd.models.compatibility import (
    check_length,
    check_pair,
    check_student_ids,
    check_vocabularies,
    left_out,
    shared_ids,
    shares_ids,
)
from oprd.models.fast_parts import check_fast_parts
from oprd.models.info import model_info
from oprd.models.loading import demo_path, load_config, load_tokenizer, teacher_path
from oprd.models.lora import check_targets
from oprd.models.self_check import check_structure
from oprd.tokenizers.alignment import Aligner
from oprd.training.inputs import RunInputs


def check_models(
    cfg: TrainConfig, inputs: RunInputs, attempt: Attempt, dry_run: bool, sharded: bool = False
) -> None:
    """Check the student against each teacher: configurations, bridges and tokenizers.

    Args:
        inputs: tokenizers, aligners, layer pairs, bridge ranks and notes are stored in it.
        dry_run: skip bridges that do not exist yet.
        sharded: whether FSDP2 will shard the student.

    Raises:
        ConfigError: for the first problem.
    """
    bridges = _read_bridges(cfg, inputs, dry_run)
    student = attempt(lambda: load_config(cfg.student.path))
    if student and cfg.student.lora.rank is not None:
        check_targets(student, cfg.student.lora)
    if student and (parts := left_out(student)):
        inputs.notes.append(
            f"{cfg.student.path} is a multimodal model: its language model alone is trained and "
            f"saved, without its {', '.join(parts)}"
        )
    student_products = cfg.autocast or (sharded and cfg.fsdp.param_dtype) or cfg.student.dtype
    device = check_device(cfg.device)
    attempt(
        lambda: check_fast_parts(cfg.student, student, "student", str(student_products), device)
    )
    inputs.notes += _generation_notes(cfg)
    own = cfg.student.context_length
    _check_length(cfg, student, "student", cfg.data.max_prompt_tokens, bool(cfg.eval.sets), own)
    if cfg.rollout.staleness and cfg.rollout.engine != "vllm":
        inputs.notes.append(
            f"rollout.staleness=1 saves no time with rollout.engine={cfg.rollout.engine}, which "
            "samples before the update, not beside it: this shows what staleness does to the "
            "student"
        )
    if student and cfg.rollout.engine == "continuous":
        attempt(lambda: check_continuous(student, cfg.student.path, "rollout.engine"))
    elif (
        student
        and kind_on(cfg.rollout.engine, device) == "continuous"
        and (problem := why_not(student))
    ):
        inputs.notes.append(f"rollout.engine=auto: sampling with generate, since {problem}")
    if cfg.rollout.engine == "vllm":
        inputs.notes += attempt(lambda: check_vllm(cfg, student, device)) or []
    inputs.tokenizer = attempt(lambda: load_tokenizer(cfg.student.path))
    for name in cfg.all_teachers:
        _check_teacher(cfg, inputs, name, student, bridges.get(name), attempt, sharded)


def _read_bridges(cfg: TrainConfig, inputs: RunInputs, dry_run: bool) -> dict[str, BridgeInfo]:
    """Return the metadata of each teacher's bridge.

    A dry run skips bridges that have not been fitted yet.
    """
    bridges, ranks = {}, inputs.bridge_ranks
    for name, b in cfg.all_bridges.items():
        if b.path is None:
            continue
        if dry_run and not Path(b.path).exists():
            inputs.unchecked.append(f"the bridge {b.path}: it does not exist yet")
            continue
        bridges[name] = info = read_info(b.path)
        ranks[name] = info.check_rank(b.rank)
        inputs.notes += _bridge_notes(cfg, name, info)
    if len(set(ranks.values())) > 1:
        raise ConfigError(
            f"bridges have different ranks ({', '.join(f'{n}: {r}' for n, r in ranks.items())}), "
            f"so their losses have different scales: set bridges.{next(iter(ranks))}.rank and the "
            f"other bridges' ranks to {min(ranks.values())}"
        )
    return bridges


def _bridge_notes(cfg: TrainConfig, teacher: str, bridge: BridgeInfo) -> list[str]:
    notes, pairs = [], cfg.all_teachers[teacher].pairs
    if bridge.shift is not None and bridge.shift != cfg.distill.shift:
        notes.append(
            f"the bridge was fitted with shift={bridge.shift!r}, but this run has "
            f"distill.shift={cfg.distill.shift!r}"
        )
    if bridge.teacher_pairs not in (None, pairs):
        option = f"teachers.{teacher}.pairs" if teacher else "teacher.pairs"
        notes.append(
            f"the bridge was fitted with pairs={bridge.teacher_pairs!r}, but this run has "
            f"{option}={pairs!r}"
        )
    return notes


def _check_teacher(
    cfg: TrainConfig,
    inputs: RunInputs,
    name: str,
    student: PretrainedConfig | None,
    bridge: BridgeInfo | None,
    attempt: Attempt,
    sharded: bool,
) -> None:
    path = teacher_path(cfg.all_teachers[name], cfg.student)
    teacher = attempt(lambda: load_config(path))
    _check_parts(cfg, name, teacher, attempt, sharded)
    is_unread = cfg.all_bridges[name].path is not None and bridge is None
    if student and teacher:
        if "oprd" in cfg.objectives and not is_unread:
            inputs.layer_pairs[name] = _check_states(cfg, student, teacher, bridge, sharded)
        _check_heads(cfg, student, teacher)
    who = f"teacher of {name}" if name else "teacher"
    longest = max(cfg.data.max_prompt_tokens, cfg.data.teacher_prompt_limit)
    own = cfg.all_teachers[name].context_length
    _check_length(cfg, teacher, who, longest, bool(cfg.eval.sets) and cfg.eval.teacher, own)
    ours, theirs = inputs.tokenizer, attempt(lambda: load_tokenizer(path))
    if not ours or not theirs or not teacher:
        return
    if shares_ids(ours, theirs):
        reads = "shared_ids"
        check_vocabularies(ours, theirs, teacher)
        inputs.notes += _vocabulary_notes(student, teacher, ours, theirs)
        inputs.shared_ids[name] = shared_ids(ours, theirs)
    else:
        reads = cfg.all_teachers[name].reads
        _check_other_tokenizer(cfg, inputs, name, theirs, teacher)
    if bridge is not None and student and name in inputs.layer_pairs:
        bridge.check(
            model_info(student, tokenizer=ours),
            model_info(teacher, tokenizer=theirs),
            inputs.layer_pairs[name],
        )
        bridge.check_input(reads)


def _check_parts(
    cfg: TrainConfig, name: str, config: PretrainedConfig | None, attempt: Attempt, sharded: bool
) -> None:
    """Check the options of a teacher that has weights of its own."""
    teacher = cfg.all_teachers[name]
    if teacher.shares_student:
        return
    gathered = cfg.fsdp.param_dtype if sharded and cfg.fsdp.teacher != "replicated" else None
    products, device = cfg.autocast or gathered or teacher.dtype, check_device(cfg.device)
    who = f"teachers.{name}" if name else "teacher"
    if teacher.fp8 and sharded and cfg.fsdp.teacher != "replicated":
        raise ConfigError(
            f"{who}.fp8=true with fsdp.teacher={cfg.fsdp.teacher}: float8 weights are not sharded. "
            "Set fsdp.teacher=replicated, or leave fp8 out"
        )
    attempt(lambda: check_fast_parts(teacher, config, who, products, device))


def _check_states(
    cfg: TrainConfig,
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    bridge: BridgeInfo | None,
    sharded: bool,
) -> list[tuple[int, int]]:
    """Return the compared (student block, teacher block) pairs."""
    pairs = check_pair(student, teacher, cfg.distill.layers, bridged=bridge is not None)
    if bridge is not None:
        bridge.check(model_info(student), model_info(teacher), pairs)
    check_structure(student, [block for block, _ in pairs], "student", sharded)
    is_sharded = sharded and cfg.fsdp.teacher != "replicated"
    check_structure(teacher, [block for _, block in pairs], "teacher", is_sharded)
    return pairs


def _check_heads(cfg: TrainConfig, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    tops = [name for name in cfg.objectives if name.startswith("opd_topk")]
    rows = min(c.get_text_config().vocab_size for c in (student, teacher))
    if tops and cfg.opd.k > rows:
        raise ConfigError(
            f"opd.k={cfg.opd.k}, but {', '.join(tops)} can't use more tokens than the "
            f"vocabulary has, {rows}: set opd.k to that or less, or use opd_full"
        )
    widths = [model_info(c).width for c in (student, teacher)]
    if cfg.distill.init_head_from_teacher and widths[0] != widths[1]:
        raise ConfigError(
            f"distill.init_head_from_teacher: the student is {widths[0]} wide and the "
            f"teacher {widths[1]}, so the teacher's head does not fit: turn this off"
        )


def _check_other_tokenizer(
    cfg: TrainConfig,
    inputs: RunInputs,
    name: str,
    theirs: PreTrainedTokenizerBase,
    teacher: PretrainedConfig,
) -> None:
    """Check a teacher with another tokenizer; store its tokenizer and an aligner in ``inputs``."""
    ours = inputs.tokenizer
    assert ours is not None
    others = [o for o in cfg.objectives if o != "oprd"]
    if others:
        raise ConfigError(
            f"student and teacher have different vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens): {', '.join(others)} compare distributions over one. Use only oprd, "
            "or choose a teacher that shares the student's tokenizer"
        )
    if cfg.distill.init_head_from_teacher:
        raise ConfigError(
            "distill.init_head_from_teacher: the teacher has another vocabulary: turn this off"
        )
    if cfg.all_teachers[name].reads == "student_ids":
        check_student_ids(ours, teacher)
        inputs.notes.append(
            "the teacher reads the student's token ids, which mean something else to it "
            "(reads=student_ids)"
        )
        return
    inputs.aligners[name] = Aligner(ours, theirs, cfg.all_teachers[name].pairs)
    inputs.teacher_tokenizers[name] = theirs
    inputs.notes.append(
        "the teacher has another tokenizer: it reads the text of the responses, and states are "
        "compared where tokens of both end at the same byte (align/ratio)"
    )


def _generation_notes(cfg: TrainConfig) -> list[str]:
    """Return a note if the student's generation_config.json asks for what sampling ignores."""
    try:
        own = GenerationConfig.from_pretrained(demo_path(cfg.student.path))
    except (OSError, ValueError):
        return []
    ours = {
        "temperature": cfg.rollout.temperature,
        "top_p": cfg.rollout.top_p,
        "top_k": 0,
        "min_p": 0,
        "typical_p": 1,
        "repetition_penalty": 1,
        "max_new_tokens": cfg.rollout.max_new_tokens,
    }
    asked = {name: getattr(own, name, None) for name in ours}
    differing = [f"{n}={v}" for n, v in asked.items() if v is not None and v != ours[n]]
    if not differing:
        return []
    return [
        f"generation_config.json of {cfg.student.path} asks for {', '.join(differing)}: sampling "
        "follows rollout.* alone, without top-k and penalties"
    ]


def _check_length(
    cfg: TrainConfig,
    config: PretrainedConfig | None,
    who: str,
    prompt: int,
    evaluated: bool,
    context_length: int | None,
) -> None:
    if config is not None:
        new = max(cfg.rollout.max_new_tokens, cfg.eval.max_new_tokens if evaluated else 0)
        check_length(config, prompt, new, who, context_length)


def _vocabulary_notes(
    student: PretrainedConfig | None,
    teacher: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    notes = []
    more = teacher_tokenizer.get_vocab().keys() - tokenizer.get_vocab().keys()
    if more:
        notes.append(
            f"the teacher has {len(more)} tokens that the student has not, e.g. {min(more)!r}. The "
            f"student's {len(tokenizer)} mean the same to both: states are compared position by "
            "position, and distributions (opd_*) over the student's tokens"
        )
    elif student is not None:
        rows = [c.get_text_config().vocab_size for c in (student, teacher)]
        if rows[0] != rows[1]:
            notes.append(
                f"embedding tables of {rows[0]} and {rows[1]} rows for the same {len(tokenizer)} "
                "tokens: the tables are padded differently, which has no effect on training"
            )
    if tokenizer.eos_token != teacher_tokenizer.eos_token:
        notes.append(
            f"the student ends with {tokenizer.eos_token!r}, the teacher with "
            f"{teacher_tokenizer.eos_token!r}: watch response_length/mean, because the student may "
            "learn not to end its responses"
        )
    return notes
