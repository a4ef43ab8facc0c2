"""Size of every entropy-coded layer, beside the least that theory allows.

Four numbers, in bits per weight: stored, all side information counted; the zeroth-order entropy of the codes; their
entropy given the classes of their row and column; and the bound below which no code of any kind goes at this error, for
normal weights whose variance is known (Shannon 1959; reverse water-filling over groups of unequal variance, Cover and
Thomas, Elements of Information Theory, 10.3.3). Uniform steps with an ideal entropy code stay 0.255 bits above it at
high rate (Gish and Pierce 1968, https://doi.org/10.1109/TIT.1968.1054193).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.special import ndtri
from torch import Tensor

from tersor.checkpoint.container import DTYPES, Container
from tersor.checkpoint.guards import named_path, shapes_of
from tersor.checkpoint.layout import CODED
from tersor.checkpoint.manifest import MANIFEST, check_files, read_manifest, weights_path
from tersor.checkpoint.open import open_model
from tersor.checkpoint.pack import decoded, sites_of
from tersor.checkpoint.seal import SEAL, Checked, check_sealed
from tersor.checkpoint.source import weight_files
from tersor.codecs.classes import SMALLEST, STEPS, counted, scales_of
from tersor.codecs.floats import SPLITS, bits_of, parted, read_planes
from tersor.codecs.head import Head, read_head
from tersor.codecs.integers import as_matrix, matrix_shape
from tersor.codecs.plan import symbols_of
from tersor.core.errors import InputError
from tersor.core.weights_file import opened
from tersor.formats.trellis import NOISE
from tersor.nn.sites import find_sites

AT_ERROR = (
    "bound: for normal weights, at the error of the codes' steps; the gap of steps alone is 0.255 at high rate, that "
    "of a trellis of 4 to 256 states 0.089 to 0.033"
)
AT_MEASURED = "bound: for normal weights with the variance of each row, at the error that was measured"


@dataclass(frozen=True)
class SiteInfo:
    """One site; all numbers but the weights are bits per weight, None where it has no codes, or the bound is not known.

    Attributes:
        bits: stored, with scales, tables and classes.
        entropy: entropy of the codes, and of exponents with signs and mantissas.
        class_entropy: the same, given the classes of row and column.
        overhead: bits stored beyond that.
        bound: rate-distortion bound for normal weights at this error.
        gap: from there to what is stored.
        num_states: of the trellis whose paths the columns are, 0 for none; entropies are then those of values that are
            known to be even, and of values known to be odd.
    """

    name: str
    format: str
    num_weights: int
    bits: float
    entropy: float | None
    class_entropy: float | None
    overhead: float | None
    bound: float | None
    gap: float | None
    num_states: int = 0


@dataclass(frozen=True)
class Info:
    """Sizes in a file: those of its sites, and of everything else."""

    file: Path
    num_bytes: int
    header_bytes: int
    other_bytes: int
    sites: list[SiteInfo]
    explanation: str

    @property
    def bits(self) -> float:
        """The bits of all sites together."""
        return sum(s.bits * s.num_weights for s in self.sites) / max(1, sum(s.num_weights for s in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for `--json`."""
        return {**asdict(self), "file": str(self.file), "bits_per_weight": self.bits}


@dataclass(frozen=True)
class Verified:
    """A file that is whole, and the folder around it.

    Attributes:
        checked: what became of the other files; None for a file alone.
    """

    file: Path
    num_bytes: int
    num_tensors: int
    checked: Checked | None = None


def verify(path: Path) -> Verified:
    """Read a weights file completely, and hold every other file of its folder against the list of them.

    Raises:
        ArtifactError, or ModelError for plain weights: a file is not whole; names it.
        InputError: the folder cannot be read, or holds a pipe or a device.
    """
    checked = check_sealed(named_path(path)) if path.is_dir() else None
    if path.is_dir() and (path / MANIFEST).exists():
        manifest = read_manifest(path)
        check_files(path, manifest)
        path = weights_path(path, manifest)
    elif (path / SEAL).exists() and not (path / CODED).exists():
        files = weight_files(path)
        return Verified(path, sum(file.stat().st_size for file in files), len(shapes_of(files)), checked)
    elif path.is_dir():
        path /= CODED
    if path.name.endswith(".safetensors"):
        with opened(path) as file:
            return Verified(path, path.stat().st_size, len(list(file.keys())), checked)
    container = open_container(path)
    container.check()
    return Verified(path, path.stat().st_size, len(container.entries), checked)


def open_container(path: Path) -> Container:
    """The container of a folder, or itself. Raises InputError where there is none."""
    file = path / CODED if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path}: has no {CODED}; `tersor pack` makes one")
    return Container(file)


def info(path: Path, against: str | None = None) -> Info:
    """Bits per weight of every layer of a container.

    Args:
        against: the model it was made from, for the error that was really made; of an artifact only.
    """
    container = open_container(path)
    names = list(container.entries)
    groups = {name: [name] for name in names if len(container.entries[name].shape) > 1}
    formats = {name: container.entries[name].dtype for name in groups}
    manifest: dict[str, Any] | None = None
    if path.is_dir() and (path / MANIFEST).exists():
        manifest = read_manifest(path)
        shapes = {n: torch.empty(e.shape, dtype=DTYPES[e.dtype], device="meta") for n, e in container.entries.items()}
        found = sites_of(manifest, shapes)
        groups = {p: [n for n in names if n.startswith(f"{p}.")] for p in found}
        formats = {p: entry["format"] for p, entry in found.items()}
    if against is not None and manifest is None:
        raise InputError(f"--against goes with an artifact, and {path} is none")
    weights = original_weights(against) if against is not None else {}
    sites = []
    for name, parts in groups.items():
        entry = found[name] if manifest is not None else None
        bound = None
        if entry is not None and against is not None:
            if name not in weights:
                raise InputError(f"--against {against} has no weight {name}")
            tensors = container.tensors(parts)
            bound = measured_bound(weights[name], decoded(tensors, {"sites": {name: entry}})[name], entry)
        sites.append(site_info(container, name, parts, formats[name], entry, bound))
    inside = {part for parts in groups.values() for part in parts}
    other = sum(container.stored_bytes(name) for name in names if name not in inside)
    explanation = AT_MEASURED if against is not None else AT_ERROR
    num_bytes = container.path.stat().st_size
    return Info(container.path, num_bytes, container.header_bytes, other, sites, explanation)


def original_weights(name: str) -> dict[str, Tensor]:
    """The weights of a model's sites, by parameter."""
    model = open_model(name).model
    return {site.parameter: site.weight(model).detach() for site in find_sites(model)}


def site_info(
    container: Container,
    name: str,
    parts: list[str],
    format: str,
    entry: Mapping[str, Any] | None,
    bound: float | None,
) -> SiteInfo:
    """The sizes of one site, computed from its parts."""
    shape = entry["shape"] if entry is not None else container.entries[name].shape
    num_weights = max(1, int(np.prod(shape)))
    stored = sum(container.stored_bytes(part) for part in parts)
    entropy = class_entropy = 0.0
    known, num_states = False, 0
    for part in parts:
        codes = SymbolCounts.of(container, part)
        if codes is None or (entry is not None and codes.num_values < num_weights // 16):
            entropy += 8 * container.stored_bytes(part)  # scales and the like, as they are stored
            class_entropy += 8 * container.stored_bytes(part)
            continue
        known, num_states = True, max(num_states, codes.num_states)
        entropy += codes.entropy(by_class=False)
        class_entropy += codes.entropy(by_class=True)
        if format == "coded" and bound is None:
            bound = coded_bound(codes.counts, codes.low, codes.num_states)
    bits = 8 * stored / num_weights
    gap = None if bound is None else bits - bound
    if not known:
        return SiteInfo(name, format, num_weights, bits, None, None, None, bound, gap)
    each, given = entropy / num_weights, class_entropy / num_weights
    return SiteInfo(name, format, num_weights, bits, each, given, bits - given, bound, gap, num_states)


@dataclass(frozen=True, eq=False)
class SymbolCounts:
    """Counts of every symbol of a tensor in every class.

    Attributes:
        low: the value of symbol 0.
        num_raw: bits of each value that are stored as they are.
        num_states: of the trellis whose paths the columns are; 0 if they are none. Even and odd values are then counted
            apart: first the even ones of all classes, then the odd ones.
        planes: of floats, the bytes of the mantissa that are coded, too.
    """

    counts: ndarray
    low: int
    num_raw: int
    num_states: int = 0
    planes: "tuple[SymbolCounts, ...]" = ()

    @property
    def num_values(self) -> int:
        return int(self.counts.sum())

    @property
    def in_one_class(self) -> ndarray:
        """The counts as if all values were in the same class."""
        num_classes = len(self.counts) // (2 if self.num_states else 1)
        return self.counts.reshape(-1, num_classes, self.counts.shape[1]).sum(axis=1)

    def entropy(self, by_class: bool) -> float:
        """Bits of all values, given their class or as if all were in the same."""
        counts = self.counts if by_class else self.in_one_class
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.where(counts > 0, counts / np.maximum(totals, 1), 1.0)
        besides = sum(plane.entropy(by_class) for plane in self.planes)
        return float(-(counts * np.log2(shares)).sum()) + self.num_values * self.num_raw + besides

    @classmethod
    def of(cls, container: Container, name: str) -> "SymbolCounts | None":
        """The codes of a tensor; None for one stored as it is."""
        entry, dtype = container.entries[name], DTYPES[container.entries[name].dtype]
        if entry.codec == "raw":
            return None
        head = bytes(container.checked(container.chunks[name][0], f"{name}, its head"))
        tensor = container.tensor(name)
        planes: list[SymbolCounts] = []
        if entry.codec == "floats":
            split = SPLITS[dtype]
            values, rest = parted(bits_of(tensor), split)
            kept, own = read_planes(memoryview(head), split, values.shape)
            known = read_head(own, values.shape, torch.uint8)
            num_raw = list(kept.values()).count(None) * min(8, split.num_rest)
            planes = [cls.under(each, rest[plane]) for plane, each in kept.items() if each is not None]
        else:
            if entry.packed is not None:
                tensor, dtype = entry.packed.codes(tensor), torch.int8
            values = as_matrix(tensor)
            trellis = entry.codec == "trellis"
            known = read_head(head, matrix_shape(tuple(tensor.shape)), dtype, container.tables, trellis)
            num_raw = known.num_stored_low_bits
        found = replace(cls.under(known, values), num_raw=num_raw, planes=tuple(planes))
        if not known.num_states or known.num_low_bits:
            return found
        odd = (np.arange(found.counts.shape[1]) + found.low) & 1 == 1
        counts = np.concatenate([np.where(odd, 0, found.counts), np.where(odd, found.counts, 0)])
        return replace(found, counts=counts, num_states=known.num_states)

    @classmethod
    def under(cls, head: Head, values: ndarray) -> "SymbolCounts":
        """The symbols of a matrix under its head's classes."""
        symbols = symbols_of(values, head.tables.low, head.num_low_bits)
        return cls(counted(symbols, head.classes.row, head.classes.column), head.tables.low, 0)


def coded_bound(counts: ndarray, low: int, num_states: int = 0) -> float:
    """The bound for codes whose classes hold normal numbers: what steps of one do to each, or the paths of a trellis,
    and water-filling over them at the error of all."""
    if num_states:
        counts = counts.reshape(2, -1, counts.shape[1]).sum(axis=0)
    magnitude = (counts * np.abs(np.arange(counts.shape[1]) + low)).sum(axis=1)
    often = counts.sum(axis=1)
    present = often > 0
    sigma = 2 ** ((scales_of(magnitude[present] / often[present]) + SMALLEST) / STEPS)
    normal = ndtri((np.arange(4096) + 0.5) / 4096)
    error = np.array([np.square(s * normal - np.rint(s * normal)).mean() for s in sigma])
    if num_states:  # where values are small against the steps, a path of zeros makes no more error than they are
        error = np.minimum(NOISE[num_states], sigma**2)
    share = often[present] / often.sum()
    return water_filling(sigma**2, share, float((share * error).sum()))


def measured_bound(weight: Tensor, made: Tensor, entry: Mapping[str, Any]) -> float:
    """The bound for normal rows of the variance that each row of the original has, at the mean squared error."""
    if weight.shape != made.shape:
        raise InputError(f"the original's weight is {tuple(weight.shape)}, and the artifact's {tuple(made.shape)}")
    rows = weight.float().reshape(entry["shape"] if entry["view"] != "transposed" else weight.shape)
    error = (weight.float() - made.float()).square().mean().item()
    variance = rows.double().square().mean(dim=-1).flatten().numpy()
    return water_filling(variance, np.full(len(variance), 1 / len(variance)), error)


def water_filling(variance: Float[ndarray, " n"], share: Float[ndarray, " n"], error: float) -> float:
    """Bits per number of normal numbers, a share of them of each variance, at a mean squared error.

    >>> round(water_filling(np.array([4.0, 0.01]), np.array([0.5, 0.5]), 0.13), 3)
    1.0
    """
    low, high = 0.0, float(variance.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if (share * np.minimum(level, variance)).sum() < error else (low, level)
    if high <= 0:
        return float("inf")
    return float((share * np.log2(np.maximum(variance / high, 1.0))).sum() / 2)
