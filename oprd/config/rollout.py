"""How the student's responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.config.sampling import SamplingParams
from oprd.config.vllm import VllmConfig
from oprd.errors import Problems


@dataclass
class RolloutConfig:
    """Sampling the student's responses.

    Attributes:
        prompts_per_step: over all ranks.
        responses_per_prompt: n.
        max_new_tokens: a response is cut there.
        temperature, top_p: of the sampling; top-k sampling is off.
        batch_size: sequences generated at once; null: all of a step. (vLLM decides for itself.)
        engine: ``generate``: Hugging Face's, on the student itself; ``vllm``: an engine beside it,
            which the student's weights are sent to after each update. It evaluates the student too.
    """

    prompts_per_step: int = 64
    responses_per_prompt: int = 1
    max_new_tokens: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int | None = None
    engine: Literal["generate", "vllm"] = "generate"
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def sampling(self) -> SamplingParams:
        """The sampling alone."""
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_p)

    def check(self, problems: Problems) -> None:
        """Note every value that is out of range."""
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
        self.vllm.check(problems)
