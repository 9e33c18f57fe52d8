"""Runs verl's actor update with `examples/verl_recipe` on a CPU; one process of a gloo group.

    python verl_update.py OUTPUT CASE [CASE ...]

A case is a JSON object: ``overrides`` of ``oprd_trainer.yaml``; ``v1``, whether batches are those
of verl's present trainer (jagged) or of its older one (padded); and ``masked``, see `rollouts`. For
each case, a new worker of verl learns once from `rollouts`. ``OUTPUT`` gets the metrics and the
weights, before and after.
"""

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA


class NoDevice:
    """What verl asks of torch.cuda, which answers most of it without a GPU, too."""

    def get_device_name(self, *_) -> str:
        return "CPU"

    def mem_get_info(self, *_) -> tuple[int, int]:
        return 0, 0

    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)


class PlatformCPU(PlatformCUDA):
    """verl 0.9.1 has no platform for a CPU alone."""

    device_module = property(lambda self: NoDevice())
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "none")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def synchronize(self, device_index=None) -> None:
        pass


RECIPE = Path(__file__).parents[2] / "examples" / "verl_recipe"
PROMPT, RESPONSE = 3, 5


def rollouts(vocabulary: int, masked: Sequence[int]) -> dict[str, Tensor]:
    """Four rollouts as verl's trainer has them: prompts padded on the left, responses on the right.

    The third response holds two tokens of a tool's result, which the student did not write. Of the
    ``masked`` ones nothing counts, as of those by which verl's trainer fills up a batch.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (4, PROMPT + RESPONSE), generator=generator)
    attention = torch.ones_like(ids)
    for row, (prompt, response) in enumerate([(3, 5), (1, 2), (2, 5), (3, 1)]):
        attention[row, : PROMPT - prompt] = 0
        attention[row, PROMPT + response :] = 0
    written = attention[:, PROMPT:].clone()
    written[2, 1:3] = 0
    written[list(masked)] = 0
    return {
        "input_ids": ids * attention,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "response_mask": written,
        "old_log_probs": torch.full(written.shape, -3.0),
        "advantages": torch.randn(written.shape, generator=generator),
    }


def built(overrides: list[str]):
    """Return verl's worker for a configuration, as its `ActorRolloutRefWorker` builds it."""
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    with initialize_config_dir(str(RECIPE), version_base=None):
        config = compose("oprd_trainer", overrides=overrides).actor_rollout_ref
    actor = omega_conf_to_dataclass(config.actor)
    actor.model_config = omega_conf_to_dataclass(config.model)
    actor.engine.use_dynamic_bsz = config.actor.use_dynamic_bsz
    actor.engine.max_token_len_per_gpu = config.actor.ppo_max_token_len_per_gpu
    actor.engine.micro_batch_size_per_gpu = config.actor.ppo_micro_batch_size_per_gpu
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=actor.model_config,
            engine_config=actor.engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
    )
    worker.reset()
    for module in worker.engine.module.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo can't average
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def jagged(data: dict[str, Tensor]) -> TensorDict:
    """Rollouts as verl's present trainer hands them to its workers."""
    attention = data["attention_mask"].bool()
    prompts, responses = attention[:, :PROMPT], attention[:, PROMPT:]
    masks = dict.fromkeys(("input_ids", "position_ids"), attention) | {"prompts": prompts}
    names = ("responses", "response_mask", "old_log_probs", "advantages")
    masks |= dict.fromkeys(names, responses)
    found = {
        name: torch.nested.as_nested_tensor(
            [row[kept] for row, kept in zip(data[name], mask, strict=True)], layout=torch.jagged
        )
        for name, mask in masks.items()
    }
    found["loss_mask"] = found["response_mask"]
    return TensorDict(found, batch_size=len(attention))


def update(worker, v1: bool, masked: Sequence[int]) -> dict:
    """Have the worker learn from this process's part of `rollouts`, and return what changed."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    def weights() -> dict[str, Tensor]:
        named = worker.engine.module.named_parameters()
        return {name: value.detach().full_tensor().clone() for name, value in named}

    before = weights()
    everything = rollouts(worker.model_config.hf_config.vocab_size, masked)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = {name: value[rank::ranks].clone() for name, value in everything.items()}
    size = len(everything["input_ids"])
    padded = TensorDict(part, batch_size=size // ranks)
    data = jagged(part) if v1 else left_right_2_no_padding(padded)
    tu.assign_non_tensor(
        data,
        calculate_entropy=False,
        global_batch_size=size,
        mini_batch_size=size,
        epochs=1,
        seed=0,
        temperature=1.0,
        dataloader_kwargs={"shuffle": False},
    )
    metrics = tu.get(worker.train_mini_batch(data), "metrics")
    after, (sent, _) = weights(), worker.engine.get_per_tensor_param()
    names = [name for name, _ in sent]  # what vLLM is sent
    return {"metrics": metrics, "before": before, "after": after, "sent": names}


def main(output: str, *cases: str) -> None:
    set_platform(PlatformCPU())
    dist.init_process_group("gloo", timeout=timedelta(seconds=900))
    asked = [json.loads(case) for case in cases]
    found = [update(built(case.pop("overrides")), **case) for case in asked]
    if dist.get_rank() == 0:
        torch.save(found, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
