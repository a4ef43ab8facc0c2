"""The model card: what was done, what it cost, and how to load it. Everything in it is read from the manifest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.measure.scorecard import Scorecard
from tersor.measure.verdict import Verdict


def model_card(name: str, manifest: Mapping[str, Any], verdict: Verdict, cards: Sequence[Scorecard]) -> str:
    """Markdown for the artifact's README.md."""
    original, compressed = cards
    custom = manifest["model"].get("factory")
    argument = ", model=YourModel()" if custom else ""
    rows = "\n".join(f"| {label} | {before} | {after} |" for label, before, after in comparison(original, compressed))
    schemes = Counter(report["scheme"] for report in manifest["site_reports"])
    formats = "\n".join(f"| `{scheme}` | {count} |" for scheme, count in schemes.most_common())
    about = manifest["machine"]
    return f"""# {name}

`{manifest["source"]["name"]}` compressed by tersor {about["tersor"]}.

**{verdict.sentence()}**

| | original | compressed |
|---|---|---|
{rows}

Measured on: {manifest["task"]["description"]}

## Load it

```python
import tersor

model = tersor.load("{name}"{argument})
```

## What was done

| scheme | sites |
|---|---|
{formats}

The whole recipe is in `recipe.yaml`; every number, site and hash is in `tersor.json`.

Measured with torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]}, on {about["processor"]}
({about["cpu_capability"]}), {about["num_threads"]} threads, seed {manifest["seed"]}.
"""


def comparison(original: Scorecard, compressed: Scorecard) -> list[tuple[str, str, str]]:
    """Rows of label, original, compressed, for tables of any kind."""
    both = (original, compressed)

    def row(label: str, show: Any) -> tuple[str, str, str]:
        before, after = (show(card) for card in both)
        return label, before, after

    ratio = original.file_bytes / compressed.file_bytes
    rows = [
        ("weights file", megabytes(original.file_bytes), f"{megabytes(compressed.file_bytes)} ({ratio:.2f}x smaller)"),
        row("bits per parameter (whole file)", lambda c: f"{c.bits_per_parameter:.2f}"),
        row("tensors in memory", lambda c: megabytes(c.memory_bytes)),
        row("peak memory", lambda c: megabytes(c.peak_memory) if c.peak_memory is not None else "not measured"),
        row("parameters", lambda c: f"{c.num_parameters:,}"),
        row("non-zero", lambda c: f"{c.num_nonzeros:,}"),
        row("MACs per example", lambda c: f"{c.macs:,}"),
        row(original.metric, lambda c: f"{c.score:.4f} [{c.score_interval[0]:.4f}, {c.score_interval[1]:.4f}]"),
    ]
    rows += [
        row(extra, lambda c, e=extra: f"{c.extras[e]:.4f}") for extra in original.extras if extra in compressed.extras
    ]
    for before, after in zip(original.latency, compressed.latency, strict=True):
        low, high = after.speedup_interval
        verb = "no difference measured" if low <= 1 <= high else f"{after.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        rows.append(
            (
                f"latency, batch {before.batch_size}, {before.num_threads} threads (p50 / p95)",
                f"{before.p50:.2f} / {before.p95:.2f} ms",
                f"{after.p50:.2f} / {after.p95:.2f} ms ({verb})",
            )
        )
    if compressed.folder_bytes is not None:
        rows.insert(1, ("whole folder", "", megabytes(compressed.folder_bytes)))
    return rows


def megabytes(num_bytes: int) -> str:
    """Decimal megabytes.

    >>> megabytes(12_345_678), megabytes(4_321)
    ('12.35 MB', '4.32 kB')
    """
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.2f} kB"
