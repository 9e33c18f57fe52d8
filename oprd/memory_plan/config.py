"""Configuration of the memory plan."""

from __future__ import annotations

from dataclasses import dataclass

from oprd.errors import Problems
from oprd.memory_plan.shapes import Shape


@dataclass
class PlanConfig:
    """With ``--dry_run``: print the memory that each GPU would need, and whether it fits.

    Attributes:
        gpus: number of GPUs to plan for; null: no plan.
        memory_gib: memory of each GPU in GiB; null: that of this machine's first GPU.
        student: shape of the student, if its configuration can't be loaded here.
        teacher: shape of the teacher, if its configuration can't be loaded here; null: the
            student's shape if that is given.
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
