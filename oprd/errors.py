"""The exceptions that mean "this is for the user to fix"."""

from __future__ import annotations

from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError


class ConfigError(ValueError):
    """A configuration that can't finish, or models or data that do not fit it. The message says
    what was given, what was expected and what to change."""


class Unreachable(ConfigError):
    """Something on the hub that could not be asked for: neither known to exist nor not to."""


def is_unreachable(error: BaseException | None) -> bool:
    """Whether a loading error says that the hub could not be reached, rather than what it said."""
    text = ""
    while error is not None:
        definite = (RepositoryNotFoundError, HFValidationError)
        if isinstance(error, definite) or type(error) is EntryNotFoundError:
            return False
        text += f"{type(error).__name__} {error}".lower()
        error = error.__cause__ or error.__context__
    signs = ("connect", "offline", "timed out", "name resolution", "proxy", "localentrynotfound")
    return any(sign in text for sign in signs)
