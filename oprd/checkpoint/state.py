"""Conversion of model and optimizer to named tensors, plain or sharded, and back.

`torch.distributed.checkpoint.state_dict` is not used: its optimizer helpers take a step of their
own to create state for parameters that have none (an untied LM head gets no gradient from OPRD).
The optimizer's hyperparameters are not saved, since they come from the configuration.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from oprd.errors import ConfigError

MODEL, OPTIMIZER, RNG, ROLLOUTS = "model/", "optimizer/", "rng/", "rollouts/"
Tensors = dict[str, Tensor]


def model_tensors(model: nn.Module) -> Tensors:
    """Return what training changes: trainable parameters (tied ones once) and buffers."""
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict(keep_vars=True)
    tensors |= {n: t for n, t in state.items() if n not in parameters}
    return {MODEL + name: tensor.detach() for name, tensor in tensors.items()}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """Return the optimizer's state by parameter; parameters without state are omitted."""
    return {
        f"{OPTIMIZER}{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def num_bytes(tensors: Tensors) -> int:
    """Return the bytes of the tensors, summed over all shards."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors.values())


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Return name, shape and dtype of every tensor in a checkpoint.

    ``.metadata`` is a pickle: don't load checkpoints from a source that you don't trust.
    """
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: m for name, m in stored.items() if isinstance(m, TensorStorageMetadata)}


def read_tensors(path: Path, into: Tensors, group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors, however sharded, from a checkpoint; collective over ``group``, if given."""
    quiet_dcp()
    state: dict[str, Any] = dict(into)
    reader = dcp.FileSystemReader(path)
    dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)


def packed(value: Any) -> Tensor:
    """Return a JSON value as a uint8 tensor."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def unpacked(tensor: Tensor) -> Any:
    """Return the JSON value in a tensor of `packed`."""
    return json.loads(tensor.numpy().tobytes())


def load_packed(path: Path, prefix: str, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Load the values of all ranks, in order, that `packed` has stored as ``prefix`` and rank.

    Collective over ``group``, if given.
    """
    found = {n: m.size for n, m in stored_tensors(path).items() if n.startswith(prefix)}
    if not found:
        return []
    names = sorted(found, key=lambda name: int(name.removeprefix(prefix)))
    tensors = {name: torch.empty(found[name], dtype=torch.uint8) for name in names}
    read_tensors(path, tensors, group)
    return [unpacked(tensors[name]) for name in names]


def quiet_dcp() -> None:
    """Silence torch's warning about a single process, which it repeats on every call."""
    warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single")


def load(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Tensor | None:
    """Load a checkpoint into an existing model and optimizer, keeping their sharding.

    Returns:
        The random state of ``rank``; None if the checkpoint has none for this rank.

    Raises:
        ConfigError: if the checkpoint is of another model.
    """
    stored = stored_tensors(path)
    wanted = model_tensors(model)
    _check_same(path, wanted, {n: m for n, m in stored.items() if n.startswith(MODEL)})
    state: dict[str, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    for full, entry in stored.items() if optimizer is not None else ():
        if full.startswith(OPTIMIZER):
            name, key = full.removeprefix(OPTIMIZER).rsplit("/", 1)
            state.setdefault(name, {})[key] = wanted[full] = _like(entry, parameters[name])
    own = f"{RNG}{rank}"
    if own in stored:
        wanted[own] = torch.empty(stored[own].size, dtype=torch.uint8)
    read_tensors(path, wanted, group)
    if optimizer is not None:
        _set_state(optimizer, {parameters[name]: entry for name, entry in state.items()})
    return wanted.get(own)


def _like(stored: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    """Allocate an entry of the optimizer's state, sharded like its parameter if shapes agree."""
    if stored.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
    return torch.zeros(stored.size, dtype=stored.properties.dtype)


def _set_state(optimizer: Optimizer, state: dict[Tensor, dict[str, Tensor]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {i: state[p] for i, p in enumerate(parameters) if p in state}
    # load_state_dict moves each entry to the device that it belongs on.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _check_same(path: Path, wanted: Tensors, stored: dict[str, TensorStorageMetadata]) -> None:
    differing = sorted(wanted.keys() ^ stored.keys())
    both = sorted(wanted.keys() & stored.keys())
    differing += [n for n in both if wanted[n].shape != stored[n].size]
    if differing:
        name = differing[0]
        ours, theirs = wanted.get(name), stored.get(name)
        raise ConfigError(
            f"the checkpoint {path} is of another model than student.path: {len(differing)} tensors"
            f" differ, e.g. {name.removeprefix(MODEL)}: here "
            f"{None if ours is None else tuple(ours.shape)}, there "
            f"{None if theirs is None else tuple(theirs.size)}"
        )
