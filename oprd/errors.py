"""The exceptions that mean "this is for the user to fix"."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

Attempt = Callable[[Callable[[], Any]], Any]
"""Calls; what is out of reach becomes None in a dry run."""


class ConfigError(ValueError):
    """A configuration that can't finish, or models or data that do not fit it. The message says
    what was given, what was expected and what to change."""


class Problems:
    """Everything that is wrong with a configuration, to be said at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def need(self, ok: bool, message: str) -> None:
        """Note ``message`` unless ``ok``."""
        if not ok:
            self.found.append(message)

    def need_at_least_one(self, values: Mapping[str, int | None]) -> None:
        """Of options by name; None is an option left out."""
        for name, value in values.items():
            self.need(value is None or value >= 1, f"{name} must be at least 1, got {value}")

    def refuse(self) -> None:
        """End the checks.

        Raises:
            ConfigError: listing what was noted, if anything was.
        """
        if self.found:
            raise ConfigError("\n".join(self.found))


def need_package(package: str, extra: str, option: str) -> None:
    """Check that an optional package is there.

    Args:
        extra: of this package, that installs it.
        option: that needs it.

    Raises:
        ConfigError: saying how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{option} needs the package {package}, which is not installed: "
            f"pip install 'oprd[{extra}]'"
        )


class Unreachable(ConfigError):
    """Something that could not be asked for from here, on the hub or of a package that is not
    installed: a dry run says so and goes on."""


def attempts(unchecked: list[str], dry_run: bool) -> Attempt:
    """An `Attempt`.

    Args:
        unchecked: gets what could not be reached, in a dry run; else that is raised.
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
