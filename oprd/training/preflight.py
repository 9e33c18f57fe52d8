"""Checks of a run before weights are loaded."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from oprd import distributed
from oprd.checkpoint.resume import find_candidates, is_run
from oprd.config import TrainConfig, check_values
from oprd.distributed.device import check_device
from oprd.errors import Attempt, ConfigError, Problems, attempts
from oprd.models.defaults import choose_dtypes, choose_lengths
from oprd.models.loading import load_config, teacher_path
from oprd.observability.trackers import check_trackers
from oprd.output_paths import check_writable
from oprd.training.inputs import RunInputs, load_inputs
from oprd.training.model_checks import check_models
from oprd.training.overlap import check_overlap
from oprd_kernels.backends import registry


def preflight(cfg: TrainConfig, dry_run: bool = False, ranks: int | None = None) -> RunInputs:
    """Check configuration, output directory, models' configurations, tokenizers and prompts.

    Defaults that depend on the device and the models are filled in, in place.

    Args:
        dry_run: continue if the hub can't be reached, and list in ``RunInputs.unchecked`` what
            could not be checked.
        ranks: number of GPUs to check for; None: the current ranks and device.

    Returns:
        The loaded inputs.

    Raises:
        ConfigError: for all options with invalid values, otherwise for the first problem.
    """
    check_values(cfg)
    inputs = RunInputs()
    attempt = attempts(inputs.unchecked, dry_run)
    on_gpu = ranks is not None or check_device(cfg.device).type == "cuda"
    ranks = distributed.world_size() if ranks is None else ranks
    inputs.notes += choose_defaults(cfg, attempt, on_gpu, ranks)
    check_run(cfg, inputs, ranks)
    check_models(cfg, inputs, attempt, dry_run, cfg.fsdp.active(ranks))
    load_inputs(cfg, inputs, attempt)
    return inputs


def choose_defaults(cfg: TrainConfig, attempt: Attempt, on_gpu: bool, ranks: int) -> list[str]:
    """Fill in, in place, the defaults that depend on the device and the models; return notes."""
    choose_dtypes(cfg.student, cfg.all_teachers.values(), on_gpu)
    if cfg.autocast == "auto":
        cfg.autocast = None
        if on_gpu and cfg.student.dtype == "float32":
            if not cfg.fsdp.active(ranks):
                cfg.autocast = "bfloat16"
            elif cfg.fsdp.param_dtype is None:
                cfg.fsdp.param_dtype = "bfloat16"
    pairs = [(cfg.student.path, cfg.student.context_length)]
    pairs += [(teacher_path(t, cfg.student), t.context_length) for t in cfg.all_teachers.values()]
    models = [(attempt(partial(load_config, path)), given) for path, given in pairs]
    return choose_lengths(cfg.data, cfg.rollout, cfg.eval if cfg.eval.sets else None, models)


def check_run(cfg: TrainConfig, inputs: RunInputs, ranks: int) -> None:
    """Check ranks, output directory, device, kernels and trackers.

    Args:
        inputs: checkpoints to resume from and notes are stored in it.
        ranks: number of ranks of the run.

    Raises:
        ConfigError: for the first problem.
    """
    _check_world(cfg, ranks)
    check_output_dir(cfg)
    inputs.resume = find_candidates(cfg, output_dir(cfg))
    inputs.notes += inputs.resume.notes
    device, backend = check_device(cfg.device), cfg.distill.backend
    if backend != "auto" and (reason := registry.unavailable(backend, device)):
        raise ConfigError(f"distill.backend={backend} can't run: {reason}")
    check_trackers(cfg.logging)
    inputs.notes += [*_packing_notes(cfg), *check_overlap(cfg, ranks)]


def _packing_notes(cfg: TrainConfig) -> list[str]:
    """Return a note if packing makes attention expensive.

    `oprd.models.packing_check` checks on the loaded models that packed sequences stay separate.
    """
    chosen = {cfg.student.attn_implementation}
    chosen |= {teacher.attn_implementation for teacher in cfg.all_teachers.values()}
    if not cfg.packing or not chosen & {None, "sdpa", "eager"}:
        return []
    return [
        "packing with sdpa or eager attention costs as much as one sequence of "
        f"{cfg.micro_batch_tokens} tokens (micro_batch_tokens): on a GPU set attn_implementation "
        "to flash_attention_2 or flex_attention"
    ]


def _check_world(cfg: TrainConfig, ranks: int) -> None:
    problems = Problems()
    own = any(not teacher.is_self for teacher in cfg.all_teachers.values())
    cfg.fsdp.check(problems, cfg.autocast, ranks, own)
    problems.refuse()
    if cfg.rollout.prompts_per_step % ranks:
        raise ConfigError(
            f"rollout.prompts_per_step={cfg.rollout.prompts_per_step} can't be shared equally by "
            f"{ranks} ranks: choose a multiple of {ranks}"
        )


def output_dir(cfg: TrainConfig) -> Path:
    """Return the output directory; the default is ``runs/<name>-<time>``."""
    if cfg.output_dir is not None:
        return Path(cfg.output_dir)
    return Path("runs") / f"{cfg.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _goes_on(cfg: TrainConfig, directory: Path) -> bool:
    """Return whether ``cfg.resume`` resumes the run in ``directory``."""
    if cfg.resume is None or cfg.resume == "auto":
        return cfg.resume == "auto"
    directory, source = directory.resolve(), Path(cfg.resume).resolve()
    return source == directory or directory in source.parents


def check_output_dir(cfg: TrainConfig) -> None:
    """Check that the output directory is writable, and empty or that of the resumed run.

    Raises:
        ConfigError: if it is not; the message says what the directory contains.
    """
    path = output_dir(cfg)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir {path} is a file: choose a new directory")
    if path.is_dir() and any(path.iterdir()) and not (is_run(path) and _goes_on(cfg, path)):
        what = "another run" if is_run(path) else "other files"
        raise ConfigError(
            f"output_dir {path} already holds {what}, which would be lost: choose a new directory"
            + (", or resume that run with resume=auto" if is_run(path) else "")
        )
    check_writable(path, "output_dir")
