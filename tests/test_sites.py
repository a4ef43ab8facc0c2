"""Laws of sites: what is found, and that a packed model is the float model with the decoded weights.

"Equal" below is bit for bit. The one exception is `nn.TransformerEncoder`, whose fused kernel reads float weights: the
packed model leaves it and takes PyTorch's plain path, which rounds differently.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tersor
from tersor.activations.quantizers import Int8Dynamic
from tersor.core.errors import FormatError
from tersor.formats import format_named
from tersor.kernels import choice, reference
from tersor.methods.stats import Stats
from tersor.nn.in_place import DECODED
from tersor.nn.packed import PackedConv, PackedEmbedding, PackedLinear, PackedWeight, packed_parameters
from tersor.nn.sites import SMALLEST_STACK, find_sites
from tersor.recipe import Recipe
from tersor.schemes.scheme import Scheme
from zoo import PRETRAINED, ZOO, Experts, ScaledEmbedding, TiedHead, decoded, original, with_schemes

SCHEMES = ["nearest:int4", "nearest:int3-asym", "bf16", "bitmask"]
PACKED_BY = "nearest:int4"


def packed(name: str, scheme: str = PACKED_BY) -> nn.Module:
    return tersor.compress(original(name), Recipe.of(scheme)).model


def same(ours: list[Tensor], theirs: list[Tensor], exact: bool = True) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    if exact:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


# What is found.

WHERE = {
    "linear": {"0": (7, 10), "2": (5, 7)},
    "conv1d": {"0": (6, 10), "1": (3, 6)},
    "conv2d": {"0": (8, 18), "2": (6, 48), "3": (6, 9)},
    "conv3d": {"0": (4, 54)},
    "conv transposed": {"0": (3, 36)},
    "embedding": {"0": (50, 12)},
    "embedding max_norm": {"0": (50, 12)},
    "embedding bag": {"0": (50, 12)},
    "rnn": {"0.weight_ih_l0": (10, 6), "0.weight_hh_l0": (10, 10)},
    "lstm cell": {"cell.weight_ih": (40, 6), "cell.weight_hh": (40, 10)},
    "attention": {"attention.in_proj_weight": (48, 16), "attention.out_proj": (16, 16)},
    "attention apart": {
        "attention.q_proj_weight": (16, 16),
        "attention.k_proj_weight": (16, 10),
        "attention.v_proj_weight": (16, 12),
        "attention.out_proj": (16, 16),
    },
    "experts": {"weights": (48, 20)},
    "tied head": {"embed": (40, 12), "mix": (12, 12)},
    "tied inside": {"there": (32, 16)},
    "shared layer": {"first": (8, 8)},
    "own linear": {"0": (5, 9)},
    "own embedding": {"0": (50, 12)},
}


@pytest.mark.parametrize("name", WHERE)
def test_each_weight_is_found_as_a_matrix(name):
    assert {site.name: site.shape for site in find_sites(original(name))} == WHERE[name]


def test_rnn_finds_every_layer_direction_and_projection():
    names = [site.name for site in find_sites(original("lstm"))]
    layers = ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert names == [f"weight_{kind}_{layer}" for layer in layers for kind in ("ih", "hh", "hr")]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("tied head", {"embed": 2}),
        ("tied inside", {"there": 2}),
        ("shared layer", {"first": 2}),
        ("llama", {"model.embed_tokens": 2}),
        ("gpt2", {"transformer.wte": 2}),
        ("t5", {"shared": 4}),
    ],
)
def test_a_tied_weight_is_one_site_with_all_its_places(name, places):
    tied = {site.name: len(site.owners) for site in find_sites(original(name)) if len(site.owners) > 1}
    assert tied == places


@pytest.mark.parametrize("name", PRETRAINED)
def test_every_matrix_of_a_pretrained_model_is_a_site(name):
    model = original(name)
    found = {site.parameter for site in find_sites(model)}
    # Position codes, routers and state matrices are no layer's weight, and small.
    others = {n for n, p in model.named_parameters() if p.dim() > 1} - found
    assert all(other.endswith((".A_log", "mlp.gate.weight", "class_embedding")) for other in others), others
    assert sum(site.num_weights for site in find_sites(model)) > 0.8 * sum(p.numel() for p in model.parameters())


def test_only_stacks_of_real_matrices_are_taken_for_experts():
    side = SMALLEST_STACK
    model = nn.ParameterDict({"a": torch.zeros(2, side, side), "b": torch.zeros(2, side, side - 1)})
    model["c"], model["d"] = torch.zeros(1, side, side), torch.zeros(side, side)
    assert [site.name for site in find_sites(model)] == ["a"]


def test_a_recurrent_weight_that_is_computed_is_a_site_like_the_others():
    lstm = nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    assert {site.name for site in find_sites(lstm)} == {"weight_ih_l0", "weight_hh_l0"}
    small, x = tersor.compress(lstm, Recipe.of("int8")).model, torch.randn(5, 4)
    torch.testing.assert_close(small(x)[0], lstm(x)[0], rtol=0, atol=0.05)


def test_integer_weights_are_no_sites():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert find_sites(nn.Sequential(layer)) == []


# The law: a packed model is the float model with the decoded weights.


@pytest.mark.parametrize(("name", "scheme"), with_schemes(SCHEMES))
def test_packed_equals_decoded(name, scheme):
    case, model = ZOO[name], original(name)
    small = packed(name, scheme)
    assert same(case.run(small), case.run(decoded(model, small)), case.exact)
    assert not same(case.run(small), case.run(model)), "the format changed nothing"


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.prompt])
@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_generates_what_the_decoded_model_generates(name, scheme):
    small = packed(name, scheme)
    assert torch.equal(ZOO[name].generate(small), ZOO[name].generate(decoded(original(name), small)))


@pytest.mark.parametrize("name", ZOO)
def test_the_original_stays_as_it_was(name):
    case, model = ZOO[name], original(name)
    before, weights = case.run(model), {n: p.clone() for n, p in model.named_parameters()}
    small = tersor.compress(model, Recipe.of("keep", {find_sites(model)[0].name: PACKED_BY})).model
    with torch.no_grad():
        for parameter in small.to(torch.bfloat16).parameters():
            parameter.zero_()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert same(case.run(model), before)


@pytest.mark.parametrize("name", ZOO)
def test_keeping_everything_keeps_the_function_and_the_ties(name):
    case, model = ZOO[name], original(name)
    kept = tersor.compress(model, Recipe.of("keep")).model
    assert find_sites(kept) == find_sites(model)
    assert same(case.run(kept), case.run(model))
    assert len(list(kept.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ZOO)
def test_a_packed_model_has_the_same_sites(name):
    assert set(find_sites(packed(name))) == set(find_sites(original(name)))
    assert [site.name for site in find_sites(packed(name))] == [site.name for site in find_sites(original(name))]


@pytest.mark.parametrize("name", ZOO)
def test_packing_twice_is_packing_the_decoded_weights(name):
    case = ZOO[name]
    once = packed(name, "nearest:int6")
    twice = tersor.compress(once, Recipe.of("nearest:int4")).model
    straight = tersor.compress(decoded(original(name), once), Recipe.of("nearest:int4")).model
    assert same(case.run(twice), case.run(straight), case.exact)


def reachable(thing: Any, seen: dict[int, Any]) -> dict[int, Tensor]:
    """Every tensor a model holds, in whatever attribute, by identity."""
    if id(thing) in seen:
        return {}
    seen[id(thing)] = thing
    if isinstance(thing, Tensor):
        return {id(thing): thing}
    if isinstance(thing, nn.Module):
        thing = thing.__dict__
    inside = list(thing.values()) if isinstance(thing, dict) else thing
    found: dict[int, Tensor] = {}
    for item in inside if isinstance(inside, list | tuple | set) else ():
        found |= reachable(item, seen)
    return found


def num_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in reachable(model, {}).values())


@pytest.mark.parametrize("scheme", ["nearest:int4", "bitmask"])
@pytest.mark.parametrize("name", ZOO)
def test_no_float_copy_of_a_weight_stays(name, scheme):
    case, model = ZOO[name], original(name)
    made = tersor.compress(model, Recipe.of(scheme))
    case.run(made.model)
    floats = sum(4 * site.num_weights for site in find_sites(model))
    assert num_bytes(made.model) == num_bytes(model) - floats + sum(site.num_bytes for site in made.sites)


@pytest.mark.parametrize("name", ZOO)
def test_deep_copies_are_independent(name):
    case, small = ZOO[name], packed(name)
    before = case.run(small)
    other = copy.deepcopy(small)
    assert same(case.run(other), before)
    for module in other.modules():
        if isinstance(module, PackedWeight):
            module.tensors["scale"].zero_()
    assert not same(case.run(other), before)
    assert same(case.run(small), before)


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
        for part, tensor in module.tensors.items()
    }


@pytest.mark.parametrize("name", ZOO)
def test_casting_changes_the_results_dtype_and_never_what_is_stored(name):
    case, small = ZOO[name], packed(name)
    before = {part: tensor.clone() for part, tensor in stored(small).items()}
    outputs = case.run(small)
    small.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[part]) for part, tensor in stored(small).items())
    assert all(tensor.dtype == before[part].dtype for part, tensor in stored(small).items())
    cast = copy.deepcopy(original(name)).to(torch.bfloat16)
    assert [tensor.dtype for tensor in case.run(small)] == [tensor.dtype for tensor in case.run(cast)]
    small.float()
    assert {site.dtype for site in find_sites(small)} == {torch.float32}
    coarse = case.run(small)
    for ours, theirs in zip(coarse, outputs, strict=True):  # what was kept went through bfloat16
        assert (ours - theirs).norm() < 0.2 * theirs.norm()


@pytest.mark.parametrize("name", ZOO)
def test_state_dict_carries_the_packed_weights(name):
    case, small = ZOO[name], packed(name)
    torch.manual_seed(9)
    other = tersor.compress(case.build().eval(), Recipe.of(PACKED_BY)).model
    assert not same(case.run(other), case.run(small))
    other.load_state_dict({key: value.clone() for key, value in small.state_dict().items()})
    assert same(case.run(other), case.run(small))


@pytest.mark.parametrize("name", ZOO)
def test_an_exception_in_forward_leaves_nothing_decoded(name):
    case, small = ZOO[name], packed(name)
    before, size = case.run(small), num_bytes(small)
    wrapped = [module for module in small.modules() if packed_parameters(module)]
    for module in wrapped:
        with pytest.raises(Exception):  # noqa: B017
            module(object())
        assert DECODED not in module.__dict__
    assert num_bytes(small) == size
    assert same(case.run(small), before)


@pytest.mark.parametrize("name", ["lstm", "encoder", "conv2d", "llama"])
def test_training_mode_reaches_packed_modules(name):
    small = packed(name)
    assert not any(module.training for module in small.modules())
    assert all(module.training for module in small.train().modules())
    training = copy.deepcopy(original(name)).train()
    assert all(module.training for module in tersor.compress(training, Recipe.of(PACKED_BY)).model.modules())


def test_gradients_reach_inputs_and_biases_through_packed_layers():
    small = tersor.compress(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(2, 4, 3)), Recipe.of(PACKED_BY)).model
    x = torch.randn(3, 2, 8, requires_grad=True)
    small(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in small.parameters() if p.numel())


def test_only_the_asked_for_part_of_an_attention_block_may_be_packed():
    """PyTorch's fused encoder reads weights around the modules, whichever of them are packed."""
    case, model = ZOO["encoder"], original("encoder")
    for pattern in ("*in_proj_weight", "*out_proj", "*linear1"):
        small = tersor.compress(model, Recipe.of("keep", {pattern: PACKED_BY})).model
        assert same(case.run(small), case.run(decoded(model, small)), exact=False)


def test_packed_kinds_of_module():
    small = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 3), nn.Embedding(5, 4), ScaledEmbedding(5, 4))
    small = tersor.compress(small, Recipe.of("int8")).model
    for module, kind in zip(small, [PackedLinear, PackedConv, PackedEmbedding, ScaledEmbedding], strict=True):
        assert isinstance(module, kind)
    assert not isinstance(small[3], PackedEmbedding)


def test_replace_refuses_another_shape():
    encoded = Scheme.parse("nearest:int8").method.compress(torch.randn(3, 4), format_named("int8"), Stats())
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(FormatError, match=r"0: encoded as \(3, 4\), but the model has \(3, 5\) here"):
        find_sites(model)[0].replace(model, encoded)


def test_a_bare_layer_is_packed_saved_and_loaded(tmp_path):
    bare, x = nn.Linear(4, 3), torch.randn(5, 4)
    small = tersor.compress(bare, Recipe.of("int8")).model
    assert torch.equal(small(x), F.linear(x, find_sites(small)[0].weight(small), bare.bias))
    tersor.save(small, tmp_path)
    assert torch.equal(tersor.load(tmp_path, model=nn.Linear(4, 3))(x), small(x))


def test_nan_weights_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    with pytest.raises(tersor.TersorError, match="0: 1 of 16 weights are NaN"):
        tersor.compress(model, Recipe.of("int8"))


# Quantized inputs.


@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (3, 5), (17, 9), (64, 64), (130, 33)])
@pytest.mark.parametrize("batch", [(1,), (7,), (2, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_dynamic_linear_is_what_it_says(num_in, num_out, batch, dtype):
    model = nn.Sequential(nn.Linear(num_in, num_out)).to(dtype)
    small = tersor.compress(model, Recipe.of("int8-dynamic")).model
    x = torch.randn(*batch, num_in, dtype=dtype)
    said = F.linear(Int8Dynamic().fake_quantize(x, {}), small[0].weight, small[0].bias)
    with torch.no_grad():
        fast = small(x)
        with reference():
            slow = small(x)
    assert torch.equal(slow, said)
    assert fast.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fast, said, rtol=tolerance, atol=tolerance)
    if x.numel() > 10:
        assert not torch.equal(said, F.linear(x, small[0].weight, small[0].bias)), "the input was not quantized"


def test_a_tokens_result_does_not_depend_on_the_batch():
    small = tersor.compress(nn.Sequential(nn.Linear(48, 32)), Recipe.of("int8-dynamic")).model
    x = torch.randn(9, 48) * torch.logspace(-3, 3, 9)[:, None]
    with torch.no_grad():
        assert torch.equal(small(x), torch.cat([small(row[None]) for row in x]))


def test_the_fused_encoder_does_not_bypass_quantized_inputs(monkeypatch):
    monkeypatch.setattr(choice, "CHOICE", choice.KernelChoice())
    monkeypatch.setattr(choice, "fastest", lambda times: "int_mm")  # whichever is, on this machine
    calls = []
    quantize = Int8Dynamic.quantize
    made = tersor.compress(original("encoder"), Recipe.of("int8-dynamic"))
    taken = {site.name for site in made.sites if site.activation}
    assert taken == {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    ZOO["encoder"].run(made.model)  # here kernels are chosen
    monkeypatch.setattr(Int8Dynamic, "quantize", lambda self, x: calls.append(x.shape) or quantize(self, x))
    ZOO["encoder"].run(made.model)
    assert len(calls) == len(taken)


@pytest.mark.parametrize("name", ["conv2d", "embedding", "lstm", "gru cell", "attention", "experts", "own linear"])
def test_other_sites_stay_weight_only(name):
    case, model = ZOO[name], original(name)
    made = tersor.compress(model, Recipe.of("int8-dynamic"))
    assert [site.activation for site in made.sites] == [None] * len(made.sites)
    assert same(case.run(made.model), case.run(packed(name, "int8")))


def test_a_tied_head_stays_weight_only_because_the_embedding_is():
    made = tersor.compress(TiedHead().eval(), Recipe.of("int8-dynamic"))
    assert {site.name: site.activation for site in made.sites} == {"embed": None, "mix": "int8-dynamic"}


def test_hugging_face_conv1d_takes_quantized_inputs():
    made = tersor.compress(original("gpt2"), Recipe.of("int8-dynamic"))
    assert {site.name for site in made.sites if site.activation} == {
        f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    small = made.model
    fast = ZOO["gpt2"].run(small)
    with reference():
        assert same(fast, ZOO["gpt2"].run(small), exact=False)


def test_stacked_experts_round_trip_row_by_row():
    model = Experts()
    site = find_sites(model)[0]
    assert torch.equal(site.matrix(model)[16:32], model.weights[1].detach())


class Projector(nn.Module):
    """A module of no known class that uses another's weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize("scheme", ["int4", "bf16"])
def test_a_weight_tied_to_an_unknown_module_is_packed_there_too(scheme, tmp_path):
    embed = nn.Embedding(40, 16)
    model = nn.Sequential(embed, Projector(embed.weight))
    (site,) = tersor.find_sites(model)
    assert site.owners == (("0", "weight"), ("1", "weight"))
    small = tersor.compress(model, tersor.Recipe.of(scheme)).model
    assert not sum(parameter.numel() for parameter in small.parameters())
    x = torch.randint(0, 40, (3, 5))
    with torch.no_grad():
        weight = site.weight(small)
        assert torch.equal(small(x), weight[x] @ weight.T)
        tersor.save(small, tmp_path)
        fresh = nn.Embedding(40, 16)
        for packed in (True, False):
            loaded = tersor.load(tmp_path, model=nn.Sequential(fresh, Projector(fresh.weight)), packed=packed)
            assert torch.equal(loaded(x), small(x))
            fresh = nn.Embedding(40, 16)
