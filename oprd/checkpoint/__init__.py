"""Checkpoints, by `torch.distributed.checkpoint`, and the student's files.

A run's ``checkpoints/`` holds a directory for each, complete from the moment it has its name:

    step_00000040/__0_0.distcp  ..   tensors: model, optimizer, each rank's random state
    step_00000040/.metadata          torch.distributed.checkpoint's index of them
    step_00000040/student/           configuration and tokenizer, so that it can be exported
    step_00000040/checkpoint.json    everything else, and size and CRC-32 of the other files
    best.json                        which one checkpoint.keep_best keeps
"""

from oprd.checkpoint.files import Checkpoint, Torn, find, newest
from oprd.checkpoint.resume import Candidates, find_candidates
from oprd.checkpoint.run import RunCheckpoints
from oprd.checkpoint.student import save_student

__all__ = [
    "Candidates",
    "Checkpoint",
    "RunCheckpoints",
    "Torn",
    "find",
    "find_candidates",
    "newest",
    "save_student",
]
