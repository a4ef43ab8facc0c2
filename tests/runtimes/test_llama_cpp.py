"""llama.cpp: what it makes of a GGUF file token by token is what the model makes of the whole text."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tersor
from tersor.core.errors import InputError, ModelError
from tersor.runtimes import open_decoder, open_session

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from exported import byte_level

from zoo import pretrained

pytest.importorskip("llama_cpp", reason="needs tersor[llama]")
LONG = {"max_position_embeddings": 96}
SIZES = {"vocab_size": 352, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """An artifact in 8 bits, and its GGUF file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gguf")
    build = pretrained(
        "LlamaForCausalLM", num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, **SIZES, **LONG
    )
    tersor.save(tersor.compress(build().eval(), tersor.Recipe.of("int8-g32")).model, folder / "packed")
    byte_level().save_pretrained(folder / "packed")
    return tersor.export(folder / "packed", folder / "model.gguf", to="gguf").output


def test_token_by_token(gguf):
    ids = np.arange(12)[None] * 7 % 256
    with torch.no_grad():
        expected = tersor.load(gguf.parent / "packed").float()(torch.from_numpy(ids)).logits.numpy()
    decoder = open_decoder(str(gguf))
    made = [decoder.feed(ids[:, :8]), *(decoder.feed(ids[:, i : i + 1]) for i in range(8, 12))]
    found = np.concatenate(made, axis=1)
    room = 0.05 * np.abs(expected).max()  # it rounds inputs to 8 bits, and keeps keys and values in 16
    np.testing.assert_allclose(found, expected, atol=room)
    np.testing.assert_allclose(open_session(str(gguf)).run({"input_ids": ids})["logits"], expected, atol=room)
    decoder.reset()
    np.testing.assert_allclose(decoder.feed(ids[:, :3]), expected[:, :3], atol=room)


def test_what_it_refuses(gguf, tmp_path):
    decoder = open_decoder(str(gguf))
    with pytest.raises(InputError, match="one text at a time"):
        decoder.feed(np.zeros((2, 3), np.int64))
    longest = tersor.load(gguf.parent / "packed").config.max_position_embeddings
    decoder.feed(np.zeros((1, longest), np.int64))
    with pytest.raises(InputError, match=f"room for {longest}, the context length of the model"):
        decoder.feed(np.zeros((1, 1), np.int64))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"broken.gguf: llama.cpp cannot open it"):
        open_decoder(str(tmp_path / "broken.gguf"))
    with pytest.raises(ModelError, match="no such file"):
        open_decoder(str(tmp_path / "missing.gguf"))


SMALL = {"vocab_size": 352, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("Llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
        ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 0.1}),
        ("Mistral", {"sliding_window": 12}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Qwen3", {"head_dim": 128}),
    ],
    ids=str,
)
def test_it_computes_the_model_that_the_keys_describe(name, given, tmp_path):
    """Widths of heads, biases, bases of rotations, epsilons: no coarse weights hide what is off."""
    torch.manual_seed(0)
    model = pretrained(f"{name}ForCausalLM", **{**SMALL, **given})().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = tersor.compress(model, tersor.Recipe.of("fp16")).model
    tersor.save(model, tmp_path / "a")
    byte_level().save_pretrained(tmp_path / "a")
    made = tersor.export(tmp_path / "a", tmp_path / "small.gguf", to="gguf")
    ids = np.arange(12)[None] * 7 % 256
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = open_session(str(made.output)).run({"input_ids": ids})["logits"]
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)  # inputs, keys and values lie in 16 bits
    assert made.opened is not None
    assert "in llama-cpp-python" in made.opened
