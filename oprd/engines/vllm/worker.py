"""The process that vLLM runs in, one a rank: ``python -m oprd.engines.vllm.worker FD`` serves the
connection of an `oprd.engines.vllm.process.EngineProcess`.

vLLM's engine core runs in this process too, not in one below it (``external_launcher``), so that
weights reach it as tensors, by vLLM's own ``reload_weights``: the same call on a CPU and on a GPU.

    python -m oprd.engines.vllm.worker check '{"model": ..}'  # would vLLM take these arguments?
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from oprd.engines.vllm.process import receive_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM

BEAT_SECONDS = 2.0
PR_SET_PDEATHSIG = 1


class Worker:
    """Answers messages; every method but `serve` is one."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.llm: LLM | None = None

    def serve(self) -> None:
        """Until asked to close, or until nobody is there any more."""
        while True:
            try:
                name, *arguments = self.connection.recv()
            except EOFError:
                return
            try:
                answer = getattr(self, name)(*arguments)
            except Exception as error:
                traceback.print_exc()
                self.connection.send(("error", f"{type(error).__name__}: {error}"))
                return
            self.connection.send(("answer", answer))
            if name == "close":
                return

    def start(self, arguments: dict[str, Any]) -> None:
        """Make the engine; its weights are random until `load`."""
        from vllm import LLM

        self.llm = LLM(**arguments)

    def load(self, asleep: bool) -> None:
        """Take the weights that follow, and forget what was computed with others.

        Args:
            asleep: since `sleep`, there is no memory for them.
        """
        tensors = receive_tensors(self.connection)
        try:
            self._load(tensors, asleep)
        finally:
            for _ in tensors:  # the other side sends all of them before it looks for an answer
                pass

    def _load(self, tensors: Iterator[tuple[str, Tensor]], asleep: bool) -> None:
        assert self.llm is not None
        if asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        self.llm.apply_model(repack_tied_head)
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, which holds old states")

    def sample(
        self,
        prompts: Sequence[list[int]],
        sampling: dict[str, Any],
        seed: int,
        with_log_probs: Sequence[int],
    ) -> list[tuple[list[int], list[float] | None]]:
        """Response and, of the prompts ``with_log_probs``, its tokens' log-probs at temperature 1.

        The whole engine is seeded rather than each request, which would have the sampler draw row
        by row.
        """
        from vllm import SamplingParams
        from vllm.utils.torch_utils import set_random_seed

        assert self.llm is not None
        engine = self.llm.llm_engine
        set_random_seed(seed)
        asked = set(with_log_probs)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(
                **sampling, detokenize=False, logprobs=0 if i in asked else None
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        found: dict[int, tuple[list[int], list[float] | None]] = {}
        beat = time.monotonic()
        while engine.has_unfinished_requests():
            for request in engine.step():
                if not request.finished:
                    continue
                output = request.outputs[0]
                ids, log_probs = list(output.token_ids), None
                if output.logprobs is not None:
                    by_token = zip(ids, output.logprobs, strict=True)
                    log_probs = [candidates[token].logprob for token, candidates in by_token]
                found[int(request.request_id)] = (ids, log_probs)
            if time.monotonic() - beat > BEAT_SECONDS:
                beat = time.monotonic()
                self.connection.send(("beat", None))
        return [found[i] for i in range(len(prompts))]

    def sleep(self) -> None:
        """Free the GPU's memory. The weights are lost, as they are about to change."""
        assert self.llm is not None
        self.llm.sleep(level=2)

    def close(self) -> None:
        """Let go of the engine."""
        self.llm = None
        gc.collect()


def repack_tied_head(model: Any) -> None:
    """On CPUs vLLM (0.32) keeps a packed copy of the LM head's weight. Where the head is tied to
    the embeddings no weight of its own arrives, and ``reload_weights`` leaves the old copy."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear") and head.weight.numel():
        head.quant_method.process_weights_after_loading(head)


def die_with_parent() -> None:
    """Ask Linux to end this process when the trainer ends, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def check(arguments: dict[str, Any]) -> None:
    """Have vLLM check its arguments.

    Raises:
        Exception: vLLM's own, of any kind.
    """
    from vllm import EngineArgs

    EngineArgs(**arguments).create_engine_config()


def main() -> None:
    """Serve, or check."""
    if sys.argv[1] == "check":
        try:
            check(json.loads(sys.argv[2]))
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(1)
        return
    die_with_parent()
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    Worker(Connection(descriptor)).serve()


if __name__ == "__main__":
    main()
