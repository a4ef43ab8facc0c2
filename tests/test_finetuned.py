"""`tersor finetune`, `tersor merge` and `tersor inspect --training-memory` through the command line's entry point."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tersor
from cli_runner import tersor as run
from export.exported import byte_level
from tersor.core.errors import InputError
from tersor.core.lock import held
from tersor.training import journal
from tersor.training.journal import Journal, journal_for

TEXT = ["task", "perplexity", "data", "eval.txt", "train", "train.txt", "task-option", "context=32"]


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Every test here runs on one thread."""


def sentences(seed, num=220):
    """A language of few words."""
    rng = np.random.default_rng(seed)
    nouns, verbs = ["cat", "dog", "bird"], ["sees", "likes"]
    return " ".join(f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(num))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small bfloat16 Llama, a text to train on and one to evaluate on."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=352, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "llama")
    byte_level(pre_tokenizers.Digits(individual_digits=True)).save_pretrained(folder / "llama")
    (folder / "eval.txt").write_text(sentences(0))
    (folder / "train.txt").write_text(sentences(1))
    return folder


@pytest.fixture
def inside(home, tmp_path, monkeypatch):
    """A fresh folder to work in, which sees what is in `home`."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_flags(**more):
    pairs = [*zip(TEXT[::2], TEXT[1::2], strict=True), *more.items()]
    return [part for name, value in pairs for part in (f"--{name.replace('_', '-')}", value)]


TRAINING = {"steps": 30, "batch_size": 8, "learning_rate": 0.01, "evaluations": 0}


def test_full_fine_tuning_gives_a_folder_that_transformers_loads(inside, capsys):
    result = run(capsys, "finetune", "llama", *text_flags(**TRAINING), "-o", "tuned", "--json")
    assert result.status == 0, result.stdout
    made = result.json
    assert made["after"] < 0.8 * made["before"]
    assert made["verdict"]["outcome"] == "within"
    model, info = AutoModelForCausalLM.from_pretrained("tuned", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype is torch.bfloat16
    assert (inside / "tuned" / "tokenizer.json").exists()
    assert json.loads((inside / "tuned" / "training.json").read_text())["after"] == made["after"]
    assert sorted(load_file("tuned/model.safetensors")) == sorted(load_file("llama/model.safetensors"))
    again = run(capsys, "evaluate", "tuned", *text_flags()[:4], "--task-option", "context=32", "--json").json
    assert again["scorecard"]["score"] == pytest.approx(made["after"], rel=0.02)  # other windows are held out
    assert not list(inside.glob(".*"))  # no journal is left


def test_qlora_then_merge_into_the_packed_and_the_float_base(inside, capsys):
    flags = text_flags(**TRAINING, base="nf4", save_base="base", dtype="float32")
    result = run(capsys, "finetune", "llama", *flags, "--lora", "r=4", "--lora", "alpha=8,dora=true", "-o", "adapter")
    assert result.status == 0, result.stderr
    assert "perplexity:" in result.stdout
    assert "verdict: within" in result.stdout
    assert "tersor merge base adapter -o OUT" in result.stdout
    config = json.loads((inside / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["peft_type"]) == (4, 8, True, "LORA")
    report = json.loads((inside / "adapter" / "training.json").read_text())
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32), "adapter")
    packed = tersor.load("base")
    assert packed.dtype is torch.bfloat16
    adapted = PeftModel.from_pretrained(tersor.load("base", packed=False).float(), "adapter")
    task = tersor.open_task("perplexity", "eval.txt", train="train.txt", tokenizer=tokenizer(), options={"context": 32})
    assert task.score(adapted).value == pytest.approx(report["after"], rel=1e-4)
    assert task.score(plain).value < 0.8 * report["before"]
    kl = {}
    for base in ("llama", "base"):
        result = run(capsys, "merge", base, "adapter", *text_flags(), "-o", f"merged-{base}", "--json")
        assert result.status == 0, result.stdout
        kl[base] = result.json["kl"]
    assert result.json["num_packed"] == 14
    assert kl["llama"]["merged"] < 0.01 * kl["llama"]["base"]
    assert kl["base"]["merged"] < kl["base"]["naive"] < kl["base"]["base"]
    merged = tersor.load("merged-base")
    assert task.score(merged.float()).value < 0.9 * task.score(packed.float()).value
    assert (inside / "merged-base" / "model.safetensors").stat().st_size == (
        inside / "base" / "model.safetensors"
    ).stat().st_size
    assert AutoModelForCausalLM.from_pretrained("merged-llama").dtype is torch.bfloat16
    shown = run(capsys, "merge", "base", "adapter", *text_flags(), "-o", "merged-base", "--overwrite")
    assert "merged by rounding to the nearest" in shown.stdout


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained("llama")


def test_adapters_on_an_artifact(inside, capsys):
    arguments = ["--format", "int4-g64", "--exclude", "*.embed_tokens", *text_flags()[:4], "--batch", "1"]
    assert run(capsys, "compress", "llama", *arguments, "-o", "small").status == 0
    result = run(capsys, "finetune", "small", *text_flags(**TRAINING), "--lora", "r=4", "-o", "adapter", "--json")
    assert result.status == 0, result.stdout
    assert result.json["after"] < result.json["before"]
    refused = run(capsys, "finetune", "small", *text_flags(**TRAINING), "-o", "other")
    assert refused.status == 2
    assert "add --lora r=16" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nf4"], "add --lora"),
        (["--lora", "r=0"], "rank"),
        (["--lora", "q=4"], "q"),
        (["--lora", "r"], "not KEY=VALUE"),
        (["--lora", "r=4", "--base", "nf5"], "nf4"),
        (["--lora", "r=4,init=pissa", "--base", "nf4"], "use init=eora"),
        (["--lora", "r=4", "--save-base", "b"], "add --lora r=16 and --base nf4"),
        (["--learning-rate", "0"], "learning_rate"),
        (["--dtype", "int8"], "unknown --dtype 'int8'"),
        (["--task", "fidelity"], "--task perplexity"),
        (["--train", "missing.txt"], "no such file"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(inside, capsys, arguments, message):
    result = run(capsys, "finetune", "llama", *text_flags(**TRAINING), *arguments, "-o", "out")
    assert result.status == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (inside / "out").exists()


def test_merge_refuses_what_is_no_adapter(inside, capsys):
    result = run(capsys, "merge", "llama", "llama", "-o", "out")
    assert result.status == 2
    assert "no adapter_config.json" in result.stderr


def test_training_memory_of_a_model_and_of_an_artifact(inside, capsys):
    result = run(capsys, "inspect", "llama", "--training-memory", "--batch-size", 2, "--context", 32, "--json")
    found = result.json["training"]
    assert list(found)[:3] == ["full", "LoRA", "QLoRA, nf4"]
    full = found["full"]
    buffers = full["weights"] - 4 * full["num_parameters"]
    assert full["weights"] + full["gradients"] + full["optimizer"] == 16 * full["num_parameters"] + buffers
    assert found["full, checkpointed"]["activations"] < full["activations"]
    assert found["LoRA"]["weights"] > found["QLoRA, nf4"]["weights"]
    shown = run(capsys, "inspect", "llama", "--training-memory", "--lora", "r=4", *text_flags())
    assert "QLoRA" in shown.stdout
    assert "predicted, not measured" in shown.stdout
    assert "of 32 tokens" in " ".join(shown.stdout.split())
    arguments = ["--format", "nf4", "--exclude", "*.embed_tokens", *text_flags()[:4], "--batch", "1"]
    assert run(capsys, "compress", "llama", *arguments, "-o", "small").status == 0
    packed = run(capsys, "inspect", "small", "--training-memory", "--json").json["training"]
    assert list(packed) == ["packed, LoRA", "packed, LoRA, checkpointed"]


def test_a_model_of_ones_own_is_fine_tuned_to_a_file_of_tensors(inside, capsys):
    (inside / "own_net.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))\n"
    )
    rng = np.random.default_rng(0)
    x, x_train = rng.normal(size=(100, 8)).astype(np.float32), rng.normal(size=(400, 8)).astype(np.float32)
    y, y_train = (array.sum(1) > 0 for array in (x, x_train))
    np.savez("data.npz", x=x, y=y.astype(int), x_train=x_train, y_train=y_train.astype(int))
    task = ["--task", "classification", "--data", "data.npz"]
    arguments = [*task, "--epochs", 3, "--learning-rate", 0.02, "--json"]
    made = run(capsys, "finetune", "own_net:net", *arguments, "-o", "tuned").json
    assert made["after"] > 0.9 > made["before"]
    again = run(capsys, "evaluate", "own_net:net", "--weights", "tuned/model.safetensors", *task, "--json").json
    assert again["scorecard"]["score"] == made["after"]
    refused = run(capsys, "finetune", "own_net:net", *arguments, "--lora", "r=4", "-o", "adapter")
    assert "recipe step lora" in refused.json["error"]


# Runs that do not come to an end.

TRAINED = ("finetune", "llama", *text_flags(), "--steps", "2", "--evaluations", "1", "-o", "out")


def test_a_signal_leaves_the_journal_alone_and_says_so(inside, capsys, monkeypatch):
    write = Journal.write
    monkeypatch.setattr(Journal, "is_due", True)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = signal.Signals[name]

        def then_stop(self, *arguments, number=number):
            write(self, *arguments)
            os.kill(os.getpid(), number)

        before = signal.signal(number, signal.SIG_DFL)  # SIGHUP may be ignored here
        monkeypatch.setattr(Journal, "write", then_stop)
        stopped = run(capsys, *TRAINED)
        signal.signal(number, before)
        assert stopped.status == 128 + number
        told = " ".join(stopped.stderr.split())
        assert f"error: stopped by {name}; out was not written; what was trained until the last checkpoint is" in told
        assert {path.name for path in inside.iterdir()} == {"llama", "eval.txt", "train.txt", ".out.journal"}
    monkeypatch.setattr(Journal, "write", write)
    assert run(capsys, *TRAINED).status == 0
    assert {path.name for path in inside.iterdir()} == {"llama", "eval.txt", "train.txt", "out"}


def test_one_run_at_a_time_trains_into_an_output(inside, capsys):
    (inside / ".out.journal").mkdir()
    with held(inside / ".out.journal" / "lock"):
        refused = run(capsys, *TRAINED)
        assert refused.status == 2
        assert f"error: out: process {os.getpid()} on" in refused.stderr
        with pytest.raises(InputError, match="is writing it"), journal_for(inside / "out"):
            pytest.fail("went in")


def test_a_full_disk_loses_nothing_of_the_last_checkpoint(inside, capsys, monkeypatch):
    calls, save = [], journal.save_file

    def fails_second(tensors, path, *arguments):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, *arguments)

    monkeypatch.setattr(Journal, "is_due", True)
    monkeypatch.setattr(journal, "save_file", fails_second)
    full = run(capsys, *TRAINED)
    assert full.status == 2
    told = " ".join(full.stderr.split())
    assert "the training's checkpoint cannot be written: I/O error: No space left on device" in told
    assert "what was trained until the last checkpoint is kept in" in told
    assert {path.name for path in inside.iterdir()} == {"llama", "eval.txt", "train.txt", ".out.journal"}
    (checkpoint,) = (inside / ".out.journal").glob("*.safetensors")
    assert load_file(checkpoint)["random"].numel()
    assert [path.name for path in (inside / ".out.journal").glob("*.part")] == []


def test_the_base_needs_a_folder_of_its_own(inside, capsys):
    done = run(capsys, *TRAINED, "--lora", "r=2", "--base", "int8", "--save-base", "./out")
    assert done.status == 2
    assert "--save-base out is --output, too" in done.stderr
