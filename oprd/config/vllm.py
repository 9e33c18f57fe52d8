"""The vLLM engine, where it samples the student's responses."""

from __future__ import annotations

from dataclasses import dataclass

from oprd.config.models import DType
from oprd.errors import Problems

MAX_LOGPROB_GAP: dict[DType, float] = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""By the coarser of the two dtypes, the mean |difference of log-probs| that ends a run. On the demo
it is at most 7e-7 in float32 and 0.01 in bfloat16; 0.07 if the engine missed one update, 0.1 to 0.5
after ten. float32 leaves room for a GPU's attention, whose products have 10 bits, and bfloat16 for
larger models, whose roundings add up over more layers; neither was measured."""


@dataclass
class VllmConfig:
    """The engine that samples where ``rollout.engine`` is ``vllm``. Each rank has one, in a process
    of its own on the rank's device.

    Attributes:
        tensor_parallel_size: so many neighbouring ranks of a machine share one copy of the student
            and sample for each other.
        dtype: of its weights and KV cache; null: what the student computes in.
        gpu_memory_utilization: share of a GPU's memory for weights and KV cache, beside the trainer
            (a CPU's cache is as large as the environment variable VLLM_CPU_KVCACHE_SPACE says).
        max_model_len: tokens of a prompt with its response; null: the most that the run asks for.
        max_num_seqs: sequences at once; null: vLLM's default.
        enforce_eager: no compilation and no CUDA graphs: starts sooner, samples slower on GPUs;
            null: on CPUs only.
        sleep: give a GPU's memory back while the student is updated.
        gap_responses: of each step and rank, so many responses are compared with the trainer's
            log-probs; 0: none.
        gap_tokens: the last so many tokens of each of them.
        max_logprob_gap: the run ends where the mean difference is above it; null: by dtype.
        start_timeout: seconds for the engine to start.
        step_timeout: seconds without any progress after which the engine is given up.
        max_restarts: in a run, of a rank's engine that died or was given up. Tensor-parallel ones
            are not restarted.
    """

    tensor_parallel_size: int = 1
    dtype: DType | None = None
    gpu_memory_utilization: float = 0.4
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool | None = None
    sleep: bool = True
    gap_responses: int = 8
    gap_tokens: int = 32
    max_logprob_gap: float | None = None
    start_timeout: float = 900
    step_timeout: float = 300
    max_restarts: int = 1

    def check(self, problems: Problems) -> None:
        """Note every value that is out of range."""
        where = "rollout.vllm."
        at_least_one = ("tensor_parallel_size", "max_model_len", "max_num_seqs", "gap_tokens")
        problems.need_at_least_one({where + name: getattr(self, name) for name in at_least_one})
        for name in ("gap_responses", "max_restarts"):
            value = getattr(self, name)
            problems.need(value >= 0, f"{where}{name} must not be negative, got {value}")
        for name in ("start_timeout", "step_timeout"):
            value = getattr(self, name)
            problems.need(value > 0, f"{where}{name} must be above 0 seconds, got {value}")
        share = self.gpu_memory_utilization
        problems.need(
            0 < share < 1, f"{where}gpu_memory_utilization must lie between 0 and 1, got {share}"
        )
        problems.need(
            self.max_logprob_gap is None or self.max_logprob_gap > 0,
            f"{where}max_logprob_gap must be above 0 or null, got {self.max_logprob_gap}",
        )
