"""``oprd-eval``: samples, grades and compares models."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import oprd
from oprd import distributed
from oprd.atomic_files import write_json
from oprd.bridge import load_bridge
from oprd.config import (
    DataConfig,
    DType,
    EvalConfig,
    RolloutConfig,
    SamplingParams,
    StudentConfig,
    TrainConfig,
)
from oprd.data.prompts import Prompt
from oprd.data.rollout import Rollout
from oprd.distributed.device import check_device
from oprd.engines.base import Engine
from oprd.engines.generate import GenerateEngine, eos_ids
from oprd.engines.vllm.engine import VllmEngine
from oprd.engines.vllm.preflight import check_vllm
from oprd.errors import ConfigError
from oprd.evaluation.closeness import Closeness, Comparer, spread
from oprd.evaluation.config import MAX_NEW_TOKENS, EvalRunConfig
from oprd.evaluation.evaluate import Sample
from oprd.evaluation.grader_pool import grade_all
from oprd.evaluation.report import by_problem, comparisons, set_results, show
from oprd.evaluation.sets import EvalSet, find_sets, read_set
from oprd.evaluation.store import RESULTS, Key, Store
from oprd.evaluation.subjects import Subject, find_subjects, folder
from oprd.models.compatibility import check_vocabularies, positions_of
from oprd.models.weights import full_weights

logger = logging.getLogger(__name__)

SAY_EVERY = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Task:
    """A model's problems of a set.

    Attributes:
        prompts: in the model's tokens.
        max_new_tokens: of each response.
    """

    eval_set: EvalSet
    prompts: list[Prompt]
    max_new_tokens: int

    def settings(self) -> dict[str, Any]:
        """Return what decides what is sampled, as plain values."""
        text = json.dumps([[p.token_ids, p.answer] for p in self.prompts])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {
            "prompts": digest,
            "problems": len(self.prompts),
            "max_new_tokens": self.max_new_tokens,
        }


def evaluate_models(cfg: EvalRunConfig) -> dict[str, Any]:
    """Run ``oprd-eval``. Collective. Rank 0 grades, and writes and shows the results.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: if models, sets and options do not fit together, before anything is sampled.
        EngineFailure: if a vLLM engine fails.
    """
    cfg.check()
    if cfg.regrade:
        return _regrade(cfg)
    check_device(cfg.device)
    run = _Run(cfg)
    device = distributed.init(cfg.device)
    try:
        return run(device)
    finally:
        distributed.shutdown()


def _regrade(cfg: EvalRunConfig) -> dict[str, Any]:
    """Grade the samples of an evaluation again, and write its results."""
    assert cfg.output_dir is not None
    store = Store(Path(cfg.output_dir))
    settings = store.settings()
    if settings is None:
        raise ConfigError(f"{cfg.output_dir} holds no evaluation to grade again")
    if cfg.grader != "auto":
        for values in settings["sets"].values():
            values["grader"] = values["grader"] and cfg.grader
        settings = store.write_settings(settings)
    return _conclude(store, settings, again=True)


class _Run:
    """An evaluation whose inputs have been checked."""

    def __init__(self, cfg: EvalRunConfig) -> None:
        self.cfg = cfg
        self.subjects = find_subjects(cfg.models, cfg.best)
        self.sets = find_sets(cfg)
        if bare := [s.name for s in self.sets if s.grader is None and cfg.teacher is None]:
            raise ConfigError(
                f"the set {', '.join(bare)} has no answers, so there is nothing to grade: name the "
                "field with the answers (--own_sets '{NAME: {path: .., answer_field: ..}}'), or "
                "give a --teacher that the models are compared with"
            )
        self.dtype: DType = cfg.dtype or (
            "bfloat16" if check_device(cfg.device).type == "cuda" else "float32"
        )
        self.tokenizers = {s.label: s.tokenizer(cfg.tokenizer) for s in self.subjects}
        self.tasks = {s.label: [self._task(s, e) for e in self.sets] for s in self.subjects}
        self.teacher = None if cfg.teacher is None else self._teacher(cfg.teacher)
        self.bridge = None
        if cfg.bridge.path is not None:
            self.bridge = load_bridge(cfg.bridge.path, cfg.bridge.rank)
        if cfg.engine == "vllm":
            self._check_vllm()
        name = cfg.output_dir or f"runs/eval-{time.strftime('%Y%m%d-%H%M%S')}"
        self.store = Store(Path(name))
        self.settings = self._settings()
        self.store.check(self.settings)

    def _task(self, subject: Subject, found: EvalSet) -> Task:
        """Read a set for a model, and choose how long responses may be."""
        prompts = read_set(found, self.cfg, self.tokenizers[subject.label])
        longest = max(len(p.token_ids) for p in prompts)
        room = positions_of(subject.config().get_text_config())
        left = MAX_NEW_TOKENS if room is None else room - longest
        wanted = self.cfg.max_new_tokens
        if left < (wanted or 1):
            raise ConfigError(
                f"the longest prompt of {found.name} has {longest} tokens and the context of "
                f"{subject.label} {room}: {max(left, 0)} are left for a response"
                + (f", not {wanted}: lower max_new_tokens" if wanted else "")
            )
        return Task(found, prompts, wanted or min(left, MAX_NEW_TOKENS))

    def _teacher(self, path: str) -> Subject:
        """Find the teacher, and check that it reads the models' tokens.

        Raises:
            ConfigError: if it has another vocabulary, or another width and there is no bridge.
        """
        teacher = find_subjects([path], best=False)[0]
        tokenizer, config = teacher.tokenizer(self.cfg.tokenizer), teacher.config()
        for label, own in self.tokenizers.items():
            try:
                check_vocabularies(own, tokenizer, config)
            except ConfigError as error:
                raise ConfigError(f"{label} and the teacher {teacher.label}: {error}") from error
        return teacher

    def _settings(self) -> dict[str, Any]:
        """Return the settings that decide what is sampled, as plain values."""
        cfg = self.cfg
        names = ("samples", "temperature", "top_p", "seed")
        sampling = {name: getattr(cfg, name) for name in names}
        sampling |= {"dtype": self.dtype, "with teacher": cfg.teacher is not None}
        return {
            "version": oprd.__version__,
            "sampling": sampling,
            "sets": {
                e.name: {"path": e.source.path, "suffix": e.suffix, "grader": e.grader}
                for e in self.sets
            },
            "models": {
                s.label: s.identity()
                | {"sets": {t.eval_set.name: t.settings() for t in self.tasks[s.label]}}
                for s in self.subjects
            },
            **({} if self.teacher is None else {"teacher": self.teacher.identity()}),
        }

    def _check_vllm(self) -> None:
        """Check that vLLM can sample from the models."""
        for subject in self.subjects:
            tasks = self.tasks[subject.label]
            cfg = TrainConfig(
                student=StudentConfig(subject.path, self.dtype),
                data=DataConfig(
                    max_prompt_tokens=max(len(p.token_ids) for t in tasks for p in t.prompts)
                ),
                rollout=RolloutConfig(
                    engine="vllm",
                    vllm=self.cfg.vllm,
                    max_new_tokens=max(t.max_new_tokens for t in tasks),
                ),
                eval=EvalConfig(sets={}),
            )
            try:
                notes = check_vllm(cfg, subject.config(), check_device(self.cfg.device))
            except ConfigError as error:
                raise type(error)(str(error).replace("rollout.", "")) from error
            for note in notes:
                logger.info(f"note: {note}")

    def __call__(self, device: torch.device) -> dict[str, Any]:
        """Sample what is missing and conclude. Collective."""
        distributed.wait_for_all()  # all ranks have checked the settings that rank 0 now writes
        settings = self.settings
        if distributed.rank() == 0:
            settings = self.store.write_settings(self.settings)
            logger.info(f"evaluation: {self.store.directory}")
        for subject in self.subjects:
            self._sample(subject, device)
        results = {}
        if distributed.rank() == 0:
            results = _conclude(self.store, settings)
        distributed.wait_for_all()
        return results

    def _sample(self, subject: Subject, device: torch.device) -> None:
        """Sample a model's missing responses, and compare it with the teacher. Collective."""
        done = set(self.store.read(subject.label))
        units = [unit for task in self.tasks[subject.label] for unit in self._units(task)]
        missing = [u for u in units if not u.keys <= done]
        compares = self.teacher is not None and not self._is_compared(subject)
        distributed.wait_for_all()  # nobody writes before everybody has read
        if not missing and not compares:
            return
        if done:
            logger.info(f"{subject.label}: {len(done):,} samples are there already")
        on_cpu = self.cfg.engine == "vllm"
        place = torch.device("cpu") if on_cpu else device
        model = subject.load(self.dtype, self.cfg.attn_implementation, place)
        if missing:
            with self._engine(subject, model, device) as engine:
                self._fill(subject, engine, missing)
        distributed.wait_for_all()
        if compares:
            self._compare(subject, model.to(device), device)

    def _units(self, task: Task) -> list[_Unit]:
        """Split a task into what is sampled at once. This does not depend on the ranks."""
        n, name = self.cfg.samples, task.eval_set.name
        pairs = [(p, s) for p in range(len(task.prompts)) for s in range(n)]
        size = self.cfg.unit
        return [_Unit(task, name, pairs[i : i + size]) for i in range(0, len(pairs), size)]

    def _fill(self, subject: Subject, engine: Engine, missing: list[_Unit]) -> None:
        """Sample units, which the ranks share. Collective."""
        part = self.store.part(subject.label, distributed.rank())
        tokenizer = self.tokenizers[subject.label]
        progress = _Progress(subject.label, sum(len(u.pairs) for u in missing))
        try:
            for task in self.tasks[subject.label]:
                # One set after the other: the ranks of a tensor-parallel engine ask alike.
                units = [u for u in missing if u.task is task]
                for first in range(0, len(units), distributed.world_size()):
                    together = units[first : first + distributed.world_size()]
                    unit = (
                        together[distributed.rank()] if distributed.rank() < len(together) else None
                    )
                    part.add(task.eval_set.name, self._sampled(engine, tokenizer, task, unit))
                    progress.add(sum(len(u.pairs) for u in together))
        finally:
            part.close()

    def _sampled(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, task: Task, unit: _Unit | None
    ) -> list[Sample]:
        """Sample a unit; None: this rank only takes part."""
        cfg, pairs = self.cfg, [] if unit is None else unit.pairs
        sampling = SamplingParams(task.max_new_tokens, cfg.temperature, cfg.top_p)
        ids = [task.prompts[p].token_ids for p, _ in pairs]
        seed = 0 if unit is None else unit.seed(cfg.seed)
        try:
            rollouts = engine.sample(ids, sampling, seed=seed)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{len(ids)} sequences of up to {task.max_new_tokens} new tokens do not fit the "
                f"GPU's memory: lower --batch_size (now {cfg.unit}), or use --engine vllm. What "
                f"was sampled is kept: add --output_dir {self.store.directory} to go on"
            ) from error
        texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
        prompts = tokenizer.batch_decode(ids)
        return [
            Sample(
                problem=problem,
                sample=number,
                prompt=prompt,
                response=text,
                answer=task.prompts[problem].answer,
                length=len(rollout.response_ids),
                truncated=rollout.truncated,
                ids=rollout.response_ids if self.teacher is not None else None,
            )
            for (problem, number), prompt, text, rollout in zip(
                pairs, prompts, texts, rollouts, strict=True
            )
        ]

    @contextmanager
    def _engine(
        self, subject: Subject, model: PreTrainedModel, device: torch.device
    ) -> Iterator[Engine]:
        """Make the engine that samples from a model. Collective."""
        tokenizer = self.tokenizers[subject.label]
        if self.cfg.engine == "generate":
            yield GenerateEngine(model, tokenizer)
            return
        tasks = self.tasks[subject.label]
        engine = VllmEngine(
            self.cfg.vllm,
            model_config=model.config,
            weights=lambda: full_weights(model),
            ends=eos_ids(model, tokenizer),
            device=device,
            dtype=self.cfg.vllm.dtype or self.dtype,
            max_model_len=max(
                len(p.token_ids) + t.max_new_tokens for t in tasks for p in t.prompts
            ),
            directory=self.store.model(subject.label) / "vllm",
        )
        try:
            engine.sync(0)
            yield engine
        finally:
            engine.close()

    def _closeness_file(self, subject: Subject) -> Path:
        assert self.teacher is not None
        return self.store.model(subject.label) / f"closeness_{folder(self.teacher.label)}.json"

    def _is_compared(self, subject: Subject) -> bool:
        """Return whether the model has been compared with the teacher on all sets."""
        file = self._closeness_file(subject)
        names = {task.eval_set.name for task in self.tasks[subject.label]}
        return file.exists() and names <= json.loads(file.read_text()).keys()

    def _compare(self, subject: Subject, model: PreTrainedModel, device: torch.device) -> None:
        """Compare a model with the teacher on its responses; rank 0 writes the file. Collective."""
        assert self.teacher is not None
        teacher = self.teacher.load(self.dtype, self.cfg.attn_implementation, device)
        tokenizer = self.tokenizers[subject.label]
        comparer = Comparer(
            model.eval(),
            teacher,
            tokenizer.pad_token_id,
            self.cfg.temperature,
            self.cfg.top_k,
            self.bridge,
            vocabulary=max(tokenizer.get_vocab().values()) + 1,
        )
        samples = self.store.read(subject.label)
        found: dict[str, Closeness] = {}
        for task in self.tasks[subject.label]:
            name = task.eval_set.name
            keys = sorted(k for k in samples if k[0] == name)
            chosen = [samples[keys[i]] for i in spread(len(keys), self.cfg.teacher_responses)]
            rollouts = [
                Rollout(task.prompts[s.problem].token_ids, s.ids or [], s.truncated) for s in chosen
            ]
            own = rollouts[distributed.rank() :: distributed.world_size()]
            found[name] = comparer(own, batch_size=4)
        if distributed.rank() == 0:
            file = self._closeness_file(subject)
            values = json.loads(file.read_text()) if file.exists() else {}
            values |= {name: closeness.as_dict() for name, closeness in found.items()}
            write_json(file, values)
        distributed.wait_for_all()


@dataclass(frozen=True, eq=False)
class _Unit:
    """Responses that are sampled at once: (problem, sample) pairs of a task."""

    task: Task
    name: str
    pairs: list[tuple[int, int]]

    @property
    def keys(self) -> set[Key]:
        return {(self.name, *pair) for pair in self.pairs}

    def seed(self, seed: int) -> int:
        """Return a seed of its own, the same in every process."""
        return zlib.crc32(f"{seed} {self.name} {self.pairs[0]}".encode())


class _Progress:
    """Says every few seconds how far the sampling is."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.started = self.said = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < SAY_EVERY and self.done < self.total:
            return
        self.said, spent = now, now - self.started
        left = spent / self.done * (self.total - self.done)
        line = f"{self.label}: {self.done:,} of {self.total:,} samples, {spent:.0f} s"
        logger.info(line + (f", {left:.0f} s left" if self.done < self.total else ""))


def _conclude(store: Store, settings: dict[str, Any], again: bool = False) -> dict[str, Any]:
    """Grade the samples, write the files and show the tables; rank 0 only.

    Args:
        again: grade what has a grade already, too.
    """
    models: dict[str, Any] = {}
    problems: dict[str, dict[str, Any]] = {}
    teacher = settings.get("teacher")
    for label, model in settings["models"].items():
        samples = store.read(label)
        for name in model["sets"]:
            grader = settings["sets"][name]["grader"]
            if grader is not None:
                _grade(samples, name, grader, again)
        store.finish(label, samples, model["sets"])
        problems[label] = {}
        for name, of_set in model["sets"].items():
            wanted = of_set["problems"] * settings["sampling"]["samples"]
            there = sum(key[0] == name for key in samples)
            if there == wanted:
                problems[label][name] = by_problem(samples, name)
            else:
                logger.warning(
                    f"{label}: {there} of {wanted} samples of {name} are there: it is left out of "
                    "the results. The command that was interrupted goes on with it"
                )
        models[label] = {
            **{k: v for k, v in model.items() if k != "sets"},
            "sets": {
                name: {"grader": settings["sets"][name]["grader"]} | set_results(p)
                for name, p in problems[label].items()
            },
        }
        for file in sorted(store.model(label).glob("closeness_*.json")):
            models[label]["closeness"] = json.loads(file.read_text())
    results = {
        "version": settings["version"],
        "sampling": settings["sampling"],
        "teacher": teacher and teacher["path"],
        "models": models,
        "comparisons": comparisons(problems),
    }
    write_json(store.directory / RESULTS, results)
    show(results)
    logger.info(f"results: {store.directory / RESULTS}")
    return results


def _grade(samples: dict[Key, Sample], name: str, grader: str, again: bool) -> None:
    """Grade the samples of a set in place."""
    keys = [k for k, s in samples.items() if k[0] == name and (again or s.score is None)]
    responses, answers = [samples[k].response for k in keys], [samples[k].answer for k in keys]
    grades = grade_all(grader, responses, [a or "" for a in answers])
    for key, grade in zip(keys, grades, strict=True):
        samples[key] = replace(
            samples[key], score=grade.score, boxed=grade.boxed, failed=grade.failed
        )
