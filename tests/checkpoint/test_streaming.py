"""A checkpoint compressed part by part: the same bytes as in memory, and never more than a few blocks there."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import tersor
from cli_runner import tersor as run
from tersor import compress
from tersor.calibration.plan import survey
from tersor.checkpoint import open as opening
from tersor.checkpoint import streaming
from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.safetensors_header import read_spans, write_spans
from tersor.checkpoint.streaming import StreamedModel
from tersor.core.errors import ModelError, TersorError
from tersor.core.weights_file import write_weights
from tersor.jobs.compress import as_it_came
from tersor.jobs.settings import Output
from tersor.jobs.stream import stream
from tersor.recipe import Recipe
from tersor.search.choices import Choices
from tersor.tasks.data import Data

NUM_BLOCKS = 3


def write_checkpoint(folder, tied=True, dtype=torch.bfloat16, shard_size="10GB"):
    """A small Llama with a tokenizer of bytes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=128, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return with_tokenizer(folder)


def with_tokenizer(folder):
    """Of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(params=["fast", "slow"])
def halves(request, monkeypatch):
    """A processor that computes float16 and bfloat16 as fast as float32, and one that does not."""
    for module in (streaming, opening):
        monkeypatch.setattr(module, "computes", lambda dtype: request.param == "fast" or dtype == torch.float32)


@pytest.fixture
def choice(tmp_path):
    letters = torch.randint(97, 123, (4000,)).tolist()
    (tmp_path / "text.txt").write_bytes(bytes(letters))
    return Data("perplexity", tmp_path / "text.txt", options={"context": 16, "calibration_examples": 4})


def compress_streamed(folder, output, recipe, choice=Data(), **spec):
    return stream(ModelSpec(folder, **spec), Output(output), choice, Choices(recipe=recipe))


def in_memory(folder, recipe, choice, output):
    """Writes the artifact that `tersor.compress` would write, and measures nothing."""
    source = ModelSpec(folder).open_to_run()
    made = compress(source.model, recipe, choice.open(source))
    tersor.checkpoint.artifact.save(as_it_came(made.model, source), output, source=folder)
    return made


@pytest.mark.parametrize(
    ("tied", "recipe"),
    [
        (True, Recipe.of("gptq:int4-g32")),  # the tied head is fitted to its inputs, at the very end
        (False, Recipe.of("gptq:int3-g32", {"*embed_tokens": "nearest:int8"})),
        (True, Recipe.of("wanda(sparsity=0.5):bitmask", exclude=["*embed_tokens", "*.2.*"])),
        (False, Recipe.of("nearest:int8/int8-static", exclude=["lm_head"])),
        (True, Recipe.of("nearest:int8-g32")),
        (True, Recipe.of("autoround(num_steps=4):int4-g32", exclude=["*embed_tokens"])),
    ],
    ids=["gptq", "untied", "sparse", "static", "without data", "blocks tuned"],
)
def test_the_same_bytes_as_in_memory(tied, recipe, choice, halves, tmp_path):
    folder = write_checkpoint(tmp_path / "model", tied)
    made = in_memory(folder, recipe, choice, tmp_path / "whole")
    manifest = compress_streamed(folder, tmp_path / "streamed", recipe, choice)
    whole, streamed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert whole == streamed
    assert manifest["source"]["name"] == "model"  # and not where it lay
    assert str(tmp_path) not in (tmp_path / "streamed" / "tersor.json").read_text()
    assert str(tmp_path) not in (tmp_path / "streamed" / "README.md").read_text()
    assert manifest["site_reports"] == [report.to_dict() for report in made.sites]
    assert [p.name for p in (tmp_path / "streamed").iterdir() if "scratch" in p.name] == []


def test_a_task_that_looks_at_its_first_output_sees_that_of_the_whole_model(halves, tmp_path):
    """Token arrays: what the model returns is read only when it runs, and a walk may be the first to run it."""
    folder = write_checkpoint(tmp_path / "model", True)
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(0, 256, (6, 12)))
    choice = Data("fidelity", tmp_path / "ids.npz")
    in_memory(folder, Recipe.of("gptq:int4-g32"), choice, tmp_path / "whole")
    compress_streamed(folder, tmp_path / "streamed", Recipe.of("gptq:int4-g32"), choice)
    whole, streamed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert whole == streamed
    task = choice.open(ModelSpec(folder).open())
    survey(ModelSpec(folder).open().model, task, [])
    assert task.inputs.reading.output == "logits"
    assert task.inputs.reading.names == ("logits",)


TINY = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TINY, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FAMILIES = {  # experts stored one by one, names changed on the way in, masks of their own
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**EXPERTS),
    "olmoe": lambda: transformers.OlmoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **LLAMA | LATENT | {"num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**TINY, intermediate_size=32, max_position_embeddings=64),
    "bloom": lambda: transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(**TINY),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=256, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "family", [name if name == "mixtral" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_families_that_transformers_stores_or_runs_in_their_own_way(family, choice, tmp_path):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).save_pretrained(tmp_path / "model")
    folder, recipe = with_tokenizer(tmp_path / "model"), Recipe.of("gptq:int4-g32", exclude=["*.1.*"])
    in_memory(folder, recipe, choice, tmp_path / "whole")
    compress_streamed(folder, tmp_path / "streamed", recipe, choice)
    whole, streamed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert whole == streamed


def test_experts_that_do_not_go_together_are_refused(choice, tmp_path):
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    folder = with_tokenizer(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if ".experts.3." in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"model\.layers\.0\.mlp\.experts\..* hold 7168 values, and the model has 8192"
    ):
        compress_streamed(folder, tmp_path / "out", Recipe.of("nearest:int8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_shards_and_a_config_of_another_type(dtype, choice, tmp_path):
    """As transformers does, weights are cast to the type that the config names."""
    folder = write_checkpoint(tmp_path / "model", dtype=dtype, shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = Recipe.of("gptq:int4-g32", exclude=["*embed_tokens"])
    in_memory(folder, recipe, choice, tmp_path / "whole")
    compress_streamed(folder, tmp_path / "streamed", recipe, choice)
    whole, streamed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert whole == streamed


def test_never_more_than_a_few_blocks_are_there(choice, tmp_path, monkeypatch):
    """At every forward pass of a block, its own weights are there and those of no other block."""
    folder = write_checkpoint(tmp_path / "model")
    seen, block_context = [], StreamedModel.block_context

    def there(streamed):
        """Numbers of weights there, by block; what both models share counts once."""
        tensors = {}
        for model in (streamed.model, streamed.original):
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if not tensor.is_meta and ".layers." in name:
                    tensors[tensor.data_ptr()] = (name.split(".")[2], tensor.numel())
        blocks = {block for block, _ in tensors.values()}
        return blocks, sum(size for _, size in tensors.values())

    @contextmanager
    def watched(streamed, part):
        with block_context(streamed, part):
            seen.append((part, *there(streamed)))
            yield
            seen.append((part, *there(streamed)))
        assert there(streamed)[1] == 0

    monkeypatch.setattr(StreamedModel, "block_context", watched)
    compress_streamed(folder, tmp_path / "out", Recipe.of("gptq:int4-g32"), choice)
    streamed = StreamedModel(str(folder), tmp_path)
    size = sum(p.numel() for p in streamed.model.model.layers[0].parameters())
    assert {part for part, _, _ in seen} == {"", *(f"model.layers.{index}" for index in range(NUM_BLOCKS))}
    assert all(blocks <= {part.split(".")[-1]} for part, blocks, _ in seen if part)
    assert max(number for _, _, number in seen) <= 2 * size


def test_the_artifact_is_an_artifact(choice, tmp_path, capsys):
    """It loads, it is evaluated and inspected like any other, and says that nobody measured it."""
    folder = write_checkpoint(tmp_path / "model", tied=False)
    flags = ["--task", "perplexity", "--data", choice.path, "--task-option", "context=32"]
    made = run(capsys, "compress", folder, "-o", tmp_path / "out", "--format", "gptq:int4-g32", *flags, "--stream")
    assert made.status == 0, made.stderr
    assert [f"block {n}/{NUM_BLOCKS}" in made.stderr for n in range(1, NUM_BLOCKS + 1)] == [True] * NUM_BLOCKS
    assert "not measured" in made.stderr
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((tmp_path / "out" / "tersor.json").read_text())
    assert (manifest["scorecards"], manifest["verdict"]) == ([], None)
    assert Recipe.from_file(tmp_path / "out" / "recipe.yaml").weights[0].scheme.startswith("gptq")
    with torch.no_grad():
        assert torch.isfinite(tersor.load(tmp_path / "out")(torch.arange(8)[None]).logits).all()
    assert run(capsys, "evaluate", tmp_path / "out", *flags, "--batch", "1", "--json").json["scorecard"]["score"] > 1
    assert (
        len(run(capsys, "inspect", tmp_path / "out", "--format", "int8", "--json").json["sites"]) == 7 * NUM_BLOCKS + 2
    )


def damaged(change, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"lacks {NORM}"),
        (lambda tensors: tensors.update({NORM: torch.ones(3)}), rf"{NORM} is \(3,\)"),
        (lambda tensors: tensors[NORM].fill_(torch.nan), f"{NORM}: 32 of 32 values are NaN"),
    ],
    ids=["missing", "another shape", "NaN"],
)
def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(change, message, choice, tmp_path):
    folder = damaged(change, tmp_path)
    with pytest.raises(ModelError, match=message):
        compress_streamed(folder, tmp_path / "out", Recipe.of("gptq:int4-g32"), choice)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}


def test_unused_tensors_are_left_out_and_said(choice, tmp_path):
    folder = damaged(lambda tensors: tensors.update(more=torch.ones(3)), tmp_path)
    manifest = compress_streamed(folder, tmp_path / "out", Recipe.of("nearest:int8"), choice)
    assert any("does not use more" in note for note in manifest["notes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "1MB"], "--stream cannot share out a budget"),
        (["--format", "int4-g32", "--transform", "smooth"], "--stream does one weights step"),
        (["--format", "int4-g32", "--bias-correction"], "--stream leaves biases as they are"),
        (["--format", "int4-g7x"], "unknown"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(flags, message, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model")
    made = run(capsys, "compress", folder, "-o", tmp_path / "out", *flags, "--stream")
    assert made.status == 2
    assert message in made.stderr
    assert not (tmp_path / "out").exists()


def test_a_method_that_wants_the_curvature_does_without_and_says_so(choice, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    manifest = compress_streamed(folder, tmp_path / "out", Recipe.of("mse:int4-g32"), choice)
    assert any("curvature" in note for note in manifest["notes"])


@pytest.mark.parametrize("name", ["package.module:factory", "no/such/folder/there"])
def test_only_folders_are_streamed(name, tmp_path):
    with pytest.raises(TersorError, match=name):
        StreamedModel(name, tmp_path)


def test_extents_are_safetensors(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.int16).view(2, 3),
        "a": torch.rand(3).bfloat16(),
        "é": torch.ones(()),
        "empty": torch.ones(0, 4, dtype=torch.float16),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
    }
    write_weights(tensors, tmp_path / "one")
    spans = read_spans(tmp_path / "one")
    for name, tensor in tensors.items():
        assert torch.equal(spans[name].read().float(), tensor.float())
    write_spans(spans, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    whole = (tmp_path / "one").read_bytes()
    for broken in (whole[:-1], whole[:20], b"", b"\xff" * 16, whole.replace(b"I16", b"I61")):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            read_spans(tmp_path / "broken")


@pytest.mark.parametrize("tied", [True, False])
def test_coded_weights_are_streamed_into_a_coded_file(tied, tmp_path, choice, capsys):
    """Every number that is said of the file is the file's."""
    folder = write_checkpoint(tmp_path / "checkpoint", tied)
    rules = ["--rule", "*.embed_tokens=int8-g32", "--rule", "*.self_attn.*=int4-g32"]
    made = run(
        capsys, "compress", folder, "--stream", "--format", "waterfill(level=0.001):coded", *rules,
        "--task", "perplexity", "--data", choice.path, "--task-option", "context=32", "-o", tmp_path / "streamed",
    )  # fmt: skip
    assert made.status == 0, made.stderr
    manifest = json.loads((tmp_path / "streamed" / "tersor.json").read_text(encoding="utf-8"))
    file = tmp_path / "streamed" / "model.tersor"
    assert not (tmp_path / "streamed" / "model.safetensors").exists()
    assert manifest["files"]["model.tersor"]["bytes"] == file.stat().st_size
    assert f"to {file.stat().st_size / 1e3:.2f} kB" in made.stdout
    reported = sum(report["num_bytes"] for report in manifest["site_reports"])
    assert 0.5 * reported < file.stat().st_size < 1.5 * reported
    tokens = torch.arange(20).unsqueeze(0)
    expected = LlamaForCausalLM.from_pretrained(folder)(tokens).logits.float()
    error = tersor.load(tmp_path / "streamed")(tokens).logits.float() - expected
    assert error.norm() < 0.3 * expected.norm()
