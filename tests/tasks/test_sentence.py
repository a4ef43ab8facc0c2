"""A sentence encoder is judged, kept and loaded with all of its modules."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertConfig, BertModel

import tersor
from tersor.checkpoint.open import open_model
from tersor.core.errors import InputError, ModelError
from tersor.recipe import Recipe
from tersor.tasks import open_task
from tersor.tasks.data import Data
from tersor.tasks.sentence import pool, read_embedder

TYPE = "sentence_transformers.models."


@pytest.fixture
def folder(tmp_path, minilm_folder):
    """A tiny encoder, mean pooling, a dense layer of 16x5 with tanh, a layer norm, and unit length."""
    place = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    write(place / "1_Pooling", {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True})
    tensors = {"linear.weight": torch.randn(5, 16), "linear.bias": torch.randn(5)}
    config = {"in_features": 16, "out_features": 5, "bias": True}
    write(place / "2_Dense", config | {"activation_function": "torch.nn.modules.activation.Tanh"}, tensors)
    write(place / "3_LayerNorm", {"dimension": 5}, {"norm.weight": torch.rand(5), "norm.bias": torch.rand(5)})
    list_modules(place, "Transformer", "Pooling", "Dense", "LayerNorm", "Normalize")
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    return place


def write(place, config, tensors=None):
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, place / "model.safetensors")


def list_modules(place, *kinds):
    """The transformer lies in the folder itself, as the library writes it."""
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": TYPE + kind}
        for i, kind in enumerate(kinds)
    ]
    (place / "modules.json").write_text(json.dumps(modules))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"Passage {i} speaks of {'many ' * (i % 5)}things, and of {i * i}." for i in range(30)))
    return path


def test_the_embedding_goes_through_every_module(folder, texts):
    source = open_model(str(folder))
    task = Data(path=texts).open(source)
    assert "at most 12 tokens" in task.description
    assert "mean pooling, Dense 16x5, LayerNorm, Normalize" in task.description
    batch = next(task.batches("eval"))
    with torch.no_grad():
        found = task.forward(source.model, batch)
        mask = batch.inputs["attention_mask"].unsqueeze(-1)
        mean = (source.model(**batch.inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    dense, norm = (load_file(folder / name / "model.safetensors") for name in ("2_Dense", "3_LayerNorm"))
    vectors = (mean @ dense["linear.weight"].T + dense["linear.bias"]).tanh()
    vectors = nn.functional.layer_norm(vectors, (5,), norm["norm.weight"], norm["norm.bias"])
    torch.testing.assert_close(found, normalize(vectors, dim=-1))


def test_the_modules_are_in_the_result_and_judge_it_too(folder, texts, tmp_path):
    tersor.compress(folder, Recipe.of("int8"), data=texts, output=tmp_path / "small")
    for name in ("2_Dense", "3_LayerNorm"):
        kept = (tmp_path / "small" / name / "model.safetensors").read_bytes()
        assert kept == (folder / name / "model.safetensors").read_bytes()
    artifact = open_model(str(tmp_path / "small"))
    task = Data(path=texts).open(artifact)
    assert task.forward(artifact.model, next(task.batches("eval"))).shape[1] == 5


def test_what_is_no_module_of_ours_is_refused_by_name(folder, texts):
    source = open_model(str(folder))
    for kinds, message in [
        (("Transformer", "Pooling", "Asym"), "Asym is not supported here; known after a transformer: Pooling, Dense"),
        (("Transformer", "Dense"), "Pooling being the first"),
        (("StaticEmbedding", "Normalize"), "StaticEmbedding is not supported"),
    ]:
        list_modules(folder, *kinds)
        with pytest.raises(InputError, match=message):
            Data(path=texts).open(source)
    (folder / "modules.json").write_text('[{"path": "../other", "type": "Dense"}]')
    with pytest.raises(ModelError, match="is no module"):
        read_embedder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "os.system"}, "activation system is not supported"),
        ({"module_input_name": "token_embeddings"}, "is not supported; of sentences it is"),
        (None, "no such file, and the model's embedding needs it"),
        ("shape", "expected a matrix and a bias that fits it"),
        ("names", "lack linear.weight"),
    ],
)
def test_dense_modules_that_cannot_be_read(folder, change, message):
    place = folder / "2_Dense"
    if isinstance(change, dict):
        (place / "config.json").write_text(json.dumps(change))
    elif change is None:
        (place / "model.safetensors").unlink()
    else:
        weight = torch.zeros(4, 16) if change == "shape" else torch.zeros(5, 16)
        name = "linear.weight" if change == "shape" else "weight"
        save_file({name: weight, "linear.bias": torch.zeros(5)}, place / "model.safetensors")
    with pytest.raises((InputError, ModelError), match=message):
        read_embedder(folder)


def test_every_way_of_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [6.0], [100.0]], [[100.0], [1.0], [2.0], [6.0]]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    expected = {"cls": 1, "max": 6, "mean": 3, "mean_sqrt_len": 9 / np.sqrt(3), "weightedmean": 23 / 6, "lasttoken": 6}
    for how, value in expected.items():
        torch.testing.assert_close(pool(hidden, mask, how), torch.full((2, 1), float(value)))


def test_several_ways_of_pooling_stand_side_by_side(folder):
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}'
    )
    assert read_embedder(folder).pooling == ("cls", "mean")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["mean", "max"]}')
    assert read_embedder(folder).pooling == ("mean", "max")


def test_small_letters(folder, texts, minilm_folder):
    cased = open_task("fidelity", texts, tokenizer=AutoTokenizer.from_pretrained(minilm_folder), model_folder=folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": "12"}')
    with pytest.raises(ModelError, match="max_seq_length is '12'"):
        read_embedder(folder)
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert read_embedder(folder).lower_case
    assert cased.inputs.embedder.max_length == 12
