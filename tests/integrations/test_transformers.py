"""transformers opens artifacts once tersor is imported, to the bits that tersor.load gives; without tersor it stops."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    pipeline,
)

import tersor
from tersor.checkpoint.notice import KEY, NO_WEIGHTS, QUANTIZATION
from tersor.checkpoint.pack import pack
from tersor.core.errors import ArtifactError, InputError
from tersor.integrations.transformers import TersorConfig
from tersor.recipe import Recipe

IDS = torch.arange(12).view(3, 4)
SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL)).eval()


def llama(tied=False):
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)).eval()


CASES = {
    "bert": (bert, "int8", AutoModelForSequenceClassification),
    "llama": (llama, "int4-g32", AutoModelForCausalLM),
    "tied": (lambda: llama(tied=True), "int8", AutoModelForCausalLM),
    "dynamic": (llama, "int8-dynamic", AutoModelForCausalLM),
}
KINDS = ("plain", "coded", "packed")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A folder with an artifact of each case and kind: plain tensors, entropy-coded ones, and one packed later."""
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    for name, (make, format, _) in CASES.items():
        made = tersor.compress(make(), Recipe.of(format)).model
        tersor.save(made, folder / f"{name}-plain")
        tersor.save(made, folder / f"{name}-coded", coded=True)
        pack(folder / f"{name}-plain", folder / f"{name}-packed")
    return folder


def same(first, second):
    with torch.inference_mode():
        return torch.equal(first(IDS)[0], second(IDS)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_what_transformers_opens_is_what_tersor_loads(name, kind, artifacts):
    folder, auto = artifacts / f"{name}-{kind}", CASES[name][2]
    loaded = tersor.load(folder)
    opened, found = auto.from_pretrained(folder, output_loading_info=True)
    assert type(opened).__name__ == type(loaded).__name__
    assert not any(found.values())
    assert not opened.training
    assert not hasattr(opened.config, KEY)
    assert same(opened, loaded)
    assert same(AutoModel.from_pretrained(folder), loaded.base_model)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gives_ordinary_weights(kind, artifacts, tmp_path):
    config = AutoConfig.from_pretrained(artifacts / f"llama-{kind}")
    config.quantization_config["dequantize"] = True
    opened = AutoModelForCausalLM.from_pretrained(artifacts / f"llama-{kind}", config=config)
    assert same(opened, tersor.load(artifacts / f"llama-{kind}", packed=False))
    opened.save_pretrained(tmp_path)
    assert QUANTIZATION not in json.loads((tmp_path / "config.json").read_text())
    assert same(LlamaForCausalLM.from_pretrained(tmp_path), opened)


@pytest.mark.parametrize("name", CASES)
def test_a_model_dequantized_when_it_is_open(name, artifacts, tmp_path):
    folder, auto = artifacts / f"{name}-coded", CASES[name][2]
    decoded = auto.from_pretrained(folder).dequantize()
    assert same(decoded, tersor.load(folder, packed=False))
    decoded.save_pretrained(tmp_path)
    assert QUANTIZATION not in json.loads((tmp_path / "config.json").read_text())
    assert same(auto.from_pretrained(tmp_path), decoded)


@pytest.mark.parametrize("opened", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_type_that_is_asked_for(opened, artifacts):
    model = opened.from_pretrained(artifacts / "llama-coded", dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert same(model, tersor.load(artifacts / "llama-coded", dtype=torch.bfloat16))


def test_generate_and_pipeline(artifacts):
    folder = artifacts / "llama-plain"
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    loaded, opened = tersor.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(opened.generate(IDS, **settings), loaded.generate(IDS, **settings))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_a_new_head_is_new_and_the_rest_is_the_artifact_s(artifacts):
    folder = artifacts / "bert-coded"
    opened, found = BertForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert found["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert same(opened.base_model, tersor.load(folder).base_model)
    tied = AutoModelForCausalLM.from_pretrained(folder)  # its head is the packed embedding
    assert tied(IDS).logits.isfinite().all()


def test_an_encoder_of_the_artifact_s_two_halves(tmp_path):
    config = T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    tersor.save(tersor.compress(T5ForConditionalGeneration(config), Recipe.of("int8")).model, tmp_path / "t5")
    assert same(T5EncoderModel.from_pretrained(tmp_path / "t5"), tersor.load(tmp_path / "t5").encoder)


def test_adapters_train_and_come_back(artifacts, tmp_path):
    def adapted(model):
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

    model = adapted(AutoModelForCausalLM.from_pretrained(artifacts / "llama-coded"))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(artifacts / "llama-coded"), tmp_path)
    assert same(again.eval(), model.eval())


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_writes_an_artifact(kind, artifacts, tmp_path):
    opened = AutoModelForCausalLM.from_pretrained(artifacts / f"tied-{kind}")
    opened.save_pretrained(tmp_path / "again")
    for again in (tersor.load(tmp_path / "again"), AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        assert same(again, opened)


def test_what_is_refused(artifacts, tmp_path):
    with pytest.raises(ArtifactError, match="holds a BertForSequenceClassification, which cannot be opened as a Llama"):
        LlamaForCausalLM.from_pretrained(artifacts / "bert-plain")
    with pytest.raises(InputError, match=r"goes to one device; .*device_map='cpu'"):
        AutoModelForCausalLM.from_pretrained(artifacts / "llama-plain", device_map={"model": "cpu", "lm_head": "disk"})
    bert().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="pre-quantized"):
        BertForSequenceClassification.from_pretrained(tmp_path / "float", quantization_config=TersorConfig())


def test_a_damaged_artifact_is_refused(artifacts, tmp_path):
    shutil.copytree(artifacts / "bert-plain", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        AutoModel.from_pretrained(tmp_path / "damaged")


def test_an_artifact_on_the_hub(artifacts, tmp_path, monkeypatch):
    """transformers fetches the configuration and the file without weights; the quantizer has the others fetched."""
    files, cache = artifacts / "bert-coded", tmp_path / "models--someone--small"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    for name in ("config.json", NO_WEIGHTS):
        shutil.copy(files / name, snapshot)
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        for name in options["allow_patterns"]:
            if (files / name).exists():
                shutil.copy(files / name, snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    opened = AutoModelForSequenceClassification.from_pretrained(
        "someone/small", cache_dir=tmp_path, local_files_only=True
    )
    assert asked["repository"] == "someone/small"
    assert asked["revision"] == "0123abc"
    assert Path(asked["cache_dir"]) == tmp_path
    assert same(opened, tersor.load(files))


def test_sentence_transformers_and_pipelines(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = AutoModel.from_pretrained(minilm)
    tersor.save(tersor.compress(model, Recipe.of("int8")).model, tmp_path / "small", source=minilm)
    encoder = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    tokens = encoder.tokenizer(["A sentence."], return_tensors="pt")
    with torch.inference_mode():
        states = tersor.load(tmp_path / "small")(**tokens).last_hidden_state[0]
    found = pipeline("feature-extraction", model=str(tmp_path / "small"), device="cpu")("A sentence.")
    assert torch.equal(torch.tensor(found[0]), states)
    pooled = encoder.encode("A sentence.", convert_to_tensor=True)
    assert torch.nn.functional.cosine_similarity(pooled, states.mean(0), dim=0) > 0.999
    encoder.save(str(tmp_path / "saved"))
    assert torch.equal(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode("A sentence.", convert_to_tensor=True), pooled
    )


WITHOUT = """
import sys
from transformers import AutoModel
sys.modules["tersor"] = None
for folder in sys.argv[1:]:
    try:
        AutoModel.from_pretrained(folder)
    except ValueError as error:
        assert "packed by tersor" in str(error), error
    else:
        raise SystemExit(f"{folder} was opened")
del sys.modules["tersor"]
import tersor
AutoModel.from_pretrained(folder)
"""


def test_a_python_without_tersor_stops(artifacts):
    """And the same folder opens when tersor is imported after transformers."""
    folders = [str(artifacts / f"bert-{kind}") for kind in KINDS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT, *folders], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
