"""The trainer's side of an engine's process; the other side is `oprd.engines.vllm.worker`.

A message is a pickled tuple whose first entry names its kind. Tensors follow their message: GPU
tensors by CUDA IPC without a copy, CPU tensors as bytes, since shared memory in containers
is small.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from oprd.engines.base import EngineFailure
from oprd.engines.vllm.log import cause
from oprd.observability import hang_watchdog, progress

CLOSE_SECONDS = 20.0


def send_tensor(connection: Connection, name: str, tensor: Tensor) -> None:
    """Send a tensor and its name."""
    if tensor.is_cuda:
        connection.send((name, tensor))
        return
    connection.send((name, (tensor.dtype, tensor.shape)))
    connection.send_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def receive_tensors(connection: Connection) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that `send_tensor` sent, until a None arrives."""
    while (message := connection.recv()) is not None:
        name, content = message
        if not isinstance(content, Tensor):
            dtype, shape = content
            content = torch.empty(shape, dtype=dtype)
            into = content.view(-1).view(torch.uint8).numpy()
            if into.nbytes:
                connection.recv_bytes_into(into)
            else:
                connection.recv_bytes()
        yield name, content


class EngineProcess:
    """A process ``python -m module FD`` in its own session, with its output in a log file.

    Attributes:
        pending: whether a message waits for its answer.
    """

    def __init__(self, module: str, environment: Mapping[str, str], log: Path, what: str) -> None:
        """
        Args:
            module: the module to run; it serves the connection whose file descriptor it is given.
            environment: all environment variables of the process.
            what: description of the process in messages.
        """
        self.what, self.log = what, log
        self._log_start = log.stat().st_size if log.exists() else 0
        ours, theirs = Pipe()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                env=with_this_package(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the trainer alone handles Ctrl-C
            )
        theirs.close()
        self.connection = ours
        self.pending = False
        self._broken: OSError | None = None
        self._deadline: float | None = None
        self._hung: float | None = None
        threading.Thread(target=self._watch, daemon=True, name=f"watch {what}").start()

    def ask(
        self,
        *message: Any,
        tensors: Iterable[tuple[str, Tensor]] | None = None,
        timeout: float,
    ) -> Any:
        """Send a message and wait for its answer: `begin` and `finish`."""
        self.begin(*message, tensors=tensors, timeout=timeout)
        return self.finish(timeout)

    def begin(
        self,
        *message: Any,
        tensors: Iterable[tuple[str, Tensor]] | None = None,
        timeout: float,
    ) -> None:
        """Send a message. If the process has died, `finish` raises.

        Args:
            tensors: sent after the message. The iterable is exhausted even if the process dies.
            timeout: seconds to wait for any sign of life.
        """
        assert not self.pending, "the answer to the last message was not waited for: call finish"
        remaining = iter(tensors or ())
        self.pending = True
        try:
            with self._limit(timeout):
                self.connection.send(message)
            if tensors is not None:
                self._send(remaining, timeout)
        except OSError as error:
            self._broken = error
            self.kill()
            for _ in remaining:  # gathering the tensors is collective
                pass
        except BaseException:  # half of a message
            self.kill()
            raise

    def finish(self, timeout: float) -> Any:
        """Wait for the answer to the message of `begin`.

        Args:
            timeout: seconds to wait for any sign of life.

        Raises:
            EngineFailure: if the process died, was silent for too long or answered with an error.
                The process has then ended.
        """
        try:
            if self._broken is not None:
                raise self._broken
            while True:
                with self._limit(timeout):
                    kind, content = self.connection.recv()
                hang_watchdog.beat()
                if kind == "answer":
                    self.pending = False
                    return content
                if kind == "beat" and content is not None:
                    progress.reach(content)
                if kind == "error":
                    raise EngineFailure(self._describe(f"stopped with an error: {content}"))
        except (EOFError, OSError) as error:
            self.kill()
            raise EngineFailure(self._describe(self._how_it_ended(timeout))) from error
        except BaseException:  # a late answer would be taken for that of the next message
            self.kill()
            raise

    def _send(self, tensors: Iterator[tuple[str, Tensor]], timeout: float) -> None:
        for name, tensor in tensors:  # the time limit excludes the wait for other ranks
            with self._limit(timeout):
                send_tensor(self.connection, name, tensor)
        with self._limit(timeout):
            self.connection.send(None)

    def kill(self) -> None:
        """Kill the process and everything that it started."""
        self.pending = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def close(self) -> None:
        """Ask the process to end, and kill it if it does not, or at once if it is at work."""
        if self.pending:
            self.kill()
            return
        with contextlib.suppress(EngineFailure):
            self.ask("close", timeout=CLOSE_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_SECONDS)
        self.kill()

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = None

    def _watch(self) -> None:
        """Kill the process if it is silent for too long, so that a pending receive fails."""
        while self.process.poll() is None:
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._hung = deadline
                break
            time.sleep(0.2)
        # Its children may hold the other end of the connection open.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _how_it_ended(self, timeout: float) -> str:
        if self._hung is not None:
            return f"gave no sign of life for {timeout:.0f} s and was ended"
        code = self.process.returncode
        if code < 0:
            hint = (
                " (the system kills processes this way when memory runs out)" if code == -9 else ""
            )
            return f"was ended by {signal.Signals(-code).name}{hint}"
        return f"ended with exit code {code}"

    def _describe(self, what_happened: str) -> str:
        with self.log.open("rb") as file:
            file.seek(self._log_start)  # what an engine before it has written is not the cause
            lines = cause(file.read().decode(errors="replace"))
        if not lines:
            return f"{self.what} {what_happened}. Its log names no cause: {self.log}"
        return f"{self.what} {what_happened}. Its log ({self.log}) says:" + "".join(
            f"\n    {line}" for line in lines
        )


def with_this_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment, with PYTHONPATH set so that a process imports this same package."""
    paths = [str(Path(__file__).parents[3]), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def free_port() -> int:
    """Return a TCP port that no process listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
