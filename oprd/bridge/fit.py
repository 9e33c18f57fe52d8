"""The fit of a bridge: prompts, student rollouts, one streaming pass of both models, projectors.

    oprd-bridge fit --student.path ./student --teacher.path ./teacher --output bridge.safetensors
    torchrun --nproc-per-node 2 -m oprd.cli.bridge fit ..

Shapes: B sequences of T tokens, N = B T states, M supervised ones, dS and dT widths, r rank.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from oprd import distributed
from oprd.bridge.bank import Bridge, BridgeInfo, RankReport, save_bridge
from oprd.bridge.config import FitConfig
from oprd.bridge.heldout import Agreement, ranks_up_to
from oprd.bridge.preflight import Checked, check_fit
from oprd.bridge.project import project_rows
from oprd.bridge.sgd import KeptRows, sgd
from oprd.bridge.show import tables
from oprd.bridge.solve import TeacherBasis, random_student_proj, ridge, student_r2, teacher_basis
from oprd.bridge.statistics import PairStatistics
from oprd.data.collate import Batch, collate
from oprd.data.micro_batches import micro_batches
from oprd.data.rollout import Rollout, for_teacher, rollout_metrics
from oprd.data.supervision import Supervision, supervise
from oprd.engines.generate import eos_ids, generate
from oprd.models.decoder import Decoder, cut, find_decoder, watch
from oprd.models.loading import load_model
from oprd.observability.console import console, shown
from oprd.observability.tables import show

logger = logging.getLogger(__name__)

FEW_PAIRS = 0.5
"""The share of paired student tokens below which the user is warned. In the demos the student
learned with a share of 0.89, and did not with 0.22."""

WATCHDOG_S = 6 * 3600.0
"""Timeout passed to `oprd.distributed.init`, which gives collectives four times as long: a day.

The first sums over ranks come after all rollouts and a pass over them. These take hours at the
paper's scale, and a rank with longer responses is late by a share of that time. There is a limit
because no other watchdog covers a fit."""

See = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with a student block, its states (N, dS), the supervised rows of them (M,), and the
teacher states paired with these rows (M, dT)."""


@dataclass(frozen=True)
class Prepared:
    """The two models of a fit.

    Attributes:
        student: the student.
        teacher: the teacher, cut after the deepest block that is paired.
        teacher_depth: number of layers of the full teacher.
        pairs: (student block, teacher block).
    """

    student: Decoder
    teacher: Decoder
    teacher_depth: int
    pairs: list[tuple[int, int]]


class Fitter:
    """The state of a fit. `run` performs it."""

    def __init__(self, cfg: FitConfig, checked: Checked) -> None:
        assert checked.tokenizer is not None
        assert checked.student is not None
        assert checked.teacher is not None
        self.cfg, self.checked, self.tokenizer = cfg, checked, checked.tokenizer
        self.student, self.teacher = checked.student, checked.teacher
        self.device = distributed.init(cfg.device, timeout_s=WATCHDOG_S)
        # NCCL connects the ranks at their first collective. It then waits for rank 0 only as long
        # as the store does, whatever the timeout (pytorch#107177). No rank is late here.
        distributed.sum_over_ranks([1.0], self.device)
        self.console = console if distributed.rank() == 0 else Console(quiet=True)

    def run(self) -> Bridge:
        """Fit the bridge, and return it. All ranks return the same bridge."""
        cfg, checked = self.cfg, self.checked
        for note in checked.notes:
            logger.info(f"note: {note}")
        distributed.seed_everything(cfg.seed)
        student = load_model(cfg.student, self.device)
        fitted, held_out = self._rollouts(student)
        if checked.aligner is not None:
            self._say_alignment([*fitted, *held_out])
        teacher = find_decoder(load_model(cfg.teacher, self.device))
        depth = max(block for _, block in checked.pairs) + 1
        models = Prepared(
            find_decoder(student), cut(teacher, depth), teacher.num_layers, checked.pairs
        )
        del teacher
        statistics = self._statistics(models, fitted)
        rows = next(iter(statistics.values())).count
        logger.info(f"{rows} rows a layer; {cfg.solver} for {len(checked.pairs)} layers")
        if rows < self.student.width:
            logger.info(
                f"note: {rows} rows are fewer than the student's {self.student.width} dimensions, "
                "so the projectors overfit: raise prompts"
            )
        bases = {block: teacher_basis(s, cfg.rank) for block, s in statistics.items()}
        if cfg.solver == "ridge":
            student_proj = {
                block: ridge(s, bases[block].directions, cfg.ridge).float()
                for block, s in statistics.items()
            }
        else:
            student_proj = self._sgd(models, statistics, bases, fitted, held_out)
        return self._judge(models, statistics, bases, student_proj, held_out)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], object]]:
        """Show a progress bar on a terminal, or a line elsewhere. Yield the function that advances
        the bar."""
        if not self.console.is_terminal or distributed.rank() != 0:
            logger.info(f"{what} ..")
            yield lambda: None
            return
        with Progress(console=self.console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def _rollouts(self, student) -> tuple[list[Rollout], list[Rollout]]:
        """Sample this rank's responses. Return those to fit on, and the held-out ones.

        The split is by prompt, and is the same for any number of ranks.
        """
        r, rank, ranks = self.cfg.rollout, distributed.rank(), distributed.world_size()
        chosen, num_held_out = self.checked.prompts, self.checked.held_out_prompts
        aligners = {} if self.checked.aligner is None else {"": self.checked.aligner}
        ends = eos_ids(student, self.tokenizer)
        parts: list[list[Rollout]] = [[], []]
        steps = range(0, len(chosen), r.prompts_per_step)
        with self.progress("student rollouts", len(steps)) as advance:
            for start in steps:
                mine = range(len(chosen))[start : start + r.prompts_per_step][rank::ranks]
                numbers = [n for n in mine for _ in range(r.responses_per_prompt)]
                if numbers:
                    with self._autocast():
                        rollouts = generate(
                            student,
                            self.tokenizer,
                            [chosen[n].token_ids for n in numbers],
                            r.sampling,
                            batch_size=r.batch_size,
                        )
                    for n, rollout in zip(numbers, rollouts, strict=True):
                        read = for_teacher(rollout, chosen[n], aligners, ends)
                        parts[n < num_held_out].append(read)
                advance()
        return parts[0], parts[1]

    def _say_alignment(self, rollouts: Sequence[Rollout]) -> None:
        share = rollout_metrics(rollouts, self.device, aligned=True)["align/ratio"]
        logger.info(f"{share:.0%} of the student's tokens end where the teacher's do")
        if share < FEW_PAIRS:
            logger.info(
                "note: at the other tokens nothing is compared. Check response_length/mean and the "
                "accuracy after a few steps. The student may learn more from a teacher whose "
                "tokenizer is closer to its own"
            )

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.cfg.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.cfg.autocast))

    @torch.no_grad()
    def _stream(self, models: Prepared, rollouts: Sequence[Rollout], what: str, see: See) -> None:
        """Run both models on rollouts, and call ``see`` with the states of each layer and batch."""
        cfg = self.cfg
        batches = micro_batches(rollouts, cfg.micro_batch_tokens)
        with self.progress(what, len(batches)) as advance:
            for part in batches:
                batch = self._collate(part, self.device)
                with self._autocast():
                    stream_batch(models, batch, self._supervise(batch), see)
                advance()

    def _collate(self, rollouts: Sequence[Rollout], device: torch.device) -> Batch:
        other = self.checked.teacher_tokenizer
        pad = None if other is None else other.pad_token_id
        return collate(rollouts, self.tokenizer.pad_token_id, device, pad)

    def _supervise(self, batch: Batch) -> Supervision:
        cfg = self.cfg
        return supervise(
            batch.response_mask, cfg.positions, cfg.k, cfg.shift, partner_BT=batch.partner
        )

    def _statistics(
        self, models: Prepared, rollouts: Sequence[Rollout]
    ) -> dict[int, PairStatistics]:
        """Compute the statistics of all ranks' rollouts, by student block."""
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        statistics = {
            block: PairStatistics.empty(models.student.width, models.teacher.width, device)
            for block, _ in models.pairs
        }
        products = getattr(torch, self.cfg.products)

        def see(block: int, student: Tensor, rows: Tensor, teacher: Tensor) -> None:
            statistics[block].update(student, teacher, rows, products)

        self._stream(models, rollouts, "statistics of both models", see)
        for one in statistics.values():
            one.reduce_over_ranks()
        return statistics

    def _sgd(
        self,
        models: Prepared,
        statistics: dict[int, PairStatistics],
        bases: dict[int, TeacherBasis],
        fitted: Sequence[Rollout],
        held_out: Sequence[Rollout],
    ) -> dict[int, Tensor]:
        """Fit the student projectors with AdamW on a sample of rows, and return them by block.

        The rows are collected in a second pass over the rollouts, because the targets need P_T and
        mu_T, which are known only after the first.
        """
        cfg, blocks = self.cfg, [block for block, _ in models.pairs]

        def keep(rollouts: Sequence[Rollout], what: str) -> KeptRows:
            kept = KeptRows(blocks, self._count_rows(rollouts), cfg.sgd.max_rows, cfg.seed)

            def see(block: int, student: Tensor, rows: Tensor, teacher: Tensor) -> None:
                picked = kept.pick(block, len(rows)).to(rows.device)
                z = project_rows(teacher, picked, *self._teacher_side(bases, statistics, block))
                kept.keep(block, student[rows[picked]], z)

            self._stream(models, rollouts, what, see)
            return kept

        parts = keep(fitted, "rows for sgd"), keep(held_out, "held-out rows for sgd")
        projectors = {}
        with self.progress("sgd", len(blocks)) as advance:
            for block in blocks:
                (h, z), (other_h, other_z) = (kept.of(block) for kept in parts)
                projectors[block] = sgd(h, z, other_h, other_z, cfg.sgd, cfg.seed, self.device)
                advance()
        return projectors

    def _count_rows(self, rollouts: Sequence[Rollout]) -> int:
        """Count the supervised rows of the rollouts."""
        cfg, total = self.cfg, 0
        for part in micro_batches(rollouts, cfg.micro_batch_tokens):
            total += self._supervise(self._collate(part, torch.device("cpu"))).rows.numel()
        return total

    def _teacher_side(
        self, bases: dict[int, TeacherBasis], statistics: dict[int, PairStatistics], block: int
    ) -> tuple[Tensor, Tensor]:
        """Return P_T and mu_T, float32, on the models' device."""
        return (
            bases[block].directions.float().to(self.device),
            statistics[block].teacher_mean.float().to(self.device),
        )

    def _judge(
        self,
        models: Prepared,
        statistics: dict[int, PairStatistics],
        bases: dict[int, TeacherBasis],
        student_proj: dict[int, Tensor],
        held_out: Sequence[Rollout],
    ) -> Bridge:
        """Compare the projections of held-out rows, and return the bridge with the results."""
        fitted = {block: p.to(self.device) for block, p in student_proj.items()}
        teacher_side = {
            block: self._teacher_side(bases, statistics, block) for block in student_proj
        }
        agreements = self._agreements(models, fitted, teacher_side, held_out)
        ranks = self._rank_reports(statistics, bases, student_proj, agreements)
        first, _ = models.pairs[0]
        held_out_rows = agreements[first][0].total_rows(self.device)
        return Bridge(
            {block: p.cpu() for block, p in fitted.items()},
            {block: p.cpu() for block, (p, _) in teacher_side.items()},
            {block: m.cpu() for block, (_, m) in teacher_side.items()},
            self._info(models.pairs, statistics[first].count, held_out_rows, ranks),
        )

    def _agreements(
        self,
        models: Prepared,
        fitted: dict[int, Tensor],
        teacher_side: dict[int, tuple[Tensor, Tensor]],
        held_out: Sequence[Rollout],
    ) -> dict[int, tuple[Agreement, Agreement]]:
        """Compute, by block, the agreement of a random and of the fitted P_S, in one pass."""
        cfg = self.cfg
        random = random_student_proj(cfg.rank, self.student.width, cfg.seed).to(self.device)
        ranks = ranks_up_to(cfg.rank)
        agreements = {block: (Agreement(ranks), Agreement(ranks)) for block, _ in models.pairs}

        def see(block: int, student: Tensor, rows: Tensor, teacher: Tensor) -> None:
            everything = torch.arange(len(teacher), device=teacher.device)
            z = project_rows(teacher, everything, *teacher_side[block])
            for proj, agreement in zip((random, fitted[block]), agreements[block], strict=True):
                agreement.update(project_rows(student, rows, proj), z)

        self._stream(models, held_out, "held-out rows", see)
        return agreements

    def _rank_reports(
        self,
        statistics: dict[int, PairStatistics],
        bases: dict[int, TeacherBasis],
        student_proj: dict[int, Tensor],
        agreements: dict[int, tuple[Agreement, Agreement]],
    ) -> list[RankReport]:
        """Report the quality at every rank, for each pair of layers."""
        cosines = [
            (before.mean_cosines(self.device), after.mean_cosines(self.device))
            for before, after in agreements.values()
        ]
        explained = [bases[block].explained_variance for block in agreements]
        r2 = [student_r2(statistics[b], student_proj[b], bases[b]) for b in agreements]
        return [
            RankReport(
                rank=rank,
                cosine_before=[before[i] for before, _ in cosines],
                cosine_after=[after[i] for _, after in cosines],
                explained_variance=[of_pair[rank - 1].item() for of_pair in explained],
                student_r2=[of_pair[rank - 1].item() for of_pair in r2],
            )
            for i, rank in enumerate(ranks_up_to(self.cfg.rank))
        ]

    def _info(
        self, pairs: list[tuple[int, int]], rows: int, held_out_rows: int, ranks: list[RankReport]
    ) -> BridgeInfo:
        """Describe the bridge."""
        cfg, checked = self.cfg, self.checked
        return BridgeInfo(
            student=self.student,
            teacher=self.teacher,
            pairs=pairs,
            rank=cfg.rank,
            solver=cfg.solver,
            ridge=cfg.ridge if cfg.solver == "ridge" else None,
            rows=rows,
            held_out_rows=held_out_rows,
            positions=cfg.positions,
            k=cfg.k,
            shift=cfg.shift,
            teacher_input=checked.teacher_input,
            teacher_pairs=None if checked.aligner is None else cfg.teacher.pairs,
            ranks=ranks,
        )


def stream_batch(models: Prepared, batch: Batch, chosen: Supervision, see: See) -> None:
    """Run both models on one batch, and call ``see`` with the states of each student block.

    The teacher runs first; only its supervised rows are kept. ``see`` is then called as the student
    runs.
    """
    teacher_batch = batch.for_teacher
    teacher_states: dict[int, Tensor] = {}

    def keep(block: int, states: Tensor) -> None:
        teacher_states[block] = states.flatten(0, -2)[chosen.teacher_rows]

    teacher_blocks = sorted({block for _, block in models.pairs})
    with watch(models.teacher, teacher_blocks, models.teacher_depth, keep):
        models.teacher.forward(
            teacher_batch.input_ids, teacher_batch.attention_mask, teacher_batch.position_ids
        )
    paired = dict(models.pairs)

    def show(block: int, states: Tensor) -> None:
        see(block, states.flatten(0, -2), chosen.rows, teacher_states[paired[block]])

    with watch(models.student, list(paired), models.student.num_layers, show):
        models.student.forward(batch.input_ids, batch.attention_mask, batch.position_ids)


def free_file(path: str) -> Path:
    """Return ``path``, or a numbered name beside it if a file was created there during the fit."""
    wanted = file = Path(path)
    number = 1
    while file.exists():
        number += 1
        file = wanted.with_name(f"{wanted.stem}.{number}{wanted.suffix}")
    return file


@shown()
def fit(cfg: FitConfig) -> Bridge:
    """Fit a bridge and write it to ``cfg.output``.

    Raises:
        ConfigError: before any weights are loaded, if the configuration could not finish; or later,
            if the hidden states do not allow a fit (see `oprd.bridge.solve`).
    """
    checked = check_fit(cfg)
    try:
        fitter = Fitter(cfg, checked)
        bridge = fitter.run()
        if distributed.rank() == 0:
            output = free_file(cfg.output)
            save_bridge(bridge, output)
            show(fitter.console, tables(bridge.info))
            logger.info(f"bridge: {output}")
        return bridge
    finally:
        distributed.shutdown()
