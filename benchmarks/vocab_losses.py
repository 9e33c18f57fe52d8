"""Times the output-space losses from states to gradients, each way in turns, and their memory.

    python -m benchmarks.vocab_losses OUT.json [--rows 16384 --width 1536 --vocab 151936]

Ways: ``oprd``, in chunks (`oprd.distill.chunked`); ``materialised``, as most trainers; on a GPU
``liger``, its fused linear JSD at beta = 1 and 0, which are the two KL divergences. Its weight
gradient is summed in float32, as ours is. The floor is the four products with the heads at the rate
of a large matrix product.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.measure import gemm_flops, measure
from benchmarks.regimes import DTYPES, Case, device, states
from oprd.distill.chunked import chunk_rows, chunked
from oprd.distill.vocab_losses import VocabLoss, materialised
from oprd.models.lm_head import HeadRows, LMHead
from oprd.observability.tables import TextTable, show

FORMS = ("top1", "topk_advantage", "topk", "full", "full_forward")
LIGER = {"full": 1.0, "full_forward": 0.0}
"""Liger's beta, by form."""
LARGEST_LOGITS = 1.2e10
"""Bytes of a model's whole logits in float32 up to which they are made; the loss needs about eight
such tensors."""


def make_case(form: str, m: int, d: int, vocab: int, dtype: str) -> Case:
    """Make one form's ways: calls that return the gradients of states and head."""
    student, teacher = (states(m, d, dtype, seed).requires_grad_(seed == 0) for seed in (0, 1))
    weight, theirs = (0.02 * states(vocab, d, dtype, seed) for seed in (2, 3))
    weight.requires_grad_()
    tokens = torch.randint(vocab, (m,), device=device())
    loss, wanted = VocabLoss(form, k=16), (student, weight)  # type: ignore[arg-type]

    def ours() -> Any:
        head, rows = LMHead(weight), HeadRows(LMHead(theirs), teacher)
        value = chunked(loss, student, head, rows, tokens, None, float(m))
        return torch.autograd.grad(value, wanted)

    def whole() -> Any:
        every = torch.arange(m, device=device())
        logits, others = (student @ weight.T)[None], (teacher @ theirs.T)[None]
        value = materialised(loss, logits, others, every, tokens, None, float(m))
        return torch.autograd.grad(value, wanted)

    ways: dict[str, Callable[[], object]] = {"oprd": ours}
    if m * vocab * 4 <= LARGEST_LOGITS:
        ways["materialised"] = whole
    if form in LIGER and device().type == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(LIGER[form], accum_dtype=torch.float32)
        ways["liger"] = lambda: torch.autograd.grad(
            fused(student, weight, teacher, theirs, None), wanted
        )
    size = m * d * DTYPES[dtype].itemsize
    return Case(f"opd {form}", m, d, dtype, 0, 8 * m * vocab * d, size, ways)


def difference(case: Case) -> dict[str, float]:
    """Return the relative difference of each way's gradients from ours, the larger of both."""
    expected = [g.double() for g in case.variants["oprd"]()]  # type: ignore[attr-defined]
    found = {}
    for name, call in case.variants.items():
        if name != "oprd":
            pairs = zip(call(), expected, strict=True)  # type: ignore[call-overload]
            found[name] = max(((g.double() - e).norm() / e.norm()).item() for g, e in pairs)
    return found


def run(out: Path, m: int, d: int, vocab: int, dtype: str, budget: float) -> None:
    """Measure every form; print the table and write it as JSON."""
    rate, rows, shown = gemm_flops(dtype), [], []
    for form in FORMS:
        case = make_case(form, m, d, vocab, dtype)
        floor = case.floor_flops / rate
        found = measure(case, "warm", budget, min_rounds=3)
        apart = difference(case)
        for name, one in found.items():
            row = {
                "form": form,
                "way": name,
                "seconds": one.median,
                "floor_seconds": floor,
                "extra_bytes": one.extra_bytes,
                "difference": apart.get(name),
            }
            rows.append(row)
            extra = "-" if one.extra_bytes is None else f"{one.extra_bytes / 2**20:,.0f}"
            off = "" if name not in apart else f"{apart[name]:.1e}"
            shown.append(
                [form, name, f"{one.median * 1e3:.1f}", f"{one.median / floor:.2f}", extra, off]
            )
    about = {"rows": m, "width": d, "vocab": vocab, "dtype": dtype, "gemm_flops": rate}
    about["chunk"] = chunk_rows(vocab, device().type == "cuda")
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    heads = ("loss", "way", "ms", "x floor", "extra\nMiB", "from\noprd's")
    title = f"OPD losses: {m} rows, d {d}, V {vocab}, {dtype}"
    show(
        Console(highlight=False),
        [TextTable(title, heads, shown, [f"the floor: four GEMMs at {rate / 1e12:.3g} TFLOP/s"])],
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each loss")
    given = parser.parse_args()
    run(given.out, given.rows, given.width, given.vocab, given.dtype, given.seconds)


if __name__ == "__main__":
    main()
