"""Teacher forward passes beside the student's passes.

The order of the passes is the same on every device: the teacher of micro-batch i + 1 is started
before the student's pass on micro-batch i. On a GPU it runs on a stream of its own. Neither result
depends on the other: within a step the teacher's weights do not change, and its pass draws no
random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

import torch

from oprd.config import TrainConfig
from oprd.errors import ConfigError

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_order(
    parts: Sequence[Part],
    run: Callable[[Part], Result],
    is_free: Callable[[Part], bool],
    stream: torch.cuda.Stream | None = None,
) -> Generator[Callable[[], Result], None, None]:
    """Yield, for each part, a function that waits for what ``run`` returns for it.

    Call it before the next part is asked for. Before a part is yielded, the pass of the next one
    is started, if it is free.

    Args:
        is_free: whether a part's pass may run beside other work.
        stream: the stream that free passes run on; None: the current one.
    """
    started: dict[int, tuple[Result, torch.cuda.Event | None]] = {}

    def start(i: int, on: torch.cuda.Stream | None) -> None:
        if i < len(parts) and i not in started:
            started[i] = _started(partial(run, parts[i]), on)

    def wait(i: int) -> Result:
        start(i, None)  # one that is not free
        result, done = started.pop(i)
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        return result

    try:
        for i in range(len(parts)):
            for j in range(i, min(i + 2, len(parts))):
                if is_free(parts[j]):
                    start(j, stream)
            yield partial(wait, i)
    finally:
        if stream is not None:  # after an error a pass may still be running
            torch.cuda.current_stream(stream.device).wait_stream(stream)


def _started(
    run: Callable[[], Result], stream: torch.cuda.Stream | None
) -> tuple[Result, torch.cuda.Event | None]:
    """Start a pass; return its result, and the event after which it is there.

    The pass first waits for everything that the current stream has been given. So inputs are there,
    no more than one pass is ahead, and what the pass allocates may reuse memory that was freed
    after its last use was queued: its caller frees a result only then.
    """
    if stream is None:
        return run(), None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        result = run()
        return result, stream.record_event()


def check_overlap(cfg: TrainConfig, ranks: int) -> list[str]:
    """Return notes on ``overlap``.

    Raises:
        ConfigError: if no teacher could run beside the student.
    """
    if not cfg.overlap:
        return []
    if all(t.shares_student for t in cfg.all_teachers.values()):
        raise ConfigError(
            "overlap=true, but the teacher is the student itself, whose weights can't be in two "
            "passes at once: leave overlap out, or use the teacher self:start"
        )
    if cfg.fsdp.active(ranks) and cfg.fsdp.teacher != "replicated":
        raise ConfigError(
            f"overlap=true with fsdp.teacher={cfg.fsdp.teacher}: the gathers of two sharded models "
            "would wait for each other. Set fsdp.teacher=replicated, or leave overlap out"
        )
    return [
        "overlap: the outputs of two teacher passes are held, and the next teacher pass runs "
        "beside the student's (on a CPU: before it)"
    ]


def side_stream(cfg: TrainConfig, device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream for teachers' passes; None if there is none to run on."""
    return torch.cuda.Stream(device) if cfg.overlap and device.type == "cuda" else None
