"""GPUs that a recipe is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from oprd.errors import Problems
from oprd.memory_plan.shapes import Shape


@dataclass
class PlanConfig:
    """With ``--dry_run``: say what each GPU would hold, and whether that fits.

    Attributes:
        gpus: that the run is to have; null: no plan.
        memory_gib: of each; null: of this machine's first GPU.
        student: shape of the student, where its configuration can't be loaded from here.
        teacher: the teacher's, likewise; null: the student's.
    """

    gpus: int | None = None
    memory_gib: float | None = None
    student: Shape | None = None
    teacher: Shape | None = None

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: listing everything that is wrong.
        """
        problems = Problems()
        problems.need_at_least_one({"plan.gpus": self.gpus})
        problems.need(
            self.memory_gib is None or self.memory_gib > 0,
            f"plan.memory_gib must be above 0, got {self.memory_gib}",
        )
        problems.refuse()
