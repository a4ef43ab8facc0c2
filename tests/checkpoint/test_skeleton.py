"""An artifact is opened in three: a skeleton without weights, its packed sites, and all other tensors."""

import torch

import tersor
from tersor.checkpoint.artifact import StoredTensors, fill, place_packed, read_stored
from tersor.checkpoint.layout import packed_sites
from tersor.checkpoint.manifest import read_manifest
from tersor.checkpoint.skeleton import skeleton
from zoo import ZOO

IDS = torch.arange(6)[None]


def artifact(tmp_path, recipe="int4-g32"):
    model = ZOO["llama"].model().eval()
    tersor.save(tersor.compress(model, recipe).model, tmp_path / "small")
    return tmp_path / "small", model


def test_the_three_together_are_load(tmp_path):
    folder, original = artifact(tmp_path)
    manifest = read_manifest(folder)
    model = skeleton(folder, manifest)
    assert type(model) is type(original)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())  # rotary frequencies are in no file
    stored = read_stored(folder, manifest, model)
    place_packed(model, manifest, stored)
    assert {site.name for site, _, _ in packed_sites(model)} == manifest["sites"].keys()
    assert stored.tensors  # norms are left
    fill(model, stored)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    loaded = tersor.load(folder)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert all(parameter.requires_grad for name, parameter in loaded.named_parameters() if "norm" in name)


def test_packed_sites_are_placed_by_shape_alone(tmp_path):
    """Another library may read the tensors itself, afterwards."""
    folder, _ = artifact(tmp_path)
    manifest = read_manifest(folder)
    model = skeleton(folder, manifest)
    stored = read_stored(folder, manifest, model)
    shapes = StoredTensors(folder, {name: each.to("meta") for name, each in stored.tensors.items()})
    place_packed(model, manifest, shapes)
    packed = {site.name: weight for site, weight, _ in packed_sites(model)}
    assert packed.keys() == manifest["sites"].keys()
    assert all(each.is_meta for weight in packed.values() for each in weight.tensors.values())


def test_what_is_tied_stays_one_tensor(tmp_path):
    model = ZOO["llama"].model()
    model.config.tie_word_embeddings = True
    tied = type(model)(model.config).eval()
    tersor.save(tersor.compress(tied, tersor.Recipe.of("int8", exclude="*embed_tokens")).model, tmp_path / "small")
    loaded = tersor.load(tmp_path / "small")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.lm_head.weight.is_meta


def test_decoded_weights_are_parameters(tmp_path):
    folder, _ = artifact(tmp_path)
    loaded = tersor.load(folder, packed=False)
    assert not packed_sites(loaded)
    weights = [module.weight for module in loaded.modules() if isinstance(module, torch.nn.Linear)]
    assert weights
    assert all(weight.requires_grad and not weight.is_meta for weight in weights)
