"""Options for sampling the student's responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.config.sampling import SamplingParams
from oprd.config.vllm import VllmConfig
from oprd.errors import Problems


@dataclass
class RolloutConfig:
    """Sampling of the student's responses in training.

    Attributes:
        prompts_per_step: number of prompts in a step, over all ranks.
        responses_per_prompt: number of responses to each prompt.
        max_new_tokens: maximum length of a response in tokens; longer responses are cut off. The
            default is lowered to what the models' contexts leave.
        temperature: sampling temperature, above 0.
        top_p: nucleus sampling probability. Top-k sampling is off.
        batch_size: number of sequences generated at once; null: all of a step. With ``continuous``
            a sequence that has ended makes room for the next. The vLLM engine chooses its own
            batches.
        engine: ``generate``: Hugging Face's `generate` on the student; a batch is computed until
            its longest response has ended. ``continuous``: the student too, but what has ended is
            no longer computed. ``vllm``: a vLLM engine beside the student, which gets its weights
            after each update. The engine also samples in evaluations of the student. ``auto``:
            ``continuous`` on a CPU, where it was measured to be faster, if it can sample from the
            model; else ``generate``.
        staleness: number of updates that a step's responses may lack. 0: they are sampled with the
            student's current weights. 1: while a step updates the student, the engine samples the
            next step's responses, with the weights from before that update.
    """

    prompts_per_step: int = 8
    responses_per_prompt: int = 2
    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int | None = None
    engine: Literal["auto", "generate", "continuous", "vllm"] = "auto"
    staleness: int = 0
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters."""
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def sleeps(self) -> bool:
        """Whether a vLLM engine frees its GPU memory while the student is updated."""
        if self.vllm.sleep is None:
            return self.staleness == 0 and not self.vllm.own_gpus
        return self.vllm.sleep

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
        problems.need_at_least_one(
            {
                "rollout.prompts_per_step": self.prompts_per_step,
                "rollout.responses_per_prompt": self.responses_per_prompt,
                "rollout.max_new_tokens": self.max_new_tokens,
                "rollout.batch_size": self.batch_size,
            }
        )
        problems.need(
            self.temperature > 0,
            f"rollout.temperature must be above 0, got {self.temperature}: rollouts are sampled",
        )
        problems.need(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        problems.need(
            self.staleness in (0, 1),
            f"rollout.staleness must be 0 or 1, got {self.staleness}: at most the next step's "
            "responses are sampled ahead",
        )
        problems.need(
            not (self.staleness and self.engine == "vllm" and self.vllm.sleep),
            "rollout.vllm.sleep can't be true with rollout.staleness=1: the engine samples while "
            "the student is updated, so its memory is not free. Set rollout.vllm.sleep to null",
        )
        self.vllm.check(problems)
