"""What ``oprd-bridge fit`` checks before it begins, and the recipes."""

import pytest
from tokenizers import decoders

from oprd import distributed
from oprd.bridge.preflight import check_fit, pair_for_fit
from oprd.cli import bridge as bridge_cli
from oprd.cli import train as cli
from oprd.config import PromptsConfig
from oprd.demo.bridge_teacher import make_olmo, make_pair_tokenizer
from oprd.errors import ConfigError
from tests.support.bridges import small_fit, write_teacher
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 49}, "rank must be at most the smaller width, 48, got 49"),
        ({"prompts": 1}, r"prompts must be at least 2 \(one is held out\), got 1"),
        ({"held_out": 1.0}, r"held_out must lie in \(0, 1\), got 1.0"),
        ({"ridge": -1.0}, "ridge must not be negative"),
        ({"sgd__lr": 0.0}, "sgd.lr must be above 0"),
        ({"rollout__temperature": 0.0}, "rollout.temperature must be above 0"),
        ({"rollout__top_p": 1.5}, "rollout.top_p must lie"),
        ({"rollout__max_new_tokens": 60}, "exceed the 64 positions of the student"),
        ({"data__max_teacher_prompt_tokens": 60}, "exceed the 64 positions of the teacher"),
        ({"student__gradient_checkpointing": True}, "student.gradient_checkpointing has no use"),
        ({"student__compile": True}, "student.compile has no use here.* Leave it out"),
        (
            {"student__lora__rank": 8, "student__lora__dropout": 0.1},
            "student.lora.rank, dropout has no use here: a fit trains nothing.* Leave it out",
        ),
        ({"rollout__engine": "vllm"}, "rollout.engine=vllm has no use here.* Leave it out"),
        ({"rollout__staleness": 1}, "rollout.staleness=1 has no use here.* Leave it out"),
        (
            {"data__sources": {"sums": PromptsConfig("demo:train.jsonl")}},
            "data.sources has sums: .* one teacher.* Give .* as data.train",
        ),
        (
            {"data__train": PromptsConfig("demo:train.jsonl", source_field="kind")},
            "source_field=kind has no use here.* Give it a file of that teacher's prompts",
        ),
        ({"teacher__path": "self:start"}, "teacher.path=self:start is the student itself"),
        ({"teacher__path": "self:base"}, "Name another model, or train without bridge.path"),
        ({"layers": [4]}, "layers names block 4, but the student has 4 layers"),
        ({"teacher__path": "nowhere/at-all"}, "no model at 'nowhere/at-all'"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"output": str(ROOT / "README.md")}, "exists and would be lost"),
    ],
)
def test_what_cannot_finish_is_refused(teacher, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_fit(small_fit(tmp_path / "b.safetensors", teacher, **changes))


def test_several_ranks(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    cfg = small_fit(tmp_path / "b", teacher, solver="sgd", rollout__prompts_per_step=2)
    with pytest.raises(ConfigError, match=r"one rank, there are 3[\s\S]*leaves some of 3 ranks"):
        check_fit(cfg)


def test_tokenizers_whose_bytes_are_unknown_are_refused(tmp_path):
    other = tmp_path / "other"
    tokenizer = make_pair_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    make_olmo(tokenizer, width=64, layers=6).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"teacher's tokenizer has the decoder.*WordPiece"):
        check_fit(small_fit(tmp_path / "b.safetensors", str(other)))


def test_fewer_prompts_than_asked_for_are_noted(teacher, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "100+100="}\n{"prompt": "123+100="}\n{"prompt": "123+1000000="}\n')
    cfg = small_fit(tmp_path / "b.safetensors", teacher)
    cfg.data.train = PromptsConfig(str(file))
    found = check_fit(cfg)
    assert (len(found.prompts), found.held_out_prompts) == (2, 1)
    assert found.notes == [
        "1 prompts dropped, longer than 8 tokens",
        "prompts=60, but data.train has only 2",
    ]
    file.write_text('{"prompt": "100+100="}\n')
    with pytest.raises(ConfigError, match="has 1 prompt: at least 2 are needed"):
        check_fit(cfg)


def test_a_shallower_teacher_stands_beside_several_student_layers():
    assert pair_for_fit("all", 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_dry_run_loads_no_weights_and_writes_nothing(teacher, tmp_path, capsys, monkeypatch):
    from oprd.bridge import fit as module

    monkeypatch.setattr(module, "load_model", None)
    argv = ["fit", f"--teacher.path={teacher}", f"--output={tmp_path / 'b'}", "--dry_run"]
    bridge_cli.main(argv)
    printed = capsys.readouterr().out
    assert "0<-0, 1<-2, 2<-3, 3<-5" in printed
    assert "prompts: 2000, 200 of them held out" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["qwen3_4b", "phi4_mini"])
def test_dry_run_without_the_hub_says_what_it_could_not_check(recipe, tmp_path, capsys):
    file = ROOT / "recipes" / f"qwen3_1.7b_{recipe}_bridge_fit.yaml"
    argv = ["fit", f"--config={file}", f"--output={tmp_path / 'b'}", "--dry_run"]
    bridge_cli.main(argv)
    printed = capsys.readouterr().out
    assert "not checked: no model at 'Qwen/Qwen3-1.7B-Base'" in printed
    assert "not checked: the prompts: they need the student's tokenizer" in printed
    assert "as far as it could be checked" in printed
    assert "everything checked" not in printed

    small = ["--data.max_prompt_tokens=8", "--rollout.max_new_tokens=5"]
    mine = ["--student.path=demo:student", "--data.train.path=demo:train.jsonl", *small]
    bridge_cli.main([*argv, *mine, "--data.chat_template=never", "--data.prompt_suffix="])
    printed = capsys.readouterr().out
    assert "not checked: no tokenizer at" in printed
    assert "prompts: 2000, 200 of them held out" in printed
    with pytest.raises(SystemExit) as ended:
        bridge_cli.main([*argv, *mine, "--rank=129"])
    assert ended.value.code == 2
    assert "at most the smaller width, 128, got 129" in capsys.readouterr().err


def test_a_configuration_file_and_one_printed_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bridge_cli.make_parser().parse_args(["fit", "--print_config", "--rank=3"])
    file = tmp_path / "fit.yaml"
    file.write_text(capsys.readouterr().out)
    parser = bridge_cli.make_parser()
    parsed = parser.parse_args(["fit", f"--config={file}", "--rollout.max_new_tokens=4"])
    assert (parsed.fit.rank, parsed.fit.rollout.max_new_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("recipe", "rank", "teacher_path"),
    [
        ("qwen3_1.7b_qwen3_4b_bridge", 8, "Qwen/Qwen3-4B"),
        ("qwen3_1.7b_phi4_mini_bridge", 4, "microsoft/Phi-4-mini-reasoning"),
    ],
)
def test_recipes_have_the_papers_values(recipe, rank, teacher_path):
    parsed = bridge_cli.make_parser().parse_args(
        ["fit", "--config", str(ROOT / "recipes" / f"{recipe}_fit.yaml")]
    )
    parser = cli.make_parser()
    train_file = str(ROOT / "recipes" / f"{recipe}.yaml")
    cfg = cli.to_config(parser.instantiate(parser.parse_args(["--config", train_file])))
    assert (parsed.fit.rank, parsed.fit.prompts) == (rank, 2000)
    assert cfg.bridge.path == parsed.fit.output
    assert cfg.distill.kind == "nmse"
    assert (cfg.student.path, cfg.teacher.path) == ("Qwen/Qwen3-1.7B-Base", teacher_path)
    assert (parsed.fit.student.path, parsed.fit.teacher.path) == (
        cfg.student.path,
        cfg.teacher.path,
    )
    assert cfg.data.chat_template_kwargs == {"enable_thinking": False}
    assert parsed.fit.data.chat_template_kwargs == {"enable_thinking": False}
    assert (cfg.distill.positions, cfg.distill.k, cfg.distill.shift) == ("last_k", 2000, "after")
    assert (parsed.fit.positions, parsed.fit.k, parsed.fit.shift) == ("last_k", 2000, "after")
    assert (cfg.steps, cfg.optim.lr, cfg.optim.warmup_ratio) == (500, 1e-5, 0.03)
    rollout, layers, kv_heads, head_dim = parsed.fit.rollout, 28, 8, 128  # of Qwen3-1.7B
    tokens = parsed.fit.data.max_prompt_tokens + rollout.max_new_tokens
    cache = rollout.batch_size * tokens * layers * 2 * kv_heads * head_dim * 2
    assert cache <= 32 * 2**30  # beside the weights, on 80 GiB; its tensors grow by copies
    assert (cfg.rollout.prompts_per_step, cfg.rollout.responses_per_prompt) == (8, 2)
