"""Measures what a rank holds in a step of training, beside what is planned; for
`tests/oprd/memory_plan/test_run.py`.

    torchrun --nproc-per-node 2 -m tests.support.plan_on_ranks DIRECTORY CASE [CASE ..]
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd import distributed
from oprd.bridge.bank import save_bridge
from oprd.config import LoraConfig
from oprd.data.rollout import Rollout
from oprd.memory_plan.run import ROLLOUT, STEP, TEACHER, UPDATE, make_training_plan
from oprd.memory_plan.shapes import Shape
from oprd.models.loading import DEMO
from oprd.training.preflight import preflight
from oprd.training.trainer import Trainer
from tests.oprd.benchmark.test_gains import model, tensor_peak
from tests.oprd.distill.test_attach_with_bridge import make_bridge
from tests.oprd.training.test_trainer import small_run

PROMPT, RESPONSE = 16, 240
BLOCKS = {"d": 256, "layers": 4, "heads": 8, "kv_heads": 2, "intermediate": 1024, "vocab": 600}
TABLES = BLOCKS | {"layers": 2, "vocab": 20000}
CASES: dict[str, dict[str, Any]] = {
    "oprd": {},
    "checkpointing": {"student__gradient_checkpointing": True},
    "partly": {"student__gradient_checkpointing": 2},
    "full": {"objectives": {"opd_full": 1.0}, "sizes": TABLES},
    "materialised": {"objectives": {"opd_top1": 1.0}, "opd__implementation": "materialised",
                     "sizes": TABLES, "tied": False},
    "cut": {"distill__layers": [0], "student__gradient_checkpointing": True, "sizes": TABLES},
    "lora": {"student__lora": LoraConfig(8), "teacher__path": "self:base"},
    "bfloat16": {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16"},
    "replicated": {"fsdp__teacher": "replicated"},
    "mixed": {"fsdp__param_dtype": "bfloat16", "student__gradient_checkpointing": True},
    "autocast": {"autocast": "bfloat16"},
    "bridge": {"distill__kind": "nmse"},
    "packed": {"packing": True},
    "eager": {"student__attn_implementation": "eager", "teacher__attn_implementation": "eager"},
}  # fmt: skip


SHARDED = ["oprd", "lora", "replicated", "mixed"]
"""Cases of two ranks: what sharding and its precisions change."""


def cases(ranks: int) -> list[str]:
    """Those of one rank, which has no FSDP, or of two."""
    return SHARDED if ranks > 1 else [c for c in CASES if c not in ("replicated", "mixed")]


def local_bytes(tensors) -> int:
    """Of a rank's parts, each storage once."""
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def unseen(collective):
    """The collective to its end, on a thread the profiler does not follow: gloo's workspace is
    freed by a thread of gloo's, now within the record and now without."""

    @wraps(collective)
    def run(*tensors, async_op=False, **kwargs):
        given = [t for t in (*tensors, *kwargs.values()) if isinstance(t, torch.Tensor)]
        before = [uses(t) for t in given]
        elsewhere.submit(collective, *tensors, **kwargs).result()
        until = time.monotonic() + 60
        while [uses(t) for t in given] != before:
            assert time.monotonic() < until, f"{collective.__name__}: gloo holds its tensors"
            time.sleep(1e-4)

    return run


elsewhere = ThreadPoolExecutor(1)


def uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def held(trainer: Trainer, rollouts: list[Rollout]) -> tuple[int, int]:
    """Bytes that stay between steps, and those of a second step's tensors beside them."""
    trainer._update(rollouts)
    kept = list(trainer.student.parameters())
    kept += [t for s in trainer.update.optimizer.state.values() for t in s.values() if t.dim()]
    distiller = trainer.update.objectives.distiller
    teacher = next(iter(trainer.update.objectives.teachers.values())).model
    kept += list((distiller.teacher.backbone if distiller else teacher).parameters())
    return local_bytes(kept), tensor_peak(lambda: trainer._update(rollouts))


def measure(case: str, directory: Path) -> dict[str, Any]:
    changes = dict(CASES[case])
    sizes, tied = changes.pop("sizes", BLOCKS), changes.pop("tied", True)
    path = directory / f"model-{case}"
    if distributed.rank() == 0:
        model(**sizes, tied=tied).save_pretrained(path)
        AutoTokenizer.from_pretrained(DEMO / "student").save_pretrained(path)
        if case == "bridge":
            loaded = AutoModelForCausalLM.from_pretrained(path)
            save_bridge(make_bridge(loaded, loaded, rank=8), path / "bridge.safetensors")
    distributed.wait_for_all()
    # Two micro-batches a step, so that gradients are there while the second one runs.
    tokens = 4 * (PROMPT + RESPONSE) // distributed.world_size()
    changes = {"student__path": str(path), "teacher__path": str(path)} | changes
    changes["micro_batch_tokens"] = tokens
    if case == "bridge":
        changes["bridge__path"] = str(path / "bridge.safetensors")
    cfg = small_run(directory / case, eval__sets={}, eval__teacher=False, **changes)
    cfg.data.max_prompt_tokens = PROMPT
    if cfg.teacher.is_self:
        cfg.data.train.teacher_prompt = "{prompt}"
    cfg.data.max_teacher_prompt_tokens = PROMPT
    cfg.rollout.prompts_per_step, cfg.rollout.max_new_tokens = 8, RESPONSE
    cfg.rollout.batch_size = 4
    trainer = Trainer(cfg, preflight(cfg))
    trainer._load()
    ids = [3 + i % 10 for i in range(RESPONSE)]
    share = 8 // distributed.world_size()
    numbers = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    mine = [Rollout(ids[:PROMPT], ids[i:], True) for i in numbers]  # no two of one length
    resident, peak = held(trainer, mine)
    sampled = 0
    if case == "oprd":
        sampled = tensor_peak(lambda: trainer._rollouts())
    trainer.log.close()
    shape = Shape.of(trainer.student.config)
    plan = make_training_plan(cfg, shape, {"": shape}, distributed.world_size(), on_gpu=False)
    moments = {phase: plan.moments[phase].total for phase in (UPDATE, TEACHER, STEP)}
    return {
        "resident": resident, "peak": peak, "planned resident": plan.resident,
        "sampled": sampled, "planned to sample": plan.moments[ROLLOUT].total,
        "planned": sum(plan.resident.values()) + max(moments.values()),
        "terms": {p: (m.name, m.terms) for p, m in plan.moments.items()},
    }  # fmt: skip


def main() -> None:
    distributed.init("cpu")
    for name in ("all_gather_single", "reduce_scatter_single"):
        setattr(dist, name, unseen(getattr(dist, name)))
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[2:]:
        found = measure(case, directory)
        if distributed.rank() == 0:
            (directory / f"{case}.json").write_text(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    distributed.run_main(main)
