"""The page that `benchmarks.architectures` writes of its results, in Markdown."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

INTRO = """\
# Architectures

OPRD needs a decoder's blocks, its final norm, and states that the blocks pass on as they are.
`attach`, `oprd-train` and `oprd-bridge` find them by structure and by the names that
transformers' models use, run each model on ten tokens, and refuse one whose states are not what the
loss assumes, by name and before the first step. Of a multimodal model the language part is loaded,
and a note says what is left out. A model that is not in the table: `--dry_run` reads its
configuration, and the first seconds of a run check the rest.

Every family that transformers builds as a causal language model from a small configuration was
built with random weights and put through what oprd does with models. This page is made by a
program; nothing in it is filled in by hand:

```
{commands}
```

The runs behind this page: {versions}, on a CPU.
Their weights are random and their size is small, so the page says that the parts fit together and
that the numbers are right. It does not say how well a real model learns. (Phi-3.5-MoE, `phimoe`,
draws experts at random in training; it is compared in evaluation mode.)

## What a column means

Expected values are what plain autograd computes from the model's own `output_hidden_states`.

- **attach, all; even; last**: `attach` with these layers: the loss, and the gradients of all
  weights.
- **checkpointing**: the same with gradient checkpointing. `none`: transformers has none for it.
- **cut**: a teacher cut to its first two blocks has the states of the whole. `whole`: the model
  does not run cut, so that oprd keeps all of its blocks.
- **dry run**: the check of `oprd-train --dry_run`, which has the configuration alone, says what
  `attach` says. `unchecked`: the model does not run without weights, and the check at the start
  of a run decides.
- **OPD**: on-policy distillation over the full vocabulary, with logits in chunks: the loss and
  gradients of the model's own logits. `materialised`: the model does more to its logits than its
  head, so that oprd asks for `opd.implementation=materialised`.
- **packing**: sequences packed in one row have the states that they have alone, or oprd refuses.
- **LoRA**: an adapter on all linear layers of the blocks learns, the other weights stay, and the
  merged model, saved and loaded by transformers, has the same logits.
- **Bridge**: the loss and gradients of a random bridge.
- **save**: the student's directory, loaded by transformers, has the same logits.
- **FSDP2**: the student, and the cut teacher, sharded over two ranks: the loss and the gradient
  norm of one process.

A number behind `refused` is that of the reason below the table.
"""

SHORT = {"attach, all": "attach, all", "attach, even": "even", "attach, last": "last"}


def reason(text: str) -> str:
    """Return the first sentence of an error message, without what differs between families."""
    text = re.sub(r" \(\w+(, attn_implementation \w+)?\)", "", text.removeprefix("packing: "))
    text = re.sub(r"^the (student|teacher)\b", "the model", text)
    text = re.sub(r"\(they differ by up to [^)]*\)", "", text)
    text = re.sub(r"\d+ and \d+ share", "share", re.sub(r" +", " ", text))
    return re.split(r"\. (?=[A-Z])", text)[0].strip(" .")


def cell(text: str, notes: dict[str, int]) -> str:
    """Return what the table says for an outcome; new reasons are added to ``notes``."""
    kind, _, rest = text.partition(": ")
    if kind == "works" and rest:
        word, _, rest = rest.partition(": ")
        short = {"kept whole": "whole", "materialised only": "materialised"}.get(word)
        if short is None and word == "transformers has none":
            short, rest = "none", ""
        elif short is None:
            short, rest = "works" if word.startswith("its files") else "unchecked", word
        rest = reason(rest) if rest else ""
        return f"{short} [{notes.setdefault(rest, len(notes) + 1)}]" if rest else short
    if kind == "works":
        return "works"
    word = "refused" if kind == "refused" else f"**{kind}**"
    return f"{word} [{notes.setdefault(reason(rest), len(notes) + 1)}]"


def refused_whole(row: Any) -> str | None:
    """Return why oprd knows no decoder in a model; None if it does."""
    texts = set(row.found.values())
    if len(texts) == 1 and "is not a decoder that oprd knows" in (only := texts.pop()):
        return only.partition(": ")[2]
    return None


def differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Return one line for each family whose results differ between two versions."""
    lines = []
    before = {row.kind: row for row in old["rows"]}
    version = old["versions"]["transformers"]
    absent = sorted({row.kind for row in new["rows"]} - before.keys())
    if absent:
        lines.append(f"transformers {version} has no " + ", ".join(f"`{k}`" for k in absent) + ".")
    for row in new["rows"]:
        other = before.get(row.kind)
        if other is None:
            continue
        if (row.cls is None) != (other.cls is None):
            why = other.not_built or row.not_built
            which = version if other.cls is None else new["versions"]["transformers"]
            lines.append(f"`{row.kind}` is not built small with {which}: {one_line(why)}.")
            continue
        other_cells = {c: cell(t, {}).split(" [")[0] for c, t in other.found.items()}
        changed = [
            f"{column}: {was} instead of {now}"
            for column, text in row.found.items()
            if (now := cell(text, {}).split(" [")[0]) != (was := other_cells.get(column, "-"))
        ]
        if changed:
            whys = {reason(t.partition(": ")[2]) for t in other.found.values() if ": " in t}
            whys -= {reason(t.partition(": ")[2]) for t in row.found.values() if ": " in t}
            tail = f" ({'; '.join(sorted(whys))})" if whys else ""
            lines.append(f"`{row.kind}`: {', '.join(changed)}{tail}.")
    return lines


def one_line(text: str | None, limit: int = 160) -> str:
    words = " ".join((text or "").split()).replace("|", "/").rstrip(".")
    return words if len(words) <= limit else words[:limit].rsplit(" ", 1)[0] + " .."


def page(results: Sequence[Mapping[str, Any]], commands: Sequence[str]) -> str:
    """Return the page.

    Args:
        results: of `benchmarks.architectures.read`; further ones are those of other versions.
        commands: the command lines that make it.
    """
    new = results[0]
    built = [row for row in new["rows"] if row.cls is not None]
    whole = {row.kind: why for row in built if (why := refused_whole(row))}
    rows = [row for row in built if row.kind not in whole]
    columns = list(rows[0].found)
    versions = "; ".join(
        ", ".join(f"{name} {value}" for name, value in r["versions"].items()) for r in results
    )
    notes: dict[str, int] = {}
    table = [
        [f"`{row.kind}`", *(cell(row.found[c], notes) if c in row.found else "-" for c in columns)]
        for row in rows
    ]
    counts = Counter(
        "works" if all(not t.startswith(("refused", "FAILS")) for t in row.found.values()) else
        "refused" for row in rows
    )  # fmt: skip
    head = ["family", *(SHORT.get(c, c) for c in columns)]
    lines = [
        INTRO.format(commands="\n".join(commands), versions=versions),
        f"## The table\n\n{len(new['rows'])} families: {counts['works']} work throughout, with "
        f"{counts['refused']} something is refused, {len(whole)} are no decoders that oprd knows, "
        f"and {len(new['rows']) - len(built)} are not built.\n",
        *(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *table]),
        "\n### Reasons\n",
        *(f"{number}. {one_line(text, 300)}" for text, number in notes.items()),
        "\n## Not known\n",
        "oprd finds no list of blocks and final norm in these, and says so before a run. Most are "
        "encoders, or decoders of encoder-decoder models, without a final norm:\n",
    ]
    by_class = defaultdict(list)
    for kind, why in whole.items():
        by_class[why.split(" ")[0]].append(f"`{kind}`")
    lines += ["; ".join(f"{', '.join(kinds)} ({cls})" for cls, kinds in by_class.items()) + "."]
    lines += ["\n## Not built\n", "transformers did not build these from a small configuration:\n"]
    lines += [
        f"- `{row.kind}`: {one_line(row.not_built)}" for row in new["rows"] if row.cls is None
    ]
    for old in results[1:]:
        version = old["versions"]["transformers"]
        different = differences(new, old)
        lines += [f"\n## With transformers {version}\n"]
        lines += [f"- {line}" for line in different] or ["The same."]
    return "\n".join(lines) + "\n"
