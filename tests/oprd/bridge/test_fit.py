"""``oprd-bridge fit``: what it sees, and what it writes."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from transformers import AutoModelForCausalLM

from oprd import distributed
from oprd.bridge import load_bridge, read_info
from oprd.bridge.fit import Prepared, fit, stream_batch
from oprd.bridge.preflight import check_fit, pair_for_fit
from oprd.bridge.statistics import PairStatistics
from oprd.cli import bridge as bridge_cli
from oprd.data.collate import Batch
from oprd.data.supervision import supervise
from oprd.errors import ConfigError
from oprd.models.decoder import cut, find_decoder
from oprd.models.loading import DEMO
from tests.support.bridges import small_fit, write_teacher
from tests.support.runs import ROOT, limits_of_two_ranks
from tests.support.tiny import make_batch, make_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


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


@pytest.mark.slow
def test_two_ranks_fit_the_bridge_of_one(teacher, tmp_path):
    """Nearly greedy rollouts are the same on any rank."""
    launchers = {
        "one": ["-m", "oprd.cli.bridge"],
        "two": ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "oprd.cli.bridge"],
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

    limits, joined = limits_of_two_ranks(monkeypatch), []
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


def test_a_teachers_prompt_is_what_it_reads(teacher, tmp_path):
    """`teacher_prompt` is one of the options that a fit uses."""
    plain, told = tmp_path / "plain", tmp_path / "told"
    fit(small_fit(plain, teacher))
    fit(small_fit(told, teacher, data__train__teacher_prompt="1{prompt}",
                  data__max_teacher_prompt_tokens=9))  # fmt: skip
    first, second = load_bridge(plain), load_bridge(told)
    assert first.info.rows == second.info.rows
    assert not torch.allclose(first.teacher_mean[0], second.teacher_mean[0], atol=1e-4)


def test_few_rows_are_noted_and_too_few_refused(teacher, tmp_path, capsys):
    fit(small_fit(tmp_path / "b.safetensors", teacher, prompts=20))
    assert "fewer than the student's 128 dimensions" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="cannot give 40 principal directions"):
        fit(small_fit(tmp_path / "c.safetensors", teacher, prompts=8, rank=40))
    assert not (tmp_path / "c.safetensors").exists()


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


def test_show(bridge_file, capsys):
    bridge_cli.main(["show", str(bridge_file)])
    printed = capsys.readouterr().out
    for text in ("demo:student (4 layers, 128 wide)", "ridge 0.0001", "at rank 8"):
        assert text in printed
    assert f"{read_info(bridge_file).ranks[-1].cosine_after[0]:.4f}" in printed
