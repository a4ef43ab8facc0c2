"""bitsandbytes: its own reader gives back the values that were chosen."""

import bitsandbytes.functional as functional
import pytest
import torch
from exported import expected, logits, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tersor import export
from tersor.core.errors import FormatError


@pytest.mark.parametrize("format", ["nf4", "nf4-dq"])
def test_the_client_decodes_what_was_chosen(format, artifact, tmp_path):
    folder = artifact(format)
    export(folder, tmp_path / "out", to="bitsandbytes")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights(folder).items():
        prefix = f"{name}.weight."
        state = {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}
        quant_state = functional.QuantState.from_dict(state, device=torch.device("cpu"))
        assert quant_state.dtype is torch.bfloat16
        quant_state.dtype = torch.float32
        decoded = functional.dequantize_4bit(stored[f"{name}.weight"], quant_state)
        # With scales that are quantized themselves, the client multiplies and adds in another order.
        assert torch.equal(decoded, weight) if format == "nf4" else torch.allclose(decoded, weight, rtol=1e-5)


@pytest.mark.parametrize(
    "rules", [{}, {"*.1.mlp.down_proj": "keep", "*.q_proj": "nf4-dq", "*.v_proj": "bf16"}], ids=str
)
def test_transformers_computes_the_same(rules, artifact, tmp_path):
    folder = artifact("nf4", rules)
    assert not export(folder, tmp_path / "out", to="bitsandbytes").notes
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(client.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "Linear4bit"
    ours = expected(folder)
    assert (logits(client) - ours).norm() / ours.norm() < 0.02  # it computes in bfloat16


@pytest.mark.parametrize("format", ["int4-g64", "mxfp4"])
def test_what_does_not_fit(format, artifact, tmp_path):
    with pytest.raises(FormatError, match=r"bitsandbytes holds nf4.*=nf4'"):
        export(artifact(format), tmp_path / "out", to="bitsandbytes")
