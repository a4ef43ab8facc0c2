"""Recipes and schemes in old spellings are read, said to be old, and written in the new ones."""

import pytest

from tersor.core.errors import UnknownName
from tersor.recipe import Recipe
from tersor.schemes.old_spellings import METHOD_NAMES, OPTION_NAMES
from tersor.schemes.scheme import Scheme, as_written


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kept:bitmask", "zero-mask:bitmask"),
        ("kept:2:4", "zero-mask:2:4"),
        ("gptq(drift=0.5):int4", "gptq(upstream_correction=0.5):int4"),
        ("sparsegpt(sparsity=0.7, drift=0):2:4", "sparsegpt(sparsity=0.7, upstream_correction=0):2:4"),
    ],
)
def test_old_spellings_are_read(old, new):
    name = next(name for name in METHOD_NAMES | OPTION_NAMES if name in old)
    with pytest.warns(FutureWarning, match=f"^{name} is called .* now; the old name will be read for one release$"):
        assert as_written(old) == new
    with pytest.warns(FutureWarning, match="is called"):
        assert Recipe.of(old).weights[0].scheme == new


def test_new_spellings_do_not_warn():
    assert str(Scheme.parse("zero-mask:bitmask")) == "zero-mask:bitmask"


def test_an_old_option_is_unknown_where_its_method_never_had_it():
    with pytest.raises(UnknownName, match="drift"):
        Scheme.parse("nearest(drift=1):int4")
