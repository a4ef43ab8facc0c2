"""The train split: apart from the others, in an order drawn from the seed alone, with the task's own loss."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.errors import DataError, InputError
from tersor.tasks import TrainableTask, open_task
from tersor.tasks.augment import AUGMENTATIONS, augmented
from tersor.tasks.inputs import Batch

NAMES = ("one.csv", "two.csv")


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def arrays(tmp_path):
    x = np.arange(50 * 3 * 8 * 8, dtype=np.float32).reshape(50, 3, 8, 8)
    np.savez(tmp_path / "a.npz", x_test=x[:10], y_test=np.arange(10) % 2, x_train=x[10:], y_train=np.arange(40) % 2)
    return tmp_path / "a.npz"


@pytest.fixture
def texts(tmp_path):
    rows = [[f"sentence number {n}" + " more" * (n % 7), n % 2] for n in range(120)]
    header = [["text", "label"]]
    return [write(tmp_path / name, header + part) for name, part in zip(NAMES, (rows[:20], rows[20:]), strict=True)]


def rows_of(batches):
    return np.concatenate([batch.rows for batch in batches])


def check_splits(task):
    """No row is in two splits; an epoch is the whole train split; the seed alone decides its order."""
    assert isinstance(task, TrainableTask)
    splits = [set(task.rows[split].tolist()) for split in ("calibration", "eval", "train")]
    assert not splits[0] & splits[1]
    assert not splits[2] & (splits[0] | splits[1])
    one, again, other = (rows_of(task.epoch(seed, 4)) for seed in (0, 0, 1))
    assert task.num_train == len(splits[2]) > 0
    assert sorted(one) == sorted(other) == sorted(set(one))
    assert one.tolist() == again.tolist() != other.tolist()
    return one


def test_arrays_bring_their_own_train_split(arrays):
    task = open_task("classification", arrays)
    assert sorted(check_splits(task)) == task.rows.train.tolist()
    assert (len(task.rows.eval), len(task.rows.calibration), task.num_train) == (10, 20, 20)
    assert "20 of x_train for training" in task.description
    batch = next(task.epoch(0, 8))
    torch.testing.assert_close(batch.inputs["x"], task.inputs.batch(batch.rows).inputs["x"])


def test_the_loss_is_the_cross_entropy_of_the_labels(arrays):
    task = open_task("classification", arrays)
    batch = next(task.epoch(0, 8))
    logits = torch.randn(8, 2)
    expected = -logits.log_softmax(-1)[torch.arange(8), torch.from_numpy(task.labels[batch.rows])].mean()
    torch.testing.assert_close(task.loss(logits, batch), expected)
    with pytest.raises(InputError, match="2 classes"):
        task.loss(torch.randn(8, 1), batch)


def test_texts_train_on_a_file_of_their_own(texts, tokenizer):
    task = open_task("classification", texts[0], train=texts[1], tokenizer=tokenizer)
    assert sorted(check_splits(task)) == task.rows.train.tolist()
    assert (len(task.rows.eval), len(task.rows.calibration), task.num_train) == (20, 50, 50)


def test_pairs_stay_together_and_the_loss_compares_cosines(tmp_path, tokenizer):
    rows = [[f"left {n}", f"right {n}", n % 6] for n in range(30)]
    paths = [write(tmp_path / name, part) for name, part in zip(NAMES, (rows[:10], rows[10:]), strict=True)]
    task = open_task("similarity", paths[0], train=paths[1], tokenizer=tokenizer)
    check_splits_of_pairs = rows_of(task.epoch(0, 4))
    assert sorted(check_splits_of_pairs // 2) == sorted(np.repeat(task.rows.train, 2))
    batch = next(task.epoch(3, 4))
    assert (batch.rows[1::2] == batch.rows[::2] + 1).all()
    embeddings = nn.functional.normalize(torch.randn(8, 16), dim=-1)
    cosine = (embeddings[::2] * embeddings[1::2]).sum(-1)
    target = torch.tensor([rows[row // 2][2] / 5 for row in batch.rows[::2]])
    torch.testing.assert_close(task.loss(embeddings, batch), ((cosine - target) ** 2).mean())


def test_a_language_model_trains_on_the_windows_of_its_own_text(tmp_path, letters, llama):
    rng = np.random.default_rng(0)
    for name in ("eval.txt", "train.txt"):
        (tmp_path / name).write_text("".join(rng.choice(list("abcdefgh "), 2000)))
    task = open_task(
        "perplexity", tmp_path / "eval.txt", train=tmp_path / "train.txt", tokenizer=letters, options={"context": 32}
    )
    check_splits(task)
    batch = next(task.epoch(0, 4))
    logits = task.forward(llama, batch)
    logprob = logits.log_softmax(-1)[:, :-1].gather(-1, batch.inputs["input_ids"][:, 1:, None])
    torch.testing.assert_close(task.loss(logits, batch), -logprob.mean())


def test_unlabelled_data_can_be_trained_on_but_has_no_loss(arrays, texts, tokenizer):
    for task in (open_task("fidelity", arrays), open_task("fidelity", texts[0], train=texts[1], tokenizer=tokenizer)):
        check_splits(task)
        with pytest.raises(DataError, match="distil from a teacher"):
            task.loss(torch.zeros(1, 2), next(task.epoch(0)))


def test_plain_text_trains_a_classifier_without_labels(texts, tmp_path, tokenizer):
    (tmp_path / "plain.txt").write_text("one\ntwo\nthree\n")
    options = {"calibration_examples": 1}
    task = open_task("classification", texts[0], train=tmp_path / "plain.txt", tokenizer=tokenizer, options=options)
    assert task.num_train == 2
    assert (task.labels[task.rows.train] == -1).all()
    assert (task.labels[task.rows.eval] >= 0).all()
    with pytest.raises(DataError, match="distil from a teacher alone"):
        task.loss(torch.zeros(2, 2), next(task.epoch(0)))


def test_what_cannot_be_trained_on_is_refused(arrays, texts, tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"gone\.csv: no such file or folder to train on"):
        open_task("classification", texts[0], train=tmp_path / "gone.csv", tokenizer=tokenizer)
    np.savez(tmp_path / "wide.npz", x=np.zeros((5, 3, 9, 9), np.float32), y=np.zeros(5, int))
    with pytest.raises(DataError, match="differ"):
        open_task("classification", arrays, train=tmp_path / "wide.npz")
    with pytest.raises(InputError, match="augment is 'spin'"):
        open_task("classification", arrays, options={"augment": "spin"})
    with pytest.raises(InputError, match="augment is for images"):
        open_task("classification", texts[0], tokenizer=tokenizer, options={"augment": "flip"})


def test_images_are_flipped_and_shifted_in_training_alone(arrays):
    plain = open_task("classification", arrays)
    task = open_task("classification", arrays, options={"augment": ("flip", "shift")})
    one, again = next(task.epoch(5, 8)), next(task.epoch(5, 8))
    torch.testing.assert_close(one.inputs["x"], again.inputs["x"])
    assert not torch.equal(one.inputs["x"], next(plain.epoch(5, 8)).inputs["x"])
    torch.testing.assert_close(
        next(task.batches("eval")).inputs["x"], next(plain.batches("eval")).inputs["x"], rtol=0, atol=0
    )


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmented_image_is_one_that_the_rule_allows(name):
    x = torch.rand(64, 3, 16, 16) + 1
    changed = augmented(Batch(np.arange(64), {"x": x}), (name,), (0, 0)).inputs["x"]
    allowed = [x, x.flip(-1)]
    if name == "shift":
        padded = nn.functional.pad(x, (2, 2, 2, 2))
        allowed = [padded[..., i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    matches = torch.stack([(changed == other).flatten(1).all(1) for other in allowed])
    assert matches.any(0).all()
    assert (matches.sum(1) > 0).sum() > len(allowed) / 2
