"""Rollouts packed in one row give what padded ones give."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from oprd.config import OBJECTIVES, DistillConfig, OpdConfig, TeacherConfig
from oprd.data.collate import collate
from oprd.data.rollout import Rollout
from oprd.data.supervision import supervise
from oprd.distill.distiller import attach
from oprd.distill.objectives import REP, Objectives
from oprd.errors import ConfigError
from oprd.models.decoder import find_decoder
from oprd.models.packing_check import check_packing
from oprd.tokenizers.alignment import Reading
from oprd.training.metrics import rep_metrics
from oprd.training.preflight import preflight
from oprd.training.trainer import Trainer, train
from tests.oprd.distill.test_attach_with_bridge import make_bridge
from tests.oprd.training.test_trainer import small_run, steps_of
from tests.support.tiny import ARCHITECTURES, COMMON, VOCAB, make_batch, make_model

OPD = [name for name in OBJECTIVES if name != REP]
FLEX = {"hidden_size": 64, "head_dim": 16}  # its heads must be at least 16 wide


def make_rollouts(seed=0, other_tokenizer=False):
    """Prompts and responses of many lengths, one of a single token and one without a response."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    rollouts = []
    for p, r in [(4, 8), (3, 5), (1, 1), (5, 0), (6, 11)]:
        reading = None
        if other_tokenizer:
            pairs = [(i, i + 1) for i in range(0, r, 2)]
            reading = Reading(draw(p + 2), draw(r + 1), pairs)
        rollouts.append(Rollout(draw(p), draw(r), False, reading=reading))
    return rollouts


def found(student, teacher, packed, weights, rollouts, bridge=None, d=None, **opd):
    """Losses, statistics and gradients on one batch."""
    d = d or DistillConfig()
    distillers = {}
    if REP in weights:
        distillers[""] = attach(
            student, teacher, layers=d.layers, kind=d.kind, positions=d.positions, k=d.k,
            shift=d.shift, reduction=d.reduction, bridge=bridge,
        )  # fmt: skip
    opd = OpdConfig(**({"k": 4, "chunk_tokens": 5} | opd))
    objectives = Objectives(weights, student, {"": teacher}, distillers, d, opd)
    student.zero_grad()
    batch = collate(rollouts, 0, "cpu", packed=packed)
    assert (len(batch.input_ids) == 1) == packed
    chosen = objectives.supervise(batch)
    totals = {n: (chosen.rep if n == REP else chosen.opd).total for n in weights}
    out = objectives.student_pass(batch, chosen, objectives.teacher_pass(batch, chosen, ""), totals)
    out.loss.backward()
    values = {name: loss.item() for name, loss in out.parts.items()}
    if out.rep is not None:
        layers = out.rep.layer_losses.tolist()
        values |= {f"layer {i}": loss for i, loss in enumerate(layers)}
        values |= rep_metrics([out.rep], layers, 32, torch.device("cpu"))
        del values["rep/layer_loss"]
        cosines = values.pop("rep/layer_cosine")
        values |= {f"cosine {i}": cosine for i, cosine in enumerate(cosines)}
    for distiller in distillers.values():
        distiller.detach()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return totals, values, gradients


def assert_same(packed, padded):
    assert packed[0] == padded[0]
    assert packed[1] == pytest.approx(padded[1], rel=2e-5, abs=1e-6)
    assert packed[2].keys() == padded[2].keys()
    largest = max(g.abs().max() for g in padded[2].values())
    assert largest > 1e-5
    for name, gradient in padded[2].items():
        difference = (packed[2][name] - gradient).abs().max()
        assert difference <= 1e-4 * gradient.abs().max() + 1e-6 * largest, name


def compare(student, teacher, weights, **options):
    options.setdefault("rollouts", make_rollouts())
    packed, padded = (found(student, teacher, p, weights, **options) for p in (True, False))
    assert_same(packed, padded)


@pytest.mark.parametrize("implementation", ["chunked", "materialised"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_objective(architecture, name, implementation):
    student, teacher = (make_model(architecture, seed) for seed in (0, 1))
    compare(student, teacher, {name: 1.0}, implementation=implementation)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, attention, checkpointing):
    student, teacher = (make_model(architecture, seed) for seed in (0, 1))
    for model in (student, teacher):
        if attention == "sdpa" and not model._supports_sdpa:
            pytest.skip(f"transformers has no sdpa for {architecture}")
        model.set_attn_implementation(attention)
        check_packing(find_decoder(model), "model")
    if checkpointing:
        student.train()
        student.gradient_checkpointing_enable({"use_reentrant": False})
    compare(student, teacher, {REP: 2.0, "opd_full": 1.0})


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean"])
@pytest.mark.parametrize("shift", ["after", "before"])
@pytest.mark.parametrize("positions", ["all", "last", "last_k", "first_k"])
@pytest.mark.parametrize("other_tokenizer", [False, True])
def test_positions_shift_reduction_and_another_tokenizer(
    other_tokenizer, positions, shift, reduction
):
    student = make_model("qwen2")
    teacher = make_model("llama", 1, hidden_size=48, num_hidden_layers=5)
    rollouts = make_rollouts(other_tokenizer=other_tokenizer)
    bridge = make_bridge(student, teacher)
    d = DistillConfig(positions=positions, k=3, shift=shift, reduction=reduction, kind="nmse")
    compare(student, teacher, {REP: 1.0}, bridge=bridge, d=d, rollouts=rollouts)


@pytest.mark.parametrize("layers", ["last", "even", [0, 2]], ids=str)
@pytest.mark.parametrize("name", [REP, "opd_full"])
def test_layers_and_prompts_of_the_teachers_own(layers, name):
    told = [
        Rollout(r.prompt_ids, r.response_ids, False, reading=Reading([7, 8, *r.prompt_ids],
                r.response_ids))
        for r in make_rollouts()
    ]  # fmt: skip
    mixed = [*told[:2], *make_rollouts()[2:]]
    student, teacher = (make_model("qwen3", seed) for seed in (0, 1))
    for implementation in ("chunked", "materialised"):
        compare(student, teacher, {name: 1.0}, rollouts=mixed, d=DistillConfig(layers=layers),
                implementation=implementation)  # fmt: skip


def test_rows_are_the_same_tokens_of_each_rollout():
    rollouts = make_rollouts()
    padded, packed = (collate(rollouts, 0, "cpu", packed=p) for p in (False, True))
    assert packed.input_ids.shape == packed.position_ids.shape == (1, sum(map(len, rollouts)))
    assert packed.attention_mask is None
    assert packed.position_ids[0].tolist() == [i for r in rollouts for i in range(len(r))]
    for positions in ("all", "last", "last_k", "first_k"):
        for shift in ("after", "before"):
            one, other = (
                supervise(b.response_mask, positions, 3, shift, "seq-mean",
                          position_ids_BT=b.position_ids)
                for b in (padded, packed)
            )  # fmt: skip
            assert one.total == other.total
            assert torch.equal(one.weights, other.weights)
            ids = [b.input_ids.flatten()[c.rows] for b, c in ((padded, one), (packed, other))]
            assert torch.equal(*ids)


def test_before_needs_a_prompt_before_each_of_them():
    batch = collate([Rollout([3], [4], False), Rollout([], [5, 6], False)], 0, "cpu", packed=True)
    with pytest.raises(ValueError, match="starts at position 0"):
        supervise(batch.response_mask, shift="before", position_ids_BT=batch.position_ids)


def test_users_may_pack_themselves():
    student, teacher = (make_model("gemma3", seed) for seed in (0, 1))
    ids, attention, response = make_batch()
    kept = attention.bool()
    positions = (attention.cumsum(-1) - 1)[kept][None]
    gradients = []
    distiller = attach(student, teacher, positions="last_k", k=3, reduction="seq-mean")
    for batch in [(ids, attention, response), (ids[kept][None], None, response[kept][None],
                                               positions)]:  # fmt: skip
        student.zero_grad()
        out = distiller(*batch)
        out.loss.backward()
        weight = student.model.layers[0].mlp.up_proj.weight
        gradients.append((out.loss.item(), weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    assert torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="without an attention_mask"):
        distiller(ids, attention, response, (attention.cumsum(-1) - 1))
    with pytest.raises(ValueError, match=r"one row \(1, T\), got \(3, 12\)"):
        distiller(ids, None, response, (attention.cumsum(-1) - 1))


# Models that do not keep sequences apart ----------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3"])
def test_flex_attention_keeps_them_apart(architecture):
    model = make_model(architecture, **FLEX).eval()
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # it compiles for half a minute otherwise
        check_packing(find_decoder(model), "student")


def blind(module, query, key, value, attention_mask, **kwargs):
    """Causal attention that knows of no packing."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_without_packing_is_found_out(dtype):
    AttentionInterface.register("blind", blind)
    model = make_model("qwen2").eval().to(dtype)
    check_packing(find_decoder(model), "student")
    model.set_attn_implementation("blind")
    with pytest.raises(
        ConfigError, match=r"the student \(Qwen2ForCausalLM, attn_implementation blind\) lets"
    ):
        check_packing(find_decoder(model), "student")


RECURRENT = {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
             "mamba_d_state": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "values"), [("FalconH1Config", RECURRENT), ("OPTConfig", {}), ("BloomConfig", {})]
)
def test_so_are_a_recurrent_state_and_positions_of_their_own(config, values):
    torch.manual_seed(0)
    cfg = getattr(transformers, config)(**(COMMON | values))
    with pytest.raises(ConfigError, match="lets packed sequences see each other"):
        check_packing(find_decoder(AutoModelForCausalLM.from_config(cfg).eval()), "student")


def test_experts_are_not_mistaken_for_a_leak():
    torch.manual_seed(0)
    cfg = transformers.Qwen3MoeConfig(
        **COMMON, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(cfg).eval()
    state = torch.get_rng_state()
    check_packing(find_decoder(model), "student")
    check_packing(find_decoder(model.to(torch.bfloat16)), "student")
    assert torch.equal(torch.get_rng_state(), state)


# Runs ---------------------------------------------------------------------------------------------


def fixed_rollouts(self):
    """Of the step, as long as they please."""
    generator = torch.Generator().manual_seed(self.step)

    def draw(n):
        return torch.randint(2, 15, (n,), generator=generator).tolist()

    shapes = torch.randint(1, 20, (12, 2), generator=generator).tolist()
    return [Rollout(draw(p), draw(r), True) for p, r in shapes], {}


@pytest.mark.parametrize("objectives", [{REP: 1.0}, {REP: 1.0, "opd_topk": 0.5}], ids=str)
def test_a_run_ends_with_the_same_weights(tmp_path, monkeypatch, objectives):
    """Under SGD, as AdamW's first steps are signs, which rounding flips."""
    monkeypatch.setattr(Trainer, "_rollouts", fixed_rollouts)
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda params, lr, **_: torch.optim.SGD(params, lr=lr)
    )
    weights, steps = [], []
    for packing in (False, True):
        run = tmp_path / str(packing)
        cfg = small_run(run, packing=packing, objectives=objectives, micro_batch_tokens=90,
                        optim__lr=0.05, opd__k=4, eval__sets={})  # fmt: skip
        student = AutoModelForCausalLM.from_pretrained(train(cfg).student)
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
        steps.append(steps_of(run))
    assert torch.allclose(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    for padded, packed in zip(*steps, strict=True):
        for name in ("actor/rep_loss", "actor/grad_norm", "rep/cosine_similarity"):
            assert packed[name] == pytest.approx(padded[name], rel=1e-5), name
        assert packed["perf/padding_ratio"] == 0 < padded["perf/padding_ratio"]
        assert packed["perf/rank_imbalance"] == padded["perf/rank_imbalance"] == 1


def test_a_run_with_a_model_that_cannot_pack_ends_before_its_first_step(tmp_path, monkeypatch):
    AttentionInterface.register("blind", blind)
    teacher = TeacherConfig("demo:teacher", attn_implementation="blind")
    cfg = small_run(tmp_path / "run", packing=True, teacher=teacher, eval__teacher=False)
    monkeypatch.setattr(Trainer, "_rollouts", lambda *_: pytest.fail("it began"))
    with pytest.raises(ConfigError, match=r"the teacher .*attn_implementation blind"):
        train(cfg)


def test_the_user_is_told_what_sdpa_costs(tmp_path):
    cfg = small_run(tmp_path / "run", packing=True)
    assert any("packing with sdpa" in note for note in preflight(cfg).notes)
    cfg.student.attn_implementation = cfg.teacher.attn_implementation = "flex_attention"
    assert not any("packing" in note for note in preflight(cfg).notes)
