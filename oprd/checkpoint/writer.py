"""Writing checkpoints: beside training, whole or not at all."""

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
"""Directory in a checkpoint for what a model's files hold besides weights."""

TORCH_WRITER = "inline_container.cc"
"""In the error that torch's zip writer raises where a file can't be written. The OSError behind it
is lost on the way from one rank to the others."""


class WriteFailed(RuntimeError):
    """A checkpoint could not be written, for a reason that may pass: no room, an I/O error."""


class Writer:
    """Writes a run's checkpoints, one at a time.

    torch's own `async_save` ends when the tensors are written; here the document, the checksums,
    the name and the deletion of older ones follow in the same thread. That thread has a gloo group
    of its own, so that its messages don't mix with those of training.
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
            directory: that of all of the run's checkpoints; on a file system that all ranks share.
            model_files: by name, what is put beside the weights.
        """
        self.directory, self.asynchronous, self.keep_last = directory, asynchronous, keep_last
        self.model_files = model_files
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        gpu = device.type == "cuda"
        # Its pinned memory is kept from one checkpoint to the next.
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
        """Begin to write a checkpoint; collective. `wait` or `finished` tell what came of the one
        before: ask first.

        Args:
            tensors: free to be changed once this returns.
            document: JSON; has ``step`` and ``best`` (None, or metric, value and step).
        """
        assert self._writing is None, "the last write's end has not been asked for"
        if self.asynchronous:
            tensors = cast(Tensors, self._stager.stage(tensors))
        self._writing = self._thread.submit(self._write, tensors, document)

    def finished(self) -> Path | None:
        """The checkpoint whose writing has ended since this was last asked.

        Raises:
            WriteFailed: as `wait`.
        """
        return self.wait() if self._writing is not None and self._writing.done() else None

    def wait(self) -> Path | None:
        """The checkpoint in writing, when it is complete; None if there is none.

        Raises:
            WriteFailed: if there was no room or the disk failed; nothing is left of it.
            Exception: anything else that has gone wrong.
        """
        if self._writing is None:
            return None
        try:
            path = self._writing.result()
        except Exception:
            self._writing = None
            raise
        self._writing = None  # but not if a signal ended the wait: it goes on from staged tensors
        return path

    def close(self) -> None:
        """Wait for the thread. What it was writing is lost to the caller: `wait` first."""
        self._thread.shutdown(wait=True)
        self._stager.close()

    def _write(self, tensors: Tensors, document: Mapping[str, Any]) -> Path:
        path = self.directory / files.step_name(document["step"])
        unfinished = path.with_name(path.name + UNFINISHED)
        try:
            self._on_rank_0(lambda: self._make_room(unfinished, num_bytes(tensors)))
            # One rank needs no group; torch's files are synchronised by its writer.
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
        """What each rank's call returned; all raise what one raised."""
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
    """Note which checkpoint is the best so far."""
    if files.read_best(directory) != best:
        write_json(directory / files.BEST, best)


def _cause(error: BaseException) -> Exception:
    """What lies behind an error of `torch.distributed.checkpoint`: the first OSError, if any."""
    pending, seen = [error], []
    while pending:
        found = pending.pop(0)
        if isinstance(found, OSError):
            return found
        if found in seen:
            continue
        seen.append(found)
        if isinstance(found, CheckpointException):
            pending += [inner for inner, _ in found.failures.values()]
        pending += [e for e in (found.__cause__, found.__context__) if e is not None]
    inner = next((e for e in seen if isinstance(e, Exception)), None)
    return inner or RuntimeError(str(error))
