"""Checkpoints of a run, written with `torch.distributed.checkpoint`, and the student's files.

The run's ``checkpoints/`` directory holds one directory per checkpoint. A checkpoint's directory
gets its name only once it is complete:

    step_00000040/__0_0.distcp  ..   tensors: model, optimizer, each rank's random state and the
                                     rollouts that it has sampled ahead (rollout.staleness)
    step_00000040/.metadata          torch.distributed.checkpoint's index of the tensors
    step_00000040/student/           configuration and tokenizer, needed to export the student
    step_00000040/checkpoint.json    everything else; size and CRC-32 of the other files
    best.json                        the checkpoint that checkpoint.keep_best keeps
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
