"""The engine's log: what says why it ended, and what need not be in it."""

from __future__ import annotations

import logging
import re

SHOWN = 15
"""Lines of a log that a message quotes at most."""
_PREFIX = re.compile(
    r"^(\([^)]*pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^]]*\] ?"
)
_NOISE = re.compile(
    r"^\[[IW]\d{4} "  # of PyTorch's C++ side
    r"|.*\b\d+%\|"  # a progress bar
    r"|.*: (Future|User|Deprecation|Runtime|Resource)Warning: "
)
_TROUBLE = re.compile(
    r"Traceback \(most recent call last\)|\w(Error|Exception)\b|\b([Ee]rror|ERROR|[Ff]atal|FATAL)\b"
    r"|terminate called|[Aa]ssertion|out of memory|Segmentation|Abort|Killed|core dumped"
)
_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b")


def cause(log: str) -> list[str]:
    """Return the lines of an engine's log that say why it ended; none if no line does.

    These are the lines from the first sign of trouble on, without vLLM's own notes and warnings,
    libraries' warnings and progress bars. Of many lines the exceptions and the end are returned, at
    most `SHOWN` together.
    """
    lines, after_warning = [], False
    for line in log.splitlines():
        if after_warning and line.startswith("  "):  # the code that a warning quotes
            continue
        after_warning = False
        prefix = _PREFIX.match(line)
        if prefix and prefix[2] in ("ERROR", "CRITICAL"):
            lines.append(line[prefix.end() :])
        elif _NOISE.match(line):
            after_warning = True
        elif not prefix and line.strip():
            lines.append(line)
    first = next((i for i, line in enumerate(lines) if _TROUBLE.search(line)), len(lines))
    found = lines[first:]
    if len(found) <= SHOWN:
        return found
    exceptions = list(dict.fromkeys(line for line in found if _EXCEPTION.match(line)))[: SHOWN // 3]
    return [*exceptions, "..", *found[len(exceptions) + 1 - SHOWN :]]


class Repeated(logging.Filter):
    """Leaves out what vLLM (0.32) writes at every weight sync.

    Rotary embeddings (and a head that is tied to the embeddings) have no weights of their own to
    load, which vLLM reports as "Failed to load weights". Of any other layer the report is kept.
    Notes of success are kept once.
    """

    ROUTINE = ("Reloading and processing weights", "Reloading weights", "Successfully reset prefix")

    def __init__(self, tied_head: bool) -> None:
        super().__init__()
        self.tied_head = tied_head
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep a record."""
        text = record.getMessage()
        if text.endswith("Failed to load weights"):
            layer = text.split(":")[0]
            return not (
                layer.endswith("RotaryEmbedding") or (self.tied_head and layer.endswith("LMHead"))
            )
        routine = next((start for start in self.ROUTINE if text.startswith(start)), None)
        if routine is None:
            return True
        is_new = routine not in self._seen
        self._seen.add(routine)
        return is_new
