"""Hugging Face models: loading, the parts that OPRD uses, and checks that a pair is compatible."""
