"""Perplexity against a textbook loop that feeds one context at a time."""

import math

import numpy as np
import pytest
import torch

from tersor.core.errors import DataError, InputError
from tersor.tasks import open_task, perplexity
from tersor.tasks.text import standard_library_docstrings


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("perplexity") / "text.txt"
    path.write_text("\n\n".join(standard_library_docstrings(12)))
    return path


@pytest.fixture(scope="module")
def ids(text, letters):
    return letters(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]


@pytest.fixture
def opened(text, letters, llama):
    def open_with(data=text, calibration=None, **options):
        return open_task(
            "perplexity", data, tokenizer=letters, config=llama.config, calibration=calibration, options=options
        )

    return open_with


def textbook_nll(model, tokens, first):
    """Predict tokens `first`... of a window one at a time, each from all the tokens before it."""
    total = 0.0
    for place in range(first, len(tokens)):
        logits = model(torch.tensor([tokens[:place]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[tokens[place]].item()
    return total


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 20), (24, 5)])
def test_rows_match_the_textbook(opened, llama, ids, text, context, stride):
    task = opened(calibration=text, context=context, stride=stride, max_tokens=150, batch_size=3)
    scores = task.score(llama)
    starts = range(0, 150 - context + 1, stride)
    assert scores.num_examples == len(starts)
    for start, (nll, num) in zip(starts, scores.examples, strict=True):
        first = 1 if start == 0 or stride == context else context - stride
        with torch.no_grad():
            expected = textbook_nll(llama, ids[start : start + context], first)
        assert nll == pytest.approx(expected, rel=1e-5)
        assert num == context - first
    total = scores.examples.sum(0)
    assert scores.value == pytest.approx(math.exp(total[0] / total[1]))


def test_each_token_is_judged_once_when_windows_overlap(opened, text):
    task = opened(calibration=text, context=16, stride=6, max_tokens=100)
    num = len(task.rows.eval)
    judged = [6 * window + place for window in range(num) for place in range(int(task.windows.first[window]), 16)]
    assert judged == list(range(1, 6 * (num - 1) + 16))


@pytest.mark.parametrize("stride", [16, 12, 5])
def test_calibration_shares_no_token_with_evaluation(opened, stride):
    task = opened(context=16, stride=stride, max_tokens=700)
    tokens = {
        split: [set(range(stride * row, stride * row + 16)) for row in task.rows[split]]
        for split in ("calibration", "eval")
    }
    calibration = set().union(*tokens["calibration"])
    assert len(calibration) == 16 * len(tokens["calibration"]) > 0
    assert not calibration & set().union(*tokens["eval"])


def test_the_protocol_of_the_peers_is_reproduced(opened, text, ids):
    task = opened(calibration=text, context=32, calibration_examples=5)
    starts = np.random.default_rng(0).choice((len(ids) - 32) // 32, 5, replace=False) * 32
    found = np.concatenate([batch.inputs["input_ids"].numpy() for batch in task.batches("calibration")])
    assert found.tolist() == [ids[start : start + 32] for start in starts]
    judged = np.concatenate([batch.inputs["input_ids"].numpy() for batch in task.batches("eval")])
    assert judged.flatten().tolist() == ids[: len(ids) // 32 * 32]


def test_chunks_of_the_vocabulary_and_half_precision_change_little(opened, llama, monkeypatch):
    task = opened(context=32, max_tokens=500)
    whole = task.score(llama).examples
    monkeypatch.setattr(perplexity, "CHUNK", 7 * len(llama.model.embed_tokens.weight))
    np.testing.assert_allclose(task.score(llama).examples, whole, rtol=1e-6)


def test_logits_are_differentiable_and_the_context_is_bounded_by_the_model(opened, llama):
    task = opened()
    assert "context 128, stride 128" in task.description
    batch = next(task.batches("calibration", batch_size=1))
    logits = task.forward(llama, batch)
    assert logits.shape == (1, 128, llama.config.vocab_size)
    assert logits.requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 129}, "this model takes 2 to 128 tokens"),
        ({"context": 32, "stride": 33}, "stride is 33; expected 1 to 32"),
        ({"max_tokens": 20}, "20 tokens, fewer than one window of 128"),
        ({"max_tokens": 200}, "too few to hold one out"),
    ],
)
def test_impossible_windows(opened, options, says):
    with pytest.raises(InputError, match=says):
        opened(**options)


def test_encoders_and_missing_data_are_told(opened, minilm, letters):
    with pytest.raises(InputError, match="no logits"):
        opened(context=32).score(minilm)
    with pytest.raises(DataError, match="needs data: a UTF-8 text file"):
        open_task("perplexity", None, tokenizer=letters)
