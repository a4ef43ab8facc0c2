"""Laws of fidelity: a model agrees with itself exactly, and less with a damaged copy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from tersor.core.errors import DataError, InputError
from tersor.tasks import fidelity, open_task, unlabelled
from tersor.tasks.fidelity import kl_divergence, neighbour_overlap


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.txt"
    path.write_text("\n\n".join(f"Passage {i} speaks of {'many ' * (i % 5)}things, and of {i * i}." for i in range(60)))
    return path


def damaged(model, amount):
    copied = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(amount * parameter.std(correction=0) * torch.randn_like(parameter))
    return copied


def small_bert(kind, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return kind(BertConfig(vocab_size=len(tokenizer), architectures=[kind.__name__], initializer_range=0.3, **sizes))


def check_laws(task, model, extra, perfect):
    """Exactly perfect for the model itself; worse and worse for copies damaged more and more."""
    with pytest.raises(InputError, match="prepare"):
        task.score(model)
    task.prepare(model)
    itself, near, far = (task.score(other) for other in (model, damaged(model, 0.02), damaged(model, 1.0)))
    assert (itself.value, itself.extras) == (1.0, {extra: perfect})
    assert (itself.examples == 1.0).all()
    assert itself.value >= near.value > far.value
    assert abs(perfect - near.extras[extra]) < abs(perfect - far.extras[extra])
    assert task.prepare(model) is None
    return itself


def test_language_model_windows(passages, letters, llama):
    task = open_task(None, passages, tokenizer=letters, config=llama.config, options={"context": 16})
    assert (task.name, task.output) == ("fidelity", "logits")
    itself = check_laws(task, llama, "kl", 0.0)
    assert itself.metric.name == "agreement"
    with pytest.raises(InputError, match="eval split only"):
        task.score(llama, "calibration")


def test_float16_copies_still_agree_with_themselves(passages, letters, llama, monkeypatch):
    monkeypatch.setattr(fidelity, "FLOAT32_BYTES", 0)
    monkeypatch.setattr(fidelity, "CHUNK", 1000)
    task = open_task(None, passages, tokenizer=letters, config=llama.config, options={"context": 16})
    check_laws(task, llama, "kl", 0.0)
    assert task.reference.outputs[0].dtype == torch.float16


def test_embeddings(passages, tokenizer, minilm, minilm_folder):
    task = open_task("fidelity", passages, tokenizer=tokenizer, config=minilm.config, model_folder=minilm_folder)
    assert task.output == "embedding"
    check_laws(task, minilm, "neighbour_overlap", 1.0)


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForMaskedLM])
def test_text_and_token_logits(passages, tokenizer, kind):
    model = small_bert(kind, tokenizer)
    task = open_task("fidelity", passages, tokenizer=tokenizer, config=model.config)
    check_laws(task, model, "kl", 0.0)


def test_arrays_on_a_plain_module(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(300, 6)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 5))
    task = open_task(None, tmp_path / "data.npz")
    itself = check_laws(task, model, "kl", 0.0)
    assert (itself.num_examples, model.training) == (270, True)
    other = model[-1]
    expected = [
        (model.eval()(batch.inputs["x"]), damaged(model, 1.0)(batch.inputs["x"])) for batch in task.batches("eval")
    ]
    assert isinstance(other, nn.Linear)
    a, b = (torch.cat(side).double().log_softmax(-1) for side in zip(*expected, strict=True))
    scores = task.score(damaged(model, 1.0))
    assert scores.value == pytest.approx((a.argmax(-1) == b.argmax(-1)).double().mean().item())
    assert scores.extras["kl"] == pytest.approx((a.exp() * (a - b)).sum(-1).mean().item(), rel=1e-4)
    task.prepare(nn.Linear(6, 1))
    assert task.output == "values"


def test_memory_for_token_logits_is_bounded(passages, letters, llama, monkeypatch):
    monkeypatch.setattr(unlabelled, "MAX_POSITIONS", 100)
    task = open_task(None, passages, tokenizer=letters, config=llama.config, options={"context": 16})
    assert len(task.rows.eval) == 6
    assert "of which 6 are evaluated" in task.description
    monkeypatch.setattr(unlabelled, "MAX_LOGIT_BYTES", 1)
    task = open_task(None, passages, tokenizer=letters, config=llama.config, options={"context": 16})
    assert len(task.rows.eval) == 1


def test_without_data_the_standard_library_is_read(letters, llama):
    task = open_task(None, None, tokenizer=letters, config=llama.config, options={"max_examples": 8})
    assert "docstrings of the Python standard library (no data was given)" in task.description
    assert len(task.fingerprint) == 64
    task.prepare(llama)
    assert task.score(llama).value == 1.0


def test_splits_are_disjoint_and_a_separate_file_calibrates(passages, tokenizer, minilm):
    task = open_task(None, passages, tokenizer=tokenizer)
    seen = [row for split in ("eval", "calibration") for batch in task.batches(split, 7) for row in batch.rows]
    assert sorted(seen) == list(range(60))
    task = open_task(None, passages, tokenizer=tokenizer, calibration=passages)
    assert (len(task.rows.eval), len(task.rows.calibration)) == (60, 60)
    assert not set(task.rows.eval) & set(task.rows.calibration)


def test_kl_and_neighbours_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]])
    assert kl_divergence(p.log(), q.log()) == pytest.approx(0.25 * np.log(2) + np.log(2))
    line = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
    assert neighbour_overlap(line, line, k=1) == 1.0
    assert neighbour_overlap(line, line[[1, 0, 3, 2]], k=1) < 1.0
    assert neighbour_overlap(line, -line) == 1.0  # all three others, whatever the order
    assert neighbour_overlap(line[:1], line[:1]) == 1.0


def test_what_cannot_be_fed(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no tokenizer for the fallback text"):
        open_task(None, None)
    with pytest.raises(DataError, match="no such file"):
        open_task(None, tmp_path / "absent.txt", tokenizer=tokenizer)
    encoder_decoder = BertConfig(is_encoder_decoder=True)
    with pytest.raises(InputError, match="BertConfig is an encoder-decoder model"):
        open_task(None, None, tokenizer=tokenizer, config=encoder_decoder)
