"""Launches the Triton kernels on tensors that `oprd_kernels.validate` has accepted.

Any GPU that Triton supports; no host synchronisation, nothing but allocations and launches on the
current stream, so that a call can be captured in a CUDA graph. With TRITON_INTERPRET=1 in the
environment before the first import, tensors on the CPU go through Triton's interpreter, which is
how the kernels are tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oprd_kernels.call import GradCall, LossCall, num_rows
from oprd_kernels.layout import RowsLayout, new_layers, new_outputs

try:
    import triton

    from oprd_kernels.triton_backend import configs, identity, projected, reduction

    INTERPRETED = triton.knobs.runtime.interpret
    _missing = None
except ImportError as error:  # no wheel for this platform
    INTERPRETED = False
    _missing = str(error)

KIND_CODES = {"mse": 0, "nmse": 1, "cosine": 2}
_REDUCED_ROWS = 4096
"""Rows that one program of the reduction sums."""
_MAX_CHUNKS = 1024


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels can't run on tensors of ``device``; None if they can."""
    if _missing is not None:
        return f"triton can't be imported ({_missing}): pip install triton"
    if INTERPRETED:
        if device.type == "cpu":
            return None
        return f"TRITON_INTERPRET=1 is set, which takes tensors on the CPU, not on {device}"
    if device.type != "cuda":
        return f"the triton backend takes tensors on a GPU, not on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the Ampere generation (sm_80)"
    return None


@functools.cache
def _generation(index: int) -> str:
    """The row of `configs` that fits a device best: consumer Blackwell (sm_120) has the shared
    memory and the tensor-core instructions of the generation before Hopper."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def generation(device: torch.device) -> str:
    """The device generation whose configurations are used."""
    return "sm90" if device.type == "cpu" else _generation(device.index or 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units): as many programs keep the device busy."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device):
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _meta(config: configs.Config) -> dict[str, Any]:
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": False,
    }


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """How a (N, d) or (B, T, d) tensor is addressed: rows per outer index, outer, row and last
    stride, in elements."""
    inner = max(x.shape[-2], 1)
    return (inner, 0 if x.dim() == 2 else x.stride(0), x.stride(-2), x.stride(-1))


_NOWHERE = (1, 0, 0, 1)


def _denominator(
    denominator: Tensor | None, weights: Tensor | None, reduction: str
) -> Tensor | None:
    if reduction == "mean" and denominator is None and weights is not None:
        return weights.sum()
    return denominator


def _forward(call: LossCall, loss: Tensor, saved: Tensor, grad: Tensor | None) -> None:
    student, teacher, *projectors = call[:5]
    rows, teacher_rows, weights, denominator, kind, reduction = call[5:]
    m, rank = call.num_rows, call.rank
    denominator = _denominator(denominator, weights, reduction)
    options = {"KIND": KIND_CODES[kind], "EACH": reduction == "none"}
    with _on(student.device):
        if m and rank == 0:
            mean = {"MEAN": reduction == "mean"}
            arguments = (student, teacher, grad, loss, saved, rows, teacher_rows, weights)
            _launch_identity(arguments, denominator, m, options | mean)
        elif m:
            tensors = (student, teacher, loss, saved, rows, teacher_rows, weights)
            _launch_projected(tensors, projectors, m, rank, options)
        _launch_reduction(loss, saved, weights, denominator, m, reduction)


def _launch_identity(tensors, denominator, m: int, options: dict[str, Any]) -> None:
    student, teacher, grad = tensors[:3]
    width = student.shape[-1]
    config = configs.identity_forward(generation(student.device), width, grad is not None)
    kernel = identity.identity_forward
    if width > config.columns:
        kernel = identity.identity_forward_wide
    kernel[(triton.cdiv(m, config.rows),)](
        *tensors, denominator, m, width, *_rows(student), *_rows(teacher),
        *(_NOWHERE if grad is None else _rows(grad)), **options, R=config.rows, D=config.columns,
        **_meta(config),
    )  # fmt: skip


def _operand(proj: Tensor, x_dtype: torch.dtype) -> Tensor:
    """A projector as the kernels multiply by it: float32 for few ranks of float32 states, else its
    (3, r, d) bfloat16 terms."""
    if proj.shape[0] <= configs.FMA_RANK and x_dtype is torch.float32:
        return proj
    terms = proj.new_empty((3, *proj.shape), dtype=torch.bfloat16)
    grid = (triton.cdiv(proj.numel(), 1024),)
    projected.split_terms[grid](proj, terms, proj.numel(), B=1024, num_warps=4)
    return terms


def _launch_projected(tensors, projectors, m: int, rank: int, options: dict[str, Any]) -> None:
    student, teacher, loss, saved, rows, teacher_rows, weights = tensors
    student_proj, teacher_proj, teacher_mean = projectors
    device = student.device
    arch = generation(device)
    dz_offset = saved.shape[0] - m * rank
    student_proj = _operand(student_proj, student.dtype)
    if teacher_proj is not None:
        teacher_proj = _operand(teacher_proj, teacher.dtype)
    config = configs.projection(arch, rank)
    blocks = triton.cdiv(m, config.rows)
    if rank <= configs.FUSED_RANK and blocks >= processors(device):
        projected.projected_forward[(blocks,)](
            student, teacher, student_proj, teacher_proj, teacher_mean, loss, saved, rows,
            teacher_rows, weights, m, rank, student.shape[-1], teacher.shape[-1], dz_offset,
            *_rows(student), *_rows(teacher), **options, R=config.rows, D=config.columns,
            K=config.ranks, INTERPRETED=INTERPRETED, **_meta(config),
        )  # fmt: skip
        return

    def parts_of(x: Tensor, proj: Tensor, mean: Tensor | None, index: Tensor | None) -> Tensor:
        width = x.shape[-1]
        rank_blocks = triton.cdiv(rank, config.ranks)
        wanted = max(2 * processors(device) // (blocks * rank_blocks), 1)
        part = config.columns * max(triton.cdiv(width, config.columns * wanted), 4)
        parts = triton.cdiv(width, part)
        z = x.new_empty((parts, m, rank), dtype=torch.float32)
        projected.project_part[(blocks, parts, rank_blocks)](
            x, proj, mean, z, index, weights, m, rank, width, part, *_rows(x), R=config.rows,
            D=config.columns, K=config.ranks, INTERPRETED=INTERPRETED, **_meta(config),
        )  # fmt: skip
        return z

    z_s = parts_of(student, student_proj, None, rows)
    z_t = None
    if teacher_proj is not None:
        z_t = parts_of(teacher, teacher_proj, teacher_mean, teacher_rows)
    config = configs.identity_forward(arch, rank, True)
    projected.compare_parts[(triton.cdiv(m, config.rows),)](
        z_s, z_t, z_s.shape[0], 0 if z_t is None else z_t.shape[0], teacher, loss, saved,
        teacher_rows, weights, m, rank, dz_offset, *_rows(teacher), **options, R=config.rows,
        K=config.columns, **_meta(config),
    )  # fmt: skip


def _launch_reduction(loss, saved, weights, denominator, m: int, reduction_name: str) -> None:
    each = reduction_name == "none"
    chunk = max(_REDUCED_ROWS, configs.next_power_of_2(triton.cdiv(m, _MAX_CHUNKS)))
    chunks = max(triton.cdiv(m, chunk), 1)
    partial = saved.new_empty(chunks * 8)
    reduction.sum_chunk[(chunks,)](
        loss, saved, weights, partial, m, chunk, EACH=each, B=1024, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    reduction.finish[(1,)](
        loss, saved, partial, denominator, m, chunks, MEAN=reduction_name == "mean", EACH=each,
        N=_MAX_CHUNKS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _backward(call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
    saved, student, teacher, student_proj, rows, teacher_rows, weights, kind, _ = call
    m, width = num_rows(grad, rows), grad.shape[-1]
    if m == 0:
        return
    stride = grad_loss.stride(0) if grad_loss.dim() else 0
    with _on(grad.device):
        if student_proj is None:
            assert student is not None
            assert teacher is not None
            config = configs.identity_backward(generation(grad.device), width)
            grid = triton.cdiv(m, config.rows), triton.cdiv(width, config.columns)
            identity.identity_backward[grid](
                grad, student, teacher, saved, grad_loss, stride, rows, teacher_rows, weights, m,
                width, *_rows(student), *_rows(teacher), *_rows(grad), KIND=KIND_CODES[kind],
                ACCUMULATE=accumulate, R=config.rows, D=config.columns, **_meta(config),
            )  # fmt: skip
            return
        rank = student_proj.shape[0]
        config = configs.projection_backward(generation(grad.device), rank)
        grid = triton.cdiv(m, config.rows), triton.cdiv(width, config.columns)
        proj = _operand(student_proj, torch.float32)
        projected.projected_backward[grid](
            grad, proj, saved, saved.shape[0] - m * rank, grad_loss, stride, rows, weights, m, rank,
            width, *_rows(grad), ACCUMULATE=accumulate, R=config.rows, D=config.columns,
            K=config.ranks, INTERPRETED=INTERPRETED, **_meta(config),
        )  # fmt: skip


class TritonBackend(RowsLayout):
    """See `oprd_kernels.protocol.Backend`."""

    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        """Why not, on tensors of ``device``."""
        return unavailable(device)

    def unsupported(self, call: LossCall) -> str | None:
        """Nothing is."""
        return None

    def forward(self, call: LossCall, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and ``saved``."""
        loss, saved = new_outputs(call, self.saved_size(call))
        _forward(call, loss, saved, grad)
        return loss, saved

    def backward_(self, call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
        """Whatever the dtype of ``grad``."""
        _backward(call, grad, accumulate, grad_loss)

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """Launches queued layer by layer, nothing waited for."""
        losses, saved = new_layers(calls[0], len(calls), self.saved_size(calls[0]))
        for call, loss, one in zip(calls, losses, saved, strict=True):
            _forward(call, loss, one, None)
        return losses, saved

    def backward_layers_(
        self, calls: Sequence[GradCall], grads: Sequence[Tensor], grad_losses: Tensor
    ) -> None:
        """Launches queued layer by layer."""
        for call, grad, grad_loss in zip(calls, grads, grad_losses, strict=True):
            _backward(call, grad, False, grad_loss)


BACKEND = TritonBackend()
