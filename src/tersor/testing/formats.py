"""The laws of a format.

What is stored is what was computed: `decode(encode(w, p)) == fake_quantize(w, p)`, to the last bit. All else that the
rest of tersor relies on follows here as well: the parts are laid out as promised, survive a file, are left alone, and
are what the format says of them to training, to the entropy coder and to other programs.
"""

import re

import safetensors.torch
import torch
from torch import Tensor

from tersor.codecs.file_bytes import file_bytes_of_shape
from tersor.core.errors import FormatError
from tersor.formats import FORMATS
from tersor.formats.contract import Encoded, Format, Grid, Params
from tersor.formats.packing import packed_width
from tersor.methods import METHODS
from tersor.testing.cases import random, weights_for, widened
from tersor.testing.law import Law, check_cases, hold, hold_same, hold_same_parts, listed, speaking_of


def check_format(format: Format) -> None:
    """Hold a format against every law, on two dozen weight matrices. It need not be in the table of formats yet.

    Raises:
        LawBroken: with a sentence that names the format, the weight and what went wrong.
    """
    subject = f"format {format.name}"
    for law in FORMAT_TABLE_LAWS:
        with speaking_of(subject):
            law(format)
    for case_law in laws_of(format):
        check_cases(case_law, subject, weights_for(format), format)


# Laws for any weight.


def what_is_stored_is_what_was_computed(format: Format, weight: Tensor) -> None:
    """The law that guards all others."""
    params = format.fit(weight)
    encoded = format.encode(weight, params)
    hold(encoded.format == format, f"encode says that the format is {encoded.format}")
    hold(encoded.shape == tuple(weight.shape), f"encode says that the shape is {encoded.shape}")
    hold_same(encoded.decode(), format.fake_quantize(weight, params), "decode(encode(w)) is not fake_quantize(w)")


def decoded_is_finite_float32(format: Format, weight: Tensor) -> None:
    """Check that no weight, however unusual, decodes to NaN or infinity."""
    decoded = format.encode(weight, format.fit(weight)).decode()
    hold(decoded.dtype is torch.float32, f"decode gives {decoded.dtype}; it must give float32")
    hold(decoded.shape == weight.shape, f"decode gives the shape {list(decoded.shape)}, not {list(weight.shape)}")
    bad = int((~torch.isfinite(decoded)).sum())
    hold(not bad, f"decode gives {bad} numbers that are NaN or infinite; raise FormatError where parts overflow")


def fake_quantize_is_idempotent(format: Format, weight: Tensor) -> None:
    """Check that rounding a representable weight again does not change it."""
    params = format.fit(weight)
    once = format.fake_quantize(weight, params)
    hold_same(format.fake_quantize(once, params), once, "fake_quantize changes what it made itself")


def fake_quantize_is_nearest(format: Format, weight: Tensor) -> None:
    """Check that no other representable weight is closer in any element; candidates come from nearby weights."""
    params = format.fit(weight)
    error = (format.fake_quantize(weight, params) - weight).abs()
    largest = weight.abs().amax(dim=1, keepdim=True)
    for power in range(0, 12):
        noise = random(*weight.shape, seed=power)
        other = format.fake_quantize((weight + noise * largest * 2.0**-power).clamp(-largest, largest), params)
        closer = int(((other - weight).abs() < error - 1e-6 * largest).sum())
        hold(not closer, f"fake_quantize misses the nearest value of {closer} weights: it gives nearer ones to others")


def layout_is_exact(format: Format, weight: Tensor) -> None:
    """Names, dtypes and shapes of the parts are what `layout` promises readers; the bytes follow from them."""
    encoded = format.encode(weight, format.fit(weight))
    check_layout(encoded)
    promised = file_bytes_of_shape(format, encoded.shape)
    made = encoded.num_bytes
    hold(promised in (None, made), f"the parts take {made} bytes, and by the layout {promised}")


def check_layout(encoded: Encoded) -> None:
    """Raises LawBroken unless the parts of an encoded weight are what its format's layout says."""
    layout = encoded.format.layout(encoded.shape)
    made, promised = listed(encoded.parts), listed(layout)
    hold(made == promised, f"the parts are {made}, the layout says {promised}")
    for name, (dtype, shape) in layout.items():
        part = encoded.parts[name]
        hold(part.dtype is dtype, f"{name} is {part.dtype}, the layout says {dtype}")
        sides = zip(shape, part.shape, strict=False)
        fits = part.dim() == len(shape) and all(said in (None, real) for said, real in sides)
        hold(fits, f"{name} has the shape {tuple(part.shape)}, the layout says {shape}")


def rows_decode_alone(format: Format, weight: Tensor) -> None:
    """`rows` gives what a whole decode gives, for repeated rows and for none."""
    encoded = format.encode(weight, format.fit(weight))
    last = weight.shape[0] - 1
    for index in ([last], [0, last, last, 0], [], list(range(last + 1))):
        rows = torch.tensor(index, dtype=torch.long)
        sentence = f"rows {index} decoded alone are not those of the whole matrix; is rows_independent false?"
        hold_same(encoded.rows(rows), encoded.decode()[rows], sentence)


def parts_survive_a_file(format: Format, weight: Tensor) -> None:
    """Check that the parts are the same after writing and reading a safetensors file."""
    encoded = format.encode(weight, format.fit(weight))
    read = safetensors.torch.load(safetensors.torch.save(encoded.parts))
    hold_same_parts(read, encoded.parts, "the parts changed after a save and load")
    again = Encoded(format, encoded.shape, read).decode()
    hold_same(again, encoded.decode(), "decode(encode(w)) changed after a save and load")


def inputs_are_left_alone(format: Format, weight: Tensor) -> None:
    """Nothing writes to the weight, the parameters or the parts."""
    before = weight.clone()
    params = format.fit(weight)
    params_before = {name: param.clone() for name, param in params.items()}
    encoded = format.encode(weight, params)
    parts_before = {name: part.clone() for name, part in encoded.parts.items()}
    encoded.decode().fill_(7.0)
    format.fake_quantize(weight, params).fill_(7.0)
    hold_same(weight, before, "the weight that was given has changed")
    hold_same_parts(params, params_before, "the parameters that were given have changed")
    hold_same_parts(encoded.parts, parts_before, "writing to the decoded weight changes the parts: give a copy")


def same_input_same_bytes(format: Format, weight: Tensor) -> None:
    """Check that the same weight gives the same bytes twice, whatever its strides."""
    parts = format.encode(weight, format.fit(weight)).parts
    hold_same_parts(format.encode(weight, format.fit(weight)).parts, parts, "the same weight gives other bytes")
    strided = weight.t().contiguous().t()
    sentence = "the same weight in another memory order gives other bytes"
    hold_same_parts(format.encode(strided, format.fit(strided)).parts, parts, sentence)


def projector_is_fake_quantize(format: Grid, weight: Tensor) -> None:
    """Check that rounding column by column gives what `fake_quantize` and `encode` give for the whole, to the last bit:
    also halfway between two representable weights, at zero of either sign, and on what was rounded already."""
    params, largest = format.fit(weight), weight.abs().amax(dim=1, keepdim=True)
    snapped = format.fake_quantize(weight, params)
    tries = [weight, 1.5 * weight, snapped, 0 * weight]
    for power in range(0, 10, 3):
        other = format.fake_quantize(snapped + random(*weight.shape, seed=power) * largest * 2.0**-power, params)
        tries.append((snapped + other) / 2)
    project = format.projector(params, (weight.shape[0], weight.shape[1]))
    for turn, values in enumerate(tries):
        picked = range(turn % min(4, weight.shape[1]), weight.shape[1], 4)  # together the tries meet every column
        columns = torch.stack([project(values[:, j].contiguous(), j) for j in picked], dim=1)
        whole = format.fake_quantize(values, params)[:, picked]
        hold_same(columns, whole, f"projector rounds columns {picked.start}, {picked.start + 4}, ... to other values")
        stored = format.encode(values, params).decode()[:, picked]
        hold_same(columns, stored, f"encode stores other values than projector gives, from column {picked.start} on")


def shrink_is_by_group(format: Grid, weight: Tensor) -> None:
    """`grouped` holds every weight once, in order, and zeros at a ragged end; `fit` takes a number for each group."""
    w_ogk = format.grouped(weight)
    whole = torch.equal(w_ogk[w_ogk != 0], weight[weight != 0])
    hold(whole, "grouped does not hold every weight once, in order, with zeros after the last")
    half = torch.full(w_ogk.shape[:2], 0.5)
    hold_same_parts(format.fit(weight, half), format.fit(weight, 0.5), "fit with half the range for every group is not")
    hold_same_parts(format.fit(weight, 2 * half), format.fit(weight), "fit with the whole range for every group is not")


def trainable_parts_are_stored_exactly(format: Format, weight: Tensor) -> None:
    """Training starts from parts that decode to the same weight, and stores what it does not move bit for bit."""
    encoded = format.encode(weight, format.fit(weight))
    parts = dict(encoded.parts)
    unknown = listed(format.trainable_parts.keys() - parts.keys())
    hold(unknown == "nothing", f"trainable_parts names {unknown}, which is no part; the parts are {listed(parts)}")
    for kind in format.trainable_parts.values():
        parts |= kind.prepared(parts)
    prepared = Encoded(format, encoded.shape, parts)
    hold_same(prepared.decode(), encoded.decode(), "preparing the trainable parts changes the weight")
    check_layout(prepared)
    for name, kind in format.trainable_parts.items():
        stored = kind.store(parts[name].float())
        hold_same(stored, parts[name], f"{name} is not stored as it is where nothing was trained")


def views_are_the_weight(format: Format, weight: Tensor) -> None:
    """The integers or floats that other programs are shown decode to the very same weight."""
    encoded = format.encode(weight, format.fit(weight))
    if (grid := encoded.integers) is not None:
        columns = torch.arange(grid.shape[1]) // (grid.group_size or grid.shape[1])
        values = (grid.codes - grid.zero_points[:, columns]) * grid.scale.float()[:, columns]
        sentence = "(codes - zero_points) * scale of as_integers is not the weight"
        hold_same(values + 0.0, encoded.decode() + 0.0, sentence)
    floats = encoded.floats
    if floats is not None and floats.values.is_floating_point():
        values = floats.values.float() * (1.0 if floats.scale is None else floats.scale.float())
        hold_same(values + 0.0, encoded.decode() + 0.0, "values * scale of as_floats is not the weight")


def packing_fits_the_parts(format: Format, weight: Tensor) -> None:
    """The entropy coder takes apart bytes, as many as that many codes fill."""
    encoded = format.encode(weight, format.fit(weight))
    for name, (bits, num_codes) in format.packing(encoded.parts, encoded.shape).items():
        hold(name in encoded.parts, f"packing names {name}, which is no part")
        part = encoded.parts[name]
        hold(part.dtype is torch.uint8, f"packing names {name}, which is {part.dtype} and not uint8")
        width = part.shape[-1]
        fits = packed_width(num_codes, bits) == width
        hold(fits, f"packing says that {num_codes} codes of {bits} bits fill a row of {name}, which has {width} bytes")


FORMAT_LAWS = [
    what_is_stored_is_what_was_computed,
    decoded_is_finite_float32,
    fake_quantize_is_idempotent,
    fake_quantize_is_nearest,
    layout_is_exact,
    rows_decode_alone,
    parts_survive_a_file,
    inputs_are_left_alone,
    same_input_same_bytes,
    trainable_parts_are_stored_exactly,
    views_are_the_weight,
    packing_fits_the_parts,
]

GRID_LAWS = [projector_is_fake_quantize, shrink_is_by_group]


def laws_of(format: Format) -> list[Law]:
    """The laws that a format keeps for any weight: those of every format, and those of grids where it is one."""
    return [*FORMAT_LAWS, *(GRID_LAWS if isinstance(format, Grid) else [])]


# Laws of the format as such.


def name_finds_it(format: Format) -> None:
    """The name is safe in a recipe, and leads back to this very format once it is in the table."""
    safe = re.fullmatch(r"[a-z0-9][a-z0-9_.:+-]*", format.name) is not None
    hold(safe, f"the name '{format.name}' is not safe in a scheme: use a-z, 0-9 and _ . : + -")
    listed_there = FORMATS.get(format.name, format)
    hold(listed_there == format, f"the table has another format of this name, {listed_there}")


def usual_methods_fill_it(format: Format) -> None:
    """The methods that it names for those who name none are in the table, and accept it."""
    for kind, name in format.usual_methods._asdict().items():
        hold(name in METHODS, f"usual_methods.{kind} is '{name}', which is no method; those are {listed(METHODS)}")
        problem = METHODS[name]().accepts(format)
        hold(problem is None, f"usual_methods.{kind} is '{name}', which does not accept it: {problem}")


def misfit_names_a_way_out(format: Format) -> None:
    """A refusal says the number of columns, and a format of the table that holds them."""
    for num_columns in (1, 7, 32, 33, 48, 64, 96, 100, 128, 192, 1543):
        problem = format.why_not((16, num_columns))
        if problem is None:
            format.encode(torch.ones(16, num_columns), format.fit(torch.ones(16, num_columns)))
            continue
        hold(str(num_columns) in problem, f"why_not of 16 x {num_columns} does not say {num_columns}: '{problem}'")
        named = [FORMATS[word] for word in words(problem) if word in FORMATS]
        hold(bool(named), f"why_not of 16 x {num_columns} names no format of the table to use instead: '{problem}'")
        fits = all(other.why_not((16, num_columns)) is None for other in named)
        hold(fits, f"why_not of 16 x {num_columns} names a format that does not hold it either: '{problem}'")


def overflow_is_said(format: Format) -> None:
    """Weights beyond what the parts can hold raise a FormatError naming the format; nothing becomes infinite."""
    for largest in (6e4, 1e5, 1e6, 3e8, 3e38):
        weight = widened(largest * torch.linspace(-1, 1, 4 * 128).view(4, 128), format)
        try:
            encoded = format.encode(weight, format.fit(weight))
        except FormatError as problem:
            message = str(problem)
        else:
            finite = bool(torch.isfinite(encoded.decode()).all())
            hold(finite, f"weights up to {largest:g} decode to infinity or NaN; raise FormatError where parts overflow")
            continue
        said = format.name in message and "overflow" in message
        hold(said, f"the error for weights up to {largest:g} does not name the format and say 'overflow': '{message}'")


FORMAT_TABLE_LAWS = [name_finds_it, usual_methods_fill_it, misfit_names_a_way_out, overflow_is_said]


def words(message: str) -> list[str]:
    """The words of a message, without the punctuation around them."""
    return [word.strip(",;:.'\"()`") for word in message.split()]


def params_of(encoded: Encoded) -> Params:
    """The parameters an encoded weight was made with: those that are parts; the rest fitted to what it decodes to."""
    fitted, parts = encoded.format.fit(encoded.decode()), encoded.parts
    return {
        name: parts[name] if name in parts and parts[name].dtype == param.dtype else param
        for name, param in fitted.items()
    }
