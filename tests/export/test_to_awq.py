"""AWQ's layout against a slow reader that takes one code after another."""

import json

import pytest
import torch
from exported import weights
from safetensors.torch import load_file

from tersor import export
from tersor.core.errors import FormatError

PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of a word in which the n-th of eight outputs lies


def code(words: torch.Tensor, output: int) -> int:
    return int(words[output // 8]) >> (4 * PLACE[output % 8]) & 15


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_layout_holds_what_was_chosen(group_size, artifact, tmp_path):
    folder = artifact(f"int4-g{group_size}", {"*.1.mlp.up_proj": "keep"})
    export(folder, tmp_path / "out", to="awq")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["version"]) == (4, group_size, "gemm")
    assert set(config["modules_to_not_convert"]) == {"lm_head", "model.layers.1.mlp.up_proj"}
    for name, weight in weights(folder).items():
        qweight, qzeros = stored[f"{name}.qweight"], stored[f"{name}.qzeros"]
        scales = stored[f"{name}.scales"].float()
        for column in range(0, weight.shape[1], 17):
            group = column // group_size
            for row in range(0, weight.shape[0], 5):
                value = (code(qweight[column], row) - code(qzeros[group], row)) * scales[group, row]
                assert value == weight[row, column]


@pytest.mark.parametrize("format", ["int8-g32", "int4", "int4-g32-asym"])
def test_what_does_not_fit(format, artifact, tmp_path):
    with pytest.raises(FormatError, match="awq holds symmetric int4 in groups"):
        export(artifact(format), tmp_path / "out", to="awq")
    with pytest.raises(FormatError, match="awq holds one format"):
        export(artifact("int4-g32", {"*.down_proj": "int4-g64"}), tmp_path / "out", to="awq")
