"""pack, unpack, verify, info, and artifacts whose weights are entropy-coded."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from cli_runner import tersor as run
from tersor.analysis.coding import info, verify, water_filling
from tersor.checkpoint.container import Container
from tersor.checkpoint.container_write import size_of, write
from tersor.checkpoint.layout import CODED
from tersor.checkpoint.open import open_model
from tersor.checkpoint.pack import pack, unpack
from tersor.checkpoint.restore import read_decoded
from tersor.checkpoint.seal import MANIFEST, RECORDS, SEAL, Checked
from tersor.checkpoint.streaming import StreamedModel, no_lines
from tersor.core.errors import ArtifactError, InputError, ModelError, TersorError
from tersor.core.files import sha256
from tersor.core.weights_file import write_weights
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


RULES = {"0": "codebook16", "1": "int4-g32-asym", "3": "bitmask"}
IDS = torch.arange(12).view(3, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as transformers saves large models: two files, an index and a config."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    first = {"a.weight": torch.randn(60, 50).bfloat16(), "a.bias": torch.zeros(60).bfloat16()}
    second = {"b.weight": torch.randn(40, 60).half(), "steps": torch.tensor(3)}
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(second, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    names = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    names |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("[1]")
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An artifact with sites of three formats, coded."""
    folder = tmp_path_factory.mktemp("artifact")
    torch.manual_seed(0)
    tersor.save(tersor.compress(net(), Recipe.of("keep", RULES)).model, folder, coded=True)
    return folder


def test_a_checkpoint_there_and_back(checkpoint, tmp_path):
    """The very same files, by their hashes."""
    written = pack(checkpoint, tmp_path / "packed")
    assert sorted(p.name for p in written.output.iterdir()) == ["config.json", CODED, SEAL, "tokenizer.json"]
    assert written.after < 0.9 * written.before
    unpack(written.output, tmp_path / "plain")
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            assert sha256(tmp_path / "plain" / path.name) == sha256(path), path.name
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["steps"] == "model-00002-of-00002.safetensors"
    assert (tmp_path / "plain" / "tokenizer.json").read_text() == "[1]"


def test_a_single_file(tmp_path):
    save_file({"a": torch.randn(30, 30)}, tmp_path / "weights.safetensors", {"format": "pt"})
    pack(tmp_path / "weights.safetensors", tmp_path / "packed")
    unpack(tmp_path / "packed" / CODED, tmp_path / "plain")
    assert sha256(tmp_path / "plain" / "model.safetensors") == sha256(tmp_path / "weights.safetensors")


def test_a_file_to_a_file(tmp_path, checkpoint):
    plain, packed = tmp_path / "weights.safetensors", tmp_path / "weights.tersor"
    save_file({"a": torch.randn(30, 30)}, plain, {"format": "pt"})
    pack(plain, packed)
    unpack(packed, tmp_path / "again.safetensors")
    assert sha256(tmp_path / "again.safetensors") == sha256(plain)
    with pytest.raises(InputError, match="exists"):
        pack(plain, packed)
    pack(plain, packed, overwrite=True)
    with pytest.raises(InputError, match="is a folder, so the output is one"):
        pack(checkpoint, tmp_path / "out.tersor")
    with pytest.raises(InputError, match="packed already"):
        pack(packed, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "weights.safetensors", "weights.tersor"]


def test_packed_models_open_as_models(tmp_path):
    """Where a model is named, its packed folder will do; of one's own class, as `model`, or as --weights."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(config).eval().half()
    model.save_pretrained(tmp_path / "model")
    packed = pack(tmp_path / "model", tmp_path / "packed").output
    for loaded in (tersor.load(packed), open_model(str(packed)).model):
        assert type(loaded) is type(model)
        assert loaded.dtype == torch.float16
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert tersor.load(packed, dtype=torch.bfloat16).dtype == torch.bfloat16
    own = net()
    write_weights(own.state_dict(), tmp_path / "own.safetensors")
    pack(tmp_path / "own.safetensors", tmp_path / "own")
    assert torch.equal(tersor.load(tmp_path / "own", model=net())(IDS), own.eval()(IDS))
    with pytest.raises(ArtifactError, match="does not fit Linear"):
        tersor.load(tmp_path / "own", model=nn.Linear(2, 2))
    with pytest.raises(InputError, match="lazy=True is for"):
        tersor.load(packed, lazy=True)
    assert torch.equal(open_model(f"{__name__}:net", weights=tmp_path / "own" / CODED).model(IDS), own(IDS))
    with pytest.raises(InputError, match="tersor unpack"):
        StreamedModel(str(packed), tmp_path, no_lines)


def test_a_model_that_transformers_loads(tmp_path):
    from transformers import AutoModel, BertConfig, BertModel

    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "plain")
    loaded = AutoModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)
    tersor.save(tersor.compress(model, Recipe.of("int4-g32")).model, tmp_path / "artifact", coded=True)
    unpack(tmp_path / "artifact", tmp_path / "decoded")
    decoded = AutoModel.from_pretrained(tmp_path / "decoded").eval()
    found = tersor.load(tmp_path / "artifact", packed=False)(IDS).last_hidden_state
    assert torch.equal(decoded(IDS).last_hidden_state, found)


def test_an_artifact_computes_the_same(artifact, tmp_path):
    torch.manual_seed(0)
    made = tersor.compress(net(), Recipe.of("keep", RULES)).model.eval()
    tersor.save(made, tmp_path / "plain", coded=False)
    expected = made(IDS)
    assert torch.equal(tersor.load(artifact, model=net())(IDS), expected)
    assert torch.equal(tersor.load(artifact, model=net(), packed=False)(IDS), expected)
    assert (artifact / CODED).stat().st_size < (tmp_path / "plain" / "model.safetensors").stat().st_size
    pack(tmp_path / "plain", tmp_path / "packed")
    assert (tmp_path / "packed" / CODED).stat().st_size == pytest.approx((artifact / CODED).stat().st_size, abs=60)
    assert torch.equal(tersor.load(tmp_path / "packed", model=net())(IDS), expected)


def test_left_in_the_file(artifact):
    """Sites are decoded when they run, and only one is kept."""
    lazy, whole = tersor.load(artifact, model=net(), lazy=True), tersor.load(artifact, model=net())
    sites = [lazy[0].packed, lazy[1].packed, lazy[3].packed]
    assert not any(site._buffers for site in sites)
    assert torch.equal(lazy(IDS), whole(IDS))
    assert not any(site._buffers for site in sites)
    shelf = sites[0].fetch.func.__self__
    assert shelf.latest[0] == "3.weight"
    assert size_of(lazy) == size_of(whole)
    assert torch.equal(lazy.to(torch.float64)(IDS), whole.to(torch.float64)(IDS))


def test_what_cannot_be_left_in_the_file(artifact, tmp_path):
    tersor.save(tersor.compress(net(), Recipe.of("int8")).model, tmp_path)
    with pytest.raises(InputError, match="only entropy-coded weights"):
        tersor.load(tmp_path, model=net(), lazy=True)
    with pytest.raises(InputError, match="stay packed"):
        tersor.load(artifact, model=net(), lazy=True, packed=False)


def test_coded_sites_are_saved_coded(tmp_path):
    made = tersor.compress(net(), Recipe.of("coded")).model
    tersor.save(made, tmp_path)
    assert (tmp_path / CODED).stat().st_size == size_of(made)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(tersor.load(tmp_path, model=net())(IDS), made.eval()(IDS))


def test_coded_sites_into_float(tmp_path):
    """Decoded and scaled in one pass: the weights that decoding the codes gives, and damage is noticed as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(700, 32), nn.Linear(32, 64), nn.Linear(64, 1).bfloat16())
    with torch.no_grad():
        model[0].weight[3, 5] = 70.0
    made = tersor.compress(model, Recipe.of("coded")).model
    tersor.save(made, tmp_path)
    found = tersor.load(tmp_path, model=model, packed=False)
    for site in find_sites(made):
        assert torch.equal(found.get_parameter(f"{site.name}.weight").data, site.weight(made).detach())
    container = Container(tmp_path / CODED)
    for name in ("0.weight.codes", "1.weight.codes", "1.weight.row", "2.weight.scale"):
        content = bytearray((tmp_path / CODED).read_bytes())
        content[container.chunks[name][-1].first] ^= 1
        (tmp_path / "damaged.tersor").write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name}, .*checksum differs"):
            read_decoded(
                tmp_path / "damaged.tersor", {"0.weight": (700, 32), "1.weight": (64, 32), "2.weight": (1, 64)}
            )


def test_damage(artifact, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(artifact, tmp_path / "damaged")
    content = bytearray((folder / CODED).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / CODED).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.tersor: the sha256 differs"):
        tersor.load(folder, model=net())
    result = run(capsys, "verify", str(folder))
    assert result.status == 2
    result = run(capsys, "verify", str(folder / CODED))
    assert result.status == 2


def test_refusals(checkpoint, artifact, tmp_path):
    with pytest.raises(InputError, match="packed already"):
        pack(artifact, tmp_path / "out")
    with pytest.raises(InputError, match="tersor pack"):
        unpack(checkpoint, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no \\*\\.safetensors file"):
        pack(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ModelError, match="not a safetensors file, which is needed here"):
        pack(tmp_path / "pytorch_model.bin", tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        pack(checkpoint, tmp_path / "empty")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def crowded(tmp_path):
    """A folder with everything that a model's folder may hold: shards in folders, modules, other frameworks, code."""
    folder = tmp_path / "crowded"
    first = {"a.weight": torch.randn(40, 30), "a.bias": torch.zeros(40)}
    second = {"b.weight": torch.randn(30, 40).half()}
    for name, tensors in (("a/w", first), ("b/w", second), ("2_Dense/model", {"linear.weight": torch.randn(4, 3)})):
        (folder / name).parent.mkdir(parents=True)
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    save_file({"lora": torch.ones(3)}, folder / "adapter.safetensors")
    names = dict.fromkeys(first, "a/w.safetensors") | dict.fromkeys(second, "b/w.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for name in ("modeling_own.py", "onnx/model.onnx", "pytorch_model.bin", "README.md", ".gitattributes", "notes.xyz"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_else_as_it_came(crowded, tmp_path):
    """Shards in folders come back there, and no other file is lost or changed, whatever it is."""
    before = files_of(crowded)
    packed = pack(crowded, tmp_path / "packed").output
    shards = {"a/w.safetensors", "b/w.safetensors", "model.safetensors.index.json"}
    kept = {name: content for name, content in before.items() if name not in shards}
    found = files_of(packed)
    assert {name: found[name] for name in kept} == kept
    assert found.keys() - kept.keys() == {CODED, SEAL}
    after = files_of(unpack(packed, tmp_path / "plain").output)
    assert after.keys() - before.keys() == {SEAL}
    for name, content in before.items():
        assert after[name] == content or name == "model.safetensors.index.json", name
    index = json.loads(after["model.safetensors.index.json"])["weight_map"]
    assert index == json.loads(before["model.safetensors.index.json"])["weight_map"]


def test_an_output_inside_is_not_packed(crowded):
    pack(crowded, crowded / "packed")
    again = pack(crowded, crowded / "packed", overwrite=True).output
    assert not (again / "packed").exists()


@pytest.mark.parametrize("coded", [False, True])
def test_artifacts_of_either_kind_are_decoded(coded, tmp_path):
    model = net()
    made = tersor.compress(model, Recipe.of("keep", RULES)).model
    tersor.save(made, tmp_path / "artifact", coded=coded)
    unpack(tmp_path / "artifact", tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    model.load_state_dict(weights)
    assert torch.equal(model(IDS), tersor.load(tmp_path / "artifact", model=net(), packed=False)(IDS))


def test_what_pack_wrote_is_opened_before_it_says_so(checkpoint, tmp_path, monkeypatch):
    """A writer that is wrong in one bit leaves nothing behind."""
    from tersor.checkpoint import pack as module

    def wrong(tensors, path, *rest):
        first = next(iter(tensors))
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[first].view(-1).view(torch.uint8)[0] ^= 1
        write(changed, path, *rest)

    monkeypatch.setattr(module, "write", wrong)
    with pytest.raises(ArtifactError, match="is read as something else than was written"):
        pack(checkpoint, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


# Whether all of a folder is what was written.


@pytest.fixture(params=["plain", "coded", "packed", "unpacked"])
def sealed(request, tmp_path):
    """An artifact of each kind, and folders that pack and unpack wrote, with files beside the weights."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json", "generation_config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    write_weights({"a": torch.randn(30, 30)}, source / "model.safetensors")
    folder = tmp_path / "folder"
    if request.param in ("plain", "coded"):
        made = tersor.compress(net(), Recipe.of("int8")).model
        tersor.save(made, folder, source=source, coded=request.param == "coded")
        return folder
    packed = pack(source, folder if request.param == "packed" else tmp_path / "first").output
    return packed if request.param == "packed" else unpack(packed, folder).output


def test_any_flipped_bit_of_any_file_is_named(sealed):
    chance = random.Random(0)
    assert verify(sealed).checked == Checked(True)
    for path in [path for path in sealed.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        bits = range(8 * len(content))
        for bit in chance.sample(bits, min(len(bits), 60 if path.name in RECORDS else 10)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(TersorError, match=path.name):
                verify(sealed)
        path.unlink()
        if path.name not in RECORDS:
            with pytest.raises(TersorError, match=path.name):
                verify(sealed)
        path.write_bytes(content)
    assert verify(sealed).checked == Checked(True)


def test_files_that_are_not_listed_are_named(sealed, capsys):
    (sealed / "1_Pooling" / "notes.txt").write_text("mine")
    assert verify(sealed).checked == Checked(True, ("1_Pooling/notes.txt",))
    result = run(capsys, "verify", str(sealed))
    assert result.status == 0
    assert "note: 1_Pooling/notes.txt: not listed" in result.stderr
    assert json.loads(run(capsys, "verify", str(sealed), "--json").stdout)["unlisted"] == ["1_Pooling/notes.txt"]


def test_artifacts_without_a_list_of_all_files(artifact, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(artifact, tmp_path / "old")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] = {CODED: manifest["files"][CODED]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert not verify(folder).checked.is_whole
    assert "only the weights could be checked" in run(capsys, "verify", str(folder)).stderr
    manifest["files"]["config.json"] = manifest["files"][CODED]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"tersor\.json: is not as it was written"):
        verify(folder)


def test_info(artifact, tmp_path):
    found = info(artifact)
    assert [site.name for site in found.sites] == ["0.weight", "1.weight", "3.weight"]
    inside = sum(site.bits * site.num_weights for site in found.sites) / 8
    assert inside < found.num_bytes - found.header_bytes - found.other_bytes
    coded = [site for site in found.sites if site.class_entropy is not None]
    assert coded
    for site in coded:
        assert site.class_entropy <= site.entropy + 1e-9
        assert site.overhead == pytest.approx(site.bits - site.class_entropy)


def test_info_counts_mantissas_that_are_coded(tmp_path):
    save_file({"weight": torch.randn(300, 400).half().float()}, tmp_path / "plain.safetensors")
    pack(tmp_path / "plain.safetensors", tmp_path / "packed.tersor")
    (site,) = info(tmp_path / "packed.tersor").sites
    assert site.bits < 14
    assert site.class_entropy <= site.entropy
    assert 0 < site.overhead < 0.1


def test_the_bound_of_normal_weights(tmp_path):
    """Codes of normal weights, one step: an ideal entropy code is 0.255 bits above the bound, ours a little more."""
    model = nn.Sequential(nn.Linear(400, 500), nn.ReLU())
    nn.init.normal_(model[0].weight)
    tersor.save(tersor.compress(model, Recipe.of("coded")).model, tmp_path)
    (site,) = info(tmp_path).sites
    assert site.gap == pytest.approx(0.255, abs=0.03)


@pytest.mark.parametrize(("num_states", "gap"), [(4, 0.089), (64, 0.046)])
def test_a_trellis_closes_most_of_the_gap(tmp_path, capsys, num_states, gap):
    model = nn.Sequential(nn.Linear(400, 500), nn.ReLU())
    nn.init.normal_(model[0].weight)
    recipe = Recipe.of(f"waterfill(level=2e-4, num_states={num_states}):coded")
    tersor.save(tersor.compress(model, recipe).model, tmp_path)
    (site,) = info(tmp_path).sites
    assert site.num_states == num_states
    assert site.gap == pytest.approx(gap, abs=0.03)
    assert site.class_entropy <= site.entropy <= site.bits
    assert run(capsys, "info", str(tmp_path), "--json").json["sites"][0]["num_states"] == num_states
    assert "states" in run(capsys, "info", str(tmp_path)).stdout


def test_water_filling_by_hand():
    import numpy as np

    variance, share = np.array([1.0, 0.25, 0.01]), np.array([0.2, 0.3, 0.5])
    level = 0.05
    error = float((share * np.minimum(level, variance)).sum())
    bits = 0.2 * np.log2(1 / level) / 2 + 0.3 * np.log2(0.25 / level) / 2
    assert water_filling(variance, share, error) == pytest.approx(bits)


def test_verbs(checkpoint, tmp_path, capsys):
    result = run(capsys, "pack", str(checkpoint), "-o", str(tmp_path / "packed"), "--json")
    assert result.json["bytes"] == (tmp_path / "packed" / CODED).stat().st_size
    result = run(capsys, "verify", str(tmp_path / "packed"), "--json")
    assert result.json["tensors"] == 4
    result = run(capsys, "info", str(tmp_path / "packed"), "--json")
    rows = {row["name"]: row for row in result.json["sites"]}
    assert 10 < rows["a.weight"]["bits"] < 11.5
    result = run(capsys, "unpack", str(tmp_path / "packed"), "-o", str(tmp_path / "plain"), "--json")
    assert result.json["output"] == str(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model-00002-of-00002.safetensors")["steps"] == 3
