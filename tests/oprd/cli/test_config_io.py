"""A configuration as YAML and back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from oprd.cli.train import make_parser, to_config
from oprd.config import DistillConfig, PromptsConfig, TeacherConfig, TrainConfig
from oprd.config.demo import demo_config
from oprd.config.io import from_values, to_yaml
from oprd.errors import ConfigError


def full() -> TrainConfig:
    cfg = replace(demo_config(), output_dir="run", objectives={"oprd": 0.5, "opd_top1": 1.0})
    cfg.distill = DistillConfig(layers=[0, 2], kind="nmse")
    cfg.teachers = {"a": TeacherConfig("x"), "b": TeacherConfig("self:start", dtype="bfloat16")}
    cfg.data.sources = {"a": PromptsConfig("a.jsonl", limit=3), "b": PromptsConfig("b.jsonl")}
    cfg.optim.betas = (0.8, 0.95)
    return cfg


def test_a_configuration_comes_back(tmp_path):
    cfg, file = full(), tmp_path / "config.yaml"
    file.write_text(to_yaml(cfg))
    assert from_values(yaml.safe_load(file.read_text())) == cfg
    parser = make_parser()
    assert to_config(parser.instantiate(parser.parse_args(["--config", str(file)]))) == cfg


def test_values_that_only_python_has():
    cfg = replace(demo_config(), output_dir=Path("some/run"), seed=np.int64(3))
    cfg.optim.lr = np.float32(0.5)
    back = from_values(yaml.safe_load(to_yaml(cfg)))
    assert (back.output_dir, back.seed, back.optim.lr) == ("some/run", 3, 0.5)


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown option 'optim.lrr'; did you mean 'optim.lr'"):
        from_values({"optim": {"lrr": 1.0}})
    with pytest.raises(ConfigError, match="steps"):
        from_values({"steps": "many"})
