"""What samples responses: Hugging Face's `generate` on the model itself, or vLLM beside it.

    engine.sync(step)            # it has the student's weights after `step` updates
    rollouts = engine.sample(prompts, max_new_tokens=.., temperature=.., top_p=..)
    engine.sleep()               # its GPU memory is free for the update

All of it is collective: every rank makes the same calls, with prompts of its own or none.
"""
