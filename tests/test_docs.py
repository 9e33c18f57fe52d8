"""README and documentation: options exist, links resolve, code compiles, and what is marked runs.

A Python block behind ``<!-- run -->`` is run; behind ``<!-- run: continues -->`` with the names of
the block before it.
"""

import ast
import importlib
import io
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import yaml

from oprd.observability.summary import EvalResult

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("*/*.md"))]
PAGES = [page for page in PAGES if "measured" not in page.parts and not page.is_symlink()]
BLOCK = re.compile(
    r"(?P<mark><!-- run(?P<continues>: continues)? -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)\n(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
SCRIPTS = dict(re.findall(r'^(oprd-\w+) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M))
SECTIONS = (
    "student|teacher|data|rollout|objectives|distill|bridge|opd|optim|fsdp|eval|checkpoint|"
    "watchdog|logging|plan"
)


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """The fenced blocks of a page in these languages, without their indentation."""
    for match in BLOCK.finditer(page.read_text()):
        if match["language"] in languages:
            code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            yield match, code


def headings(page):
    """The anchors of a page's headings, as Markdown makes them."""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            text = re.sub(r"[^\w\s-]", "", line.lstrip("#")).strip().lower()
            yield re.sub(r"[-\s]+", "-", text)


@cache
def options(command, *subcommand):
    """The options that ``command --help`` lists."""
    module, function = SCRIPTS[command].split(":")
    out, arguments = io.StringIO(), [*subcommand, "--help"]
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", [command, *arguments])
    patch.setenv("COLUMNS", "200")
    try:
        with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit):
            getattr(importlib.import_module(module), function)()
    finally:
        patch.undo()
    found = {o for o in re.findall(r"--([\w.]+)", out.getvalue()) if not o.endswith(".help")}
    assert "help" in found or "help" in out.getvalue(), out.getvalue()
    return found


def known(option, among):
    """Whether an option is listed, or is an item of a listed dictionary (not of a section)."""
    parts = option.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    found = next((name for name in names if name in among), None)
    return found is not None and (found == option or not is_section(found, among))


def is_section(option, among):
    return any(o.startswith(f"{option}.") for o in among)


def commands(text):
    """(command, subcommand, its options) of every call of one of our commands in a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            command, rest = word, words[i + 1 :]
            if word.startswith("oprd.cli.") and words[i - 1] == "-m":
                command = "oprd-" + word.removeprefix("oprd.cli.")
            elif word.endswith(".slurm"):
                command = "oprd-train"
            if command in SCRIPTS:
                until = next((n for n, w in enumerate(rest) if w in ("&&", "|", ";")), len(rest))
                given = [w[2:].split("=")[0] for w in rest[:until] if w.startswith("--")]
                plain = [w for w in rest[:until] if not w.startswith("--")]
                yield command, plain[:1] if command == "oprd-bridge" else [], given
                break


def indented(text):
    """Commands that stand in an indented block."""
    return "\n".join(re.findall(r"^    ((?:oprd-|torchrun )(?:.*\\\n)*.*)$", text, re.MULTILINE))


def test_readme_fits_on_a_screen():
    assert len(README.read_text().splitlines()) < 130


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_exist(page):
    text = page.read_text()
    shell = [code for _, code in blocks(page, "bash", "")]
    shell = [code for code in shell if "oprd" in code and not re.search(r"^\w+/ ", code, re.M)]
    for code in [*shell, indented(text)]:
        for command, subcommand, given in commands(code):
            if command == "oprd-doctor":  # takes none
                assert not given
                continue
            unknown = [o for o in given if not known(o, options(command, *subcommand))]
            assert not unknown, f"{command} {' '.join(subcommand)} has no {unknown}"
    everything = set().union(
        *(options(c) for c in SCRIPTS if c not in ("oprd-doctor", "oprd-bridge")),
        options("oprd-bridge", "fit"), options("oprd-bridge", "sweep"),
    )  # fmt: skip
    prose = re.findall(rf"`(?:--)?((?:{SECTIONS})\.[a-z_][\w.]*)(?: [^`]*)?`", text)
    for span in re.findall(r"`(--[a-z][^`]*)`", text):
        prose += re.findall(r"--([a-z][\w.]*)", span)
    others = {"only", "wheels", "full", "adopt"}  # of benchmarks/, which are no commands of ours
    unknown = {o for o in prose if not known(o, everything)} - others
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_is_of_known_options(page):
    for _, code in blocks(page, "yaml"):
        values, flat = yaml.safe_load(code), []

        def walk(value, prefix, flat=flat):
            for key, inner in value.items():
                option = f"{prefix}.{key}" if prefix else key
                flat.append(option)
                if isinstance(inner, dict) and not option.startswith(("eval.sets", "teachers")):
                    walk(inner, option)

        walk(values, "")
        listed = options("oprd-train")
        assert not [o for o in flat if not known(o, listed) and not is_section(o, listed)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    text = BLOCK.sub("", page.read_text())
    for match in LINK.finditer(text):
        path, _, anchor = match["target"].partition("#")
        if "://" in path:
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), f"{name(page)} links to {match['target']}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{name(page)} links to {match['target']}"


def test_every_page_is_in_the_navigation():
    def leaves(items):
        for item in items:
            (value,) = item.values()
            yield from [value] if isinstance(value, str) else leaves(value)

    named = set(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if "measured" not in p.parts}
    assert named == there


def metrics_in_code():
    """The names of metrics that `oprd` writes, with ``<name>`` for what is filled in."""
    kinds = "actor|teacher|rep|val-topk|align|response_length|rollout|time|perf|mem"
    for file in sorted((ROOT / "oprd").rglob("*.py")):
        if "report" in file.parts:  # reads them
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            text = None
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "<>" for v in node.values]
                text = "".join(parts)
            if text is not None and re.fullmatch(rf"({kinds})/[\w@/<>-]*[\w>]", text):
                yield text


def test_metrics_are_explained():
    """Each metric in the code is on the page, and each on the page is in the code."""
    text = (DOCS / "reference" / "run.md").read_text()
    table = text[text.index("## Metrics of a step") : text.index("## Metrics of an evaluation")]
    explained = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        begin = ""
        for metric in re.findall(r"`([^`]+)`", row):
            begin = begin if metric.startswith("/") else metric.split("/")[0]
            full = begin + metric if metric.startswith("/") else metric
            explained.add(re.sub("<.*?>", "<>", full))
    written = set(metrics_in_code()) - {"response_length/<>"}  # looks two of them up
    assert "response_length/empty_ratio" in written
    unexplained, gone = written - explained, explained - written
    assert (sorted(unexplained), sorted(gone)) == ([], [])
    result = EvalResult(
        0.5, 1.0, 50.0, 10.0, 0.0, samples=4, problems=2, stderr=0.1, pass_at={"2": 0.5},
        pass_all={"2": 0.5}, unboxed=0.1, ungraded=1,
    )  # fmt: skip
    after = text[text.index("## Metrics of an evaluation") :]
    for metric in result.metrics("<set>"):
        named = metric.removeprefix("val/<set>/").replace("@4", "@k")
        assert re.search(rf"[`/]{re.escape(named.replace('2', 'j'))}`", after), metric


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles(page):
    for _, code in blocks(page, "python"):
        compile(code, name(page), "exec")


RUNNABLE = [page for page in PAGES if "<!-- run" in page.read_text()]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_marked_code_runs(page):
    names, ran = {}, 0
    for match, code in blocks(page, "python"):
        if match["mark"]:
            names = names if match["continues"] else {"__name__": "docs"}
            exec(compile(code, name(page), "exec"), names)
            ran += 1
    assert ran == page.read_text().count("<!-- run")
    if page == README:  # before and after are one number
        assert names["before"].item() == pytest.approx(names["after"].item(), rel=1e-5)
