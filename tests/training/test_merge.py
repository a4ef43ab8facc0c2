"""Merging adapters: nothing is lost in float weights, and less by re-solving than by rounding in packed ones."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tersor import compress
from tersor.checkpoint.adapters import CONFIG, TENSORS, Adapter, adapted_layers, load_adapter, put_in, save_adapter
from tersor.core.errors import InputError, ModelError
from tersor.nn.packed import PackedEmbedding, PackedLinear
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.tasks.perplexity import Perplexity
from tersor.tasks.split import Rows
from tersor.training import Job
from tersor.training.lora import LoraStep, adapt, block_sites
from tersor.training.masks import Masks
from tersor.training.merge import divergences, merge, merged_float, naive, unmerged
from training.test_lora import chain_windows, gpt2, llama, logits, trained


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Every test here runs on one thread."""


@pytest.fixture
def task():
    windows = chain_windows(num=96)
    return Perplexity(windows, Rows(np.arange(32), np.arange(32, 48), "a chain", np.arange(48, 96)), "a chain", "0")


def random_adapter(model, seed=0, size=0.05, **fields):
    """An adapter with both factors drawn at random."""
    adapted = adapt(model, LoraStep(rank=4, **fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                factor.normal_(std=size)
    adapter = adapted.adapter
    adapted.without()
    return adapter


def untied(model):
    """With a head of its own."""
    model.config.tie_word_embeddings = False
    torch.manual_seed(5)
    model.lm_head.weight = nn.Parameter(0.1 * torch.randn(model.lm_head.weight.shape))
    return model


def tied(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("dora", [False, True])
def test_in_float_weights_nothing_is_lost(task, build, dora):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = random_adapter(build(), dora=dora)
    merged = merge(model, adapter)
    torch.testing.assert_close(logits(merged, task), logits(unmerged(model, adapter), task), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged, task), logits(model, task), atol=1e-3)
    assert merged.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not adapted_layers(merged)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_the_merged_weight_is_the_textbooks():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    adapter = random_adapter(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), alpha=2)
    a, b = (adapter.tensors[f"base_model.model.1.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(merge(model, adapter)[1].weight, model[1].weight + 2 / 4 * b @ a)


def test_the_dtypes_stay(task):
    model = llama().bfloat16()
    model.model.norm.float()
    packed = compress(model, Recipe.of("int4-g64", exclude=["*.embed_tokens", "*.down_proj"])).model
    merged = merge(packed, random_adapter(llama()), task)
    for name, tensor in packed.state_dict().items():
        assert merged.state_dict()[name].dtype == tensor.dtype, name
    layer = merged.model.layers[0].mlp
    assert layer.up_proj.packed.dtype is torch.bfloat16
    assert layer.down_proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "scheme",
    ["nf4", "int4-g64/int8-dynamic", *(pytest.param(s, marks=pytest.mark.slow) for s in ("int4-g64", "int3-g32-asym"))],
)
def test_resolving_loses_less_than_rounding_and_keeps_the_format(task, scheme):
    model = llama()
    adapted, _, _ = trained(model, task, num_steps=30, rank=8, learning_rate=1e-2, base=scheme)
    adapter = adapted.adapter
    base = adapted.without()
    reference = unmerged(base, adapter)
    models = {"base": base, "naive": merge(base, adapter, task, method=naive), "solved": merge(base, adapter, task)}
    found = divergences(reference, models, task)
    assert found["solved"] < found["naive"] < found["base"]
    assert found["solved"] < 0.8 * found["naive"]
    for site in block_sites(base):
        name = site.owners[0].module
        one, two = base.get_submodule(name), models["solved"].get_submodule(name)
        assert one.packed.format == two.packed.format
        assert (one.input_quantizer is None) == (two.input_quantizer is None)
    assert task.score(models["solved"]).value < task.score(base).value


def test_a_site_without_an_adapter_keeps_its_very_codes(task):
    base = compress(llama(), Recipe.of("int4-g64", exclude=["*.embed_tokens"])).model
    adapter = random_adapter(llama(), targets=("up_proj",))
    merged = merge(base, adapter, task)
    for site in block_sites(base):
        name = site.owners[0].module
        codes = [m.get_submodule(name).packed.tensors["codes"] for m in (base, merged)]
        assert torch.equal(*codes) == (not name.endswith("up_proj"))


def test_gpt2s_transposed_layers_come_back_packed(task):
    base = compress(gpt2(), Recipe.of("int8", exclude=["*.wte", "*.wpe"])).model
    adapter = random_adapter(gpt2())
    merged = merge(base, adapter, task)
    folds = [{site.name: site.fold for site in find_sites(model)} for model in (base, merged)]
    assert folds[0] == folds[1]
    torch.testing.assert_close(logits(merged, task), logits(unmerged(base, adapter), task), rtol=0.1, atol=0.05)


def test_divergence_is_that_of_the_textbook(task):
    one, two = llama(), llama()
    with torch.no_grad():
        two.model.norm.weight.mul_(1.5)
    log_p, log_q = (logits(model, task).log_softmax(-1) for model in (one, two))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    small = Perplexity(task.windows, Rows(np.arange(0), task.rows.eval[:8], ""), "", "")
    found = divergences(one, {"same": one, "other": two}, small)
    assert found["same"] == 0
    assert found["other"] == pytest.approx(expected, rel=1e-4)


def test_the_recipe_step_trains_and_merges(task):
    recipe = Recipe.from_yaml(
        """
        steps:
        - {step: weights, scheme: int4-g64, exclude: ['*.embed_tokens']}
        - {step: lora, rank: 8, num_steps: 40, learning_rate: 0.01, batch_size: 8, num_evaluations: 0}
        """
    )
    model = llama()
    plain = compress(llama(), Recipe.of("int4-g64", exclude=["*.embed_tokens"])).model
    made = compress(model, recipe, task)
    assert task.score(made.model).value < 0.95 * task.score(plain).value
    assert isinstance(made.model.model.layers[0].mlp.up_proj, PackedLinear)
    assert made.curves[0].name == "lora"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), llama().parameters(), strict=True))


def test_pruned_weights_stay_pruned(task):
    model = llama()
    names = [site.name for site in block_sites(model)]
    masks = Masks({site.name: torch.rand(site.shape) < 0.5 for site in block_sites(model)})
    masks.apply(model)
    job = Job(model, llama(), task, masks=masks)
    LoraStep(num_steps=4, rank=4, learning_rate=1e-2, num_evaluations=0).run(job)
    for name in names:
        weight = job.model.get_submodule(name).weight
        assert not weight[~masks.masks[name]].any()
        assert weight[masks.masks[name]].any()


def test_a_wrong_or_damaged_adapter_is_refused(tmp_path):
    adapter = random_adapter(llama())
    save_adapter(adapter, tmp_path / "a", "base")
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="does not fit Sequential"):
        merge(other, adapter)
    short = dict(list(adapter.tensors.items())[1:])
    with pytest.raises(ModelError, match="the adapter lacks"):
        put_in(llama(), adapter.config, tensors=short)
    broken = {name: tensor * float("nan") for name, tensor in adapter.tensors.items()}
    with pytest.raises(InputError, match="cannot be merged"):
        merged_float(llama(), Adapter(adapter.config, broken))
    save_adapter(Adapter(adapter.config, broken), tmp_path / "nan", "base")
    with pytest.raises(ModelError, match="NaN"):
        load_adapter(tmp_path / "nan")
    with pytest.raises(ModelError, match="no adapter_config"):
        load_adapter(tmp_path)
    (tmp_path / "a" / TENSORS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ModelError, match="not a whole file of torch"):
        load_adapter(tmp_path / "a")
    torch.save(adapter.tensors, tmp_path / "a" / "adapter_model.bin")
    assert load_adapter(tmp_path / "a").tensors.keys() == adapter.tensors.keys()
    save_adapter(adapter, tmp_path / "nan", "base")
    (tmp_path / "nan" / CONFIG).write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match="IA3"):
        load_adapter(tmp_path / "nan")
    (tmp_path / "nan" / CONFIG).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(tmp_path / "nan")


def from_peft(model, folder, **fields):
    """An adapter as peft itself trains and saves it, and its logits beside the weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **fields))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(folder))
    return wrapped


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
    ],
    ids=str,
)
def test_embeddings_and_untied_heads_are_merged_as_peft_does(fields, task, tmp_path):
    """peft writes the base's own weights beside their factors."""
    model = untied(llama())
    wrapped = from_peft(untied(llama()), tmp_path / "adapter", **fields)
    merged = merge(model, load_adapter(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged, task), logits(wrapped, task), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(merged, task), logits(model, task), atol=1e-3)


def test_an_adapter_on_packed_embeddings_is_rounded_into_them(task, tmp_path):
    recipe = Recipe.of("keep", rules={"model.embed_tokens": "int8", "lm_head": "int8"})
    packed = compress(untied(llama()), recipe).model
    wrapped = from_peft(untied(llama()), tmp_path / "a", target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    adapter = load_adapter(tmp_path / "a")
    merged = merge(packed, adapter)
    assert isinstance(merged.model.embed_tokens, PackedEmbedding)
    assert isinstance(merged.lm_head, PackedLinear)
    expected = logits(wrapped, task)
    assert (logits(merged, task) - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(logits(unmerged(packed, adapter), task), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}], ids=str)
def test_an_adapter_on_tied_weights_is_refused_for_what_it_is(fields, tmp_path):
    from_peft(tied(llama()), tmp_path / "a", **fields)
    with pytest.raises(ModelError, match=r"whose weight is also that of .* \(tied\): merged, it would change both"):
        merge(tied(llama()), load_adapter(tmp_path / "a"))


def test_a_head_that_is_not_the_bases_is_refused(tmp_path):
    from_peft(untied(llama()), tmp_path / "a", target_modules=["lm_head"])
    other = untied(llama())
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    with pytest.raises(ModelError, match=r"its own weight for lm_head.*not that of the base"):
        merge(other, load_adapter(tmp_path / "a"))
