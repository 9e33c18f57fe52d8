"""The configuration of a run. Every default is the demo's; recipes/ has others.

Fields can be given in a YAML file (``--config``) and on the command line (``--optim.lr 1e-5``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.errors import Problems
from oprd.positions import Positions, Reduction, Shift
from oprd.vocab_losses import Form

SELF = ("self:start", "self:current")
DType = Literal["float32", "bfloat16", "float16"]


@dataclass
class StudentConfig:
    """The model that learns.

    Attributes:
        path: a local directory, a hub name, or ``demo:student``.
        dtype: of its weights and optimizer state.
        attn_implementation: as `transformers` takes it (``sdpa``, ``flash_attention_2``, ..); null:
            its default.
        gradient_checkpointing: recompute activations in backward to save memory.
    """

    path: str = "demo:student"
    dtype: DType = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False


@dataclass
class TeacherConfig:
    """The frozen model. Only its layers down to the deepest one compared are kept in memory.

    Attributes:
        path: a local directory, a hub name, ``demo:teacher``, or the student itself, which then
            needs prompts that tell it more (``teacher_prompt``): ``self:start``, a copy of the
            weights it begins with; ``self:current``, those it has at the time.
        dtype: of its weights (of ``self:current`` the student's).
        attn_implementation: as the student's.
        reads: where its tokenizer is another than the student's. ``text``: the response's text in
            its own tokens, compared where both end at the same byte (`oprd.alignment`).
            ``student_ids``: the student's token ids, whatever they mean to it, as public code does;
            for comparison with that code only.
    """

    path: str = "demo:teacher"
    dtype: DType = "float32"
    attn_implementation: str | None = None
    reads: Literal["text", "student_ids"] = "text"

    @property
    def is_self(self) -> bool:
        """Whether it is the student."""
        return self.path in SELF


@dataclass
class PromptsConfig:
    """A set of prompts, with answers where they are to be graded.

    Attributes:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file, a hub data set, or ``demo:NAME.jsonl``.
        split: of a hub data set.
        prompt_field: plain text or a list of chat messages. Dots reach into nested fields.
        answer_field: the reference answer; needed by the sets that are evaluated.
        teacher_prompt: what the teacher reads instead, for privileged information: text in which
            ``{prompt}`` is the prompt (of a chat, its last user message) and ``{name}`` any field
            of the row. Null: the prompt.
        source_field: a field that names each prompt's source, for ``teachers``; null: the set's
            name.
        limit: use the first so many rows; null: all.
    """

    path: str
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    teacher_prompt: str | None = None
    source_field: str | None = None
    limit: int | None = None


@dataclass
class DataConfig:
    """Training prompts, and how any prompt is put to the models.

    Attributes:
        train: the prompts that rollouts are made from.
        sources: several sets instead of ``train``, by name; prompts are drawn from all of them
            together.
        chat_template: ``auto``: apply the tokenizer's chat template to chat messages and leave
            plain text as it is; ``always``: plain text becomes a user's message; ``never``.
        chat_template_kwargs: passed to the chat template, e.g. ``{enable_thinking: false}``.
        prompt_suffix: appended to the text, or to the last user message, that lacks it.
        max_prompt_tokens: longer prompts are treated as ``overlong`` says,
        max_teacher_prompt_tokens: as are those whose ``teacher_prompt`` is longer than this; null:
            the same limit.
        overlong: ``drop`` (and count) or ``error``.
    """

    train: PromptsConfig = field(default_factory=lambda: PromptsConfig("demo:train.jsonl"))
    sources: dict[str, PromptsConfig] = field(default_factory=dict)
    chat_template: Literal["auto", "always", "never"] = "auto"
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    prompt_suffix: str = ""
    max_prompt_tokens: int = 8
    max_teacher_prompt_tokens: int | None = None
    overlong: Literal["drop", "error"] = "drop"

    @property
    def training_sets(self) -> dict[str, PromptsConfig]:
        """By name."""
        return self.sources or {"train": self.train}

    @property
    def teacher_prompt_limit(self) -> int:
        """Tokens."""
        return self.max_teacher_prompt_tokens or self.max_prompt_tokens


@dataclass
class RolloutConfig:
    """Sampling the student's responses.

    Attributes:
        prompts_per_step: over all ranks.
        responses_per_prompt: n.
        max_new_tokens: a response is cut there.
        temperature, top_p: of the sampling; top-k sampling is off.
        batch_size: sequences generated at once; null: all of a step.
    """

    prompts_per_step: int = 64
    responses_per_prompt: int = 1
    max_new_tokens: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int | None = None


@dataclass
class DistillConfig:
    """The representation loss.

    Attributes:
        kind: ``mse`` (Eq. 6), ``nmse`` or ``cosine``. Their scales differ: ``nmse`` is 2/d of
            ``cosine``.
        layers: ``last``, ``all``, ``even``, ``odd`` or a list of student blocks counted from 0.
        positions: ``all``, ``last``, ``last_k`` or ``first_k`` response tokens.
        k: for ``last_k`` and ``first_k``.
        shift: ``after``: the state that has read the token; ``before``: the one that predicts it.
        reduction: ``token-mean`` or ``seq-mean`` over the global batch.
        backend: of the kernels: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.
        init_head_from_teacher: copy the teacher's LM head into the student before training. OPRD
            itself gives an untied head no gradient. (Ours, not the paper's.)
    """

    kind: Literal["mse", "nmse", "cosine"] = "mse"
    layers: str | list[int] = "all"
    positions: Positions = "all"
    k: int = 2000
    shift: Shift = "before"
    reduction: Reduction = "token-mean"
    backend: Literal["auto", "cuda", "triton", "cpu", "reference"] = "auto"
    init_head_from_teacher: bool = False


@dataclass
class BridgeConfig:
    """Projectors into a shared space, for a teacher of any width and depth (see `oprd.bridge`).

    The loss is then taken there; the paper's is ``distill.kind: nmse``.

    Attributes:
        path: what ``oprd-bridge fit`` or ``import`` wrote; null: states are compared as they are.
        rank: use the first so many directions; null: all that the file has.
    """

    path: str | None = None
    rank: int | None = None


OBJECTIVES: dict[str, Form | None] = {
    "oprd": None,
    "opd_top1": "top1",
    "opd_topk": "topk",
    "opd_topk_advantage": "topk_advantage",
    "opd_topk_raw": "topk_raw",
    "opd_full": "full",
    "opd_full_forward": "full_forward",
}
"""Names of objectives; of output-space ones with their `oprd.vocab_losses` form."""


@dataclass
class OpdConfig:
    """Output-space objectives, the baselines (see `oprd.vocab_losses.VocabLoss`).

    Attributes:
        k: of the top-k objectives.
        support: whose k most probable tokens they look at.
        implementation: ``chunked``: LM head and loss in chunks of tokens, gradients formed on the
            way; ``materialised``: [B, T, V] logits and log-softmax, as other trainers do.
        chunk_tokens: rows in a chunk.
    """

    k: int = 16
    support: Literal["student", "teacher"] = "student"
    implementation: Literal["chunked", "materialised"] = "chunked"
    chunk_tokens: int = 256

    def form(self, objective: str) -> Form:
        """The form of an output-space objective."""
        form = OBJECTIVES[objective]
        assert form is not None
        return form


@dataclass
class OptimConfig:
    """AdamW with linear warm-up.

    Attributes:
        lr: peak learning rate.
        betas, weight_decay: AdamW's.
        warmup_ratio: share of the steps that the learning rate rises over.
        schedule: ``cosine`` (to 0) or ``constant`` after the warm-up.
        max_grad_norm: gradients are clipped to this global norm; null: they are not.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float | None = 1.0


@dataclass
class EvalSetConfig(PromptsConfig):
    """A set to evaluate on.

    Attributes:
        every: steps between evaluations during training; 0: only before and after.
    """

    every: int = 0


def _demo_sets() -> dict[str, EvalSetConfig]:
    return {
        "val": EvalSetConfig("demo:val.jsonl", every=20),
        "test": EvalSetConfig("demo:test.jsonl"),
    }


@dataclass
class EvalConfig:
    """Accuracy on held-out prompts, of the teacher, the student before, during and after.

    Attributes:
        sets: by name. The last one is what the closing table is about.
        grader: ``exact`` (the text) or ``math`` (mathematical equality of the last boxed answer).
        samples: k responses a prompt; accuracy is avg@k.
        temperature: 0: greedy (then samples must be 1).
        top_p, max_new_tokens: of the sampling.
        batch_size: sequences generated at once.
        teacher: evaluate the teacher too. The whole model is loaded for that.
    """

    sets: dict[str, EvalSetConfig] = field(default_factory=_demo_sets)
    grader: Literal["exact", "math"] = "exact"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 5
    batch_size: int = 500
    teacher: bool = True


@dataclass
class TrainConfig:
    """A run of ``oprd-train``.

    Attributes:
        output_dir: where everything is written; null: ``runs/<name>-<time>``. A directory that
            holds anything is refused.
        name: of the run.
        steps: optimizer steps.
        seed: of prompts and sampling.
        device: ``auto``: the GPU of this rank, else the CPU.
        autocast: run the models' matrix products in this dtype (mixed precision); null: off.
        micro_batch_tokens: at most so many tokens, padding included, go through the models at
            once; gradients accumulate.
        save_every: steps between checkpoints (a Hugging Face directory); 0: none but at the end.
        log_every: steps between progress lines where the output is not a terminal.
        teachers: one for each source of prompts, instead of ``teacher``.
        objectives: what is minimised, a weight for each: ``oprd``, ``opd_top1``, ``opd_topk``,
            ``opd_topk_advantage``, ``opd_topk_raw``, ``opd_full``, ``opd_full_forward``.
    """

    output_dir: str | None = None
    name: str = "demo"
    steps: int = 100
    seed: int = 0
    device: str = "auto"
    autocast: Literal["bfloat16"] | None = None
    micro_batch_tokens: int = 32768
    save_every: int = 0
    log_every: int = 10
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objectives: dict[str, float] = field(default_factory=lambda: {"oprd": 1.0})
    distill: DistillConfig = field(default_factory=DistillConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    opd: OpdConfig = field(default_factory=OpdConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By the source of prompts that each is for; under "", if it is one for all of them."""
        return self.teachers or {"": self.teacher}


def check_sampling(problems: Problems, data: DataConfig, rollout: RolloutConfig) -> None:
    """What is wrong with the numbers by which prompts are read and responses sampled."""
    problems.need_at_least_one(
        {
            "rollout.prompts_per_step": rollout.prompts_per_step,
            "rollout.responses_per_prompt": rollout.responses_per_prompt,
            "rollout.max_new_tokens": rollout.max_new_tokens,
            "rollout.batch_size": rollout.batch_size,
            "data.max_prompt_tokens": data.max_prompt_tokens,
            "data.max_teacher_prompt_tokens": data.max_teacher_prompt_tokens,
            "data.train.limit": data.train.limit,
        }
    )
    problems.need(
        rollout.temperature > 0,
        f"rollout.temperature must be above 0, got {rollout.temperature}: rollouts are sampled",
    )
    problems.need(0 < rollout.top_p <= 1, f"rollout.top_p must lie in (0, 1], got {rollout.top_p}")


def check_values(cfg: TrainConfig) -> None:
    """Everything that is wrong with the numbers themselves.

    Raises:
        ConfigError: listing all of it.
    """
    problems = Problems()
    need = problems.need
    check_sampling(problems, cfg.data, cfg.rollout)
    at_least_one = {
        "steps": cfg.steps,
        "log_every": cfg.log_every,
        "micro_batch_tokens": cfg.micro_batch_tokens,
        "distill.k": cfg.distill.k,
        "bridge.rank": cfg.bridge.rank,
        "opd.k": cfg.opd.k,
        "opd.chunk_tokens": cfg.opd.chunk_tokens,
        "eval.samples": cfg.eval.samples,
        "eval.max_new_tokens": cfg.eval.max_new_tokens,
        "eval.batch_size": cfg.eval.batch_size,
    }
    at_least_one |= {f"data.sources.{name}.limit": s.limit for name, s in cfg.data.sources.items()}
    at_least_one |= {f"eval.sets.{name}.limit": s.limit for name, s in cfg.eval.sets.items()}
    problems.need_at_least_one(at_least_one)
    not_negative = {"save_every": cfg.save_every}
    not_negative |= {f"eval.sets.{name}.every": s.every for name, s in cfg.eval.sets.items()}
    for name, value in not_negative.items():
        need(value >= 0, f"{name} must not be negative, got {value}")
    o, e = cfg.optim, cfg.eval
    need(0 < e.top_p <= 1, f"eval.top_p must lie in (0, 1], got {e.top_p}")
    need(e.temperature >= 0, f"eval.temperature must not be negative, got {e.temperature}")
    need(
        e.temperature > 0 or e.samples == 1,
        f"eval.samples is {e.samples} at eval.temperature 0: greedy samples are all the same",
    )
    need(bool(cfg.objectives), f"objectives is empty: name at least one of {[*OBJECTIVES]}")
    for name, weight in cfg.objectives.items():
        need(name in OBJECTIVES, f"objectives: {name!r} is not one of {[*OBJECTIVES]}")
        need(weight > 0, f"objectives.{name} must be above 0, got {weight}: leave it out instead")
    if cfg.bridge.path is None:
        need(cfg.bridge.rank is None, "bridge.rank is given without bridge.path")
    else:
        need(
            "oprd" in cfg.objectives,
            f"bridge.path={cfg.bridge.path} is given, but objectives {[*cfg.objectives]} compare "
            "no hidden states: add oprd, or leave the bridge out",
        )
        need(
            len(cfg.teachers) < 2,
            f"bridge.path={cfg.bridge.path} is fitted for one teacher, and teachers has "
            f"{len(cfg.teachers)}: train with one at a time",
        )
    if "opd_topk" in cfg.objectives:
        need(
            cfg.opd.k >= 2,
            f"opd.k must be at least 2 for opd_topk, got {cfg.opd.k}: on one "
            "token the loss is always 0. Use opd_top1",
        )
    need(
        not cfg.teachers or cfg.teacher == TeacherConfig(),
        "both teacher and teachers are given: leave one of them out",
    )
    need(
        not cfg.data.sources or cfg.data.train == DataConfig().train,
        "both data.train and data.sources are given: leave one of them out",
    )
    if cfg.distill.init_head_from_teacher:
        need(
            len(cfg.teachers) < 2 and not any(t.is_self for t in cfg.all_teachers.values()),
            "distill.init_head_from_teacher needs one teacher that is not the student itself",
        )
    need(o.lr > 0, f"optim.lr must be above 0, got {o.lr}")
    need(all(0 <= b < 1 for b in o.betas), f"optim.betas must lie in [0, 1), got {o.betas}")
    need(o.weight_decay >= 0, f"optim.weight_decay must not be negative, got {o.weight_decay}")
    need(0 <= o.warmup_ratio <= 1, f"optim.warmup_ratio must lie in [0, 1], got {o.warmup_ratio}")
    need(
        o.max_grad_norm is None or o.max_grad_norm > 0,
        f"optim.max_grad_norm must be above 0 or null, got {o.max_grad_norm}",
    )
    problems.refuse()
