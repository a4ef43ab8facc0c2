"""How long a text may be, and which tokens it may have, is known before a model is run."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tersor.core.errors import DataError
from tersor.tasks import open_task

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 128,
}


def letters(more=0, **options):
    vocab = {chr(code): code for code in range(128 + more)}
    made = Tokenizer(models.BPE(vocab, [], unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", **options)


@pytest.fixture
def long(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"{i} " + "words without end " * 20 for i in range(30)))
    return path


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert", "MPNet", "Longformer", "Bert"])
def test_positions_that_count_from_the_padding(long, kind):
    more = {"attention_window": 8} if kind == "Longformer" else {}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more, max_position_embeddings=66, pad_token_id=1)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    limit = 66 if kind == "Bert" else 64
    task = open_task(None, long, tokenizer=letters(pad_token=chr(1)), config=config, options={"max_examples": 4})
    assert f"at most {limit} tokens" in task.description
    task.prepare(model)
    assert task.score(model).value == 1.0


@pytest.mark.parametrize("task", ["perplexity", "fidelity", "classification"])
def test_tokens_beyond_the_vocabulary(tmp_path, task):
    path = tmp_path / ("a.txt" if task != "classification" else "a.csv")
    lines = [f"the letter {chr(140)} is none of its own" for _ in range(30)]
    path.write_text(
        "\n\n".join(lines) if task != "classification" else "text,label\n" + "\n".join(f"{x},1" for x in lines)
    )
    config = transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    options = {} if task == "classification" else {"context": 16}
    with pytest.raises(DataError, match=r"the data has token 140 .* vocabulary has 128 \(its tokenizer 160\)"):
        open_task(task, path, tokenizer=letters(more=32), config=config, options=options)
    open_task(
        task,
        path,
        tokenizer=letters(more=32),
        config=transformers.LlamaConfig(**SIZES | {"vocab_size": 160}),
        options=options,
    )


def test_a_padding_token_beyond_the_vocabulary_is_never_fed(long):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    tokenizer = letters(more=1, pad_token=chr(128))
    task = open_task(None, long, tokenizer=tokenizer, config=config, options={"max_examples": 4, "max_length": 16})
    model = transformers.BertModel(config).eval()
    task.prepare(model)
    assert task.score(model).value == 1.0


@pytest.mark.parametrize("limit", ["x", -1, True, [512]])
def test_a_tokenizer_whose_limit_is_no_number(long, limit):
    tokenizer = letters(pad_token=chr(1))
    tokenizer.model_max_length = limit
    with pytest.raises(DataError, match="model_max_length is"):
        open_task(None, long, tokenizer=tokenizer, config=transformers.BertConfig(**SIZES))
