"""The promise of the sensitivity: what is predicted to hurt hurts, in the unit it is said in."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tersor
from cli_runner import tersor as run
from tersor.analysis.sensitivity import Sensitivity, sensitivity, spread
from tersor.calibration.divergence import NUM_EXAMPLES, UNITS, divergence, outputs
from tersor.core.errors import UnknownName

FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10))
"""


class Digits:
    """scikit-learn's digits; the eval split is the second half."""

    name, description, fingerprint = "digits", "digits", "0"

    def __init__(self, output: str = "logits"):
        self.output = output

    def batches(self, split, batch_size=None):
        half = digits()[:900] if split == "calibration" else digits()[900:]
        yield from half.split(batch_size or 64)

    def forward(self, model, batch):
        return F.normalize(model(batch), dim=-1) if self.output == "embedding" else model(batch)


@cache
def digits() -> Tensor:
    return torch.tensor(load_digits().data, dtype=torch.float32) / 16


@cache
def classifier() -> nn.Module:
    torch.manual_seed(0)
    names: dict = {}
    exec(FACTORY, names)
    model, labels = names["make"](), torch.tensor(load_digits().target)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        rows = torch.randint(0, 900, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(digits()[rows]), labels[rows], label_smoothing=0.1).backward()
        optimizer.step()
    return model.eval()


@cache
def found(output: str) -> Sensitivity:
    return sensitivity(classifier(), Digits(output), num_measured=12)


@pytest.mark.parametrize("output", UNITS)
def test_predictions_order_what_is_measured(output):
    assert found(output).unit == UNITS[output]
    assert len(found(output).sample) == 12
    assert found(output).correlation > 0.9


@pytest.mark.parametrize("output", UNITS)
def test_small_losses_are_predicted_in_their_unit(output):
    """Not only the order: the numbers. Large errors leave the range where curvature tells."""
    small = [m for m in found(output).sample if m.scheme.endswith(("int8", "int4-g64"))]
    assert len(small) >= 3
    assert all(0.2 < m.measured / m.predicted < 5 for m in small)


def test_the_sites_that_lose_most_come_first():
    worst = [max(losses.values()) for losses in found("logits").sites.values()]
    assert set(found("logits").sites) == {"0", "2", "4"}
    assert worst == sorted(worst, reverse=True)
    assert all(losses["mse:int8"] < losses["mse:int2-g64"] for losses in found("logits").sites.values())


def test_the_sample_spans_the_predictions():
    predicted = [m.predicted for m in found("logits").sample]
    losses = [loss for by_scheme in found("logits").sites.values() for loss in by_scheme.values()]
    assert predicted == sorted(predicted)
    assert (predicted[0], predicted[-1]) == (min(losses), max(losses))
    assert len({(m.site, m.scheme) for m in found("logits").sample}) == 12


def test_the_model_is_left_as_it_was():
    model = copy.deepcopy(classifier()).train()
    before = copy.deepcopy(model.state_dict())
    sensitivity(model, Digits(), ["int2"], num_measured=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_measured_unless_asked():
    none = sensitivity(classifier(), Digits(), ["int4", "keep"], num_measured=0)
    assert none.sample == []
    assert none.to_dict()["correlation"] is None
    assert {tuple(losses) for losses in none.sites.values()} == {("mse:int4",)}


def test_an_unknown_scheme_is_told_before_any_work():
    with pytest.raises(UnknownName, match="int4-g32"):
        sensitivity(nn.Linear(1, 1), Digits(), ["int4-g33"])


def test_spread():
    pairs = [(float(loss), str(loss), "x") for loss in (5, 3, 1, 4, 2)]
    assert [pair[0] for pair in spread(pairs, 3)] == [1, 3, 5]
    assert spread(pairs, 9) == sorted(pairs)
    assert spread(pairs, 0) == spread([], 3) == []


def test_padding_does_not_count():
    class Padded(Digits):
        def batches(self, split, batch_size=None):
            yield {"attention_mask": torch.tensor([[1, 1, 0, 0]])}

        def forward(self, model, batch):
            return model.weight[None]

    model = nn.Linear(3, 4, bias=False)
    assert torch.equal(torch.cat(list(outputs(model, Padded()))), model.weight[:2])


def test_outputs_are_bounded():
    rows = torch.cat(list(outputs(classifier(), Digits())))
    assert len(rows) == NUM_EXAMPLES
    assert torch.allclose(rows, classifier()(digits()[900 : 900 + NUM_EXAMPLES]), atol=1e-5)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert divergence([p.log()], [q.log()], "logits") == pytest.approx(by_hand, rel=1e-5)
    a, b = F.normalize(torch.randn(5, 7), dim=1), F.normalize(torch.randn(5, 7), dim=1)
    assert divergence([a], [b], "embedding") == pytest.approx(1 - F.cosine_similarity(a, b).mean().item(), rel=1e-4)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A folder with a factory, weights and data; returns the arguments that name them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("digits_maker.py").write_text(FACTORY)
    save_file(classifier().state_dict(), "digits.safetensors")
    np.savez("digits.npz", x=digits()[:600].numpy(), y=load_digits().target[:600])
    return ["digits_maker:make", "--weights", "digits.safetensors"]


def test_the_command_prints_predictions_beside_measurements(inside, capsys):
    data = ["--task", "classification", "--data", "digits.npz", "--format", "int8", "--format", "int2"]
    made = run(capsys, "inspect", *inside, "--sensitivity", *data, "--measure", "4", "--json")
    assert made.status == 0, made.stdout
    assert made.json["unit"] == "nats per prediction"
    assert set(made.json["sites"]) == {"0", "2", "4"}
    assert len(made.json["sample"]) == 4
    assert made.json["correlation"] > 0.7
    table = run(capsys, "inspect", *inside, "--sensitivity", *data, "--measure", "4")
    assert "in nats per prediction" in table.stdout
    assert "n = 4" in table.stdout


def test_mistakes_on_the_command_line_are_told(inside, capsys):
    lost = run(capsys, "inspect", *inside, "--data", "digits.npz")
    assert lost.status == 2
    assert "only for --sensitivity" in lost.stderr
    negative = run(capsys, "inspect", *inside, "--sensitivity", "--data", "digits.npz", "--measure", "-1")
    assert negative.status == 2
    assert "--measure -1 is not a number of predictions" in negative.stderr
    tersor.save(tersor.compress(classifier(), tersor.Recipe.of("int8")).model, "small")
    packed = run(capsys, "inspect", "digits_maker:make", "--weights", "small", "--sensitivity")
    assert packed.status == 2
    assert "inspect the original model instead" in packed.stderr
