"""How `oprd.training.setup.Builder` makes the models of a run."""

import pytest
import torch

from oprd.config import check_values
from oprd.errors import ConfigError
from oprd.models.decoder import find_decoder
from oprd.training.setup import Builder
from tests.support.runs import small_run


def compiled(model) -> bool:
    """Whether every layer is compiled; fails if only some are."""
    (found,) = {layer._compiled_call_impl is not None for layer in find_decoder(model).layers}
    return found


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_the_model_that_is_to_be_compiled_is_and_no_other(tmp_path, who):
    cfg = small_run(tmp_path, **{f"{who}__compile": True})
    built = Builder(cfg, torch.device("cpu"))
    found = {"student": built.student, "teacher": built.teachers[""]}
    assert {name: compiled(model) for name, model in found.items()} == {
        "student": who == "student",
        "teacher": who == "teacher",
    }


def test_a_teacher_that_is_the_student_is_not_compiled_apart_from_it(tmp_path):
    cfg = small_run(tmp_path, teacher__path="self:current", teacher__compile=True)
    with pytest.raises(ConfigError, match=r"has no compile, .* set student.compile"):
        check_values(cfg)
