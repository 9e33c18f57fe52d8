"""OPD's objectives against their definitions in float64, and the two ways to compute them."""

import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.small_models import make, small_config
from oprd.distill.chunked import CPU_BYTES, chunk_rows, chunked
from oprd.distill.vocab_gradients import gradient_
from oprd.distill.vocab_losses import VocabLoss, materialised
from oprd.errors import ConfigError
from oprd.models.decoder import find_decoder
from oprd.models.lm_head import HeadRows, LMHead, multiply
from oprd.models.self_check import check_head
from tests.support.tiny import COMMON, make_model

FORMS = ("top1", "topk", "topk_advantage", "topk_raw", "full", "full_forward", "jsd")
M, V, D = 13, 40, 8


@pytest.fixture
def logits():
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(M, V, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (M,))


def gradient(loss, student):
    return torch.autograd.grad(loss.sum(), student)[0]


def test_top1_is_the_policy_gradient_of_the_sampled_log_ratio(logits):
    student, teacher, tokens = logits
    losses = VocabLoss("top1").row_losses(student, teacher, tokens)
    log_p = student.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    log_q = teacher.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert torch.allclose(losses, log_p - log_q)
    expected = gradient((log_p - log_q).detach() * log_p, student)
    assert torch.allclose(gradient(losses, student), expected)


def test_expected_top1_gradient_is_that_of_the_full_kl(logits):
    """Theory (1): E_p[u s] = grad KL(p||q), enumerating the vocabulary."""
    student, teacher, _ = logits
    p = student.detach().softmax(-1)
    expected = torch.zeros_like(student)
    for v in range(V):
        losses = VocabLoss("top1").row_losses(student, teacher, torch.full((M,), v))
        expected += p[:, v, None] * gradient(losses, student)
    full = gradient(VocabLoss("full").row_losses(student, teacher, None), student)
    assert torch.allclose(expected, full)


@pytest.mark.parametrize("form", ["topk", "topk_advantage", "topk_raw"])
def test_top_k_of_the_whole_vocabulary_is_the_full_kl(logits, form):
    student, teacher, tokens = logits
    full = gradient(VocabLoss("full").row_losses(student, teacher, tokens), student)
    losses = VocabLoss(form, k=V).row_losses(student, teacher, tokens)
    assert torch.allclose(gradient(losses, student), full)


def test_identity_between_the_two_top_k_gradients(logits):
    """g_code = grad KL(p_bar||q_bar) + E_p_bar[log p - log q] grad log sum_S p."""
    student, teacher, tokens = logits
    k = 5
    code = gradient(VocabLoss("topk_advantage", k).row_losses(student, teacher, tokens), student)
    renormalised = gradient(VocabLoss("topk", k).row_losses(student, teacher, tokens), student)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    top = student.topk(k).indices
    ratio = (log_p - log_q).gather(-1, top).detach()
    mean = (log_p.gather(-1, top).softmax(-1).detach() * ratio).sum(-1)
    mass = gradient(mean * log_p.gather(-1, top).logsumexp(-1), student)
    assert torch.allclose(code, renormalised + mass)


def test_teachers_support(logits):
    student, teacher, tokens = logits
    top = teacher.topk(3).indices
    log_p = student.gather(-1, top).log_softmax(-1)
    log_q = teacher.gather(-1, top).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    losses = VocabLoss("topk", 3, "teacher").row_losses(student, teacher, tokens)
    assert torch.allclose(losses, expected)


def test_full_forward_is_torchs_kl(logits):
    student, teacher, tokens = logits
    losses = VocabLoss("full_forward").row_losses(student, teacher, tokens)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(losses, expected)


def test_jsd_is_symmetric_and_at_most_log_2(logits):
    student, teacher, tokens = logits
    losses = VocabLoss("jsd").row_losses(student, teacher, tokens)
    p, q = student.softmax(-1), teacher.softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert torch.allclose(losses, expected)
    assert torch.allclose(losses, VocabLoss("jsd").row_losses(teacher, student, tokens))
    apart = torch.tensor([[0.0, 500.0]]), torch.tensor([[500.0, 0.0]])
    assert VocabLoss("jsd").row_losses(*apart, tokens).item() == pytest.approx(math.log(2))


def test_top_k_of_one_token_is_refused():
    with pytest.raises(ValueError, match="always 0"):
        VocabLoss("topk", k=1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "topk"])
def test_gradients_by_hand_are_those_of_autograd(logits, form, support, temperature):
    student, teacher, tokens = logits
    loss = VocabLoss(form, 5, support, temperature)
    expected = loss.row_losses(student, teacher, tokens)
    ours, theirs = student.detach().clone(), teacher.clone()
    assert torch.allclose(gradient_(loss, ours, theirs, tokens), expected, atol=1e-14)
    assert torch.allclose(ours, gradient(expected, student), atol=1e-14)


def test_far_apart_logits_have_finite_gradients():
    """Where p or q underflows, in float32."""
    student = torch.tensor([[0.0, -200.0, 3.0]])
    teacher = torch.tensor([[-300.0, 0.0, 2.0]])
    tokens = torch.tensor([1])
    for form in FORMS:
        loss = VocabLoss(form, k=2)
        if form == "topk":
            continue
        wide = student.double().requires_grad_()
        expected = loss.row_losses(wide, teacher.double(), tokens)
        ours = student.clone()
        assert torch.allclose(gradient_(loss, ours, teacher.clone(), tokens).double(), expected)
        assert torch.allclose(ours.double(), gradient(expected, wide), rtol=1e-5)


def test_rows_in_a_chunk():
    assert chunk_rows(151_936, on_gpu=True) == (1 << 30) // (3 * 151_936 * 4)
    assert chunk_rows(151_936, on_gpu=False) == 147
    assert chunk_rows(10**9, on_gpu=True) == 16


def both_ways(loss, dtype, chunk, weighted, bias=False, softcap=None):
    """(loss, d states, d weight, d bias) from the whole and in chunks."""
    torch.manual_seed(0)
    base = torch.randn(M, D, dtype=torch.float64).to(dtype)
    weight0 = torch.randn(V, D, dtype=torch.float64).to(dtype)
    bias0 = torch.randn(V, dtype=torch.float64).to(dtype) if bias else None
    states = torch.randn(M, D + 1, dtype=torch.float64).to(dtype)
    theirs = LMHead(torch.randn(V + 3, D + 1, dtype=torch.float64).to(dtype), scale=0.5)
    teacher = 0.5 * states @ theirs.weight.T
    tokens = torch.randint(V, (M,))
    weights = torch.rand(M) if weighted else None
    results = []
    for in_chunks in (False, True):
        h, w = base.clone().requires_grad_(), weight0.clone().requires_grad_()
        b = None if bias0 is None else bias0.clone().requires_grad_()
        head = LMHead(w, b, softcap)
        if in_chunks:
            rows = HeadRows(theirs, states)
            value = chunked(loss, h, head, rows, tokens, weights, 7.0, chunk)
        else:
            out = h @ w.T if b is None else h @ w.T + b
            out = out if softcap is None else softcap * (out / softcap).tanh()
            rows = torch.arange(M)
            value = materialised(loss, out[None], teacher[None], rows, tokens, weights, 7.0)
        (3 * value).backward()
        results.append([value.detach(), h.grad, w.grad] + ([] if b is None else [b.grad]))
    return results


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_give_the_same_loss_and_gradients(form, chunk, weighted):
    whole, parts = both_ways(VocabLoss(form, k=4), torch.float32, chunk, weighted)
    for expected, got in zip(whole, parts, strict=True):
        assert got.dtype == expected.dtype
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("form", ["topk", "topk_advantage", "full"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bias_and_softcap(softcap, form, support):
    loss = VocabLoss(form, 4, support)
    whole, parts = both_ways(loss, torch.float32, 4, True, True, softcap)
    for expected, got in zip(whole, parts, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_second_backward_of_the_chunked_loss_raises():
    h = torch.randn(M, D, requires_grad=True)
    head = LMHead(torch.randn(V, D))
    teacher = HeadRows(head, torch.randn(M, D))
    tokens = torch.zeros(M, dtype=torch.int64)
    value = chunked(VocabLoss("full"), h, head, teacher, tokens, None, 1.0)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward"):
        value.backward()


def test_no_tensor_of_rows_by_vocabulary(peak_bytes):
    m, v, d = 8192, 8192, 16
    h, weight = torch.randn(m, d, requires_grad=True), torch.randn(v, d)
    teacher = HeadRows(LMHead(torch.randn(v, d)), torch.randn(m, d))
    tokens = torch.zeros(m, dtype=torch.int64)
    head = LMHead(weight)

    def run(rows):
        chunked(VocabLoss("full"), h, head, teacher, tokens, None, 1.0, rows).backward()

    run(64)
    assert peak_bytes(lambda: run(64)) < m * v * 4 / 16
    # A chunk's temporaries are what `chunk_rows` counts.
    rows = chunk_rows(v, on_gpu=False)
    run(None)
    assert 0.8 * CPU_BYTES < rows * v * 4 * 3 <= CPU_BYTES
    assert peak_bytes(lambda: run(None)) < 1.15 * CPU_BYTES


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_top1_is_unbiased_at_the_temperature_of_the_rollouts(temperature):
    """Its expectation over the tokens that may be drawn is the gradient of KL(p||q), where p and q
    are the distributions at that temperature."""
    torch.manual_seed(0)
    student = (3 * torch.randn(1, 15, dtype=torch.float64)).requires_grad_()
    teacher = 3 * torch.randn(1, 15, dtype=torch.float64)
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    wanted = gradient((log_p.exp() * (log_p - log_q)).sum(), student)
    loss = VocabLoss("top1", temperature=temperature)
    expected = torch.zeros_like(student)
    for token, probability in enumerate(log_p.exp()[0].tolist()):
        value = loss.row_losses(student, teacher, torch.tensor([token]))
        expected += probability * gradient(value, student)
    assert torch.allclose(expected, wanted, atol=1e-12)


def test_head_of_a_model():
    model = make_model("llama")
    head = LMHead.of(model)
    assert head.weight is model.get_output_embeddings().weight
    states = torch.randn(3, model.config.hidden_size)
    expected = model.lm_head(states)
    products = multiply(states, head.operand(states).T)
    assert torch.allclose(head.logits_(products), expected, atol=1e-6)


SCALED = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "num_key_value_heads": 2},
    "falcon_h1": {
        "lm_head_multiplier": 0.05, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_state": 8, "num_key_value_heads": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_heads_that_scale(kind):
    config = CONFIG_MAPPING[kind](**(COMMON | SCALED[kind]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert LMHead.of(model).scale in (0.25, 1 / 8, 0.05)
    check_head(model, find_decoder(model), "student")
    states = torch.randn(6, 32, requires_grad=True)
    rows, tokens = HeadRows(LMHead.of(model), torch.randn(6, 32)), torch.zeros(6, dtype=torch.int64)
    teacher = rows.logits(slice(6))
    loss = VocabLoss("full")
    logits = model.lm_head(states) * LMHead.of(model).scale
    wanted = torch.autograd.grad(loss.row_losses(logits, teacher, tokens).mean(), states)[0]
    ours = chunked(loss, states, LMHead.of(model), rows, tokens, None, 6.0, chunk=4)
    assert torch.allclose(torch.autograd.grad(ours, states)[0], wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "gemma2"])
def test_heads_that_cap(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model = make(small_config(kind))
    head, states = LMHead.of(model), 40 * torch.randn(6, 32)
    assert head.softcap == 30
    expected = 30 * (model.lm_head(states) / 30).tanh()
    products = multiply(states, head.operand(states).T)
    assert torch.allclose(head.logits_(products), expected, atol=1e-4)
    with torch.no_grad():  # logits of a size that caps show in
        model.lm_head.weight.mul_(200)
    check_head(model, find_decoder(model), "student")


def test_a_head_that_does_something_else_is_refused():
    model = make_model("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda h: 0.5 * head(h)
    with pytest.raises(
        ConfigError, match=r"the student \(LlamaForCausalLM\) does more .*materialised"
    ):
        check_head(model, find_decoder(model), "student")
