"""Compiles the Triton kernels for sm_90 with every option that changes their code.

Run by test_triton_static.py in a process that does not interpret; prints how many it compiled.
"""

from __future__ import annotations

import itertools

import torch

from benchmarks.gpu_triton import compile_only
from oprd_kernels.backends.triton import BACKEND as TRITON
from oprd_kernels.call import GradCall, LossCall

M, D = 64, 96
NONE = (None, None, None)


def call(student, teacher, projectors=NONE, indices=(None, None), weights=None,
         denominator=None, kind="nmse", reduction="mean", inplace=False) -> None:  # fmt: skip
    """Forward, and backward into a new gradient and into one that flows."""
    forward = LossCall(
        student, teacher, *projectors, *indices, weights, denominator, kind, reduction
    )
    loss, saved = TRITON.forward(forward, grad=teacher if inplace else None)
    wide = (student, teacher) if projectors[0] is None else (None, None)
    for accumulate in () if inplace else (False, True):
        grad = torch.zeros_like(student)
        backward = GradCall(saved, *wide, projectors[0], *indices, weights, kind, reduction)
        TRITON.backward_(backward, grad, accumulate, torch.ones_like(loss))


def main() -> None:
    """Every kind and reduction, with and without weights and row indices; then the odd ones."""
    student, teacher = torch.zeros(2 * M, D, dtype=torch.bfloat16), torch.zeros(2 * M, D)
    rows = torch.arange(M)
    few, many = (torch.zeros(r, D) for r in (8, 64))
    with compile_only("sm90") as kernels:
        for kind, reduction in itertools.product(
            ("mse", "nmse", "cosine"), ("mean", "sum", "none")
        ):
            for picked, weighted in ((False, True), (True, False)):
                indices = (rows, rows) if picked else (None, None)
                weights = torch.ones(2 * M) if weighted else None
                for projectors in (NONE, (few, few, None), (many, many, torch.zeros(D))):
                    call(student, teacher, projectors, indices, weights, None, kind, reduction)
        call(student.float(), teacher, inplace=True)
        call(torch.zeros(M, 2 * D)[:, ::2], torch.zeros(2, M // 2, D))
        call(student, torch.zeros(2 * M, 8), (few, None, None))
        one = torch.zeros(1, 1)
        call(one, one.clone(), denominator=torch.ones(()))
        call(one, one.clone(), (one, one, torch.zeros(1)))
        call(torch.zeros(0, 8), torch.zeros(0, 8))
    print(len(kernels))


if __name__ == "__main__":
    main()
