"""The laws: what every format, method and activation satisfies, as plain functions.

Each law takes a table's entry and what to try it on, and raises AssertionError where the entry breaks it. test_laws.py
runs all of them over FORMATS, METHODS and ACTIVATIONS, so a new line in a table is covered without new test code. A
format or method of your own can be held against them just the same:

    for weight in weights_for(format).values():
        for law in FORMAT_LAWS:
            law(format, weight)
"""

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any
from zlib import crc32

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.activations.quantizers import ACTIVATIONS, Activation, ActivationFormat, activation_named
from tersor.core.errors import FormatError
from tersor.formats import FORMATS, format_named
from tersor.formats.contract import Encoded, Format, Grid, Params, Sparse
from tersor.kernels import reference
from tersor.methods import METHODS
from tersor.methods.contract import Method
from tersor.methods.stats import Stats
from tersor.methods.zero_mask import ZeroMask
from tersor.nn.packed import Fold, PackedLinear, PackedWeight, pack_layer
from tersor.schemes.scheme import Scheme

# What the laws are tried on.


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def odd_weights() -> dict[str, Tensor]:
    """Matrices that real checkpoints hold, and some they had better not."""
    outliers = random(6, 256, seed=1)
    outliers[0, 3], outliers[2, 200], outliers[5, 0] = 300.0, -70.0, 1000.0
    islands = random(4, 256, seed=2)
    islands[0], islands[1, :128], islands[2, 64:] = 0.0, 0.0, 0.0
    return {
        "gaussian": 0.02 * random(8, 128),
        "heavy tails": 0.02 * random(8, 128, seed=3) / random(8, 128, seed=4).abs().clamp_min(0.01),
        "outliers": outliers,
        "whole numbers": random(4, 128, seed=5).mul(3).round(),
        "rounded to fp16": random(4, 128, seed=6).half().float(),
        "rounded to bf16": random(4, 128, seed=7).bfloat16().float(),
        "zeros": torch.zeros(4, 128),
        "groups of zeros": islands,
        "constant": torch.full((4, 128), 0.37),
        "all positive": random(4, 128, seed=8).abs() + 0.5,
        "all negative": -random(4, 128, seed=9).abs() - 0.5,
        "tiny": 1e-6 * random(4, 128, seed=10),
        "where fp16 scales are coarse": -torch.logspace(-8, -3, 24).view(24, 1) * (1 + random(24, 128, seed=16).abs()),
        "huge": 1e4 * random(4, 128, seed=11).clamp(-6, 6),
        "single row": random(1, 128, seed=12),
        "odd columns": random(5, 37, seed=13),
        "single column": random(7, 1, seed=14),
        "single weight": random(1, 1, seed=15),
    }


def weights_for(format: Format) -> dict[str, Tensor]:
    """The odd weights that the format holds."""
    wide = {name: widened(weight, format) for name, weight in odd_weights().items()}
    return {name: w for name, w in wide.items() if format.why_not((w.shape[0], w.shape[1])) is None}


def widened(weight: Tensor, format: Format) -> Tensor:
    """The weight; where the format wants more columns and the rows are even, two rows side by side."""
    num_rows, num_columns = weight.shape
    if format.why_not((num_rows, num_columns)) is None or num_rows % 2:
        return weight
    return weight.reshape(num_rows // 2, 2 * num_columns)


def inputs() -> dict[str, Tensor]:
    """Activations `[..., in]`, a token in each row."""
    outliers = random(6, 128, seed=20)
    outliers[2, 5] = 500.0
    return {
        "one token": random(1, 128, seed=21),
        "a vector": random(128, seed=22),
        "tokens": random(33, 128, seed=23),
        "a batch": random(2, 5, 128, seed=24),
        "two axes of batch": random(2, 3, 4, 128, seed=25),
        "an outlier token": outliers,
        "a zero token": torch.cat([random(2, 128, seed=26), torch.zeros(1, 128)]),
        "tiny": 1e-6 * random(3, 128, seed=27),
        "no token": torch.zeros(0, 128),
        "no token in a batch": torch.zeros(2, 0, 128),
    }


def stats_for(weight: Tensor) -> dict[str, Stats]:
    """None, and what calibration could give, with columns that never fire."""
    rows, columns = random(weight.shape[0], seed=30).square(), random(weight.shape[1], seed=31).square()
    columns[::3] = 0
    columns /= columns.mean().clamp_min(1e-6)
    curvature = Stats(row_weight=rows, column_weight=columns)
    return {"no data": Stats(), "curvature": curvature, "moments": moments(weight.shape[1])}


def cases_for(method: Method, format: Format) -> dict[str, tuple[Tensor, Stats]]:
    """Every odd weight that the format holds, without data and with all that the method reads."""
    cases = {}
    for label, weight in weights_for(format).items():
        for kind, stats in stats_for(weight).items():
            told = {name for name, value in vars(stats).items() if value is not None}
            if kind == "no data" or method.needs & told:
                cases[f"{label}, {kind}"] = (weight, stats)
    return cases


@cache
def moments(num_columns: int) -> Stats:
    """Of a dozen correlated inputs that drifted from the original's: singular, with features that never fire."""
    original = random(12, num_columns, seed=33) @ random(num_columns, num_columns, seed=34) / num_columns**0.5
    original[:, ::5] = 0
    x = original + 0.1 * original.roll(1, dims=0)
    return Stats(
        second_moment=x.t() @ x / len(x),
        cross_moment=original.t() @ x / len(x),
        mean=x.mean(0),
        largest=x.abs().amax(0),
        sample=x,
        num_tokens=len(x),
    )


def importance(weight: Tensor, stats: Stats) -> Tensor:
    """How much an error in each column counts `[in]`, with a mean of one and 1 % of that added: by the energy of the
    inputs where that is known, else by the curvature."""
    energy = stats.column_weight if stats.second_moment is None else stats.second_moment.diagonal()
    if energy is None or not energy.any():
        return torch.ones(weight.shape[1])
    return energy / energy.mean() + 0.01


def pairs() -> Iterator[tuple[str, str]]:
    """Every method with every format it accepts, by name."""
    for method_name, method in METHODS.items():
        for format_name, format in FORMATS.items():
            if method().accepts(format) is None:
                yield method_name, format_name


def share(cases: dict[str, Any], of: int, *entries: object) -> dict[str, Any]:
    """Every `of`-th case, a different share for other entries, so that the lines of a table together meet all."""
    of = min(of, len(cases))
    return dict(list(cases.items())[crc32(repr(entries).encode()) % of :: of])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, signs of zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def same_parts(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def params_of(encoded: Encoded) -> Params:
    """The parameters an encoded weight was made with: those that are parts; the rest fitted to what it decodes to."""
    fitted, parts = encoded.format.fit(encoded.decode()), encoded.parts
    return {
        name: parts[name] if name in parts and parts[name].dtype == param.dtype else param
        for name, param in fitted.items()
    }


def check_layout(encoded: Encoded) -> None:
    layout = encoded.format.layout(encoded.shape)
    assert encoded.parts.keys() == layout.keys()
    for name, (dtype, shape) in layout.items():
        part = encoded.parts[name]
        assert part.dtype is dtype, f"{name} is {part.dtype}, the layout says {dtype}"
        assert part.dim() == len(shape), f"{name} has shape {tuple(part.shape)}, the layout says {shape}"
        fits = all(said in (None, real) for said, real in zip(shape, part.shape, strict=True))
        assert fits, f"{name} has shape {tuple(part.shape)}, the layout says {shape}"


# Laws of a format, for any weight.


def what_is_stored_is_what_was_computed(format: Format, weight: Tensor) -> None:
    """decode(encode(w)) == snap(w), bit for bit: the law that guards all others."""
    params = format.fit(weight)
    encoded = format.encode(weight, params)
    assert encoded.format == format
    assert encoded.shape == tuple(weight.shape)
    assert same_bits(encoded.decode(), format.fake_quantize(weight, params))


def decoded_is_finite_float32(format: Format, weight: Tensor) -> None:
    """No weight, however odd, decodes to NaN or infinity."""
    decoded = format.encode(weight, format.fit(weight)).decode()
    assert decoded.dtype is torch.float32
    assert decoded.shape == weight.shape
    assert torch.isfinite(decoded).all()


def snap_is_idempotent(format: Format, weight: Tensor) -> None:
    """A representable weight stays as it is."""
    params = format.fit(weight)
    once = format.fake_quantize(weight, params)
    assert same_bits(format.fake_quantize(once, params), once)


def snap_is_nearest(format: Format, weight: Tensor) -> None:
    """No other weight of the set is closer, in any element: not what a neighbour of the weight snaps to."""
    params = format.fit(weight)
    error = (format.fake_quantize(weight, params) - weight).abs()
    reach = weight.abs().amax(dim=1, keepdim=True)
    for power in range(0, 12):
        noise = random(*weight.shape, seed=power)
        other = format.fake_quantize((weight + noise * reach * 2.0**-power).clamp(-reach, reach), params)
        assert ((other - weight).abs() >= error - 1e-6 * reach).all()


def layout_is_exact(format: Format, weight: Tensor) -> None:
    """Names, dtypes and shapes of the parts are what `layout` promises readers; the bytes follow from them."""
    encoded = format.encode(weight, format.fit(weight))
    check_layout(encoded)
    layout = format.layout(encoded.shape).values()
    if not any(None in shape for _, shape in layout):
        assert encoded.num_bytes == sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout)


def rows_decode_alone(format: Format, weight: Tensor) -> None:
    """`rows` gives what a whole decode gives, for repeated rows and for none."""
    encoded = format.encode(weight, format.fit(weight))
    last = weight.shape[0] - 1
    for index in ([last], [0, last, last, 0], [], list(range(last + 1))):
        rows = torch.tensor(index, dtype=torch.long)
        assert same_bits(encoded.rows(rows), encoded.decode()[rows])


def parts_survive_a_file(format: Format, weight: Tensor) -> None:
    """Through safetensors and back."""
    encoded = format.encode(weight, format.fit(weight))
    read = safetensors.torch.load(safetensors.torch.save(encoded.parts))
    assert same_parts(read, encoded.parts)
    assert same_bits(Encoded(format, encoded.shape, read).decode(), encoded.decode())


def inputs_are_left_alone(format: Format, weight: Tensor) -> None:
    """Nothing writes to the weight, the parameters or the parts."""
    before = weight.clone()
    params = format.fit(weight)
    params_before = {name: param.clone() for name, param in params.items()}
    encoded = format.encode(weight, params)
    parts_before = {name: part.clone() for name, part in encoded.parts.items()}
    encoded.decode().fill_(7.0)
    format.fake_quantize(weight, params).fill_(7.0)
    assert same_bits(weight, before)
    assert same_parts(params, params_before)
    assert same_parts(encoded.parts, parts_before)


def same_input_same_bytes(format: Format, weight: Tensor) -> None:
    """Twice the same, whatever the strides."""
    parts = format.encode(weight, format.fit(weight)).parts
    assert same_parts(format.encode(weight, format.fit(weight)).parts, parts)
    strided = weight.t().contiguous().t()
    assert same_parts(format.encode(strided, format.fit(strided)).parts, parts)


def projector_is_snap(format: Format, weight: Tensor) -> None:
    """What a solver rounds column by column is what `fake_quantize` and `encode` make of the whole, to the last bit; so
    also halfway between two representable weights, at zero of either sign, and on what was rounded already."""
    if not isinstance(format, Grid):
        return
    params, reach = format.fit(weight), weight.abs().amax(dim=1, keepdim=True)
    snapped = format.fake_quantize(weight, params)
    tries = [weight, 1.5 * weight, snapped, 0 * weight]
    for power in range(0, 10, 3):
        other = format.fake_quantize(snapped + random(*weight.shape, seed=power) * reach * 2.0**-power, params)
        tries.append((snapped + other) / 2)
    project = format.projector(params, (weight.shape[0], weight.shape[1]))
    for turn, values in enumerate(tries):
        picked = range(turn % min(4, weight.shape[1]), weight.shape[1], 4)  # together the tries meet every column
        columns = torch.stack([project(values[:, j].contiguous(), j) for j in picked], dim=1)
        assert same_bits(columns, format.fake_quantize(values, params)[:, picked])
        assert same_bits(columns, format.encode(values, params).decode()[:, picked])


def shrink_is_by_group(format: Format, weight: Tensor) -> None:
    """`grouped` holds every weight once, in order, and zeros at a ragged end; `fit` takes a number for each group."""
    if not isinstance(format, Grid):
        return
    w_ogk = format.grouped(weight)
    assert torch.equal(w_ogk[w_ogk != 0], weight[weight != 0])
    half = torch.full(w_ogk.shape[:2], 0.5)
    assert same_parts(format.fit(weight, half), format.fit(weight, 0.5))
    assert same_parts(format.fit(weight, 2 * half), format.fit(weight))


FORMAT_LAWS = [
    what_is_stored_is_what_was_computed,
    decoded_is_finite_float32,
    snap_is_idempotent,
    snap_is_nearest,
    layout_is_exact,
    rows_decode_alone,
    parts_survive_a_file,
    inputs_are_left_alone,
    same_input_same_bytes,
    projector_is_snap,
    shrink_is_by_group,
]

# Laws of a format, as it stands in the table.


def name_finds_it(format: Format) -> None:
    """What a recipe or an artifact spells leads back here."""
    assert format_named(format.name) == format
    assert FORMATS[format.name] == format
    assert re.fullmatch(r"[a-z0-9][a-z0-9_.:+-]*", format.name), "a name must be safe in a scheme"


def misfit_names_a_way_out(format: Format) -> None:
    """A refusal says the number of columns, and a format of the table that holds them."""
    for num_columns in (1, 7, 32, 33, 48, 64, 96, 100, 128, 192, 1543):
        problem = format.why_not((16, num_columns))
        if problem is None:
            format.encode(torch.ones(16, num_columns), format.fit(torch.ones(16, num_columns)))
            continue
        assert str(num_columns) in problem
        named = [FORMATS[word] for word in words(problem) if word in FORMATS]
        assert named, f"'{problem}' names no format"
        assert all(other.why_not((16, num_columns)) is None for other in named), problem


def overflow_is_said(format: Format) -> None:
    """Weights beyond what the parts can hold raise a FormatError naming the format; nothing becomes infinite."""
    for largest in (6e4, 1e5, 1e6, 3e8, 3e38):
        weight = widened(largest * torch.linspace(-1, 1, 4 * 128).view(4, 128), format)
        try:
            encoded = format.encode(weight, format.fit(weight))
        except FormatError as problem:
            message = str(problem)
        else:
            assert torch.isfinite(encoded.decode()).all()
            continue
        assert format.name in message
        assert "overflow" in message


FORMAT_TABLE_LAWS = [
    name_finds_it,
    misfit_names_a_way_out,
    overflow_is_said,
]


def words(message: str) -> list[str]:
    """The words of a message, without the punctuation around them."""
    return [word.strip(",;:.'\"()`") for word in message.split()]


# Laws of a method, for a format it accepts.


def suited(method: Method, format: Format, weight: Tensor) -> Tensor:
    """The weight; for a method that takes the zeros it finds, with the zeros of a pattern."""
    if not (isinstance(method, ZeroMask) and isinstance(format, Sparse)):
        return weight
    return torch.where(format.choose(weight.abs(), 0.5), weight, 0.0)


def lands_on_the_format(method: Method, format: Format, weight: Tensor, stats: Stats) -> None:
    """The outcome is a point of the format: finite, laid out as promised, and snapped to itself."""
    weight = suited(method, format, weight)
    encoded = method.compress(weight, format, stats)
    assert encoded.format == format
    assert encoded.shape == tuple(weight.shape)
    check_layout(encoded)
    decoded = encoded.decode()
    assert decoded.dtype is torch.float32
    assert torch.isfinite(decoded).all()
    assert torch.equal(format.fake_quantize(decoded, params_of(encoded)), decoded)
    if "second_moment" in method.needs and stats.second_moment is not None:
        return  # a weight may go further, to make up for the errors of others
    one_for_all = isinstance(format, Grid) and len(format.grouped(weight)) == 1
    reach = weight.abs().max() if one_for_all else weight.abs().amax(dim=1, keepdim=True)
    assert ((decoded - weight).abs() <= 2 * reach).all(), "a weight went further than the range of its row"


def gives_the_same_bytes_twice(method: Method, format: Format, weight: Tensor, stats: Stats) -> None:
    """And the inputs are left alone."""
    weight = suited(method, format, weight)
    before = weight.clone()
    stats_before = {f.name: getattr(stats, f.name) for f in fields(stats)}
    stats_before = {name: value.clone() for name, value in stats_before.items() if isinstance(value, Tensor)}
    parts = method.compress(weight, format, stats).parts
    assert same_parts(method.compress(weight, format, stats).parts, parts)
    assert same_bits(weight, before)
    assert all(same_bits(getattr(stats, name), value) for name, value in stats_before.items())


METHOD_LAWS = [lands_on_the_format, gives_the_same_bytes_twice]


def no_worse_than(
    method: Method, baseline: Method, format: Grid, weight: Tensor, stats: Stats, importance: Tensor
) -> None:
    """In every group, the squared error weighted by `importance` `[in]` is at most the baseline's; in all of them
    together, where groups share parameters."""

    def error(encoded: Encoded) -> Tensor:
        squares = (encoded.decode() - weight).double().square() * importance.double()
        by_group = format.grouped(squares).sum(-1)
        return by_group if format.rows_independent else by_group.sum()

    ours, theirs = error(method.compress(weight, format, stats)), error(baseline.compress(weight, format, stats))
    assert (ours <= theirs * (1 + 1e-5)).all()


# Laws of a method, as it stands in the table.


def refusal_names_what_is_accepted(method: Method, format: Format) -> None:
    """After `use`, every format that is named is one this method accepts, every method one that accepts this format."""
    problem = method.accepts(format)
    if problem is None:
        return
    assert method.name in problem
    assert format.name in problem
    advice = words(problem.partition(" use ")[2])
    formats = [FORMATS[word] for word in advice if word in FORMATS]
    methods = [METHODS[word]() for word in advice if word in METHODS]
    assert formats or methods, f"'{problem}' names no way out"
    assert all(method.accepts(other) is None for other in formats), problem
    assert all(other.accepts(format) is None for other in methods), problem


OTHER_OPTIONS = {"num_states": 16}  # that take only some numbers


def other_options(method: Method) -> Method:
    """The same method with every number changed."""
    changed: dict[str, float] = {}
    for option in fields(method):  # type: ignore[arg-type]
        value = getattr(method, option.name)
        if option.name in OTHER_OPTIONS:
            changed[option.name] = OTHER_OPTIONS[option.name]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            changed[option.name] = value + 1 if isinstance(value, int) else value / 2
    return replace(method, **changed)  # type: ignore[type-var]


def scheme_reads_what_it_writes(method: Method, format: Format) -> None:
    """`Scheme.parse(str(scheme)) == scheme`, with options and activation formats."""
    for made in (method, other_options(method)):
        for activation in (None, *ACTIVATIONS):
            scheme = Scheme(made, format, activation)
            assert Scheme.parse(str(scheme)) == scheme
            assert str(Scheme.parse(str(scheme))) == str(scheme)


# Laws of an activation format.


@cache
def params_for(activation: ActivationFormat) -> dict[str, Tensor]:
    """Fitted to a sample, for the static formats."""
    sample = random(64, 128, seed=32)
    params = activation.fit(Stats(sample=sample, largest=sample.abs().amax(0)))
    assert {name: param.dtype for name, param in params.items()} == activation.layout
    assert all(param.shape == (1,) for param in params.values())
    return params


def activation_name_finds_it(activation: ActivationFormat, x: Tensor) -> None:
    """What a recipe or an artifact spells leads back here, through an Activation as well."""
    params = params_for(activation)
    assert activation_named(activation.name) is activation
    assert same_bits(Activation(activation.name, params).fake_quantize(x), activation.fake_quantize(x, params))


def activation_snap_is_idempotent(activation: ActivationFormat, x: Tensor) -> None:
    """Up to float rounding, a representable input stays as it is."""
    params = params_for(activation)
    once = activation.fake_quantize(x, params)
    assert once.dtype is x.dtype
    assert once.shape == x.shape
    assert torch.isfinite(once).all()
    torch.testing.assert_close(activation.fake_quantize(once, params), once, rtol=4 * torch.finfo(x.dtype).eps, atol=0)


def tokens_stand_alone(activation: ActivationFormat, x: Tensor) -> None:
    """A token's result does not depend on what else is in the batch, to the last bit."""
    params = params_for(activation)
    before = x.clone()
    tokens = x.reshape(-1, x.shape[-1])
    together = activation.fake_quantize(x, params).reshape(-1, x.shape[-1])
    for token, snapped in zip(tokens, together, strict=True):
        assert same_bits(activation.fake_quantize(token, params), snapped)
    assert same_bits(x, before)


ACTIVATION_LAWS = [activation_name_finds_it, activation_snap_is_idempotent, tokens_stand_alone]


def kernel_agrees_with_reference(
    activation: ActivationFormat, format: Format, dtype: torch.dtype, bias: bool, x: Tensor
) -> None:
    """A layer gives `F.linear(fake_quantize(x), decoded weight)` up to float rounding, and each token the same in any
    batch."""
    x = x.to(dtype)
    if format.why_not((24, x.shape[-1])):
        x = torch.cat([x, x], dim=-1)
    weight = random(24, x.shape[-1], seed=40)
    encoded = format.encode(weight, format.fit(weight))
    offset = random(24, seed=41).to(x.dtype) if bias else torch.zeros(24, dtype=x.dtype)
    quantizer = Activation(activation.name, params_for(activation))
    layer = torch.nn.Linear(x.shape[-1], 24)
    layer.bias = torch.nn.Parameter(offset) if bias else None
    pack_layer(layer, PackedLinear, PackedWeight(encoded, Fold(encoded.shape), x.dtype), quantizer)
    with torch.no_grad():
        y = layer(x)
        with reference():
            plain = layer(x)
    assert y.dtype is x.dtype
    assert y.shape == (*x.shape[:-1], 24)
    assert plain.shape == y.shape
    decoded = encoded.decode().double()
    exact = F.linear(quantizer.fake_quantize(x.float()).double(), decoded, offset.double())
    size = F.linear(x.double().abs(), decoded.abs(), offset.double().abs())
    room = 8 * torch.finfo(x.dtype).eps * size
    assert ((y.double() - exact).abs() <= room).all()
    assert ((y.double() - plain.double()).abs() <= room).all()
