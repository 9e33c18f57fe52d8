"""Import of bridges from github.com/ShenzhiYang2000/OPRD.

Such a bridge is a file ``ps_bank.pt``, a pickle of plain containers and tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oprd.bridge.bank import Bridge, BridgeInfo
from oprd.errors import ConfigError
from oprd.models.info import ModelInfo

FIELDS = ("rank", "layer_pairs", "state_dict", "frozen_pt_weights", "frozen_pt_means")


def read_ps_bank(path: str | Path) -> Bridge:
    """Read a bank of linear projectors.

    The keys are ``s{i}_t{j}``, or ``{i}_{j}`` in older files, with blocks counted from 0. The file
    is loaded with ``weights_only=True``: a file that holds anything but tensors and plain
    containers is refused, and no code in it is run.

    Raises:
        ConfigError: if the file is refused, if it has an unsupported layout (MLP projectors,
            ``direct``, ``residual``), or if its parts contradict each other.
    """
    bank = _load(Path(path))
    _refuse_other_layouts(bank, path)
    if missing := [name for name in FIELDS if name not in bank]:
        raise ConfigError(
            f"{path} is not a ps_bank.pt: it lacks {', '.join(missing)} (it has "
            f"{', '.join(sorted(map(str, bank)))})"
        )
    pairs = [_pair(p, path) for p in bank["layer_pairs"]]
    if not pairs:
        raise ConfigError(f"{path} has no layer pairs")
    if len({s for s, _ in pairs}) < len(pairs):
        raise ConfigError(f"{path} pairs a student layer twice: {pairs}")
    student_proj: dict[int, Tensor] = {}
    teacher_proj: dict[int, Tensor] = {}
    teacher_mean: dict[int, Tensor] = {}
    for student, teacher in pairs:
        names = (f"s{student}_t{teacher}", f"{student}_{teacher}")
        keys = [f"projectors.{name}.weight" for name in names]
        student_proj[student] = _tensor(bank["state_dict"], keys, "state_dict", path)
        for field, into in (
            ("frozen_pt_weights", teacher_proj),
            ("frozen_pt_means", teacher_mean),
        ):
            into[student] = _tensor(bank[field], names, field, path)
    first = pairs[0][0]
    info = BridgeInfo(
        student=ModelInfo(student_proj[first].shape[-1]),
        teacher=ModelInfo(teacher_proj[first].shape[-1]),
        pairs=pairs,
        rank=int(bank["rank"]),
        solver="import",
    )
    try:
        return Bridge(student_proj, teacher_proj, teacher_mean, info)
    except ConfigError as error:
        raise ConfigError(f"{path} contradicts itself: {error}") from error


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no file at {path}")
    try:
        bank = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} is refused: it holds more than tensors and plain containers, or is not a "
            f"torch file. Loading it could run code ({reason})"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as a torch file: {error}") from error
    if not isinstance(bank, Mapping):
        raise ConfigError(f"{path} holds a {type(bank).__name__}, expected a ps_bank.pt's dict")
    return bank


def _refuse_other_layouts(bank: Mapping[str, Any], path: str | Path) -> None:
    mode = bank.get("subspace_mode")
    if mode == "direct" or "pt_state_dict" in bank:
        raise ConfigError(
            f"{path} is a bank of subspace_mode direct (direct_bank.pt), which is not supported: "
            "its teacher projector is trained and has no mean. Fit a bridge with oprd-bridge fit"
        )
    if mode == "residual" or Path(path).name == "ps_tail_bank.pt":
        raise ConfigError(
            f"{path} is a bank of subspace_mode residual (ps_tail_bank.pt), which is not "
            "supported: it needs its head bank. Fit a bridge with oprd-bridge fit"
        )
    kind = bank.get("projector_type", "linear")
    layers = [k for k in bank.get("state_dict", {}) if not str(k).endswith(".weight")]
    deep = [k for k in bank.get("state_dict", {}) if str(k).endswith((".0.weight", ".2.weight"))]
    if kind != "linear" or deep or layers:
        what = (
            f"projector_type {kind!r}" if kind != "linear" else f"projectors with {deep + layers}"
        )
        raise ConfigError(
            f"{path} has {what}: only linear student projectors without bias are supported (MLP "
            "projectors are not). Fit a bridge with oprd-bridge fit"
        )


def _pair(pair: Any, path: str | Path) -> tuple[int, int]:
    try:
        return int(pair["student_layer"]), int(pair["teacher_layer"])
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: a layer pair is {{student_layer, teacher_layer}}, got {pair!r}"
        ) from error


def _tensor(
    tensors: Any, names: tuple[str, ...] | list[str], field: str, path: str | Path
) -> Tensor:
    for name in names:
        if isinstance(tensors, Mapping) and isinstance(tensors.get(name), Tensor):
            return tensors[name].detach().to(torch.float32).contiguous()
    raise ConfigError(f"{path}: {field} has neither {' nor '.join(names)}")
