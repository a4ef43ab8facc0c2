"""What a format must say of itself, and that leaving it out cannot go unnoticed."""

import pytest
import torch

from tersor.formats import FORMATS
from tersor.formats.contract import Format, Grid, Sparse


@pytest.mark.parametrize("kind", [Format, Grid, Sparse], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("member", ["usual_methods", "trainable_parts", "packing"])
def test_a_format_that_leaves_something_out_cannot_be_made(kind, member):
    said = dict.fromkeys(kind.__abstractmethods__)
    assert type("Whole", (kind,), dict(said))()
    del said[member]
    with pytest.raises(TypeError, match=rf"abstract class Forgetful .*{member}"):
        type("Forgetful", (kind,), said)()


def test_formats_say_what_no_method_must_guess():
    """Which have zeros that were pruned, and of which plain rounding says how good they can be."""
    sparse = {name for name, format in FORMATS.items() if format.sparse}
    assert sparse == {name for name in FORMATS if name.startswith(("bitmask", "2:4", "4:8"))}
    chosen = {name for name, format in FORMATS.items() if not format.rounds_each_weight}
    assert chosen == sparse | {"coded", "lowrank"} | {name for name in FORMATS if name.startswith("codebook")}
    learnable = {name for name, format in FORMATS.items() if format.learnable_range}
    assert learnable == {n for n in FORMATS if n.startswith(("int", "fp8")) and not n.endswith("+lowrank")}


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int8-asym", "int3-asym"])
def test_learnable_ranges_are_those_of_the_codes(name):
    """`(code - zero_point) * scale` at both ends is the smallest and the largest weight that the grid holds."""
    format = FORMATS[name]
    params = format.fit(torch.tensor([[-1.0, 0.9, 0.0, 0.2]]))
    levels, scale = format.learnable_range, params["scale"].float().item()
    zero = levels.zero_point
    zero = params["zero_point"].item() * levels.num_steps / 256 if zero is None else zero
    ends = sorted([(levels.lowest - zero) * scale, (levels.highest - zero) * scale])
    held = format.fake_quantize(torch.tensor([[-1e3, 1e3]]), params)
    assert sorted(held[0].tolist()) == pytest.approx(ends)
