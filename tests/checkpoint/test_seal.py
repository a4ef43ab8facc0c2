"""Every folder that tersor writes lists all of its files, and can therefore be replaced by the next."""

import json
import shutil
from dataclasses import asdict, dataclass

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tersor
from cli_runner import tersor as run
from export.exported import byte_level
from tersor.checkpoint.artifact import copy_side_files
from tersor.checkpoint.seal import MANIFEST, SEAL, first_foreign, listed_in
from tersor.core.errors import InputError
from tersor.jobs.compress import record
from tersor.recipe import Recipe
from tersor.report.card import megabytes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small Hugging Face model in two files, packed as it is, and an artifact of it."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=352, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "llama", max_shard_size="40KB")
    assert len(list((folder / "llama").glob("*.safetensors"))) > 1
    byte_level(pre_tokenizers.Digits(individual_digits=True)).save_pretrained(folder / "llama")
    recipe = Recipe.of("int8", exclude=["*.embed_tokens"])
    tersor.save(tersor.compress(model, recipe).model, folder / "artifact", source=folder / "llama")
    (folder / "eval.txt").write_text("the cat sees the dog. " * 12)
    return folder


@pytest.fixture
def inside(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEXT = ("--task", "perplexity", "--data", "eval.txt", "--task-option", "context=32")
WRITERS = {
    "pack": ("pack", "llama"),
    "pack artifact": ("pack", "artifact"),
    "student": ("student", "llama", "--layers", "1"),
    "export": ("export", "artifact", "--to", "compressed-tensors"),
    "compress": ("compress", "llama", "--format", "nearest:int8", *TEXT, "--batch", "1"),
    "stream": ("compress", "llama", "--stream", "--format", "nearest:int8", *TEXT),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_what_a_verb_wrote_it_replaces_and_nothing_else(verb, inside, capsys):
    arguments = (*WRITERS[verb], "-o", "out")
    assert run(capsys, *arguments).status == 0
    files = {path.relative_to(inside / "out").as_posix() for path in (inside / "out").rglob("*") if path.is_file()}
    assert set(listed_in(inside / "out")) == files - {SEAL, MANIFEST}
    assert first_foreign(inside / "out") is None
    assert "out exists" in run(capsys, *arguments).stderr
    (inside / "out" / "notes.txt").write_text("mine")
    refused = run(capsys, *arguments, "--overwrite")
    assert refused.status == 2
    assert "out: it holds notes.txt, which tersor did not write" in refused.stderr
    assert (inside / "out" / "notes.txt").read_text() == "mine"
    (inside / "out" / "notes.txt").unlink()
    assert run(capsys, *arguments, "--overwrite").status == 0
    assert sorted(path.name for path in inside.iterdir()) == ["artifact", "eval.txt", "llama", "out"]


def test_unpacked_shards_are_replaced_and_a_model_of_the_user_is_not(inside, capsys):
    assert run(capsys, "pack", "llama", "-o", "packed").status == 0
    assert run(capsys, "unpack", "packed", "-o", "out").status == 0
    assert run(capsys, "unpack", "packed", "-o", "out", "--overwrite").status == 0
    assert run(capsys, "pack", "artifact", "-o", "out", "--overwrite").status == 0  # one verb what another wrote
    mine = inside / "mine"
    shutil.copytree("llama", mine)
    save_file({"weight": torch.ones(2)}, mine / "model.safetensors")
    (mine / "runs").mkdir()
    (mine / "runs" / "thesis.txt").write_text("precious")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    refused = run(capsys, "unpack", "packed", "-o", "mine", "--overwrite")
    assert refused.status == 2
    assert "mine: it holds config.json, and no list of files that tersor wrote" in refused.stderr
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before


def test_a_safetensors_file_is_replaced_by_the_same_tensors_alone(inside, capsys):
    save_file({"weight": torch.arange(600.0)}, "one.safetensors")
    save_file({"weight": torch.ones(600)}, "other.safetensors")
    assert run(capsys, "pack", "one.safetensors", "-o", "one.tersor").status == 0
    assert run(capsys, "unpack", "one.tersor", "-o", "one.safetensors", "--overwrite").status == 0
    refused = run(capsys, "unpack", "one.tersor", "-o", "other.safetensors", "--overwrite")
    assert refused.status == 2
    assert "other.safetensors: it is not what one.tersor holds" in refused.stderr
    (inside / "thesis.tersor").write_text("precious")
    refused = run(capsys, "pack", "one.safetensors", "-o", "thesis.tersor", "--overwrite")
    assert refused.status == 2
    assert (inside / "thesis.tersor").read_text() == "precious"


def test_a_second_save_is_the_one_that_loads(tmp_path, monkeypatch):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64))

    first = tersor.compress(model(), Recipe.of("int8")).model
    second = tersor.compress(model(), Recipe.of("int4-g64")).model
    tersor.save(first, tmp_path / "out", coded=True)
    tersor.save(second, tmp_path / "out")
    loaded = tersor.load(tmp_path / "out", model=model())
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), second(x))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", MANIFEST]
    tersor.save(first, tmp_path / "out", coded=True)
    assert torch.equal(tersor.load(tmp_path / "out", model=model())(x), first(x))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"it holds notes\.txt"):
        tersor.save(second, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").unlink()
    monkeypatch.setattr("tersor.checkpoint.artifact.describe", raises)
    with pytest.raises(RuntimeError):
        tersor.save(second, tmp_path / "out")
    assert torch.equal(tersor.load(tmp_path / "out", model=model())(x), first(x))


def raises(*arguments):
    raise RuntimeError


def test_outputs_and_packed_weights_are_no_side_files(inside):
    """An artifact in the folder of its model is not taken along into the next."""
    tersor.save(nn.Linear(2, 2), "llama/small")
    shutil.copytree("llama/small", "llama/deep/small")
    for name in (".small.journal/step-0.json", "model.tersor", "kept/vocab.txt"):
        (inside / "llama" / name).parent.mkdir(exist_ok=True)
        (inside / "llama" / name).touch()
    (inside / "out").mkdir()
    copy_side_files(inside / "llama", inside / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (inside / "out" / name).unlink(missing_ok=True)
    copied = {path.relative_to(inside / "out").as_posix() for path in (inside / "out").rglob("*") if path.is_file()}
    assert copied == {"config.json", "generation_config.json", "kept/vocab.txt"}


@dataclass(frozen=True)
class Card:
    """Of a scorecard, what the size of the folder depends on."""

    folder_bytes: int | None = None

    def to_dict(self):
        return asdict(self)


@pytest.mark.parametrize("around", [10**4, 10**6])
def test_the_stated_size_is_that_of_the_folder_whatever_it_is(tmp_path, around, monkeypatch):
    """Also where 1000.00 kB would make it 1.00 MB, and that 1000.00 kB again."""
    monkeypatch.setattr(tersor.jobs.compress, "model_card", lambda name, manifest, verdict, cards: shown(cards[1]))

    def shown(card):
        return megabytes(card.folder_bytes)

    (tmp_path / "data").write_bytes(b"")
    (_, card) = record(tmp_path, "out", {"files": {}}, None, [Card(), Card()])
    for size in range(around - card.folder_bytes - 15, around - card.folder_bytes + 5):
        (tmp_path / "data").write_bytes(bytes(size))
        (_, made) = record(tmp_path, "out", {"files": {}}, None, [Card(), Card()])
        assert made.folder_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
        assert json.loads((tmp_path / MANIFEST).read_text())["scorecards"][1] == made.to_dict()
        assert (tmp_path / "README.md").read_text() == shown(made)
        assert first_foreign(tmp_path) is None
