"""The argument parser of all commands, and their common error handling."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from oprd.config.demo import RECIPE, is_demo
from oprd.config.io import explained, option_names
from oprd.errors import ConfigError
from oprd.observability.console import shown
from oprd.observability.signals import Interrupted


class Parser(ArgumentParser):
    """An argument parser that suggests the nearest option for an unknown one, and says where a
    configuration file is wrong.

    Names of options can't be abbreviated, or a typo would be taken for the option.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_path(self, cfg_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a configuration file."""
        if (problem := _not_options(Path(cfg_path))) is not None:
            self.error(problem)
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None):
        """Print the message and exit with code 2."""
        sys.stderr.write(f"{self.prog}: error: {explained(message, option_names(self))}\n")
        sys.exit(2)


def _not_options(file: Path) -> str | None:
    """Say where a file is not YAML, or that it holds no options; None if it does."""
    try:
        text = file.read_text("utf-8")
        found = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        return f"{file} can't be read: {error}"
    except yaml.MarkedYAMLError as error:
        mark, begun = error.problem_mark, error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else f"{file}"
        since = f" that begins in line {begun.line + 1}" if begun else ""
        return f"{place}: not YAML: {error.problem} {error.context or ''}{since}".rstrip()
    except yaml.YAMLError as error:  # a character that YAML does not allow
        return f"{file}: not YAML: {error}"
    if isinstance(found, yaml.MappingNode):
        return None
    what = "it is empty" if found is None else f"it begins {text.strip()[:60]!r}"
    return f"{file}: expected options, one `name: value` a line, but {what}"


PATHS = {
    "student.path": ((), "a local directory or a hub name"),
    "teacher.path": (("teachers",), "a local directory, a hub name, or self:start"),
    "data.train.path": (("data.sources",), "a .jsonl or .parquet file, or a hub data set"),
}
"""Options that name what a run is about, and options that may stand for them."""


def parse_run(
    make_parser: Callable[[], Parser], argv: Sequence[str] | None, demo: Mapping[str, Any]
) -> Namespace:
    """Parse the options of a run.

    If neither a student nor prompts are given, the options default to ``demo``. With a student of
    one's own they default to the method's values, and all of `PATHS` must be given. ``--config
    demo`` names the demo's recipe.

    Args:
        make_parser: returns the command's parser.
        argv: the arguments; None: those of the process.
        demo: the demo's options as plain values; those that the parser does not have are ignored.
    """
    arguments = [_recipe(before, a) for before, a in _pairs(sys.argv[1:] if argv is None else argv)]
    parser = make_parser()
    parser.set_defaults(_flat(demo, option_names(parser)) | dict.fromkeys(PATHS, ""))
    quiet = [a for a in arguments if a not in ("-h", "--help") and not a.startswith("--print_conf")]
    found = parser.parse_args(quiet)
    if all(not found[name] or is_demo(found[name]) for name in ("student.path", "data.train.path")):
        own = make_parser()
        own.set_defaults(_flat(demo, option_names(own)))
        return own.parse_args(arguments)
    missing = [
        f"--{name} ({what})"
        for name, (others, what) in PATHS.items()
        if not found[name] and not any(found.get(other) for other in others)
    ]
    if missing and quiet == arguments:
        parser.error(
            "a run with models of one's own needs student, teacher and prompts. Give "
            f"{', '.join(missing)}, or --config demo to begin from the demo's options"
        )
    return make_parser().parse_args(arguments)


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(["", *arguments], arguments, strict=False))


def _recipe(before: str, argument: str) -> str:
    if before == "--config" and argument == "demo":
        return str(RECIPE)
    return f"--config={RECIPE}" if argument == "--config=demo" else argument


def _flat(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return nested values by the dotted names of options."""
    flat = {}
    for name in names:
        value: Any = values
        for part in name.split("."):
            value = value.get(part, ...) if isinstance(value, Mapping) else ...
        if value is not ... and name:
            flat[name] = value
    return flat


def run_command(prog: str, command: Callable[[], object], interrupted: str = "interrupted") -> None:
    """Run a command. Exit with a message and code 2 after a `ConfigError`, 130 after Ctrl-C, and
    128 plus the signal's number after `Interrupted` (143 for SIGTERM).

    Args:
        prog: name of the program, for the messages.
        interrupted: the message after a signal.
    """
    try:
        with shown():
            command()
    except ConfigError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{prog}: {interrupted}\n")
        sys.exit(128 + (error.signum if isinstance(error, Interrupted) else signal.SIGINT))
