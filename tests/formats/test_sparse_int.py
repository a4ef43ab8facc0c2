"""Sparse integers: zero stays exactly zero, only kept codes are stored, and the file is as small as that says."""

import pytest
import safetensors.torch
import torch

from laws import random
from tersor.core.errors import FormatError
from tersor.formats import FORMATS
from tersor.formats.bitmask import Bitmask
from tersor.formats.contract import Encoded, Sparse
from tersor.formats.int_group import IntGroup
from tersor.formats.semi_structured import SemiStructured
from tersor.formats.sparse_int import SparseInt

ROWS = [format for format in FORMATS.values() if isinstance(format, SparseInt)]
HALF = SparseInt(Bitmask(), IntGroup(4, 64))


def by_name(format):
    return format.name


def half_kept(format, weight):
    """At half density, whatever the pattern."""
    return with_mask(format, weight, format.choose(weight.abs(), 0.5))


def with_mask(format, weight, mask):
    return {"mask": mask, **format.grid.fit(torch.where(mask, weight, 0.0))}


@pytest.mark.parametrize("format", ROWS, ids=by_name)
def test_what_is_kept_is_the_grids_and_all_else_is_zero(format):
    weight = random(9, 150)
    params = half_kept(format, weight)
    mask = params["mask"]
    decoded = format.encode(weight, params).decode()
    grid = format.grid.fake_quantize(torch.where(mask, weight, 0.0), {"scale": params["scale"]})
    assert torch.equal(decoded[mask], grid[mask])
    assert not decoded[~mask].any()
    assert not torch.signbit(decoded[~mask]).any()


@pytest.mark.parametrize("format", ROWS, ids=by_name)
def test_scales_look_at_kept_weights_only(format):
    """The largest weight of a group is not kept: the grid does not reach for it."""
    weight, mask = random(4, 64).clamp(-1, 1), torch.zeros(4, 64, dtype=torch.bool)
    mask[:, ::4] = True
    weight[:, 1] = 100.0
    error = (format.encode(weight, with_mask(format, weight, mask)).decode() - weight)[mask]
    assert error.abs().max() <= 0.26


@pytest.mark.parametrize("format", ROWS, ids=by_name)
def test_bytes(format, tmp_path):
    """One bit a weight, a code for every second, and the scales; less than the dense integers from 4 bits on."""
    weight = random(64, 256)
    encoded = format.encode(weight, half_kept(format, weight))
    scales = 64 * (256 // (format.grid.group_size or 256)) * 2
    assert encoded.num_bytes == 64 * 256 // 8 + 64 * 128 * format.grid.bits // 8 + scales
    dense = format.grid.encode(weight, format.grid.fit(weight))
    safetensors.torch.save_file(encoded.parts, tmp_path / "sparse")
    safetensors.torch.save_file(dense.parts, tmp_path / "dense")
    assert (tmp_path / "sparse").stat().st_size < (tmp_path / "dense").stat().st_size


@pytest.mark.parametrize("format", ROWS, ids=by_name)
def test_solvers_can_use_it(format):
    assert isinstance(format, Sparse)
    weight = random(5, 70)
    params = half_kept(format, weight)
    project = format.projector(params, (5, 70))
    columns = torch.stack([project(weight[:, j], j) for j in range(70)], dim=1)
    assert torch.equal(columns, format.fake_quantize(weight, params))


def test_the_codes_of_all_rows_stand_in_one_row():
    """Three kept codes of 4 bits in two bytes: 3, -8 and 7 steps of one half."""
    format = SparseInt(Bitmask(), IntGroup(4))
    weight = torch.tensor([[1.5, 0.0, -4.0], [0.0, 3.5, 0.0]])
    params = {"mask": weight != 0, "scale": torch.full((2, 1), 0.5, dtype=torch.float16)}
    parts = format.encode(weight, params).parts
    assert parts["mask"].tolist() == [[0b101], [0b010]]
    assert parts["codes"].tolist() == [0x0B, 0x0F]
    assert torch.equal(Encoded(format, (2, 3), parts).decode(), weight)


def test_a_mask_that_keeps_less_than_the_pattern():
    format = SparseInt(SemiStructured(2, 4), IntGroup(3, 64))
    weight, mask = random(3, 20), torch.zeros(3, 20, dtype=torch.bool)
    mask[:, ::5] = True
    params = with_mask(format, weight, mask)
    assert torch.equal(format.encode(weight, params).decode(), format.fake_quantize(weight, params))
    assert not format.encode(weight, params).decode()[~mask].any()


@pytest.mark.parametrize("change", [-1, 1])
def test_damaged_files_are_refused(change):
    weight = random(6, 40)
    parts = HALF.encode(weight, half_kept(HALF, weight)).parts
    codes = torch.cat([parts["codes"], parts["codes"]])[: len(parts["codes"]) + change]
    with pytest.raises(FormatError, match=r"bytes of codes for 120 kept weights; the file is damaged"):
        HALF.decode(Encoded(HALF, (6, 40), {**parts, "codes": codes}))


def test_overflow_names_the_format():
    with pytest.raises(FormatError, match=r"^bitmask\+int4-g64: a scale of .* overflows fp16"):
        HALF.fit(1e7 * random(2, 64))
