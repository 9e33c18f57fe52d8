"""Files of an evaluation: settings, samples and results.

While a model is sampled, each process appends to a file of its own in ``MODEL/parts``, so that an
evaluation that was killed goes on where it stopped. In the end the samples are sorted into
``MODEL/samples.jsonl``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oprd.atomic_files import write_json, write_whole
from oprd.errors import ConfigError
from oprd.evaluation.evaluate import Sample
from oprd.evaluation.subjects import folder

logger = logging.getLogger(__name__)

SETTINGS, RESULTS, SAMPLES, PARTS = "settings.json", "results.json", "samples.jsonl", "parts"

Key = tuple[str, int, int]
"""Set, problem, sample."""


class Store:
    """The directory of an evaluation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def settings(self) -> dict[str, Any] | None:
        """Return the settings that were written; None in a new directory.

        Raises:
            ConfigError: if the file is not ours, or if the directory holds something else.
        """
        file = self.directory / SETTINGS
        if self.directory.exists() and not self.directory.is_dir():
            raise ConfigError(f"output_dir {self.directory} is a file: choose a new directory")
        if not file.exists():
            if self.directory.is_dir() and any(self.directory.iterdir()):
                raise ConfigError(
                    f"output_dir {self.directory} holds files, but no evaluation (no {SETTINGS}): "
                    "choose a new directory"
                )
            return None
        try:
            settings = json.loads(file.read_text())
            if not isinstance(settings["models"], dict):
                raise TypeError("no models")
            return settings
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is not of an evaluation: {error}") from error

    def check(self, settings: Mapping[str, Any]) -> None:
        """Check that samples made with these settings can be added to those in the directory.

        Raises:
            ConfigError: if settings differ. The message lists them. Models and sets may be added.
        """
        old = self.settings()
        if old is None:
            return
        there, here = _flat(old), _flat(settings)
        differing = [
            f"{name}: {there[name]!r} there, {here[name]!r} here"
            for name in there
            if name in here and there[name] != here[name]
        ]
        if differing:
            raise ConfigError(
                f"output_dir {self.directory} holds an evaluation with other settings: "
                f"{'; '.join(differing)}. Use its settings, or choose a new directory"
            )

    def write_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Add settings to those in the directory, and return all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        merged = _merged(self.settings() or {}, settings)
        write_json(self.directory / SETTINGS, merged)
        return merged

    def model(self, label: str) -> Path:
        """Return a model's directory."""
        return self.directory / folder(label)

    def read(self, label: str) -> dict[Key, Sample]:
        """Return a model's samples. Lines that were cut off while they were written are left out.

        Raises:
            ConfigError: if the sorted file, which is written at once, has been damaged.
        """
        whole = self.model(label) / SAMPLES
        samples = _read(whole) if whole.exists() else {}
        if samples is None:
            raise ConfigError(f"{whole} is damaged: remove it to sample again")
        for part in sorted((self.model(label) / PARTS).glob("*.jsonl")):
            samples = (_read(part, torn=True) or {}) | samples
        return samples

    def part(self, label: str, rank: int) -> Part:
        """Open a new file for a process's samples."""
        directory = self.model(label) / PARTS
        directory.mkdir(parents=True, exist_ok=True)
        number = 0
        while (file := directory / f"{number:04d}_rank_{rank}.jsonl").exists():
            number += 1
        return Part(file, label)

    def finish(self, label: str, samples: Mapping[Key, Sample], sets: Iterable[str]) -> None:
        """Write a model's samples in order and remove what they were collected in."""
        order = {name: i for i, name in enumerate(sets)}
        lines = [
            _line(label, key[0], samples[key])
            for key in sorted(samples, key=lambda k: (order.get(k[0], len(order)), *k))
        ]
        directory = self.model(label)
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / SAMPLES, "".join(lines))
        shutil.rmtree(directory / PARTS, ignore_errors=True)


class Part:
    """A file to which one process appends samples."""

    def __init__(self, file: Path, label: str) -> None:
        self.label, self._stream = label, file.open("x")

    def add(self, name: str, samples: Iterable[Sample]) -> None:
        """Append samples of a set, and flush them to the disk."""
        self._stream.writelines(_line(self.label, name, sample) for sample in samples)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _line(label: str, name: str, sample: Sample) -> str:
    return json.dumps({"model": label, "set": name} | sample.as_dict()) + "\n"


def _read(file: Path, torn: bool = False) -> dict[Key, Sample] | None:
    """Return the samples in a file; None if a line can't be read, unless the file may be torn."""
    samples: dict[Key, Sample] = {}
    with file.open("rb") as stream:
        for line in stream:
            try:
                values = json.loads(line)
                values.pop("model")
                sample = Sample(**{k: v for k, v in values.items() if k != "set"})
                samples[values["set"], sample.problem, sample.sample] = sample
            except (ValueError, KeyError, TypeError, AttributeError):
                if not torn:
                    return None
    return samples


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(old)
    for name, value in new.items():
        mine = both.get(name)
        both[name] = (
            _merged(mine, value)
            if isinstance(mine, Mapping) and isinstance(value, Mapping)
            else value
        )
    return both
