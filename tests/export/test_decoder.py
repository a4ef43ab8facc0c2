"""Language models with a cache: run token by token in the real runtime, they say what the model says of whole texts."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import transformers
from torch import nn

import tersor
import tersor.exporters.check
from tersor import Recipe, export
from tersor.core.errors import InputError, ModelError
from tersor.exporters.check import read_in_steps
from tersor.exporters.onnx import language
from tersor.runtimes import open_decoder
from tersor.runtimes.onnx_decoder import ROOM, OnnxDecoder
from zoo import GQA, ZOO, pretrained


@pytest.fixture(autouse=True)
def short(monkeypatch, one_thread):
    """Latencies are not judged here."""
    monkeypatch.setattr(tersor.exporters.check, "SECONDS", 0.0)


def llama() -> nn.Module:
    return ZOO["llama"].model()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A small Llama as it is; one of a single layer, and that one packed."""
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder / "float")
    short = pretrained("LlamaForCausalLM", tie_word_embeddings=True, **{**GQA, "num_hidden_layers": 1})()
    short.save_pretrained(folder / "short")
    recipe = Recipe.of("int4-g32", {"model.embed_tokens": "int8"})
    tersor.save(tersor.compress(short, recipe).model, folder / "packed")
    return folder


@pytest.fixture(scope="module")
def exported(folders) -> Path:
    """The ONNX file of the float model."""
    return export(folders / "float", folders / "float.onnx", to="onnx").output


@pytest.fixture(scope="module")
def stateful(folders) -> Path:
    """Its OpenVINO file."""
    return export(folders / "float", folders / "float.xml", to="openvino").output


FILES = ["exported", "stateful"]


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Three texts of different lengths, padded on the left."""
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1)).numpy()
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return ids, mask


def whole(model: nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits without a cache; zero at padding."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        made = model(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
        )
    return made.logits.numpy() * mask[:, :, None]


@pytest.mark.parametrize("file", FILES)
def test_token_by_token_says_what_the_whole_text_says(file, request):
    ids, mask = texts()
    expected = whole(llama(), ids, mask)
    decoder = open_decoder(str(request.getfixturevalue(file)))
    np.testing.assert_allclose(read_in_steps(decoder, ids, mask), expected, atol=1e-5 * np.abs(expected).max())
    alone = read_in_steps(decoder, ids[:1], mask[:1])  # as if nothing had been read before
    np.testing.assert_allclose(alone, expected[:1], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("file", FILES)
def test_writes_what_transformers_writes(file, request):
    prompt = texts()[0][:1]
    ids = torch.from_numpy(prompt)
    expected = llama().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    decoder, tokens, new = open_decoder(str(request.getfixturevalue(file))), prompt, prompt
    while tokens.shape[1] < expected.shape[1]:
        new = decoder.feed(new)[:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, new], axis=1)
    np.testing.assert_array_equal(tokens, expected.numpy())


def test_other_clients_hand_the_present_on(exported):
    """As optimum and transformers.js do: names and shapes of theirs, and every present in memory of its own."""
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        **{
            f"past_key_values.{layer}.{kind}": ["batch", 2, "past_sequence", 8]
            for layer in range(2)
            for kind in ("key", "value")
        },
    }
    names = [each.name for each in session.get_outputs()]
    assert names == ["logits", *(f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value"))]
    ids, mask = texts()
    expected = whole(llama(), ids, mask)
    past = {name: np.zeros((3, 2, 0, 8), np.float32) for name in shapes if name.startswith("past")}
    for start, end in ((0, 8), (8, 9), (9, 10)):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, start:end]
        new = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": positions}
        made = dict(zip(names, session.run(None, {n: a.copy() for n, a in new.items()} | past), strict=True))
        past = {name: made[name.replace("past_key_values", "present")] for name in past}
        assert past["past_key_values.0.key"].shape == (3, 2, end, 8)
        found = made["logits"] * mask[:, start:end, None]
        np.testing.assert_allclose(found, expected[:, start:end], atol=1e-5 * np.abs(expected).max())


def test_nodes_are_named_after_their_layers(exported):
    names = {node.name for node in onnx.load(exported).graph.node}
    assert {f"model.layers.{layer}.self_attn/GroupQueryAttention" for layer in range(2)} <= names


def test_a_cache_grows_beyond_the_memory_it_began_with(exported, monkeypatch):
    monkeypatch.setattr("tersor.runtimes.onnx_decoder.ROOM", 4)
    assert ROOM > 4
    ids, mask = texts()
    expected = whole(llama(), ids, mask)
    decoder = open_decoder(str(exported))
    assert isinstance(decoder, OnnxDecoder)
    assert decoder.in_place
    made = [decoder.feed(ids[:, :1], mask[:, :1])]
    made += [decoder.feed(ids[:, i : i + 1], mask[:, i : i + 1]) for i in range(1, 12)]
    found = np.concatenate(made, axis=1) * mask[:, :, None]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_packed_weights(folders, dtype):
    made = export(
        folders / "packed", folders / f"{dtype}.onnx", to="onnx", options={"dtype": dtype} if dtype != "fp32" else {}
    )
    assert made.check.row == "one token after 16 others"
    assert 0 < made.check.difference < 0.1
    assert any("GroupQueryAttention" in note for note in made.notes)
    assert any("past_key_values in, present out" in note for note in made.notes)


def test_openvino_keeps_its_cache_inside_and_packed_weights_packed(folders, stateful):
    """Inputs are those that openvino-genai and optimum-intel feed."""
    made = export(folders / "packed", folders / "packed.xml", to="openvino")
    assert made.check.difference < 0.1
    assert any("int4 weights and int8 inputs" in note for note in made.notes)
    core = openvino.Core()
    for path, num_layers in ((stateful, 2), (made.output, 1)):
        model = core.read_model(path)
        names = {min(port.get_names()) for port in model.inputs}
        assert names == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
        assert [port.get_names() for port in model.outputs] == [{"logits"}]
        assert sum(node.get_type_name() == "ScaledDotProductAttention" for node in model.get_ops()) == num_layers


def test_openvino_follows_another_row(stateful):
    """What beam search does: `beam_idx` names the row whose cache each row goes on with."""
    ids, mask = texts()
    ids[1:], mask[1:] = ids[:1], 1
    ids[1, 4] = (ids[1, 4] + 1) % 60  # the second row has read something else
    decoder = open_decoder(str(stateful))
    decoder.feed(ids[:, :8])
    request = decoder.request
    positions = np.full((3, 1), 8)
    feeds = {"input_ids": ids[:1, 8:9].repeat(3, 0), "attention_mask": mask[:, :9], "position_ids": positions}
    rows = request.infer({**feeds, "beam_idx": np.array([1, 0, 0], np.int32)}, share_inputs=True)["logits"]
    expected = whole(llama(), np.concatenate([ids[:, :8], feeds["input_ids"]], 1)[[1, 0, 0]], mask[:, :9])[:, -1:]
    np.testing.assert_allclose(rows, expected, atol=1e-5 * np.abs(expected).max())


def test_one_product_for_queries_keys_and_values(tmp_path, monkeypatch):
    """Turned by tables, with positions that padding counts in, they say the same as three products do."""
    torch.manual_seed(0)
    sizes = {**WIDE, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    tersor.save(tersor.compress(model.eval(), Recipe.of("int4-g32")).model, tmp_path / "packed")
    ids, mask = texts()
    found = []
    for name, small in (("one", 1), ("three", 10**9)):
        monkeypatch.setattr("tersor.exporters.onnx.model.SMALL", small)
        path = export(tmp_path / "packed", tmp_path / f"{name}.onnx", to="onnx").output
        found.append(read_in_steps(open_decoder(str(path)), ids, mask))
        nodes = onnx.load(path).graph.node
        products = [node.name for node in nodes if node.op_type == "MatMulNBits"]
        assert len(products) == (5 if name == "one" else 7) + 1
        assert sum("q_proj+k_proj+v_proj" in product for product in products) == (1 if name == "one" else 0)
        assert sum(node.op_type == "RotaryEmbedding" for node in nodes) == (0 if name == "one" else 2)
    np.testing.assert_allclose(*found, atol=1e-4 * np.abs(found[0]).max())


def test_a_mixup_of_the_cache_is_never_kept(folders, monkeypatch, tmp_path):
    """Past keys for past values."""
    right = language.EMIT["Attention"]

    def wrong(b, node, parts):
        inputs = list(node.inputs)
        node.replace_input_with(3, inputs[4])
        node.replace_input_with(4, inputs[3])
        return right(b, node, parts)

    monkeypatch.setitem(language.EMIT, "Attention", wrong)
    with pytest.raises(ModelError, match="outputs differ from the model's"):
        export(folders / "short", tmp_path / "o.onnx", to="onnx")
    assert not list(tmp_path.iterdir())


def test_without_a_cache(folders, tmp_path):
    made = export(folders / "short", tmp_path / "o.onnx", to="onnx", options={"cache": False})
    session = onnxruntime.InferenceSession(str(made.output), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["input_ids", "attention_mask"]
    with pytest.raises(ModelError, match=r"takes no cache of keys and values; export the model again"):
        open_decoder(str(made.output))
    with pytest.raises(InputError, match=r"--fixed batch goes with --no-cache"):
        export(folders / "short", tmp_path / "p.onnx", to="onnx", fixed=["batch"])


SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
FAMILIES = {  # positions learned, a window, norms of heads, capped scores, sinks, one product for keys and values, ...
    "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "mistral": lambda: transformers.MistralConfig(**WIDE, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**WIDE),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE),
    "gemma2": lambda: transformers.Gemma2Config(**WIDE, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**WIDE, sliding_window=6),
    "phi3": lambda: transformers.Phi3Config(**WIDE),
    "gpt_oss": lambda: transformers.GptOssConfig(**WIDE, num_local_experts=4),
    "glm": lambda: transformers.GlmConfig(**WIDE),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    made = export(tmp_path / "model", tmp_path / "o.onnx", to="onnx")
    assert made.check.row.startswith("one token")
    assert made.check.difference < 1e-5
    assert export(tmp_path / "model", tmp_path / "o.xml", to="openvino").check.difference < 1e-5


@pytest.mark.slow
def test_a_cache_of_another_kind_is_left_out(tmp_path):
    """Bloom's attention is its own; it reads whole texts."""
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    made = export(tmp_path / "model", tmp_path / "o.onnx", to="onnx")
    assert made.check.row == "one input of 1x16"
