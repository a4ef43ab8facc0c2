"""What a model folder cannot do: have files read outside it, run code, or have a giant built."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import tersor
from tersor.analysis.coding import verify
from tersor.checkpoint.guards import check_links
from tersor.checkpoint.open import open_model
from tersor.checkpoint.pack import pack, unpack
from tersor.checkpoint.seal import first_foreign
from tersor.checkpoint.side_files import copy_side_files
from tersor.checkpoint.streaming import StreamedModel, no_lines
from tersor.core.errors import InputError, ModelError, TersorError
from tersor.recipe import Recipe

SRC = Path(tersor.__file__).parent


def bert() -> BertModel:
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertModel(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder, an artifact of it, and both packed."""
    folder = tmp_path_factory.mktemp("folders")
    bert().save_pretrained(folder / "model")
    tersor.save(tersor.compress(bert(), Recipe.of("int8")).model, folder / "artifact")
    pack(folder / "model", folder / "model-packed")
    pack(folder / "artifact", folder / "artifact-packed")
    return folder


KINDS = ["model", "artifact", "model-packed", "artifact-packed"]
SECRET = "the password"


@pytest.fixture(params=KINDS)
def folder(request, folders, tmp_path):
    return shutil.copytree(folders / request.param, tmp_path / "folder")


def change(folder: Path, **changed: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


# Pipes and devices: whoever opens one may wait for ever.


def opened(folder):
    open_model(str(folder))


@pytest.mark.parametrize("opening", [opened, tersor.load, verify, check_links])
@pytest.mark.parametrize("what", ["config.json", "tersor.json", "model.safetensors.index.json"])
def test_a_pipe_in_a_folder_is_named_and_not_waited_for(folder, what, opening):
    (folder / what).unlink(missing_ok=True)
    os.mkfifo(folder / what)
    with pytest.raises(InputError, match=f"{what}: a pipe or a device"):
        opening(folder)
    assert first_foreign(folder)


@pytest.mark.parametrize("opening", [opened, check_links])
def test_devices_and_pipes_further_in_are_no_files(folder, opening):
    (folder / "1_Pooling").mkdir()
    os.mkfifo(folder / "1_Pooling" / "config.json")
    with pytest.raises(InputError, match=r"1_Pooling/config.json: a pipe or a device"):
        opening(folder)
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"tokenizer.json: a pipe or a device"):
        opening(folder)


# Links.


def to_secret(folder: Path) -> None:
    (folder.parent / "secret").write_text(SECRET)
    (folder / "notes.txt").symlink_to("../secret")


def to_absolute(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("/proc/self/environ")


def to_folder(folder: Path) -> None:
    (folder.parent / "private").mkdir()
    (folder.parent / "private" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "1_Pooling").symlink_to("../private")


def in_circles(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")


@pytest.mark.parametrize("link", [to_secret, to_absolute, to_folder])
def test_links_out_of_the_folder_are_refused_by_name(link, folder, tmp_path):
    link(folder)
    name = "1_Pooling" if link is to_folder else "notes.txt"
    doors = {
        "open": lambda: open_model(str(folder)),
        "copy": lambda: copy_side_files(folder, tmp_path / "copied"),
    }
    if (folder / "model.tersor").exists() or (folder / "tersor.json").exists():
        doors["load"] = lambda: tersor.load(folder)
    if (folder / "model.tersor").exists():
        doors["unpack"] = lambda: unpack(folder, tmp_path / "unpacked")
    else:
        doors["pack"] = lambda: pack(folder, tmp_path / "packed")
    for enter in doors.values():
        with pytest.raises(TersorError, match=f"{name}: a link out of the folder, to .*, which is not followed"):
            enter()
    assert not any(SECRET in path.read_text() for path in tmp_path.glob("*/notes.txt") if not path.is_symlink())


def test_links_inside_and_into_the_hub_cache_are_followed(folders, tmp_path):
    cache = tmp_path / "hub" / "models--someone--bert"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    (snapshot / "1_Pooling").mkdir(parents=True)
    for path in (folders / "model").iterdir():
        shutil.copyfile(path, cache / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    (cache / "blobs" / "pooling").write_text("{}")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/pooling")
    (snapshot / "again.json").symlink_to("config.json")
    open_model(str(snapshot))
    copy_side_files(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert not (tmp_path / "out" / "again.json").is_symlink()
    (tmp_path / "link to it").symlink_to(snapshot)
    open_model(str(tmp_path / "link to it"))
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(ModelError, match="other: a link out of the folder"):
        check_links(snapshot)


def test_links_in_a_circle(folder):
    in_circles(folder)
    with pytest.raises(TersorError, match=r"a: a link"):
        open_model(str(folder))


# Code.


def test_a_folder_with_code_of_its_own_runs_nothing(folder, monkeypatch):
    """Whatever is answered to a prompt, there is none."""
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').write_text('')")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    for kind in ("no_such_kind", "bert"):
        change(folder, model_type=kind, auto_map=auto)
        for door in (open_model, tersor.load) if (folder / "tersor.json").exists() else (open_model,):
            if kind == "bert":
                door(str(folder))  # transformers' own class
                continue
            with pytest.raises(TersorError, match=r"custom code|cannot"):
                door(str(folder))
    assert not asked
    assert not list(folder.parent.rglob("ran"))


@pytest.mark.slow
def test_no_command_asks_to_run_code(folders, tmp_path):
    folder = shutil.copytree(folders / "artifact", tmp_path / "artifact")
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').write_text('')")
    change(folder, model_type="no_such_kind", auto_map={"AutoConfig": "evil.Config"})
    script = "import sys; from tersor.cli import main; sys.argv = ['tersor', 'inspect', sys.argv[1]]; main()"
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "[y/N]" not in done.stdout + done.stderr
    assert not list(tmp_path.rglob("ran"))


def test_kernels_of_the_hub_are_not_fetched(folder):
    change(folder, attn_implementation="someone/evil-kernel")
    with pytest.raises(TersorError, match="names code to be fetched and run"):
        open_model(str(folder))


def test_every_call_that_could_run_code_says_no():
    """Each `from_pretrained` and `from_config` of another's library in the source has trust_remote_code=False."""
    calls, wrong = 0, []
    for file in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func) == "nn.Embedding.from_pretrained":  # torch's, of a tensor
                continue
            if node.func.attr in ("from_pretrained", "from_config", "pipeline", "SentenceTransformer"):
                calls += 1
                said = {keyword.arg: keyword.value for keyword in node.keywords}.get("trust_remote_code")
                if not isinstance(said, ast.Constant) or said.value is not False:
                    wrong.append(f"{file.relative_to(SRC)}:{node.lineno}")
    assert not wrong
    assert calls >= 6


# Sizes.


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": 2**31},
        {"num_hidden_layers": 10**6},
        {"num_labels": 2**31},
        {"vocab_size": 2**31},
        {"hidden_size": 2**31, "num_attention_heads": 1},
        {"intermediate_size": 2**40},
        {"max_position_embeddings": 2**40},
        {"num_attention_heads": 2**31},
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2**31},
        {"model_type": "qwen2", "architectures": ["Qwen2Model"], "num_hidden_layers": 2**31},
        {"model_type": "swin", "architectures": ["SwinModel"], "depths": [2, 2**31]},
        {"text_config": {"num_hidden_layers": 2**31}},
    ],
    ids=str,
)
def test_a_giant_is_refused_before_it_is_built(changed, folder):
    change(folder, **changed)
    before = time.process_time()
    with pytest.raises(TersorError) as caught:
        open_model(str(folder))
    assert "\n" not in str(caught.value)
    assert time.process_time() - before < 20


def test_a_giant_is_not_streamed(folders, tmp_path):
    folder = shutil.copytree(folders / "model", tmp_path / "model")
    for key, value, message in (
        ("vocab_size", 2**40, "more than"),
        ("num_hidden_layers", 2**31, "num_hidden_layers is"),
    ):
        change(folder, **{key: value})
        with pytest.raises(ModelError, match=message):
            StreamedModel(str(folder), tmp_path, no_lines)


def test_new_heads_and_shared_layers_are_no_giants(tmp_path):
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=40,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=48,
        num_attention_heads=2,
        intermediate_size=16,
    )
    AlbertModel(config).save_pretrained(tmp_path / "albert")
    assert torch.isfinite(open_model(str(tmp_path / "albert")).model(torch.arange(4)[None]).last_hidden_state).all()
    bert().save_pretrained(tmp_path / "bert")
    change(tmp_path / "bert", architectures=["BertForSequenceClassification"], num_labels=700)
    assert open_model(str(tmp_path / "bert")).model.config.num_labels == 700


# Names of files.


LONG = "x" * 5000 + ".safetensors"


@pytest.mark.parametrize(
    "name", [LONG, "../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "code.py", "a\0.safetensors"]
)
def test_an_index_names_files_of_its_folder_only(name, folders, tmp_path):
    folder = shutil.copytree(folders / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for door in (lambda: open_model(str(folder)), lambda: pack(folder, tmp_path / "packed")):
        with pytest.raises(ModelError, match=r"index\.json: names .*, which is no \.safetensors file in the folder"):
            door()
