"""The rows of JSONL, JSON and parquet files, and of hub data sets."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import fsspec
from datasets import Dataset, load_dataset

from oprd import hub
from oprd.config import PromptsConfig
from oprd.data import reasoning_gym
from oprd.errors import ConfigError, Unreachable, is_unreachable, need_package
from oprd.models.loading import demo_path

Rows: TypeAlias = "Dataset | list[dict[str, Any]]"
FILE_FORMATS = (".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")


def load_rows(
    cfg: PromptsConfig, for_evaluation: bool = False
) -> tuple[Rows, Callable[[int], str]]:
    """Load the rows of a file, of several (a directory, or a pattern), or of a hub data set.

    Args:
        for_evaluation: of a task of reasoning-gym, which questions.

    Returns:
        The rows, and a function that maps the index of a row to its file and line.

    Raises:
        ConfigError: if the file is missing or empty, or if a line isn't JSON (with its number).
    """
    if reasoning_gym.is_task(cfg.path):
        return _questions(cfg, for_evaluation), lambda i: f"{cfg.path}, question {i}"
    path = demo_path(cfg.path)
    suffix = _suffix(Path(path))
    places: list[str] | None = None
    rows: Rows
    if Path(path).is_dir():
        rows, places = _load_files(f"{glob.escape(path)}/*")
    elif suffix in FILE_FORMATS or any(c in path for c in "*?["):
        rows, places = _load_files(path)
    elif Path(path).exists():
        raise ConfigError(
            f"{path} is neither a hub data set nor a file ending in {', '.join(FILE_FORMATS)}"
        )
    else:
        rows = _load_from_hub(path, cfg)
    if cfg.limit is not None:
        number = min(cfg.limit, len(rows))
        rows = rows.select(range(number)) if isinstance(rows, Dataset) else rows[:number]
    if len(rows) == 0:
        raise ConfigError(f"{path} holds no prompts")
    return rows, lambda i: places[i] if places else f"{path}, row {i}"


def _load_from_hub(path: str, cfg: PromptsConfig) -> Dataset:
    options: dict[str, Any] = {"split": cfg.split, "revision": cfg.revision}
    hub.leave_out_if_unreachable()
    try:
        if not cfg.streaming:
            return load_dataset(path, cfg.subset, **options)
        stream = load_dataset(path, cfg.subset, **options, streaming=True)
        return Dataset.from_list(list(stream.take(cfg.limit)))
    except Exception as error:
        kind, why = ConfigError, str(_root(error))
        if is_unreachable(error):
            kind, why = Unreachable, f"it is not in the cache, and {hub.why_unreachable()}"
        given = {"subset": cfg.subset, **options}
        where = ", ".join(f"{name} {value!r}" for name, value in given.items() if value is not None)
        hint = f"Local files must end in {', '.join(FILE_FORMATS)}"
        if "onfig name is missing" in str(error):
            hint = "Set subset to one of them"
        raise kind(f"data set {path!r} ({where}) can't be loaded: {why}. {hint}") from error


def _questions(cfg: PromptsConfig, for_evaluation: bool) -> Rows:
    """Return the questions of a task of reasoning-gym."""
    need_package("reasoning_gym", "reasoning-gym", cfg.path)
    try:
        return list(reasoning_gym.questions(cfg.path, for_evaluation, cfg.limit))
    except ValueError as error:
        raise ConfigError(f"{cfg.path}: {error}") from error


def _suffix(file: Path) -> str:
    """Return the suffix that says what a file holds, without that of its compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def _load_files(pattern: str) -> tuple[Rows, list[str]]:
    """Load the rows of a file, or of all files that match a pattern, in the order of their names.

    Returns:
        The rows, and the file and line of each.
    """
    files = [Path(pattern)]
    if not files[0].is_file() and any(c in pattern for c in "*?["):
        files = [Path(f) for f in sorted(glob.glob(pattern)) if _suffix(Path(f)) in FILE_FORMATS]
    if not files or not files[0].is_file():
        raise ConfigError(
            f"prompt file {pattern} does not exist"
            if len(files) == 1
            else f"{pattern} matches no file ending in {', '.join(FILE_FORMATS)}"
        )
    sets, places = [], []
    for file in files:
        rows, where = _load_file(file)
        sets.append(rows)
        places += where
    if len(sets) == 1:
        return sets[0], places
    return [row for rows in sets for row in rows], places


def _load_file(file: Path) -> tuple[Rows, list[str]]:
    if _suffix(file) == ".parquet":
        try:
            rows = load_dataset("parquet", data_files=str(file), split="train")
        except Exception as error:
            raise ConfigError(f"{file} can't be read as parquet: {_root(error)}") from error
        return rows, [f"{file}, row {i}" for i in range(len(rows))]
    # Not by `datasets`, whose reader wants one type in each field, and ends the process on some
    # files that are not JSON.
    try:
        with _open(file) as lines:
            text = list(_decoded(lines, file))
    except ConfigError:
        raise
    except Exception as error:  # a decompressor's own
        raise ConfigError(f"{file} can't be read: {error}") from error
    if _suffix(file) == ".json" and "".join(text).lstrip().startswith("["):
        return _array("".join(text), file)
    found = [(number, line) for number, line in enumerate(text, start=1) if line.strip()]
    if not found:
        raise ConfigError(f"prompt file {file} is empty")
    return [_row(line, f"{file}:{n}") for n, line in found], [f"{file}:{n}" for n, _ in found]


def _row(line: str, where: str) -> dict[str, Any]:
    """Parse a line. Raise if it isn't a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {line.strip()[:80]}")
    return row


def _array(text: str, file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Parse a file that is one JSON array of objects."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error})") from error
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, row {i}: expected a JSON object, got {str(row)[:80]}")
    return rows, [f"{file}, row {i}" for i in range(len(rows))]


def _root(error: BaseException) -> BaseException:
    """Return the innermost cause: `datasets` wraps it in errors that say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if file.suffix == ".zst":
        return fsspec.open(str(file), "rb", compression="zstd").open()
    return file.open("rb")


def _decoded(lines: Iterable[bytes], file: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}:{number}: not UTF-8 ({error}): convert the file") from error
