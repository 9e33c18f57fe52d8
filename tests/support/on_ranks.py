"""Trains on fixed rollouts, on as many ranks as torchrun starts; for
`tests/oprd/distributed/test_fsdp.py`.

    torchrun --nproc-per-node 2 -m tests.support.on_ranks DIRECTORY CASE [CASE ..]

Writes each case's weights and metrics, which must not depend on the number of ranks.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from oprd import distributed
from oprd.bridge.bank import save_bridge
from oprd.config import LoraConfig, TrainConfig
from oprd.config.demo import demo_config
from oprd.data.rollout import Rollout, for_teacher
from oprd.models.loading import load_model
from oprd.models.weights import full_weights
from oprd.tokenizers.alignment import Reading
from oprd.training.inputs import RunInputs
from oprd.training.preflight import preflight
from oprd.training.trainer import Trainer
from tests.oprd.distill.test_attach_with_bridge import make_bridge
from tests.oprd.training.test_trainer import small_run
from tests.support.bridges import add_teachers

EVERY_OPD = {
    name: 0.5 + 0.1 * i
    for i, name in enumerate(
        ("opd_top1", "opd_topk", "opd_topk_advantage", "opd_topk_raw", "opd_full",
         "opd_full_forward")
    )
}  # fmt: skip
BF16 = {"fsdp__mode": "always", "fsdp__param_dtype": "bfloat16"}
CASES: dict[str, dict] = {
    "oprd": {},
    "options": {
        "distill__kind": "nmse", "distill__layers": "even", "distill__positions": "last_k",
        "distill__k": 2, "distill__reduction": "seq-mean", "distill__shift": "after",
        "objectives": {"oprd": 100.0},
    },
    "opd_chunked": {"objectives": EVERY_OPD, "opd__k": 3, "opd__chunk_tokens": 3},
    "opd_materialised": {
        "objectives": EVERY_OPD, "opd__k": 3, "opd__implementation": "materialised",
    },
    "composite": {"objectives": {"oprd": 2.0, "opd_top1": 1.0}},
    "bridge": {"distill__kind": "nmse", "objectives": {"oprd": 10.0}},
    "checkpointing": {"student__gradient_checkpointing": True},
    "replicated_teacher": {"fsdp__teacher": "replicated"},
    "overlap": {"fsdp__teacher": "replicated", "overlap": True, "micro_batch_tokens": 26},
    "offloaded": {
        "fsdp__mode": "always", "fsdp__teacher": "offloaded", "fsdp__cpu_offload": True,
    },
    "not_sharded": {"fsdp__mode": "never"},
    "small_batches": {"micro_batch_tokens": 26},
    "packed": {"micro_batch_tokens": 40, "packing": True},
    "self": {
        "teacher__path": "self:current", "data__train__teacher_prompt": "{prompt}{answer}",
        "data__max_teacher_prompt_tokens": 16, "objectives": {"oprd": 1.0, "opd_full": 1.0},
    },
    "compiled": {"student__compile": True},
    "bfloat16": BF16,
    "bfloat16_chunked": BF16 | {"objectives": {"opd_full": 1.0}},
    "lora": {"student__lora": LoraConfig(4)},
    "hybrid": {"fsdp__shard_size": 2},
    "teachers": {"distill__kind": "nmse"},
    "teachers_of_packed_adapter": {
        "distill__kind": "nmse", "student__lora": LoraConfig(4), "packing": True,
    },
}  # fmt: skip
"""By name, what a case changes of `tests.oprd.training.test_trainer.small_run`."""


def rollouts(case: str, step: int, checked: RunInputs) -> list[Rollout]:
    """Of any lengths; in the last step there is one, so that other ranks have nothing (and neither
    has one of two teachers)."""
    rng = random.Random(step)
    made = []
    for i in range(1 if step == 2 else 7):
        prompt = [rng.randint(5, 14) for _ in range(rng.randint(2, 8))]
        response = [rng.randint(5, 14) for _ in range(rng.randint(1, 5))]
        reading = Reading([*prompt, 7, 8, 9], response) if case == "self" else None
        rollout = Rollout(prompt, response, False, reading=reading)
        if case.startswith("teachers"):
            asked = checked.train.prompts[7 * i % 40]
            rollout = replace(rollout, prompt_ids=asked.token_ids)
            rollout = for_teacher(rollout, asked, checked.aligners, ends=[1])
        made.append(rollout)
    return made


def run_case(case: str, directory: Path) -> None:
    changes = dict(CASES[case])
    world = distributed.world_size()
    if world == 1 and case == "hybrid":
        changes.pop("fsdp__shard_size")
    if case == "bridge":
        changes["bridge__path"] = str(directory.parent / "bridge.safetensors")
    cfg: TrainConfig = small_run(directory / case, eval__sets={}, eval__teacher=False, **changes)
    cfg.rollout.prompts_per_step = 12
    if case.startswith("teachers"):
        add_teachers(cfg, directory.parent)
    trainer = Trainer(cfg, preflight(cfg))
    distributed.seed_everything(0)
    trainer._load()
    trainer.log.start()
    # Not AdamW, whose first step is the gradient's sign: rounding flips it.
    trainer.update.optimizer = torch.optim.SGD(trainer.student.parameters(), lr=0.02)
    trainer.update.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.update.optimizer, 1.0)
    metrics = []
    for step in range(3):
        mine = rollouts(case, step, trainer.inputs)[distributed.rank() :: world]
        metrics.append(trainer._update(mine))
        trainer.step += 1
    weights = {name: tensor.clone() for name, tensor in full_weights(trainer.student)}
    trainer.log.close()
    if distributed.rank() == 0:
        torch.save({"weights": weights, "metrics": metrics}, directory / f"{case}.pt")


def write_bridge(file: Path) -> None:
    """A bridge between the demo's models."""
    cfg = demo_config()
    save_bridge(make_bridge(load_model(cfg.student), load_model(cfg.teacher), rank=8), file)


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[2:]:
        run_case(case, directory)
    distributed.shutdown()


if __name__ == "__main__":
    distributed.run_main(main)
