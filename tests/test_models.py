"""The main job on whole models: a real transformer (MiniLM) and an LSTM trained here."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor
from cli_runner import tersor as run_tersor
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.notice import has_notice, without
from tersor.checkpoint.open import open_model
from tersor.kernels import kernel_of, reference
from tersor.kernels.dot import DOT
from tersor.kernels.int8 import FLOAT, INT_MM, ONEDNN
from tersor.nn.packed import PackedLinear
from tersor.tasks.scores import METRICS, Scores
from tersor.tasks.text import standard_library_docstrings

NEW_PROCESS = """
import sys, tersor, torch
from contextlib import nullcontext
from tersor.kernels import reference
torch.set_num_threads(int(sys.argv[4]))
model = tersor.load(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
with reference() if sys.argv[5] == "reference" else nullcontext(), torch.inference_mode():
    torch.save(model(**inputs).last_hidden_state, sys.argv[3])
"""


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(["--ratio", "4x"], marks=pytest.mark.slow), ["--ratio", "7x"], ["--format", "int8-dynamic"]],
)
def test_minilm_shrinks_and_a_new_process_agrees_bit_for_bit(minilm, arguments, tmp_path, capsys):
    small = tmp_path / "small"
    options = ["--task-option", "max_examples=96", "--task-option", "max_length=48", "--batch", "1"]
    made = run_tersor(capsys, "compress", minilm, *arguments, *options, "--drop", "3%", "-o", small, "--json")
    assert made.status == 0, made.stdout
    card = made.json["scorecards"][1]
    if arguments[0] == "--ratio":
        assert 0.99 * made.json["limit"]["bytes"] < card["file_bytes"] <= made.json["limit"]["bytes"]
    assert card["score"] > 0.97
    assert made.json["verdict"]["outcome"] == "within"
    assert (small / "tokenizer.json").read_bytes() == (Path(minilm) / "tokenizer.json").read_bytes()  # as it came
    came, written = (json.loads((Path(folder) / "config.json").read_text()) for folder in (minilm, small))
    assert without(written) == came
    assert has_notice(written)
    model = tersor.load(small)
    assert type(model).__name__ == "BertModel"
    inputs = {
        "input_ids": torch.tensor([[101, 2023, 2003, 1037, 3231, 102]]),
        "attention_mask": torch.ones(1, 6).long(),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    # As many threads as here: they share out a float product's sum, and its last bits depend on how.
    # Products of integers have the same bits whichever kernel is measured to be the fastest; float products have not.
    mode = "kernels" if arguments[1] == "int8-dynamic" else "reference"
    files, num_threads = [small, tmp_path / "inputs.pt", tmp_path / "outputs.pt"], torch.get_num_threads()
    command = [sys.executable, "-c", NEW_PROCESS, *files, num_threads, mode]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    with reference() if mode == "reference" else nullcontext(), torch.inference_mode():
        here = model(**inputs).last_hidden_state
    assert torch.equal(here, torch.load(tmp_path / "outputs.pt", weights_only=True))
    if mode == "reference":
        with torch.inference_mode():
            torch.testing.assert_close(model(**inputs).last_hidden_state, here, rtol=1e-3, atol=1e-4)
    manifest = json.loads((small / "tersor.json").read_text())
    assert manifest["recipe"] == made.json["recipe"]
    assert {"torch", "transformers", "processor"} <= manifest["machine"].keys()


def test_int8_dynamic_runs_int8_products(minilm):
    """Every linear site goes through the int8 kernel, and gives what the reference gives, up to float rounding."""
    model = open_model(str(minilm)).model
    packed = tersor.compress(model, tersor.Recipe.of("int8-dynamic")).model
    inputs = {"input_ids": torch.randint(1000, 9000, (2, 12)), "attention_mask": torch.ones(2, 12).long()}
    kernels = []

    def same_as_reference(module: PackedLinear, args: tuple[Tensor], output: Tensor) -> None:
        with reference():
            expected = PackedLinear.forward(module, *args)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        kernels.append(kernel_of(module, args[0].shape[:-1].numel()))

    for module in packed.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(same_as_reference)
    with torch.inference_mode():
        packed(**inputs)
    assert len(kernels) == 37  # six layers of six, and the pooler
    assert set(kernels) <= {kernel.name for kernel in (*DOT, INT_MM, FLOAT, ONEDNN)}


class CharacterModel(nn.Module):
    """Characters in, next characters out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.lstm = nn.LSTM(32, 96, num_layers=2, batch_first=True)
        self.head = nn.Linear(96, 128)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(codes))[0])


class NextCharacter:
    """A user's own task, written against the contract alone."""

    name = "next character"
    output = "logits"
    description = "docstrings, windows of 64 characters"
    fingerprint = "docstrings"

    def __init__(self) -> None:
        text = " ".join(standard_library_docstrings())[:120_000].encode("ascii", "replace")
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127).unfold(0, 65, 64)

    def prepare(self, original: nn.Module) -> None:
        pass

    def batches(self, split: str, batch_size: int | None = None) -> Iterator[Tensor]:
        part = self.windows[:128] if split == "calibration" else self.windows[-600:]
        return iter(part.split(batch_size or 100))

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch[:, :-1])

    def score(self, model: nn.Module, split: str = "eval") -> Scores:
        rows = []
        with torch.inference_mode():
            for batch in self.batches(split):
                nll = nn.functional.cross_entropy(self.forward(model, batch).mT, batch[:, 1:], reduction="none")
                rows += [[total, 64] for total in nll.sum(1).tolist()]
        return Scores(METRICS["perplexity"], np.array(rows))


def test_an_lstm_under_a_budget_with_the_users_own_task(tmp_path):
    torch.manual_seed(0)
    task, model = NextCharacter(), CharacterModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        batch = task.windows[:-600][torch.randint(0, len(task.windows) - 600, (32,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(task.forward(model, batch).mT, batch[:, 1:]).backward()
        optimizer.step()
    before = task.score(model)
    assert before.value < 13  # it learned something: guessing costs 128

    uniform = tersor.compress(model, tersor.Recipe.of("int3"), task).model
    recipe = tersor.plan(model, task, size=f"{size_of(uniform)}B")
    compressed = tersor.compress(model, recipe, task)
    assert {site.kind for site in compressed.sites} == {"embedding", "rnn", "linear"}
    after = task.score(compressed.model)
    verdict = tersor.judge(before, after, tersor.Tolerance.parse("10%"))
    assert verdict.outcome == "within", verdict.sentence()
    # Bits where they count beat the same bytes spread evenly.
    gain = tersor.judge(task.score(uniform), after, tersor.Tolerance(0.0, relative=False))
    assert gain.outcome == "within", gain.sentence()

    tersor.save(compressed.model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= size_of(uniform)
    loaded = tersor.load(tmp_path, model=CharacterModel())
    assert np.array_equal(task.score(loaded).examples, after.examples)
