"""The laws of tersor.testing over the tables. A new line in a table is covered without a change here."""

from itertools import product

import pytest
import torch

import laws
from golden.write import HOME, encode, golden, read, stored_weight
from tersor.activations.quantizers import ACTIVATIONS
from tersor.formats import FORMATS
from tersor.formats.contract import Encoded
from tersor.methods import METHODS


def by_name(entry):
    return getattr(entry, "__name__", entry)


# The default run takes a share of the cases for each line of a table, `make test-slow` all of them.
ALL = pytest.param(1, marks=pytest.mark.slow, id="all")


@pytest.mark.parametrize("of", [pytest.param(3, id="a third"), ALL])
@pytest.mark.parametrize(
    ("name", "law"), [(n, law) for n, f in FORMATS.items() for law in laws.laws_of(f)], ids=by_name
)
def test_format(name, law, of):
    cases = laws.share(laws.weights_for(FORMATS[name]), of, name, by_name(law))
    laws.check_cases(law, f"format {name}", cases, FORMATS[name])


@pytest.mark.parametrize("law", laws.FORMAT_TABLE_LAWS, ids=by_name)
@pytest.mark.parametrize("name", FORMATS)
def test_format_in_the_table(name, law):
    law(FORMATS[name])


@pytest.mark.parametrize("of", [pytest.param(16, id="a sixteenth"), ALL])
@pytest.mark.parametrize("law", laws.METHOD_LAWS, ids=by_name)
@pytest.mark.parametrize(("method", "format"), list(laws.pairs()))
def test_method(method, format, law, of):
    entries = METHODS[method](), FORMATS[format]
    cases = laws.share(laws.cases_for(*entries), of, method, format, by_name(law))
    laws.check_cases(law, f"method {method} with format {format}", cases, *entries)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_accepts_some_format(method):
    assert method in {name for name, _ in laws.pairs()}


@pytest.mark.parametrize("method", METHODS)
def test_refusals_name_what_is_accepted(method):
    for format in FORMATS.values():
        laws.refusal_names_what_is_accepted(METHODS[method](), format)


@pytest.mark.parametrize("method", METHODS)
def test_schemes_read_what_they_write(method):
    accepted = {format: FORMATS[format] for name, format in laws.pairs() if name == method}
    law, cases = laws.scheme_reads_what_it_writes, laws.share(accepted, 4, method)
    laws.check_cases(law, f"method {method}", cases, METHODS[method]())


@pytest.mark.parametrize("law", laws.ACTIVATION_LAWS, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, dtype, law):
    cases = {label: x.to(dtype) for label, x in laws.inputs().items()}
    laws.check_cases(law, f"inputs in {name}", cases, ACTIVATIONS[name])


# Every activation with the format that kernels run and some that are decoded, one with all.
RUNS = sorted({*product(ACTIVATIONS, ["int8", "int8-asym", "int4-g64", "bf16"]), *product(["int8-dynamic"], FORMATS)})


@pytest.mark.parametrize("of", [pytest.param(3, id="a third"), ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "format"), RUNS)
def test_kernel(name, format, dtype, of):
    for bias in (True, False):
        cases = laws.share(laws.inputs(), of, name, format, dtype, bias)
        law, entries = laws.kernel_agrees_with_reference, (ACTIVATIONS[name], FORMATS[format], dtype, bias)
        laws.check_cases(law, f"{format}/{name}", cases, *entries)


@pytest.mark.parametrize("name", FORMATS)
def test_golden_bytes_decode_forever(name):
    parts, decoded = read(name)
    weight = stored_weight(FORMATS[name])
    assert laws.same_bits(Encoded(FORMATS[name], tuple(weight.shape), parts).decode(), decoded)


@pytest.mark.parametrize("name", FORMATS)
def test_golden_bytes_are_still_written(name):
    parts, _ = read(name)
    assert laws.same_parts(encode(name).parts, parts)


def test_golden_files_are_small_and_all_known():
    files = list(HOME.glob("*.safetensors"))
    assert set(files) == {*map(golden, FORMATS), HOME / "weight.safetensors"}, "run `python tests/golden/write.py`"
    assert sum(file.stat().st_size for file in files) < 500_000
