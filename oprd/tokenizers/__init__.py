"""Alignment of one text between the tokens of two tokenizers."""
