"""The process that vLLM runs in, one per rank.

``python -m oprd.engines.vllm.worker FD`` serves the connection of an
`oprd.engines.vllm.process.EngineProcess`. vLLM's engine core runs in this process too, not in a
child process (``external_launcher``). Weights therefore reach it as tensors, with vLLM's own
``reload_weights``, on CPUs and GPUs alike.

    python -m oprd.engines.vllm.worker check '{"model": ..}'  # does vLLM accept these arguments?
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from oprd.engines.vllm.log import Repeated
from oprd.engines.vllm.process import receive_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM

BEAT_SECONDS = 2.0
PR_SET_PDEATHSIG = 1


class Worker:
    """The server of an engine's connection; every public method but `serve` answers a message."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.llm: LLM | None = None

    def serve(self) -> None:
        """Answer messages until a ``close`` message, an error or the end of the connection."""
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
        """Make the vLLM engine; its weights are random until `load`."""
        from vllm import LLM

        self.llm = LLM(**arguments)
        config = self.llm.llm_engine.model_config.hf_text_config
        keep = Repeated(tied_head=bool(getattr(config, "tie_word_embeddings", False)))
        for handler in logging.getLogger("vllm").handlers:
            handler.addFilter(keep)

    def load(self, asleep: bool) -> None:
        """Receive the weights that follow the message, and reset the prefix cache.

        Args:
            asleep: whether the engine sleeps, so that its memory must be allocated again.
        """
        tensors = receive_tensors(self.connection)
        try:
            self._load(tensors, asleep)
        finally:
            for _ in tensors:  # the trainer sends all of them before it reads an answer
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
        """Sample one response to each prompt.

        The whole engine is seeded, since seeds of single requests would make the sampler draw row
        by row.

        Args:
            with_log_probs: indices of the prompts whose responses come with log-probs.

        Returns:
            For each prompt its response and, if requested, the tokens' log-probs at temperature 1.
        """
        from vllm import SamplingParams
        from vllm.utils.torch_utils import set_random_seed

        assert self.llm is not None
        engine = self.llm.llm_engine
        set_random_seed(seed)
        checked = set(with_log_probs)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(
                **sampling, detokenize=False, logprobs=0 if i in checked else None
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        responses: dict[int, tuple[list[int], list[float] | None]] = {}
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
                responses[int(request.request_id)] = (ids, log_probs)
            # While nobody reads, beats would fill the connection and then block.
            if time.monotonic() - beat > BEAT_SECONDS and is_writable(self.connection):
                beat = time.monotonic()
                self.connection.send(("beat", len(responses)))
        return [responses[i] for i in range(len(prompts))]

    def sleep(self) -> None:
        """Free the GPU's memory. The weights are discarded, since new ones follow."""
        assert self.llm is not None
        self.llm.sleep(level=2)

    def close(self) -> None:
        """Drop the vLLM engine."""
        self.llm = None
        gc.collect()


def is_writable(connection: Connection) -> bool:
    """Return whether a short message can be sent without waiting for a reader."""
    return bool(select.select([], [connection], [], 0)[1])


def repack_tied_head(model: Any) -> None:
    """Renew the packed copy of the LM head's weight that vLLM (0.32) keeps on CPUs.

    If the head is tied to the embeddings, it receives no weight of its own, and ``reload_weights``
    keeps the old copy.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear") and head.weight.numel():
        head.quant_method.process_weights_after_loading(head)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the trainer ends for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def check(arguments: dict[str, Any]) -> None:
    """Let vLLM check its arguments.

    Raises:
        Exception: any error that vLLM raises.
    """
    from vllm import EngineArgs

    EngineArgs(**arguments).create_engine_config()


def main() -> None:
    """Serve a connection, or check arguments."""
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
