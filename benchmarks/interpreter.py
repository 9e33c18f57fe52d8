"""Triton's interpreter, watched: every access checked against the tensors of its launch, and the
bytes counted.

Some of its ways are also put right, which a GPU does not share: it narrows float32 to bfloat16 by
cutting off bits instead of rounding to nearest; it multiplies the bits of bfloat16 matrices as if
they were integers; it takes the truth of a scalar comparison for a number; and it copies every
storage onto itself after a launch, which would bring a sparse tensor's untouched pages into memory.

Products of 16-bit matrices are summed as Hopper's tensor cores sum them (`tensor_core`): a kernel
that leaves a long sum to them is as wrong here as there.

Install once, before the first launch, where TRITON_INTERPRET=1 is set: `install`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


@dataclass
class Launch:
    """One launch: bytes loaded and stored per argument that points to the memory.

    Arguments that share memory (a gradient formed over the teacher's) count under the first name.
    ``patched``: modules of device functions that the launch has called.
    """

    kernel: str
    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    regions: list[tuple[int, int, str]] = field(default_factory=list)
    patched: set[str] = field(default_factory=set)

    def region_of(self, low: int, high: int) -> str | None:
        """The argument whose storage holds all of [low, high)."""
        for begin, end, name in self.regions:
            if begin <= low and high <= end:
                return name
        return None


class OutOfBounds(Exception):
    """A kernel touched memory that belongs to none of its arguments."""


_running: list[Launch] = []
_recorded: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside the block, in order."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def install() -> None:
    """Watch every launch of this process from now on."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "watched", False):
        return
    builder.watched = True
    builder.cast_impl = _rounding(builder.cast_impl)
    builder.create_fp_to_fp = _rounding(builder.create_fp_to_fp)
    builder.create_splat = _splat
    builder.create_dot = _dot(builder.create_dot)
    builder.create_masked_load = _checked(builder.create_masked_load, "load")
    builder.create_masked_store = _checked(builder.create_masked_store, "store")
    interpreter.InterpretedFunction.__call__ = _call_device_function
    executor: Any = interpreter.GridExecutor
    executor.__call__ = _launching(executor.__call__)
    restore = executor._restore_args_dev

    def restore_copies(self, args_dev, args_hst, kwargs, kwargs_hst):
        tensors = [a for a in (*args_dev, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if any(not t.is_cpu for t in tensors):
            restore(self, args_dev, args_hst, kwargs, kwargs_hst)

    executor._restore_args_dev = restore_copies


def _rounding(original):
    def cast(self, src, dst_type, *rounding):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            data = np.where(np.isnan(src.data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
            return interpreter.TensorHandle(data, target)
        if source == tl.bfloat16 and target == tl.float32:
            data = (np.ascontiguousarray(src.data).astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(data, target)
        return original(self, src, dst_type, *rounding)

    return cast


def tensor_core(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32 matrices whose values have 16 bits, as Hopper's tensor cores sum it.

    16 products and the accumulator at a time: all are brought to the largest exponent among them
    and cut off two bits below float32's last place there; so is their sum to float32. Modelled on
    what an H200's results were seen to lose; not a statement by its maker.
    """
    acc = c.astype(np.float64)
    with np.errstate(all="ignore"):
        for first in range(0, a.shape[1], 16):
            # Exact: the products of 16-bit numbers have at most 22 bits.
            left = a[:, first : first + 16].astype(np.float64)
            right = b[first : first + 16].astype(np.float64)
            terms = np.concatenate([left[:, :, None] * right[None], acc[:, None]], axis=1)
            _, exponent = np.frexp(np.abs(terms).max(axis=1))
            unit = np.ldexp(1.0, np.clip(exponent - 26, -1000, 1000))
            total = (np.trunc(terms / unit[:, None]) * unit[:, None]).sum(axis=1)
            _, exponent = np.frexp(total)
            unit = np.ldexp(1.0, np.clip(exponent - 24, -1000, 1000))
            acc = np.where(np.isfinite(total), np.trunc(total / unit) * unit, total)
            plain = left @ right  # NaN and infinity as IEEE has them
            acc = np.where(np.isfinite(plain), acc, plain)
    return acc.astype(np.float32)


def _call_device_function(self, *args, **kwargs):
    # As it was, but the language is patched once a launch for each module, not at every call.
    module = self.fn.__module__
    if module not in _running[-1].patched:
        interpreter._patch_lang(self.fn)
        _running[-1].patched.add(module)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


def _splat(self, ret_ty, arg):
    # By the values' own type: a comparison's result is labelled with the type of what it compared.
    data = np.full(ret_ty.shape, arg.data, dtype=arg.data.dtype)
    return interpreter.TensorHandle(data, arg.dtype.scalar)


def _dot(original):
    def dot(self, a, b, c, *rest):
        if a.dtype.scalar not in (tl.bfloat16, tl.float16):
            return original(self, a, b, c, *rest)
        left, right = (_as_float32(x) for x in (a, b))
        return interpreter.TensorHandle(tensor_core(left, right, c.data), c.dtype.scalar)

    return dot


def _as_float32(x) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(x.data).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    return x.data.astype(np.float32)


def _checked(original, what: str):
    def access(self, pointers, *rest):
        mask = rest[1] if what == "store" else rest[0]
        launch = _running[-1]
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if at.size:
            size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            low, high = int(at.min()), int(at.max()) + size
            name = launch.region_of(low, high)
            if name is None:
                raise OutOfBounds(
                    f"{launch.kernel}: {what} of [{low:#x}, {high:#x}) outside "
                    + ", ".join(f"{n} [{b:#x}, {e:#x})" for b, e, n in launch.regions)
                )
            (launch.loaded if what == "load" else launch.stored)[name] += at.size * size
        return original(self, pointers, *rest)

    return access


def _launching(original):
    def call(self, *args, **kwargs):
        launch = Launch(self.fn.__name__)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        for name, value in named.items():
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    begin = storage.data_ptr()
                    launch.regions.append((begin, begin + storage.nbytes(), name))
        _running.append(launch)
        try:
            return original(self, *args, **kwargs)
        finally:
            _running.pop()
            if _recorded is not None:
                _recorded.append(launch)

    return call


def small_blocks() -> None:
    """Give every projection blocks of a few rows: tests then interpret few that are not there. The
    configurations that GPUs get are compiled in tests, not interpreted."""
    from oprd_kernels.backends.triton import configs

    for table in (configs._HALF, configs._FLOAT, configs._RESIDENT):
        for generation in table:
            table[generation] = dict.fromkeys(table[generation], (32, 64, 128, 2))
    for table in (configs._PROJECT, configs._FEW):
        for generation in table:
            table[generation] = (32, 64, 128, 2)
