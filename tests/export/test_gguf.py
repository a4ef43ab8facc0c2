"""GGUF: the client's own reader gives back the values that were chosen, bit for bit, and the same tokens."""

import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from exported import byte_level, expected, logits, weights
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tersor
from tersor import export
from tersor.core.errors import FormatError, MissingExtra, ModelError
from tersor.exporters.gguf_blocks import block_type, to_blocks
from tersor.exporters.gguf_tokenizer import SPLITS
from tersor.formats import FORMATS
from tersor.methods import METHODS
from tersor.methods.stats import Stats

HELD = {
    "int8-g32": "Q8_0", "int8": "Q8_0", "int6-g64": "Q8_0", "int5-g32": "Q5_0", "int4-g32": "Q4_0",
    "int4-g128": "Q4_0", "int3-g64": "Q4_0", "int2": "Q4_0", "int4-g32-asym": "Q4_1", "int3-g64-asym": "Q4_1",
    "int5-g32-asym": "Q5_1",
}  # fmt: skip
BLOCKWISE = ["q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "mxfp4"]  # ggml's own, or one it shares


@pytest.mark.parametrize("format", HELD)
@pytest.mark.parametrize("columns", [128, 160])
def test_ggml_decodes_what_was_chosen(format, columns):
    weight = torch.randn(6, columns)
    weight[2, :32] = 0
    weight[3] = weight[3].abs()
    encoded = FORMATS[format].encode(weight, FORMATS[format].fit(weight))
    assert block_type(encoded) == HELD[format]
    blocks = to_blocks(encoded)
    decoded = gguf.dequantize(blocks.rows.numpy(), GGMLQuantizationType[HELD[format]])
    if format.endswith("asym"):
        step = encoded.parts["scale"].float().max()
        assert np.abs(decoded - encoded.decode().numpy()).max() <= max(blocks.rounding, 1e-6) * step
        assert blocks.rounding < 0.01
    else:
        assert np.array_equal(decoded, encoded.decode().numpy())


@pytest.mark.parametrize("format", BLOCKWISE)
@pytest.mark.parametrize("method", ["nearest", "mse"])
def test_ggml_decodes_its_own_formats(format, method):
    """To the last bit; the row of large weights has blocks whose scale and minimum use all their bits."""
    weight = torch.randn(6, 512) * torch.logspace(-2, 2, 512)
    weight[2, :64], weight[3], weight[4, 256:] = 0, weight[3].abs(), -weight[4, 256:].abs()
    encoded = METHODS[method]().compress(weight, FORMATS[format], Stats())
    blocks = to_blocks(encoded)
    assert blocks.type == format.upper()
    decoded = gguf.dequantize(blocks.rows.numpy(), GGMLQuantizationType[blocks.type])
    assert np.array_equal(decoded.view(np.uint32), encoded.decode().numpy().view(np.uint32))


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in {*HELD, *BLOCKWISE} and name[:3] != "int"])
def test_other_formats_do_not_fit(format):
    weight = torch.randn(4, 256)
    assert block_type(FORMATS[format].encode(weight, FORMATS[format].fit(weight))) is None


RECIPES = [
    ("int4-g32", {}),
    ("int4-g32", {"model.embed_tokens": "int8-g32", "*.down_proj": "fp16", "*.0.mlp.up_proj": "bf16"}),
    ("int5-g32", {"*.v_proj": "int3-g64", "*.q_proj": "keep"}),
    ("fp16", {"*.q_proj": "bf16"}),
]


@pytest.mark.parametrize(("scheme", "rules"), RECIPES, ids=str)
def test_transformers_computes_the_same(scheme, rules, artifact, tmp_path):
    folder = artifact(scheme, rules)
    export(folder, tmp_path / "small.gguf", to="gguf")
    client = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert torch.equal(logits(client), expected(folder))


def test_transformers_reads_ggmls_own_formats(ggml_formats, tmp_path):
    notes = export(ggml_formats, tmp_path / "small.gguf", to="gguf").notes
    assert not notes
    types = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "small.gguf").tensors}
    assert types == {"F32", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "MXFP4"}
    client = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert torch.equal(logits(client), expected(ggml_formats))


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config])
def test_qwen_keeps_its_row_order(config_class, llama, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    # transformers takes 128 for the width of Qwen3's heads, whatever the file says
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = config_class(
        vocab_size=352, **sizes, **heads, **({"head_dim": 128} if config_class is Qwen3Config else {})
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases too
    tersor.save(tersor.compress(model, tersor.Recipe.of("int8-g32")).model, tmp_path / "a")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "small.gguf", to="gguf")
    client = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert torch.equal(logits(client), expected(tmp_path / "a"))


def test_tied_embeddings_are_stored_once_and_untied_ones_twice(artifact, tmp_path):
    export(artifact("int4-g32"), tmp_path / "small.gguf", to="gguf")
    names = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "small.gguf").tensors}
    assert "output.weight" not in names
    assert names["token_embd.weight"] == "BF16"
    assert names["blk.1.attn_norm.weight"] == "F32"
    assert names["blk.1.ffn_down.weight"] == "Q4_0"


SENTENCES = [
    "State a budget, get 1234567.",
    "  two  spaces\n\nand é, ß, 日本",
    "<|start|>x<|end|>",
    "it's we'LL",
]


def split_by(name: str) -> pre_tokenizers.PreTokenizer | None:
    if name == "gpt-2":
        return None
    if name == "smollm":
        return pre_tokenizers.Digits(individual_digits=True)
    pattern = next(pattern for pattern, known in SPLITS.items() if known == name)
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_tokenizer_comes_along(name, artifact, tmp_path):
    tokenizer = byte_level(split_by(name))
    if name in SPLITS.values():
        steps = [split_by(name), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    folder = tmp_path / "a"
    tersor.save(tersor.load(artifact("int4-g32")), folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    export(folder, tmp_path / "small.gguf", to="gguf")
    fields = GGUFReader(tmp_path / "small.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 352  # one for each row of the embedding
    client = AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")
    assert client.chat_template == tokenizer.chat_template
    assert client.eos_token_id == tokenizer.eos_token_id
    if name != "smollm":  # transformers' reader splits it as GPT-2 does
        assert [client(text).input_ids for text in SENTENCES] == [tokenizer(text).input_ids for text in SENTENCES]


def test_what_gguf_cannot_name(artifact, tmp_path):
    folder = tmp_path / "a"
    tersor.save(tersor.load(artifact("int4-g32")), folder)
    with pytest.raises(ModelError, match="needs the tokenizer"):
        export(folder, tmp_path / "small.gguf", to="gguf")
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="byte-level BPE"):
        export(folder, tmp_path / "small.gguf", to="gguf")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"rope_type": "default"', '"rope_type": "linear", "factor": 2.0')
    )
    with pytest.raises(ModelError, match="scales them"):
        export(folder, tmp_path / "small.gguf", to="gguf")
    with pytest.raises(FormatError, match="gguf holds"):
        export(artifact("int8-dynamic"), tmp_path / "small.gguf", to="gguf")


def small(folder, model) -> Path:
    """The artifact of a model with weights that matter."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tersor.save(tersor.compress(model.eval(), tersor.Recipe.of("int8-g32")).model, folder)
    byte_level().save_pretrained(folder)
    return folder


SMALL = {"vocab_size": 352, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act="gelu")), "SiLU in llama.*hidden_act gelu"),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, hidden_act="relu")), "SiLU in qwen3.*hidden_act relu"),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, attention_bias=True)), "no attention_bias in qwen3"),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, head_dim=32)), "= 16 in qwen2 models, .* head_dim 32"),
        (lambda: LlamaModel(LlamaConfig(**SMALL)), r"llama, mistral, qwen2, qwen3 with .* head.*LlamaModel"),
        (lambda: GemmaForCausalLM(GemmaConfig(**SMALL)), "this model is gemma"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 96})), "a token 319.*embeddings for 96"),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(
                    **SMALL,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                )
            ),
            "turns whole heads, and this model 50%",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(build, reason, tmp_path):
    folder = small(tmp_path / "a", build())
    with pytest.raises(ModelError, match=reason):
        export(folder, tmp_path / "small.gguf", to="gguf")
    assert not (tmp_path / "small.gguf").exists()


@pytest.mark.parametrize(
    ("build", "note"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)), "context_length is 8, the sliding"),
        (
            lambda: Qwen2ForCausalLM(
                Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=0)
            ),
            "context_length is 8, the sliding",
        ),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, sliding_window=8)), None),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=32)), "takes 128 .* 32"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=32, attention_bias=True, mlp_bias=True)), "biases"),
    ],
)
def test_what_the_file_says_is_what_the_model_is(build, note, tmp_path):
    """Or it is noted. transformers' reader is told what it does not read, and then computes the same."""
    made = export(small(tmp_path / "a", build()), tmp_path / "small.gguf", to="gguf")
    assert made.opened is not None
    assert "differ from the artifact's by 0.00%" in made.opened
    assert len(made.notes) == (note is not None)
    if note is not None:
        assert re.search(note, made.notes[0])
    fields = GGUFReader(tmp_path / "small.gguf").fields
    length = next(field.contents() for key, field in fields.items() if key.endswith(".context_length"))
    assert length == (8 if note is not None and "sliding" in note else 64)


def test_without_the_package(artifact, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tersor\[gguf\]'"):
        export(artifact("int4-g32"), tmp_path / "small.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_asymmetric_grids_say_what_is_rounded(artifact, tmp_path):
    folder = artifact("int4-g32-asym")
    (note,) = export(folder, tmp_path / "small.gguf", to="gguf").notes
    assert "rounded to fp16" in note
    client = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    for name, weight in weights(folder).items():
        step = float(note.split("up to ")[1].split()[0]) * 1.05
        largest_step = (weight.amax() - weight.amin()) / 15 * 2
        assert (client.get_submodule(name).weight - weight).abs().max() <= step * largest_step
