import pytest
import torch
from models import model_of

from tersor.core.errors import ModelError
from tersor.transforms.hadamard import Hadamard, hadamard, random_hadamard


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 44, 60, 76, 80, 96, 144, 576, 768, 1536, 2048])
def test_hadamard_matrices_are_signs_with_orthogonal_rows(size):
    matrix = hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 172])
def test_other_sizes_are_rotated_too(size):
    assert hadamard(size) is None
    rotation = random_hadamard(size, seed=0)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size, dtype=torch.float64))


def test_outliers_are_spread():
    """The paper's promise: no feature of the residual stream stands out, whatever the embedding holds."""
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 100
    tokens = torch.arange(3, 40)[None]

    def peak():
        stream = model.model.embed_tokens(tokens)
        return (stream.abs().amax() / stream.square().mean().sqrt()).item()

    before = peak()
    Hadamard().apply(model, {})
    assert before > 5.5
    assert peak() < 0.6 * before


def test_seeds_differ_and_repeat():
    assert torch.equal(random_hadamard(64, 1), random_hadamard(64, 1))
    assert not torch.equal(random_hadamard(64, 1), random_hadamard(64, 2))


def test_a_tied_model_is_told_the_way_out():
    with pytest.raises(ModelError, match=r"ties lm_head to embed_tokens.*use hadamard-heads"):
        Hadamard().apply(model_of("llama tied"), {})
