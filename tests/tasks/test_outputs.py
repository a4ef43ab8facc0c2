"""What a model returns is judged for what it is: classes on the axis that holds them, everything else as values."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from tersor.calibration.curvature import estimate_fisher
from tersor.calibration.divergence import divergence, outputs
from tersor.core.errors import DataError, InputError
from tersor.tasks import open_task
from tersor.tasks.outputs import tensors_of
from tersor.training.imitation import imitation
from tersor.training.merge import divergences

NUM = 8  # classes, and the side of the images


class Net(nn.Module):
    """A small net, and what is done to its output."""

    def __init__(self, body, after=lambda y: y):
        super().__init__()
        self.body, self.after = body, after

    def forward(self, x):
        return self.after(self.body(x))


def conv(num_in=3, num_out=NUM):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(num_in, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_out, 1))


class Channels(nn.Module):
    """Channels last inside, as transformers' heads are."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x.movedim(1, -1))


def linear():
    torch.manual_seed(0)
    return Channels(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, NUM)))


def tcn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, NUM, 1))


LAYOUTS = {
    "conv head": (conv, None, 1),
    "linear head": (linear, None, 3),
    "linear head, then transposed": (linear, lambda y: y.movedim(-1, 1), 1),
    "conv head, then channels last": (conv, lambda y: y.permute(0, 2, 3, 1), 3),
    "resized": (conv, nn.Upsample(scale_factor=2, mode="bilinear"), 1),
    "log-softmax": (conv, nn.LogSoftmax(1), 1),
    "softmax": (conv, nn.Softmax(1), 1),
    "pixel shuffle": (lambda: conv(num_out=4 * NUM), nn.PixelShuffle(2), 1),
    "1-D": (tcn, None, 1),
    "1-D, for CTC": (tcn, lambda y: y.transpose(1, 2), 2),
    "by name": (conv, lambda y: {"logits": y}, 1),
    "torchvision": (conv, lambda y: {"out": y, "aux": y}, 1),
    "pooled": (conv, lambda y: y.mean((2, 3), keepdim=True), 1),
}


def data(tmp_path, shape=(3, NUM, NUM), num=40, **arrays):
    x = np.random.default_rng(0).normal(size=(num, *shape)).astype(np.float32)
    np.savez(tmp_path / "data.npz", **(arrays or {"x": x}))
    return tmp_path / "data.npz"


def damaged(model, amount=0.5):
    copied = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(amount * parameter.std(correction=0) * torch.randn_like(parameter))
    return copied


def whole(model, task):
    with torch.no_grad():
        return torch.cat([next(iter(tensors_of(model(b.inputs["x"])).values())) for b in task.batches("eval")])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_are_found_where_they_are(tmp_path, layout):
    make, after, axis = LAYOUTS[layout]
    model = Net(make(), after or (lambda y: y)).eval()
    task = open_task(None, data(tmp_path, (3, NUM) if "1-D" in layout else (3, NUM, NUM)))
    task.prepare(model)
    itself, far = task.score(model), task.score(damaged(model))
    assert (task.output, itself.value, itself.extras) == ("logits", 1.0, {"kl": 0.0})
    p, q = (whole(each, task).movedim(axis, -1).double() for each in (model, damaged(model)))
    p, q = (each.log() if layout == "softmax" else each.log_softmax(-1) for each in (p, q))
    assert far.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert far.value < 0.95
    assert far.extras["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    kl = far.extras["kl"]
    assert divergences(model, {"far": damaged(model)}, task)["far"] == pytest.approx(kl, rel=1e-3)
    assert divergence(outputs(model, task), outputs(damaged(model), task), "logits") == pytest.approx(kl, rel=0.3)
    assert torch.is_grad_enabled()


@dataclass(frozen=True)
class ClassesLast:
    """A user's own task over the same batches, which keeps to the contract."""

    inner: object
    output: str = "logits"
    name: str = "own"

    def batches(self, split, batch_size=None):
        return self.inner.batches(split, batch_size)

    def forward(self, model, batch):
        return model(batch.inputs["x"]).movedim(1, -1)


@pytest.mark.parametrize("kind", [conv, tcn])
def test_curvature_is_that_of_the_classes(tmp_path, kind):
    model = kind().eval()
    task = open_task(None, data(tmp_path, (3, NUM) if kind is tcn else (3, NUM, NUM)))
    ours, own = estimate_fisher(model, task), estimate_fisher(model, ClassesLast(task))
    for name, stats in own.items():
        torch.testing.assert_close(ours[name].row_weight, stats.row_weight)
        torch.testing.assert_close(ours[name].column_weight, stats.column_weight)


def test_what_is_trained_is_compared_by_classes_too(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 3, NUM, NUM)).astype(np.float32)
    model = conv().eval()
    task = open_task(None, data(tmp_path, x=x, x_train=x))
    batch = next(task.epoch(0))
    p, q = (each(batch.inputs["x"]).movedim(1, -1).log_softmax(-1) for each in (model, damaged(model)))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(imitation(task, model)(damaged(model), batch), expected)


@pytest.mark.parametrize("layout", ["conv head", "linear head", "softmax", "1-D"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_large_outputs(tmp_path, layout, dtype):
    """The squares of what the layers give are far beyond float16."""
    make, after, axis = LAYOUTS[layout]
    body = make()
    with torch.no_grad():
        for parameter in list(body.parameters())[-2:]:
            parameter.mul_(1000)
    model = Net(body, after or (lambda y: y)).to(dtype).eval()
    task = open_task(None, data(tmp_path, (3, NUM) if "1-D" in layout else (3, NUM, NUM)))
    task.prepare(model)
    assert (task.output, task.inputs.reading.class_axis) == ("logits", axis)
    assert task.score(model).extras == {"kl": 0.0}
    values = open_task(
        None, data(tmp_path, (3, NUM) if "1-D" in layout else (3, NUM, NUM)), options={"output": "values"}
    )
    values.prepare(model)
    assert (values.score(model).value, values.score(model).extras) == (1.0, {"relative_error": 0.0})


def test_a_compressed_model_that_gives_nan_scores_nothing(tmp_path):
    for output, extra in [("logits", "kl"), ("values", "relative_error"), ("embedding", "neighbour_overlap")]:
        task = open_task(None, data(tmp_path), options={"output": output})
        task.prepare(Net(conv()).eval())
        scores = task.score(Net(conv(), lambda y: y * torch.nan).eval())
        assert (scores.value, list(scores.extras)) == (0.0, [extra])


SEVERAL = {
    "tuple": lambda y: (y, y.mean((2, 3))),
    "nested": lambda y: {"a": {"b": y}, "c": [y.sum(1)], "number": 3},
    "image": None,
    "one channel": lambda y: y[:, :1],
    "regression": lambda y: y.mean((1, 2, 3), keepdim=True).flatten(1),
    "a number each": lambda y: y.mean((1, 2, 3)),
}


@pytest.mark.parametrize("what", SEVERAL)
def test_everything_else_is_values(tmp_path, what):
    model = Net(conv(num_out=3) if what == "image" else conv(), SEVERAL[what] or (lambda y: y)).eval()
    task = open_task(None, data(tmp_path))
    task.prepare(model)
    itself, near, far = (task.score(each) for each in (model, damaged(model, 0.02), damaged(model, 1.0)))
    assert (task.output, itself.metric.name, itself.value) == ("values", "explained", 1.0)
    assert itself.extras == {"relative_error": 0.0}
    assert 1 > near.value > far.value >= 0
    assert near.extras["relative_error"] < far.extras["relative_error"]
    assert all(stats.row_weight.any() for stats in estimate_fisher(model, task).values())


def test_explained_variance_by_hand(tmp_path):
    model = Net(conv(), lambda y: y.mean((2, 3))).eval()
    task = open_task(None, data(tmp_path), options={"output": "values"})
    task.prepare(model)
    a, b = whole(model, task).double(), whole(damaged(model), task).double()
    expected = (1 - (a - b).square().sum(1) / (a - a.mean(0)).square().sum(1).mean()).clip(0, 1)
    np.testing.assert_allclose(task.score(damaged(model)).examples[:, 0], expected, rtol=1e-4)
    assert task.score(damaged(model)).extras["relative_error"] == pytest.approx(
        ((a - b).norm() / a.norm()).item(), rel=1e-4
    )


def test_no_output_drowns_another(tmp_path):
    """The second output is a thousand times larger; damage to the first alone still shows."""
    model = Net(conv(), lambda y: (y, 1000 * y.detach().clone())).eval()
    broken = Net(conv(), lambda y: (0 * y, 1000 * y)).eval()
    task = open_task(None, data(tmp_path))
    task.prepare(model)
    assert task.score(broken).value < 0.6


def test_rows_of_unit_length_are_embeddings(tmp_path):
    model = Net(conv(), lambda y: normalize(y.flatten(1), dim=-1)).eval()
    task = open_task(None, data(tmp_path))
    task.prepare(model)
    assert (task.output, task.score(model).metric.name) == ("embedding", "cosine")


def test_what_the_user_says_counts(tmp_path):
    pair = Net(conv(), lambda y: (y.mean((2, 3)), y)).eval()
    for options, output in [
        ({"field": 0}, "logits"),
        ({"field": "1", "class_axis": 1}, "logits"),
        ({"output": "values"}, "values"),
        ({"field": 0, "output": "embedding"}, "embedding"),
    ]:
        task = open_task(None, data(tmp_path), options=options)
        task.prepare(pair)
        assert (task.output, task.score(pair).value) == (output, 1.0)
    same = Net(conv(num_out=3)).eval()
    task = open_task(None, data(tmp_path), options={"class_axis": 1})
    task.prepare(same)
    assert task.output == "logits"
    assert "classes on axis 1 of [3, 8, 8], as asked" in task.description


def test_what_cannot_be_read_is_said(tmp_path):
    path = data(tmp_path)
    for options, after, message in [
        ({"class_axis": 4}, None, "class_axis is 4, and the model returns"),
        ({"field": 2}, None, "option field is 2; the model returns"),
        ({"output": "logits"}, lambda y: (y, y), "say which are logits"),
        ({"output": "logits"}, lambda y: y.sum(1), "which axis holds the classes cannot be told"),
        ({}, lambda y: 3, r"returned int \(no tensors\) for 36 examples"),
        ({}, lambda y: y.flatten(2).permute(2, 0, 1), "no tensor whose first axis is the examples"),
        ({}, lambda y: y * torch.nan, "gives NaN on the fidelity data"),
        ({"output": "values"}, lambda y: y / 0, "gives infinite values on the fidelity data"),
    ]:
        with pytest.raises(InputError, match=message):
            open_task(None, path, options=options).prepare(Net(conv(), after or (lambda y: y)).eval())
    with pytest.raises(InputError, match="option output is 'classes'"):
        open_task(None, path, options={"output": "classes"})
    with pytest.raises(InputError, match="class_axis goes with output=logits"):
        open_task(None, path, options={"output": "values", "class_axis": 1})


def test_classification_wants_one_prediction_an_example(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 3, NUM, NUM)), np.arange(20) % NUM
    task = open_task("classification", data(tmp_path, x=x, y=y))
    pooled = Net(conv(), lambda y: y.mean((2, 3), keepdim=True)).eval()
    flat = Net(conv(), lambda y: y.mean((2, 3))).eval()
    assert task.score(pooled).value == task.score(flat).value
    with pytest.raises(InputError, match="for a prediction at every place use task fidelity"):
        task.score(Net(conv()).eval())


class Masking(nn.Module):
    """Draws in evaluation mode too, as masked and variational autoencoders do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(x + torch.randn_like(x))


def test_a_model_that_draws_agrees_with_itself(tmp_path):
    task = open_task(None, data(tmp_path, (6,)))
    model = Masking().eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    task.prepare(model)
    assert task.score(model).extras == {"kl": 0.0}
    torch.testing.assert_close(torch.rand(2), expected)


class Pair(nn.Module):
    """Two inputs by name."""

    def __init__(self):
        super().__init__()
        self.words, self.see = nn.Embedding(50, 8), nn.Linear(4, 8)

    def forward(self, ids, image):
        return {"a": self.words(ids).mean(1), "b": self.see(image)}


def test_arrays_by_name(tmp_path):
    ids, image = np.arange(60).reshape(20, 3) % 50, np.random.default_rng(0).normal(size=(20, 4))
    task = open_task(None, data(tmp_path, ids=ids, image=image))
    model = Pair().eval()
    task.prepare(model)
    assert task.score(model).value == 1.0
    assert task.score(damaged(model)).value < 1.0
    assert set(estimate_fisher(model, task)) == {"words", "see"}
    with pytest.raises(DataError, match="unlike numbers of examples: ids 20, image 19"):
        open_task(None, data(tmp_path, ids=ids, image=image[:19]))
    wrong = open_task(None, data(tmp_path, ids=ids, other=image))
    with pytest.raises(DataError, match="Pair cannot take ids of shape"):
        wrong.prepare(model)
