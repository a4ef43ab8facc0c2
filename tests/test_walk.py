"""The walk: every site once, in the order of the data, with the statistics of the model compressed so far."""

import copy
import gc
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from laws import random, same_bits
from tersor.activations.quantizers import ACTIVATIONS, Activation
from tersor.calibration.blocks import BlockStates, Stop, find_blocks
from tersor.calibration.inputs import BatchInputs, InputRecorder, OriginalInputs
from tersor.calibration.moments import Moments, has_inputs, inputs_of, takes_inputs
from tersor.calibration.offload import ActivationCache
from tersor.calibration.plan import survey
from tersor.calibration.walk import Chosen, SiteObserver, walk
from tersor.core.errors import DataError
from tersor.formats import FORMATS
from tersor.nn.sites import find_sites
from zoo import GQA, ZOO, outputs, pretrained

NEEDS = frozenset({"second_moment", "cross_moment", "mean", "largest"})
FORMAT = FORMATS["int4"]


@dataclass
class Toy:
    """A task over keyword or positional arguments, one example of which is a slice of their first axis."""

    arguments: Any
    calls: list[int] = field(default_factory=list)
    name: str = "toy"
    output: str = "values"

    def batches(self, split, batch_size=None):
        items = self.arguments.items() if isinstance(self.arguments, dict) else enumerate(self.arguments)
        items = list(items)
        num_examples = len(items[0][1]) if items else 0
        for start in range(0, num_examples, batch_size or num_examples):
            part = {key: value[start : start + (batch_size or num_examples)] for key, value in items}
            yield part if isinstance(self.arguments, dict) else tuple(part.values())

    def forward(self, model, batch):
        self.calls.append(len(next(iter(batch.values() if isinstance(batch, dict) else batch))))
        made = outputs(model, batch)
        return made[0]


def rounded(site, model):
    matrix = site.matrix(model)
    return Chosen(FORMAT.encode(matrix, FORMAT.fit(matrix)))


@dataclass
class Noting:
    """A visitor that notes what it was told, and chooses as two functions say."""

    visit: Any
    tune: Any
    needs: frozenset[str] = NEEDS
    seen: list[Any] = field(default_factory=list)

    def visit_site(self, site, stats):
        self.seen.append((site, stats))
        return self.visit(site, stats)

    def tune_block(self, block_run, chosen):
        return self.tune(block_run, chosen)


def walked(model, original, task, visit=None, *, tune=lambda run, chosen: {}, sites=None, memory_limit=None):
    """The sites in the order of their visits, with what each was told."""
    visitor = Noting(visit or (lambda site, stats: rounded(site, model)), tune)
    walk(survey(model, task, sites or find_sites(model), memory_limit), visitor, original)
    return visitor.seen


def state(model):
    """All that a walk must leave alone in a model: numbers, modes, hooks, forwards."""
    return {
        name: (
            module.training,
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            "forward" in module.__dict__,
            [
                (key, p.detach().clone())
                for key, p in (*module._parameters.items(), *module._buffers.items())
                if p is not None
            ],
        )
        for name, module in model.named_modules()
    }


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name][:3] == other[name][:3], name
        assert all(a[0] == b[0] and same_bits(a[1], b[1]) for a, b in zip(one[name][3], other[name][3], strict=True))


# Every site, once.


@pytest.mark.parametrize("name", ZOO)
def test_every_site_is_visited_once_and_packed(name):
    case = ZOO[name]
    original, model = case.model(), case.model()
    arguments = case.arguments(original)
    before = state(original)
    seen = walked(model, original, Toy(arguments))
    assert sorted(site.name for site, _ in seen) == sorted(site.name for site in find_sites(original))
    by_name = {site.name: site for site in find_sites(model)}
    for site, stats in seen:
        assert by_name[site.name].dtype == site.dtype
        if name == "embedding max_norm":  # PyTorch itself rewrites the rows that are looked up
            continue
        matrix = site.matrix(original)
        assert torch.equal(site.matrix(model), FORMAT.fake_quantize(matrix, FORMAT.fit(matrix)).to(site.dtype).float())
        assert has_inputs(original, site) or stats.num_tokens == 0
    if name != "embedding max_norm":
        assert_same_state(state(original), before)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "opt", "linear", "tied head"])
def test_sites_are_visited_in_the_order_of_the_data(name):
    case = ZOO[name]
    model = case.model()
    reached: list[str] = []
    hooks = []
    for site in find_sites(model):
        for place in site.owners:
            hook = lambda module, args, site=site: reached.append(site.name)  # noqa: E731
            hooks.append(model.get_submodule(place.module).register_forward_pre_hook(hook))
    case.run(model)
    for hook in hooks:
        hook.remove()
    fed = list(dict.fromkeys(reversed(reached)))[::-1]  # a tied weight counts where it is last used
    seen = [site.name for site, _ in walked(model, case.model(), Toy(case.arguments(model))) if has_inputs(model, site)]
    assert seen == [name for name in fed if name in seen]


# What they are told.


def brute_force(model, original, site, task):
    """The moments of one site's inputs by plain hooks, in a model as it stands and in the original."""
    caught = []
    for each in (model, original):
        place = next(p for p in site.owners if has_inputs_at(each, p))
        inputs: list[Tensor] = []
        module = each.get_submodule(place.module)
        hook = module.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            for batch in task.batches("calibration"):
                task.forward(each, batch)
        hook.remove()
        caught.append((module, inputs[0]))
    batch = next(iter(task.batches("calibration")))
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    moments = Moments(site.shape[1], NEEDS)
    (x,), (y,) = ([torch.cat(list(inputs_of(module, inputs, mask)))] for module, inputs in caught)
    moments.add(x, y)
    return moments.stats()


def has_inputs_at(model, place):
    return takes_inputs(model.get_submodule(place.module))


def assert_close(found, wanted, tolerance=1e-4):
    for name in ("second_moment", "cross_moment", "mean", "largest"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert a is not None, name
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
    assert found.num_tokens == wanted.num_tokens


@pytest.mark.parametrize("name", ["linear", "shared layer", "llama", "bert", "gpt2", "opt", "clip vision"])
def test_a_site_sees_the_model_compressed_so_far(name):
    """Compared with hooks on a copy in which everything visited before is compressed, and nothing else."""
    case = ZOO[name]
    original, model, so_far = case.model(), case.model(), case.model()
    task = Toy(case.arguments(original))
    checked = 0

    def visit(site, stats):
        nonlocal checked
        if has_inputs(original, site):
            assert_close(stats, brute_force(so_far, original, site, task))
            checked += 1
        chosen = rounded(site, model)
        site.replace(so_far, chosen.encoded)
        return chosen

    walked(model, original, task, visit)
    assert checked >= 1
    for ours, theirs in zip(case.run(model), case.run(so_far), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_padding_is_left_out():
    case = ZOO["bert"]
    model, original = case.model(), case.model()
    seen = {site.name: stats for site, stats in walked(model, original, Toy(case.arguments(model)))}
    assert seen["bert.encoder.layer.0.attention.self.query"].num_tokens == 10
    assert seen["bert.pooler.dense"].num_tokens == 2


def test_sites_that_share_an_input_share_its_moments():
    case = ZOO["llama"]
    seen = {site.name: stats for site, stats in walked(case.model(), case.model(), Toy(case.arguments(case.model())))}
    q, k, o = (seen[f"model.layers.1.self_attn.{name}_proj"] for name in "qko")
    assert q.second_moment is k.second_moment
    assert q.second_moment is not o.second_moment


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "linear"])
def test_a_small_memory_works_batch_by_batch(name):
    """The first block's inputs are those of the walk that sees everything at once; later ones nearly so."""
    case = ZOO[name]
    arguments, source = case.arguments(case.model()), case.model()

    def finely(site, stats):
        matrix = site.matrix(source)
        return Chosen(FORMATS["int8"].encode(matrix, FORMATS["int8"].fit(matrix)))

    at_once, in_parts = Toy(arguments), Toy(arguments)
    whole = walked(case.model(), case.model(), at_once, finely)
    parts = walked(case.model(), case.model(), in_parts, finely, memory_limit=1)
    assert set(in_parts.calls) == {1}
    assert max(at_once.calls) == 2
    assert sorted(site.name for site, _ in whole) == sorted(site.name for site, _ in parts)
    told = {site.name: stats for site, stats in parts}
    fed = [(site.name, stats) for site, stats in whole if stats.num_tokens]
    assert_close(told[fed[0][0]], fed[0][1])
    for name, stats in fed:
        assert told[name].num_tokens == stats.num_tokens
        gap = (told[name].second_moment - stats.second_moment).norm() / stats.second_moment.norm()
        assert gap < 0.1


def test_nothing_stays_on_disk_or_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    case = ZOO["llama"]
    walked(case.model(), case.model(), Toy(case.arguments(case.model())), memory_limit=1)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_quantized_inputs_reach_what_follows():
    """The second layer is told what the first makes of its quantized inputs, in a plain walk and between blocks."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    x = random(4, 6)
    coarse = Activation("int8-static", {"scale": torch.tensor([0.7]), "zero_point": torch.zeros(1, dtype=torch.int8)})
    with torch.no_grad():
        middle = model[0](ACTIVATIONS["int8-static"].fake_quantize(x, coarse.params))
    mine = copy.deepcopy(model)

    def visit(site, stats):
        return Chosen(FORMATS["fp16"].encode(site.matrix(mine), {}), coarse if site.name == "0" else None)

    seen = walked(mine, model, Toy((x,)), visit)
    torch.testing.assert_close(seen[1][1].second_moment, middle.t() @ middle / 4, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("memory_limit", [2**30, 1])
def test_quantized_inputs_reach_the_next_block(memory_limit):
    model = stack("plain")
    mine, x = copy.deepcopy(model), random(6, 3, 8)
    coarse = Activation("int8-static", {"scale": torch.tensor([0.7]), "zero_point": torch.zeros(1, dtype=torch.int8)})

    def visit(site, stats):
        return Chosen(FORMATS["fp16"].encode(site.matrix(mine), {}), coarse if site.name == "layers.0.up" else None)

    seen = {site.name: stats for site, stats in walked(mine, model, Toy((x,)), visit, memory_limit=memory_limit)}
    first = model.layers[0]
    with torch.no_grad():
        middle = (x + first.down(first.up(coarse.fake_quantize(x)).relu())).flatten(0, 1)
    wanted = middle.t() @ middle / len(middle)
    torch.testing.assert_close(seen["layers.1.up"].second_moment, wanted, rtol=1e-2, atol=1e-2)


# Which models go block by block.


class Block(nn.Module):
    def __init__(self, gives="tensor"):
        super().__init__()
        self.up, self.down, self.gives = nn.Linear(8, 12), nn.Linear(12, 8), gives

    def forward(self, x, more=None):
        y = x + self.down(self.up(x).relu())
        if self.gives == "more":  # as T5's first block makes the bias of all
            more = x[..., :1].tanh() if more is None else more
            return y * (1 + more), more
        return (y,) if self.gives == "tuple" else y


class Stack(nn.Module):
    """A stack of blocks, and the ways in which a model may run it."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        gives = {"tuples": "tuple", "more handed on": "more"}.get(how, "tensor")
        self.layers = nn.ModuleList(Block(gives) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        layers = list(self.layers)
        if self.how == "twice over":
            layers = layers * 2
        elif self.how == "each twice":
            layers = [layer for layer in layers for _ in range(2)]
        elif self.how == "backwards":
            layers = layers[::-1]
        first, more = x, None
        for layer in layers:
            y = layer(x) if more is None else layer(x, more)
            x = y[0] if isinstance(y, tuple) else y
            more = y[1] if self.how == "more handed on" else None
            x = x + first if self.how == "work between" else x
        return self.head(x)


def stack(how):
    torch.manual_seed(5)
    return Stack(how).eval()


BLOCKS = ("layers.0", "layers.1", "layers.2")
HOW = ["plain", "tuples", "more handed on", "twice over", "each twice", "backwards", "work between"]


@pytest.mark.parametrize("how", HOW)
def test_what_is_no_simple_stack_is_walked_as_one_piece(how):
    """And told the truth all the same."""
    original, model, so_far = stack(how), stack(how), stack(how)
    task = Toy((random(6, 3, 8),))
    assert find_blocks(model) == list(BLOCKS)

    def visit(site, stats):
        if how not in ("twice over", "each twice"):  # a reused layer is fitted to the inputs of its first use
            assert_close(stats, brute_force(so_far, original, site, task))
        chosen = rounded(site, model)
        site.replace(so_far, chosen.encoded)
        return chosen

    seen = walked(model, original, task, visit)
    assert len(seen) == 7
    assert survey(original, task, []).block_names == (BLOCKS if how in ("plain", "tuples") else ())


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "opt", "clip vision"])
def test_transformers_are_walked_block_by_block(name):
    model = ZOO[name].model()
    before, task = state(model), Toy(ZOO[name].arguments(model))
    plan = survey(model, task, find_sites(model), memory_limit=2**20)
    assert list(plan.block_names) == find_blocks(model)
    assert len(plan.single_calls) == len(plan.block_names) > 1
    assert plan.batch_size > 1
    assert survey(model, task, find_sites(model), memory_limit=1).batch_size == 1
    assert_same_state(state(model), before)


class Routed(nn.Module):
    """Experts as layers of their own: each sees the tokens that are routed to it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        choice = self.router(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().squeeze(1)
            out[rows] = expert(flat[rows])
        return out.view(x.shape)


def test_experts_are_not_paired_with_other_tokens():
    """The compressed router routes other tokens than the original's: there is no cross moment, and no crash."""
    torch.manual_seed(3)
    model = Routed()
    original = copy.deepcopy(model)
    with torch.no_grad():
        model.router.weight.neg_()
    seen = {site.name: stats for site, stats in walked(model, original, Toy((random(5, 7, 8),)))}
    assert seen["router"].cross_moment is not None
    assert sum(seen[f"experts.{index}"].num_tokens for index in range(2)) == 35
    assert all(seen[f"experts.{index}"].cross_moment is None for index in range(2))


class Biased(nn.Module):
    """Blocks that are told a mask of examples `[example, position]` and an offset of positions `[position]`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(BiasedBlock() for _ in range(2))

    def forward(self, x, mask):
        offset = torch.arange(float(x.shape[1]))
        for layer in self.layers:
            x = layer(x, offset, mask=mask)
        return x


class BiasedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, offset, mask):
        return self.linear(x + offset[:, None]) * mask[:, :, None]


def test_a_block_runs_on_some_of_the_examples():
    """As many examples as positions: only what has an axis of examples is cut."""
    torch.manual_seed(4)
    model, original = Biased(), Biased()
    x, mask, examples, seen = random(6, 6, 8), random(6, 6, seed=1), torch.tensor([4, 1]), []

    def tune(run, chosen):
        weights = {site.name: made.encoded.decode() for site, made in chosen.items()}
        seen.append((run(weights, examples), run(weights, torch.arange(6))))
        return {}

    walked(model, original, Toy({"x": x, "mask": mask}), tune=tune)
    assert len(seen) == 2
    with torch.no_grad():
        outputs, targets = model(x, mask), original(x, mask)
    for (some, some_targets), (every, all_targets) in seen:
        torch.testing.assert_close(some, every[examples])
        assert torch.equal(some_targets, all_targets[examples])
    torch.testing.assert_close(seen[-1][0], (outputs[examples], targets[examples]))


def test_no_hidden_states_outlive_their_block():
    """What every block was called with says nothing of the first block's input, which would stay for the whole walk."""
    model, x = Biased(), random(5, 6, 8)
    batch = {"x": x, "mask": random(5, 6)}
    states = BlockStates(model, Toy(batch), [batch], ["layers.0", "layers.1"], ActivationCache(0))
    with torch.no_grad():
        states.stem(0)
        first = weakref.ref(states.hidden[0])
        states.block(0, True, 0)
    assert first() is None
    kept = [t for call in states.calls[0] for t in tree_leaves([call.args, call.kwargs]) if isinstance(t, Tensor)]
    assert {tuple(t.shape) for t in kept} == {(6,), (5, 6)}


def test_blocks_that_were_given_a_forward_keep_it():
    model = stack("plain")
    own = model.layers[1].forward
    model.layers[1].forward = lambda x: own(x)
    given = model.layers[1].__dict__["forward"]
    walked(model, copy.deepcopy(model), Toy((random(6, 3, 8),)), lambda site, stats: None)
    assert model.layers[1].__dict__["forward"] is given


# What it leaves behind.


@pytest.mark.parametrize("name", ["llama", "bert", "linear"])
def test_an_exception_leaves_nothing_behind(name):
    case = ZOO[name]
    original, model = case.model(), case.model().train()
    before, number = (state(original), state(model)), 0

    def visit(site, stats):
        nonlocal number
        number += 1
        if number == 3:
            raise ArithmeticError("no more")

    sites = [site for site in find_sites(model) if has_inputs(model, site)]
    number += 1 if len(sites) == 2 else 0
    with pytest.raises(ArithmeticError):
        walked(model, original, Toy(case.arguments(model)), visit, sites=sites)
    assert_same_state(state(original), before[0])
    assert_same_state(state(model), before[1])


def test_watching_leaves_the_fused_path_to_pytorch():
    """Packing leaves it for good; a visitor that only looks must not."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    before = state(model), model.use_nested_tensor, model.layers[0].activation_relu_or_gelu
    seen = []
    observer = SiteObserver(frozenset({"second_moment"}), lambda site, stats: seen.append(stats.num_tokens))
    walk(survey(model, Toy((random(3, 4, 8),)), find_sites(model)), observer)
    assert seen.count(12) == 4
    assert_same_state(state(model), before[0])
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == before[1:]


def test_a_recorder_needs_no_walk():
    """It sums over batches, pairs the original's inputs with them, and takes its hooks away."""
    model, original, x = stack("plain"), stack("plain"), random(6, 3, 8)
    with torch.no_grad():
        model.layers[0].down.weight.mul_(0.5)
    sites = [site for site in find_sites(model) if site.name in ("layers.1.up", "head")]
    before, cache = state(model), ActivationCache(2**20)
    originals = OriginalInputs(original, sites, cache, stop_when_done=True)
    recorder = InputRecorder(model, sites, NEEDS, stop_when_done=True)
    for number, batch in enumerate(x.split(2)):
        with torch.no_grad(), originals.recording(number), suppress(Stop):
            original(batch)
        with torch.no_grad(), recorder.summing(BatchInputs(None, None, originals.by_batch[number])), suppress(Stop):
            model(batch)
        assert originals.by_batch[number] == {}
    assert_same_state(state(model), before)
    with torch.no_grad():
        y, wanted = (each.layers[0](x).flatten(0, 1) for each in (model, original))
    stats = recorder.sums["layers.1.up"].stats()
    torch.testing.assert_close(stats.second_moment, y.t() @ y / 18)
    torch.testing.assert_close(stats.cross_moment, wanted.t() @ y / 18)
    assert recorder.sums["head"].stats().num_tokens == 18


def test_training_flags_come_back():
    case = ZOO["llama"]
    original, model = case.model().train(), case.model().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules() if name.count(".") <= 2}
    walked(model, original, Toy(case.arguments(model)), lambda site, stats: None)
    assert {name: module.training for name, module in model.named_modules() if name.count(".") <= 2} == before
    assert original.training


def test_empty_calibration_is_said():
    model = stack("plain")
    with pytest.raises(DataError, match="toy: the calibration split is empty; give more data, or --calibration FILE"):
        walked(model, model, Toy(()))


def test_the_walk_is_the_same_every_time():
    case = ZOO["llama"]
    one, other = (walked(case.model(), case.model(), Toy(case.arguments(case.model()))) for _ in range(2))
    assert all(
        same_bits(a[1].second_moment, b[1].second_moment) for a, b in zip(one, other, strict=True) if a[1].num_tokens
    )


def test_bfloat16_models():
    model = pretrained("LlamaForCausalLM", **GQA)().bfloat16().eval()
    arguments = {"input_ids": torch.arange(12).view(2, 6)}
    seen = walked(copy.deepcopy(model), model, Toy(arguments))
    assert all(torch.isfinite(stats.cross_moment).all() for _, stats in seen if stats.num_tokens)
