"""The laws of a client's layout: what it refuses it says a way out of, and what it writes is the artifact."""

import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from torch import nn

from tersor.activations.quantizers import ACTIVATIONS, Activation
from tersor.exporters.check import check
from tersor.exporters.contract import Checkpoint, Export, Filed, Misfit, PackedSite, Runnable, Written
from tersor.exporters.reopen import reopen
from tersor.formats import FORMATS
from tersor.formats.contract import Encoded
from tersor.nn.sites import Site, find_sites
from tersor.schemes.scheme import Scheme
from tersor.testing.activations import params_for
from tersor.testing.cases import random
from tersor.testing.law import hold, hold_same_parts, speaking_of


def check_exporter(export: Export | Runnable, checkpoint: Checkpoint | None = None) -> None:
    """Hold a client's layout against every law. It need not be in the table of clients yet.

    Args:
        checkpoint: a model that the client holds, to write and to read back (`tersor.jobs.export.open_checkpoint` opens
            an artifact as one); without it nothing is written.

    Raises:
        LawBroken: with a sentence that names the client, the site and what went wrong.
    """
    subject = f"exporter {getattr(export, 'name', type(export).__name__)}"
    with speaking_of(subject):
        keeps_the_contract(export)
    for packed in sites():
        place = f"{packed.site.name} ({packed.site.kind}, {shape_of(packed.site)})"
        with speaking_of(f"{subject}, {place} in {packed.scheme}"):
            for law in SITE_LAWS:
                law(export, packed)
    if checkpoint is not None:
        with speaking_of(f"{subject}, writing {checkpoint.folder}"):
            what_is_written_is_the_artifact(export, checkpoint)


class Places(nn.Module):
    """A weight of every kind: a linear layer in a block, as clients know them, the head, a table and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"q_proj": nn.Linear(256, 64)})
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(64, 256), "layers": nn.ModuleList([block])})
        self.lm_head, self.conv = nn.Linear(256, 64, bias=False), nn.Conv2d(8, 16, 2)


@cache
def places() -> tuple[Site, ...]:
    """The sites that refusals are tried on."""
    return tuple(find_sites(Places()))


@cache
def encoded_in(format: str, shape: tuple[int, int]) -> Encoded:
    """A random weight of this shape, encoded in a format of the table."""
    weight = 0.05 * random(*shape)
    return FORMATS[format].encode(weight, FORMATS[format].fit(weight))


def packed_in(site: Site, format: str, activation: str | None) -> PackedSite:
    """A packed site for the tests, in a given scheme."""
    quantizer = Activation(activation, params_for(ACTIVATIONS[activation])) if activation else None
    return PackedSite(site, encoded_in(format, site.shape), quantizer)


def shape_of(site: Site) -> str:
    """The shape of a site in a message, such as `64 x 256`."""
    return " x ".join(map(str, site.shape))


def sites() -> Iterator[PackedSite]:
    """Every kind of weight in every format that holds it, with its inputs in float and, of linear layers, quantized."""
    for site, format in product(places(), FORMATS):
        if FORMATS[format].why_not(site.shape) is None:
            for activation in (None, *ACTIVATIONS) if site.kind == "linear" else (None,):
                yield packed_in(site, format, activation)


def keeps_the_contract(export: Export | Runnable) -> None:
    """Every member is there; it is a client that runs here, or one that opens what was written."""
    for member in ("name", "suffix", "readers", "holds", "extra", "why_not", "check", "write"):
        hold(hasattr(export, member), f"it has no {member}; see tersor.exporters.contract.WeightLayout")
    known = isinstance(export, Export | Runnable)
    hold(known, "it has neither `runtime` (a client that runs here) nor `packages` and `open` (one that reads it back)")
    filed = bool(export.suffix) == isinstance(export, Filed)
    hold(filed, "a client of one file has a suffix, `foreign` and `beside`; one of a folder has none of them")


def ordinary_weights_are_held(export: Export | Runnable, packed: PackedSite) -> None:
    """A tensor of bf16 is held in any place: what a client cannot pack, it keeps."""
    if packed.scheme == "bf16":
        misfit = export.why_not(packed)
        hold(misfit is None, f"it is refused; a client keeps what it cannot pack: {misfit}")


def refusals_name_what_is_held(export: Export | Runnable, packed: PackedSite) -> None:
    """`instead` is a scheme that recipes can spell and the client holds in the very same place."""
    misfit = export.why_not(packed)
    if misfit is None:
        return
    hold(isinstance(misfit, Misfit), f"why_not gives {misfit!r}; it must give a Misfit or None")
    hold(bool(misfit.holds), "why_not does not say what is held instead")
    scheme = Scheme.parse(misfit.instead)
    problem = scheme.format.why_not(packed.site.shape)
    hold(problem is None, f"why_not advises {misfit.instead}, whose format does not hold the matrix: it {problem}")
    other = packed_in(packed.site, scheme.format.name, scheme.activation)
    hold(export.why_not(other) is None, f"why_not advises {misfit.instead}, and refuses that as well")


SITE_LAWS = [ordinary_weights_are_held, refusals_name_what_is_held]


def what_is_written_is_the_artifact(export: Export | Runnable, checkpoint: Checkpoint) -> None:
    """The client finds every tensor and computes what the model does; writing changes nothing, and twice the same."""
    for packed in checkpoint.sites:
        misfit = export.why_not(packed)
        hold(misfit is None, f"it does not hold {packed.site.name} in {packed.scheme}: give a checkpoint that it holds")
    export.check(checkpoint)
    before = {p.site.name: {name: part.clone() for name, part in p.encoded.parts.items()} for p in checkpoint.sites}
    with tempfile.TemporaryDirectory() as scratch:
        written = [write(export, checkpoint, Path(scratch) / name) for name in ("first", "second")]
        for packed in checkpoint.sites:
            hold_same_parts(packed.encoded.parts, before[packed.site.name], f"writing changes {packed.site.name}")
        first, second = (contents(Path(scratch) / name) for name in ("first", "second"))
        hold(first.keys() == second.keys(), f"written twice, the files are {sorted(first)} and {sorted(second)}")
        other = sorted(name for name in first if first[name] != second[name])
        hold(not other, f"written twice, {', '.join(other)} has other bytes the second time")
        output = output_in(export, Path(scratch) / "first")
        if isinstance(export, Runnable):
            assert written[0] is not None
            check(export, checkpoint, output, written[0])
        else:
            reopen(export, checkpoint, output)


def output_in(export: Export | Runnable, folder: Path) -> Path:
    """The output in a folder: a file of the client's suffix, or the folder."""
    return folder / f"model{export.suffix}" if export.suffix else folder


def write(export: Export | Runnable, checkpoint: Checkpoint, folder: Path) -> Written | None:
    """Write into a new folder; returns what a client that runs here returns."""
    folder.mkdir()
    if not isinstance(export, Runnable):
        list(export.write(checkpoint, output_in(export, folder)))
        return None
    extra = folder.parent / f"{folder.name}-scratch"
    extra.mkdir()
    return export.write(checkpoint, output_in(export, folder), extra)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its path inside."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
