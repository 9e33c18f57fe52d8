"""The recipes for real models on one GPU of 16 GB: they are whole, fit, and go with their fits.

The hub can't be reached here. Directories with the models' names hold a ``config.json`` of the
known shape and a small tokenizer with a chat template; one with the data set's name holds rows in
its layout.
"""

import json
from dataclasses import asdict

import pytest
from transformers import LlamaConfig, Qwen2Config

from oprd.cli import bridge as bridge_cli
from oprd.cli import train as cli
from oprd.memory_plan.known_shapes import KNOWN_SHAPES
from tests.support.bytes_model import bytes_tokenizer
from tests.support.runs import ROOT

RECIPES = ("smollm2_360m_135m_bridge", "qwen2.5_1.5b_0.5b_bridge")
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GSM8K = {
    "question": "A farmer has 3 pens with 12 hens each. He sells 5 hens. How many are left?",
    "answer": "There are 3*12=<<3*12=36>>36 hens.\nThen 36-5=<<36-5=31>>31 are left.\n#### 31",
}


def file(name):
    return str(ROOT / "recipes" / f"{name}.yaml")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in PARAMETERS:
        shape = KNOWN_SHAPES[name]
        kind = Qwen2Config if name.startswith("Qwen") else LlamaConfig
        kind(
            hidden_size=shape.d,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate,
            vocab_size=shape.vocab,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=8192,
        ).save_pretrained(tmp_path / name)
        tokenizer = bytes_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / name)
    data = tmp_path / "openai" / "gsm8k"
    data.mkdir(parents=True)
    rows = [GSM8K | {"question": f"{n}. {GSM8K['question']}"} for n in range(60)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def planned(capsys, recipe):
    cli.main(["--config", file(recipe), "--dry_run", "--plan.gpus=1", "--plan.memory_gib=15"])
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_checked_but_for_its_bridge_and_fits_16_gb(recipe, stand_ins, capsys):
    text = planned(capsys, recipe)
    (unchecked,) = [line for line in text.splitlines() if "not checked" in line]
    assert f"the bridge {recipe.removesuffix('_bridge')}.safetensors" in unchecked
    assert "prompts train: 60" in text
    assert "prompts GSM8K: 60" in text
    assert "GiB at most, in the phase" in text
    assert "\nfits, " in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_the_hub_its_memory_is_the_same(recipe, capsys, request):
    alone = planned(capsys, recipe)
    request.getfixturevalue("stand_ins")
    plans = [t[t.index("GiB on each of 1 GPUs") :] for t in (alone, planned(capsys, recipe))]
    assert "its shape is known" in alone
    assert plans[0] == plans[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fit_is_checked_whole(recipe, stand_ins, capsys):
    bridge_cli.main(["fit", "--config", file(f"{recipe}_fit"), "--prompts=60", "--dry_run"])
    text = capsys.readouterr().out
    assert "not checked" not in text
    assert "prompts: 60, 6 of them held out" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_fit_and_run_belong_together(recipe):
    fit = bridge_cli.make_parser().parse_args(["fit", "--config", file(f"{recipe}_fit")]).fit
    parser = cli.make_parser()
    run = cli.to_config(parser.instantiate(parser.parse_args(["--config", file(recipe)])))
    assert run.bridge.path == fit.output
    assert (fit.student.path, fit.teacher.path) == (run.student.path, run.teacher.path)
    assert fit.data.as_dict() == asdict(run.data)
    assert (fit.positions, fit.shift) == (run.distill.positions, run.distill.shift)
    assert fit.rollout.max_new_tokens == run.rollout.max_new_tokens
    assert (run.distill.kind, run.eval.grader) == ("nmse", "math")
    assert run.eval.sets["GSM8K"].split == "test"
    assert {run.student.path, run.teacher.path} <= PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_shapes_have_the_published_number_of_parameters(name):
    assert KNOWN_SHAPES[name].parameters == pytest.approx(
        PARAMETERS[name], rel=1e-3
    )  # norms and biases
