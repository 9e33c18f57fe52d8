"""Records where a computation would make the host wait for a GPU, also where there is none."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oprd_kernels import validate

WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::bincount", "aten::equal", "aten::repeat_interleave",
}  # fmt: skip
"""Operations whose result, or its size, the host must know. `item`, `float`, `if tensor` and the
like come down to the first."""
BY_MASK = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class _Recorder(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        by_mask = name in BY_MASK and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITING or by_mask:
            self.found.append(_place(name))
        return function(*args, **(kwargs or {}))


def _place(what: str) -> str:
    """``what`` and the file of the innermost frame that is not torch's own or of this module."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
    frame = next(f for f in reversed(frames) if f.filename != __file__)
    return f"{what} in {Path(frame.filename).name}:{frame.lineno}"


@contextmanager
def host_waits():
    """Yield a list that receives one line for each time that the host would wait."""
    found: list[str] = []
    patch = pytest.MonkeyPatch()
    # Row numbers on a GPU are not read.
    patch.setattr(validate, "check_row_values", lambda *_args, **_kwargs: None)
    for name in ("tolist", "numpy", "cpu"):  # which do not come through the dispatcher on a CPU
        own = getattr(Tensor, name)

        def recorded(self, *args, own=own, name=name, **kwargs):
            found.append(_place(name))
            return own(self, *args, **kwargs)

        patch.setattr(Tensor, name, recorded)
    try:
        with _Recorder(found):
            yield found
    finally:
        patch.undo()
