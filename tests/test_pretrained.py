"""Packed weights under transformers: what would break them stops, and says what to do; without tersor's quantizer
(tests/integrations/test_transformers.py) nothing opens them."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import tersor
from tersor.checkpoint.notice import KEY, METHOD, NO_WEIGHTS, NOTICE, QUANTIZATION
from tersor.checkpoint.pack import pack, unpack
from tersor.core.errors import InputError
from tersor.recipe import Recipe

IDS = torch.arange(12).view(3, 4)


def bert() -> BertForSequenceClassification:
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(config).eval()


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """One model as an artifact of each kind: plain tensors, entropy-coded ones, and one packed later."""
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    for name, model in (("bert", bert()), ("llama", llama())):
        made = tersor.compress(
            model, Recipe.of("int8", exclude=["*embed_tokens", "*lm_head"] * (name == "llama"))
        ).model
        tersor.save(made, folder / f"{name}-plain")
        tersor.save(made, folder / f"{name}-coded", coded=True)
        pack(folder / f"{name}-plain", folder / f"{name}-packed")
    return folder


def sentence_transformer(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder))


OPENERS = {
    "AutoModel": ("bert", AutoModel.from_pretrained),
    "its class": ("bert", BertForSequenceClassification.from_pretrained),
    "AutoModelForSequenceClassification": ("bert", AutoModelForSequenceClassification.from_pretrained),
    "AutoModelForCausalLM": ("llama", AutoModelForCausalLM.from_pretrained),
    "pipeline": ("llama", lambda folder: pipeline("text-generation", model=str(folder))),
    "SentenceTransformer": ("bert", sentence_transformer),
}


@pytest.mark.parametrize("kind", ["plain", "coded", "packed"])
@pytest.mark.parametrize("opener", OPENERS)
def test_transformers_alone_stops_and_says_why(opener, kind, artifacts, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, METHOD)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    name, open_folder = OPENERS[opener]
    with pytest.raises(ValueError, match=r"packed by tersor: open this folder with tersor\.load\(folder\)"):
        open_folder(artifacts / f"{name}-{kind}")
    model = tersor.load(artifacts / f"{name}-{kind}")
    assert not hasattr(model.config, KEY)
    assert not hasattr(model.config, QUANTIZATION)
    assert torch.isfinite(model(IDS).logits).all()


def test_weights_that_are_not_packed_open_as_ever(tmp_path):
    model = bert()
    tersor.save(model, tmp_path / "float")
    assert KEY not in json.loads((tmp_path / "float" / "config.json").read_text())
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float").eval()
    assert torch.equal(opened(IDS).logits, model(IDS).logits)


def test_unpacked_and_decoded_folders_open(artifacts, tmp_path):
    unpack(artifacts / "bert-coded", tmp_path / "decoded")
    assert QUANTIZATION not in json.loads((tmp_path / "decoded" / "config.json").read_text())
    assert not (tmp_path / "decoded" / NO_WEIGHTS).exists()
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "decoded").eval()
    loaded = tersor.load(artifacts / "bert-coded", packed=False)
    assert torch.equal(opened(IDS).logits, loaded(IDS).logits)
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        BertForSequenceClassification.from_pretrained(tmp_path / "saved")(IDS).logits, loaded(IDS).logits
    )


def test_an_artifact_made_of_an_artifact_s_files_says_it_once(artifacts, tmp_path):
    again = tersor.load(artifacts / "bert-plain")
    tersor.save(again, tmp_path / "again", source=artifacts / "bert-plain")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[KEY] == NOTICE
    assert torch.equal(tersor.load(tmp_path / "again")(IDS).logits, again(IDS).logits)


def test_exports_open_in_their_client(artifacts, tmp_path):
    """What a client reads is no longer packed by tersor; and a packed artifact exports like a plain one."""
    for kind in ("plain", "packed"):
        tersor.export(artifacts / f"llama-{kind}", tmp_path / kind, to="compressed-tensors")
        assert KEY not in json.loads((tmp_path / kind / "config.json").read_text())
        AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    weights = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("plain", "packed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("made", [lambda m: m, copy.deepcopy])
def test_save_pretrained_writes_an_artifact(made, artifacts, tmp_path):
    compressed = tersor.compress(bert(), Recipe.of("int8")).model
    loaded = tersor.load(artifacts / "bert-coded")
    for number, model in enumerate((made(compressed), made(loaded))):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        assert torch.equal(tersor.load(folder)(IDS).logits, model(IDS).logits)
        assert tersor.verify(folder).checked.is_whole


def test_save_pretrained_leaves_the_other_files_of_a_folder(artifacts, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    coded, plain = (tersor.load(artifacts / f"bert-{kind}") for kind in ("coded", "plain"))
    for model in (coded, plain):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").read_text() == "{}"
        assert torch.equal(tersor.load(tmp_path)(IDS).logits, model(IDS).logits)
    assert not list(tmp_path.glob(".tersor-*"))


def test_save_pretrained_of_a_model_that_stays_float(tmp_path):
    model = tersor.compress(bert(), Recipe.of("keep")).model
    model.save_pretrained(tmp_path)
    assert torch.equal(BertForSequenceClassification.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_and_rows_of_a_packed_embedding(tied):
    model = llama(tied)
    made = tersor.compress(model, Recipe.of("int8")).model
    before = made(IDS).logits
    made.tie_weights()
    assert torch.equal(made(IDS).logits, before)
    with pytest.raises(InputError, match=r"resize_token_embeddings\(41\): the embedding is packed"):
        made.resize_token_embeddings(41)
    assert made.resize_token_embeddings() is made.get_input_embeddings()
    spared = tersor.compress(model, Recipe.of("int8", exclude=["*embed_tokens"] + ["*lm_head"] * (not tied))).model
    spared.resize_token_embeddings(44)
    assert spared(IDS).logits.shape[-1] == 44
