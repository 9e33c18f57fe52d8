"""Atomic checkpoint writes in a background thread."""

from __future__ import annotations

import errno
import shutil
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from oprd import distributed
from oprd.atomic_files import UNFINISHED, write_json, write_whole
from oprd.checkpoint import files
from oprd.checkpoint.state import Tensors, num_bytes, quiet_dcp

T = TypeVar("T")
STUDENT = "student"
"""Directory in a checkpoint for the model's files other than weights."""

TORCH_WRITER = "inline_container.cc"
"""Text in the error that torch's zip writer raises if it can't write a file. The underlying OSError
is lost when the error travels from one rank to the others."""


class WriteFailed(RuntimeError):
    """A checkpoint could not be written because the disk is full or had an I/O error."""


class Writer:
    """Writer of a run's checkpoints, one at a time.

    torch's own `async_save` ends once the tensors are written. Here the same thread then adds the
    checksums and the document, renames the checkpoint and deletes older ones. The thread has its
    own gloo group, so that its messages don't mix with those of training.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        *,
        asynchronous: bool,
        keep_last: int | None,
        model_files: Mapping[str, bytes],
    ) -> None:
        """Collective.

        Args:
            directory: parent of the run's checkpoints, on a file system that all ranks share.
            model_files: contents of the files to store beside the weights, by name.
        """
        self.directory, self.asynchronous, self.keep_last = directory, asynchronous, keep_last
        self.model_files = model_files
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        gpu = device.type == "cuda"
        # One stager for all checkpoints, so that its pinned memory is reused.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=gpu,
            )
        )
        quiet_dcp()

    def write(self, tensors: Tensors, document: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; collective.

        Call `wait` or `finished` first to collect the outcome of the previous write.

        Args:
            tensors: may be modified once an asynchronous `write` returns, since they are copied;
                otherwise only after `wait`.
            document: JSON; has ``step`` and ``best`` (None, or metric, value and step).
        """
        assert self._writing is None, (
            "the outcome of the last write has not been asked for: call wait"
        )
        if self.asynchronous:
            tensors = cast(Tensors, self._stager.stage(tensors))
        self._writing = self._thread.submit(self._write, tensors, document)

    def finished(self) -> Path | None:
        """Return the checkpoint if its write has ended since the last call, without waiting.

        Raises:
            WriteFailed: see `wait`.
        """
        return self.wait() if self._writing is not None and self._writing.done() else None

    def wait(self) -> Path | None:
        """Wait for the current write and return its checkpoint; None if there is no write.

        Raises:
            WriteFailed: if the disk is full or failed; the partial checkpoint is deleted.
            Exception: any other error of the write.
        """
        if self._writing is None:
            return None
        try:
            path = self._writing.result()
        except Exception:
            self._writing = None
            raise
        self._writing = None  # not if a signal ended the wait: the write continues
        return path

    def close(self) -> None:
        """Wait for the thread to end. Call `wait` first to get the outcome of the current write."""
        self._thread.shutdown(wait=True)
        self._stager.close()

    def _write(self, tensors: Tensors, document: Mapping[str, Any]) -> Path:
        path = self.directory / files.step_name(document["step"])
        unfinished = path.with_name(path.name + UNFINISHED)
        try:
            self._on_rank_0(lambda: self._make_room(unfinished, num_bytes(tensors)))
            # FileSystemWriter itself calls fsync on its files.
            dcp.save(
                dict(tensors),
                storage_writer=dcp.FileSystemWriter(unfinished),
                process_group=self.group,
                no_dist=self.group is None,
            )
            written: files.Digests = {}
            for part in self._agree(lambda: self._own_digests(unfinished)):
                written |= part
            self._on_rank_0(lambda: self._complete(unfinished, path, document, written))
        except (Exception, CheckpointException) as error:
            if distributed.rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            cause = _cause(error)
            if isinstance(cause, OSError) or TORCH_WRITER in str(cause):
                raise WriteFailed(
                    f"the checkpoint of step {document['step']} could not be written: {cause}"
                ) from error
            raise cause from error
        return path

    def _make_room(self, unfinished: Path, size: int) -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        free = shutil.disk_usage(unfinished).free
        if free < size:
            raise OSError(
                errno.ENOSPC, f"{free / 1e9:.2f} GB free of the {size / 1e9:.2f} GB it needs"
            )
        (unfinished / STUDENT).mkdir()
        for name, content in self.model_files.items():
            write_whole(unfinished / STUDENT / name, content)

    def _own_digests(self, unfinished: Path) -> files.Digests:
        rank = distributed.rank()
        own = list(unfinished.glob(f"__{rank}_*"))
        if rank == 0:
            own += [unfinished / ".metadata", *(unfinished / STUDENT).iterdir()]
        return files.digests(unfinished, own)

    def _complete(
        self, unfinished: Path, path: Path, document: Mapping[str, Any], written: files.Digests
    ) -> None:
        files.complete(unfinished, path, {"format": files.FORMAT, **document, "files": written})
        best = document["best"]
        if best is not None:
            write_best(self.directory, best)
        files.prune(self.directory, self.keep_last, None if best is None else best["step"])

    def _on_rank_0(self, what: Callable[[], None]) -> None:
        self._agree(what if distributed.rank() == 0 else lambda: None)

    def _agree(self, what: Callable[[], T]) -> list[T]:
        """Run a call on every rank and return all results; an error on one is raised on all."""
        try:
            outcome: tuple[T | None, Exception | None] = (what(), None)
        except OSError as error:
            outcome = (None, error)
        except Exception:
            outcome = (None, RuntimeError(traceback.format_exc()))
        outcomes = [outcome]
        if self.group is not None:
            outcomes *= dist.get_world_size(self.group)
            dist.all_gather_object(outcomes, outcome, group=self.group)
        for _, problem in outcomes:
            if problem is not None:
                raise problem
        return [value for value, _ in outcomes]  # type: ignore[misc]


def write_best(directory: Path, best: Mapping[str, Any]) -> None:
    """Record which checkpoint is the best so far."""
    if files.read_best(directory) != best:
        write_json(directory / files.BEST, best)


def _cause(error: BaseException) -> Exception:
    """Return the cause of a `torch.distributed.checkpoint` error: the first OSError, if any."""
    pending, seen = [error], []
    while pending:
        current = pending.pop(0)
        if isinstance(current, OSError):
            return current
        if current in seen:
            continue
        seen.append(current)
        if isinstance(current, CheckpointException):
            pending += [inner for inner, _ in current.failures.values()]
        pending += [e for e in (current.__cause__, current.__context__) if e is not None]
    inner = next((e for e in seen if isinstance(e, Exception)), None)
    return inner or RuntimeError(str(error))
