"""The files of a student are those that transformers loads as the same model."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.small_models import make, small_config
from oprd.checkpoint import save_student
from oprd.config import LoraConfig
from oprd.demo.task import make_tokenizer
from oprd.models.lora import add_adapter, merged_weights
from tests.support.tiny import make_batch

pytest.importorskip("peft")


@torch.no_grad()
def assert_same_when_loaded(student, path):
    save_student(student, make_tokenizer(), path)
    loaded, about = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    ids, *_ = make_batch()
    ours, theirs = (m.eval()(input_ids=ids, use_cache=False).logits for m in (student, loaded))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bailing_hybrid", "fuyu", "gpt_neox", "lara_mini", "mixtral"])
def test_names_that_files_have_otherwise(kind, tmp_path):
    """Converted twice, the names of the first two were those of no weight of the model. Files of
    the fourth join several tensors."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    assert_same_when_loaded(make(small_config(kind)), tmp_path / "student")


@pytest.mark.parametrize("kind", ["dots1", "ernie4_5_moe", "mixtral", "zamba2"])
def test_adapters_are_merged(kind, tmp_path):
    """PEFT wraps experts that are one tensor, and wraps the wrapper for a second tensor. Zamba's
    blocks share weights, so their adapters must be one."""
    student = make(small_config(kind))
    names = dict(merged_weights(student)).keys()
    add_adapter(student, LoraConfig(rank=2, alpha=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.05)
    assert dict(merged_weights(student)).keys() == names
    assert_same_when_loaded(student, tmp_path / "student")
