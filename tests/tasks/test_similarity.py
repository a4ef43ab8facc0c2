"""Sentence similarity on a real encoder."""

import csv
import json

import numpy as np
import pytest
import torch
from sentence_pairs import PAIRS

from tersor.core.errors import DataError, InputError, ModelError
from tersor.tasks import open_task
from tersor.tasks.sentence import pool, read_pooling


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(PAIRS)
    return path


@pytest.fixture
def opened(data, tokenizer, minilm, minilm_folder):
    def open_with(**options):
        calibration = options.pop("calibration", None)
        return open_task(
            "similarity",
            options.pop("data", data),
            tokenizer=tokenizer,
            config=minilm.config,
            model_folder=minilm_folder,
            calibration=calibration,
            options=options,
        )

    return open_with


def test_cosines_order_the_pairs_as_people_do_and_match_one_by_one(opened, minilm, tokenizer):
    task = opened(batch_size=7)
    scores = task.score(minilm)
    assert scores.value > 0.85
    assert (scores.num_examples, task.output) == (27, "embedding")
    assert "27 rows for evaluation, 3 held out for calibration" in task.description
    for row, (cosine, target) in zip(task.rows.eval, scores.examples, strict=True):
        a, b, score = PAIRS[row]
        hidden = [minilm(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in (a, b)]
        assert cosine == pytest.approx(torch.cosine_similarity(*hidden, dim=0).item(), abs=1e-5)
        assert target == score


def test_splits_are_disjoint_cover_all_rows_and_never_change(opened):
    one, two = opened(), opened()
    seen = {split: [b.rows.tolist() for b in one.batches(split, 5)] for split in ("calibration", "eval")}
    assert seen == {split: [b.rows.tolist() for b in two.batches(split, 5)] for split in ("calibration", "eval")}
    numbers = [row for batches in seen.values() for batch in batches for row in batch]
    assert sorted(numbers) == list(range(60))


def test_a_plain_text_calibrates_and_leaves_all_rows_for_evaluation(opened, tmp_path, minilm):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"passage number {i} about gardens" for i in range(200)))
    task = opened(calibration=text)
    assert task.score(minilm).num_examples == 30
    assert sum(len(batch.rows) for batch in task.batches("calibration")) == 128
    with pytest.raises(InputError, match="no scores"):
        task.score(minilm, "calibration")


def test_embeddings_are_unit_differentiable_and_follow_the_training_mode(opened, minilm):
    task = opened()
    minilm.encoder.layer[0].train()
    try:
        task.score(minilm)
        assert minilm.encoder.layer[0].training
        assert not minilm.encoder.layer[1].training
    finally:
        minilm.eval()
    embeddings = task.forward(minilm, next(task.batches("calibration")))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(embeddings)))
    (gradient,) = torch.autograd.grad(embeddings[0, 0], minilm.embeddings.word_embeddings.weight)
    assert gradient.abs().max() > 0


def test_truncation_is_reported(opened):
    task = opened(max_length=6)
    assert "at most 6 tokens, 59 of 60 texts cut" in task.description
    assert next(task.batches("eval")).inputs["input_ids"].shape[1] == 6
    assert "cut" not in opened().description
    assert "at most 512 tokens" in opened(max_length=100_000).description


def test_an_example_cap_is_a_seeded_subset(opened, minilm):
    task = opened(max_examples=10)
    assert task.score(minilm).num_examples == 10
    assert "10 of 27 rows for evaluation" in task.description
    assert set(task.rows.eval) <= set(opened().rows.eval)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({}, "mean"),
    ],
)
def test_pooling_follows_the_model_folder(tmp_path, config, pooling):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert read_pooling(tmp_path / "1_Pooling") == (pooling,)


def test_pooling_ignores_padding_on_either_side():
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    pooled = {how: pool(hidden, mask, how).flatten().tolist() for how in ("mean", "cls", "lasttoken")}
    assert pooled == {"mean": [0.5, 6.5], "cls": [0.0, 6.0], "lasttoken": [1.0, 7.0]}


def test_unsupported_or_broken_pooling(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_median_tokens": true}')
    with pytest.raises(InputError, match="pooling median is not supported; known: cls, max, mean"):
        read_pooling(tmp_path / "1_Pooling")
    (tmp_path / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        read_pooling(tmp_path / "1_Pooling")


def test_text_without_a_tokenizer_and_a_model_without_hidden_states(data, opened, tmp_path):
    with pytest.raises(DataError, match="no tokenizer"):
        open_task("similarity", data)
    with pytest.raises(InputError, match="AutoModel"):
        opened().score(Constant())
    (tmp_path / "one.csv").write_text("a,b,1\n")
    with pytest.raises(DataError, match="at least 2, or a separate calibration file"):
        opened(data=tmp_path / "one.csv")


class Constant(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        return torch.ones(len(input_ids), 3)


def test_rows_are_float64(opened, minilm):
    assert opened().score(minilm).examples.dtype == np.float64
