"""One count of bytes: what the file of every format really holds is what reports, tables, plans and inspect say."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tersor
from tersor.checkpoint.container import Container
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.layout import CODED
from tersor.cli.formats import bits_per_weight
from tersor.codecs.file_bytes import file_bytes, file_bytes_of_shape
from tersor.core.weights_file import file_size
from tersor.formats import FORMATS
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.search.cost import cost_of
from tersor.search.plan import measure_menus


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 96, bias=False), nn.ReLU(), nn.Linear(96, 8))


def stored_bytes(folder, parameter):
    """Of the parts of one weight, from the file itself."""
    if (folder / CODED).exists():
        container = Container(folder / CODED)
        return sum(container.stored_bytes(name) for name in container.entries if name.startswith(f"{parameter}."))
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys() if name.startswith(f"{parameter}."))  # noqa: SIM118


@pytest.mark.parametrize("format", FORMATS)
def test_every_count_is_that_of_the_file(format, tmp_path):
    recipe = Recipe.of("keep", {"0": format})
    made = tersor.compress(model(), recipe)
    tersor.save(made.model, tmp_path)
    real = stored_bytes(tmp_path, "0.weight")
    close = pytest.approx(real, rel=0.02) if format == "coded" else real
    encoded = made.model[0].packed.encoded
    assert made.sites[0].num_bytes == file_bytes(encoded)
    assert file_bytes(encoded) == close
    assert file_bytes_of_shape(FORMATS[format], (96, 256)) in (None, real)
    scheme = made.sites[0].scheme
    inspected = cost_of(scheme, find_sites(model())[:1], 0, model())
    assert inspected["bytes"] == close
    assert inspected["bits_per_weight"] == pytest.approx(8 * real / (96 * 256), rel=0.02)
    planned = measure_menus(model(), {}, Recipe.of("keep", {"0": scheme}).weights[0], ["keep"])[0].options[0]
    parts = [(f"0.weight.{name}", part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()]
    header = 0 if format == "coded" else file_size(parts, {}) - file_size([], {}) - encoded.num_bytes
    assert planned.num_bytes - header == close


@pytest.mark.parametrize("format", FORMATS)
def test_the_table_says_what_a_matrix_of_its_size_takes(format):
    bits = bits_per_weight(FORMATS[format])
    depends = format in ("coded", "lowrank") or "bitmask" in format or format.endswith("+lowrank")
    assert (bits is None) == depends
    assert bits is None or bits == 8 * file_bytes_of_shape(FORMATS[format], (1024, 1024)) / 2**20


def test_a_rule_of_coded_weights_under_a_size_fits_and_is_exact(tmp_path):
    rules = {"0": "coded"}
    coded = size_of(tersor.compress(model(), Recipe.of("keep", rules)).model)
    for limit in (int(0.95 * coded), 2 * coded):
        recipe = tersor.plan(model(), size=f"{limit}B", rules=rules)
        made = tersor.compress(model(), recipe)
        tersor.save(made.model, tmp_path / str(limit))
        assert (tmp_path / str(limit) / CODED).stat().st_size <= limit
        assert made.model[0].packed.format.name == "coded"
    with pytest.raises(tersor.core.errors.BudgetError, match=r"the nearest file is [\d,]+ bytes, --size \d+KB"):
        tersor.plan(model(), size="1KB", rules=rules)
