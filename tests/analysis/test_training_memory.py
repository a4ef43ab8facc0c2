"""Predicted training memory: the arithmetic by hand, the ledger on a known program, and the peak of real runs."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tersor import compress
from tersor.analysis.training_memory import Ledger, block_activations, shadow_of, training_memory
from tersor.core.errors import DataError, InputError
from tersor.recipe import Recipe
from tersor.tasks import open_task
from tersor.training import FinetuneStep, LoraStep

TESTS = Path(__file__).parent.parent
HIDDEN, WIDE, LAYERS, VOCAB = 128, 352, 3, 1024
BLOCK = 4 * HIDDEN**2 + 3 * HIDDEN * WIDE  # linear weights of one block
REST = VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN  # tied embedding and head, norms


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Every test here runs on one thread."""


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def words(context=128, num=16):
    """Random tokens, as a task."""
    from tersor.tasks.perplexity import Perplexity
    from tersor.tasks.split import Rows
    from tersor.tasks.windows import Windows

    ids = np.random.default_rng(0).integers(VOCAB, size=(num, context))
    rows = Rows(np.arange(2), np.arange(2, 4), "random", np.arange(4, num))
    return Perplexity(Windows(ids, np.ones(num, dtype=np.int64)), rows, "random", "0")


STEPS = {
    "full": FinetuneStep(batch_size=4, num_steps=3, num_evaluations=0),
    "full, checkpointed": FinetuneStep(batch_size=4, num_steps=3, num_evaluations=0, gradient_checkpointing=True),
    "lora": LoraStep(batch_size=4, num_steps=3, num_evaluations=0, rank=8),
    "qlora": LoraStep(batch_size=4, num_steps=3, num_evaluations=0, rank=8, base="nf4"),
}


# Arithmetic.


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter():
    found = training_memory(llama(), words(), STEPS["full"])
    buffers = sum(buffer.nbytes for buffer in llama().buffers())
    assert found.num_parameters == found.num_trained == LAYERS * BLOCK + REST
    assert found.weights - buffers + found.gradients + found.optimizer == 16 * found.num_parameters
    assert found.sum == found.weights + found.gradients + found.optimizer + found.activations


def test_of_lora_only_the_factors_and_of_qlora_half_a_byte_is_left():
    rank = 8
    factors = LAYERS * rank * (4 * 2 * HIDDEN + 3 * (HIDDEN + WIDE))
    float_base, packed_base = (training_memory(llama(), words(), STEPS[name]) for name in ("lora", "qlora"))
    for found in (float_base, packed_base):
        assert found.num_trained == factors
        assert (found.gradients, found.optimizer) == (4 * factors, 8 * factors)
    groups = LAYERS * (4 * HIDDEN * 2 + 2 * WIDE * 2 + HIDDEN * 6)  # of 64 columns, the last ones not full
    saved = float_base.weights - packed_base.weights
    assert saved == LAYERS * BLOCK * 4 - (LAYERS * BLOCK // 2 + 4 * groups)


def test_a_model_that_is_packed_already_is_counted_as_it_is():
    packed = compress(llama(), Recipe.of("nf4", exclude=["*.embed_tokens"])).model
    one = training_memory(packed, words(), STEPS["lora"])
    other = training_memory(llama(), words(), STEPS["qlora"])
    assert one.to_dict() == other.to_dict()


def test_optimizers_and_dtypes():
    plain, small, momentum, none, half = (
        training_memory(llama(), words(), FinetuneStep(batch_size=1, **fields), dtype=dtype)
        for fields, dtype in [
            ({}, None),
            ({"optimizer": "adamw-8bit"}, None),
            ({"optimizer": "sgd"}, None),
            ({"optimizer": "sgd", "momentum": 0}, None),
            ({}, torch.bfloat16),
        ]
    )
    assert plain.optimizer == 2 * momentum.optimizer == 8 * plain.num_trained
    assert small.optimizer == pytest.approx(2.03125 * plain.num_trained)
    assert none.optimizer == 0
    assert half.gradients * 2 == plain.gradients
    assert half.optimizer * 2 == plain.optimizer
    assert half.activations < 0.8 * plain.activations


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    one, four = (training_memory(llama(), words(), FinetuneStep(batch_size=n)) for n in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations, rel=0.02)
    checkpointed = training_memory(llama(), words(), STEPS["full, checkpointed"])
    assert checkpointed.activations < 0.7 * four.activations
    assert checkpointed.peak < four.peak
    assert (four.batch_size, four.length) == (4, 128)


def test_the_formula_for_a_block():
    class Model(nn.Module):
        config = LlamaConfig(hidden_size=12288, num_attention_heads=96, num_hidden_layers=1)

    # One layer of GPT-3 at length 2048 and batch 1 takes 34 + 80 bytes per token and width.
    assert block_activations(Model(), 1, 2048) == 2048 * 12288 * (34 + 80)
    assert block_activations(nn.Linear(1, 1), 1, 2048) is None


# The ledger.


def test_the_ledger_counts_what_a_graph_keeps():
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(50, 100)
    with Ledger([weight, x]) as ledger:
        hidden = (x @ weight).tanh()  # tanh keeps its result; the product before it is let go
        assert ledger.alive == 4 * 50 * 100
        loss = hidden.square().sum()
        assert ledger.alive == 4 * 50 * 100 * 2 - 4 * 50 * 100 + 4
        loss.backward()
    assert weight.grad is not None
    assert ledger.alive == 4 * (50 * 100 + 1 + 100 * 100)
    assert ledger.peak >= 4 * (2 * 50 * 100 + 100 * 100)


def test_the_ledger_on_tensors_without_data_says_what_it_says_with_data():
    task, step = words(context=32), FinetuneStep(batch_size=2)
    from tersor.analysis.training_memory import walk_step

    model = llama()
    batch = next(task.epoch(0, 2))
    real = walk_step(model, task, step, batch)
    predicted = training_memory(model, task, step)
    assert predicted.activations == pytest.approx(real[0], rel=0.05)


def test_nothing_is_run_and_nothing_changes():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training_memory(model, words(), STEPS["qlora"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(tensor.is_meta for tensor in shadow_of(model).parameters())


# Other models.


def test_a_classifier_with_padded_texts_and_a_conv_net(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((40, 1, 8, 8), np.float32), y=np.arange(40) % 2,
             x_train=np.zeros((40, 1, 8, 8), np.float32), y_train=np.arange(40) % 2)  # fmt: skip
    task = open_task("classification", tmp_path / "d.npz")
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    found = training_memory(net, task, FinetuneStep(batch_size=10))
    assert found.length is None
    assert found.activations >= 4 * 10 * 8 * 36 * 2  # what the norm and the ReLU keep
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    bert = BertForSequenceClassification(config)

    class Texts:
        name = "texts"
        output = "logits"
        description = fingerprint = ""
        num_train = 4
        prepare = batches = score = print  # never called

        def epoch(self, seed, batch_size=None):
            from tersor.tasks.inputs import Batch

            mask = torch.ones(4, 16, dtype=torch.long)
            mask[1:, 10:] = 0
            yield Batch(np.arange(4), {"input_ids": torch.ones(4, 16, dtype=torch.long), "attention_mask": mask})

        def forward(self, model, batch):
            return model(**batch.to(torch.device("cpu"))).logits

        def loss(self, output, batch):
            return output.square().mean()

    assert training_memory(bert, Texts(), FinetuneStep(batch_size=4)).activations > 4 * 4 * 16 * 32 * 10


def test_what_cannot_be_predicted_is_said(tmp_path):
    with pytest.raises(DataError, match="no task has no train split"):
        training_memory(llama(), None, STEPS["full"])

    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x) if x.sum().item() > 0 else self.linear(-x)

    np.savez(tmp_path / "d.npz", x=np.ones((40, 4), np.float32), y=np.arange(40) % 2,
             x_train=np.ones((40, 4), np.float32), y_train=np.arange(40) % 2)  # fmt: skip
    task = open_task("classification", tmp_path / "d.npz")
    with pytest.raises(InputError, match="cannot be run without data"):
        training_memory(Fickle(), task, FinetuneStep())


# Reality.

MEASURE = """
    import json, sys
    sys.path[:0] = {paths}
    import warnings
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    from analysis.test_training_memory import STEPS, llama, words
    from tersor.measure.memory import RESET, resident, return_free_memory
    from tersor.training.job import Job
    from tersor.training.lora import LoraStep, train_adapter

    def run(step, task):
        model = llama()
        if isinstance(step, LoraStep):
            train_adapter(Job(model, model, task), step)
        else:
            step.run(Job(model, model, task))

    for name, step in STEPS.items():
        run(step, words(context=16))  # what is imported and set up on first use
        return_free_memory()
        before = resident("VmRSS")
        RESET.write_text("5")
        run(step, words())
        print(json.dumps([name, resident("VmHWM") - before]))
"""


@pytest.fixture(scope="module")
def measured():
    """The peaks of real runs in a process of their own, which gives freed memory back at once."""
    code = textwrap.dedent(MEASURE.format(paths=[str(TESTS)]))
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.parametrize("name", STEPS)
def test_the_prediction_is_within_fifteen_percent_of_the_measured_peak(name, measured):
    predicted = training_memory(llama(), words(), STEPS[name])
    assert predicted.peak + predicted.copies == pytest.approx(measured[name], rel=0.15)
