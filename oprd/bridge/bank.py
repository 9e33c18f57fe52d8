"""A fitted bridge: frozen projectors for every pair of layers, in one safetensors file.

Shapes: dS and dT widths of student and teacher, r rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from oprd.errors import ConfigError
from oprd.models.info import ModelInfo

METADATA_KEY = "oprd_bridge"
FORMAT = 1
Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class RankReport:
    """How well a rank does; each list has a value for every pair of layers.

    Attributes:
        rank: r.
        cosine_before: mean cosine on held-out rows with a random P_S.
        cosine_after: the same with the fitted one.
        explained_variance: share of the teacher's variance that P_T keeps.
        student_r2: share of what P_T keeps that P_S h_S explains, on the rows fitted.
    """

    rank: int
    cosine_before: list[float]
    cosine_after: list[float]
    explained_variance: list[float]
    student_r2: list[float]


@dataclass(frozen=True)
class BridgeInfo:
    """Everything about a bridge but its matrices.

    Attributes:
        student, teacher: what it was fitted for.
        pairs: (student block, teacher block), counted from 0.
        rank: r.
        solver: ``ridge``, ``sgd`` or ``import``.
        ridge: strength of the penalty, for ``ridge``.
        rows, held_out_rows: how many hidden states it was fitted on, and judged by.
        positions, k, shift: which ones, see `oprd.data.supervision.supervise`.
        teacher_input: what the teacher read. ``shared_ids``: the student's token ids, which mean
            the same to it; ``text``: the responses' text in its own tokens; ``student_ids``: ids
            that mean something else to it; ``unknown`` for imported ones.
        teacher_pairs: which of its states were paired, if it read ``text``: as
            `oprd.config.TeacherConfig.pairs`; None: not known (written before this was noted).
        ranks: reports for ranks 1, 2, 4, .. and the fitted one.
    """

    student: ModelInfo
    teacher: ModelInfo
    pairs: list[tuple[int, int]]
    rank: int
    solver: str
    ridge: float | None = None
    rows: int | None = None
    held_out_rows: int | None = None
    positions: str | None = None
    k: int | None = None
    shift: str | None = None
    teacher_input: str = "unknown"
    teacher_pairs: str | None = None
    ranks: list[RankReport] = field(default_factory=list)

    def check(self, student: ModelInfo, teacher: ModelInfo, pairs: Pairs) -> None:
        """Whether this bridge is one for these two models and layers.

        Args:
            student, teacher: as they are; what is None in either is not compared.
            pairs: (student block, teacher block) that training wants, from Eq. 11.

        Raises:
            ConfigError: naming every mismatch.
        """
        problems = []
        for who, ours, theirs in (
            ("student", self.student, student),
            ("teacher", self.teacher, teacher),
        ):
            name = f" ({ours.path})" if ours.path else ""
            if ours.width != theirs.width:
                problems.append(
                    f"it was fitted for a {who} {ours.width} wide{name}, this one is "
                    f"{theirs.width} wide"
                )
            if None not in (ours.layers, theirs.layers) and ours.layers != theirs.layers:
                problems.append(
                    f"it was fitted for a {who} of {ours.layers} layers{name}, this one has "
                    f"{theirs.layers}"
                )
            if None not in (ours.vocabulary, theirs.vocabulary) and (
                ours.vocabulary != theirs.vocabulary
            ):
                problems.append(f"it was fitted for a {who} with another tokenizer{name}")
        if not problems:
            problems = self._check_pairs(pairs)
        if problems:
            raise ConfigError(
                f"the bridge does not fit: {'; '.join(problems)}. Fit one for this pair with "
                "oprd-bridge fit"
            )

    def _check_pairs(self, pairs: Pairs) -> list[str]:
        own = dict(self.pairs)
        missing = [s for s, _ in pairs if s not in own]
        if missing:
            return [
                f"it has no projector for student block(s) {missing}, only for {sorted(own)}: "
                "choose distill.layers among these"
            ]
        other = [(s, own[s], t) for s, t in pairs if own[s] != t]
        return [
            f"it pairs student block {s} with teacher block {mine}, relative depth (Eq. 11) with "
            f"{t}"
            for s, mine, t in other
        ]

    def check_input(self, reads: str) -> None:
        """Whether the teacher read what it will read in training.

        Args:
            reads: as `teacher_input`.

        Raises:
            ConfigError: if not.
        """
        if self.teacher_input not in ("unknown", reads):
            raise ConfigError(
                f"the bridge was fitted with a teacher that read {self.teacher_input!r}, and this "
                f"run's reads {reads!r}: set teacher.reads alike, or fit it again"
            )

    def check_rank(self, rank: int | None) -> int:
        """``rank``, or the fitted one for None.

        Raises:
            ConfigError: if it is not among 1 .. r.
        """
        rank = self.rank if rank is None else rank
        if not 1 <= rank <= self.rank:
            raise ConfigError(
                f"rank {rank} is asked of a bridge of rank {self.rank}: choose 1 .. {self.rank}, "
                f"or fit one with oprd-bridge fit --rank {rank}"
            )
        return rank

    def at_rank(self, rank: int | None) -> BridgeInfo:
        """Of the first ``rank`` directions (None: all)."""
        rank = self.check_rank(rank)
        return replace(self, rank=rank, ranks=[r for r in self.ranks if r.rank <= rank])

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_json(text: str) -> BridgeInfo:
        """What `to_json` wrote.

        Raises:
            ConfigError: if a later version did.
        """
        values: dict[str, Any] = json.loads(text)
        if (version := values.pop("format", None)) != FORMAT:
            raise ConfigError(
                f"the bridge is in format {version}, this version of oprd reads {FORMAT}: update "
                "oprd, or fit it again"
            )
        values["student"] = ModelInfo(**values["student"])
        values["teacher"] = ModelInfo(**values["teacher"])
        values["pairs"] = [(s, t) for s, t in values["pairs"]]
        values["ranks"] = [RankReport(**report) for report in values["ranks"]]
        return BridgeInfo(**values)


@dataclass(frozen=True)
class Bridge:
    """Frozen projectors, by student block, float32: z_S = P_S h_S, z_T = P_T (h_T - mu_T).

    Attributes:
        student_proj: P_S (r, dS).
        teacher_proj: P_T (r, dT).
        teacher_mean: mu_T (dT,).
        info: everything else.
    """

    student_proj: Mapping[int, Tensor]
    teacher_proj: Mapping[int, Tensor]
    teacher_mean: Mapping[int, Tensor]
    info: BridgeInfo

    def __post_init__(self) -> None:
        info = self.info
        shapes = {
            "student_proj": (info.rank, info.student.width),
            "teacher_proj": (info.rank, info.teacher.width),
            "teacher_mean": (info.teacher.width,),
        }
        blocks = [s for s, _ in info.pairs]
        for name, shape in shapes.items():
            tensors = getattr(self, name)
            if sorted(tensors) != sorted(blocks):
                raise ConfigError(
                    f"{name} is there for student blocks {sorted(tensors)}, the layer pairs name "
                    f"{sorted(blocks)}"
                )
            for block, tensor in tensors.items():
                if tuple(tensor.shape) != shape:
                    raise ConfigError(
                        f"{name} of student block {block} must be {shape}, got "
                        f"{tuple(tensor.shape)}"
                    )

    def at_rank(self, rank: int | None) -> Bridge:
        """The bridge of the first ``rank`` directions, a slice of this one (None: this one)."""
        info = self.info.at_rank(rank)
        return Bridge(
            {block: p[: info.rank].contiguous() for block, p in self.student_proj.items()},
            {block: p[: info.rank].contiguous() for block, p in self.teacher_proj.items()},
            self.teacher_mean,
            info,
        )


def check_new_file(path: str | Path) -> None:
    """Refuse a place that is taken or can't be written.

    Raises:
        ConfigError: saying which.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} exists and would be lost: choose another file")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{path} can't be written: {parent} is no directory one may write to")


def save_bridge(bridge: Bridge, path: str | Path) -> None:
    """Write a bridge; the file is whole or not there.

    Raises:
        ConfigError: if ``path`` exists.
    """
    path = Path(path)
    check_new_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{block}": tensor.detach().to("cpu", torch.float32).contiguous()
        for name in ("student_proj", "teacher_proj", "teacher_mean")
        for block, tensor in getattr(bridge, name).items()
    }
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        unfinished.write_bytes(save(tensors, metadata={METADATA_KEY: bridge.info.to_json()}))
        check_new_file(path)  # it may have appeared meanwhile
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_info(path: str | Path) -> BridgeInfo:
    """What a bridge is, without its matrices.

    Raises:
        ConfigError: if there is no bridge at ``path``.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"there is no bridge at {path}: make it with oprd-bridge fit --output {path}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(
            f"{path} is not a safetensors file ({error}). A ps_bank.pt of the public code is "
            "turned into one by oprd-bridge import"
        ) from error
    if METADATA_KEY not in metadata:
        raise ConfigError(f"{path} is a safetensors file, but not one that oprd-bridge wrote")
    return BridgeInfo.from_json(metadata[METADATA_KEY])


def load_bridge(path: str | Path, rank: int | None = None) -> Bridge:
    """Read a bridge.

    Args:
        rank: keep only the first so many directions; None: all.

    Raises:
        ConfigError: if there is none at ``path``, or not of that rank.
    """
    info = read_info(path)
    info.check_rank(rank)
    found: dict[str, dict[int, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            name, block = key.rsplit(".", 1)
            found.setdefault(name, {})[int(block)] = file.get_tensor(key)
    student_proj, teacher_proj, teacher_mean = (
        found.get(name, {}) for name in ("student_proj", "teacher_proj", "teacher_mean")
    )
    return Bridge(student_proj, teacher_proj, teacher_mean, info).at_rank(rank)
