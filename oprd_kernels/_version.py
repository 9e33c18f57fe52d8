"""The package version, in a module of its own so that a build can read it without torch."""

__version__ = "0.1.0"
