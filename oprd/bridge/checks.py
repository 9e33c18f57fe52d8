"""The configuration of a fit, and everything that can be found wrong with it beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from oprd import distributed
from oprd.bridge.bank import check_new_file
from oprd.bridge.sgd import SgdConfig
from oprd.config import (
    DataConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    check_sampling,
)
from oprd.config.types import Positions, Shift
from oprd.data.prompts import Prompt, PromptSet, load_prompts
from oprd.errors import ConfigError, Problems, attempts
from oprd.models.compatibility import (
    check_length,
    check_student_ids,
    check_vocabularies,
    same_vocabulary,
)
from oprd.models.info import ModelInfo, model_info
from oprd.models.layer_pairs import corresponding_layer, select_layers
from oprd.models.loading import load_config, load_tokenizer
from oprd.preflight import check_device
from oprd.tokenizers.alignment import Aligner


@dataclass
class FitConfig:
    """A run of ``oprd-bridge fit``.

    Attributes:
        output: the file to write; one that exists is refused.
        rank: r, the number of the teacher's principal directions. Any smaller rank is a slice of
            the result (``bridge.rank`` in training).
        prompts: how many of ``data.train`` are rolled out, chosen by ``seed``.
        layers: student layers to fit, as ``distill.layers``: ``all`` lets training choose.
        positions, k, shift: which hidden states, as in ``distill``.
        held_out: share of the prompts whose responses are not fitted on but judge the result.
        solver: ``ridge``: closed form; ``sgd``: AdamW on rows that are kept, as in the paper.
        ridge: strength of the penalty, relative to the mean squared hidden state.
        products: of the statistics; float32 is for GPUs that are slow in float64 (sums stay
            float64).
        seed: of prompts, sampling, the random projector compared with, and sgd.
        device: ``auto``: the GPU of this rank, else the CPU.
        autocast: run the models' matrix products in this dtype; null: off.
        micro_batch_tokens: at most so many tokens, padding included, go through the models at once.
        student, teacher, data, rollout: as in training. What only training has a use for is
            refused: an adapter, several sources, vLLM, ..
    """

    output: str = "bridge.safetensors"
    rank: int = 8
    prompts: int = 2000
    layers: str | list[int] = "all"
    positions: Positions = "all"
    k: int = 2000
    shift: Shift = "before"
    held_out: float = 0.1
    solver: Literal["ridge", "sgd"] = "ridge"
    ridge: float = 1e-6
    products: Literal["float64", "float32"] = "float64"
    seed: int = 0
    device: str = "auto"
    autocast: Literal["bfloat16"] | None = None
    micro_batch_tokens: int = 32768
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sgd: SgdConfig = field(default_factory=SgdConfig)


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


def check_values(cfg: FitConfig) -> None:
    """Everything that is wrong with the numbers themselves.

    Raises:
        ConfigError: listing all of it.
    """
    problems = Problems()
    need = problems.need
    check_sampling(problems, cfg.data, cfg.rollout)
    problems.need_at_least_one(
        {
            "rank": cfg.rank,
            "k": cfg.k,
            "micro_batch_tokens": cfg.micro_batch_tokens,
            "sgd.epochs": cfg.sgd.epochs,
            "sgd.batch_rows": cfg.sgd.batch_rows,
            "sgd.max_rows": cfg.sgd.max_rows,
        }
    )
    need(cfg.prompts >= 2, f"prompts must be at least 2 (one is held out), got {cfg.prompts}")
    need(0 < cfg.held_out < 1, f"held_out must lie in (0, 1), got {cfg.held_out}")
    need(cfg.ridge >= 0, f"ridge must not be negative, got {cfg.ridge}")
    need(cfg.sgd.lr > 0, f"sgd.lr must be above 0, got {cfg.sgd.lr}")
    _check_unused(problems, cfg)
    ranks = distributed.world_size()
    need(
        cfg.solver == "ridge" or ranks == 1,
        f"solver=sgd keeps rows and runs on one rank, there are {ranks}: use ridge, which is exact "
        "over ranks",
    )
    need(
        cfg.rollout.prompts_per_step >= ranks,
        f"rollout.prompts_per_step={cfg.rollout.prompts_per_step} leaves some of {ranks} ranks "
        "nothing to do",
    )
    problems.refuse()


def _check_unused(problems: Problems, cfg: FitConfig) -> None:
    """Options of training that a fit would ignore, and the bridge be of something else."""
    need, student, data = problems.need, cfg.student, cfg.data
    need(
        cfg.rollout.engine == "generate",
        f"rollout.engine={cfg.rollout.engine} has no use here: a fit samples by generate. Leave it "
        "out, and set rollout.batch_size to what fits the memory",
    )
    for name, given in {
        "gradient_checkpointing": student.gradient_checkpointing,
        "compile": student.compile,
    }.items():
        need(
            not given,
            f"student.{name} has no use here: nothing is trained through the student. Leave it out",
        )
    adapter = student.lora.given
    need(
        not adapter,
        f"student.lora.{', '.join(adapter)} has no use here: a fit trains nothing, and reads the "
        "student as its path has it. Leave it out: a new adapter changes no state, so the bridge "
        "suits a student that gets one",
    )
    need(
        not data.sources,
        f"data.sources has {', '.join(data.sources)}: a fit is for one teacher, and reads "
        "data.train alone. Give the prompts of that teacher's source as data.train",
    )
    need(
        data.train.source_field is None,
        f"data.train.source_field={data.train.source_field} has no use here: a fit is for one "
        "teacher, and reads all of data.train. Give it a file of that teacher's prompts",
    )
    need(
        not cfg.teacher.is_self,
        f"teacher.path={cfg.teacher.path} is the student itself: states of one model need no "
        "bridge. Name another model, or train without bridge.path",
    )


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
