"""Which decoders oprd works with: every family that transformers builds as a causal LM, small.

    python -m benchmarks.architectures --json new.json
    python -m benchmarks.architectures --page new.json old.json > docs/architectures.md

The first takes about 15 minutes on a core; ``--only llama mamba`` tries these two. Weights are
random. What is tried is in `benchmarks.architecture_checks` and, for FSDP2, in
`benchmarks.architecture_ranks`. Every family runs in processes of its own, with a time limit. A
file that is there is continued. The second file of ``--page`` is that of another transformers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import oprd_kernels
from benchmarks.architecture_checks import CHECKS
from benchmarks.architecture_page import page
from benchmarks.architecture_ranks import RANKS, fsdp2
from benchmarks.small_models import families, make, small_config
from oprd.errors import ConfigError

WORKS, REFUSED, FAILS = "works", "refused", "FAILS"
FSDP = f"FSDP2, {RANKS} ranks"
LIMIT = 120.0
"""Seconds for a family's checks in one process, and again for FSDP2."""
COMMANDS = [line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    ")]
fork = multiprocessing.get_context("fork")
for name in ("peft", "torch._dynamo"):  # imported once, for all families
    importlib.import_module(name)


@dataclass
class Row:
    """A family's results.

    Attributes:
        kind: the model type.
        cls: the causal LM's class; None if it is not built.
        not_built: why it is not.
        found: by column, ``works``, or ``works: ..`` with what limits it, ``refused: ..`` or
            ``FAILS: ..``.
    """

    kind: str
    cls: str | None = None
    not_built: str | None = None
    found: dict[str, str] = field(default_factory=dict)

    @property
    def bugs(self) -> list[str]:
        return [f"{self.kind}: {c}: {f}" for c, f in self.found.items() if f.startswith(FAILS)]


def outcome(check: Callable[[], str | None]) -> str:
    """Return what a check says, in the form of `Row.found`."""
    try:
        note = check()
    except (ConfigError, ValueError) as error:
        if isinstance(error, ConfigError) or _raised_by_oprd(error):
            return f"{REFUSED}: {error}"
        return f"{FAILS}: {_described(error)}"
    except Exception as error:
        return f"{FAILS}: {_described(error)}"
    return WORKS if note is None else f"{WORKS}: {note}"


def _raised_at(error: BaseException) -> str:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _raised_by_oprd(error: BaseException) -> bool:
    return "/oprd/" in _raised_at(error)


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, AssertionError):
        return text
    return f"{type(error).__name__} at {'/'.join(_raised_at(error).split('/')[-2:])}: {text}"


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("oprd").setLevel(logging.ERROR)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo and C++ write there


def _checks(config: PretrainedConfig, columns: Sequence[str], results: Connection) -> None:
    _quiet()
    for column in columns:
        results.send((column, outcome(lambda column=column: CHECKS[column](config))))


def _rank(config: PretrainedConfig, rank: int, store: Path, results: Connection) -> None:
    _quiet()
    results.send((FSDP, outcome(lambda: fsdp2(config, rank, store))))
    results.close()
    os._exit(0)  # gloo would wait for a rank that has failed


def _built(config: PretrainedConfig, results: Connection) -> None:
    _quiet()
    try:
        model = make(config)
    except Exception as error:
        return results.send(("not_built", _described(error)))
    try:
        model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)
    except Exception as error:
        return results.send(("not_built", f"it can't run on token ids alone: {_described(error)}"))
    results.send(("cls", type(model).__name__))


def _run(
    targets: Sequence[tuple[Callable[..., None], tuple]], limit: float
) -> tuple[list[tuple[str, str]], str | None]:
    """Run functions in processes of their own, each with a connection to send results by.

    Returns:
        What they sent, and how they ended if not all ended by themselves.
    """
    processes, readers = [], []
    for target, arguments in targets:
        reader, writer = fork.Pipe(duplex=False)
        process = fork.Process(target=target, args=(*arguments, writer), daemon=True)
        process.start()
        writer.close()
        processes.append(process)
        readers.append(reader)
    found: list[tuple[str, str]] = []
    deadline, ended = time.monotonic() + limit, None
    open_ = list(readers)
    while open_:
        ready = wait(open_, max(0.0, deadline - time.monotonic()))
        if not ready:
            ended = f"it ran longer than {limit:.0f} s"
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            try:
                found.append(reader.recv())
            except EOFError:
                open_.remove(reader)
    for process in processes:
        if ended is not None:
            process.kill()
        process.join()
        if process.exitcode and ended is None:
            ended = f"its process ended with {_signal(process.exitcode)}"
    return found, ended


def _signal(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def sweep(kind: str, limit: float = LIMIT) -> Row:
    """Build a family and try everything with it."""
    row = Row(kind)
    try:
        config = small_config(kind)
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # its module is imported here, once
    except Exception as error:
        row.not_built = f"its configuration: {_described(error)}"
        return row
    found, ended = _run([(_built, (config,))], limit)
    row.cls, row.not_built = dict(found).get("cls"), dict(found).get("not_built", ended)
    if row.cls is None:
        return row
    columns = list(CHECKS)
    while columns:  # one that crashes or hangs costs its own cell
        found, ended = _run([(_checks, (config, columns))], limit)
        row.found |= dict(found)
        columns = [c for c in columns if c not in row.found]
        if columns:
            row.found[columns.pop(0)] = f"{FAILS}: {ended}"
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        ranks = [(_rank, (config, rank, store)) for rank in range(RANKS)]
        found, ended = _run(ranks, limit)
    said = sorted({text for _, text in found}, key=lambda text: not text.startswith(FAILS))
    row.found[FSDP] = (
        said[0] if said and (said[0] != WORKS or ended is None) else f"{FAILS}: {ended}"
    )
    if row.found[FSDP].startswith(REFUSED) and len(found) < RANKS:
        row.found[FSDP] = f"{FAILS}: one rank refuses ({said[0]}), and another does not"
    return row


def read(path: Path) -> dict[str, Any]:
    """Return a file's results: ``versions``, and ``rows`` as `Row`."""
    values = json.loads(path.read_text())
    return values | {"rows": [Row(**row) for row in values["rows"]]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="model types, e.g. llama")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results there")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a family")
    parser.add_argument("--page", nargs="+", type=Path, metavar="FILE", help="print the page")
    options = parser.parse_args(arguments)
    if options.page:
        print(page([read(path) for path in options.page], COMMANDS), end="")
        return 0
    versions = {
        "oprd": oprd_kernels.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = read(options.json)["rows"]
    kinds = options.only or families()
    rows = [row for row in rows if row.kind not in (options.only or ())]
    for kind in kinds:
        if kind in {row.kind for row in rows}:
            continue
        row = sweep(kind, options.limit)
        rows.append(row)
        print(f"{kind}: {row.cls or f'not built: {row.not_built}'}", flush=True)
        for column, text in row.found.items():
            print(f"    {column:16} {text}", flush=True)
        if options.json:
            rows.sort(key=lambda row: row.kind)
            values = {"versions": versions, "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(values, indent=1))
    bugs = [bug for row in rows for bug in row.bugs]
    print("\n".join(["", f"{len(bugs)} bugs", *bugs]))
    return int(bool(bugs))


if __name__ == "__main__":
    sys.exit(main())
