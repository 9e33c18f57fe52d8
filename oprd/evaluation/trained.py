"""How runs read and grade prompts, which `oprd-eval` follows: a student is measured as in training.

An option that is given always holds. Else, if a run is among the models, all models read prompts
with that run's chat template and suffix, and a set that the run was evaluated on is read and graded
as there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from oprd.config import PromptsConfig
from oprd.errors import ConfigError
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.subjects import Subject

logger = logging.getLogger(__name__)

ChatTemplate = Literal["auto", "always", "never"]
Grader = Literal["exact", "math"]
T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """What of a run's settings says how prompts are read and graded.

    Attributes:
        run: the run's directory.
        sets: the evaluation sets by name.
    """

    run: Path
    chat_template: ChatTemplate
    chat_template_kwargs: dict[str, Any]
    prompt_suffix: str
    grader: Grader
    sets: dict[str, PromptsConfig]

    def find(self, text: str) -> tuple[str, PromptsConfig] | None:
        """Return the name and source of the evaluation set that is called ``text``, or lies there.

        All its rows: the limit of an evaluation in training is left out.
        """
        for name, source in self.sets.items():
            if text == name or text == source.path or _same_file(text, source.path):
                return name, replace(source, limit=None)
        return None


def trained(subjects: Sequence[Subject]) -> list[Trained]:
    """Read the settings of the runs that models are of. Other versions' may be left out."""
    runs = dict.fromkeys(s.run for s in subjects if s.run is not None)
    return [found for run in runs if (found := _read(run)) is not None]


def follow(cfg: EvalRunConfig, runs: Sequence[Trained]) -> EvalRunConfig:
    """Return the configuration with the runs' chat template, unless others are given.

    Raises:
        ConfigError: if runs differ in it.
    """
    if not runs:
        return cfg
    template, options = cfg.chat_template, cfg.chat_template_kwargs
    if template is None:
        template = common(runs, "chat_template", lambda r: r.chat_template)
    if options is None:
        options = common(runs, "chat_template_kwargs", lambda r: r.chat_template_kwargs)
    logger.info(
        f"prompts are read as by {runs[0].run}: chat_template={template}"
        + (f", chat_template_kwargs={options}" if options else "")
    )
    return replace(cfg, chat_template=template, chat_template_kwargs=options)


def common(runs: Sequence[Trained], option: str, value: Callable[[Trained], T]) -> T:
    """Return what all runs have.

    Raises:
        ConfigError: if they differ. The message names ``option``, which decides then.
    """
    values = [value(run) for run in runs]
    for run, other in zip(runs, values, strict=True):
        if other != values[0]:
            raise ConfigError(
                f"{runs[0].run} and {run.run} were trained with different settings: {option} is "
                f"{values[0]!r} and {other!r}. Choose one for all models with --{option}"
            )
    return values[0]


def _read(run: Path) -> Trained | None:
    file = run / "config.yaml"
    try:
        values = yaml.safe_load(file.read_text())
        data, of_eval = values["data"], values["eval"]
        known = {f.name for f in fields(PromptsConfig)}
        sets = {
            str(name): PromptsConfig(**{k: v for k, v in source.items() if k in known})
            for name, source in of_eval["sets"].items()
        }
        found = Trained(
            run,
            data["chat_template"],
            dict(data["chat_template_kwargs"]),
            str(data["prompt_suffix"]),
            of_eval["grader"],
            sets,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        logger.warning(
            f"{file} can't be read ({type(error).__name__}: {error}): prompts may be read and "
            "graded otherwise than in this run"
        )
        return None
    if found.chat_template not in get_args(ChatTemplate) or found.grader not in get_args(Grader):
        logger.warning(f"{file} is of another version: its chat_template and grader are left out")
        return None
    return found


def _same_file(first: str, second: str) -> bool:
    return Path(first).exists() and Path(first).resolve() == Path(second).resolve()
