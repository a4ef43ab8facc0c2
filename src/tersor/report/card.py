"""The model card: what was done, what it cost, and how to load it. Everything in it is read from the manifest."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.checkpoint.manifest import weights_name
from tersor.measure.latency import Latency
from tersor.measure.scorecard import Scorecard
from tersor.measure.verdict import Verdict

UNMEASURED = "Its quality was not measured, as the original was never in memory whole; `tersor compare` measures both."


def model_card(
    name: str, manifest: Mapping[str, Any], verdict: Verdict | None = None, cards: Sequence[Scorecard] = ()
) -> str:
    """Markdown for the artifact's README.md. Without scorecards, it gives only the size of the files."""
    if cards:
        original, compressed = cards
        rows_and_labels = comparison(original, compressed)
    else:
        before, after = manifest["source"]["bytes"], manifest["files"][weights_name(manifest)]["bytes"]
        rows_and_labels = [("weights file", megabytes(before), f"{megabytes(after)} ({before / after:.2f}x smaller)")]
    headline = verdict.sentence() if verdict else UNMEASURED
    measured = f"Measured on: {manifest['task']['description']}" if cards else ""
    custom = manifest["model"].get("factory")
    argument = ", model=YourModel()" if custom else ""
    rows = "\n".join(f"| {label} | {before} | {after} |" for label, before, after in rows_and_labels)
    schemes = Counter(report["scheme"] for report in manifest["site_reports"])
    formats = "\n".join(f"| `{scheme}` | {count} |" for scheme, count in schemes.most_common())
    instructions = ", ".join(manifest["machine"].get("instruction_sets", ()))
    about, training = manifest["machine"], trained(manifest.get("training", ()))
    return f"""# {name}

`{Path(manifest["source"]["name"]).name}` compressed by tersor {about["tersor"]}.

**{headline}**

| | original | compressed |
|---|---|---|
{rows}

{measured}

## Load it

```python
import tersor

model = tersor.load("{name}"{argument})
```

## What was done

| scheme | sites |
|---|---|
{formats}

{training}The whole recipe is in `recipe.yaml`; every number, site and hash is in `tersor.json`.

Made with torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]}, on
{about["processor"]} ({instructions or about["cpu_capability"]}), seed {manifest["seed"]}.
"""


def trained(curves: Sequence[Mapping[str, Any]]) -> str:
    """A table of the training steps and their losses; empty if nothing was trained."""
    if not curves:
        return ""
    rows = []
    for curve in curves:
        scores = " to ".join(f"{score:.4f}" for _, score in curve["scores"][:1] + curve["scores"][-1:])
        loss = f"{curve['losses'][0]:.4g} to {curve['losses'][-1]:.4g}"
        cells = [
            curve["name"],
            f"{curve['num_steps']:,}",
            loss,
            f"{curve['metric']} {scores}",
            f"{curve['seconds']:.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    return f"""| training | steps | loss | held-out score | seconds |
|---|---|---|---|---|
{table}

"""


ALIKE = 1.25  # times as fast: what an interval must stay within to be called no difference


def comparison(original: Scorecard, compressed: Scorecard) -> list[tuple[str, ...]]:
    """Rows of label, original, compressed, with the ratios that matter."""
    rows = [list(row) for row in scorecard_rows([original, compressed])]
    rows[0][2] += f" ({original.file_bytes / compressed.file_bytes:.2f}x smaller)"
    for row, after in zip(rows[-len(compressed.latency) :], compressed.latency, strict=True):
        low, high = after.speedup_interval
        found = f"{after.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        if low > 1 or high < 1:
            row[2] += f" ({found} the speed)"
        else:  # a wide interval around 1 says nothing, whatever the medians are
            row[2] += " (no difference measured)" if low > 1 / ALIKE and high < ALIKE else f" (cannot tell: {found})"
    return [tuple(row) for row in rows]


def scorecard_rows(cards: Sequence[Scorecard]) -> list[tuple[str, ...]]:
    """One row per quantity, one column per scorecard; latencies last."""
    first = cards[0]

    def row(label: str, show: Callable[[Scorecard], str]) -> tuple[str, ...]:
        return (label, *(show(card) for card in cards))

    rows = [row("weights file", lambda c: megabytes(c.file_bytes))]
    if any(card.folder_bytes is not None for card in cards):
        rows.append(row("whole folder", lambda c: megabytes(c.folder_bytes)))
    rows += [
        row("bits per parameter (whole file)", lambda c: f"{c.bits_per_parameter:.2f}"),
        row("tensors in memory", lambda c: megabytes(c.memory_bytes)),
        row("peak memory", lambda c: megabytes(c.peak_memory)),
        row("parameters", lambda c: f"{c.num_parameters:,}"),
        row("non-zero", lambda c: f"{c.num_nonzeros:,}"),
        row("MACs per example", lambda c: f"{c.macs:,}"),
        row(first.metric, lambda c: f"{c.score:.4f} [{c.score_interval[0]:.4f}, {c.score_interval[1]:.4f}]"),
    ]
    rows += [row(key, lambda c, key=key: f"{c.extras[key]:.4f}") for key in shared_extras(cards)]  # type: ignore[misc]
    for index, latency in enumerate(first.latency):
        rows.append(row(latency_label(latency), lambda c, i=index: latency_text(c.latency[i])))  # type: ignore[misc]
    return rows


def latency_label(latency: Latency) -> str:
    """The name of a timing: what was timed, how large the batch was and on how many threads it ran."""
    on = f"batch {latency.batch_size}, {latency.num_threads} threads"
    names = {"pass": "latency", "prompt": "reading a prompt", "token": "writing"}
    return f"{names[latency.work]}, {on} ({'p50 / p95' if latency.work == 'pass' else 'tokens a second, p50'})"


def latency_text(latency: Latency) -> str:
    """The numbers that belong to `latency_label`."""
    if latency.tokens_per_second is None:
        return f"{latency.p50:.2f} / {latency.p95:.2f} ms"
    return f"{latency.tokens_per_second:.1f}, {latency.p50:.2f} ms"


def shared_extras(cards: Sequence[Scorecard]) -> list[str]:
    """Names of the additional results that every scorecard has."""
    return [key for key in cards[0].extras if all(key in card.extras for card in cards)]


def megabytes(num_bytes: int | None) -> str:
    """Decimal megabytes; a dash for what was not measured.

    >>> megabytes(12_345_678), megabytes(4_321)
    ('12.35 MB', '4.32 kB')
    """
    if num_bytes is None:
        return "-"
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.2f} kB"
