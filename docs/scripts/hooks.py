"""What `mkdocs build` does besides: equations to MathML, and tables of options from dataclasses.

In a page, ``<!-- options: oprd.config.TrainConfig -->`` becomes one table for each section of that
configuration: option, type, default and meaning, read from the dataclass and its docstring as
``--help`` reads them. ``skip=a,b`` leaves sections out, ``prefix=plan`` puts a name in front.

Equations become MathML while the site is built, which browsers show by themselves: the pages need
no script, font or network for them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse
from latex2mathml.converter import convert

OPTIONS = re.compile(r"<!-- options: (?P<path>[\w.]+)(?P<rest>( \w+=[\w,.]+)*) -->")
MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">'
    r"(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>",
    re.DOTALL,
)

WORDS = {str: "text", int: "integer", float: "number", bool: "true, false"}
"""Plain types, as they are called in the tables."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each marker by its tables."""
    return OPTIONS.sub(_tables, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each equation by MathML."""
    return MATH.sub(_equation, content)


def _equation(match: re.Match[str]) -> str:
    block = match["block"]
    latex = html.unescape(match["inline"] if block is None else block).strip()
    return convert(latex, display="inline" if block is None else "block")


def _tables(match: re.Match[str]) -> str:
    module, name = match["path"].rsplit(".", 1)
    rest = dict(item.split("=") for item in match["rest"].split())
    config = getattr(import_module(module), name)
    skipped = set(rest.get("skip", "").split(","))
    return "\n".join(_section(config(), rest.get("prefix", ""), skipped, top=True))


def _section(values: Any, prefix: str, skipped: set[str], top: bool = False) -> Iterator[str]:
    """Yield the Markdown of a configuration: its own options, then its sections."""
    config = type(values)
    document, types = parse(config.__doc__ or ""), get_type_hints(config)
    meanings = _meanings(config)
    nested = {f.name for f in fields(config) if is_dataclass(getattr(values, f.name))}
    if not top or prefix:
        yield f"\n### `{prefix}`\n"
    if not top:
        yield f"{_text(document.short_description)} {_text(document.long_description)}\n"
    own = [f for f in fields(config) if f.name not in nested and f.name not in skipped]
    if own:
        yield '<div class="options" markdown>\n'
        yield "| option | type | default | meaning |\n|---|---|---|---|"
        for f in own:
            option = f"{prefix}.{f.name}" if prefix else f.name
            kind, default = _type(types[f.name]), _default(getattr(values, f.name))
            yield f"| `{option}` | {kind} | `{default}` | {_cell(meanings[f.name])} |"
        yield "\n</div>\n"
    for f in fields(config):
        if f.name in nested and f.name not in skipped:
            inner = f"{prefix}.{f.name}" if prefix else f.name
            yield from _section(getattr(values, f.name), inner, skipped=set())


def _meanings(config: type) -> dict[str, str]:
    """Return what a dataclass and those that it derives from say about their fields."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        for item in parse(cls.__doc__ or "").params:
            for name in item.arg_name.split(", "):  # "positions, k, shift: as in ``distill``"
                found[name] = item.description or ""
    return found


def _text(text: str | None) -> str:
    return re.sub(r"\s+", " ", (text or "").replace("``", "`"))


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _type(annotation: Any) -> str:
    """Return a type as one writes its values in YAML: "integer or null", "auto, cpu"."""
    if annotation is NoneType:
        return "null"
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_type, arguments))
    if get_origin(annotation) is dict:
        return f"{_type(arguments[1])}, by name"
    if get_origin(annotation) is tuple:
        return f"{len(arguments)} of {_type(arguments[0])}"
    if get_origin(annotation) is list:
        return f"list of {_type(arguments[0])}"
    if is_dataclass(annotation):
        return "options"
    return WORDS[annotation]


def _default(value: Any) -> str:
    """Return a default as YAML on one line."""
    if isinstance(value, dict) and any(is_dataclass(v) for v in value.values()):
        value = {name: vars(item) for name, item in value.items()}
    if isinstance(value, tuple):
        value = list(value)
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return dumped.removesuffix("\n").removesuffix("...").strip()
