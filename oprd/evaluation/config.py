"""The configuration of ``oprd-eval``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.config import BridgeConfig, DType, PromptsConfig, VllmConfig
from oprd.errors import Problems

MAX_NEW_TOKENS = 31_744
"""The paper's limit."""
BATCH_SIZES = {"generate": 64, "continuous": 64, "vllm": 1024}
UNITS = {"continuous": 4}
"""Batches' worth of sequences that are sampled before they are kept, where not 1. More would fill
the places better, but leave ranks without work on small sets."""


def _engine_alone() -> VllmConfig:
    return VllmConfig(gpu_memory_utilization=0.85, gap_responses=0)


@dataclass
class EvalRunConfig:
    """The configuration of ``oprd-eval``. Sampling is the paper's by default.

    In training, ``eval.*`` samples one greedy response by default, to be cheap; here the defaults
    are those that results are published with.

    Attributes:
        models: the models: a run's directory, one of its checkpoints, an exported student, another
            local model, or a hub name; ``NAME=PATH`` gives it a name. The first is what the others
            are compared with.
        sets: the sets: aime24, aime25, aimo, math500, gsm8k, demo; a ``.jsonl``, ``.json`` or
            ``.parquet`` file in a published layout, a hub data set, ``reasoning_gym:TASK``, or the
            name of one in ``eval.sets`` of a run among the models.
        own_sets: further sets by name, with their fields.
        output_dir: directory for samples and results; null: ``runs/eval-<time>``. An evaluation
            that was interrupted goes on in its directory.
        regrade: grade the samples in ``output_dir`` again. Models and sets are not needed.
        samples: n, the number of responses to each prompt.
        temperature: sampling temperature. 0: greedy decoding, for which ``samples`` must be 1.
        top_p: nucleus sampling probability.
        max_new_tokens: maximum length of a response in tokens; null: 31,744, or what the model's
            context leaves.
        limit: number of prompts to use of each set, from the first; null: all.
        grader: ``math`` (mathematical equality of the last boxed answer), ``exact`` (equal text) or
            ``auto``: the ``eval.grader`` of a run among the models, for a set that it was evaluated
            on; else the set's own. That is ``math`` for all but the demo, while training's default
            is ``exact``, for which the published answers are no match.
        prompt_suffix: text that is appended to each prompt, unless it is there already; null: the
            ``data.prompt_suffix`` of a run among the models; without one, the set's own. That asks
            for a box, which ``math`` needs, while training appends nothing by default, to leave
            prompts of one's own as they are.
        chat_template: ``auto``, ``always`` or ``never``, as ``data.chat_template``; null: as a run
            among the models has it; without a run, ``always`` if the tokenizer has a chat template,
            because published sets are plain text and an instruct model answers a user.
        chat_template_kwargs: arguments of the chat template, e.g. ``{enable_thinking: false}``;
            null: those of a run among the models.
        seed: seed of the sampling.
        engine: ``generate``: Hugging Face's `generate`; a batch is computed until its longest
            response has ended. ``continuous``: the same models, but a response that has ended makes
            room for the next. ``vllm``: vLLM.
        batch_size: number of sequences sampled at once, and kept if the evaluation is interrupted
            later (with ``continuous`` four times as many are kept together); null: 64, or 1,024
            with vLLM.
        vllm: the vLLM engine.
        dtype: dtype of the weights; null: bfloat16 on a GPU, float32 on a CPU.
        attn_implementation: attention implementation of `transformers`; null: its default.
        device: ``auto``: the GPU of this rank, or the CPU if there is none.
        best: of a run, evaluate the checkpoint that ``checkpoint.keep_best`` keeps.
        tokenizer: path of a tokenizer, for models without one; null: each model's own.
        teacher: a model that each of ``models`` is compared with on its own responses: KL in both
            directions, top-k overlap, entropy, cosine of hidden states. Sets then need no answers.
        bridge: projectors of the hidden states, if the teacher has another width.
        teacher_responses: number of responses of each set that the teacher reads.
        top_k: k of the top-k overlap.
    """

    models: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    own_sets: dict[str, PromptsConfig] = field(default_factory=dict)
    output_dir: str | None = None
    regrade: bool = False
    samples: int = 16
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int | None = None
    limit: int | None = None
    grader: Literal["auto", "math", "exact"] = "auto"
    prompt_suffix: str | None = None
    chat_template: Literal["auto", "always", "never"] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    seed: int = 0
    engine: Literal["generate", "continuous", "vllm"] = "generate"
    batch_size: int | None = None
    vllm: VllmConfig = field(default_factory=_engine_alone)
    dtype: DType | None = None
    attn_implementation: str | None = None
    device: str = "auto"
    best: bool = False
    tokenizer: str | None = None
    teacher: str | None = None
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    teacher_responses: int = 64
    top_k: int = 16

    @property
    def at_once(self) -> int:
        """Number of sequences sampled at once."""
        return self.batch_size or BATCH_SIZES[self.engine]

    @property
    def unit(self) -> int:
        """Number of sequences that are kept together."""
        return self.at_once * UNITS.get(self.engine, 1)

    def check(self) -> None:
        """Check the values by themselves.

        Raises:
            ConfigError: with all problems.
        """
        problems = Problems()
        need = problems.need
        if self.regrade:
            need(
                self.output_dir is not None,
                "regrade needs output_dir, the directory of the evaluation to grade again",
            )
            problems.refuse()
            return
        need(
            bool(self.models),
            "no models: give at least one, for example oprd-eval runs/demo --sets demo",
        )
        need(
            bool(self.sets or self.own_sets),
            "no sets: give at least one, for example --sets aime24 math500 (aime24, aime25, aimo, "
            "math500, gsm8k, demo, a file, a hub data set or reasoning_gym:TASK)",
        )
        problems.need_at_least_one(
            {
                "samples": self.samples,
                "max_new_tokens": self.max_new_tokens,
                "limit": self.limit,
                "batch_size": self.batch_size,
                "teacher_responses": self.teacher_responses,
                "top_k": self.top_k,
                "bridge.rank": self.bridge.rank,
            }
        )
        need(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        need(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        need(
            self.temperature > 0 or self.samples == 1,
            f"samples is {self.samples} at temperature 0: greedy samples are all the same. Set "
            "samples to 1",
        )
        need(
            self.bridge.path is None or self.teacher is not None,
            "bridge.path is given without teacher, whose hidden states it projects",
        )
        self.vllm.check(problems)
        problems.refuse()
