"""What of vLLM's log is shown when an engine ends, and what is not written at every sync."""

import logging

import pytest

from oprd.engines.vllm.log import SHOWN, Repeated, cause

START = """\
Triton is installed, but doesn't include CPU backend. Disabling Triton.
(MainProcess pid=14639) INFO 11-28 15:50:46 [model.py:733] Resolved architecture: Qwen2ForCausalLM
/venv/vllm/dispatcher.py:138: FutureWarning: `torch.distributed.reduce_op` is deprecated, Error
  if hasattr(value, "__dict__"):
[W1128 15:50:47.568859997 utils.cpp:68] Warning: NUMA binding: an Error is not meant
(MainProcess pid=14639) WARNING 11-28 15:50:48 [base.py:380] Chat template warmup failed
(MainProcess pid=14639) WARNING 11-28 15:50:48 [base.py:380] Traceback (most recent call last):
(MainProcess pid=14639) WARNING 11-28 15:50:48 [base.py:380] ValueError: Tokenizer not available
Loading safetensors: 100%|##########| 1/1 [00:00<00:00, 47.47it/s, Error 0]
WARNING 11-28 15:50:49 [layerwise.py:266] RotaryEmbedding: Failed to load weights
(MainProcess pid=14639) INFO 11-28 15:50:49 [block_pool.py:861] Successfully reset prefix cache
"""
ERROR = "(MainProcess pid=14639) ERROR 11-28 15:51:02 [core.py:912] "


def test_a_killed_engines_log_has_nothing_to_say():
    assert cause(START) == []
    assert cause("") == []


def test_the_cause_is_quoted_without_what_came_before():
    trace = ["Traceback (most recent call last):", "  File x.py, line 3", "ValueError: no room"]
    assert cause(START + "\n".join(trace)) == trace
    crash = ["terminate called after throwing an instance of 'c10::Error'", "Fatal Python error"]
    assert cause(START + "\n".join(crash) + "\n" + START.splitlines()[-1]) == crash


def test_of_a_long_log_the_first_exception_is_kept_too():
    first = ["Traceback (most recent call last):", *(f"  frame {i}" for i in range(40))]
    first.append("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    then = ["Traceback (most recent call last):", *(f"  frame {i}" for i in range(40))]
    then.append("RuntimeError: Engine core initialization failed. See root cause above.")
    lines = cause(START + "".join(f"{ERROR}{line}\n" for line in [*first, *then]))
    assert lines[:2] == [first[-1], then[-1]]
    assert lines[-1] == then[-1]
    assert len(lines) == SHOWN


@pytest.mark.parametrize("tied", [True, False])
def test_routine_lines_of_syncs_are_left_out(tied):
    keep = Repeated(tied_head=tied)

    def kept(text, *arguments):
        level = logging.WARNING if "Failed" in text else logging.INFO
        return keep.filter(logging.LogRecord("vllm.x", level, "f.py", 1, text, arguments, None))

    failed = "%s: Failed to load weights"
    assert not kept(failed, "Llama3RotaryEmbedding")
    assert kept(failed, "ParallelLMHead") != tied  # an untied head without weights is a fault
    assert kept(failed, "QKVParallelLinear")
    took = "Reloading and processing weights took %.2f seconds"
    assert [kept(took, 0.05), kept(took, 0.06)] == [True, False]
    assert [kept("Successfully reset prefix cache") for _ in range(3)] == [True, False, False]
    assert kept("Using LBHNC KV cache layout.")
