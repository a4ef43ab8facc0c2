"""What is exported is opened in its own client before it is kept."""

import importlib.util

import pytest
import torch
import transformers

import tersor
import tersor.exporters.compressed_tensors
from tersor import export
from tersor.core.errors import ModelError
from tersor.nn.sites import find_sites

SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {"vocab_size": 96, "intermediate_size": 64, "max_position_embeddings": 64, **SMALL}
T5 = {"vocab_size": 96, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 4}


def exported(kind, config, to, format, tmp_path):
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    heads = ("lm_head", "embed_out")
    linears = [s for s in find_sites(model) if s.kind == "linear" and not s.owners[0].module.endswith(heads)]
    rules = {site.name: format for site in linears if site.fold.view == "rows"}
    tersor.save(tersor.compress(model, tersor.Recipe.of("keep", rules=rules)).model, tmp_path / "a")
    return export(tmp_path / "a", tmp_path / "out", to=to)


@pytest.mark.parametrize(
    ("kind", "config", "to", "format"),
    [
        ("BertForSequenceClassification", transformers.BertConfig(**TEXT), "compressed-tensors", "int8"),
        ("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**TEXT, head_dim=16), "compressed-tensors", "int4-g32"),
        ("FalconForCausalLM", transformers.FalconConfig(vocab_size=96, **SMALL), "compressed-tensors", "fp8-e4m3"),
        ("T5EncoderModel", transformers.T5Config(**T5), "compressed-tensors", "int8/int8-dynamic"),
        ("Dinov2Model", transformers.Dinov2Config(**SMALL, image_size=28), "bitsandbytes", "nf4"),
    ],
)
def test_the_client_computes_what_the_artifact_does(kind, config, to, format, tmp_path):
    made = exported(kind, config, to, format, tmp_path)
    assert made.opened is not None
    assert made.opened.startswith("opened in transformers")
    assert "outputs differ from the artifact's by" in made.opened


@pytest.mark.parametrize(
    ("kind", "config", "to", "format", "reason"),
    [
        ("FalconForCausalLM", transformers.FalconConfig(vocab_size=96, **SMALL), "compressed-tensors", "int8", "fp8"),
        ("T5EncoderModel", transformers.T5Config(**T5), "compressed-tensors", "int4-g32", "no attribute 'weight'"),
        ("Dinov2Model", transformers.Dinov2Config(**SMALL, image_size=28), "compressed-tensors", "int8", "source keys"),
        ("T5EncoderModel", transformers.T5Config(**T5), "bitsandbytes", "nf4", r"does not find encoder\.block\.0.*wo"),
    ],
)
def test_what_the_client_cannot_open_is_not_kept(kind, config, to, format, reason, tmp_path):
    with pytest.raises(ModelError, match=rf"{reason}.*nothing was kept|nothing was kept.*{reason}"):
        exported(kind, config, to, format, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_computes_something_else_is_not_kept(artifact, tmp_path, monkeypatch):
    """As if the layout of one tensor were wrong."""
    right = tersor.exporters.compressed_tensors.module_tensors

    def wrong(packed):
        return {name: t.flip(0) if name == "weight_scale" else t for name, t in right(packed).items()}

    monkeypatch.setattr(tersor.exporters.compressed_tensors, "module_tensors", wrong)
    with pytest.raises(ModelError, match=r"computes something else .*: outputs differ by .*nothing was kept"):
        export(artifact("int4-g32"), tmp_path / "out", to="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_a_client_that_is_not_installed_is_named(to, artifact, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gptqmodel" else found(name))
    opened = export(artifact("int4-g32"), tmp_path / "out", to=to).opened
    assert opened is not None
    assert opened.startswith("not opened: ")
    assert "gptqmodel" in opened
    assert "pip install" in opened
