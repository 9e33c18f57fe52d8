"""``oprd-gains``: what OPRD saves in the actor update, measured here and predicted from shapes.

oprd-gains                                          # Qwen2.5-0.5B's shape, 384 tokens
oprd-gains --dry_run                                # the planner's prediction only
oprd-gains --student.path ./student --objectives '[backbone,oprd,opd_topk]'
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from oprd.cli import Parser, quiet_libraries
from oprd.config import DType
from oprd.errors import ConfigError
from oprd.memory_plan.shapes import DTYPE_BYTES, Shape, Update
from oprd.memory_plan.update import (
    TEACHER_FORWARD,
    TITLES,
    Moment,
    predict,
    reads_teacher_logits,
    ready_bytes,
    resident,
)

SHAPE_FLAGS = ("d", "layers", "heads", "kv_heads", "intermediate", "vocab", "tied")


@dataclass
class ModelPath:
    """A model.

    Attributes:
        path: a local directory, a hub name or ``demo:NAME``; null: see the command.
    """

    path: str | None = None


@dataclass
class GainsConfig:
    """What to measure.

    Attributes:
        student: null: random weights of the shape given by the flags.
        teacher: null: the student's own weights (time and memory don't depend on their values).
        d: hidden width; as heads, kv_heads, intermediate, vocab and tied of a Qwen2
            configuration, whose defaults here are Qwen2.5-0.5B's.
        layers: number of blocks.
        heads: of attention.
        kv_heads: of attention's keys and values.
        intermediate: width of the MLP.
        vocab: |V|.
        tied: the LM head is the embedding table.
        batch: B, sequences.
        tokens: T, of each sequence, prompt included.
        prompt: tokens of each sequence that are not supervised.
        dtype: of weights, gradients and hidden states.
        device: ``auto``: the GPU, else the CPU.
        gradient_checkpointing: ``on``, ``off`` or ``both``.
        objectives: which to measure; ``oprd``, that the others are compared with, is always one.
        k: of the top-k objectives.
        rank: of the Bridge's random projectors.
        chunk: rows at a time in the chunked losses.
        rounds: the objectives are timed in turns, so many times; the median is reported. One
            round before them warms up and measures memory.
        shards: with ``dry_run``: data-parallel ranks that weights and gradients are split over.
        seed: of weights, tokens and the teacher's outputs.
        output_dir: receives ``gains.json`` and ``gains.md``; null: nothing is written.
    """

    student: ModelPath = field(default_factory=ModelPath)
    teacher: ModelPath = field(default_factory=ModelPath)
    d: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocab: int = 151936
    tied: bool = True
    batch: int = 2
    tokens: int = 192
    prompt: int = 16
    dtype: DType = "float32"
    device: str = "auto"
    gradient_checkpointing: Literal["on", "off", "both"] = "both"
    objectives: list[str] = field(default_factory=lambda: list(TITLES))
    k: int = 16
    rank: int = 8
    chunk: int = 128
    rounds: int = 3
    shards: int = 1
    seed: int = 0
    output_dir: str | None = None

    @property
    def modes(self) -> list[bool]:
        """Gradient checkpointing on, off or both in turn."""
        return {"on": [True], "off": [False], "both": [True, False]}[self.gradient_checkpointing]

    def chosen(self) -> list[str]:
        """The objectives in the order of `TITLES`."""
        return [name for name in TITLES if name in {"oprd", *self.objectives}]


def check(cfg: GainsConfig, dry_run: bool) -> None:
    """Everything that is wrong with the flags.

    Raises:
        ConfigError: listing all of it.
    """
    problems = []
    for name in ("d", "layers", "heads", "kv_heads", "intermediate", "batch", "prompt", "rank",
                 "chunk", "rounds", "shards"):  # fmt: skip
        if getattr(cfg, name) < 1:
            problems.append(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.tokens <= cfg.prompt:
        problems.append(
            f"tokens is {cfg.tokens} and prompt {cfg.prompt}: no token is left to supervise; "
            "raise --tokens or lower --prompt"
        )
    if cfg.vocab < 2:
        problems.append(f"vocab must be at least 2, got {cfg.vocab}")
    if not 1 <= cfg.k <= cfg.vocab:
        problems.append(f"k must lie between 1 and vocab ({cfg.vocab}), got {cfg.k}")
    if cfg.heads > 0 and cfg.d % (2 * cfg.heads):
        problems.append(
            f"d must be a multiple of 2 * heads (rotary embeddings need an even head width), got "
            f"d {cfg.d} and heads {cfg.heads}"
        )
    if cfg.kv_heads > 0 and cfg.heads % cfg.kv_heads:
        problems.append(f"heads ({cfg.heads}) must be a multiple of kv_heads ({cfg.kv_heads})")
    unknown = [name for name in cfg.objectives if name not in TITLES]
    if unknown:
        problems.append(f"unknown objectives {', '.join(unknown)}; known: {', '.join(TITLES)}")
    if cfg.shards > 1 and not dry_run:
        problems.append(
            f"shards is {cfg.shards}, but what is measured is one process: leave it at 1, or add "
            "--dry_run for the prediction alone"
        )
    changed = [n for n in SHAPE_FLAGS if getattr(cfg, n) != getattr(GainsConfig, n)]
    if cfg.student.path is not None and changed:
        problems.append(
            f"both student.path ({cfg.student.path}) and a shape by flags ({', '.join(changed)}) "
            "are given: leave one of them out"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def model_config(cfg: GainsConfig) -> Any:
    """The student's Hugging Face configuration."""
    from transformers import Qwen2Config

    from oprd.models.loading import load_config

    if cfg.student.path is not None:
        return load_config(cfg.student.path)
    return Qwen2Config(
        vocab_size=cfg.vocab,
        hidden_size=cfg.d,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        intermediate_size=cfg.intermediate,
        tie_word_embeddings=cfg.tied,
        max_position_embeddings=max(cfg.tokens, 32768),
    )


def shape_of(config: Any, whose: str) -> Shape:
    """The planner's shape of a configuration.

    Raises:
        ConfigError: if it has none.
    """
    try:
        return Shape.of(config)
    except ValueError as error:
        raise ConfigError(f"{whose}: {error}") from error


def update_of(cfg: GainsConfig, checkpointing: bool, on_gpu: bool) -> Update:
    """The planner's view of the update."""
    return Update(
        batch=cfg.batch,
        tokens=cfg.tokens,
        rows=cfg.batch * (cfg.tokens - cfg.prompt),
        dtype_bytes=DTYPE_BYTES[cfg.dtype],
        checkpointing=checkpointing,
        chunk=cfg.chunk,
        widen_head=not on_gpu,
        shards=cfg.shards,
    )


@dataclass(frozen=True)
class Plan:
    """What a run needs: bytes resident before the updates, by name; and the peak of each objective
    and mode (gradient checkpointing or not)."""

    resident: dict[str, int]
    peaks: dict[bool, dict[str, Moment]]

    @property
    def worst(self) -> tuple[int, str, bool]:
        """The largest delta-peak, whose it is, and whether with gradient checkpointing."""
        every = [(m.total, o, mode) for mode, found in self.peaks.items() for o, m in found.items()]
        return max(every)

    @property
    def total(self) -> int:
        """Bytes that the run needs at its worst moment."""
        return sum(self.resident.values()) + self.worst[0]


def make_plan(cfg: GainsConfig, student: Shape, teacher: Shape | None, on_gpu: bool) -> Plan:
    """Predict the run. ``teacher``: None if it shares the student's weights."""
    peaks = {}
    for mode in cfg.modes:
        update = update_of(cfg, mode, on_gpu)
        peaks[mode] = {o: predict(o, student, update) for o in cfg.chosen()}
    update = update_of(cfg, cfg.modes[0], on_gpu)
    ready = ready_bytes(cfg.chosen(), student, update, cfg.rank)
    teacher_bytes = 0 if teacher is None else teacher.parameters * update.dtype_bytes
    return Plan(resident(student, update, teacher_bytes, ready), peaks)


def check_memory(plan: Plan, available: int | None) -> None:
    """Refuse a run that would not fit.

    Args:
        available: bytes; None where the system does not tell: nothing is checked.

    Raises:
        ConfigError: with the numbers and the flags to change.
    """
    if available is None or plan.total <= available:
        return
    peak, objective, mode = plan.worst
    named = ", ".join(f"{name} {mib(size)}" for name, size in plan.resident.items() if size)
    raise ConfigError(
        f"this run needs {mib(plan.total)} MiB and {mib(available)} MiB are available: resident "
        f"({named} MiB) and {mib(peak)} MiB at the peak of {TITLES[objective]!r} "
        f"{'with' if mode else 'without'} gradient checkpointing. Lower --batch, --tokens, "
        "--layers or --vocab, take --dtype bfloat16, leave objectives out (--objectives) or "
        f"{'' if mode else 'set --gradient_checkpointing on, or '}add --dry_run for the prediction "
        "alone"
    )


def mib(size: float | None) -> str:
    """Bytes as MiB."""
    return "-" if size is None else f"{size / 2**20:,.0f}"


def build_student(cfg: GainsConfig, config: Any, device: torch.device) -> Any:
    """The model itself, of random weights unless it has a path."""
    from transformers import AutoModelForCausalLM

    from oprd.config import StudentConfig
    from oprd.models.loading import load_model

    if cfg.student.path is not None:
        return load_model(StudentConfig(path=cfg.student.path, dtype=cfg.dtype), device)
    torch.manual_seed(cfg.seed)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.dtype)).to(device)


def measure(cfg: GainsConfig, student: Any, teacher: Any, console: Any) -> dict:
    """Every objective in turns: one round for memory, which also warms up, then the timed ones.

    Returns:
        For each mode (``on``, ``off``) the `Measured` of every objective, and under ``teacher`` the
        seconds of its forward, by what it returns.
    """
    from oprd.actor_update import ActorUpdate, Measured
    from oprd.observability.memory import freed_at_once

    chosen = cfg.chosen()
    actor = ActorUpdate(
        student,
        teacher,
        batch=cfg.batch,
        tokens=cfg.tokens,
        prompt=cfg.prompt,
        k=cfg.k,
        rank=cfg.rank,
        chunk=cfg.chunk,
        with_logits=any(map(reads_teacher_logits, chosen)),
        with_bridge="bridge" in chosen,
        seed=cfg.seed,
    )
    wanted = sorted({kind for o in chosen if (kind := TEACHER_FORWARD.get(o))})
    found: dict[str, Any] = {"teacher": {kind: [] for kind in wanted}}
    for mode in cfg.modes:
        if mode:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            student.gradient_checkpointing_disable()
        results = {o: Measured() for o in chosen}
        found["on" if mode else "off"] = results
        for round_ in range(cfg.rounds + 1):
            named = f"checkpointing {'on' if mode else 'off'}, round {round_} of {cfg.rounds}"
            for objective in chosen:
                console.print(f"{named}: {TITLES[objective]}")
                if round_ == 0:
                    with freed_at_once():
                        results[objective].delta_peaks.append(actor.measure(objective).delta_peak)
                else:
                    results[objective].add(actor.measure(objective))
            if round_ > 0:
                for kind in wanted:
                    found["teacher"][kind].append(actor.teacher_seconds(kind))
    return found


def make_parser() -> Parser:
    """The parser of ``oprd-gains``."""
    parser = Parser(prog="oprd-gains", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the prediction, also of the paper's run; "
        "measure nothing",
    )  # fmt: skip
    parser.add_class_arguments(GainsConfig, None)
    return parser


def run(cfg: GainsConfig, command: str, dry_run: bool) -> None:
    """Predict, and unless ``dry_run`` measure, print and write.

    Raises:
        ConfigError: if the flags, the models or the memory won't do.
    """
    from rich.console import Console

    from oprd import gains_report
    from oprd.config import TeacherConfig
    from oprd.models.compatibility import check_pair
    from oprd.models.loading import load_config, load_model
    from oprd.observability.memory import available_bytes

    check(cfg, dry_run)
    console = Console(highlight=False)
    config = model_config(cfg)
    shape = shape_of(config, "student")
    teacher_shape = None
    if cfg.teacher.path is not None:
        teacher_config = load_config(cfg.teacher.path)
        check_pair(config, teacher_config, "all")
        teacher_shape = shape_of(teacher_config, "teacher")
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    plan = make_plan(cfg, shape, teacher_shape, device.type == "cuda")
    if dry_run:
        for table in gains_report.prediction_tables(cfg, shape, plan):
            console.print(table)
        console.print(gains_report.paper_table())
        for line in gains_report.PAPER_DIFFERENCES:
            console.print(f"- {line}", soft_wrap=True)
        return
    if cfg.output_dir is not None and Path(cfg.output_dir, "gains.json").exists():
        raise ConfigError(
            f"{cfg.output_dir} holds the gains.json of another run: choose another --output_dir"
        )
    check_memory(plan, available_bytes(device))
    student = build_student(cfg, config, device)
    teacher = None
    if cfg.teacher.path is not None:
        teacher = load_model(TeacherConfig(path=cfg.teacher.path, dtype=cfg.dtype), device)
    found = measure(cfg, student, teacher, Console(stderr=True, highlight=False))
    report: dict[str, Any] = {
        "command": command,
        "machine": gains_report.machine(device),
        "config": asdict(cfg),
        "shape": {f.name: getattr(shape, f.name) for f in fields(shape)},
        "parameters": shape.parameters,
        "rows": cfg.batch * (cfg.tokens - cfg.prompt),
        "resident_bytes": plan.resident,
        "modes": {
            mode: gains_report.summary(found[mode], found["teacher"], plan.peaks[mode == "on"])
            for mode in ("on", "off")
            if mode in found
        },
    }
    for mode, rows in report["modes"].items():
        for table in gains_report.tables(report, mode, rows):
            console.print(table)
    if cfg.output_dir is not None:
        directory = Path(cfg.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "gains.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        (directory / "gains.md").write_text(gains_report.markdown(report), "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``oprd-gains``.

    Exit codes: 0 finished, 2 wrong flags or too little memory, 130 interrupted.
    """
    parser = make_parser()
    given = sys.argv[1:] if argv is None else list(argv)
    parsed = parser.parse_args(given)
    made = parser.instantiate(parsed)
    cfg = GainsConfig(**{f.name: made[f.name] for f in fields(GainsConfig)})
    quiet_libraries()
    try:
        run(cfg, shlex.join(["oprd-gains", *given]), parsed.dry_run)
    except ConfigError as error:
        sys.stderr.write(f"oprd-gains: error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("oprd-gains: interrupted\n")
        sys.exit(130)
