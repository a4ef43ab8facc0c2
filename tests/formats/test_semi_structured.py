"""2:4 and 4:8: exactly n of every m, the bytes they take, and masks that do not fit."""

import pytest
import safetensors.torch
import torch

from laws import random
from tersor.core.errors import FormatError
from tersor.formats.bitmask import Bitmask
from tersor.formats.contract import Encoded
from tersor.formats.semi_structured import SemiStructured

PATTERNS = [SemiStructured(2, 4), SemiStructured(4, 8)]


def by_name(pattern):
    return pattern.name


def slow_choice(score, n, m):
    """Group by group: the n largest; where equal, the later ones."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        for start in range(0, len(row), m):
            places = range(start, min(start + m, len(row)))
            for j in sorted(places, key=lambda j: (row[j], j))[-n:]:
                mask[i, j] = True
    return mask


@pytest.mark.parametrize("num_columns", [1, 2, 3, 4, 5, 6, 7, 8, 37, 64])
@pytest.mark.parametrize("pattern", PATTERNS, ids=by_name)
def test_the_n_largest_of_every_m_are_kept(pattern, num_columns):
    for weight in (random(5, num_columns), random(5, num_columns).round(), torch.zeros(2, num_columns)):
        mask = pattern.choose(weight.abs())
        assert torch.equal(mask, slow_choice(weight.abs(), pattern.n, pattern.m))
        decoded = pattern.encode(weight, pattern.fit(weight)).decode()
        assert torch.equal(decoded, torch.where(mask, weight.half().float(), 0.0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=by_name)
def test_nine_bits_per_weight_on_disk(pattern, tmp_path):
    weight = random(64, 256)
    encoded = pattern.encode(weight, pattern.fit(weight))
    assert encoded.bits_per_weight == 9
    sizes = []
    for name, parts in (("sparse", encoded.parts), ("dense", {"values": weight.half()})):
        safetensors.torch.save_file(parts, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] < 0.58 * sizes[1]


def test_the_mask_is_bits_and_the_values_follow_by_column():
    weight = torch.tensor([[1.0, 0.5, 0.25, 2.0, 3.0], [0.0, 0.0, 4.0, 0.0, 0.0]])
    parts = SemiStructured(2, 4).encode(weight, SemiStructured(2, 4).fit(weight)).parts
    assert parts["mask"].tolist() == [[0b11001], [0b11100]]
    assert parts["values"].tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=by_name)
def test_a_mask_that_keeps_less_is_held_and_one_that_keeps_more_is_not(pattern):
    weight, mask = random(3, 24), torch.zeros(3, 24, dtype=torch.bool)
    mask[:, ::8] = True
    decoded = pattern.encode(weight, {"mask": mask}).decode()
    assert torch.equal(decoded, torch.where(mask, weight.half().float(), 0.0))
    with pytest.raises(FormatError, match=f"keeps more than {pattern.n} of {pattern.m} columns; use bitmask"):
        pattern.encode(weight, {"mask": torch.ones_like(mask)})


@pytest.mark.parametrize("pattern", [*PATTERNS, Bitmask()], ids=by_name)
def test_a_projector_follows_the_mask(pattern):
    """Column by column what `fake_quantize` does, also when a solver changes the mask on the way."""
    weight = random(6, 16)
    params = {"mask": torch.zeros(6, 16, dtype=torch.bool)}
    project = pattern.projector(params, (6, 16))
    params["mask"].copy_(pattern.choose(weight.abs(), 0.5))
    columns = torch.stack([project(weight[:, j], j) for j in range(16)], dim=1)
    assert torch.equal(columns, pattern.fake_quantize(weight, params))


@pytest.mark.parametrize("pattern", PATTERNS, ids=by_name)
def test_damaged_masks_are_refused(pattern):
    weight = random(4, 16)
    parts = pattern.encode(weight, pattern.fit(weight)).parts
    parts["mask"] = parts["mask"].clone()
    parts["mask"][2, 0] ^= 1
    with pytest.raises(FormatError, match=f"^{pattern.name}: .* 8 bits set; the file is damaged"):
        pattern.decode(Encoded(pattern, (4, 16), parts))


def test_overflow_names_the_format():
    weight = torch.tensor([[1.0, -7e4, 0.0, 0.0]])
    with pytest.raises(FormatError, match=r"^2:4: the largest weight 7e\+04 overflows fp16"):
        SemiStructured(2, 4).encode(weight, SemiStructured(2, 4).fit(weight))
