"""The process that grades for `oprd.evaluation.grader_pool`: ``python -m`` this module.

Each line of standard input is a request, ``[grader, response, answer]`` as JSON, and gets a line
with its score, 0 to 1. The system ends the process if a request takes more than the limit, also
within C code, where Python could not. A process without its parent therefore ends too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys

from oprd.data import reasoning_gym
from oprd.evaluation.grading import equal

MEMORY = 4 << 30
"""Bytes of address space. ``9^{9^{9}}`` would take all of the machine's memory."""

IDLE = 6
"""How many times the limit may pass by the clock. The limit itself is of the processor's time, so
that grades do not depend on what else a machine does."""
PREPARATION = 240.0
"""Seconds in which a task of reasoning-gym is imported and makes its question."""

SCORES = {"math": equal, "reasoning_gym": reasoning_gym.score}


def main() -> None:
    """Answer requests until the input ends.

    The first argument is the limit of one request, in seconds of the processor's time.
    """
    limit = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal(r"\frac{1}{2}", "0.5")  # imports and compiles what the first request would wait for
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            grader, response, answer = json.loads(line)
            if grader == "reasoning_gym":
                signal.setitimer(signal.ITIMER_REAL, PREPARATION)
                reasoning_gym.prepare(answer)
            signal.setitimer(signal.ITIMER_REAL, IDLE * limit)
            signal.setitimer(signal.ITIMER_PROF, limit)
            score = float(SCORES[grader](response, answer))
        except Exception:  # what can't be read is a wrong answer
            score = 0.0
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(score, file=answers, flush=True)


if __name__ == "__main__":
    main()
