"""The engine that samples with vLLM, in a separate process per rank on the rank's device.

In the trainer's process, vLLM would change threads, allocator and process group, and would end the
trainer when it dies. vLLM starts no further process below the engine's (see `worker`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from oprd import distributed
from oprd.config import MAX_LOGPROB_GAP, DType, SamplingParams, TrainConfig, VllmConfig
from oprd.data.rollout import Rollout
from oprd.engines.base import EngineFailure
from oprd.engines.vllm.environment import engine_device, worker_environment
from oprd.engines.vllm.process import EngineProcess, free_port
from oprd.observability import progress
from oprd.observability.console import ANY_RANK

logger = logging.getLogger(__name__)

WORKER = "oprd.engines.vllm.worker"

Weights = Callable[[], Iterator[tuple[str, Tensor]]]


def trainer_dtypes(cfg: TrainConfig) -> list[DType]:
    """Return the student's dtypes: first that of its weights, last that of its computations."""
    sharded = cfg.fsdp.active(distributed.world_size())
    dtypes = [cfg.student.dtype, cfg.fsdp.param_dtype if sharded else None, cfg.autocast]
    return [dtype for dtype in dtypes if dtype is not None]


def engine_dtype(cfg: TrainConfig) -> DType:
    """Return the dtype that the engine computes in."""
    return cfg.rollout.vllm.dtype or trainer_dtypes(cfg)[-1]


def max_logprob_gap(cfg: TrainConfig) -> float:
    """Return the mean log-prob gap above which a run ends."""
    given = cfg.rollout.vllm.max_logprob_gap
    dtypes = [engine_dtype(cfg), *trainer_dtypes(cfg)]
    return max(MAX_LOGPROB_GAP[dtype] for dtype in dtypes) if given is None else given


def longest_sequence(cfg: TrainConfig) -> int:
    """Return the tokens of the longest prompt plus response that a run may sample."""
    new = max(cfg.rollout.max_new_tokens, cfg.eval.max_new_tokens if cfg.eval.sets else 0)
    return cfg.data.max_prompt_tokens + new


def llm_arguments(
    cfg: VllmConfig, model: Path, dtype: DType, max_model_len: int, on_gpu: bool
) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM``.

    Args:
        model: a directory with a configuration; weights and tokenizer are not read.
        max_model_len: used if ``cfg`` has none.
    """
    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignore the model's own settings: see `Engine.sample`
        "logprobs_mode": "raw_logprobs",
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": cfg.tensor_parallel_size,
        "dtype": dtype,
        "max_model_len": cfg.max_model_len or max_model_len,
        "enforce_eager": not on_gpu if cfg.enforce_eager is None else cfg.enforce_eager,
        "enable_prefix_caching": True,
    }
    if cfg.max_num_seqs is not None:
        arguments["max_num_seqs"] = cfg.max_num_seqs
    if on_gpu:
        arguments["gpu_memory_utilization"] = cfg.gpu_memory_utilization
        arguments["enable_sleep_mode"] = cfg.sleep is not False
    return arguments


@dataclass
class _Request:
    """Responses that the engine's process samples.

    Attributes:
        prompts: this rank's prompts.
        message: asks for the responses to the prompts of all ranks of the tensor-parallel group.
        own: where this rank's are among them.
        is_sent: whether the message was sent and its answer is still to come.
    """

    prompts: list[list[int]]
    message: tuple[Any, ...]
    own: slice
    is_sent: bool = True


class VllmEngine:
    """An engine that samples with vLLM (see `oprd.engines.base.Engine`)."""

    def __init__(
        self,
        cfg: VllmConfig,
        *,
        model_config: PretrainedConfig,
        weights: Weights,
        ends: Sequence[int],
        device: torch.device,
        dtype: DType,
        max_model_len: int,
        directory: Path,
        threads: int | None = None,
    ) -> None:
        """Start the engine, which takes most of a minute. Collective.

        Args:
            model_config: the student's configuration.
            weights: returns the student's current weights
                (`oprd.models.weights.full_weights`). Collective if they are sharded.
            ends: tokens that end a response.
            dtype: see `engine_dtype`.
            max_model_len: used if ``cfg`` has none.
            directory: parent of ``rank_N``, which receives the configuration and the log.
            threads: number of the engine's CPU threads, unless OMP_NUM_THREADS is set; None: vLLM's
                default.

        Raises:
            EngineFailure: if the engine does not start.
        """
        self.cfg, self.device, self.ends = cfg, device, list(ends)
        self.weights, self.dtype = weights, getattr(torch, dtype)
        self.policy_version = -1  # the weights are still random
        self.restarts = 0
        self.threads = threads
        self._asleep = False
        self._differs = False  # one rank's engine has newer weights than another's
        self._request: _Request | None = None
        self._group = _tensor_parallel_group(cfg.tensor_parallel_size)
        self.directory = directory / f"rank_{distributed.rank()}"
        self.directory.mkdir(parents=True, exist_ok=True)
        model_config.save_pretrained(self.directory)
        self._arguments = llm_arguments(
            cfg, self.directory, dtype, max_model_len, device.type == "cuda"
        )
        self._process: EngineProcess | None = None
        self._start()

    def sync(self, version: int) -> None:
        """See `Engine`. Sends nothing if the engine has these weights already."""
        if version == self.policy_version and not self._asleep and not self._differs:
            return
        self._guarded(lambda: self._load(self.weights()), loads=True)
        self.policy_version, self._differs = version, False

    def sample(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        seed: int | None = None,
    ) -> list[Rollout]:
        """See `Engine`. The first ``gap_responses`` responses come with their log-probs.

        Raises:
            RuntimeError: if the engine is asleep or has no weights yet; call `sync` first.
            ValueError: if a prompt plus its response may exceed the engine's maximum length.
        """
        self.start(prompts, sampling, seed)
        return self.collect(self.policy_version)

    def start(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        seed: int | None = None,
    ) -> None:
        """See `Engine`. A failure of the engine is known in `collect`."""
        if self._asleep or self.policy_version < 0:
            raise RuntimeError("the engine has no weights: call sync before sample")
        longest, room = max(map(len, prompts), default=0), self._arguments["max_model_len"]
        if longest + sampling.max_new_tokens > room:
            raise ValueError(
                f"{longest} prompt tokens and {sampling.max_new_tokens} new ones exceed the "
                f"engine's {room} (rollout.vllm.max_model_len)"
            )
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        all_prompts, seed, own, checked = self._gather(prompts, seed)
        wanted = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
            "stop_token_ids": self.ends,
        }
        message = ("sample", all_prompts, wanted, seed, checked)
        assert self._process is not None, "the engine was closed"
        self._process.begin(*message, timeout=self.cfg.step_timeout)
        self._request = _Request([list(p) for p in prompts], message, own)

    def collect(self, version: int) -> list[Rollout]:
        """See `Engine`."""
        request, self._request = self._request, None
        assert request is not None, "call start before collect"
        progress.expect(len(request.message[1]), "responses")
        loaded, restarts = self.policy_version, self.restarts
        was_restarted, responses = self._guarded(lambda: self._answer(request))
        if was_restarted and version != loaded:
            self._differs = True
            if self.restarts != restarts:
                self.policy_version = version
        ends = set(self.ends)
        return [
            Rollout(prompt, ids, truncated=ids[-1] not in ends, log_probs=log_probs)
            for prompt, (ids, log_probs) in zip(
                request.prompts, responses[request.own], strict=True
            )
        ]

    def sleep(self) -> None:
        """See `Engine`. Does nothing on CPUs."""
        if self.device.type == "cuda" and self.cfg.sleep is not False and not self._asleep:
            self._guarded(lambda: self._ask("sleep"))
            self._asleep = True

    def close(self) -> None:
        """See `Engine`."""
        if self._process is not None:
            self._process.close()
            self._process = None

    @property
    def pid(self) -> int | None:
        """Id of the engine's process; None after `close`."""
        return None if self._process is None else self._process.process.pid

    # Internals ----------------------------------------------------------------------------------

    def _start(self) -> None:
        ranks = self.cfg.tensor_parallel_size
        rank, (port, *_) = distributed.rank() % ranks, self._all(free_port())
        device = engine_device(self.cfg, self.device)
        environment = worker_environment(device, rank, ranks, port, os.environ)
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        what = "the vLLM engine"
        if distributed.world_size() > 1:
            what += f" of rank {distributed.rank()}"
        self._process = EngineProcess(WORKER, environment, self.directory / "engine.log", what)
        self._asleep = False
        self._process.ask("start", self._arguments, timeout=self.cfg.start_timeout)

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        # Cast first: float32 weights for a bfloat16 engine would be twice as much to send.
        tensors = ((n, t.to(self.dtype) if t.is_floating_point() else t) for n, t in weights)
        self._ask("load", self._asleep, tensors=tensors)
        self._asleep = False

    def _ask(self, *message: Any, tensors: Iterator[tuple[str, Tensor]] | None = None) -> Any:
        assert self._process is not None, "the engine was closed"
        return self._process.ask(*message, tensors=tensors, timeout=self.cfg.step_timeout)

    def _answer(self, request: _Request) -> Any:
        """Return the responses to a request; send it again if its first answer was lost."""
        if not request.is_sent:
            return self._ask(*request.message)
        request.is_sent = False
        assert self._process is not None, "the engine was closed"
        return self._process.finish(self.cfg.step_timeout)

    def _guarded(self, request: Callable[[], Any], loads: bool = False) -> tuple[bool, Any]:
        """Make a request; restart a failed engine and repeat the request.

        A restarted engine needs weights, and gathering them is collective. All ranks therefore
        learn of a failure and take part.

        Args:
            loads: whether the request itself loads the weights.

        Returns:
            Whether any rank's engine was restarted, and the answer.
        """
        answer, done, recovering, lost = None, False, False, False
        while True:
            failure = None
            try:
                if recovering:
                    self._recover(lost)
                    done = done or loads
                if not done:
                    answer, done = request(), True
            except EngineFailure as error:
                failure, done = error, False
            lost = failure is not None
            # A tensor-parallel group loses all of its engines, so it is not restarted. The engines
            # that wait for this one notice after step_timeout.
            restart = self.cfg.tensor_parallel_size == 1 and self.restarts < self.cfg.max_restarts
            severity = 0.0 if not lost else 1.0 if restart else 2.0
            worst = distributed.max_over_ranks(severity, self.device)
            if not worst:
                return recovering, answer
            if worst > 1:
                self.close()
                if failure is None:
                    raise EngineFailure("another rank's vLLM engine failed: see its message")
                raise EngineFailure(f"{failure}\n{self._advice()}") from failure
            if lost:
                self.restarts += 1
                logger.warning(
                    f"{failure}\nIt is restarted ({self.restarts}/{self.cfg.max_restarts}).",
                    extra=ANY_RANK,
                )
            recovering = True

    def _recover(self, lost: bool) -> None:
        """Restart this rank's engine and load its weights, if it is the engine that was lost."""
        failure = None
        if lost:
            try:
                self._start()
            except EngineFailure as error:
                failure = error
        weights = self.weights()
        if lost and failure is None:
            self._load(weights)
        else:
            for _ in weights:
                pass
        if failure is not None:
            raise failure

    def _advice(self) -> str:
        return (
            f"It was restarted {self.restarts} times (rollout.vllm.max_restarts="
            f"{self.cfg.max_restarts}). Give it more memory, lower the number of sequences at once "
            "(rollout.vllm.max_num_seqs), or sample with rollout.engine=generate"
        )

    def _all(self, value: Any) -> list[Any]:
        """Gather a value from the ranks of the tensor-parallel group."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.cfg.tensor_parallel_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _gather(
        self, prompts: Sequence[list[int]], seed: int
    ) -> tuple[list[list[int]], int, slice, list[int]]:
        """Gather the prompts of the tensor-parallel group.

        The engines of the group must schedule alike, so all of them get the same requests.

        Returns:
            The prompts of all ranks of the group, one seed, the slice of this rank's prompts, and
            the indices of the prompts whose log-probs are checked.
        """
        gathered = self._all((list(prompts), seed))
        all_prompts: list[list[int]] = []
        checked: list[int] = []
        own = slice(0)
        for rank, (theirs, _) in enumerate(gathered):
            start = len(all_prompts)
            all_prompts += theirs
            checked += [*range(start, len(all_prompts))][: self.cfg.gap_responses]
            if rank == distributed.rank() % len(gathered):
                own = slice(start, len(all_prompts))
        return all_prompts, gathered[0][1], own, checked


def _tensor_parallel_group(size: int) -> dist.ProcessGroup | None:
    """Return this rank's group of ``size`` neighbouring ranks; None for size 1. Collective."""
    own = None
    for start in range(0, distributed.world_size(), size) if size > 1 else ():
        group = dist.new_group([*range(start, start + size)])
        if start <= distributed.rank() < start + size:
            own = group
    return own
