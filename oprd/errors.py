"""Exceptions for problems that the user can fix, and helpers that collect and raise them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

Attempt = Callable[[Callable[[], Any]], Any]
"""Calls a function and returns its result, or None in a dry run if the hub can't be reached."""


class ConfigError(ValueError):
    """Raised for a configuration that can't run, or models or data that do not fit it.

    The message says what was given, what was expected and what to change.
    """


class Problems:
    """Collects the problems of a configuration and raises them as one error."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def need(self, ok: bool, message: str) -> None:
        """Add ``message`` to the problems unless ``ok``."""
        if not ok:
            self.found.append(message)

    def need_at_least_one(self, values: Mapping[str, int | None]) -> None:
        """Add a problem for each option below 1. An option that is None is not checked."""
        for name, value in values.items():
            self.need(value is None or value >= 1, f"{name} must be at least 1, got {value}")

    def refuse(self) -> None:
        """Raise an error if there are problems.

        Raises:
            ConfigError: with all problems, one a line.
        """
        if self.found:
            raise ConfigError("\n".join(self.found))


def need_package(package: str, extra: str, option: str) -> None:
    """Check that an optional package is installed.

    Args:
        extra: the extra of ``oprd`` that installs the package.
        option: the option that needs the package, for the message.

    Raises:
        ConfigError: if the package is missing; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{option} needs the package {package}, which is not installed: "
            f"pip install 'oprd[{extra}]'"
        )


class Unreachable(ConfigError):
    """Raised if a check needs the hub or a package, and the hub can't be reached or the package is
    not installed. A dry run reports the error and continues."""


def cannot_use(option: str, problem: str) -> Unreachable:
    """Return the error of an option that this machine lacks something for.

    Args:
        problem: what it lacks, and perhaps what to install.
    """
    fix = ", or leave the option out" if "pip install" in problem else ": leave the option out"
    return Unreachable(f"{option} can't be used: {problem}{fix}")


def attempts(unchecked: list[str], dry_run: bool) -> Attempt:
    """Return an `Attempt`.

    Args:
        unchecked: in a dry run, the messages of `Unreachable` errors are appended to this list.
        dry_run: False: `Unreachable` errors are raised.
    """

    def attempt(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Unreachable as error:
            if not dry_run:
                raise
            unchecked.append(str(error))
            return None

    return attempt


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether an error means that the hub could not be reached.

    The hub's own answers (no such repository, no such file) return False.
    """
    text = ""
    while error is not None:
        definite = (RepositoryNotFoundError, HFValidationError)
        if isinstance(error, definite) or type(error) is EntryNotFoundError:
            return False
        text += f"{type(error).__name__} {error}".lower()
        error = error.__cause__ or error.__context__
    signs = ("connect", "offline", "timed out", "name resolution", "proxy", "localentrynotfound")
    return any(sign in text for sign in signs)
