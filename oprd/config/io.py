"""Conversion of a run's configuration to and from plain values and YAML."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from oprd.config.train import TrainConfig
from oprd.errors import ConfigError

C = TypeVar("C")
UNKNOWN = (
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"Key '(?P<key>[\w.]+)' is not expected"),
)
"""Patterns of jsonargparse's messages for unknown options."""


def to_yaml(cfg: TrainConfig) -> str:
    """Return every option of ``cfg`` as YAML that ``--config`` reads."""
    values = json.loads(json.dumps(asdict(cfg), default=_plain))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Return a value that Python callers may have put into a configuration, as JSON has it."""
    return value.item() if hasattr(value, "item") else str(value)


def from_values(values: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run given by plain values, such as those read from YAML.

    Raises:
        ConfigError: see `made_from`.
    """
    return made_from(TrainConfig, values)


def made_from(kind: type[C], values: Mapping[str, Any]) -> C:
    """Return the configuration of class ``kind`` given by plain values.

    Raises:
        ConfigError: for an unknown option, with a suggestion, or for a value of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    try:
        made = parser.instantiate(parser.parse_object(dict(values)))
    except ArgumentError as error:
        raise ConfigError(explained(str(error), option_names(parser))) from error
    return kind(**vars(made))


def option_names(parser: ArgumentParser) -> list[str]:
    """Return the dotted names of all options of a parser."""
    return [action.dest for action in parser._actions if action.dest != "help"]


def explained(message: str, names: Sequence[str]) -> str:
    """Return jsonargparse's message, or for an unknown option a suggestion from ``names``."""
    for pattern in UNKNOWN:
        if match := pattern.search(message):
            parts = match.groupdict()
            key = ".".join(p for p in (parts.get("group"), parts["key"]) if p)
            near = nearest(key, names)
            suggestion = f"; did you mean {near!r}?" if near else ""
            return f"unknown option {key!r}{suggestion} (--print_config lists them all)"
    return message


def nearest(key: str, names: Sequence[str]) -> str | None:
    """Return the name closest to ``key``, or None if no name is similar."""
    by_last_part = {name.rsplit(".", 1)[-1]: name for name in names}
    for candidates in (names, list(by_last_part)):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=0.6):
            return close[0] if close[0] in names else by_last_part[close[0]]
    return None
