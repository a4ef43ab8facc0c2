"""The laws of a method: its result is a point of the format, the same each time, and a recipe can spell it."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from tersor.activations.quantizers import ACTIVATIONS
from tersor.formats import FORMATS
from tersor.formats.contract import Encoded, Format, Grid, Sparse
from tersor.methods import METHODS
from tersor.methods.contract import Method
from tersor.methods.stats import Stats
from tersor.methods.zero_mask import ZeroMask
from tersor.schemes.scheme import Scheme
from tersor.testing.cases import cases_for
from tersor.testing.formats import check_layout, params_of, words
from tersor.testing.law import check_cases, hold, hold_same, hold_same_parts, share, speaking_of


def check_method(method: Method, formats: Iterable[Format] | None = None, of: int = 16) -> None:
    """Hold a method against every law, with each format it accepts. It need not be in the table of methods yet.

    Args:
        formats: to try it with; all of the table by default.
        of: every `of`-th case is tried, another share with every format: weights without data, with the curvature of
            the loss and with the moments of inputs. 1 tries all.

    Raises:
        LawBroken: with a sentence that names the method, the format, the weight and what went wrong.
    """
    tried = list(FORMATS.values() if formats is None else formats)
    accepted = []
    for format in tried:
        subject = f"method {method.name} with format {format.name}"
        with speaking_of(subject):
            refusal_names_what_is_accepted(method, format)
            if method.accepts(format) is not None:
                continue
            accepted.append(format)
            scheme_reads_what_it_writes(method, format)
        for law in METHOD_LAWS:
            cases = share(cases_for(method, format), of, method.name, format.name, law.__name__)
            check_cases(law, subject, cases, method, format)
    hold(bool(accepted), f"method {method.name}: it accepts none of the {len(tried)} formats it was tried with")


def pairs() -> Iterator[tuple[str, str]]:
    """Every method of the table with every format it accepts, by name."""
    for method_name, method in METHODS.items():
        for format_name, format in FORMATS.items():
            if method().accepts(format) is None:
                yield method_name, format_name


# Laws for a format that the method accepts, and any weight.


def suited(method: Method, format: Format, weight: Tensor) -> Tensor:
    """The weight; for a method that takes the zeros it finds, with the zeros of a pattern."""
    if not (isinstance(method, ZeroMask) and isinstance(format, Sparse)):
        return weight
    return torch.where(format.choose(weight.abs(), 0.5), weight, 0.0)


def lands_on_the_format(method: Method, format: Format, weight: Tensor, stats: Stats) -> None:
    """The outcome is a point of the format: finite, laid out as promised, and rounded to itself."""
    weight = suited(method, format, weight)
    encoded = method.compress(weight, format, stats)
    hold(encoded.format == format, f"compress gives a weight in {encoded.format.name}")
    hold(encoded.shape == tuple(weight.shape), f"compress gives the shape {encoded.shape}, not {tuple(weight.shape)}")
    check_layout(encoded)
    decoded = encoded.decode()
    hold(decoded.dtype is torch.float32, f"the result decodes to {decoded.dtype}, not to float32")
    hold(bool(torch.isfinite(decoded).all()), "the result decodes to NaN or infinity")
    params = params_of(encoded)
    again = format.fake_quantize(decoded, params)
    hold(torch.equal(again, decoded), "the result is no point of the format: fake_quantize with its own parts moves it")
    if "second_moment" in method.needs and stats.second_moment is not None:
        return  # a weight may go further, to make up for the errors of others
    one_for_all = bool(params) and all(len(param) == 1 for param in params.values())
    largest = weight.abs().max() if one_for_all else weight.abs().amax(dim=1, keepdim=True)
    near = bool(((decoded - weight).abs() <= 2 * largest).all())
    hold(near, "a weight went further than the range of its row")


def gives_the_same_bytes_twice(method: Method, format: Format, weight: Tensor, stats: Stats) -> None:
    """Check that a method gives the same bytes twice, and changes neither weight nor statistics."""
    weight = suited(method, format, weight)
    before = weight.clone()
    stats_before = {f.name: getattr(stats, f.name) for f in fields(stats)}
    stats_before = {name: value.clone() for name, value in stats_before.items() if isinstance(value, Tensor)}
    parts = method.compress(weight, format, stats).parts
    again = method.compress(weight, format, stats).parts
    hold_same_parts(again, parts, "the same weight and statistics give other bytes the second time")
    hold_same(weight, before, "compress changes the weight that it is given")
    for name, value in stats_before.items():
        hold_same(getattr(stats, name), value, f"compress changes the statistic {name} that it is given")


METHOD_LAWS = [lands_on_the_format, gives_the_same_bytes_twice]


def no_worse_than(method: Method, baseline: Method, format: Grid, weight: Tensor, stats: Stats, counts: Tensor) -> None:
    """Check that the squared error, weighted by `counts` `[in]`, is at most the baseline's in every group.

    If groups share parameters, only the sum over all groups is compared.
    """

    def error(encoded: Encoded) -> Tensor:
        squares = (encoded.decode() - weight).double().square() * counts.double()
        by_group = format.grouped(squares).sum(-1)
        return by_group if format.rows_independent else by_group.sum()

    ours, theirs = error(method.compress(weight, format, stats)), error(baseline.compress(weight, format, stats))
    worse = int((ours > theirs * (1 + 1e-5)).sum())
    hold(not worse, f"{worse} of {ours.numel()} groups are worse than {baseline.name} makes them")


# Laws of the method as such.


def refusal_names_what_is_accepted(method: Method, format: Format) -> None:
    """After `use`, every format that is named is one this method accepts, every method one that accepts this format."""
    problem = method.accepts(format)
    if problem is None:
        return
    named = method.name in problem and format.name in problem
    hold(named, f"its refusal does not name both the method and the format: '{problem}'")
    advice = words(problem.partition(" use ")[2])
    formats = [FORMATS[word] for word in advice if word in FORMATS]
    methods = [METHODS[word]() for word in advice if word in METHODS]
    hold(bool(formats or methods), f"its refusal names no way out, such as '; use int4-g64': '{problem}'")
    for other in formats:
        hold(method.accepts(other) is None, f"its refusal advises {other.name}, which it does not accept: '{problem}'")
    for one in methods:
        hold(one.accepts(format) is None, f"its refusal advises {one.name}, which does not accept it: '{problem}'")


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
    """`Scheme.parse(str(scheme)) == scheme`, with options and activation formats, once both are in their tables."""
    if METHODS.get(method.name) is not type(method) or FORMATS.get(format.name) != format:
        return
    for made in (method, other_options(method)):
        for activation in (None, *ACTIVATIONS):
            scheme = Scheme(made, format, activation)
            read = Scheme.parse(str(scheme))
            hold(read == scheme, f"the scheme '{scheme}' is read as {read!r}; are all fields numbers or words?")
            hold(str(read) == str(scheme), f"the scheme '{scheme}' is written as '{read}' when it was read")
