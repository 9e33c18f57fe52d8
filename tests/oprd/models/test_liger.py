"""Liger's kernels: in the model that asks for them alone, with its results, refused with the fix.

Where liger-kernel is installed its own kernels run, in Triton's interpreter. Elsewhere a stand-in
replaces what Liger replaces, by the same means.
"""

import copy
import importlib.util
import sys
from types import MethodType, ModuleType

import pytest
import torch
from torch import nn
from transformers.models.qwen2 import modeling_qwen2

from oprd.config import StudentConfig, TeacherConfig
from oprd.distill.distiller import attach
from oprd.errors import ConfigError, Unreachable
from oprd.models import liger
from oprd.models.compile import compile_layers
from oprd.models.liger import apply_liger, check_liger, liger_problem
from oprd.models.loading import empty_model, load_model
from oprd.models.lora import add_adapter
from oprd.models.self_check import check_structure
from oprd.training.preflight import preflight
from tests.oprd.training.test_trainer import small_run
from tests.support.tiny import make_batch, make_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAMES = ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP")
INSTALLED = importlib.util.find_spec("liger_kernel") is not None


class StandIn:
    """Of liger-kernel's function for Qwen2; counts the calls of what it has put in."""

    def __init__(self):
        self.calls = {"rope": 0, "norm": 0}
        own_rope, own_norm = modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2RMSNorm

        def rope(q, k, cos, sin, unsqueeze_dim=1):
            assert not q.is_meta
            self.calls["rope"] += 1
            return own_rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

        def norm(module, x):
            assert not x.is_meta
            self.calls["norm"] += 1
            return own_norm.forward(module, x)

        def apply(model, rope=True, rms_norm=True, fused_linear_cross_entropy=True, **_):
            modeling_qwen2.apply_rotary_pos_emb = self.rope
            modeling_qwen2.Qwen2RMSNorm = nn.Identity
            assert not fused_linear_cross_entropy
            for module in model.modules():
                if isinstance(module, own_norm):
                    module.forward = MethodType(norm, module)

        self.rope, self.apply = rope, apply

    def apply_to_instance(self, model, **options):
        self.apply(model, **options)


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn()
    module = ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": made.apply}
    module._apply_liger_kernel_to_instance = made.apply_to_instance
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    own = {name: getattr(modeling_qwen2, name) for name in NAMES}
    yield made
    assert own == {name: getattr(modeling_qwen2, name) for name in NAMES}


def demo(tmp_path, **changes):
    """A saved Qwen2, as an option of a run."""
    make_model("qwen2").save_pretrained(tmp_path / "qwen2")
    return StudentConfig(str(tmp_path / "qwen2"), "float32", **changes)


def test_only_the_model_itself_changes(stand_in, tmp_path):
    cfg = demo(tmp_path, liger=True)
    ids = make_batch()[0]
    plain, fast = load_model(TeacherConfig(cfg.path, "float32")), load_model(cfg)
    after = load_model(TeacherConfig(cfg.path, "float32"))
    with torch.no_grad():
        expected = plain(ids).logits
        assert torch.equal(after(ids).logits, expected)
        assert stand_in.calls == {"rope": 0, "norm": 0}
        assert torch.equal(fast(ids).logits, expected)
    assert stand_in.calls == {"rope": 3, "norm": 7}  # 3 layers
    check_structure(fast.config, [0, 2], "student")  # without weights: would run into an assertion
    assert fast.state_dict().keys() == plain.state_dict().keys()
    empty = empty_model(cfg)  # of the ranks that read no weights
    empty.load_state_dict(plain.state_dict())
    with torch.no_grad():
        empty(ids)
    assert stand_in.calls == {"rope": 6, "norm": 14}


@pytest.mark.parametrize("adapted", [False, True])
def test_taps_adapters_and_checkpointing_stay(stand_in, tmp_path, adapted):
    results = []
    for on in (False, True):
        cfg = demo(tmp_path, liger=on)
        student, teacher = load_model(cfg), make_model("qwen2", 1)
        if adapted:
            cfg.lora.rank = 2
            add_adapter(student, cfg.lora, 0)
        student.train()
        student.gradient_checkpointing_enable({"use_reentrant": False})
        distiller = attach(student, teacher, layers="all")
        ids, attention, response = make_batch()
        out = distiller(ids, attention, response)
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad for p in student.parameters())])
        distiller.detach()
    assert stand_in.calls["rope"] > 3
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_what_is_missing_is_said_with_the_fix(stand_in, monkeypatch, tmp_path):
    qwen, gpt = make_model("qwen2").config, make_model("gpt2").config
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    with pytest.raises(Unreachable, match=r"student.liger=true .* need a GPU, and the device is"):
        check_liger(qwen, "student", CPU)
    check_liger(qwen, "student", GPU)
    with pytest.raises(ConfigError, match="no kernels for the architecture gpt2: leave"):
        check_liger(gpt, "teacher", GPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "pip install liger-kernel" in liger_problem(GPU)
    cfg = small_run(tmp_path / "run")
    cfg.teacher.liger = True
    with pytest.raises(Unreachable, match=r"teacher.liger=true .* the CPU: leave the option out"):
        preflight(cfg)


def test_a_liger_that_cannot_be_imported_is_said(monkeypatch):
    def fail():
        raise ImportError("liger-kernel requires transformers >= 99")

    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(liger, "_known", fail)
    assert "can't be imported: liger-kernel requires transformers >= 99" in liger_problem(GPU)


def test_a_model_in_which_nothing_is_replaced_is_refused(stand_in, monkeypatch):
    module = sys.modules["liger_kernel.transformers.monkey_patch"]
    monkeypatch.setattr(module, "_apply_liger_kernel_to_instance", lambda **_: None)
    monkeypatch.setattr(liger, "version_of", lambda _: "0")
    with pytest.raises(ConfigError, match="replaced nothing in Qwen2ForCausalLM"):
        apply_liger(make_model("qwen2"))


@pytest.mark.exhaustive
def test_layers_compile(stand_in):
    model = make_model("qwen2", num_hidden_layers=1).eval()
    ids = make_batch()[0]
    expected = model(ids).logits
    apply_liger(model)
    compile_layers(model)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert stand_in.calls["rope"] > 0  # while it was traced


# Liger's own kernels ------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """Where Liger's kernels run: on a GPU, or in Triton's interpreter, which leaves floats and
    libdevice as they are."""
    if torch.cuda.is_available():
        return GPU
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is not set")
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm

    own = interpreter._implicit_cvt

    def convert(arg):
        if type(arg) is float:
            handle = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return own(arg)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1  # noqa: E731
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", tanh)
    return CPU


@pytest.mark.skipif(not INSTALLED, reason="liger-kernel is not installed")
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "phi3", "gemma2"])
def test_loss_and_gradients_are_equal(device, architecture):
    plain, teacher = (make_model(architecture, seed).to(device) for seed in (0, 1))
    fast = copy.deepcopy(plain)
    apply_liger(fast)
    changed = [n for n, m in fast.named_modules() if "forward" in vars(m)]
    assert any("self_attn" in name for name in changed)  # RoPE
    assert sum("norm" in name for name in changed) >= 7
    assert sum("mlp" in name for name in changed) == 3
    ids, attention, response = (x[:2, :8].to(device) for x in make_batch())
    results = []
    for student in (plain, fast):
        out = attach(student, teacher, layers="all", kind="mse")(ids, attention, response)
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad for p in student.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-5 * a.norm()
