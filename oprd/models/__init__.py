"""Hugging Face models: loading them, what OPRD needs of them, and whether a pair fits."""
