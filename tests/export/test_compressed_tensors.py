"""compressed-tensors: transformers computes exactly what the artifact does."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from exported import expected, logits, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tersor
from tersor.activations import ACTIVATIONS, Activation
from tersor.errors import FormatError
from tersor.export.artifact import export_model
from tersor.formats import FORMATS
from tersor.stats import Stats

WEIGHT_ONLY = ["int8", "int8-g64", "int6-g32", "int5-g128", "int4-g32", "int4", "int3-g64", "int2-g32", "fp8-e4m3"]
pytestmark = pytest.mark.filterwarnings("ignore")  # the client's own


@pytest.mark.parametrize("format", [*WEIGHT_ONLY, "fp8-e4m3-tensor"])
def test_the_client_decompresses_what_was_chosen(format, artifact, tmp_path):
    folder = artifact(format)
    export_model(folder, tmp_path / "out", to="compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    (group,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    for name, weight in weights(folder).items():
        own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        own["weight_scale"] = own["weight_scale"].float()
        assert name in group["targets"]
        assert torch.equal(compressor.decompress(own, QuantizationScheme(**group))["weight"], weight)


MIXED = {"*.down_proj": "int8-g32", "*.0.mlp.up_proj": "keep", "*.1.mlp.up_proj": "bf16", "*.v_proj": "fp8-e4m3"}


@pytest.mark.parametrize(("scheme", "rules"), [("int4-g32", {}), ("int8", {}), ("int4-g64", MIXED)], ids=str)
def test_transformers_computes_the_same(scheme, rules, artifact, tmp_path):
    folder = artifact(scheme, rules)
    export_model(folder, tmp_path / "out", to="compressed-tensors")
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(client), expected(folder))


@pytest.mark.parametrize("scheme", ["int4-g32", "fp8-e4m3"])
def test_the_dtype_of_the_config_holds_every_scale(scheme, artifact, tmp_path):
    folder = artifact(scheme)
    notes = export_model(folder, tmp_path / "out", to="compressed-tensors").notes
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert client.dtype is (torch.float16 if scheme == "int4-g32" else torch.bfloat16)
    assert bool(notes) == (scheme == "int4-g32")
    logits(client)  # decompresses
    for name, weight in weights(folder).items():
        assert torch.equal(client.get_submodule(name).weight, weight.to(client.dtype))


@pytest.mark.parametrize("scheme", ["int8/int8-dynamic", "fp8-e4m3/fp8-e4m3-dynamic"])
def test_inputs_quantized_by_token(scheme, artifact, tmp_path):
    folder = artifact(scheme)
    export_model(folder, tmp_path / "out", to="compressed-tensors")
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs, ours, plain = logits(client), expected(folder), expected(artifact(scheme.partition("/")[0]))
    for name, weight in weights(folder).items():
        assert torch.equal(client.get_submodule(name).weight, weight)
    # The client divides a token's range into 127.5 steps, not 127: other roundings of the same size.
    assert 0.8 < (theirs - plain).norm() / (ours - plain).norm() < 1.25


@pytest.mark.parametrize("scheme", ["int8/int8-static", "fp8-e4m3/fp8-e4m3-static"])
def test_inputs_quantized_by_fixed_scales(scheme, llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    format, activation = scheme.split("/")
    for site in tersor.find_sites(model):
        if site.name != "model.embed_tokens":
            params = ACTIVATIONS[activation].fit(Stats(sample=torch.randn(64, site.shape[1]) + 0.1))
            weight = site.matrix(model)
            encoded = FORMATS[format].encode(weight, FORMATS[format].fit(weight))
            site.replace(model, encoded, Activation(activation, params))
    tersor.save(model, tmp_path / "a", source=llama)
    export_model(tmp_path / "a", tmp_path / "out", to="compressed-tensors")
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = expected(tmp_path / "a")
    assert (logits(client) - ours).norm() / ours.norm() < 1e-5


def test_what_is_kept_is_ignored_and_fused_layers_are_noted(artifact, tmp_path):
    notes = export_model(artifact("int4-g64", MIXED), tmp_path / "out", to="compressed-tensors").notes
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert config["format"] == "mixed-precision"
    assert any("vLLM fuses k_proj, q_proj, v_proj" in note for note in notes)
    notes = export_model(artifact("int3-g64"), tmp_path / "three", to="compressed-tensors").notes
    assert any("vLLM runs 4 and 8 bits only" in note for note in notes)


@pytest.mark.parametrize("format", ["int4-g32-asym", "nf4", "mxfp4", "fp8-e5m2", "bitmask"])
def test_what_does_not_fit(format, artifact, tmp_path):
    assert format in FORMATS
    with pytest.raises(FormatError, match="compressed-tensors holds"):
        export_model(artifact(format), tmp_path / "out", to="compressed-tensors")
