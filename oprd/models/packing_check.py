"""A check that a model keeps sequences that are packed in one row apart."""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.distributed.fsdp import input_device, reshard
from oprd.errors import ConfigError
from oprd.models.decoder import Decoder

LENGTH = 8


@torch.no_grad()
def check_packing(decoder: Decoder, who: str) -> None:
    """Check that a model keeps packed sequences apart, by running it on random token ids.

    A sequence is packed behind two different sequences. Two conditions must hold:

    - Its last hidden states are the same behind both. The tolerance is the difference that the
      choice of a sequence packed *after* it makes, which can only be rounding (experts that get
      other tokens included).
    - Its last hidden states are close to those of the sequence on its own. The tolerance is a tenth
      of the difference that seeing the other sequence makes.

    Args:
        decoder: the model, in evaluation mode. If it is sharded, all ranks must call this together.
        who: "student" or "teacher", for the error message.

    Raises:
        ConfigError: if packed sequences see each other, or if positions do not restart at 0.
    """
    backbone, device = decoder.backbone, input_device(decoder.root)
    rows = backbone.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)  # leaves the run's own random state unchanged
    first, second, third = torch.randint(rows, (3, LENGTH), generator=generator).to(device)
    positions = torch.arange(LENGTH, device=device).repeat(2)[None]

    def states(ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = decoder.forward(ids[None], None, position_ids)[0]
        return hidden[:LENGTH], hidden[-LENGTH:]

    behind = states(torch.cat([first, second]), positions)[1]
    behind_other = states(torch.cat([third, second]), positions)[1]
    before = states(torch.cat([second, first]), positions)[0]
    before_other = states(torch.cat([second, third]), positions)[0]
    alone = states(second)[1]
    seeing = states(torch.cat([first, second]))[1]
    reshard(decoder.root)

    rounding = 10 * _apart(before, before_other) + torch.finfo(alone.dtype).eps * _norm(alone)
    leaks = _apart(behind, behind_other) > rounding
    moved = _apart(behind, alone) > 0.1 * _apart(seeing, alone)
    if leaks or moved:
        raise ConfigError(
            f"packing: the {who} ({type(decoder.root).__name__}, attn_implementation "
            f"{backbone.config._attn_implementation}) lets packed sequences see each other. Choose "
            "flash_attention_2, flex_attention or sdpa as its attn_implementation. If none of them "
            "keeps the sequences apart (a recurrent state never does), set packing: false"
        )


def _norm(states: Tensor) -> float:
    return states.float().norm().item()


def _apart(a: Tensor, b: Tensor) -> float:
    return _norm(a.float() - b.float())
