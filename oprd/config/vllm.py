"""Options for the vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass

from oprd.config.models import DType
from oprd.errors import Problems

MAX_LOGPROB_GAP: dict[DType, float] = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Default of `VllmConfig.max_logprob_gap`, by the coarser dtype of engine and student.

On the demo the mean absolute difference of log-probs is at most 7e-7 in float32 and 0.01 in
bfloat16. It is 0.07 if the engine has missed one update, and 0.1 to 0.5 after ten missed updates.
The float32 limit allows for GPU attention whose products have 10 bits, and the bfloat16 limit for
larger models, whose rounding errors add up over more layers. Neither was measured.
"""


@dataclass
class VllmConfig:
    """The vLLM engine, used if ``rollout.engine`` is ``vllm``.

    Each rank has an engine in a process of its own, on the rank's device unless ``own_gpus``.

    Attributes:
        own_gpus: sample on GPUs that no rank trains on: of R ranks on a machine with 2 R or more
            GPUs, rank i trains on GPU i and samples on GPU R + i. With ``rollout.staleness`` 1 both
            compute at the same time. Not run on GPUs yet.
        tensor_parallel_size: number of neighbouring ranks on a machine that share one copy of the
            student in vLLM and sample together.
        dtype: dtype of the engine's weights and KV cache; null: the dtype that the student computes
            in.
        gpu_memory_utilization: fraction of a GPU's memory for the engine's weights and KV cache;
            the trainer needs the rest. On CPUs the environment variable VLLM_CPU_KVCACHE_SPACE sets
            the size of the cache.
        max_model_len: maximum length of prompt and response together, in tokens; null: the longest
            that the run can produce.
        max_num_seqs: maximum number of sequences at once; null: vLLM's default.
        enforce_eager: use neither compilation nor CUDA graphs, which makes the start faster and
            sampling on GPUs slower; null: only on CPUs.
        sleep: free the engine's GPU memory while the student is updated; null: unless
            ``rollout.staleness`` is 1 or the engine has a GPU of its own.
        gap_responses: number of responses in each step, on each rank, whose log-probs are compared
            with the trainer's; 0: none. Responses that were sampled with older weights can't be
            compared: the engine then samples their last tokens again.
        gap_tokens: number of last tokens of these responses that are compared.
        max_logprob_gap: end the run if the mean absolute difference of the log-probs is above this;
            null: a limit that depends on the dtypes.
        start_timeout: time limit for the start of the engine, in seconds.
        step_timeout: time without progress, in seconds, after which the engine counts as hung.
        max_restarts: number of times in a run that a rank restarts an engine that died or hung.
            Tensor-parallel engines are not restarted.
    """

    own_gpus: bool = False
    tensor_parallel_size: int = 1
    dtype: DType | None = None
    gpu_memory_utilization: float = 0.4
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool | None = None
    sleep: bool | None = None
    gap_responses: int = 8
    gap_tokens: int = 32
    max_logprob_gap: float | None = None
    start_timeout: float = 900
    step_timeout: float = 300
    max_restarts: int = 1

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
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
