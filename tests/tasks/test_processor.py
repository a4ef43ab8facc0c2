"""Images reach a Hugging Face model as its own image processor makes them."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from tersor.checkpoint.open import open_model
from tersor.core.errors import DataError
from tersor.tasks import made_up
from tersor.tasks.data import Data

SETTINGS = {
    "mean and std": {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}},
    "imagenet": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "scale alone": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_normalize": False,
        "rescale_factor": 1.0,
    },
    "crop": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 16, "width": 16},
        "resample": 3,
    },
    "crop by percent": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_pct": 0.8,
    },
    "channels turned": {
        "image_processor_type": "MobileViTImageProcessor",
        "size": {"shortest_edge": 18},
        "crop_size": {"height": 16, "width": 16},
    },
    "old name": {
        "feature_extractor_type": "ViTFeatureExtractor",
        "size": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


def model_folder(tmp_path, settings, channels=3):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=2, num_channels=channels)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    if settings is not None:
        (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path / "vit"


def images(tmp_path, height=40, width=50, channels=3):
    drawn = made_up.images(12, height, width, channels)
    for number, image in enumerate(drawn):
        place = tmp_path / "images" / "ab"[number % 2] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if channels == 3 else image[..., 0]).save(place)
    return tmp_path / "images"


def fed(folder, data, **options):
    task = Data("classification", data, options=options).open(open_model(str(folder)))
    batch = next(task.batches("eval"))
    return task, batch, next(iter(batch.inputs.values()))


@pytest.mark.parametrize("kind", SETTINGS)
def test_pixels_are_those_of_the_processor(tmp_path, kind):
    folder, data = model_folder(tmp_path, SETTINGS[kind]), images(tmp_path)
    task, batch, found = fed(folder, data)
    own = AutoImageProcessor.from_pretrained(folder)
    stored = [Image.open(task.inputs.paths[row]) for row in batch.rows]
    torch.testing.assert_close(found, own(images=stored, return_tensors="pt")["pixel_values"])
    assert found.shape[1:] == (3, 16, 16)
    assert "as the model's own processor makes them" in task.description
    assert task.score(open_model(str(folder)).model).num_examples == 11


def test_pixels_reach_from_minus_one_to_one(tmp_path):
    _, _, found = fed(model_folder(tmp_path, SETTINGS["mean and std"]), images(tmp_path))
    assert found.min() < -0.5
    assert found.max() > 0.5


def test_one_channel(tmp_path):
    settings = SETTINGS["mean and std"] | {"image_mean": [0.5], "image_std": [0.5]}
    folder = model_folder(tmp_path, settings, channels=1)
    for channels in (1, 3):
        task, _, found = fed(folder, images(tmp_path, channels=channels))
        assert found.shape[1:] == (1, 16, 16)
        assert task.score(open_model(str(folder)).model).num_examples == 11


def test_uint8_arrays_are_images_and_floats_are_not(tmp_path):
    folder = model_folder(tmp_path, SETTINGS["imagenet"])
    x = made_up.images(12, 20, 24)
    own = AutoImageProcessor.from_pretrained(folder)
    for stored in (x, x.transpose(0, 3, 1, 2)):
        np.savez(tmp_path / "data.npz", x=stored, y=np.arange(12) % 2)
        _, batch, found = fed(folder, tmp_path / "data.npz")
        torch.testing.assert_close(found, own(images=list(x[batch.rows]), return_tensors="pt")["pixel_values"])
    ready = np.random.default_rng(0).normal(size=(12, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=ready, y=np.arange(12) % 2)
    task, batch, found = fed(folder, tmp_path / "data.npz")
    torch.testing.assert_close(found, torch.from_numpy(ready[batch.rows]))
    assert "processor" not in task.description


def test_the_users_options_take_its_place(tmp_path):
    folder, data = model_folder(tmp_path, SETTINGS["mean and std"]), images(tmp_path)
    _, _, usual = fed(folder, data)
    _, _, found = fed(folder, data, mean=0.0, std=1.0)
    torch.testing.assert_close(found, (usual + 1) / 2)
    _, _, sized = fed(folder, data, image_size=8)
    assert sized.shape[1:] == (3, 8, 8)
    assert sized.min() < 0


def test_a_folder_without_a_processor_stays_as_it_was(tmp_path):
    _, batch, found = fed(model_folder(tmp_path, None), images(tmp_path), image_size=16)
    assert list(batch.inputs) == ["x"]
    assert 0 <= found.min() <= found.max() <= 1


def test_a_damaged_processor_is_said(tmp_path):
    folder, data = model_folder(tmp_path, SETTINGS["imagenet"]), images(tmp_path)
    source = open_model(str(folder))
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match="the image processor cannot be read"):
        Data("classification", data).open(source)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS["imagenet"] | {"image_mean": [1.0]}))
    task = Data("classification", data).open(source)
    with pytest.raises(DataError, match="image processor cannot take images of"):
        next(task.batches("eval"))
