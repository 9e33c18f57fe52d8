"""``oprd-bridge fit`` and training with what it writes, as a user does both."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from oprd import cli, distributed
from oprd.bridge import cli as bridge_cli
from oprd.bridge import load_bridge, read_info
from oprd.bridge.checks import FitConfig, check_fit, pair_for_fit
from oprd.bridge.fit import Prepared, fit, stream_batch
from oprd.bridge.statistics import PairStatistics
from oprd.config import PromptsConfig
from oprd.decoder import cut, find_decoder
from oprd.demo.bridge_teacher import make_olmo
from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError
from oprd.models import DEMO
from oprd.positions import supervise
from oprd.rollout import Batch
from tests.oprd.runs import set_options
from tests.oprd.test_train import small_run, steps_of
from tests.oprd.tiny import make_batch, make_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Six layers, 48 wide, random weights, the demo's tokenizer."""
    directory, tokenizer = tmp_path_factory.mktemp("models") / "teacher", make_tokenizer()
    torch.manual_seed(3)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def small_fit(file, teacher, **changes) -> FitConfig:
    cfg = FitConfig(output=str(file), prompts=60, rank=8, ridge=1e-4)
    cfg.teacher.path = teacher
    return set_options(cfg, changes)


@pytest.fixture(scope="module")
def bridge_file(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("bridge") / "b.safetensors"
    fit(small_fit(path, teacher, prompts=400))
    return path


def test_what_a_fit_writes(bridge_file, teacher):
    bridge = load_bridge(bridge_file)
    info = bridge.info
    assert (info.student.width, info.student.layers, info.student.path) == (128, 4, "demo:student")
    assert (info.teacher.width, info.teacher.layers, info.teacher.path) == (48, 6, teacher)
    assert info.pairs == [(0, 0), (1, 2), (2, 3), (3, 5)]
    assert info.student.vocabulary == info.teacher.vocabulary
    assert (info.solver, info.ridge, info.shift, info.teacher_input) == (
        *("ridge", 1e-4, "before"), "shared_ids",
    )  # fmt: skip
    assert info.rows is not None
    assert info.held_out_rows is not None
    assert 360 * 4 <= info.rows <= 360 * 5
    assert 40 * 4 <= info.held_out_rows <= 40 * 5
    assert [r.rank for r in info.ranks] == [1, 2, 4, 8]
    for report in info.ranks:
        pairs = zip(report.cosine_after, report.cosine_before, strict=True)
        assert all(after > before + 0.3 for after, before in pairs)
        assert all(0 < v <= 1 for v in report.explained_variance)
        assert all(0.4 < v <= 1 for v in report.student_r2)
    assert info.ranks[-1].cosine_after[0] > 0.8
    for proj in bridge.teacher_proj.values():
        assert torch.allclose(proj @ proj.T, torch.eye(8), atol=1e-6)


def test_the_held_out_cosines_are_those_of_the_matrices(teacher, tmp_path, monkeypatch):
    """Recomputed from hidden states that transformers itself returns."""
    from oprd.bridge import fit as module

    held = []
    original = module.Fitter._rollouts

    def spy(self, student):
        parts = original(self, student)
        held.extend(parts[1])
        return parts

    monkeypatch.setattr(module.Fitter, "_rollouts", spy)
    bridge = fit(small_fit(tmp_path / "b.safetensors", teacher))
    student, wide = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (DEMO / "student", teacher)
    )
    for i, (s, t) in enumerate(bridge.info.pairs):
        cosines = []
        for rollout in held:
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            rows = slice(len(rollout.prompt_ids) - 1, len(rollout) - 1)
            with torch.no_grad():
                h_s, h_t = (
                    model(input_ids=ids, output_hidden_states=True).hidden_states[block + 1][
                        0, rows
                    ]
                    for model, block in ((student, s), (wide, t))
                )
            z_s = h_s @ bridge.student_proj[s].T
            z_t = (h_t - bridge.teacher_mean[s]) @ bridge.teacher_proj[s].T
            cosines += torch.cosine_similarity(z_s, z_t).tolist()
        assert len(cosines) == bridge.info.held_out_rows
        mean = sum(cosines) / len(cosines)
        assert bridge.info.ranks[-1].cosine_after[i] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_one_pass_sees_the_states_that_transformers_returns(padding):
    student = make_model("qwen2").eval()
    wide = make_model("phi3", seed=1, hidden_size=48, num_hidden_layers=5).eval()
    ids, attention, response = make_batch(padding)
    s, t = find_decoder(student), find_decoder(wide)
    pairs = pair_for_fit([0, 2], 3, 5)
    chosen = supervise(response, "all")
    rows = chosen.rows
    seen = {}

    def see(block, states, rows, beside):
        seen[block] = (states[rows], beside)

    models = Prepared(s, cut(t, 5), 5, pairs)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    call = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    with torch.no_grad():
        stream_batch(models, Batch(ids, attention, response), chosen, see)
        h_s, h_t = (m(**call, output_hidden_states=True).hidden_states for m in (student, wide))
    assert sorted(seen) == [0, 2]
    for block, other in pairs:
        assert torch.allclose(seen[block][0], h_s[block + 1].flatten(0, 1)[rows], atol=1e-6)
        assert torch.allclose(seen[block][1], h_t[other + 1].flatten(0, 1)[rows], atol=1e-6)


def test_padding_and_prompt_rows_never_enter_a_statistic():
    """States at every other place are replaced by NaN on their way to the statistics."""
    student = make_model("qwen2").eval()
    wide = make_model("qwen2", seed=1, hidden_size=48).eval()
    ids, attention, response = make_batch()
    chosen = supervise(response, "all")
    found = PairStatistics.empty(32, 48)

    def see(_block, states, rows, beside):
        poisoned = torch.full_like(states, torch.nan)
        poisoned[rows] = states[rows]
        found.update(poisoned, beside, rows)

    models = Prepared(find_decoder(student), find_decoder(wide), 3, [(1, 1)])
    with torch.no_grad():
        stream_batch(models, Batch(ids, attention, response), chosen, see)
    assert found.count == int(response.sum())
    assert found.cross_scatter.isfinite().all()
    assert found.student_gram.isfinite().all()


def test_two_ranks_fit_the_bridge_of_one(teacher, tmp_path):
    """Nearly greedy rollouts are the same on any rank."""
    launchers = {
        "one": ["-m", "oprd.bridge"],
        "two": ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "oprd.bridge"],
    }
    for name, launcher in launchers.items():
        result = subprocess.run(
            [
                *(sys.executable, *launcher, "fit", f"--output={tmp_path / name}", "--rank=4"),
                *("--prompts=41", f"--teacher.path={teacher}", "--ridge=1e-3"),
                "--rollout.temperature=0.0001",
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "29513"},
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
    one, two = (load_bridge(tmp_path / name) for name in launchers)
    assert (one.info.rows, one.info.held_out_rows) == (two.info.rows, two.info.held_out_rows)
    for block in one.student_proj:
        for name in ("student_proj", "teacher_proj", "teacher_mean"):
            a, b = getattr(one, name)[block], getattr(two, name)[block]
            assert (a - b).abs().max() <= 1e-3 * a.abs().max(), (name, block)
    for a, b in zip(one.info.ranks, two.info.ranks, strict=True):
        assert a.cosine_after == pytest.approx(b.cosine_after, abs=1e-4)
        assert a.cosine_before == pytest.approx(b.cosine_before, abs=1e-4)


def test_ranks_wait_for_each_other_longer_than_rollouts_take(teacher, tmp_path, monkeypatch):
    """The first sums over ranks come after all rollouts."""
    from oprd.bridge.fit import Fitter

    limits, joined = [], []

    def init(*_args, timeout=None, **_kwargs):
        limits.append(timeout)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _url: iter([(store, 0, 2)]))
    monkeypatch.setattr(
        distributed, "sum_over_ranks", lambda _values, device: joined.append(device.type)
    )
    cfg = small_fit(tmp_path / "b", teacher, device="cpu")
    Fitter(cfg, check_fit(cfg))
    assert limits == [timedelta(days=1)]
    assert joined == ["cpu"]  # NCCL's own wait for the first collective is shorter


def test_sgd_and_float32_products_and_autocast(teacher, tmp_path):
    exact = fit(small_fit(tmp_path / "a", teacher))
    single = fit(small_fit(tmp_path / "b", teacher, products="float32"))
    for block, proj in exact.student_proj.items():
        assert (proj - single.student_proj[block]).abs().max() <= 1e-2 * proj.abs().max()
    mixed = fit(small_fit(tmp_path / "c", teacher, autocast="bfloat16"))
    assert mixed.info.ranks[-1].cosine_after == pytest.approx(
        exact.info.ranks[-1].cosine_after, abs=0.05
    )
    learnt = fit(
        small_fit(
            tmp_path / "d", teacher, solver="sgd", sgd__epochs=400, sgd__lr=3e-3, sgd__max_rows=200
        )
    )
    assert (learnt.info.solver, learnt.info.ridge) == ("sgd", None)
    pairs = zip(learnt.info.ranks[-1].cosine_after, exact.info.ranks[-1].cosine_after, strict=True)
    assert all(a > b - 0.1 for a, b in pairs)


def test_fit_then_train_lowers_the_loss(bridge_file, teacher, tmp_path, capsys):
    """Half of the fitted rank, on the command line."""
    run = tmp_path / "run"
    cli.train(
        [
            *(f"--output_dir={run}", f"--teacher.path={teacher}", f"--bridge.path={bridge_file}"),
            *("--bridge.rank=4", "--distill.kind=nmse", "--steps=25", "--eval.sets={}"),
            *("--rollout.prompts_per_step=16", "--optim.lr=1e-3"),
        ]
    )
    steps = steps_of(run)
    losses = [s["actor/rep_loss"] for s in steps]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert steps[-1]["rep/cosine_similarity"] > steps[0]["rep/cosine_similarity"]
    for s in steps:
        # Every token counts the same, so the loss is 2 (1 - cos) / D at D = r, and not at D = d.
        assert s["rep/norm_mse"] == pytest.approx(s["actor/rep_loss"], rel=1e-3)
    assert json.loads((run / "summary.json").read_text())["steps"] == 25
    AutoModelForCausalLM.from_pretrained(run / "student")


@pytest.mark.parametrize(
    "changes",
    [
        {"objectives": {"opd_top1": 1.0, "oprd": 1.0}},
        {"autocast": "bfloat16", "teacher__dtype": "bfloat16"},
        {"student__dtype": "bfloat16", "student__gradient_checkpointing": True},
    ],
)
def test_a_bridge_in_mixed_precision_and_beside_other_objectives(
    bridge_file, teacher, tmp_path, changes
):
    from oprd.train import train

    options = {"steps": 1, "eval__sets": {}, "rollout__temperature": 0.0001}
    options |= {"distill__kind": "nmse"}
    train(bridged_run(tmp_path / "plain", teacher, bridge_file, **options))
    train(bridged_run(tmp_path / "other", teacher, bridge_file, **(options | changes)))
    plain, other = (steps_of(tmp_path / name)[0] for name in ("plain", "other"))
    assert other["actor/rep_loss"] == pytest.approx(plain["actor/rep_loss"], rel=0.05)
    assert other["rep/cosine_similarity"] == pytest.approx(plain["rep/cosine_similarity"], abs=0.05)


def bridged_run(directory, teacher, bridge_file, **changes):
    changes = {"teacher__path": teacher, "bridge__path": str(bridge_file)} | changes
    return small_run(directory, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bridge__rank": 9}, r"rank 9 is asked of a bridge of rank 8"),
        ({"bridge__rank": 0}, "bridge.rank must be at least 1"),
        ({"bridge__path": None, "bridge__rank": 2}, r"bridge\.rank is given without bridge\.path"),
        ({"bridge__path": None}, "128 wide and the teacher 48: without a bridge.*oprd-bridge fit"),
        ({"bridge__path": "nowhere"}, "no bridge at nowhere"),
        ({"distill__init_head_from_teacher": True}, "128 wide and the teacher 48, so .* head does"),
        ({"objectives": {"opd_top1": 1.0}}, "compare no hidden states: add oprd"),
        ({"teacher__path": "demo:teacher"}, "a teacher 48 wide .*, this one is 128 wide"),
    ],
)
def test_training_refuses_before_loading(
    bridge_file, teacher, tmp_path, monkeypatch, changes, message
):
    from oprd.train import train

    monkeypatch.setattr("oprd.building.load_model", None)
    cfg = bridged_run(tmp_path / "run", teacher, bridge_file, **changes)
    with pytest.raises(ConfigError, match=message):
        train(cfg)


def test_training_refuses_layers_and_tokenizers_that_are_not_the_bridges(
    bridge_file, teacher, tmp_path, monkeypatch
):
    from oprd.preflight import preflight

    partial = tmp_path / "partial.safetensors"
    fit(small_fit(partial, teacher, layers=[0, 3]))
    message = r"no projector for student block\(s\) \[1, 2\], only for \[0, 3\]"
    with pytest.raises(ConfigError, match=message):
        preflight(bridged_run(tmp_path / "run", teacher, partial))
    assert preflight(
        bridged_run(tmp_path / "run", teacher, partial, distill__layers=[3])
    ).layer_pairs == {"": [(3, 5)]}

    from oprd import models

    monkeypatch.setattr(models, "fingerprint", lambda vocabulary: "another")
    with pytest.raises(ConfigError, match="student with another tokenizer"):
        preflight(bridged_run(tmp_path / "run", teacher, bridge_file))


def test_another_shift_is_noted(bridge_file, teacher, tmp_path):
    from oprd.preflight import preflight

    notes = preflight(
        bridged_run(tmp_path / "run", teacher, bridge_file, distill__shift="after")
    ).notes
    assert any("fitted on states 'before' a token" in note for note in notes)
    assert not preflight(bridged_run(tmp_path / "run", teacher, bridge_file)).notes


# Checks of a fit ---------------------------------------------------------------------------------


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


def test_a_teachers_prompt_is_what_it_reads(teacher, tmp_path):
    """`teacher_prompt` is one of the options that a fit uses."""
    plain, told = tmp_path / "plain", tmp_path / "told"
    fit(small_fit(plain, teacher))
    fit(small_fit(told, teacher, data__train__teacher_prompt="1{prompt}",
                  data__max_teacher_prompt_tokens=9))  # fmt: skip
    first, second = load_bridge(plain), load_bridge(told)
    assert first.info.rows == second.info.rows
    assert not torch.allclose(first.teacher_mean[0], second.teacher_mean[0], atol=1e-4)


def test_several_ranks(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    cfg = small_fit(tmp_path / "b", teacher, solver="sgd", rollout__prompts_per_step=2)
    with pytest.raises(ConfigError, match=r"one rank, there are 3[\s\S]*leaves some of 3 ranks"):
        check_fit(cfg)


def test_tokenizers_whose_bytes_are_unknown_are_refused(tmp_path):
    other = tmp_path / "other"
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["hello"])
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
        "prompts=60 is asked for, 2 are there",
    ]
    file.write_text('{"prompt": "100+100="}\n')
    with pytest.raises(ConfigError, match="has 1 prompt: at least 2 are needed"):
        check_fit(cfg)


def test_few_rows_are_noted_and_too_few_refused(teacher, tmp_path, capsys):
    fit(small_fit(tmp_path / "b.safetensors", teacher, prompts=20))
    assert "fewer than the student's 128 dimensions" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="cannot give 40 principal directions"):
        fit(small_fit(tmp_path / "c.safetensors", teacher, prompts=8, rank=40))
    assert not (tmp_path / "c.safetensors").exists()


def test_a_shallower_teacher_stands_beside_several_student_layers():
    assert pair_for_fit("all", 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_dry_run_loads_no_weights_and_writes_nothing(teacher, tmp_path, capsys, monkeypatch):
    from oprd.bridge import fit as module

    monkeypatch.setattr(cli, "hub_reachable", lambda: False)
    monkeypatch.setattr(module, "load_model", None)
    argv = ["fit", f"--teacher.path={teacher}", f"--output={tmp_path / 'b'}", "--dry_run"]
    bridge_cli.main(argv)
    printed = capsys.readouterr().out
    assert "0<-0, 1<-2, 2<-3, 3<-5" in printed
    assert "prompts: 2000, 200 of them held out" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["qwen3_4b", "phi4_mini"])
def test_dry_run_without_the_hub_says_what_it_could_not_check(
    recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cli, "hub_reachable", lambda: False)
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


def test_a_file_that_appears_during_the_fit_costs_neither(teacher, tmp_path, monkeypatch):
    from oprd.bridge import fit as module

    original = module.Fitter.run

    def run(self):
        (tmp_path / "b.safetensors").write_text("theirs")
        return original(self)

    monkeypatch.setattr(module.Fitter, "run", run)
    fit(small_fit(tmp_path / "b.safetensors", teacher))
    assert (tmp_path / "b.safetensors").read_text() == "theirs"
    assert load_bridge(tmp_path / "b.2.safetensors").info.rank == 8


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


def test_show(bridge_file, capsys):
    bridge_cli.main(["show", str(bridge_file)])
    printed = capsys.readouterr().out
    for text in ("demo:student (4 layers, 128 wide)", "ridge 0.0001", "at rank 8"):
        assert text in printed
    assert f"{read_info(bridge_file).ranks[-1].cosine_after[0]:.4f}" in printed
