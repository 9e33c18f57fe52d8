"""Pairs that do not fit are refused before a weight is loaded, saying how they differ."""

import pytest
from transformers import AutoConfig

from oprd.config import StudentConfig
from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError, Unreachable
from oprd.models.compatibility import (
    check_length,
    check_pair,
    check_vocabularies,
    left_out,
    shared_ids,
    shares_ids,
)
from oprd.models.loading import load_config, load_model, load_tokenizer
from tests.support.tiny import make_model


def config(**changes):
    return make_model("qwen2", **changes).config


def test_pair():
    assert check_pair(config(), config(), "all") == [(0, 0), (1, 1), (2, 2)]
    assert check_pair(config(), config(num_hidden_layers=5), "odd") == [(1, 2)]
    with pytest.raises(
        ConfigError,
        match=r"student is 32 wide and the teacher 64: without a bridge.*oprd-bridge fit",
    ):
        check_pair(config(), config(hidden_size=64), "all")
    with pytest.raises(ConfigError, match="teacher, with 2 layers"):
        check_pair(config(), config(num_hidden_layers=2), "all")
    with pytest.raises(ConfigError, match=r"block 7, but the student has 3 layers"):
        check_pair(config(), config(), [7])


def test_padded_embedding_tables_are_no_obstacle():
    check_vocabularies(make_tokenizer(), make_tokenizer(), config(vocab_size=64))
    check_vocabularies(make_tokenizer(), make_tokenizer(), config(vocab_size=15))
    with pytest.raises(ConfigError, match=r"table has 14 rows, too few for token id 14 \('9'\)"):
        check_vocabularies(make_tokenizer(), make_tokenizer(), config(vocab_size=14))


def test_different_vocabularies_are_described():
    more, moved = make_tokenizer(), make_tokenizer()
    more.add_tokens(["<think>"])
    with pytest.raises(ConfigError, match=r"16 and 15 tokens; only the student has 1.*<think>"):
        check_vocabularies(more, make_tokenizer(), config())
    vocabulary = moved.get_vocab()
    vocabulary["8"], vocabulary["9"] = vocabulary["9"], vocabulary["8"]
    moved.get_vocab = lambda: vocabulary
    with pytest.raises(ConfigError, match=r"2 have other ids, e\.g\. '8': 13 and 14"):
        check_vocabularies(make_tokenizer(), moved, config())


def test_length():
    check_length(config(), 32, 32, "student")
    with pytest.raises(ConfigError, match="32 prompt tokens and 33 new ones exceed the 64 pos"):
        check_length(config(), 32, 33, "student")


def test_what_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="no model at 'some/model'"):
        load_config("some/model")
    with pytest.raises(Unreachable, match="no tokenizer at 'some/model'"):
        load_tokenizer("some/model")
    with pytest.raises(ConfigError, match="can't be loaded") as error:
        load_config(str(tmp_path))
    assert not isinstance(error.value, Unreachable)
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_model(StudentConfig(path=str(tmp_path)))


def test_tokenizer_pads_with_eos_if_it_has_no_padding_and_needs_an_eos(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "a")
    assert load_tokenizer(str(tmp_path / "a")).pad_token == "<eos>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(ConfigError, match="no EOS token"):
        load_tokenizer(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_scaled_contexts_are_longer(rope, positions):
    scaled = config(rope_parameters=rope | {"rope_theta": 10000.0})
    check_length(scaled, positions - 5, 5, "student")
    with pytest.raises(ConfigError, match=f"exceed the {positions} positions"):
        check_length(scaled, positions - 4, 5, "student")


def test_a_teacher_may_have_more_tokens():
    ours, theirs = make_tokenizer(), make_tokenizer()
    theirs.add_tokens(["<think>"])
    assert shares_ids(ours, theirs)
    assert shared_ids(ours, theirs) == len(ours)
    assert shared_ids(ours, ours) is None
    assert not shares_ids(theirs, ours)
    check_vocabularies(ours, theirs, config(vocab_size=15))


def test_a_limit_can_be_given():
    check_length(config(), 32, 33, "student", context_length=65)
    with pytest.raises(ConfigError, match=r"exceed the 65 pos.*set teachers\.math\.context_length"):
        check_length(config(), 33, 33, "teacher of math", context_length=65)


def test_what_of_a_multimodal_model_is_left_out():
    assert left_out(AutoConfig.for_model("qwen3_5")) == ["vision"]
    assert left_out(AutoConfig.for_model("gemma3")) == []  # keeps its vision tower
    assert left_out(config()) == []


def test_weights_that_were_cut_off(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_model(StudentConfig(path=str(tmp_path)))
