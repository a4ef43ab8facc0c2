"""A module whose weights are packed stays the module it was: hooks, attributes, its own forward, its class."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import tersor
from tersor.nn.in_place import DecodedWeight
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe

IDS = torch.tensor([[1, 4, 2], [3, 0, 5]])


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(input) * 3


class Patterned(nn.Module):
    """One of each layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 16)
        self.conv = nn.Conv1d(3, 3, 3, padding=1)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.scaled = Scaled(16, 16)
        self.linear = nn.Linear(16, 8)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv(x)
        x = x + self.lstm(x)[0]
        x = x + self.attention(x, x, x)[0]
        return self.linear(x + self.scaled(x))


LAYERS = ["embed", "conv", "lstm", "attention", "scaled", "linear"]


def bend(y):
    return (y[0].sin() * 2, *y[1:]) if isinstance(y, tuple) else y.sin() * 2


def hook(layer):
    layer.register_forward_hook(lambda module, args, y: bend(y))


def named_hook(layer):
    layer.register_forward_hook(lambda module, args, kwargs, y: bend(y), with_kwargs=True, always_call=True)


def pre_hook(layer):
    def change(module, args):
        x = args[0]
        return (5 - x if not x.is_floating_point() else x.cos(), *args[1:])

    layer.register_forward_pre_hook(change)


def own_forward(layer):
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: bend(forward(*args, **kwargs))


def reads_its_weight(layer):
    layer.register_forward_hook(lambda module, args, y: y if isinstance(y, tuple) else y + module.weight.mean())


class Hooked:
    """What accelerate's `add_hook_to_module` leaves on a module."""

    def __init__(self, layer):
        self.forward = layer.forward

    def __call__(self, *args, **kwargs):
        return bend(self.forward(*args, **kwargs))


def accelerates(layer):
    accelerate = pytest.importorskip("accelerate")

    class Bend(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return bend(output)

    accelerate.hooks.add_hook_to_module(layer, Bend())


CHANGES = [hook, named_hook, pre_hook, own_forward, reads_its_weight, accelerates]


def rounded(model, small):
    """The float model with the weights that the packed one decodes to."""
    for site in find_sites(small):
        for place in site.owners:
            weight = model.get_submodule(place.module)._parameters[place.parameter]
            weight.data.copy_(site.weight(small))
    return model


def changed(change, *names):
    model = Patterned().eval()
    for name in names or LAYERS:
        change(model.get_submodule(name))
    return model


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scheme", ["int4", "gptq:int8"])
@torch.no_grad()
def test_what_hangs_on_a_layer_stays(change, scheme, tmp_path):
    model = changed(change)
    before = model(IDS)
    assert not torch.allclose(before, Patterned().eval()(IDS), atol=1e-2)
    made = tersor.compress(model, Recipe.of(scheme)).model
    assert len(find_sites(made)) == 8
    expected = rounded(changed(change), made)(IDS)
    close(made(IDS), expected)
    close(copy.deepcopy(made)(IDS), expected)
    assert torch.equal(model(IDS), before)
    tersor.save(made, tmp_path)
    for packed in (True, False):
        close(tersor.load(tmp_path, model=changed(change), packed=packed)(IDS), expected)


@torch.no_grad()
def test_pickles_hold_the_model_with_its_hooks():
    model = Patterned().eval()
    model.linear.register_forward_hook(twice)
    made = tersor.compress(model, Recipe.of("int4")).model
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(back(IDS), made(IDS))
    assert isinstance(back.lstm, nn.LSTM)
    assert back.state_dict().keys() == made.state_dict().keys()
    back.load_state_dict(made.state_dict())


def twice(module, args, output):
    return output * 2


def test_classes_attributes_and_the_module_itself_stay():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 2, 3), nn.Embedding(5, 8), nn.GRU(8, 8), Scaled(8, 8))
    for module in model:
        module.scale_me = 7
    made = tersor.compress(model, Recipe.of("int8")).model
    for before, after in zip(model, made, strict=True):
        assert isinstance(after, type(before))
        assert after.scale_me == 7
        assert type(before).__name__ in repr(after)
    assert made[1].transposed is False
    assert made[2].sparse is False


def test_gradients_pass_backward_hooks():
    model, seen = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), []
    model[2].register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0].shape))
    made = tersor.compress(model, Recipe.of("int8")).model
    made(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert seen == [(3, 8)]


def test_a_layer_that_two_modules_hold_is_packed_in_both():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    made = tersor.compress(model, Recipe.of("int4")).model
    assert made["a"][0] is made["b"][0]


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "gptq:int4"])
@torch.no_grad()
def test_layers_are_called_by_keyword(scheme):
    class Keywords(Patterned):
        def forward(self, ids):
            x = self.embed(input=ids)
            x = x + self.conv(input=x)
            x = x + self.lstm(input=x, hx=None)[0]
            x = x + self.attention(query=x, key=x, value=x)[0]
            return self.linear(input=x + self.scaled(input=x))

    model, plain = Keywords().eval(), Patterned().eval()
    one, other = (tersor.compress(each, Recipe.of(scheme)).model for each in (model, plain))
    assert torch.equal(one(IDS), other(IDS))


# LSTM and GRU.


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("lengths", [[4] * 40, [3, 9, 1, 9, 3, 3], [5, 4, 4, 2]])
@pytest.mark.parametrize("in_order", [True, False])
@torch.no_grad()
def test_packed_sequences_come_back_in_their_order(kind, scheme, lengths, in_order):
    lengths = sorted(lengths, reverse=True) if in_order else lengths
    torch.manual_seed(0)
    model = nn.Sequential(kind(8, 16, num_layers=2, bidirectional=True)).eval()
    made = tersor.compress(model, Recipe.of(scheme)).model
    reference = rounded(copy.deepcopy(model), made)[0]
    x = pack_sequence([torch.randn(length, 8) for length in lengths], enforce_sorted=in_order)
    first = torch.randn(4, len(lengths), 16)
    for hx in (None, (first, first.flip(0)) if kind is nn.LSTM else first):
        y, last = made[0](x, hx)
        expected, expected_last = reference(x, hx)
        room = 1e-5 if scheme == "int4" else 0.05
        torch.testing.assert_close(y.data, expected.data, rtol=0, atol=room)
        torch.testing.assert_close(last, expected_last, rtol=0, atol=room)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            one, other = getattr(y, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert isinstance(y, PackedSequence)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_recurrent_layers_offer_what_pytorchs_do(kind, scheme):
    model = nn.Sequential(kind(8, 16, num_layers=2, batch_first=True, dropout=0.1)).eval()
    made = tersor.compress(model, Recipe.of(scheme)).model[0]
    made.flatten_parameters()
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(made, name) == getattr(model[0], name)
    assert made.proj_size == 0
    shapes = [[tuple(w.shape) for w in layer] for layer in model[0].all_weights]
    assert [[tuple(w.shape) for w in layer] for layer in made.all_weights] == shapes
    assert [tuple(w.shape) for w in made._flat_weights] == [shape for layer in shapes for shape in layer]
    x = torch.randn(3, 5, 8)
    y = made(x)[0]
    torch.testing.assert_close(made.to(torch.float64).to(torch.float32)(x)[0], y)
    sequence = pack_padded_sequence(x, torch.tensor([2, 5, 1]), batch_first=True, enforce_sorted=False)
    assert made(input=sequence)[0].data.shape == (8, 16)


# Weights that are read by others.


class Read(nn.Module):
    """Weights in lists and dicts, and in a module that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.listed = nn.ParameterList(nn.Parameter(torch.randn(2, 16, 16)) for _ in range(2))
        self.named = nn.ParameterDict({"up": torch.randn(2, 16, 16)})
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.randn(3, 16, 16))
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        for weight in self.listed:
            x = x @ weight[0]
        x = x @ torch.cat(list(self.listed))[1] @ self.named["up"][0] @ next(iter(self.named.values()))[1]
        x = F.linear(x, self.inner.weight) @ self.listed[-1][1]
        return torch.einsum("bi,eij->bej", x, self.experts.weights).sum(1)


@torch.no_grad()
def test_weights_that_their_parent_reads_are_decoded_there(tmp_path):
    model, x = Read().eval(), torch.randn(4, 16)
    made = tersor.compress(model, Recipe.of("int8")).model
    assert len(find_sites(made)) == 5
    expected = rounded(Read().eval(), made)(x)
    torch.testing.assert_close(made(x), expected)
    assert type(made(x)) is torch.Tensor
    assert len(made.listed) == 2
    assert list(made.named) == ["up"]
    tersor.save(made, tmp_path)
    torch.testing.assert_close(tersor.load(tmp_path, model=Read())(x), expected)


WRITES = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "data": lambda w: w.data.zero_(),
    "detach": lambda w: w.detach().add_(1),
    "item": lambda w: w.__setitem__(0, 1.0),
    "view": lambda w: w.view(-1)[:3].fill_(0),
    "rows": lambda w: w[1].neg_(),
    "chunk": lambda w: w.chunk(2)[0].zero_(),
    "init": lambda w: nn.init.xavier_uniform_(w),
    "init by name": lambda w: nn.init.zeros_(tensor=w),
    "+=": lambda w: w.__iadd__(1),
    "out": lambda w: torch.add(w, 1, out=w),
    "set data": lambda w: setattr(w, "data", torch.zeros(8, 8)),
    "relu": lambda w: F.relu(w, inplace=True),
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_writing_to_a_packed_weight_is_refused(write):
    made = tersor.compress(nn.Sequential(nn.Linear(8, 8), Scaled(8, 8)), Recipe.of("int4")).model
    for layer in made:
        before = layer.weight.plain()
        with pytest.raises(tersor.TersorError, match="packed as int4 cannot be written to"):
            WRITES[write](layer.weight)
        with pytest.raises(tersor.TersorError, match="packed as int4 cannot be written to"):
            layer.weight = nn.Parameter(torch.zeros(8, 8))
        assert torch.equal(layer.weight, before)


@torch.no_grad()
def test_a_packed_weight_is_read_like_any_other():
    made = tersor.compress(nn.Sequential(nn.Linear(8, 8)), Recipe.of("int4")).model
    weight = made[0].weight
    assert isinstance(weight, DecodedWeight)
    assert isinstance(weight, nn.Parameter)
    assert made.get_parameter("0.weight") is not None
    assert type(weight + 1) is type(weight @ weight) is type(copy.deepcopy(weight)) is torch.Tensor
    own = weight.clone()
    own.mul_(2)
    assert torch.equal(own, weight * 2)
    assert weight.requires_grad_(False).shape == (8, 8)
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), weight)
    assert "DecodedWeight" in repr(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_packed_weights_alone_says_its_type_and_device(dtype):
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)).to(dtype)
    made = tersor.compress(model, Recipe.of("int8")).model
    first = next(made.parameters())
    assert (first.dtype, first.device.type, first.numel()) == (dtype, "cpu", 0)
    assert next(made.half().parameters()).dtype == torch.float16
    assert made(torch.tensor([1])).dtype == torch.float16
    assert next(made.to("meta").parameters()).is_meta
    assert not any("like" in key for key in made.state_dict())


def test_weights_of_no_size_are_no_sites():
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 8), nn.Linear(8, 0), nn.Conv1d(0, 0, 1), nn.Embedding(0, 4))
    assert [site.name for site in find_sites(model)] == ["1"]
    made = tersor.compress(model[:3], Recipe.of("int4")).model
    assert made(torch.zeros(5, 0)).shape == (5, 0)


@torch.no_grad()
def test_packed_heads_stay_tied():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)
    made = tersor.compress(transformers.LlamaForCausalLM(config).eval(), Recipe.of("int8")).model
    ids = torch.tensor([[1, 2, 3]])
    before = made(ids).logits
    made.tie_weights()
    assert torch.equal(made(ids).logits, before)
    assert made.lm_head.packed is made.model.embed_tokens.packed
    with pytest.raises(tersor.TersorError, match="packed"):
        made.resize_token_embeddings(40)
