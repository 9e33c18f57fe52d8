"""Inputs of a run: tokenizers, prompts and layer pairs, loaded before the models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from oprd.checkpoint.resume import Candidates
from oprd.config import TrainConfig
from oprd.data.prompts import Prompt, PromptSet, load_prompts, load_training_prompts
from oprd.errors import Attempt, ConfigError
from oprd.tokenizers.alignment import Aligner


@dataclass
class RunInputs:
    """The inputs that the checks before a run load.

    Attributes:
        tokenizer: the student's tokenizer.
        train, eval_sets: prompts in the student's tokens.
        aligners: by teacher name, the aligner of the two tokenizers' tokens. Only for teachers with
            another tokenizer, as are ``teacher_tokenizers`` and ``teacher_sets``.
        teacher_tokenizers: by teacher name.
        teacher_sets: by teacher name, the evaluation sets in the teacher's tokens.
        shared_ids: by name of a teacher that shares the student's token ids, their number if the
            teacher has more; else None.
        layer_pairs: by teacher name, the compared (student block, teacher block) pairs.
        bridge_ranks: by teacher name, the rank of its bridge.
        resume: the checkpoints that the run could resume from.
        notes: messages for the user.
        unchecked: what could not be checked, because the hub can't be reached or a file does not
            exist yet. Only dry runs fill it.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    train: PromptSet | None = None
    eval_sets: dict[str, PromptSet] = field(default_factory=dict)
    aligners: dict[str, Aligner] = field(default_factory=dict)
    teacher_tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    teacher_sets: dict[str, dict[str, PromptSet]] = field(default_factory=dict)
    shared_ids: dict[str, int | None] = field(default_factory=dict)
    layer_pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    bridge_ranks: dict[str, int] = field(default_factory=dict)
    resume: Candidates = field(default_factory=Candidates)
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def prompts_for(self, teacher: str | None, name: str) -> list[Prompt]:
        """Return the prompts of an evaluation set as the student (None) or a teacher reads them."""
        if teacher is None:
            return self.eval_sets[name].prompts
        prompts = self.teacher_sets.get(teacher, self.eval_sets)[name].prompts
        return [replace(p, token_ids=p.teacher_ids or p.token_ids) for p in prompts]


def load_inputs(cfg: TrainConfig, inputs: RunInputs, attempt: Attempt) -> None:
    """Load the prompts for training and evaluation in each model's tokens.

    Args:
        inputs: provides the tokenizers; the prompts are stored in it.

    Raises:
        ConfigError: if prompts can't be loaded, or do not fit the configured teachers.
    """
    tokenizer = inputs.tokenizer
    if tokenizer is None:
        inputs.unchecked.append("the prompts: they need the student's tokenizer")
        return
    tokenizers = inputs.teacher_tokenizers
    inputs.train = attempt(lambda: load_training_prompts(cfg.data, tokenizer, tokenizers))
    if inputs.train:
        _check_sources(cfg, inputs.train)
    has_template = bool(tokenizer.chat_template) and cfg.data.chat_template == "auto"
    if inputs.train and inputs.train.plain and has_template:
        inputs.notes.append(
            f"{inputs.train.plain} prompts are plain text, which the student continues as it "
            "stands, although its tokenizer has a chat template. If it is an instruct model, set "
            "data.chat_template=always: it then reads them as a user's messages"
        )
    for name, source in cfg.eval.sets.items():
        load = partial(load_prompts, source, cfg.data, tokenizer, for_evaluation=True)
        prompts = attempt(load)
        if prompts:
            inputs.eval_sets[name] = prompts
        for teacher, other in tokenizers.items() if cfg.eval.teacher else ():
            teacher_set = attempt(
                partial(load_prompts, source, cfg.data, other, for_evaluation=True)
            )
            if teacher_set:
                inputs.teacher_sets.setdefault(teacher, {})[name] = teacher_set
    train = {"data.sources" if cfg.data.sources else "data.train": inputs.train}
    for name, prompts in {**train, **inputs.eval_sets}.items():
        if prompts and prompts.dropped:
            inputs.notes.append(
                f"{name}: {prompts.dropped} of {prompts.dropped + len(prompts)} prompts dropped, "
                f"longer than {cfg.data.max_prompt_tokens} tokens"
            )
        if prompts and prompts.repeated:
            inputs.notes.append(f"{name}: {prompts.repeated} repeated prompts left out")
        inputs.notes += [f"{name}: {message}" for message in prompts.lost] if prompts else []
    for teacher, sets in inputs.teacher_sets.items():
        inputs.notes += [
            f"{name}, for the teacher{teacher and f' of {teacher}'}: {message}"
            for name, prompts in sets.items()
            for message in prompts.lost
        ]


def _check_sources(cfg: TrainConfig, train: PromptSet) -> None:
    """Check that every source has a teacher, every teacher has prompts, and a self-teacher reads
    other prompts than the student."""
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
            "has nothing to teach. Set teacher_prompt for these prompts to give it more information"
        )
