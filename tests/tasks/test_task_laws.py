"""The laws of tasks (tersor.testing), on tasks of the table."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.tasks import open_task
from tersor.testing import check_task


@pytest.mark.parametrize("trains", [False, True])
def test_perplexity(trains, llama, letters, tmp_path):
    text, more = tmp_path / "text.txt", tmp_path / "more.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    more.write_text("a b c d e f g h i j. " * 60)
    check_task(
        open_task("perplexity", text, tokenizer=letters, train=more if trains else None, options={"context": 32}), llama
    )


def test_fidelity(llama, letters, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number}: the quick brown fox jumps over the lazy dog." for number in range(20)))
    check_task(open_task("fidelity", text, tokenizer=letters, config=llama.config), llama)


def test_classification(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 8), dtype=np.float32), rng.integers(0, 3, 60)
    np.savez(tmp_path / "data.npz", x=x[:40], y=y[:40], x_train=x[40:], y_train=y[40:])
    torch.manual_seed(0)
    check_task(open_task("classification", tmp_path / "data.npz"), nn.Linear(8, 3))
