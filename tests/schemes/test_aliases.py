"""Names of other tools are read wherever a scheme is, and mean the same numbers there as here."""

from importlib import import_module

import pytest
import torch
from torch import nn

import tersor
from cli_runner import tersor as run_tersor
from tersor.core.errors import InputError
from tersor.formats import FORMATS
from tersor.formats.int_group import IntGroup
from tersor.methods import METHODS
from tersor.methods.stats import Stats
from tersor.schemes.aliases import ALIASES, plain
from tersor.schemes.scheme import Scheme, as_written, in_full


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_is_read_as_its_scheme(name):
    for spelling in (name, name.lower(), name.upper(), f" {name} "):
        assert as_written(spelling) == as_written(ALIASES[name])
    assert Scheme.parse(name) == Scheme.parse(ALIASES[name])


def test_no_name_hides_a_format_or_a_method():
    hidden = {plain(name) for name, scheme in ALIASES.items() if plain(name) in FORMATS and plain(name) != scheme}
    assert not hidden
    assert not set(map(plain, ALIASES)) & set(map(plain, METHODS))


def test_a_method_may_stand_before_a_name():
    assert in_full("hqq:int4-asym") == "hqq:int4-asym"
    assert in_full("gptq(damping=0.02):W4A16") == "gptq(damping=0.02):int4-g128"
    assert in_full("nearest:w8a8") == "nearest:int8/int8-dynamic"
    assert in_full("nearest:W4A16/int8-dynamic") == "nearest:int4-g128/int8-dynamic"


def test_inputs_are_said_once():
    with pytest.raises(InputError, match=r"'W8A8/int8-static': W8A8 is short for int8/int8-dynamic; leave out '/int8-"):
        Scheme.parse("W8A8/int8-static")


def test_the_scheme_is_recorded_and_not_the_name(tmp_path):
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 32))
    recipe = tersor.Recipe.from_yaml("steps: [{scheme: W4A16, rules: {'1': FP8_DYNAMIC}}]")
    assert recipe.steps[0].scheme == "int4-g128"
    made = tersor.compress(model, recipe)
    assert [report.scheme for report in made.sites] == ["mse:int4-g128", "mse:fp8-e4m3/fp8-e4m3-dynamic"]
    assert "W4A16" not in made.recipe.to_yaml()
    same = tersor.compress(model, tersor.Recipe.of("int4-g128", {"1": "fp8-e4m3/fp8-e4m3-dynamic"}))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.model(x), same.model(x))


def test_candidates_of_a_plan_may_be_names():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64))
    recipe = tersor.plan(model, None, bits=5, candidates=["W4A16", "Q8_0"])
    schemes = {recipe.steps[0].scheme, *recipe.steps[0].rules.values()}
    assert {scheme.rpartition(":")[2] for scheme in schemes} <= {"int4-g128", "int8-g32", "keep"}


def test_the_command_line_lists_them(capsys):
    assert run_tersor(capsys, "formats", "--json").json["shorthands"] == ALIASES
    shown = run_tersor(capsys, "formats").stdout
    assert all(name in shown for name in ALIASES)


def integers(preset):
    """The format that holds integers as a preset of compressed-tensors says."""
    assert preset.symmetric
    return IntGroup(preset.num_bits, preset.group_size)


def test_presets_of_compressed_tensors_mean_the_same():
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    compared = [name for name in ALIASES if name in schemes and schemes[name]["weights"].type == "int"]
    assert {"W4A16", "W8A8", "W4A8"} <= set(compared)
    for name in compared:
        scheme, weights, inputs = Scheme.parse(name), schemes[name]["weights"], schemes[name].get("input_activations")
        assert scheme.format == integers(weights), name
        assert scheme.activation == ("int8-dynamic" if inputs is not None else None), name
        assert inputs is None or (inputs.num_bits, inputs.strategy, inputs.dynamic) == (8, "token", True), name


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "MXFP4"])
def test_types_of_gguf_hold_the_same_codes(name):
    pytest.importorskip("gguf")
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    scheme = Scheme.parse(f"nearest:{name}")
    encoded = scheme.method.compress(weight, scheme.format, Stats())
    blocks = import_module("tersor.exporters.gguf_blocks")
    assert blocks.block_type(encoded) == name
    assert blocks.to_blocks(encoded).rounding == 0
