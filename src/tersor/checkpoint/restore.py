"""A model filled from an artifact's tensors: packed sites against their formats' layouts, and everything else."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.activations.quantizers import Activation, activation_named
from tersor.checkpoint.container import DTYPES, Container
from tersor.checkpoint.layout import CODED
from tersor.core.errors import ArtifactError, FormatError, ModelError, UnknownName
from tersor.core.weights_file import read_weights
from tersor.formats import format_named
from tersor.formats.coded import Coded, row_and_column_scales
from tersor.formats.contract import Encoded
from tersor.nn.sites import Site


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, coded or not. Raises ArtifactError if it is damaged."""
    if path.name == CODED:
        return Container(path).tensors()
    try:
        return read_weights(path)
    except ModelError as error:
        raise ArtifactError(str(error)) from None


def read_decoded(
    path: Path, shapes: Mapping[str, tuple[int, int]], num_threads: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of a `model.tersor`, and the float32 matrices that its `coded` sites stand for, decoded at once.

    Args:
        shapes: shapes of the matrices of those sites, by parameter.

    Returns:
        The tensors by name, codes that were decoded to matrices on the meta device; and those matrices by parameter. A
        site whose parts are not those of its layout is left to `restore_site`, which says so.

    Raises:
        ArtifactError: the file is damaged.
    """
    container = Container(path)
    codes = {}
    for parameter, shape in shapes.items():
        layout = {f"{parameter}.{part}": expected for part, expected in Coded().layout(shape).items()}
        entries = [container.entries[name] for name in layout if name in container.entries]
        stored = {entry.name: (DTYPES[entry.dtype], tuple(entry.shape)) for entry in entries}
        if stored == layout and container.entries[f"{parameter}.codes"].codec in ("integers", "trellis"):
            codes[f"{parameter}.codes"] = parameter
    tensors = container.tensors([name for name in container.entries if name not in codes], num_threads)
    scales = {}
    for name, parameter in codes.items():
        rows, columns = row_and_column_scales({p: tensors[f"{parameter}.{p}"] for p in ("row", "column", "scale")})
        scales[name] = (rows.flatten(), columns.flatten())
        tensors[name] = torch.empty(shapes[parameter], dtype=torch.int16, device="meta")
    decoded = container.tensors(list(codes), num_threads, scales)
    return tensors, {codes[name]: matrix for name, matrix in decoded.items()}


def restore_site(
    model: nn.Module,
    site: Site,
    entry: Mapping[str, Any],
    tensors: dict[str, Tensor],
    packed: bool,
    matrix: Tensor | None = None,
) -> None:
    """Check one site's parts against its format's layout, and put them in place; `matrix` is what they decode to, if
    that is known and they are not to stay packed."""
    try:
        format, dtype = format_named(entry["format"]), getattr(torch, entry["dtype"])
        input_format = activation_named(entry["activation"]) if entry["activation"] else None
    except UnknownName as error:
        raise ArtifactError(f"{site.name}: {error}") from None
    if tuple(entry["shape"]) != site.shape:
        raise ArtifactError(f"{site.name}: stored as {tuple(entry['shape'])}, but the model has {site.shape} here")
    if (tuple(entry["weight_shape"]), entry["view"]) != (site.fold.weight_shape, site.fold.view):
        raise ArtifactError(
            f"{site.name}: stored for a weight {entry['weight_shape']}, but the model folds {site.fold}"
        )
    parts = {}
    for part, (part_dtype, shape) in format.layout(site.shape).items():
        tensor = tensors.pop(f"{site.parameter}.{part}", None)
        expected = f"{format.name} at {site.name}: part {part} should be {part_dtype} {shape}"
        if tensor is None:
            raise ArtifactError(f"{expected}, and the file does not have it")
        fits = tensor.dim() == len(shape) and all(e is None or e == s for e, s in zip(shape, tensor.shape, strict=True))
        if tensor.dtype != part_dtype or not fits:
            raise ArtifactError(f"{expected}, and the file has {tensor.dtype} {tuple(tensor.shape)}")
        parts[part] = tensor
    encoded = Encoded(format, site.shape, parts)
    check_values(site, encoded)
    if not packed:
        install(site.weight(model), site.fold.unfold(encoded.decode() if matrix is None else matrix).to(dtype))
        return
    activation = None
    if input_format:
        prefix = f"{site.parameter}.input."
        static = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in static.items()}
        promised = {name: (part_dtype, (1,)) for name, part_dtype in input_format.layout.items()}
        if found != promised:
            raise ArtifactError(f"{site.name}: {input_format.name} has the parameters {promised}, and the file {found}")
        activation = Activation(input_format.name, static)
    replace(site, dtype=dtype).replace(model, encoded, activation)


def check_values(site: Site, encoded: Encoded) -> None:
    """Parts whose size the values of others decide are judged by decoding; the shape decides all other parts."""
    left = any(part.is_meta for part in encoded.parts.values())  # in the file, and judged when it is decoded
    if not left and any(None in shape for _, shape in encoded.format.layout(encoded.shape).values()):
        try:
            encoded.decode()
        except FormatError as error:
            raise ArtifactError(f"{site.name}: {error}") from None


def restore_rest(model: nn.Module, tensors: dict[str, Tensor], rest: dict[str, Tensor], folder: Path) -> None:
    """Fill everything that is not packed. Raises ArtifactError unless names of tensors and model are the same."""
    missing, unexpected = sorted(rest.keys() - tensors.keys()), sorted(tensors.keys() - rest.keys())
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which the model does not have"
        raise ArtifactError(f"{folder}: the weights file {what}; the artifact and the model's code do not match")
    for name, tensor in rest.items():
        stored = tensors[name]
        alike = stored.dtype == tensor.dtype or (stored.is_floating_point() and tensor.is_floating_point())
        if tensor.shape != stored.shape or not alike:
            raise ArtifactError(
                f"{name}: stored as {stored.dtype} {tuple(stored.shape)}, "
                f"but the model has {tensor.dtype} {tuple(tensor.shape)}"
            )
        owner, _, attribute = name.rpartition(".")
        install(getattr(model.get_submodule(owner), attribute), stored)


def install(place: Tensor, stored: Tensor) -> None:
    """Have a parameter or buffer hold a stored tensor, wherever the model has it. One on the meta device stays the same
    object, which all places of a tied weight share."""
    if not place.is_meta:
        place.data = stored
        return
    is_parameter = isinstance(place, nn.Parameter)
    made = nn.Parameter(stored, requires_grad=place.requires_grad) if is_parameter else stored.clone()
    torch.utils.swap_tensors(place, made)
