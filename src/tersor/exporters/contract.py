"""The contract of an export to a client: the formats that its files can hold, and how they are written."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from tersor.activations.quantizers import Activation
from tersor.core.errors import InputError
from tersor.exporters.examples import Examples
from tersor.formats.contract import Encoded
from tersor.nn.sites import Site


class PackedSite(NamedTuple):
    """A packed weight of an artifact with its stored tensors; `activation` is None if the input stays float."""

    site: Site
    encoded: Encoded
    activation: Activation | None

    @property
    def scheme(self) -> str:
        """The scheme as recipes write it, such as `int8/int8-dynamic`."""
        return self.encoded.format.name + (f"/{self.activation.format}" if self.activation else "")

    @property
    def is_linear(self) -> bool:
        """True if it is the weight of plain linear layers, stored `[out, in]`, and of nothing else."""
        return self.site.kind == "linear" and self.site.fold.view == "rows"

    @property
    def is_plain(self) -> bool:
        """True if any client holds it as an ordinary 16-bit tensor."""
        floats = self.encoded.floats
        return floats is not None and floats.is_ordinary and self.activation is None

    @property
    def module(self) -> str:
        """The path of the (first) module that owns the weight."""
        return self.site.owners[0].module


class Misfit(NamedTuple):
    """The reason for which a client cannot hold a layer's weight.

    Attributes:
        holds: what the client can hold there, in words.
        instead: a scheme that it would accept.
    """

    holds: str
    instead: str


def misfit_of(packed: PackedSite, holds: str, *, place: bool, fits: bool, instead: str) -> Misfit | None:
    """None if a folder layout can hold a weight, else the `Misfit`: 16-bit tensors are held anywhere.

    Args:
        holds: what the client can hold, in words.
        place: the client packs weights of this kind of layer at all; if not, bf16 is advised.
        fits: the weight's format is one that it packs; if not, the scheme `instead` is advised.
    """
    if packed.is_plain:
        return None
    if not place:
        return Misfit(holds, "bf16")
    return None if fits else Misfit(holds, instead)


@dataclass(frozen=True)
class Checkpoint:
    """An opened artifact, as exporters take it.

    Attributes:
        folder: the artifact, with `config.json` and the tokenizer's files.
        model: the model with its packed weights: a Hugging Face one, but for clients that run here, which take any.
        sites: every packed site.
        kept: all other tensors of the model by name, tied ones once.
        examples: inputs to trace and check the model with; clients that run here need them.
    """

    folder: Path
    model: nn.Module
    sites: tuple[PackedSite, ...]
    kept: dict[str, Tensor]
    examples: Examples | None = None

    def need_examples(self) -> Examples:
        """The examples. Raises InputError without any."""
        if self.examples is None:
            raise InputError(f"{self.folder}: give example inputs: --data FILE, or --shape 3,32,32")
        return self.examples

    @property
    def config(self) -> Any:
        """The model's Hugging Face config."""
        return self.model.config

    @property
    def quantized(self) -> tuple[PackedSite, ...]:
        """The sites that a client must know how to decode."""
        return tuple(packed for packed in self.sites if not packed.is_plain)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that needs no decoding: what was kept, and the sites in a 16-bit format."""
        plain = {packed.site: packed.encoded.floats for packed in self.sites if packed.is_plain}
        values = {site.parameter: site.fold.unfold(floats.values) for site, floats in plain.items() if floats}
        return self.kept | values


class WeightLayout(Protocol):
    """The members that every client's layout has. Codes and scales are copied; nothing is rounded again unless a note
    says so."""

    @property
    def name(self) -> str:
        """The name that `--to` takes."""

    @property
    def suffix(self) -> str:
        """The suffix of the file that is written; empty for a folder."""

    @property
    def readers(self) -> str:
        """The programs that load it."""

    @property
    def holds(self) -> str:
        """The formats that the client holds, and in which layers, in words."""

    @property
    def extra(self) -> str | None:
        """The optional dependency (extra) of tersor that writing needs; None if it needs none."""

    def why_not(self, packed: PackedSite) -> Misfit | None:
        """None if the client can hold the weight, else the reason, with a scheme that it would accept."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Check what no single site shows. Raises FormatError or ModelError with the way out."""


UNMARKED = "it does not say that tersor wrote it"


@runtime_checkable
class Filed(WeightLayout, Protocol):
    """A client that reads one file, perhaps with others beside it."""

    def foreign(self, output: Path) -> str | None:
        """A sentence on why a file is not one that tersor wrote for this client, unchanged since; None if it is.

        The files beside it are checked against what it says of them, too.
        """

    def beside(self, output: Path) -> tuple[str, ...]:
        """The names of the files that may be written beside it."""


@runtime_checkable
class Export(WeightLayout, Protocol):
    """A client that reads artifacts of Hugging Face models; what was written is opened in it before it is kept."""

    @property
    def packages(self) -> tuple[str, ...]:
        """The Python packages that opening needs."""

    def open(self, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, dict[str, Any]]:
        """Open the output with transformers: the model, float32 if the client can, and its `loading_info`."""

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        """Write the file, or fill the empty folder, `output`. Returns notes for the user."""


class Written(NamedTuple):
    """The files that were written for a client that runs here.

    Attributes:
        notes: sentences for the user.
        as_float: a file of the same model with decoded weights and float inputs, to measure against.
        exact: a file that rounds inputs exactly as the artifact does, where the one that was written does not.
        file: the file that the runtime opens, if the output is a folder.
    """

    notes: tuple[str, ...]
    as_float: Path
    exact: Path | None
    file: Path | None = None


@runtime_checkable
class Runnable(WeightLayout, Protocol):
    """A client that runs here: it takes any model, and what was written is run and compared before it is kept."""

    @property
    def runtime(self) -> str:
        """The name in `RUNTIMES` of the runtime that opens the file."""

    def write(self, checkpoint: Checkpoint, output: Path, scratch: Path) -> Written:
        """Write the file, or fill the empty folder, `output`, and others for the check into the folder `scratch`."""
