"""Models of images, of sound, and of several inputs are fed what they take, whatever they return."""

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tersor.calibration.curvature import estimate_fisher
from tersor.core.errors import DataError, InputError
from tersor.tasks import made_up, open_task
from tersor.tasks.takes import takes

BLOCKS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**BLOCKS, "intermediate_size": 16, "vocab_size": 128, "max_position_embeddings": 32}
TEXT |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
VISION = {**BLOCKS, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
SOUND = {**BLOCKS, "intermediate_size": 16, "conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (160, 2)}
SOUND |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SEGMENT = {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
BOTH = {"text_config": TEXT, "vision_config": VISION}
SPECTRUM = {**BLOCKS, "intermediate_size": 16, "max_length": 32, "num_mel_bins": 32}

KINDS = {  # architecture: configuration, its sizes, what it is fed, how its output is judged
    "CLIPModel": ("CLIPConfig", {**BOTH, "projection_dim": 8}, "images and text", "embedding"),
    "SiglipModel": ("SiglipConfig", BOTH, "images and text", "embedding"),
    "BlipModel": ("BlipConfig", {**BOTH, "projection_dim": 8}, "images and text", "embedding"),
    "BlipForConditionalGeneration": ("BlipConfig", BOTH, "images and text", "logits"),
    "BlipForImageTextRetrieval": ("BlipConfig", BOTH, "images and text", "values"),
    "CLIPVisionModel": ("CLIPVisionConfig", VISION, "images", "embedding"),
    "Dinov2Model": ("Dinov2Config", {**BLOCKS, "image_size": 16, "patch_size": 8}, "images", "embedding"),
    "ViTForImageClassification": ("ViTConfig", VISION, "images", "logits"),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {**SEGMENT, "num_labels": 7, "image_size": 32},
        "images",
        "logits",
    ),
    "HubertModel": ("HubertConfig", SOUND, "waves", "embedding"),
    "HubertForCTC": ("HubertConfig", {**SOUND, "vocab_size": 9}, "waves", "logits"),
    "ASTForAudioClassification": ("ASTConfig", SPECTRUM, "waves", "logits"),
    "BertForQuestionAnswering": ("BertConfig", {**TEXT, "intermediate_size": 16}, "text", "values"),
    "BertForNextSentencePrediction": ("BertConfig", {**TEXT, "intermediate_size": 16}, "text", "logits"),
    "BertForPreTraining": ("BertConfig", {**TEXT, "intermediate_size": 16}, "text", "values"),
}


@pytest.fixture(scope="module")
def padded():
    """A tokenizer of single ASCII characters."""
    vocab = {chr(code): code for code in range(128)}
    made = Tokenizer(models.BPE(vocab, [], unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="\x00", eos_token="\x01")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr("tersor.tasks.several.NUM_MADE_UP", 24)
    monkeypatch.setattr(transformers.utils.logging, "_default_log_level", 40)
    transformers.utils.logging.set_verbosity_error()


def make(architecture):
    kind, sizes, *_ = KINDS[architecture]
    config = getattr(transformers, kind)(**copy.deepcopy(sizes))
    config.architectures = [architecture]
    torch.manual_seed(0)
    return getattr(transformers, architecture)(config).eval()


def damaged(model):
    copied = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(parameter.std(correction=0) * torch.randn_like(parameter))
    return copied


@pytest.mark.parametrize("architecture", KINDS)
def test_without_data(architecture, padded):
    _, _, fed, output = KINDS[architecture]
    model = make(architecture)
    assert takes(model.config) == fed
    options = {"max_examples": 12, "calibration_examples": 4} | ({"max_length": 16} if "text" in fed else {})
    tokenizer = padded if "text" in fed else None
    task = open_task(None, None, tokenizer=tokenizer, config=model.config, options=options)
    task.prepare(model)
    assert task.output == output
    assert task.score(model).value == 1.0
    assert task.score(damaged(model)).value < 1.0
    stats = estimate_fisher(model, task)
    assert any(each.row_weight.any() for each in stats.values())


def test_an_npz_by_name_and_the_users_own_images_and_texts(tmp_path, padded):
    model = make("CLIPModel")
    generator = np.random.default_rng(0)
    arrays = {
        "input_ids": generator.integers(3, 128, (20, 8)),
        "pixel_values": generator.normal(size=(20, 3, 16, 16)),
        "attention_mask": np.ones((20, 8), np.int64),
    }
    np.savez(tmp_path / "pairs.npz", **arrays)
    (tmp_path / "texts.txt").write_text("\n".join(f"an image of {i} things" for i in range(20)))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(made_up.images(20, 16, 16)):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    for name, said in [
        ("pairs.npz", "inputs input_ids, pixel"),
        ("texts.txt", "made-up images"),
        ("images", "texts"),
    ]:
        task = open_task(None, tmp_path / name, tokenizer=padded, config=model.config)
        task.prepare(model)
        assert said in task.description
        assert task.score(model).value == 1.0
        assert len(task.rows.eval) == 18


def test_what_a_model_cannot_be_fed_is_said(tmp_path, padded):
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n\nthree")
    with pytest.raises(DataError, match="this model takes waves, and the data is text"):
        open_task(None, tmp_path / "texts.txt", config=make("HubertModel").config)
    for kind in ("T5", "Bart", "Whisper"):
        config = getattr(transformers, f"{kind}Config")()
        config.architectures = [f"{kind}ForConditionalGeneration"]
        with pytest.raises(InputError, match=f"{kind}ForConditionalGeneration is an encoder-decoder model"):
            open_task(None, None, tokenizer=padded, config=config)
        (tmp_path / "long.txt").write_text("words " * 500)
        with pytest.raises(InputError, match="task perplexity"):
            open_task("perplexity", tmp_path / "long.txt", tokenizer=padded, config=config)


def test_made_up_examples_are_the_same_each_time_and_of_natural_spread():
    images, sound = made_up.images(3, 16, 24), made_up.waves(2, 1600)
    assert np.array_equal(images, made_up.images(3, 16, 24))
    assert (images.shape, images.min(), images.max()) == ((3, 16, 24, 3), 0, 255)
    assert np.allclose([sound.mean(), sound.std()], [0, 1], atol=1e-3)
    large = made_up.images(2, 64, 64).astype(float)
    assert np.abs(np.diff(large, axis=1)).mean() < 0.75 * np.abs(large[:, :32] - large[:, 32:]).mean()  # neighbours
