"""Weights that some processors would overflow, rounded again before they are written.

An artifact that was compressed for processors with VNNI instructions alone (`--cpu vnni`), before tersor knew of the
difference, or elsewhere, holds int8 weights whose products saturate on others (formats/overflow.py). Clients whose
kernels do that get rows that are scaled as far as their pairs ask, with the least squared error; compressing anew loses
less, since the weights as they came are known there.
"""

from dataclasses import replace
from typing import Literal

from tersor.activations.quantizers import INT8
from tersor.core.errors import InputError
from tersor.exporters.contract import Checkpoint, PackedSite
from tersor.formats.overflow import num_overflowing, without_overflow
from tersor.methods.mse import Mse
from tersor.methods.stats import Stats

Cpu = Literal["any", "vnni"]


def check_cpu(cpu: str) -> None:
    """Raises InputError for a kind of processor that there is not."""
    if cpu not in ("any", "vnni"):
        raise InputError(f"--cpu {cpu} is not one of any, vnni")


def for_any_processor(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint without a weight that overflows, and a note if there were any. Its model changes with it."""
    overflowing = [packed for packed in checkpoint.sites if overflowing_rows(checkpoint, packed)]
    if not overflowing:
        return checkpoint, ()
    examples = checkpoint.need_examples()
    before = examples.run(checkpoint.model)
    made = {packed.site: rescaled(checkpoint, packed) for packed in overflowing}
    after = examples.run(checkpoint.model)
    change = max(((after[n] - y).norm() / y.norm().clamp_min(1e-30)).item() for n, y in before.items())
    first, others = overflowing[0].site.name, len(overflowing) - 1
    note = (
        f"the int8 weights of {first}{f' and {others} more sites' if others else ''} overflow on processors without "
        f"VNNI instructions, so their rows were scaled and rounded again, which changes the model's outputs by "
        f"{change:.2%} (--cpu vnni writes them as they are; compressing again loses less)"
    )
    return replace(checkpoint, sites=tuple(made.get(packed.site, packed) for packed in checkpoint.sites)), (note,)


def overflowing_rows(checkpoint: Checkpoint, packed: PackedSite) -> int:
    """The number of rows of a site with a pair that overflows where its inputs are int8; 0 for all other sites."""
    integers, neighbours = packed.encoded.integers, packed.site.neighbours(checkpoint.model)
    is_int8 = packed.activation is not None and packed.activation.format in INT8
    if not is_int8 or integers is None or not integers.plain_int8 or neighbours is None:
        return 0
    return num_overflowing(integers.stored, neighbours)


def rescaled(checkpoint: Checkpoint, packed: PackedSite) -> PackedSite:
    """A site whose rows are scaled as far as their pairs ask; it takes its place in the model."""
    weight, neighbours = packed.encoded.decode(), packed.site.neighbours(checkpoint.model)
    assert neighbours is not None
    format = without_overflow(packed.encoded.format, neighbours)
    rows = Mse().compress(weight, format, Stats())
    packed.site.replace(checkpoint.model, rows, packed.activation)
    return packed._replace(encoded=rows)
