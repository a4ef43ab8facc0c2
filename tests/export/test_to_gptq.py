"""GPTQ's layout against a slow reader that takes one code after another."""

import json

import pytest
from exported import weights
from safetensors.torch import load_file

from tersor import export
from tersor.core.errors import FormatError


def code(words: list[int], index: int, bits: int) -> int:
    """The `index`-th code of a stream of 32-bit words, least significant bit first."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return stream >> (index * bits) & (2**bits - 1)


@pytest.mark.parametrize("format", ["int8-g64", "int4-g32", "int4", "int3-g64", "int2-g32"])
def test_the_layout_holds_what_was_chosen(format, artifact, tmp_path):
    folder, bits = artifact(format), int(format[3])
    export(folder, tmp_path / "out", to="gptq")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["sym"], config["desc_act"]) == (bits, True, False)
    assert config["group_size"] == (int(format.split("-g")[1]) if "-g" in format else -1)
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    for name, weight in weights(folder).items():
        qweight, qzeros = stored[f"{name}.qweight"], stored[f"{name}.qzeros"]
        scales, groups = stored[f"{name}.scales"].float(), stored[f"{name}.g_idx"]
        for row in (0, 1, weight.shape[0] - 1):
            words = qweight[:, row].tolist()
            for column in range(0, weight.shape[1], 13):
                group = groups[column]
                zero = code(qzeros[group].tolist(), row, bits) + 1
                value = (code(words, column, bits) - zero) * scales[group, row]
                assert value == weight[row, column]


def test_one_format_for_all(artifact, tmp_path):
    with pytest.raises(FormatError, match=r"one format.*q_proj is int4-g32 and .*down_proj is int4-g64; .*--rule"):
        export(artifact("int4-g32", {"*.down_proj": "int4-g64"}), tmp_path / "out", to="gptq")


def test_a_kind_of_layer_is_packed_everywhere_or_nowhere(artifact, tmp_path):
    export(artifact("int4-g32", {"*.down_proj": "keep"}), tmp_path / "out", to="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "mlp.up_proj" in config["modules_in_block_to_quantize"][0]
    assert "mlp.down_proj" not in config["modules_in_block_to_quantize"][0]
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj is kept.*one rule for '\*\.mlp\.up_proj'"):
        export(artifact("int4-g32", {"*.0.mlp.up_proj": "keep"}), tmp_path / "two", to="gptq")
