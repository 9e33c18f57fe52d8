"""The models that ``oprd-eval`` evaluates: where they are, and their loading."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oprd.checkpoint import Checkpoint
from oprd.checkpoint.export import choose, load_student, merged
from oprd.checkpoint.resume import CHECKPOINTS, is_run
from oprd.checkpoint.writer import STUDENT
from oprd.config import DType, TeacherConfig
from oprd.errors import ConfigError
from oprd.models.loading import demo_path, load_config, load_model, load_tokenizer
from oprd.models.lora import is_adapted
from oprd.observability.summary import finished

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "tekken.json", "sentencepiece.bpe.model"),
)
WEIGHTS = ("*.safetensors", "*.bin", "*.distcp")
PIECE = 1 << 20


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        label: its name in files and tables.
        path: directory or hub name with its configuration and tokenizer.
        checkpoint: the checkpoint of a run that it is; None: `from_pretrained` loads it.
        run: the directory of the run that it is of; None: of none, or not known.
    """

    label: str
    path: str
    checkpoint: Checkpoint | None = None
    run: Path | None = None

    def config(self) -> PretrainedConfig:
        """Load the model's configuration.

        Raises:
            ConfigError: if it can't be loaded.
        """
        return load_config(self.path)

    def tokenizer(self, other: str | None = None) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer, or ``other``.

        Raises:
            ConfigError: if there is none.
        """
        place = Path(demo_path(self.path))
        missing = place.is_dir() and not any((place / name).exists() for name in TOKENIZER_FILES)
        if other is None and missing:
            raise ConfigError(
                f"{place} has no tokenizer (none of {', '.join(TOKENIZER_FILES[:3])}, ..): put "
                "the model's tokenizer there, or name one with --tokenizer"
            )
        return load_tokenizer(other or self.path)

    def load(
        self, dtype: DType, attn_implementation: str | None, device: torch.device | str
    ) -> PreTrainedModel:
        """Load the model for inference.

        Raises:
            ConfigError: if it can't be loaded.
        """
        if self.checkpoint is None:
            cfg = TeacherConfig(self.path, dtype, attn_implementation)
            return load_model(cfg, device)
        model = load_student(self.checkpoint)
        if is_adapted(model):
            model = merged(model)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model.to(device=device, dtype=getattr(torch, dtype)).eval()

    def identity(self) -> dict[str, Any]:
        """Return what tells whether this is still the same model, as plain values."""
        step = None if self.checkpoint is None else self.checkpoint.step
        place = Path(demo_path(self.path))
        if self.checkpoint is not None:
            place = self.checkpoint.path
        if not place.is_dir():
            revision = getattr(self.config(), "_commit_hash", None)
            return {"path": self.path, "step": step, "weights": revision}
        total = 0
        for file in sorted(f for pattern in WEIGHTS for f in place.rglob(pattern)):
            size = file.stat().st_size
            total = zlib.crc32(f"{file.relative_to(place)} {size}".encode(), total)
            with file.open("rb") as stream:
                total = zlib.crc32(stream.read(PIECE), total)
                stream.seek(max(size - PIECE, 0))
                total = zlib.crc32(stream.read(PIECE), total)
        return {"path": self.path, "step": step, "weights": f"{total:08x}"}


def find_subjects(models: Sequence[str], best: bool) -> list[Subject]:
    """Find the models that are given as ``PATH`` or ``NAME=PATH``.

    Raises:
        ConfigError: if a directory holds no model and no run, or two models have one name.
    """
    subjects = [_find(text, best) for text in models]
    folders = [folder(s.label) for s in subjects]
    if twice := sorted({f for f in folders if folders.count(f) > 1}):
        raise ConfigError(
            f"several models are called {', '.join(twice)}: give them names, as in NAME=PATH"
        )
    return subjects


def folder(label: str) -> str:
    """Return the name of a model's directory."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label).strip(".") or "model"


def _find(text: str, best: bool) -> Subject:
    label, path = "", text
    name, sign, rest = text.partition("=")
    if sign and "/" not in name and not Path(text).exists():
        label, path = name, rest
    if not path:
        raise ConfigError(f"model {text!r}: expected PATH or NAME=PATH")
    place = Path(path)
    label = label or (path if path.startswith("demo:") else place.absolute().name or path)
    if path.startswith("demo:") or not place.exists():
        return Subject(label, path)
    if (place / "config.json").exists() and not best:
        of_run = place.name == STUDENT and is_run(place.absolute().parent)
        return Subject(label, path, run=place.absolute().parent if of_run else None)
    if is_run(place) and not best and finished(place) and (place / STUDENT).is_dir():
        return Subject(label, str(place / STUDENT), run=place)
    if (place / CHECKPOINTS).is_dir() or (place / "checkpoint.json").exists():
        checkpoint = choose(place, best)
        home = checkpoint.path.absolute().parent.parent
        run = home if is_run(home) else None
        return Subject(label, str(checkpoint.path / STUDENT), checkpoint, run)
    what = "best checkpoint (checkpoint.keep_best)" if best else "model"
    raise ConfigError(
        f"{path} holds no {what}: expected a model's directory (config.json), a run's directory "
        "(checkpoints/), or a checkpoint of a run (checkpoint.json)"
    )
