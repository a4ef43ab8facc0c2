"""The promise of the curvature: it predicts, without trying, what a change of the weights will cost."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tersor.calibration.curvature import estimate_fisher
from tersor.core.errors import DataError
from tersor.methods.stats import Stats
from tersor.nn.sites import find_sites
from tersor.tasks.scores import Scores


@dataclass(frozen=True)
class Toy:
    """A task over one tensor of inputs."""

    inputs: Tensor
    output: str
    name: str = "toy"
    description: str = "toy data"
    fingerprint: str = "0"

    def prepare(self, original: nn.Module) -> None:
        pass

    def batches(self, split: str, batch_size: int | None = None):
        yield from self.inputs.split(batch_size or 64) if len(self.inputs) else ()

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch)

    def score(self, model: nn.Module, split: str = "eval") -> Scores:
        raise NotImplementedError


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.tensor(load_digits().data, dtype=torch.float32).view(-1, 1, 8, 8) / 16


@pytest.fixture(scope="module")
def classifier(digits) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 32),
        nn.ReLU(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )
    labels = torch.tensor(load_digits().target)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        rows = torch.randint(0, len(digits), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(digits[rows]), labels[rows], label_smoothing=0.1).backward()
        optimizer.step()
    return model.eval()


class Encoder(nn.Module):
    """Token ids to a vector of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.experts = nn.Parameter(0.3 * torch.randn(2, 16, 16))
        self.project = nn.Linear(16, 12)

    def forward(self, index: Tensor) -> Tensor:
        states = self.rnn(self.embed(index))[0]
        mixed = torch.einsum("btd,eod->bto", states, self.experts).tanh() + states
        return F.normalize(self.project(mixed.mean(1)), dim=-1)


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.rnn = nn.GRU(16, 24, batch_first=True)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, 30)

    def forward(self, index: Tensor) -> Tensor:
        return 2 * self.head(self.mix(self.rnn(self.embed(index))[0]).relu())


def mean_kl(before: Tensor, after: Tensor) -> float:
    """Over examples and positions."""
    kl = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none")
    return kl.sum(-1).mean().item()


def half_squared_distance(before: Tensor, after: Tensor) -> float:
    return 0.5 * (after - before).square().sum(-1).mean().item()


def losses(
    model: nn.Module, task: Toy, loss: Callable[[Tensor, Tensor], float], noise: float, num_tries: int = 10
) -> tuple[list[float], list[float]]:
    """Predicted and measured loss of small random changes, summed over several tries, one pair per site."""
    stats = estimate_fisher(model, task)
    predicted, measured = [], []
    with torch.no_grad():
        before = model(task.inputs)
        for site in find_sites(model):
            weight = site.weight(model)
            kept, total, truth = weight.clone(), 0.0, 0.0
            for _ in range(num_tries):
                error = noise * kept.square().mean().sqrt() * torch.randn_like(kept)
                weight.copy_(kept + error)
                truth += loss(before, model(task.inputs))
                total += stats[site.name].loss(site.fold.matrix(error))
            weight.copy_(kept)
            predicted.append(total)
            measured.append(truth)
    return predicted, measured


def check_promise(predicted: list[float], measured: list[float]) -> None:
    for ours, truth in zip(predicted, measured, strict=True):
        assert truth / 1.5 < ours < 1.5 * truth, (predicted, measured)
    assert spearmanr(predicted, measured).statistic > 0.8, (predicted, measured)


def test_predicts_the_divergence_of_a_classifier(classifier, digits):
    # All examples: the few that the model is unsure of make up most of the curvature, and of the estimate's noise.
    check_promise(*losses(classifier, Toy(digits, "logits"), mean_kl, noise=0.03))


def test_predicts_the_distance_of_embeddings():
    torch.manual_seed(0)
    task = Toy(torch.randint(0, 60, (300, 7)), "embedding")
    check_promise(*losses(Encoder().eval(), task, half_squared_distance, noise=0.03))


def test_predicts_the_mean_divergence_over_positions():
    torch.manual_seed(0)
    task = Toy(torch.randint(0, 30, (200, 9)), "logits")
    check_promise(*losses(LanguageModel().eval(), task, mean_kl, noise=0.03))


def test_tells_columns_that_matter_from_those_that_do_not():
    """Inputs of very different size: the curvature's columns follow their squares."""
    torch.manual_seed(0)
    size = torch.logspace(-2, 1, 8)
    stats = estimate_fisher(nn.Sequential(nn.Linear(8, 4)), Toy(torch.randn(2000, 8) * size, "values"))["0"]
    expected = size.square() / size.square().mean()
    torch.testing.assert_close(stats.column_weight, expected, rtol=0.25, atol=0)
    torch.testing.assert_close(stats.row_weight, torch.full((4,), size.square().mean().item()), rtol=0.3, atol=0)


def test_the_number_of_examples_does_not_change_the_scale():
    torch.manual_seed(0)
    model, index = LanguageModel().eval(), torch.randint(0, 30, (400, 9))
    few, many = (estimate_fisher(model, Toy(index[:n], "logits"))["head"].row_weight.sum() for n in (100, 400))
    assert 0.8 < few / many < 1.25


def test_same_seed_same_statistics(classifier, digits):
    task = Toy(digits[:64], "logits")
    torch.manual_seed(5)
    first = estimate_fisher(classifier, task, seed=3)
    torch.manual_seed(6)
    second, third = estimate_fisher(classifier, task, seed=3), estimate_fisher(classifier, task, seed=4)
    assert all(torch.equal(first[n].row_weight, second[n].row_weight) for n in first)
    assert all(torch.equal(first[n].column_weight, second[n].column_weight) for n in first)
    assert not torch.equal(first["10"].row_weight, third["10"].row_weight)


def test_leaves_the_random_numbers_alone(classifier, digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    estimate_fisher(classifier, Toy(digits[:16], "logits"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_as_it_was(classifier, digits, fails):
    model = copy.deepcopy(classifier).train()
    model[3].eval()  # a frozen batch norm inside a model in training
    model[0].weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needs = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(RuntimeError):
            estimate_fisher(model, Toy(torch.randn(4, 3), "logits"))
    else:
        estimate_fisher(model, Toy(digits[:64], "logits"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_and_a_caller_without_gradients(classifier, digits):
    task = Toy(digits[:64], "logits")
    frozen = copy.deepcopy(classifier).requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(
            estimate_fisher(frozen, task)["0"].row_weight, estimate_fisher(classifier, task)["0"].row_weight
        )


def test_sites_the_data_never_reaches_cost_nothing(digits):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 3), nn.Linear(64, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    stats = estimate_fisher(Partly(), Toy(digits[:32], "logits"))
    assert stats["unused"].loss(torch.ones(3, 64)) == 0
    assert stats["used"].loss(torch.ones(3, 64)) > 0
    assert all(torch.isfinite(found.column_weight).all() for found in stats.values())


def test_no_data_is_refused(classifier, digits):
    with pytest.raises(DataError, match="toy: the calibration split is empty"):
        estimate_fisher(classifier, Toy(digits[:0], "logits"))


def test_without_statistics_the_loss_is_the_plain_error():
    assert Stats().loss(torch.full((2, 3), 2.0)) == 12.0
