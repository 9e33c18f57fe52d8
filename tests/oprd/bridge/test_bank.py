"""A bridge's file: round trip, slices, checks; and the public code's files."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from oprd.bridge import bank
from oprd.bridge.bank import Bridge, BridgeInfo, RankReport, load_bridge, read_info, save_bridge
from oprd.bridge.import_public import read_ps_bank
from oprd.bridge.sweep import sweep_rows
from oprd.cli.bridge import main
from oprd.errors import ConfigError
from oprd.models.info import ModelInfo, fingerprint

D_S, D_T, RANK = 6, 10, 5
PAIRS = [(0, 0), (1, 2), (2, 3)]


def make_bridge(seed=0) -> Bridge:
    torch.manual_seed(seed)
    reports = [
        RankReport(r, [0.01 * r] * 3, [0.9, 0.8, 0.7], [0.1 * r] * 3, [0.5] * 3)
        for r in (1, 2, 4, 5)
    ]
    info = BridgeInfo(
        student=ModelInfo(D_S, 3, "org/student", "aa"),
        teacher=ModelInfo(D_T, 4, "org/teacher", "bb"),
        pairs=PAIRS,
        rank=RANK,
        solver="ridge",
        ridge=1e-6,
        rows=100,
        held_out_rows=11,
        positions="all",
        k=2000,
        shift="before",
        teacher_input="text",
        teacher_pairs="stable",
        ranks=reports,
    )
    blocks = [s for s, _ in PAIRS]
    return Bridge(
        {b: torch.randn(RANK, D_S) for b in blocks},
        {b: torch.randn(RANK, D_T) for b in blocks},
        {b: torch.randn(D_T) for b in blocks},
        info,
    )


def assert_same(a: Bridge, b: Bridge):
    assert a.info == b.info
    for name in ("student_proj", "teacher_proj", "teacher_mean"):
        for block, tensor in getattr(a, name).items():
            assert torch.equal(tensor, getattr(b, name)[block]), (name, block)


def test_round_trip(tmp_path):
    bridge, path = make_bridge(), tmp_path / "deep" / "b.safetensors"
    save_bridge(bridge, path)
    assert_same(load_bridge(path), bridge)
    assert read_info(path) == bridge.info
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


def test_a_file_that_exists_is_never_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "b.safetensors"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists and would be lost: choose another file"):
        save_bridge(make_bridge(), path)
    assert path.read_text() == "mine"

    late = tmp_path / "late.safetensors"  # appears while ours is being written
    original = bank.save

    def slow(*args, **kwargs):
        late.write_text("theirs")
        return original(*args, **kwargs)

    monkeypatch.setattr(bank, "save", slow)
    with pytest.raises(ConfigError, match="exists"):
        save_bridge(make_bridge(), late)
    assert late.read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "late.safetensors"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file, not a directory"):
        bank.check_new_file(tmp_path / "file" / "b.safetensors")


def test_a_lower_rank_is_a_slice(tmp_path):
    bridge, path = make_bridge(), tmp_path / "b.safetensors"
    save_bridge(bridge, path)
    low = load_bridge(path, 2)
    assert (low.info.rank, [r.rank for r in low.info.ranks]) == (2, [1, 2])
    for block, proj in bridge.student_proj.items():
        assert torch.equal(low.student_proj[block], proj[:2])
        assert torch.equal(low.teacher_proj[block], bridge.teacher_proj[block][:2])
        assert torch.equal(low.teacher_mean[block], bridge.teacher_mean[block])
    for rank in (0, 6):
        with pytest.raises(
            ConfigError,
            match=rf"rank {rank} is not available in a bridge of rank 5: choose 1 \.\. 5",
        ):
            load_bridge(path, rank)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "message"),
    [
        (
            ModelInfo(7, 3),
            ModelInfo(D_T, 4),
            PAIRS,
            r"student 6 wide \(org/student\), .* is 7 wide",
        ),
        (ModelInfo(D_S, 3), ModelInfo(9, 4), PAIRS, r"teacher 10 wide \(org/teacher\), .* 9 wide"),
        (ModelInfo(D_S, 2), ModelInfo(D_T, 4), PAIRS, "student of 3 layers .* has 2"),
        (ModelInfo(D_S, 3), ModelInfo(D_T, 8), PAIRS, "teacher of 4 layers .* has 8"),
        (
            ModelInfo(D_S, 3),
            ModelInfo(D_T, 4),
            [(0, 0), (3, 3)],
            r"no projector for student block\(s\) \[3\], only for \[0, 1, 2\]: choose distill",
        ),
        (
            ModelInfo(D_S, 3),
            ModelInfo(D_T, 4),
            [(1, 1)],
            r"pairs student block 1 with teacher block 2, relative depth \(Eq. 11\) with 1",
        ),
        (ModelInfo(D_S, 3, None, "cc"), ModelInfo(D_T, 4), PAIRS, "student with another tokenizer"),
        (ModelInfo(D_S), ModelInfo(D_T, 4, "x", "cc"), PAIRS, "teacher with another tokenizer"),
    ],
)
def test_mismatches_are_named(student, teacher, pairs, message):
    with pytest.raises(ConfigError, match=message):
        make_bridge().info.check(student, teacher, pairs)


def test_a_pair_that_fits_passes():
    info = make_bridge().info
    info.check(ModelInfo(D_S, 3, "elsewhere", "aa"), ModelInfo(D_T, 4, None, "bb"), PAIRS)
    info.check(ModelInfo(D_S), ModelInfo(D_T), [(2, 3)])


def test_several_mismatches_are_all_named():
    with pytest.raises(ConfigError, match=r"student 6 wide.*; .*teacher of 4 layers.*oprd-bridge"):
        make_bridge().info.check(ModelInfo(5, 3), ModelInfo(D_T, 5), PAIRS)


def test_matrices_must_agree_with_the_description():
    bridge = make_bridge()
    with pytest.raises(ConfigError, match=r"teacher_mean of student block 1 must be \(10,\)"):
        replace(bridge, teacher_mean={**bridge.teacher_mean, 1: torch.zeros(9)})
    with pytest.raises(ConfigError, match=r"student_proj exists for student blocks \[0\]"):
        replace(bridge, student_proj={0: bridge.student_proj[0]})


def test_files_that_are_no_bridges(tmp_path):
    with pytest.raises(ConfigError, match=r"no bridge at .*: make it with oprd-bridge fit"):
        read_info(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, this is not a bridge")
    with pytest.raises(ConfigError, match=r"not a safetensors file .*oprd-bridge import"):
        read_info(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not one that oprd-bridge wrote"):
        load_bridge(tmp_path / "other.safetensors")
    later = json.dumps({"format": 2})
    save_file({"x": torch.zeros(1)}, tmp_path / "later.safetensors", {bank.METADATA_KEY: later})
    with pytest.raises(ConfigError, match="is in format 2, this version of oprd reads 1"):
        read_info(tmp_path / "later.safetensors")


def test_fingerprints_depend_on_tokens_and_ids_alone():
    assert fingerprint({"a": 0, "b": 1}) == fingerprint({"b": 1, "a": 0})
    assert fingerprint({"a": 0, "b": 1}) != fingerprint({"a": 1, "b": 0})


# The public code's files --------------------------------------------------------------------------


def public_bank(legacy=False, **changes):
    """What its ``ps_bank.pt`` holds, by the description in method.md."""
    bridge = make_bridge()
    names = {s: f"{s}_{t}" if legacy else f"s{s}_t{t}" for s, t in PAIRS}
    held = {
        "rank": RANK,
        "projector_type": "linear",
        "layer_pairs": [{"student_layer": s, "teacher_layer": t} for s, t in PAIRS],
        "state_dict": {f"projectors.{names[b]}.weight": p for b, p in bridge.student_proj.items()},
        "frozen_pt_weights": {names[b]: p for b, p in bridge.teacher_proj.items()},
        "frozen_pt_means": {names[b]: m for b, m in bridge.teacher_mean.items()},
    }
    return held | changes


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_banks_are_read(tmp_path, legacy, dtype):
    held = public_bank(legacy)
    for name in ("state_dict", "frozen_pt_weights", "frozen_pt_means"):
        held[name] = {k: v.to(dtype) for k, v in held[name].items()}
    torch.save(held, tmp_path / "ps_bank.pt")
    found, wanted = read_ps_bank(tmp_path / "ps_bank.pt"), make_bridge()
    assert (found.info.pairs, found.info.rank, found.info.solver) == (PAIRS, RANK, "import")
    assert (found.info.student, found.info.teacher) == (ModelInfo(D_S), ModelInfo(D_T))
    for name in ("student_proj", "teacher_proj", "teacher_mean"):
        for block, tensor in getattr(wanted, name).items():
            assert torch.equal(getattr(found, name)[block], tensor.to(dtype).float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_type": "mlp"}, "projector_type 'mlp': only linear"),
        ({"subspace_mode": "direct"}, r"subspace_mode direct \(direct_bank.pt\)"),
        ({"pt_state_dict": {}}, "subspace_mode direct"),
        ({"subspace_mode": "residual"}, r"subspace_mode residual \(ps_tail_bank.pt\)"),
        (
            {"state_dict": {"projectors.s0_t0.0.weight": torch.zeros(2, 2)}},
            r"projectors with \['projectors.s0_t0.0.weight'\]: only linear",
        ),
        (
            {"state_dict": {"projectors.s0_t0.bias": torch.zeros(2)}},
            r"projectors with \['projectors.s0_t0.bias'\]: only linear",
        ),
        ({"frozen_pt_means": {}}, "frozen_pt_means has neither s0_t0 nor 0_0"),
        ({"layer_pairs": [3]}, r"a layer pair is \{student_layer, teacher_layer\}, got 3"),
        ({"layer_pairs": []}, "no layer pairs"),
        ({"layer_pairs": [{"student_layer": 0, "teacher_layer": 0}] * 2}, "a student layer twice"),
        ({"rank": 4}, r"contradicts itself: student_proj of student block 0 must be \(4, 6\)"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, changes, message):
    torch.save(public_bank(**changes), tmp_path / "bank.pt")
    with pytest.raises(ConfigError, match=message):
        read_ps_bank(tmp_path / "bank.pt")


def test_files_that_are_no_banks(tmp_path):
    with pytest.raises(ConfigError, match="no file at"):
        read_ps_bank(tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds a list"):
        read_ps_bank(tmp_path / "list.pt")
    torch.save({"rank": 3}, tmp_path / "part.pt")
    with pytest.raises(ConfigError, match="lacks layer_pairs, state_dict"):
        read_ps_bank(tmp_path / "part.pt")
    torch.save(public_bank(), tmp_path / "ps_tail_bank.pt")
    with pytest.raises(ConfigError, match="residual"):
        read_ps_bank(tmp_path / "ps_tail_bank.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "part.pt").read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"can't be read|refused"):
        read_ps_bank(tmp_path / "cut.pt")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, protocol):
    mark = tmp_path / "it_ran"
    held, path = public_bank(extra=Malicious(f"touch {mark}")), tmp_path / "ps_bank.pt"
    if protocol == "torch":
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held))
    with pytest.raises(ConfigError, match="refused: it holds more than tensors"):
        read_ps_bank(path)
    assert not mark.exists()


# The command line --------------------------------------------------------------------------------


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_import_show_on_the_command_line(tmp_path, capsys):
    torch.save(public_bank(), tmp_path / "ps_bank.pt")
    out = tmp_path / "b.safetensors"
    main(["import", str(tmp_path / "ps_bank.pt"), "--output", str(out)])
    assert torch.equal(load_bridge(out).student_proj[1], make_bridge().student_proj[1])
    assert "exists and would be lost" in fails(
        capsys, "import", tmp_path / "ps_bank.pt", "--output", out
    )
    main(["show", str(out), "--rank=3"])
    printed = capsys.readouterr().out
    assert "import" in printed
    assert "records no held-out cosines" in fails(capsys, "sweep", out)


def test_import_checks_the_models_named(tmp_path, capsys):
    """The demo's models are 128 wide, the bank's 6 and 10."""
    torch.save(public_bank(), tmp_path / "ps_bank.pt")
    argv = ("import", tmp_path / "ps_bank.pt", "--output", tmp_path / "b.safetensors")
    message = fails(capsys, *argv, "--teacher", "demo:teacher")
    assert "a teacher 10 wide, this one is 128 wide" in message
    assert not (tmp_path / "b.safetensors").exists()


def test_sweep_writes_table_and_figure_and_overwrites_nothing(tmp_path, capsys):
    save_bridge(make_bridge(), tmp_path / "b.safetensors")
    out = tmp_path / "out"
    main(["sweep", str(tmp_path / "b.safetensors"), "--output_dir", str(out)])
    rows = json.loads((out / "sweep.json").read_text())
    assert rows == json.loads(json.dumps(sweep_rows(make_bridge().info)))
    assert [r["rank"] for r in rows] == [1, 2, 4, 5]
    assert rows[2]["cosine_after"] == pytest.approx(0.8)
    assert rows[2]["nmse_after"] == pytest.approx(0.1)
    lines = (out / "sweep.csv").read_text().splitlines()
    assert lines[0].endswith("explained_variance,layer_0,layer_1,layer_2")
    assert len(lines) == 5
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "0.8000" in capsys.readouterr().out
    message = fails(capsys, "sweep", tmp_path / "b.safetensors", "--output_dir", out)
    assert "sweep.csv exists" in message
    below = tmp_path / "b.safetensors" / "out"
    message = fails(capsys, "sweep", tmp_path / "b.safetensors", "--output_dir", below)
    assert "b.safetensors is a file, not a directory" in message


def test_unknown_options_and_commands(capsys):
    assert "did you mean 'rank'" in fails(capsys, "fit", "--rnk=3")
    assert "no bridge at" in fails(capsys, "show", "nowhere.safetensors")
    assert "oprd-bridge" in fails(capsys, "fitt")
