"""``oprd-eval``: samples, grades and compares models."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import oprd
from oprd import distributed
from oprd.atomic_files import write_json
from oprd.bridge import load_bridge
from oprd.config import (
    DataConfig,
    DType,
    EvalConfig,
    RolloutConfig,
    StudentConfig,
    TrainConfig,
)
from oprd.data.rollout import Rollout
from oprd.distributed.device import check_device
from oprd.engines.base import Engine
from oprd.engines.cached_rows import check_continuous
from oprd.engines.factory import engine_on
from oprd.engines.generate import eos_ids
from oprd.engines.vllm.engine import VllmEngine
from oprd.engines.vllm.preflight import check_vllm
from oprd.errors import ConfigError
from oprd.evaluation.closeness import Closeness, Comparer, spread
from oprd.evaluation.conclude import conclude, regrade
from oprd.evaluation.config import MAX_NEW_TOKENS, EvalRunConfig
from oprd.evaluation.sampling import Sampler, Task
from oprd.evaluation.sets import EvalSet, find_sets, read_set
from oprd.evaluation.store import Store
from oprd.evaluation.subjects import Subject, find_subjects, folder
from oprd.evaluation.trained import follow, trained
from oprd.models.compatibility import check_vocabularies, positions_of
from oprd.models.weights import full_weights

logger = logging.getLogger(__name__)


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
        return regrade(cfg)
    check_device(cfg.device)
    run = _Run(cfg)
    device = distributed.init(cfg.device)
    try:
        return run(device)
    finally:
        distributed.shutdown()


class _Run:
    """An evaluation whose inputs have been checked."""

    def __init__(self, cfg: EvalRunConfig) -> None:
        self.subjects = find_subjects(cfg.models, cfg.best)
        runs = trained(self.subjects)
        self.cfg = cfg = follow(cfg, runs)
        self.sets = find_sets(cfg, runs)
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
        if cfg.engine == "continuous":
            for subject in self.subjects:
                check_continuous(subject.config(), subject.label, "engine")
        name = cfg.output_dir or f"runs/eval-{time.strftime('%Y%m%d-%H%M%S')}"
        self.store = Store(Path(name))
        self.settings = self._settings()
        self.store.check(self.settings)

    def _task(self, subject: Subject, found: EvalSet) -> Task:
        """Read a set for a model, and choose how long responses may be."""
        loaded = read_set(found, self.cfg, self.tokenizers[subject.label])
        for message in loaded.lost:
            logger.warning(f"{subject.label}, {found.name}: {message}")
        prompts = loaded.prompts
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
        sampling["chat_template"] = cfg.chat_template or "if there is one"
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
            results = conclude(self.store, settings)
        distributed.wait_for_all()
        return results

    def _sample(self, subject: Subject, device: torch.device) -> None:
        """Sample a model's missing responses, and compare it with the teacher. Collective."""
        done = set(self.store.read(subject.label))
        label, tasks = subject.label, self.tasks[subject.label]
        sampler = Sampler(self.cfg, self.store, label, self.tokenizers[label])
        units = [unit for task in tasks for unit in sampler.units(task)]
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
                sampler.fill(engine, tasks, missing)
        distributed.wait_for_all()
        if compares:
            self._compare(subject, model.to(device), device)

    @contextmanager
    def _engine(
        self, subject: Subject, model: PreTrainedModel, device: torch.device
    ) -> Iterator[Engine]:
        """Make the engine that samples from a model. Collective."""
        tokenizer = self.tokenizers[subject.label]
        if self.cfg.engine != "vllm":
            yield engine_on(model, tokenizer, self.cfg.engine, self.cfg.at_once)
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
