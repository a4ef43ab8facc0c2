"""LoRA and QLoRA: the layers say what the papers say, files are peft's, and a packed base costs no float memory."""

import copy
import gc
import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tersor import compress
from tersor.checkpoint.adapters import ADAPTER, Adapter, adapted_layers, load_adapter, put_in, save_adapter
from tersor.core.errors import DataError, InputError, UnknownName
from tersor.methods.stats import Stats
from tersor.nn.packed import PackedLinear
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.schemes.scheme import Scheme
from tersor.tasks.perplexity import Perplexity
from tersor.tasks.split import Rows
from tersor.tasks.windows import Windows
from tersor.training.job import Job
from tersor.training.lora import LoraStep, adapt, block_sites, short_names, train_adapter


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Every test here runs on one thread."""


def chain_windows(num=48, length=24, vocab=32, seed=0):
    """Tokens that follow one another by a noisy rule: token n is followed by 5 n + 1."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((num, length), dtype=np.int64)
    ids[:, 0] = rng.integers(vocab, size=num)
    for j in range(1, length):
        random = rng.random(num) < 0.2
        ids[:, j] = np.where(random, rng.integers(vocab, size=num), (5 * ids[:, j - 1] + 1) % vocab)
    return Windows(ids, np.ones(num, dtype=np.int64))


@pytest.fixture
def task():
    rows = Rows(np.arange(8), np.arange(8, 16), "a chain", np.arange(16, 48))
    return Perplexity(chain_windows(), rows, "a chain", "0")


SIZES = {"vocab_size": 32, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def llama(**more):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True, **more)
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=4, n_positions=32)).eval()


def logits(model, task):
    with torch.no_grad():
        return task.forward(model, next(task.batches("eval", 8)))


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model, task, **fields):
    step = LoraStep(
        **{"num_steps": 6, "rank": 4, "learning_rate": 5e-3, "batch_size": 8, "num_evaluations": 0} | fields
    )
    job = Job(model, model, task)
    return *train_adapter(job, step), job


STEP = {"num_steps": 25, "rank": 8, "learning_rate": 1e-2, "batch_size": 8, "num_evaluations": 0}


# The layer.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "int4-g64", "int8/int8-dynamic"])
def test_the_gradient_through_a_packed_layer_is_that_of_its_decoded_weight(format, bias):
    model = nn.Sequential(nn.Linear(64, 24, bias=bias))
    site, scheme = find_sites(model)[0], Scheme.parse(format)
    encoded = scheme.method.compress(site.matrix(model), scheme.format, Stats())
    reference = encoded.decode()
    offset = model[0].bias
    site.replace(model, encoded)
    x = torch.randn(3, 5, 64, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    weights = torch.randn(3, 5, 24)
    found = torch.autograd.grad((model(x) * weights).sum(), [x, *([offset] if bias else [])])
    expected = torch.autograd.grad(
        (F.linear(other, reference, offset) * weights).sum(), [other, *([offset] if bias else [])]
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(model(x), F.linear(other, reference, offset))


def test_quantized_inputs_let_the_gradient_straight_through():
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    site, scheme = find_sites(model)[0], Scheme.parse("int8-dynamic")
    made = compress(model, Recipe.of("int8-dynamic")).model
    x = torch.randn(5, 64, requires_grad=True)
    y = made(x)
    quantized = made[0].input_quantizer.activation.fake_quantize(x.detach())
    torch.testing.assert_close(y, F.linear(quantized, made[0].weight), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, made[0].weight.sum(0).expand(5, 64))
    assert site.name == "0"
    assert scheme.activation == "int8-dynamic"


def test_no_decoded_weight_outlives_the_forward_pass(monkeypatch):
    """Between forward and backward a packed layer keeps neither its float weight nor its input."""
    model = compress(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), Recipe.of("nf4")).model
    alive = []
    decode = type(model[0].packed).matrix

    def noted(self):
        weight = decode(self)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(type(model[0].packed), "matrix", noted)
    y = model(torch.randn(4, 64, requires_grad=True))
    gc.collect()
    assert len(alive) == 2
    assert not any(weight() is not None for weight in alive)
    y.sum().backward()
    assert len(alive) == 4  # decoded again


@pytest.mark.parametrize("base", ["keep", "nf4", "int4-g32"])
def test_an_adapted_layer_adds_the_scaled_product(task, base):
    """y = W x + alpha / rank * B (A x), by hand."""
    model = llama()
    adapted = adapt(model, LoraStep(rank=4, alpha=12, base=base))
    name, layer = next(iter(adapted_layers(model).items()))
    weight = layer.get_base_layer().weight.detach()
    assert isinstance(layer.get_base_layer(), PackedLinear) == (base != "keep")
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(layer(x), x @ weight.t())  # B starts at zero
    with torch.no_grad():
        b.normal_()
    torch.testing.assert_close(layer(x), x @ weight.t() + 3 * (x @ a.t()) @ b.t())
    assert name in {site.owners[0].module for site in block_sites(llama())}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    assert adapted.packed == {}


# Training.


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("base", "dora"),
    [
        *(("keep", False), ("keep", True), ("nf4-dq", True), ("int4-g64", False)),
        *(pytest.param("nf4-dq", False, marks=SLOW), pytest.param("int4-g64", True, marks=SLOW)),
    ],
)
def test_it_learns_and_leaves_the_base_alone(task, base, dora):
    model = llama()
    packed = llama()
    if base != "keep":
        adapt(packed, LoraStep(base=base)).without()
    before = states(packed)
    adapted, curve, _ = trained(model, task, **STEP, base=base, dora=dora)
    assert np.mean(curve.losses[-5:]) < 0.9 * curve.losses[0]
    assert task.score(adapted.model).value < 0.9 * task.score(packed).value  # on windows it was not trained on
    after = states(adapted.without())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.numel())


def test_gradient_checkpointing_gives_the_same_adapter(task):
    factors = []
    for flag in (False, True):
        adapted, _, _ = trained(llama(), task, base="nf4", gradient_checkpointing=flag)
        factors.append(adapted.adapter.tensors)
    for name, tensor in factors[0].items():
        torch.testing.assert_close(factors[1][name], tensor)


def test_gpt2s_transposed_layers_are_adapted_packed_and_float(task):
    for base in ("keep", "int4-g64"):
        adapted, curve, _ = trained(gpt2(), task, **STEP, base=base)
        assert curve.losses[-1] < curve.losses[0]
        assert adapted.adapter.config.fan_in_fan_out


def test_a_killed_run_ends_in_the_adapter_of_one_that_was_not(task, tmp_path, monkeypatch):
    from tersor.training import lora
    from tersor.training.journal import Journal

    straight, _, _ = trained(llama(), task, base="nf4", dropout=0.1)

    def dying(*args, **more):
        def die(done, _):
            if done == 3:
                raise KeyboardInterrupt

        return original(*args, **more, on_step=die)

    original = lora.train
    step = LoraStep(num_steps=6, rank=4, learning_rate=5e-3, batch_size=8, num_evaluations=0, base="nf4", dropout=0.1)
    model = llama()
    monkeypatch.setattr(lora, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(Job(model, model, task, journal=Journal(tmp_path / "j", "key", seconds=0)), step)
    monkeypatch.undo()
    model = llama()
    resumed, _ = train_adapter(Job(model, model, task, journal=Journal(tmp_path / "j", "key", seconds=0)), step)
    one, two = straight.adapter.tensors, resumed.adapter.tensors
    assert all(torch.equal(one[name], two[name]) for name in one)


# Files.


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"init": "pissa"}, {"targets": ("q_proj", "mlp.up_proj")}])
def test_plain_peft_reads_the_adapter_on_the_float_base(task, tmp_path, fields):
    adapted, _, _ = trained(llama(), task, **fields)
    expected = logits(adapted.model, task)
    save_adapter(adapted.adapter, tmp_path / "adapter", "the/base")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    plain = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    found = logits(plain, task)
    if fields.get("init") == "pissa":  # the weights were taken apart and put together again
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(found, expected)
    assert not torch.allclose(found, logits(llama(), task), atol=0.01)


@pytest.mark.parametrize("base", ["nf4", "nf4-dq", "int8"])
def test_plain_peft_reads_a_packed_bases_adapter_on_its_decoded_weights(task, tmp_path, base):
    adapted, _, _ = trained(llama(), task, base=base)
    expected = logits(adapted.model, task)
    save_adapter(adapted.adapter, tmp_path / "adapter", "the/base")
    decoded = llama()
    for site in block_sites(decoded):
        scheme = Scheme.parse(base)
        module = decoded.get_submodule(site.owners[0].module)
        module.weight.data = scheme.method.compress(site.matrix(decoded), scheme.format, Stats()).decode()
    found = logits(PeftModel.from_pretrained(decoded, tmp_path / "adapter").eval(), task)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    on_float = logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval(), task)
    apart, step = (on_float - expected).std(), (logits(decoded, task) - logits(llama(), task)).std()
    assert apart < 2 * step  # what packing changed, and no more


def test_an_adapter_goes_out_and_in(task, tmp_path):
    adapted, _, _ = trained(llama(), task, base="int4-g64", dora=True)
    save_adapter(adapted.adapter, tmp_path / "a", "base")
    expected = logits(adapted.model, task)
    again = load_adapter(tmp_path / "a")
    model = adapted.without()
    assert not torch.allclose(logits(model, task), expected)
    assert torch.equal(logits(put_in(model, again.config, tensors=again.tensors).model, task), expected)


# Starts.


def test_pissa_leaves_the_function_alone_and_starts_at_the_largest_components():
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    adapted = adapt(model, LoraStep(rank=4, init="pissa"))
    layer = adapted_layers(model)["model.layers.0.mlp.up_proj"]
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(layer.get_delta_weight(ADAPTER), (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.get_base_layer().weight + layer.get_delta_weight(ADAPTER), weight)
    torch.testing.assert_close(adapted.without().model.layers[0].mlp.up_proj.weight.detach(), weight)


def test_eora_starts_closer_to_the_float_model_the_larger_its_rank(task):
    reference = logits(llama(), task)
    errors = []
    for fields in ({"rank": 8}, {"rank": 8, "init": "eora"}, {"rank": 32, "init": "eora"}):
        model = llama()
        adapt(model, LoraStep(base="int2-g64", **fields), task)
        errors.append((logits(model, task) - reference).square().mean().item())
    assert errors[2] < 0.6 * errors[1] < 0.6 * errors[0]


# bitsandbytes.


@pytest.mark.parametrize("base", [pytest.param("nf4", marks=SLOW), "nf4-dq"])
def test_bitsandbytes_runs_the_same_numbers_and_learns(task, base):
    pytest.importorskip("bitsandbytes")
    ours, theirs = llama(), llama()
    adapt(ours, LoraStep(base=base))
    adapted, curve, _ = trained(theirs, task, **STEP, base=base, runs_on="bitsandbytes")
    assert len(adapted.packed) == 14
    assert curve.losses[-1] < 0.9 * curve.losses[0]
    with adapted.peft.disable_adapter():
        torch.testing.assert_close(logits(theirs, task), logits(ours, task), rtol=1e-4, atol=1e-5)
    back = adapted.without()
    assert isinstance(back.model.layers[0].mlp.up_proj, PackedLinear)


# Targets.


def test_targets_are_all_linear_layers_of_the_blocks_the_usual_ones_or_named():
    model = llama()
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(adapt(copy.deepcopy(model), LoraStep()).peft.peft_config[ADAPTER].target_modules) == sorted(kinds)
    for targets, number in (("usual", 4), (("up_proj",), 2), (("layers.1.mlp.up_proj",), 1)):
        one = copy.deepcopy(model)
        adapt(one, LoraStep(targets=targets))
        assert len(adapted_layers(one)) == number
    with pytest.raises(UnknownName, match="did you mean 'up_proj'"):
        adapt(copy.deepcopy(model), LoraStep(targets=("upp_proj",)))
    assert short_names(["model.layers.0.mlp.up_proj"], model) == ["model.layers.0.mlp.up_proj"]


def test_any_torch_model_can_be_adapted_and_a_head_trained_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    adapted = adapt(model, LoraStep(targets=("0",), modules_to_save=("2",), base="keep"))
    assert list(adapted_layers(model)) == ["0"]
    names = sorted(adapted.adapter.tensors)
    assert names == [f"base_model.model.{n}" for n in ("0.lora_A.weight", "0.lora_B.weight", "2.bias", "2.weight")]
    with pytest.raises(UnknownName, match="module to save"):
        adapt(nn.Sequential(nn.Linear(4, 4)), LoraStep(modules_to_save=("head",)))


# What does not go.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "pissa", "base": "nf4"}, "use init=eora"),
        ({"init": "eora"}, "add base=nf4"),
        ({"init": "pissa", "dora": True}, "use init=zero"),
        ({"init": "pissa", "rank": 400}, "smaller rank"),
        ({"runs_on": "bitsandbytes", "base": "int8"}, "nf4 or nf4-dq"),
    ],
)
def test_what_does_not_go_together_is_said_before_training(fields, message):
    with pytest.raises(InputError, match=message):
        adapt(llama(), LoraStep(**fields))


def test_bad_settings_name_the_place():
    for settings, message in [
        ("base: nf5", "nf4"),
        ("rank: 0", "rank"),
        ("dropout: 1", "dropout"),
        ("alpha: .nan", "alpha"),
    ]:
        with pytest.raises(InputError, match=message):
            Recipe.from_yaml(f"steps: [{{step: lora, {settings}}}]")
    with pytest.raises(DataError, match="train split"):
        LoraStep().run(Job(llama(), llama(), None))


def test_what_is_written_does_not_depend_on_the_order_of_hashes(tmp_path):
    """peft keeps names as sets, and lists them as these come."""
    import peft

    names = ["q", "value", "key_proj", "o", "gate", "up", "down"]
    adapter = Adapter(peft.LoraConfig(target_modules=names, exclude_modules=names[:3]), {"a": torch.zeros(1)})
    save_adapter(adapter, tmp_path, "the/base")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(names)
    assert written["exclude_modules"] == sorted(names[:3])
    assert adapter.config.target_modules == set(names)
