"""``oprd-eval``: models, sets, interruptions, and what is said when something does not fit."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from oprd.cli import eval as cli
from oprd.data.rollout import Rollout
from oprd.evaluation import run, store
from oprd.evaluation.closeness import Comparer, spread
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.run import evaluate_models
from oprd.evaluation.sets import find_sets
from oprd.evaluation.subjects import find_subjects
from oprd.models.loading import DEMO
from oprd.training.trainer import train
from tests.support.bytes_model import save_bytes_model
from tests.support.runs import small_run
from tests.support.tiny import make_model

PUBLISHED = Path("/work/shared/data")
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "AIME24.parquet").exists(), reason=f"no published sets in {PUBLISHED}"
)


def demo(directory, **changes):
    """The demo's student, four responses to each of 12 problems."""
    options = {"models": ["demo:student"], "sets": ["demo"], "limit": 12, "samples": 4}
    return EvalRunConfig(**(options | {"output_dir": str(directory)} | changes))


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def refusal(capsys, *arguments):
    """What ``oprd-eval`` says when it refuses its arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_two_models_on_the_demo(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["demo:student", "best=demo:teacher", "--sets", "demo", "--limit=12", "--samples=4"]
    cli.main([*arguments, f"--output_dir={out}"])
    printed = capsys.readouterr().out
    tables = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert "demo: 12 problems x 4 samples" in printed
    assert max(map(len, tables)) <= 80
    results = json.loads((out / "results.json").read_text())
    student, teacher = (results["models"][n]["sets"]["demo"] for n in ("demo:student", "best"))
    assert (teacher["avg"], teacher["best"], teacher["pass_all"]["4"]) == (1.0, 1.0, 1.0)
    assert student["avg"] < 1
    assert student["unboxed"] is None
    (found,) = results["comparisons"]
    assert (found["baseline"], found["model"], found["problems"]) == ("demo:student", "best", 12)
    assert found["mean"] == pytest.approx(1 - student["avg"])
    assert found["low"] < found["mean"] < found["high"]
    samples = [json.loads(s) for s in (out / "best" / "samples.jsonl").read_text().splitlines()]
    assert [(s["problem"], s["sample"]) for s in samples] == [
        (p, n) for p in range(12) for n in range(4)
    ]
    assert all(s["response"] == s["answer"] and s["score"] == 1 for s in samples)
    assert not list(out.glob("*/parts"))


def test_a_finished_evaluation_is_read_and_another_model_is_added(tmp_path, monkeypatch):
    evaluate_models(demo(tmp_path / "out"))
    first = (tmp_path / "out" / "results.json").read_text()
    monkeypatch.setattr(run, "engine_on", lambda *_: pytest.fail("it samples again"))
    evaluate_models(demo(tmp_path / "out"))
    assert (tmp_path / "out" / "results.json").read_text() == first
    monkeypatch.undo()
    results = evaluate_models(demo(tmp_path / "out", models=["demo:student", "demo:teacher"]))
    assert list(results["models"]) == ["demo:student", "demo:teacher"]
    assert results["models"]["demo:student"] == json.loads(first)["models"]["demo:student"]


def test_samples_are_graded_again_without_a_model(tmp_path):
    out = tmp_path / "out"
    before = evaluate_models(demo(out, models=["demo:teacher"]))
    file = out / "demo_teacher" / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[:4]:
        line["response"] = f"\\boxed{{{line['answer']}.0}}"
    write_lines(file, lines)
    assert before["models"]["demo:teacher"]["sets"]["demo"]["avg"] == 1
    again = EvalRunConfig(regrade=True, output_dir=str(out))
    assert evaluate_models(again)["models"]["demo:teacher"]["sets"]["demo"]["avg"] == 44 / 48
    again.grader = "math"
    graded = evaluate_models(again)["models"]["demo:teacher"]["sets"]["demo"]
    assert (graded["avg"], graded["unboxed"]) == (4 / 48, 44 / 48)


@needs_published
def test_published_files_are_read_as_they_are():
    names = ["AIME24", "AIME25", "AIMO", "dapo-math-17k-sample"]
    sets = find_sets(EvalRunConfig(sets=[str(PUBLISHED / f"{name}.parquet") for name in names]))
    assert [s.name for s in sets] == names
    assert {s.source.answer_field for s in sets} == {"reward_model.ground_truth"}


def interrupted_at_aime(arguments):
    """Disks are slow, so that there is time to kill the process."""
    torch.set_num_threads(1)  # the parent's threads are not in a forked process
    add = store.Part.add

    def slow(self, name, samples):
        add(self, name, samples)
        time.sleep(0.1)

    store.Part.add = slow
    cli.main(arguments)


@needs_published
def test_killed_on_aime_and_started_again_it_ends_with_the_same_files(tmp_path):
    model = save_bytes_model(tmp_path / "model")
    arguments = [
        *(model, "--sets", str(PUBLISHED / "AIME24.parquet"), "--samples=2", "--batch_size=4"),
        *("--max_new_tokens=6", "--device=cpu"),
    ]
    cli.main([*arguments, f"--output_dir={tmp_path / 'whole'}"])
    killed = tmp_path / "killed"
    again = [*arguments, f"--output_dir={killed}"]
    process = multiprocessing.get_context("fork").Process(target=interrupted_at_aime, args=(again,))
    process.start()
    deadline = time.monotonic() + 120
    parts = killed / "model" / "parts"
    while process.is_alive() and time.monotonic() < deadline:
        if sum(len(p.read_bytes().splitlines()) for p in parts.glob("*.jsonl")) >= 8:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (part,) = parts.glob("*.jsonl")
    assert 8 <= len(part.read_bytes().splitlines()) < 60, "the kill has missed the sampling"
    with part.open("a") as stream:
        stream.write('{"model": "model", "set": "AIME24", "probl')  # what a kill may leave
    cli.main(again)
    for name in ("results.json", "model/samples.jsonl"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    results = json.loads((killed / "results.json").read_text())["models"]["model"]["sets"]["AIME24"]
    assert (results["problems"], results["samples"], results["unboxed"]) == (30, 2, 1.0)
    first = json.loads((killed / "model" / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"].endswith("put your final answer within \\boxed{}.")
    assert first["answer"] == "204"


def test_a_checkpoint_and_a_finished_run_are_models(tmp_path):
    directory = tmp_path / "run"
    train(small_run(directory, checkpoint__every=2))
    kept = sorted(p.name for p in (directory / "samples").iterdir())
    assert "samples_00000002_student_val.jsonl" in kept
    after, checkpoint = find_subjects(
        [str(directory), f"two={directory / 'checkpoints' / 'step_00000003'}"], best=False
    )
    assert after.checkpoint is None  # its student/ is there
    assert checkpoint.checkpoint.step == 3
    one, two = (s.load("float32", None, "cpu").state_dict() for s in (after, checkpoint))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    results = evaluate_models(demo(tmp_path / "out", models=[f"x={checkpoint.checkpoint.path}"]))
    assert results["models"]["x"]["step"] == 3


def test_an_evaluation_with_other_settings_is_refused(tmp_path, capsys):
    model = save_bytes_model(tmp_path / "model")
    rows = write_lines(tmp_path / "set.jsonl", [{"question": "1+1", "answer": "2"}])
    common = [model, "--sets", rows, "--samples=2", f"--output_dir={tmp_path / 'out'}"]
    cli.main([*common, "--max_new_tokens=3"])
    capsys.readouterr()
    error = refusal(capsys, *common, "--max_new_tokens=4", "--temperature=1")
    assert "models.model.sets.set.max_new_tokens: 3 there, 4 here" in error
    assert "sampling.temperature: 0.7 there, 1.0 here" in error
    save_bytes_model(tmp_path / "model", seed=1)
    assert "models.model.weights" in refusal(capsys, *common, "--max_new_tokens=3")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    error = refusal(capsys, model, "--sets", rows, f"--output_dir={tmp_path / 'other'}")
    assert "holds files, but no evaluation" in error


def test_a_set_without_answers_needs_a_teacher(tmp_path, capsys):
    rows = write_lines(tmp_path / "bare.jsonl", [{"prompt": "100+200="}, {"prompt": "300+400="}])
    out = tmp_path / "out"
    error = refusal(capsys, "demo:student", "--sets", rows)
    assert "the set bare has no answers" in error
    assert "--teacher" in error
    cli.main([
        *("demo:student", "--sets", rows, "--teacher=demo:teacher", "--samples=3"),
        *("--max_new_tokens=5", f"--output_dir={out}"),
    ])  # fmt: skip
    capsys.readouterr()
    model = json.loads((out / "results.json").read_text())["models"]["demo:student"]
    assert "avg" not in model["sets"]["bare"]
    close = model["closeness"]["bare"]
    assert close["responses"] == 6
    assert close["kl"] > 0
    assert close["kl_teacher"] > 0
    assert -1 <= close["cosine"] < 1


def test_rows_and_fields_that_are_missing_are_named(tmp_path, capsys):
    rows = [{"question": "1+1", "answer": "2"}, {"question": "1+2", "answer": None}]
    file = write_lines(tmp_path / "gap.jsonl", rows)
    error = refusal(capsys, "demo:student", "--sets", file)
    assert "gap.jsonl:2: no field 'answer'" in error
    other = write_lines(tmp_path / "other.jsonl", [{"text": "1+1", "key": "2"}])
    error = refusal(capsys, "demo:student", "--sets", other)
    assert "no field with the prompt" in error
    assert "it has text, key" in error
    assert "did you mean aime24" in refusal(capsys, "demo:student", "--sets", "aime2024")
    assert "does not exist" in refusal(capsys, "demo:student", "--sets", "nothing.jsonl")


def test_models_that_can_not_be_evaluated(tmp_path, capsys):
    model = Path(save_bytes_model(tmp_path / "model"))
    for file in model.glob("tokenizer*"):
        file.unlink()
    error = refusal(capsys, model, "--sets", "demo")
    assert f"{model} has no tokenizer" in error
    assert "--tokenizer" in error
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refusal(capsys, tmp_path / "empty", "--sets", "demo")
    assert "no models" in refusal(capsys, "--sets", "demo")
    assert "no sets" in refusal(capsys, "demo:student")
    error = refusal(capsys, "demo:student", "demo:student", "--sets", "demo")
    assert "several models are called demo_student" in error
    assert "samples is 16 at temperature 0" in refusal(
        capsys, "demo:student", "--sets", "demo", "--temperature=0"
    )
    error = refusal(capsys, "demo:student", "--sets", "demo", "--max_new_tokens=1000")
    assert "not 1000: lower max_new_tokens" in error


def test_a_checkpoint_of_a_run_without_a_tokenizer(tmp_path, capsys):
    directory = tmp_path / "run"
    train(small_run(directory, steps=1, eval__sets={}))
    bare = tmp_path / "bare"
    shutil.copytree(directory / "student", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "has no tokenizer" in refusal(capsys, bare, "--sets", "demo")
    results = evaluate_models(demo(tmp_path / "out", models=[str(bare)], tokenizer="demo:student"))
    assert results["models"]["bare"]["sets"]["demo"]["problems"] == 12


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, capsys):
    model = save_bytes_model(tmp_path / "model")
    error = refusal(capsys, "demo:student", "--sets", "demo", f"--teacher={model}")
    assert "different vocabularies" in error


def rollouts():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (6, 12), generator=generator).tolist()
    return [Rollout(t[:4], t[4 : 7 + i], truncated=False) for i, t in enumerate(tokens)]


def test_closeness_is_what_the_definitions_say():
    student, teacher = make_model("llama", 0).eval(), make_model("llama", 1).eval()
    found = Comparer(student, teacher, 0, temperature=0.5, k=4)(rollouts(), batch_size=4)
    sums, cosines = torch.zeros(7, dtype=torch.float64), []
    for r in rollouts():
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        with torch.no_grad():
            s, t = (m(ids, output_hidden_states=True) for m in (student, teacher))
        at = slice(len(r.prompt_ids) - 1, -1)
        p, q = (o.logits[0, at].double().log_softmax(-1) for o in (s, t))
        sums[0] += (p.exp() * (p - q)).sum()
        sums[1] += (q.exp() * (q - p)).sum()
        for a, b in zip(p.topk(4).indices.tolist(), q.topk(4).indices.tolist(), strict=True):
            sums[2] += len(set(a) & set(b)) / 4
        for i, o in enumerate((s, t)):
            cold = (o.logits[0, at].double() / 0.5).log_softmax(-1)
            sums[3 + i] -= (cold.exp() * cold).sum()
        for i, log_p in enumerate((p, q)):
            sums[5 + i] -= log_p[torch.arange(len(r.response_ids)), r.response_ids].sum()
        pairs = zip(s.hidden_states[1:], t.hidden_states[1:], strict=True)
        cosines.append([torch.cosine_similarity(a[0, at], b[0, at], dim=-1) for a, b in pairs])
    tokens = sum(len(r.response_ids) for r in rollouts())
    assert found.tokens == tokens
    values = [found.kl, found.kl_teacher, found.overlap, found.entropy, found.teacher_entropy]
    values += [math.log(found.perplexity), math.log(found.teacher_perplexity)]
    assert values == pytest.approx((sums / tokens).tolist(), rel=1e-4)
    by_layer = [torch.cat(layer).mean().item() for layer in zip(*cosines, strict=True)]
    assert found.layer_cosine == pytest.approx(by_layer, abs=1e-5)


def test_a_model_is_close_to_itself_and_widths_may_differ():
    model = make_model("llama").eval()
    same = Comparer(model, model, 0, temperature=1.0, k=4)(rollouts(), batch_size=6)
    assert (same.kl, same.overlap) == (pytest.approx(0, abs=1e-6), 1.0)
    assert same.cosine == pytest.approx(1)
    wide = make_model("llama", hidden_size=64, num_hidden_layers=2).eval()
    other = Comparer(model, wide, 0, temperature=1.0, k=4)(rollouts(), batch_size=6)
    assert (other.cosine, other.layer_cosine) == (None, None)
    assert other.kl > 0


def test_responses_are_spread_over_a_set():
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, 5) == [0, 1, 2]
    assert len(spread(100, 64)) == 64


def test_interrupted_models_are_left_out_of_the_results(tmp_path, caplog):
    out = tmp_path / "out"
    evaluate_models(demo(out))
    file = out / "demo_student" / "samples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with caplog.at_level("WARNING", logger="oprd"):
        results = evaluate_models(EvalRunConfig(regrade=True, output_dir=str(out)))
    assert results["models"]["demo:student"]["sets"] == {}
    assert "47 of 48 samples of demo are there" in caplog.text
    whole = evaluate_models(demo(out))  # the missing one is sampled
    assert whole["models"]["demo:student"]["sets"]["demo"]["problems"] == 12


@pytest.mark.slow
def test_two_ranks_give_the_results_of_one(tmp_path):
    options = [
        *("demo:student", "demo:teacher", "--sets", "demo", "--limit=12", "--samples=4"),
        *("--batch_size=5", "--teacher=demo:teacher"),
    ]
    for ranks in (1, 2):
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc-per-node={ranks}", "-m", "oprd.cli.eval", *options),
                f"--output_dir={tmp_path / str(ranks)}",
            ],
            env=os.environ | {"PYTHONPATH": str(DEMO.parents[1])},
            check=True,
            timeout=900,
        )
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in "12")
    close = [r["models"]["demo:student"].pop("closeness")["demo"] for r in (one, two)]
    for r in (one, two):
        r["models"]["demo:teacher"].pop("closeness")
    assert one == two
    assert close[0]["kl"] == pytest.approx(close[1]["kl"], rel=1e-5)
    samples = [(tmp_path / n / "demo_student" / "samples.jsonl").read_text() for n in "12"]
    assert samples[0] == samples[1]
