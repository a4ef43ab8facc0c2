"""Files of torch.save: read as they come, without running what they name, whatever they claim."""

import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cli_runner
from tersor.checkpoint.open import open_model
from tersor.checkpoint.pack import pack
from tersor.core.errors import InputError, ModelError
from tersor.core.pickled import read_pickled, without_prefix
from zoo import ZOO


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    return {
        "a": weight,
        "tied": weight,
        "b": torch.randn(3).bfloat16(),
        "rows": torch.randn(6, 4).t(),
        "n": torch.tensor(3),
    }


def same(found, state):
    return found.keys() == state.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in state.items()
    )


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.pth.tar", "W.PT"])
@pytest.mark.parametrize("old", [False, True])
def test_a_state_dict_is_read_whatever_its_ending_and_age(tmp_path, state, name, old):
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=not old)
    found = read_pickled(tmp_path / name)
    assert same(found, state)
    assert found["a"].data_ptr() == found["tied"].data_ptr()
    assert not any(isinstance(each, nn.Parameter) or each.requires_grad for each in found.values())


def wrapped(state):
    yield {"state_dict": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    yield {"model_state_dict": state, "loss": torch.tensor(0.5)}
    yield {"model": state, "args": None}
    yield {"model": {"state_dict": state, "step": 3}}
    yield {"epoch": 3, "module": {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in state.items()}}


@pytest.mark.parametrize("which", range(5))
def test_a_state_dict_is_found_in_a_training_checkpoint(tmp_path, state, which):
    torch.save(list(wrapped(state))[which], tmp_path / "w.pt")
    found = read_pickled(tmp_path / "w.pt")
    assert same(found, state)
    assert not any(isinstance(each, nn.Parameter) for each in found.values())


class Runs:
    """A pickle of it calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)


def test_code_in_a_pickle_is_never_run(tmp_path):
    trace = tmp_path / "trace"
    for number, function in enumerate([Runs(os.mkdir, str(trace)), Runs(eval, f"open({str(trace)!r}, 'w')")]):
        for old in (False, True):
            path = tmp_path / f"{number}{old}.pt"
            torch.save({"a": torch.ones(2), "b": function}, path, _use_new_zipfile_serialization=not old)
            with pytest.raises(ModelError, match=r"tersor runs none\. If you trust the file, write its weights alone"):
                read_pickled(path)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Runs(os.mkdir, str(trace))))
    with pytest.raises(ModelError, match=r"plain\.pkl"):
        read_pickled(tmp_path / "plain.pkl")
    assert not trace.exists()


@pytest.mark.parametrize("what", ["module", "checkpoint"])
def test_the_line_that_converts_what_is_refused_does(tmp_path, what):
    """Run as the message says, in the folder of the file, with the code at hand."""
    net = Net()
    torch.save(net if what == "module" else {"state_dict": net.state_dict(), "args": Net}, tmp_path / "whole.pt")
    with pytest.raises(ModelError, match=r"Net, whose code would run") as error:
        read_pickled(tmp_path / "whole.pt")
    line = str(error.value).split('python -c "')[1].removesuffix('"')
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(line, {})
    finally:
        os.chdir(here)
    assert same(read_pickled(tmp_path / "weights.pt"), net.state_dict())


def zipped(path: Path, change) -> None:
    """Write an archive anew with records that `change(name, bytes)` gives."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_damaged_files_are_one_message(tmp_path, state):
    path = tmp_path / "w.pt"
    for old in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not old)
        whole = path.read_bytes()
        for keep in (0, 1, 4, 60, len(whole) // 2, len(whole) - 5):
            path.write_bytes(whole[:keep])
            with pytest.raises(ModelError, match=r"w\.pt: .*(download or save it again|runs none)"):
                read_pickled(path)
    torch.save(state, path)
    zipped(path, lambda name, data: data[:-8] if "/data/" in name else data)
    with pytest.raises(ModelError, match="download or save it again"):
        read_pickled(path)
    with pytest.raises(ModelError, match="no such file"):
        read_pickled(tmp_path / "none.pt")


def test_claims_beyond_the_file_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(1).expand(2**40)}, path)
    with pytest.raises(ModelError, match=r"bytes that claim tensors of 4,398,046,511,104 bytes"):
        read_pickled(path)
    torch.save({"a": torch.zeros(2**22)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 2**16
    with pytest.raises(ModelError, match="records are compressed"):
        read_pickled(path)
    torch.save({"a": torch.ones(2, 3)}, path)
    count = b"K\x06"  # of the storage's numbers, in the pickle
    zipped(path, lambda name, data: data.replace(count, b"J\xff\xff\xff\x7f") if name.endswith(".pkl") else data)
    with pytest.raises(ModelError, match="shorter or longer than its tensors"):
        read_pickled(path)
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(7)}, path)
    sizes = (count, b"J\xff\xff\xff\x7f"), (b"K\x02K\x03\x86", b"J\xff\xff\xff\x0fK\x03\x86")
    zipped(path, lambda name, data: replaced(data, sizes) if name.endswith(".pkl") else data)
    with pytest.raises(ModelError, match="download or save it again"):
        read_pickled(path)


def replaced(data: bytes, pairs) -> bytes:
    for old, new in pairs:
        assert old in data
        data = data.replace(old, new)
    return data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.eye(3).to_sparse()}, "a is sparse_coo, and tersor takes plain tensors"),
        ({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "a is quantized"),
        ({"a": torch.ones(2, device="meta")}, "a is on the device meta"),
        ({}, "holds no state dict: it is empty"),
        ({"epoch": 3, "step": 4}, r"holds no state dict: 'epoch' is int, 'step' is int; save the state dict alone"),
        (torch.ones(2), "holds Tensor, and no state dict"),
        ([torch.ones(2)], "holds list, and no state dict"),
        ({"a": {"b": torch.ones(2)}}, r"'a' is dict; .* or under one of state_dict, model_state_dict, model"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=message):
        read_pickled(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore")
def test_archives_of_other_kinds_are_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    for name in ("script.pt", "old.tar", "other.bin"):
        with pytest.raises(ModelError, match=name):
            read_pickled(tmp_path / name)


@pytest.fixture
def own_net(tmp_path, monkeypatch):
    """A factory of a network, and its weights."""
    (tmp_path / "pickled_net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(1)\n"
        "    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pickled_net", raising=False)
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
def test_a_factory_is_filled_whatever_wrapped_its_names(own_net, tmp_path, prefix):
    named = {prefix + name: tensor for name, tensor in own_net.state_dict().items()}
    torch.save({"state_dict": named}, tmp_path / "w.pth")
    source = open_model("pickled_net:make", weights=tmp_path / "w.pth")
    assert same(source.model.state_dict(), own_net.state_dict())
    assert source.num_bytes == (tmp_path / "w.pth").stat().st_size
    if prefix:
        assert f"all names in w.pth begin with '{prefix}'" in source.notes[0]
    else:
        assert source.notes == ()


def test_a_prefix_of_the_model_itself_stays(own_net, tmp_path):
    module = nn.Module()
    module.module = own_net
    torch.save(module.state_dict(), tmp_path / "w.pt")
    state = read_pickled(tmp_path / "w.pt")
    assert without_prefix(state, ("module.",), frozenset(state)) == (state, "")


@pytest.fixture
def folder(tmp_path):
    """A language model with tied weights, saved as transformers did before safetensors."""
    model = ZOO["llama"].model()
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "llama" / "pytorch_model.bin")
    return tmp_path / "llama", model


def test_a_folder_with_pickled_weights_opens(folder):
    place, model = folder
    source = open_model(str(place))
    assert same(source.model.state_dict(), model.state_dict())
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    assert source.hashes.keys() == {"pytorch_model.bin"}
    assert source.notes == ()
    torch.save({f"module.{name}": t for name, t in model.state_dict().items()}, place / "pytorch_model.bin")
    source = open_model(str(place))
    assert same(source.model.state_dict(), model.state_dict())
    assert "begin with 'module.'" in source.notes[0]


def test_a_folder_of_pickled_shards_opens(folder):
    place, model = folder
    state = dict(model.state_dict())
    (place / "pytorch_model.bin").unlink()
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name].clone() for name in part}, place / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (place / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = open_model(str(place))
    assert same(source.model.state_dict(), model.state_dict())
    assert source.num_bytes == sum((place / file).stat().st_size for file in shards)
    for name in ("../pytorch_model.bin", "/etc/passwd", "model.safetensors", 3):
        (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ModelError, match=r"index\.json"):
            open_model(str(place))


def test_safetensors_come_first(folder):
    place, model = folder
    model.save_pretrained(place)
    (place / "pytorch_model.bin").write_bytes(b"damaged")
    assert open_model(str(place)).hashes.keys() == {"model.safetensors"}


def test_verbs_open_a_folder_with_pickled_weights_and_streaming_names_the_way(folder, tmp_path, capsys):
    assert "LlamaForCausalLM" in cli_runner.tersor(capsys, "inspect", folder[0]).stdout
    out = tmp_path / "out"
    done = cli_runner.tersor(capsys, "compress", folder[0], "--format", "nearest:int8", "--stream", "-o", out)
    assert done.status == 2
    assert "t.LlamaForCausalLM.from_pretrained('.').save_pretrained('.')" in " ".join(done.stderr.split())
    assert not out.exists()


def test_a_packed_folder_is_written_from_safetensors_alone(folder, tmp_path):
    with pytest.raises(InputError, match="not a safetensors file, which is needed here; write one: python -c") as error:
        pack(folder[0], tmp_path / "packed")
    line = str(error.value).split('python -c "')[1].removesuffix('"')
    here = Path.cwd()
    os.chdir(folder[0])
    try:
        exec(line, {})
    finally:
        os.chdir(here)
    assert same(load_file(folder[0] / "model.safetensors"), dict(folder[1].state_dict()))
