"""The head that the file holds is the head that is kept; one that no class has a place for is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tersor
from tersor.checkpoint.open import ModelSpec, open_model
from tersor.core.errors import InputError, ModelError
from tersor.jobs.settings import Output
from tersor.jobs.stream import stream
from tersor.recipe import Recipe
from tersor.search.choices import Choices

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(kind):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
        return T5ForConditionalGeneration(T5Config(**sizes)).eval()
    config = BertConfig if kind == "bert" else LlamaConfig
    model = BertForMaskedLM if kind == "bert" else LlamaForCausalLM
    return model(config(**SIZES, tie_word_embeddings=False)).eval()


def saved(model, folder, **changes):
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("recipe", ["int8", "keep"])
def test_tied_in_the_config_with_another_head_in_the_file(tmp_path, kind, recipe):
    model = make(kind)
    folder = saved(model, tmp_path / "model", tie_word_embeddings=True)
    opened = open_model(str(folder))
    assert any("the file holds other weights: kept apart" in note for note in opened.notes)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(opened.model(tokens).logits, expected)
        made = tersor.compress(opened.model, Recipe.of(recipe)).model
        tersor.save(made, tmp_path / "small", source=folder)
        loaded = tersor.load(tmp_path / "small")
        torch.testing.assert_close(loaded(tokens).logits, made(tokens).logits)
        assert (loaded(tokens).logits - expected).norm() < 0.05 * expected.norm()


def test_an_encoder_decoder_with_another_head_is_refused(tmp_path):
    folder = saved(make("t5"), tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.randn(64, 16)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"config\.json ties lm_head\.weight"):
        open_model(str(folder))


def test_stream_refuses_another_head_before_work(tmp_path):
    folder = saved(make("llama"), tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(ModelError, match='write "tie_word_embeddings": false into config'):
        stream(ModelSpec(folder), Output(tmp_path / "small"), choices=Choices(formats=["int8"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_tied_head_stays_tied(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "tied")
    opened = open_model(str(tmp_path / "tied"))
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    assert opened.notes == ()


def test_an_architecture_that_transformers_does_not_have(tmp_path):
    folder = saved(make("llama"), tmp_path / "model", architectures=["LlamaForCausalML"])
    with pytest.raises(ModelError, match=r"names LlamaForCausalML, which .* no place for lm_head.*LlamaForCausalLM"):
        open_model(str(folder))
    bare = saved(make("llama").model, tmp_path / "bare", architectures=["MyLlama"])
    opened = open_model(str(bare))
    assert type(opened.model).__name__ == "LlamaModel"
    assert "config.json names MyLlama" in opened.notes[0]


def test_nothing_is_left_where_it_is_refused(tmp_path):
    folder = saved(make("llama"), tmp_path / "model", architectures=["LlamaForCausalML"])
    with pytest.raises(InputError):
        tersor.compress(folder, Recipe.of("int8"), output=tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
