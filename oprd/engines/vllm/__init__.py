"""vLLM, in a process of its own beside each rank."""
