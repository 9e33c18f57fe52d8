"""An engine's process without vLLM: the same messages, and ways to fail.

It answers a prompt with its length and the sum of its weights, which must be a small whole number.
A file of one of these names beside its configuration makes it fail at that point, once:
``die_in_sample``, ``hang_in_sample``, ``error_in_sample``, ``die_in_load``, ``die_in_start``.
"""

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from oprd.engines.vllm.worker import Worker, die_with_parent


class FakeWorker(Worker):
    directory: Path
    weights: dict
    seed: int

    def start(self, arguments):
        self.directory = Path(arguments["model"])
        print("the fake engine starts", flush=True)
        self.fail("start")

    def _load(self, tensors, asleep):
        self.weights = {}
        for name, tensor in tensors:
            self.weights[name] = tensor.clone()
            self.fail("load")

    def sample(self, prompts, sampling, seed, with_log_probs):
        self.fail("sample")
        total = int(sum(w.double().sum() for w in self.weights.values()))
        answer = [len(p) for p in prompts]
        return [
            ([n, total, seed], [-1.0] * 3 if i in with_log_probs else None)
            for i, n in enumerate(answer)
        ]

    def close(self):
        pass

    def fail(self, where):
        for how in ("die", "hang", "error"):
            file = self.directory / f"{how}_in_{where}"
            if not file.exists():
                continue
            file.unlink()
            if how == "error":
                raise RuntimeError("out of cake")
            os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)


if __name__ == "__main__":
    die_with_parent()
    FakeWorker(Connection(int(sys.argv[1]))).serve()
