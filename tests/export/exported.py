"""What an export must compute, and a small tokenizer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

import tersor
from tersor.checkpoint.layout import packed_sites

TEXT = [line for line in (tersor.__doc__ or "").splitlines() if line] * 4
IDS = torch.arange(24).view(2, 12) * 7 % 256


def byte_level(split: pre_tokenizers.PreTokenizer | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens."""
    bpe = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = last if split is None else pre_tokenizers.Sequence([split, last])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", bos_token="<|start|>")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits.float()


def expected(folder: Path) -> torch.Tensor:
    """What the artifact computes in float32."""
    return logits(tersor.load(folder).float())


def weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """Every packed weight of an artifact, decoded, by the name of its module."""
    return {site.owners[0].module: packed.encoded.decode() for site, packed, _ in packed_sites(tersor.load(folder))}
