"""Tables that tensors of several types share: whatever formats meet in one file, it is read again, bit for bit."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from laws import random
from tersor.checkpoint.container import Container, read
from tersor.checkpoint.container_write import write
from tersor.checkpoint.views import Packing
from tersor.codecs.head import read_head, write_head
from tersor.codecs.integers import Integers, as_matrix, pieces_of
from tersor.codecs.plan import CENTRED, make_plan
from tersor.core.errors import ArtifactError
from tersor.formats import FORMATS


@cache
def stored(name: str) -> tuple[dict[str, Tensor], Packing]:
    """The parts of a small weight in a format, and which of them hold codes of a few bits."""
    weight, format = random(8, 512) * 0.05, FORMATS[name]
    encoded = format.encode(weight, format.fit(weight))
    return dict(encoded.parts), format.packing(encoded.parts, (8, 512))


def come_back(names: tuple[str, ...], path: Path) -> bool:
    """Write weights in these formats into one file, and compare what is read; whether they shared tables."""
    tensors: dict[str, Tensor] = {}
    packing: dict[str, tuple[int, int]] = {}
    for i, name in enumerate(names):
        parts, packed = stored(name)
        tensors |= {f"{i}.{part}": tensor for part, tensor in parts.items()}
        packing |= {f"{i}.{part}": bits for part, bits in packed.items()}
    write(tensors, path, packing)
    found = read(path, num_threads=1)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), (names, name)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), (names, name)
    return Container(path).header.tables


@pytest.mark.parametrize(
    "names", [("q6_k",), ("int8", "int8-g64-asym"), ("int8", "mxfp4"), ("q6_k", "coded"), tuple(FORMATS)]
)
def test_formats_share_tables(names, tmp_path):
    assert come_back(names, tmp_path / "model.tersor")


@pytest.mark.slow
@pytest.mark.parametrize("first", FORMATS)
def test_all_pairs_of_formats(first, tmp_path):
    names = list(FORMATS)
    for second in names[names.index(first) :]:
        come_back((first, second), tmp_path / "model.tersor")


def test_a_value_beyond_the_type_is_damage():
    """Shared tables may hold it, as another tensor needs it; a tensor of this type may not."""
    wide = torch.tensor([[-100, 90, 127, 0]] * 64, dtype=torch.int16)
    plan = make_plan(as_matrix(wide))
    assert (plan.tables.low, plan.num_low_bits) == (CENTRED, 0)
    pieces = pieces_of(as_matrix(wide), plan, shared=True)
    for dtype, fits in ((torch.int16, True), (torch.int8, True), (torch.uint8, False)):
        decoding = Integers(plan.tables).decode(
            memoryview(pieces.head), [memoryview(chunk) for chunk in pieces.chunks], dtype, (64, 4)
        )
        if fits:
            decoding.tasks[0]()
            assert torch.equal(decoding.tensor.to(torch.int16), wide)
        else:
            with pytest.raises(ArtifactError, match="between -100 and 127 is too large for uint8"):
                decoding.tasks[0]()


def test_tables_of_its_own_never_go_beyond_the_type():
    plan = make_plan(as_matrix(torch.tensor([[-100, 90], [3, 4]], dtype=torch.int16)))
    with pytest.raises(ArtifactError, match=r"tables of the values -100 to 90 for torch\.uint8"):
        read_head(write_head(plan), (2, 2), torch.uint8)
