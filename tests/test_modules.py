"""Laws of folds and packed embeddings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tersor
from tersor.formats import FORMATS
from tersor.nn.packed import Fold, PackedWeight, Stored
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)


@given(shapes, st.sampled_from(["rows", "transposed", "stack"]))
@settings(deadline=None)
def test_fold_round_trips(shape, view):
    weight = torch.arange(math.prod(shape)).view(shape)
    fold = Fold(shape, view)
    matrix = fold.matrix(weight)
    assert tuple(matrix.shape) == fold.shape
    assert torch.equal(fold.unfold(matrix), weight)
    assert fold.unfold(matrix).is_contiguous()


@given(shapes)
def test_fold_rows_are_outputs(shape):
    weight = torch.arange(math.prod(shape)).view(shape)
    assert torch.equal(Fold(shape).matrix(weight)[0], weight[0].flatten())
    assert torch.equal(Fold(shape, "transposed").matrix(weight)[0], weight[:, 0].flatten())
    assert torch.equal(Fold(shape, "stack").matrix(weight)[0], weight.flatten(0, -2)[0])


embeddings = {
    name: tersor.compress(nn.Sequential(nn.Embedding(40, 64)), Recipe.of(name)).model
    for name in ("bf16", "int8", "int4", "int3-g32-asym", "bitmask")
}


@pytest.mark.parametrize("name", embeddings)
@given(index=st.lists(st.integers(0, 39), max_size=60))
@settings(deadline=None, max_examples=40)
def test_embedding_rows_equal_the_full_decode(name, index):
    model = embeddings[name]
    index = torch.tensor(index, dtype=torch.long)
    assert torch.equal(model(index), model[0].weight[index])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (0, 3), (2, 3), (2, 1, 3), (5, 8), (6, 9)])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_embedding_takes_every_shape_of_index(shape, dtype):
    index = torch.randint(0, 40, shape).to(dtype)
    for model in embeddings.values():
        assert torch.equal(model(index), nn.functional.embedding(index, model[0].weight))


@pytest.mark.parametrize("count", [3, 100])
def test_embedding_refuses_rows_it_does_not_have(count):
    for model in embeddings.values():
        with pytest.raises(IndexError):
            model(torch.full((count,), 40))


def test_few_rows_decode_only_themselves(monkeypatch):
    decoded = []
    format = type(FORMATS["int4"])
    decode = format.decode
    monkeypatch.setattr(format, "decode", lambda self, encoded: decoded.append(encoded.shape) or decode(self, encoded))
    embeddings["int4"](torch.tensor([[1, 2], [2, 30]]))
    assert decoded == [(4, 64)]


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_casts_only_change_what_results_are_given_in(cast):
    packed = tersor.compress(nn.Sequential(nn.Embedding(40, 64)), Recipe.of("int4")).model[0].packed
    assert isinstance(packed, PackedWeight)
    before = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    decoded = packed.encoded.decode()
    getattr(packed, cast)()
    assert packed().dtype == getattr(torch, {"half": "float16", "double": "float64"}.get(cast, cast))
    assert torch.equal(packed().float(), decoded.to(packed.dtype).float())
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
        for name, tensor in packed.tensors.items()
    )


def test_stored_tensors_follow_the_device():
    stored = Stored({"codes": torch.ones(3, dtype=torch.uint8)}, torch.float32).to("meta")
    assert stored.tensors["codes"].device.type == "meta"
    assert stored.tensors["codes"].dtype == torch.uint8


def test_a_tied_weight_is_packed_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
            self.head.weight = self.embed.weight

    small = tersor.compress(Tied(), Recipe.of("int4")).model
    assert small.embed.packed is small.head.packed
    assert len(find_sites(small)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", embeddings)
def test_large_weights_are_decoded_a_few_rows_at_a_time(name, dtype, monkeypatch):
    encoded = embeddings[name][0].packed.encoded
    whole = encoded.decode()
    for chunk in (1, 64, 200, 40 * 64 - 1):
        monkeypatch.setattr("tersor.formats.contract.CHUNK", chunk)
        assert torch.equal(encoded.decode(dtype), whole.to(dtype))
