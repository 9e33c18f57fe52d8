"""Fitted bridges: frozen projectors for every pair of layers, stored in one safetensors file.

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
from oprd.output_paths import check_writable

METADATA_KEY = "oprd_bridge"
FORMAT = 1
Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class RankReport:
    """The quality of a bridge at one rank. Each list has one value for every pair of layers.

    Attributes:
        rank: r.
        cosine_before: mean cosine on held-out rows with a random P_S.
        cosine_after: mean cosine on held-out rows with the fitted P_S.
        explained_variance: share of the teacher's variance that P_T keeps.
        student_r2: share of the variance kept by P_T that P_S h_S explains, on the rows fitted.
    """

    rank: int
    cosine_before: list[float]
    cosine_after: list[float]
    explained_variance: list[float]
    student_r2: list[float]


@dataclass(frozen=True)
class BridgeInfo:
    """The description of a bridge: everything but its matrices.

    Attributes:
        student, teacher: the models that the bridge was fitted for.
        pairs: (student block, teacher block), counted from 0.
        rank: r.
        solver: ``ridge``, ``sgd`` or ``import``.
        ridge: strength of the penalty, for ``ridge``.
        rows, held_out_rows: number of hidden states used for fitting and for evaluation.
        positions, k, shift: the hidden states that were selected, see
            `oprd.data.supervision.supervise`.
        teacher_input: the teacher's input. ``shared_ids``: the student's token ids, where both
            models share a vocabulary; ``text``: the responses' text in the teacher's own tokens;
            ``student_ids``: the student's token ids, which mean something else to the teacher;
            ``unknown``: for imported bridges.
        teacher_pairs: if ``teacher_input`` is ``text``, the teacher states that were paired, as in
            `oprd.config.TeacherConfig.pairs`. None: not known (older files do not record it).
        ranks: reports for ranks 1, 2, 4, .. and for the fitted rank.
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
        """Check that this bridge was fitted for these models and layers.

        Args:
            student, teacher: the models of the run. Fields that are None here or in the bridge are
                not compared.
            pairs: (student block, teacher block) that training uses, from Eq. 11.

        Raises:
            ConfigError: if anything differs. The message names every mismatch.
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
        """Check that the teacher reads the same kind of input in training as in the fit.

        Args:
            reads: the input in training, one of the values of `teacher_input`.

        Raises:
            ConfigError: if the inputs differ.
        """
        if self.teacher_input not in ("unknown", reads):
            raise ConfigError(
                f"the bridge was fitted with a teacher that read {self.teacher_input!r}, and this "
                f"run's reads {reads!r}. Set teacher.reads to the value used in the fit, or fit "
                "the bridge again"
            )

    def check_rank(self, rank: int | None) -> int:
        """Return ``rank``, or the bridge's rank r for None.

        Raises:
            ConfigError: if ``rank`` is not in 1 .. r.
        """
        rank = self.rank if rank is None else rank
        if not 1 <= rank <= self.rank:
            raise ConfigError(
                f"rank {rank} is not available in a bridge of rank {self.rank}: choose 1 .. "
                f"{self.rank}, or fit a bridge with oprd-bridge fit --rank {rank}"
            )
        return rank

    def at_rank(self, rank: int | None) -> BridgeInfo:
        """Return the description of the bridge's first ``rank`` directions (None: all)."""
        rank = self.check_rank(rank)
        return replace(self, rank=rank, ranks=[r for r in self.ranks if r.rank <= rank])

    def to_json(self) -> str:
        """Return this description as JSON, which `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_json(text: str) -> BridgeInfo:
        """Read a description that `to_json` wrote.

        Raises:
            ConfigError: if it is in the format of another version of oprd.
        """
        values: dict[str, Any] = json.loads(text)
        if (version := values.pop("format", None)) != FORMAT:
            raise ConfigError(
                f"the bridge is in format {version}, this version of oprd reads {FORMAT}: update "
                "oprd, or fit the bridge again"
            )
        values["student"] = ModelInfo(**values["student"])
        values["teacher"] = ModelInfo(**values["teacher"])
        values["pairs"] = [(s, t) for s, t in values["pairs"]]
        values["ranks"] = [RankReport(**report) for report in values["ranks"]]
        return BridgeInfo(**values)


@dataclass(frozen=True)
class Bridge:
    """Frozen float32 projectors: z_S = P_S h_S, z_T = P_T (h_T - mu_T).

    Attributes:
        student_proj: P_S (r, dS), by student block.
        teacher_proj: P_T (r, dT), by student block.
        teacher_mean: mu_T (dT,), by student block.
        info: the description of the bridge.
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
                    f"{name} exists for student blocks {sorted(tensors)}, but the layer pairs name "
                    f"{sorted(blocks)}"
                )
            for block, tensor in tensors.items():
                if tuple(tensor.shape) != shape:
                    raise ConfigError(
                        f"{name} of student block {block} must be {shape}, got "
                        f"{tuple(tensor.shape)}"
                    )

    def at_rank(self, rank: int | None) -> Bridge:
        """Return the bridge of the first ``rank`` directions (None: all), a slice of this one."""
        info = self.info.at_rank(rank)
        return Bridge(
            {block: p[: info.rank].contiguous() for block, p in self.student_proj.items()},
            {block: p[: info.rank].contiguous() for block, p in self.teacher_proj.items()},
            self.teacher_mean,
            info,
        )


def check_new_file(path: str | Path) -> None:
    """Check that a new file can be written at ``path``.

    Raises:
        ConfigError: if ``path`` exists or its directory isn't writable.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} exists and would be lost: choose another file")
    check_writable(path)


def save_bridge(bridge: Bridge, path: str | Path) -> None:
    """Write a bridge to ``path``. A failure leaves no partial file there.

    Raises:
        ConfigError: if ``path`` exists or can't be written.
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
        check_new_file(path)  # another process may have created the file in the meantime
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_info(path: str | Path) -> BridgeInfo:
    """Read the description of a bridge, without its matrices.

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
            f"{path} is not a safetensors file ({error}). To convert a ps_bank.pt of "
            "github.com/ShenzhiYang2000/OPRD, use oprd-bridge import"
        ) from error
    if METADATA_KEY not in metadata:
        raise ConfigError(f"{path} is a safetensors file, but not one that oprd-bridge wrote")
    return BridgeInfo.from_json(metadata[METADATA_KEY])


def load_bridge(path: str | Path, rank: int | None = None) -> Bridge:
    """Read a bridge.

    Args:
        path: the file.
        rank: number of directions to keep, the first ones; None: all.

    Raises:
        ConfigError: if there is no bridge at ``path``, or if its rank is smaller than ``rank``.
    """
    info = read_info(path)
    info.check_rank(rank)
    tensors: dict[str, dict[int, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            name, block = key.rsplit(".", 1)
            tensors.setdefault(name, {})[int(block)] = file.get_tensor(key)
    student_proj, teacher_proj, teacher_mean = (
        tensors.get(name, {}) for name in ("student_proj", "teacher_proj", "teacher_mean")
    )
    return Bridge(student_proj, teacher_proj, teacher_mean, info).at_rank(rank)
