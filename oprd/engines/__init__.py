"""Engines that sample responses: Hugging Face's `generate` on the model itself, or vLLM beside it.

    engine.sync(step)            # load the student's weights after `step` updates
    rollouts = engine.sample(prompts, SamplingParams(max_new_tokens=..))
    engine.start(prompts, ..)    # or let it sample while something else is done
    rollouts = engine.collect(step)
    engine.sleep()               # free the engine's GPU memory for the update

All calls are collective: every rank makes the same ones, each with its own prompts or none.
"""
