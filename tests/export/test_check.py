"""What is judged before a file is kept, and how far it may be from the model."""

import pytest
import torch

import tersor
from tersor.core.errors import ModelError
from tersor.exporters.check import ROUNDED, hold, judged, limit_of, shares_a_scale
from tersor.exporters.examples import Examples
from tersor.exporters.onnx import Onnx
from tersor.jobs.export import checkpoint_of


def test_the_limit_never_grows_with_the_rounding_of_strange_inputs():
    assert limit_of("fp32", 0.0) == 1e-3
    assert limit_of("fp32", 0.01) == pytest.approx(0.021)
    assert limit_of("fp32", 2.93) == ROUNDED < 0.5


def test_refused_with_the_way_out():
    hold(0.2, limit_of("fp32", 2.93), "executorch", 2.93)
    with pytest.raises(ModelError, match=r"differ .* by 46.93% where at most 25.00%.* 293.00%: give inputs .*--data"):
        hold(0.4693, limit_of("fp32", 2.93), "executorch", 2.93)
    with pytest.raises(ModelError, match=r"nothing was written. Leave single layers float with --rule"):
        hold(0.4693, limit_of("fp32", 0.01), "executorch", 0.01)
    with pytest.raises(ModelError, match=r"Try --per-token, or leave single layers float"):
        hold(0.4693, limit_of("fp32", 0.01), "onnx", 0.01, per_token=True)


@pytest.mark.parametrize(
    ("scheme", "options", "helps"),
    [("int8-dynamic", {}, True), ("int8-dynamic", {"per_token": True}, False), ("int8", {}, False)],
)
def test_a_scale_per_token_is_advised_where_it_changes_something(scheme, options, helps, tmp_path):
    examples = Examples({"x": torch.ones(2, 8)}, {"x": {0: "batch"}}, keywords=False)
    model = tersor.compress(torch.nn.Sequential(torch.nn.Linear(8, 8)), scheme).model
    assert shares_a_scale(Onnx(**options), checkpoint_of(tmp_path, model, examples)) is helps


def test_calibration_data_is_judged_as_well():
    """As many rows as the examples have, for that may be a fixed size."""
    batch = {"x": torch.arange(16.0)[:, None]}
    examples = Examples({"x": torch.zeros(4, 1)}, {"x": {0: "batch"}}, keywords=False, calibration=(batch, batch))
    first, second = judged(examples)
    assert first is examples
    assert second.inputs["x"].flatten().tolist() == [0, 1, 2, 3]
    short = Examples({"x": torch.zeros(4, 1)}, {"x": {}}, keywords=False, calibration=({"x": torch.zeros(3, 1)},))
    assert len(judged(short)) == 1
