"""Measurements after training: the theory's numbers against autograd, and a student's measures."""

import json
import random

import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from oprd.bridge.bank import save_bridge
from oprd.data.rollout import Rollout
from oprd.distill.vocab_losses import VocabLoss
from oprd.errors import ConfigError
from oprd.paper.after import COUNTS, Comparison, measure
from oprd.paper.learn import make_model
from oprd.paper.task import make_other_tokenizer, make_splits, make_tokenizer, write_problems
from oprd.paper.theory import GradientNoise, means_by_k, sampled_gradient_moments
from tests.oprd.distill.test_attach_with_bridge import make_bridge

STATE_KEYS = {"cosine", "cosine_last_layer", "cosine_first_k", "cosine_last_k"}
VOCABULARY_KEYS = {"kl", "overlap", "entropy", "teacher_entropy", "token_variance", "snr"}
SIZE = {"responses": 6, "batches": 3}


def make(seed, width=32, layers=2, tokenizer=None):
    torch.manual_seed(seed)
    model = make_model(tokenizer or make_tokenizer(), width, layers).eval()
    with torch.no_grad():  # random heads predict all tokens alike
        model.lm_head.weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories of models, and prompts."""
    root = tmp_path_factory.mktemp("after")
    models = {
        "student": make(0),
        "teacher": make(1),
        "wide": make(2, width=48, layers=3),
        "other": make(3, width=48, tokenizer=make_other_tokenizer()),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer = make_other_tokenizer() if name == "other" else make_tokenizer()
        tokenizer.save_pretrained(root / name)
    save_bridge(make_bridge(models["student"], models["wide"]), root / "bridge.safetensors")
    write_problems(root / "val.jsonl", make_splits().val[:10])
    return root


def rollouts(count=6):
    rng = random.Random(0)
    return [
        Rollout(
            [3 + rng.randrange(10) for _ in range(5)],
            [3 + rng.randrange(25) for _ in range(rng.randint(3, 9))],
            truncated=True,
        )
        for _ in range(count)
    ]


def predicting_states(model, rollout):
    """Hidden states of all layers that predict the response's tokens, and their logits."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    out = model(input_ids=ids, output_hidden_states=True)
    at = slice(len(rollout.prompt_ids) - 1, -1)
    return [h[0, at] for h in out.hidden_states[1:]], out.logits[0, at]


def test_moments_of_the_sampled_gradient_are_those_of_autograd_over_the_vocabulary():
    torch.manual_seed(0)
    rows, vocabulary, width = 3, 11, 6
    head, other = torch.randn(2, vocabulary, width, dtype=torch.float64)
    h = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(rows, width, dtype=torch.float64) @ other.T
    variance, mean_square = sampled_gradient_moments((h @ head.T).detach(), teacher, head)

    p = (h @ head.T).softmax(-1).detach()
    kl = kl_div(
        log_softmax(teacher, -1), log_softmax(h @ head.T, -1), log_target=True, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(kl, h)
    torch.testing.assert_close(mean_square, gradient.square().sum(-1))
    sampled = []
    for y in range(vocabulary):
        loss = VocabLoss("top1").row_losses(h @ head.T, teacher, torch.full((rows,), y)).sum()
        sampled.append(torch.autograd.grad(loss, h)[0])
    gap = torch.stack(sampled) - gradient
    torch.testing.assert_close(variance, (p.T * gap.square().sum(-1)).sum(0))
    assert (variance > 0).all()


def test_ratio_is_from_the_trace_of_the_sample_covariance():
    torch.manual_seed(0)
    noise, gradients = GradientNoise(), torch.randn(5, 7) + 1
    for gradient in gradients:
        noise.add(gradient)
    trace = gradients.double().T.cov().trace().item()
    mean = gradients.double().mean(0).square().sum().item()
    assert noise.ratio() == pytest.approx((mean - trace / 5) / trace)


def test_ratio_finds_signal_in_noise_and_none_where_there_is_none():
    torch.manual_seed(0)
    signal, only_noise = GradientNoise(), GradientNoise()
    for _ in range(2000):  # |mean|^2 = 0.5, trace = 2
        g = torch.randn(8) / 2
        signal.add(g + 0.25)
        only_noise.add(g)
    assert signal.ratio() == pytest.approx(0.25, rel=0.1)
    assert only_noise.ratio() < 0.01
    opposite = GradientNoise()
    for g in (torch.ones(3), -torch.ones(3)):
        opposite.add(g)
    assert opposite.ratio() == 0  # its estimate of |E g|^2 is below 0


def test_ratio_of_equal_gradients_and_of_one():
    noise = GradientNoise()
    noise.add(torch.ones(3))
    with pytest.raises(ValueError, match="at least two"):
        noise.ratio()
    noise.add(torch.ones(3))
    assert noise.ratio() is None


def test_means_over_the_first_and_last_tokens():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])  # responses of 3 tokens and of 1
    assert means_by_k(values, [3, 1], [1, 2, 9]) == [[1, 5.5], [2, 13 / 3], [9, 4.0]]
    assert means_by_k(values, [3, 1], [1, 2, 9], last=True) == [[1, 6.5], [2, 5.0], [9, 4.0]]


def test_cosines_are_those_of_the_states_that_predict_the_tokens():
    student, teacher, found = make(0), make(1), rollouts()
    by_token = Comparison(student, teacher, 0, 28).by_token(found)
    closeness = Comparison(student, teacher, 0, 28).closeness(found)
    with torch.no_grad():
        pairs = [[predicting_states(m, r)[0][-1] for m in (student, teacher)] for r in found]
        cosines = [cosine_similarity(*pair, dim=-1) for pair in pairs]
    everything = torch.cat(cosines).mean().item()
    assert by_token["cosine_first_k"][0] == [
        1,
        pytest.approx(sum(c[0].item() for c in cosines) / 6),
    ]
    assert by_token["cosine_last_k"][0] == [
        1,
        pytest.approx(sum(c[-1].item() for c in cosines) / 6),
    ]
    for end in (by_token["cosine_first_k"], by_token["cosine_last_k"]):
        assert end[-1] == [COUNTS[-1], pytest.approx(everything)]
    assert closeness["cosine_last_layer"] == pytest.approx(everything)


def test_ratios_are_of_gradients_by_all_weights():
    """Against autograd without padding, taps and batches."""
    student, teacher, found = make(0), make(1), rollouts()
    ratios = Comparison(student, teacher, 0, 28).signal_to_noise(found, batches=3, seed=4)
    order, noises = random.Random(4).sample(found, 6), {}
    for part in (order[i::3] for i in range(3)):
        losses = {"opd_top1": [], "opd_full": [], "oprd": []}
        for r in part:
            states, logits = predicting_states(student, r)
            with torch.no_grad():
                targets, q = predicting_states(teacher, r)
            log_p, log_q = logits.log_softmax(-1), q.log_softmax(-1)
            chosen = torch.arange(len(r.response_ids)), torch.tensor(r.response_ids)
            u = (log_p - log_q)[chosen].detach()
            losses["opd_top1"].append(u * log_p[chosen])
            losses["opd_full"].append((log_p.exp() * (log_p - log_q)).sum(-1))
            gaps = [(s - t).square().mean(-1) for s, t in zip(states, targets, strict=True)]
            losses["oprd"].append(torch.stack(gaps).mean(0))
        for name, values in losses.items():
            student.zero_grad()
            torch.cat(values).mean().backward(retain_graph=True)
            gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
            noises.setdefault(name, GradientNoise()).add(torch.cat(gradients))
            student.zero_grad(set_to_none=True)
    for name, noise in noises.items():
        assert ratios[name] == pytest.approx(noise.ratio(), rel=1e-3)


def test_resampling_a_token_changes_only_the_gradient_of_the_state_after_it():
    comparison = Comparison(make(0), make(1), 0, 28)
    assert comparison.resampling_variance(rollouts(), seed=0) == 0.0
    assert comparison.resampling_variance(rollouts(), seed=0, shift="after") > 0.0


def test_a_pair_of_one_shape(places):
    state = torch.get_rng_state()
    args = (places / "student", places / "teacher", places / "val.jsonl")
    found = measure(*args, **SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads(json.dumps(found)) == found
    assert found == measure(*args, **SIZE)
    assert found["tokens"] != measure(*args, **SIZE, seed=1)["tokens"]
    assert found.keys() == {"tokens", "length"} | VOCABULARY_KEYS | STATE_KEYS
    assert found["length"] == found["tokens"] / 6
    assert found["token_variance"].keys() == {"top1", "mean_square", "oprd"}
    assert found["token_variance"]["oprd"] == 0.0 < found["token_variance"]["top1"]
    assert found["snr"].keys() == {"opd_top1", "opd_full", "oprd"}


def test_a_student_that_is_its_own_teacher(places):
    found = measure(places / "student", places / "student", places / "val.jsonl", **SIZE)
    assert found["kl"] == 0 == found["token_variance"]["top1"]
    assert found["cosine"] == pytest.approx(1)
    assert "oprd" not in found["snr"]  # its gradient is 0


def test_a_teacher_of_another_shape(places):
    args = (places / "student", places / "wide", places / "val.jsonl")
    without = measure(*args, **SIZE)
    assert without.keys() == {"tokens", "length"} | VOCABULARY_KEYS
    assert without["token_variance"].keys() == {"top1", "mean_square"}
    assert without["snr"].keys() == {"opd_top1", "opd_full"}
    bridged = measure(*args, places / "bridge.safetensors", rank=2, **SIZE)
    assert bridged.keys() == without.keys() | STATE_KEYS
    assert bridged["token_variance"]["oprd"] == 0.0
    assert bridged["snr"].keys() == {"opd_top1", "opd_full", "oprd"}
    assert bridged["cosine_first_k"][-1][1] == pytest.approx(bridged["cosine_last_layer"])
    assert bridged["kl"] == without["kl"]


def test_a_teacher_with_another_tokenizer(places):
    args = (places / "student", places / "other", places / "val.jsonl")
    found = measure(*args, **SIZE)
    assert found.keys() == {"tokens", "length", "entropy"}
    same = measure(places / "student", places / "teacher", places / "val.jsonl", **SIZE)
    assert found["entropy"] == pytest.approx(same["entropy"])


def test_what_does_not_fit_is_refused(places):
    args = (places / "student", places / "teacher", places / "val.jsonl")
    with pytest.raises(ValueError, match="2 batches at least"):
        measure(*args, responses=3, batches=4)
    with pytest.raises(ValueError, match="no bridge"):
        measure(*args, rank=2)
    with pytest.raises(ConfigError, match="48 wide"):
        measure(*args, places / "bridge.safetensors", **SIZE)
