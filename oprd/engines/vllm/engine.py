"""vLLM as the engine. It runs in a process of its own, one a rank, on the rank's device.

A process of its own, as vLLM would otherwise rearrange the trainer's threads, allocator and process
group, and take it along when it dies. In that process nothing is below vLLM (see `worker`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from oprd import distributed
from oprd.config import MAX_LOGPROB_GAP, DType, TrainConfig, VllmConfig
from oprd.data.rollout import Rollout
from oprd.engines.base import EngineFailure
from oprd.engines.vllm.process import EngineProcess, free_port

WORKER = "oprd.engines.vllm.worker"
TORCHRUN = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "PET_")
"""Variables of the trainer's own process group, which the engine is no part of."""

Weights = Callable[[], Iterator[tuple[str, Tensor]]]


def trainer_dtypes(cfg: TrainConfig) -> list[DType]:
    """Of the student's weights and, last, of what it computes in."""
    sharded = cfg.fsdp.active(distributed.world_size())
    dtypes = [cfg.student.dtype, cfg.fsdp.param_dtype if sharded else None, cfg.autocast]
    return [dtype for dtype in dtypes if dtype is not None]


def engine_dtype(cfg: TrainConfig) -> DType:
    """The dtype that the engine computes in."""
    return cfg.rollout.vllm.dtype or trainer_dtypes(cfg)[-1]


def max_logprob_gap(cfg: TrainConfig) -> float:
    """The gap that ends a run."""
    given = cfg.rollout.vllm.max_logprob_gap
    dtypes = [engine_dtype(cfg), *trainer_dtypes(cfg)]
    return max(MAX_LOGPROB_GAP[dtype] for dtype in dtypes) if given is None else given


def longest_sequence(cfg: TrainConfig) -> int:
    """Tokens of the longest prompt and response that a run may sample."""
    new = max(cfg.rollout.max_new_tokens, cfg.eval.max_new_tokens if cfg.eval.sets else 0)
    return cfg.data.max_prompt_tokens + new


def llm_arguments(
    cfg: VllmConfig, model: Path, dtype: DType, max_model_len: int, on_gpu: bool
) -> dict[str, Any]:
    """Of ``vllm.LLM``.

    Args:
        model: a directory with a configuration; weights and tokenizer are not looked for.
        max_model_len: that ``cfg`` does not give.
    """
    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # none of the model's own settings: see `Engine.sample`
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
        arguments["enable_sleep_mode"] = cfg.sleep
    return arguments


def worker_environment(
    device: torch.device, rank: int, ranks: int, port: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The variables that an engine's process starts with.

    Args:
        rank, ranks: among those that share one copy of the student, which meet at ``port``.
    """
    variables = {k: v for k, v in inherited.items() if not k.startswith(TORCHRUN)}
    # vLLM's sleep needs an allocator of its own, which expandable segments exclude.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        variables.pop(name, None)
    variables |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(device.index or 0),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    # Engines of several ranks would be bound to the same cores; OMP_NUM_THREADS stays in force.
    variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    variables.setdefault("VLLM_CPU_KVCACHE_SPACE", str(default_cpu_cache_gib()))
    variables.setdefault("VLLM_NO_USAGE_STATS", "1")
    return variables


def default_cpu_cache_gib() -> int:
    """GiB of KV cache on a CPU: an eighth of the memory, shared by its ranks, at most 16."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, int(memory / 8 / ranks)))


class VllmEngine:
    """See `oprd.engines.Engine`."""

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
        say: Callable[[str], None],
    ) -> None:
        """Start the engine, which takes the better part of a minute. Collective.

        Args:
            model_config: the student's.
            weights: the student's present ones, each time it is called
                (`oprd.models.weights.full_weights`). Collective if they are sharded.
            ends: tokens that end a response.
            dtype: see `engine_dtype`.
            max_model_len: that ``cfg`` does not give.
            directory: for its configuration and log.
            say: where the user is told of a restart.

        Raises:
            EngineFailure: if it does not start.
        """
        self.cfg, self.device, self.ends, self.say = cfg, device, list(ends), say
        self.weights, self.dtype = weights, getattr(torch, dtype)
        self.policy_version = -1  # random weights
        self.restarts = 0
        self._asleep = False
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
        """See `Engine`. Sends nothing if that is what it has already."""
        if version == self.policy_version and not self._asleep:
            return
        self._guarded(lambda: self._load(self.weights()), loads=True)
        self.policy_version = version

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[Rollout]:
        """See `Engine`. The first ``gap_responses`` responses come with their log-probs.

        Raises:
            RuntimeError: if it sleeps: `sync` it first.
            ValueError: if a prompt and its response may be longer than the engine was made for.
        """
        if self._asleep or self.policy_version < 0:
            raise RuntimeError("the engine has no weights: call sync before sample")
        longest, room = max(map(len, prompts), default=0), self._arguments["max_model_len"]
        if longest + max_new_tokens > room:
            raise ValueError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed the engine's {room} "
                "(rollout.vllm.max_model_len)"
            )
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        everyones, seed, mine, checked = self._gather(prompts, seed)
        sampling = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p if temperature > 0 else 1.0,
            "stop_token_ids": self.ends,
        }
        responses = self._guarded(lambda: self._ask("sample", everyones, sampling, seed, checked))[
            mine
        ]
        ends = set(self.ends)
        return [
            Rollout(list(prompt), ids, truncated=ids[-1] not in ends, log_probs=log_probs)
            for prompt, (ids, log_probs) in zip(prompts, responses, strict=True)
        ]

    def sleep(self) -> None:
        """See `Engine`; only on GPUs."""
        if self.device.type == "cuda" and self.cfg.sleep and not self._asleep:
            self._guarded(lambda: self._ask("sleep"))
            self._asleep = True

    def close(self) -> None:
        """See `Engine`."""
        if self._process is not None:
            self._process.close()
            self._process = None

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return None if self._process is None else self._process.process.pid

    # Its parts ----------------------------------------------------------------------------------

    def _start(self) -> None:
        ranks = self.cfg.tensor_parallel_size
        rank, (port, *_) = distributed.rank() % ranks, self._all(free_port())
        environment = worker_environment(self.device, rank, ranks, port, os.environ)
        what = "the vLLM engine"
        if distributed.world_size() > 1:
            what += f" of rank {distributed.rank()}"
        self._process = EngineProcess(WORKER, environment, self.directory / "engine.log", what)
        self._asleep = False
        self._process.ask("start", self._arguments, timeout=self.cfg.start_timeout)

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        # In its own dtype: a float32 student would be twice as much to send.
        tensors = ((n, t.to(self.dtype) if t.is_floating_point() else t) for n, t in weights)
        self._ask("load", self._asleep, tensors=tensors)
        self._asleep = False

    def _ask(self, *message: Any, tensors: Iterator[tuple[str, Tensor]] | None = None) -> Any:
        assert self._process is not None, "the engine was closed"
        return self._process.ask(*message, tensors=tensors, timeout=self.cfg.step_timeout)

    def _guarded(self, request: Callable[[], Any], loads: bool = False) -> Any:
        """The request's answer. Where a rank's engine fails it is restarted, if it may be, and
        asked again. It needs weights first, and gathering those is collective: all ranks learn of
        a failure and help.

        Args:
            loads: the request is itself to load the weights.
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
            # Of a tensor-parallel group all engines are lost: those that wait for this one find
            # out by step_timeout.
            restart = self.cfg.tensor_parallel_size == 1 and self.restarts < self.cfg.max_restarts
            severity = 0.0 if not lost else 1.0 if restart else 2.0
            worst = distributed.max_over_ranks(severity, self.device)
            if not worst:
                return answer
            if worst > 1:
                self.close()
                if failure is None:
                    raise EngineFailure("another rank's vLLM engine failed: see its message")
                raise EngineFailure(f"{failure}\n{self._advice()}") from failure
            if lost:
                self.restarts += 1
                self.say(f"{failure}\nIt is restarted ({self.restarts}/{self.cfg.max_restarts}).")
            recovering = True

    def _recover(self, lost: bool) -> None:
        """Start an engine and give it weights, if this rank's is the one that was lost."""
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
            f"{self.cfg.max_restarts}). Give it more memory, or less to do at once "
            "(rollout.vllm.max_num_seqs), or sample with rollout.engine=generate"
        )

    def _all(self, value: Any) -> list[Any]:
        """Everyone's, of the ranks that share a copy of the student."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.cfg.tensor_parallel_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _gather(
        self, prompts: Sequence[list[int]], seed: int
    ) -> tuple[list[list[int]], int, slice, list[int]]:
        """The prompts of all that share a copy, one seed, where among them this rank's are, and
        which of them are checked: the same requests on all of these ranks, as their engines must
        schedule alike."""
        gathered = self._all((list(prompts), seed))
        everyones: list[list[int]] = []
        checked: list[int] = []
        mine = slice(0)
        for rank, (theirs, _) in enumerate(gathered):
            start = len(everyones)
            everyones += theirs
            checked += [*range(start, len(everyones))][: self.cfg.gap_responses]
            if rank == distributed.rank() % len(gathered):
                mine = slice(start, len(everyones))
        return everyones, gathered[0][1], mine, checked


def _tensor_parallel_group(size: int) -> dist.ProcessGroup | None:
    """This rank's, of ``size`` neighbours. Collective."""
    own = None
    for start in range(0, distributed.world_size(), size) if size > 1 else ():
        group = dist.new_group([*range(start, start + size)])
        if start <= distributed.rank() < start + size:
            own = group
    return own
