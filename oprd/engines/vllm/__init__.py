"""The vLLM engine: one vLLM process beside each rank."""
