"""How limits are spelled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.search.limit import Limit, parse_ratio, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8MB", 8_000_000),
        ("8mb", 8_000_000),
        (" 1.5 MiB ", 1_572_864),
        ("700KB", 700_000),
        ("1KiB", 1024),
        ("2GB", 2 * 10**9),
        ("0.5GiB", 2**29),
        ("123456", 123_456),
        ("10b", 10),
    ],
)
def test_sizes(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "MB", "-3MB", "0", "0.0KB", "8 M B", "8TB", "8,5MB", "1e6", "nan", "inf", "9" * 400, "9" * 300 + "GB"]
)
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="is not a size; write for example 8MB"):
        parse_size(text)


@pytest.mark.parametrize(("text", "ratio"), [("4x", 4), ("4 X", 4), ("6.5", 6.5), ("1", 1)])
def test_ratios(text, ratio):
    assert parse_ratio(text) == ratio


@pytest.mark.parametrize("text", ["", "x", "0.5x", "0", "-4x", "4%", "1:4", "nan"])
def test_what_is_no_ratio(text):
    with pytest.raises(InputError, match="is not a ratio of at least 1; write for example 4x"):
        parse_ratio(text)


def limit(**options) -> Limit | None:
    return Limit.of(original_bytes=1_000_003, num_parameters=250_001, **options)


def test_each_way_to_say_it():
    assert limit() is None
    assert limit(size="8KB") == Limit(8000, "size 8KB")
    assert limit(ratio="4x") == Limit(250_000, "ratio 4x")
    assert limit(bits=4.5) == Limit(140_625, "4.5 bits per parameter")


@pytest.mark.parametrize("bits", [0, -1, 33, float("nan"), float("inf")])
def test_bits_that_make_no_sense(bits):
    with pytest.raises(InputError, match="not between 0 and 32"):
        limit(bits=bits)


@pytest.mark.parametrize(
    "two", [{"size": "1MB", "ratio": "4x"}, {"ratio": "4x", "bits": 4}, {"size": "1MB", "bits": 4}]
)
def test_two_limits_are_refused(two):
    with pytest.raises(InputError, match=f"--{next(iter(two))} and --{list(two)[1]} are both limits"):
        limit(**two)


@given(st.text(max_size=20))
def test_any_text_is_a_limit_or_an_error_of_ours(text):
    for options in ({"size": text}, {"ratio": text}):
        try:
            assert limit(**options).num_bytes >= 0
        except InputError as error:
            assert repr(text)[1:-1] in repr(str(error)) or text in str(error)  # noqa: PT017
