"""Classification of arrays, images and texts."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tersor.core.errors import DataError, InputError, MissingExtra
from tersor.tasks import open_task
from tersor.tasks.arrays import to_model_layout

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return (x.reshape(-1, 8, 8) * 15).astype(np.uint8), y


def save(folder, name="data.npz", **arrays):
    np.savez(folder / name, **arrays)
    return folder / name


def network(channels=1, size=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * (size - 2) ** 2, 10))


def test_digits_score_by_hand_and_the_split_adds_up(tmp_path, digits):
    x, y = digits
    task = open_task("classification", save(tmp_path, x=x, y=y), options={"mean": 0.3, "std": [0.4]})
    model = network()
    scores = task.score(model)
    with torch.no_grad():
        logits = model.eval()((torch.from_numpy(x[:, None]) / 255 - 0.3) / 0.4)
    expected = (logits.argmax(1).numpy() == y)[task.rows.eval]
    assert scores.examples[:, 0].tolist() == expected.tolist()
    assert scores.metric.binary
    assert "1,669 rows for evaluation, 128 held out for calibration" in task.description
    assert sorted([*task.rows.calibration, *task.rows.eval]) == list(range(1797))


def test_train_arrays_calibrate_and_test_arrays_are_all_judged(tmp_path, digits):
    x, y = digits
    path = save(tmp_path, x_train=x[:500], y_train=y[:500], x_test=x[500:600], y_test=y[500:600])
    task = open_task("classification", path, options={"calibration_examples": 200})
    model = network()
    assert task.score(model).num_examples == 100
    assert model.training
    calibration = list(task.batches("calibration"))
    assert sum(len(batch.rows) for batch in calibration) == 200
    first = calibration[0]
    np.testing.assert_array_equal(first.inputs["x"][:, 0].mul(255).round().numpy(), x[first.rows - 100])
    np.testing.assert_array_equal(task.labels[first.rows], y[first.rows - 100])
    assert task.score(model, "calibration").num_examples == 200


@pytest.mark.parametrize(
    ("shape", "dtype", "result"),
    [
        ((5, 8, 8), np.uint8, (5, 1, 8, 8)),
        ((5, 8, 8, 1), np.uint8, (5, 1, 8, 8)),
        ((5, 8, 8, 3), np.float64, (5, 3, 8, 8)),
        ((5, 3, 8, 8), np.uint8, (5, 3, 8, 8)),
        ((5, 64), np.float16, (5, 64)),
        ((5, 64), np.int32, (5, 64)),
    ],
)
def test_layouts(shape, dtype, result):
    x = RNG.integers(0, 255, shape).astype(dtype)
    tensor = to_model_layout(x)
    assert tensor.shape == result
    assert tensor.dtype == (torch.int64 if dtype == np.int32 else torch.float32)
    assert tensor.sum().item() == pytest.approx(x.sum() / (255 if dtype == np.uint8 else 1), rel=1e-3)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((4, 2))}, "no array named y; it holds x"),
        ({"images": np.zeros((4, 2))}, "no array named x_test or x"),
        ({"x": np.zeros((4, 2)), "y": np.zeros((4, 3))}, r"expected \[4\], one class per example"),
        ({"x": np.full((4, 2), np.nan), "y": np.zeros(4)}, r"NaN or infinity at index \[0, 0\]"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "at least one example"),
        ({"x": np.zeros((4, 2)), "y": np.array([0, 1, -2, 0])}, "holds -2 at index 2"),
        ({"x": np.zeros((4, 2)), "y": np.array([0.5, 1, 2, 0])}, "expected class numbers"),
        ({"x": np.zeros((4, 2)), "y": np.array([{}, 1, 2, 0], dtype=object)}, "Python objects"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4), "x_train": np.zeros((4, 3))}, "differ"),
    ],
)
def test_unusable_arrays(tmp_path, arrays, says):
    with pytest.raises(DataError, match=says):
        open_task("classification", save(tmp_path, **arrays))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"hello", b"\x93NUMPY\x01\x00"])
def test_not_an_npz(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.npz"):
        open_task("classification", tmp_path / "data.npz")


def test_a_bare_array_and_too_few_outputs(tmp_path):
    with (tmp_path / "bare.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="one bare array"):
        open_task("classification", tmp_path / "bare.npz")
    task = open_task("classification", save(tmp_path, x=np.zeros((20, 2)), y=np.arange(20)))
    with pytest.raises(InputError, match="at least 20 classes"):
        task.score(nn.Linear(2, 3))


def test_nan_logits_are_wrong_and_half_precision_and_bare_models_run(tmp_path):
    task = open_task("classification", save(tmp_path, x=RNG.normal(size=(40, 2)), y=np.zeros(40, np.int64)))
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    assert task.score(model).value == 0
    task.score(nn.Linear(2, 3).bfloat16())
    assert task.score(nn.Identity()).num_examples == 36


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for name, colour in {"blue": (0, 0, 255), "red": (255, 0, 0)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (12 + i, 10), colour).save(folder / name / f"{i}.png")
    return folder


class Reddest(nn.Module):
    def forward(self, x):
        assert x.shape[1:] == (3, 8, 8)
        return x.mean((2, 3))[:, [2, 0]]


def test_images_are_resized_cropped_and_labelled_by_their_folder(images):
    task = open_task("classification", images, options={"image_size": 8})
    assert task.score(Reddest()).value == 1.0
    assert task.labels.tolist() == [0] * 6 + [1] * 6
    assert "11 images for evaluation, 1 held out" in task.description
    assert "blue=0, red=1" in task.description
    assert next(task.batches("eval")).inputs["x"].max() == 1.0
    grey = images.parent / "grey" / "one"
    grey.mkdir(parents=True)
    for i in range(2):
        Image.new("L", (8, 8), 51).save(grey / f"{i}.png")
    x = next(open_task("classification", grey.parent, options={}).batches("eval")).inputs["x"]
    assert x.shape == (1, 1, 8, 8)
    assert x.unique().item() == pytest.approx(0.2)


def test_a_image_folder_can_calibrate(images):
    task = open_task("classification", images, calibration=images / "red", options={"image_size": 8})
    assert (len(task.rows.eval), len(task.rows.calibration)) == (12, 6)
    with pytest.raises(InputError, match="without labels"):
        task.score(Reddest(), "calibration")


def test_bad_images(images, monkeypatch):
    task = open_task("classification", images)
    with pytest.raises(DataError, match="image_size=224"):
        list(task.batches("eval"))
    (images / "blue" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        open_task("classification", images)
    Image.new("RGB", (4, 4)).save(images / "loose.png")
    with pytest.raises(DataError, match="lies in no class folder"):
        open_task("classification", images)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    (images / "loose.png").unlink()
    with pytest.raises(MissingExtra, match=r"tersor\[vision\]"):
        open_task("classification", images)


@pytest.fixture(scope="module")
def bert(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    label2id = {"Negative": 0, "Neutral": 1, "Positive": 2}
    names = {"label2id": label2id, "id2label": {number: name for name, number in label2id.items()}}
    return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **names)).eval()


def texts(tmp_path, labels, header="label,sentence"):
    rows = [f'{labels[i % len(labels)]},"text {"very " * (i % 7)}number {i}"' for i in range(24)]
    (tmp_path / "texts.csv").write_text("\n".join([header, *rows]))
    return tmp_path / "texts.csv"


@pytest.mark.parametrize(
    ("labels", "numbers", "says"),
    [
        (["positive", "negative"], [2, 0], "label2id"),
        (["2", "0"], [2, 0], "pooling"),
        (["spam", "ham"], [1, 0], "ham=0, spam=1"),
    ],
)
def test_texts_with_every_kind_of_label(tmp_path, tokenizer, bert, labels, numbers, says):
    task = open_task("classification", texts(tmp_path, labels), tokenizer=tokenizer, config=bert.config)
    assert task.labels[:2].tolist() == numbers
    assert (says in task.description) == (says != "pooling")
    scores = task.score(bert)
    with torch.no_grad():
        alone = [
            bert(**tokenizer(f"text {'very ' * (row % 7)}number {row}", return_tensors="pt")).logits.argmax().item()
            for row in task.rows.eval
        ]
    assert scores.examples[:, 0].tolist() == (np.array(alone) == task.labels[task.rows.eval]).tolist()


def test_label_errors_and_calibration_text(tmp_path, tokenizer, bert):
    with pytest.raises(DataError, match="line 2: label '3' is class 3, and the model has classes 0 to 2"):
        open_task("classification", texts(tmp_path, ["3", "1"]), tokenizer=tokenizer, config=bert.config)
    data = texts(tmp_path, ["0", "1"])
    with pytest.raises(DataError, match="no tokenizer"):
        open_task("classification", data)
    (tmp_path / "plain.txt").write_text("one line\nanother line\n")
    task = open_task("classification", data, tokenizer=tokenizer, calibration=tmp_path / "plain.txt")
    assert (len(task.rows.eval), len(task.rows.calibration)) == (24, 2)
    with pytest.raises(DataError, match="plain text has no labels"):
        open_task("classification", tmp_path / "plain.txt", tokenizer=tokenizer)
