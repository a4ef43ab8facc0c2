"""compressed-tensors: transformers computes exactly what the artifact does."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from exported import expected, logits, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import tersor
from tersor import export
from tersor.activations.quantizers import ACTIVATIONS, Activation
from tersor.core.errors import FormatError
from tersor.formats import FORMATS
from tersor.methods.stats import Stats

WEIGHT_ONLY = ["int8", "int8-g64", "int6-g32", "int5-g128", "int4-g32", "int4", "int3-g64", "int2-g32", "fp8-e4m3"]
FLOAT4 = ["nvfp4", "mxfp4"]


@pytest.mark.parametrize("format", [*WEIGHT_ONLY, *FLOAT4, "fp8-e4m3-tensor"])
def test_the_client_decompresses_what_was_chosen(format, artifact, tmp_path):
    folder = artifact(format)
    export(folder, tmp_path / "out", to="compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    (group,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    for name, weight in weights(folder).items():
        own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if format not in FLOAT4:  # as the client's modules do
            own["weight_scale"] = own["weight_scale"].float()
        assert name in group["targets"]
        assert torch.equal(compressor.decompress(own, QuantizationScheme(**group))["weight"].float(), weight)


MIXED = {"*.down_proj": "int8-g32", "*.0.mlp.up_proj": "keep", "*.1.mlp.up_proj": "bf16", "*.v_proj": "fp8-e4m3"}
MIXED4 = {"*.o_proj": "mxfp4", "*.down_proj": "fp8-e4m3"}


@pytest.mark.parametrize(("scheme", "rules"), [("int4-g32", {}), ("int8", {}), ("int4-g64", MIXED)], ids=str)
def test_transformers_computes_the_same(scheme, rules, artifact, tmp_path):
    folder = artifact(scheme, rules)
    export(folder, tmp_path / "out", to="compressed-tensors")
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(client), expected(folder))


@pytest.mark.parametrize("scheme", FLOAT4)
def test_transformers_computes_the_same_with_4_bit_floats(scheme, artifact, tmp_path):
    folder = artifact(scheme)
    export(folder, tmp_path / "out", to="compressed-tensors")
    at_once = CompressedTensorsConfig(dequantize=True)  # left to itself, the client decodes them to bfloat16
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=at_once)
    assert torch.equal(logits(client), expected(folder))


@pytest.mark.parametrize(
    ("scheme", "rules"), [("int4-g32", {}), ("fp8-e4m3", {}), ("mxfp4", {}), ("nvfp4", MIXED4)], ids=str
)
def test_the_dtype_of_the_config_holds_every_scale(scheme, rules, artifact, tmp_path):
    folder = artifact(scheme, rules)
    notes = export(folder, tmp_path / "out", to="compressed-tensors").notes
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert client.dtype is (torch.float16 if scheme == "int4-g32" else torch.bfloat16)
    assert bool(notes) == (scheme == "int4-g32")
    logits(client)  # decompresses
    for name, weight in weights(folder).items():
        assert torch.equal(client.get_submodule(name).weight, weight.to(client.dtype))


@pytest.mark.parametrize("scheme", ["int8/int8-dynamic", "fp8-e4m3/fp8-e4m3-dynamic"])
def test_inputs_quantized_by_token(scheme, artifact, tmp_path):
    folder = artifact(scheme)
    export(folder, tmp_path / "out", to="compressed-tensors")
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
    export(tmp_path / "a", tmp_path / "out", to="compressed-tensors")
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = expected(tmp_path / "a")
    assert (logits(client) - ours).norm() / ours.norm() < 1e-5


def test_what_is_kept_is_ignored_and_fused_layers_are_noted(artifact, tmp_path):
    notes = export(artifact("int4-g64", MIXED), tmp_path / "out", to="compressed-tensors").notes
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert config["format"] == "mixed-precision"
    assert any("vLLM fuses k_proj, q_proj, v_proj" in note for note in notes)
    notes = export(artifact("int3-g64"), tmp_path / "three", to="compressed-tensors").notes
    assert any("vLLM runs 4 and 8 bits only" in note for note in notes)


@pytest.mark.parametrize("format", ["int4-g32-asym", "nf4", "nvfp4/int8-dynamic", "fp8-e5m2", "bitmask"])
def test_what_does_not_fit(format, artifact, tmp_path):
    with pytest.raises(FormatError, match="compressed-tensors holds"):
        export(artifact(format), tmp_path / "out", to="compressed-tensors")


def test_4_bit_floats_take_no_scales_finer_than_bfloat16(artifact, tmp_path):
    with pytest.raises(FormatError, match=r"down_proj, int8-g32; .*--rule 'model\.layers\.0\.mlp\.down_proj=nvfp4'"):
        export(artifact("nvfp4", {"*.down_proj": "int8-g32"}), tmp_path / "out", to="compressed-tensors")


@torch.no_grad()
def test_layers_that_vllm_joins_share_their_nvfp4_divisor(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    first, second = model.model.layers
    first.self_attn.k_proj.weight *= 64
    second.mlp.gate_proj.weight *= 2**13  # so that the block scales of the other are too small for E4M3
    recipe = tersor.Recipe.of("nvfp4", {"model.embed_tokens": "keep"})
    tersor.save(tersor.compress(model, recipe).model, tmp_path / "a")
    notes = export(tmp_path / "a", tmp_path / "out", to="compressed-tensors").notes
    stored = load_file(tmp_path / "out" / "model.safetensors")

    def divisors(*names):
        return {stored[f"model.layers.{name}.weight_global_scale"].item() for name in names}

    assert len(divisors("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")) == 1
    assert divisors("0.self_attn.k_proj") != divisors("0.self_attn.o_proj")
    assert len(divisors("1.mlp.gate_proj", "1.mlp.up_proj")) == 2
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits(client)  # decompresses
    for name, weight in weights(tmp_path / "a").items():
        assert torch.equal(client.get_submodule(name).weight.float(), weight)
    decoded, joined = notes
    assert "bfloat16: the client decodes to bfloat16 only" in decoded
    assert "vLLM fuses gate_proj, up_proj under one scale" in joined
    assert "model.layers.1.mlp" in joined
