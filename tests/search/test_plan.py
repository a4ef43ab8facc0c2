"""Budgets are met by real files: just below the limit, never above, and an infeasible one names what is reachable."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import pytest
import torch
from torch import nn

import tersor
from tersor.analysis.sensitivity import divergence, outputs
from tersor.checkpoint.artifact import WEIGHTS
from tersor.checkpoint.container_write import size_of
from tersor.core.errors import BudgetError, FormatError, InputError, ModelError, UnknownName
from tersor.formats.int_group import IntGroup
from tersor.methods.stats import Stats
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.search.limit import Limit
from tersor.search.plan import (
    CANDIDATES,
    Menu,
    check_reachable,
    kept_layout,
    largest_size,
    measure_menus,
    measured_option,
    plan_size,
    planned_size,
    smallest_size,
)
from zoo import ZOO, original

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def measured_once():
    """What a scheme costs a weight is measured once, however many plans are made of it."""
    known = {}

    def measured(site, scheme, weight, sampled, stats):
        numbers = (weight, sampled, stats.row_weight, stats.column_weight)
        key = (site.shape, str(scheme), *(crc32(tensor.contiguous().numpy()) for tensor in numbers))
        if key not in known:
            known[key] = measured_option(site, scheme, weight, sampled, stats)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.search.plan.measured_option", measured)
        yield


class Net(nn.Module):
    """Layers of many shapes and scales, a tied weight, and tensors that no format takes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 96)
        self.conv = nn.Conv1d(96, 64, 3)
        self.norm = nn.BatchNorm1d(64)
        self.rnn = nn.LSTM(64, 40)
        self.layers = nn.ModuleList([nn.Linear(40, 72), nn.Linear(72, 160), nn.Linear(160, 130), nn.Linear(130, 96)])
        self.tiny = nn.Linear(3, 2)
        self.head = nn.Linear(96, 300)
        self.head.weight = self.embed.weight


@cache
def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(2.0 ** (number % 5))
    return model.to(dtype).eval()


def step_of(rules=None, exclude=()):
    return Recipe.of("keep", rules, exclude).steps[0]


@cache
def menus_of(dtype: torch.dtype = torch.float32) -> list[Menu]:
    return measure_menus(net(dtype), {}, step_of())


def real_size(model: nn.Module, recipe: Recipe, folder: Path) -> int:
    tersor.save(tersor.compress(model, recipe).model, folder)
    return (folder / WEIGHTS).stat().st_size


DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fraction", [0.005, pytest.param(0.1, marks=SLOW), 0.25, pytest.param(0.4, marks=SLOW), 0.7, 0.995]
)
def test_the_file_lands_just_below_the_limit(dtype, fraction, tmp_path):
    model, menus = net(dtype), menus_of(dtype)
    low, high = smallest_size(model, menus), largest_size(model, menus)
    limit = int(low + fraction * (high - low))
    size = real_size(model, plan_size(model, menus, Limit(limit, "test")), tmp_path)
    assert 0.99 * limit <= size <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_limit_between_the_extremes_is_met(dtype):
    """As often as not the first choice is a few bytes over, because a larger file has longer offsets in its header."""
    model, menus = net(dtype), menus_of(dtype)
    kept = kept_layout(model, menus)
    low, high = smallest_size(model, menus), largest_size(model, menus)
    for limit in range(low + (high - low) // 4, high, (high - low) // 20):
        schemes = dict(assigned(plan_size(model, menus, Limit(limit, "test")), model))
        chosen = [next(o for o in menu.options if o.scheme == schemes[menu.site.name]) for menu in menus]
        assert 0.975 * limit <= planned_size(kept, menus, chosen) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extremes_are_reached_to_the_byte(dtype, tmp_path):
    model, menus = net(dtype), menus_of(dtype)
    low = smallest_size(model, menus)
    for more in (0, 7, 50):
        recipe = plan_size(model, menus, Limit(low + more, "test"))
        assert low - 8 <= size_of(tersor.compress(model, recipe).model) <= low + more
    assert real_size(model, plan_size(model, menus, Limit(low, "test")), tmp_path) <= low


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_generous_limit_changes_nothing(dtype):
    model = net(dtype)
    recipe = plan_size(model, menus_of(dtype), Limit(2 * size_of(model), "test"))
    assert tersor.compress(model, recipe).sites == []


def test_more_bytes_never_predict_more_loss():
    model, menus = net(), menus_of()
    low, high = smallest_size(model, menus), largest_size(model, menus)

    def predicted(limit: int) -> float:
        schemes = dict(assigned(plan_size(model, menus, Limit(limit, "test")), model))
        return sum(next(o.loss for o in m.options if o.scheme == schemes[m.site.name]) for m in menus)

    losses = [predicted(low + (high - low) * tenth // 10) for tenth in range(11)]
    assert all(b <= 1.001 * a for a, b in pairwise(losses))
    assert losses[-1] == 0


def assigned(recipe: Recipe, model: nn.Module) -> list[tuple[str, str]]:
    return [(site.name, str(scheme or "keep")) for site, scheme in recipe.steps[0].assign(find_sites(model))]


@pytest.mark.parametrize("name", ZOO)
def test_the_planned_size_is_the_real_one_for_every_kind_of_model(name, tmp_path):
    model = original(name)
    rules = {find_sites(model)[0].name: "magnitude(sparsity=0.37):bitmask"}
    menus = measure_menus(model, {}, step_of(rules), ["keep", "int8", "int4-asym", "int3-g32", "fp16"])
    torch.manual_seed(0)
    chosen = [menu.options[int(torch.randint(len(menu.options), ()))] for menu in menus]
    recipe = Recipe.of("keep", {menu.site.name: o.scheme for menu, o in zip(menus, chosen, strict=True)})
    assert planned_size(kept_layout(model, menus), menus, chosen) == real_size(model, recipe, tmp_path)


def test_sparse_sites_of_many_rows_are_counted_exactly(tmp_path):
    """Losses are measured on a sample of the rows, sizes are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 1000), nn.Linear(1000, 64))
    with torch.no_grad():
        model[0].weight[500:] = 0
    rules = {"0": "nearest:bitmask"}
    menus = measure_menus(model, {}, step_of(rules))
    limit = smallest_size(model, menus) + 9000
    recipe = plan_size(model, menus, Limit(limit, "test"))
    size = real_size(model, recipe, tmp_path)
    assert 0.98 * limit <= size <= limit  # one site is free, so the steps are coarse
    assert dict(assigned(recipe, model))["0"] == "nearest:bitmask"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infeasible_limit_names_a_size_that_is_reachable(dtype):
    model, menus = net(dtype), menus_of(dtype)
    with pytest.raises(BudgetError) as told:
        plan_size(model, menus, Limit(5000, "size 5KB"))
    message = str(told.value)
    assert message.startswith("size 5KB (5,000 bytes) is below what any candidate format reaches")
    reachable = int(re.search(r"reachable file is ([\d,]+) bytes", message)[1].replace(",", ""))
    assert reachable == smallest_size(model, menus)
    made = tersor.compress(model, plan_size(model, menus, Limit(reachable, "test"))).model
    assert size_of(made) <= reachable
    flag = re.search(r"--size (\d+KB)", message)[1]
    assert size_of(tersor.compress(model, tersor.plan(model, size=flag)).model) <= int(flag[:-2]) * 1000
    with pytest.raises(BudgetError):
        plan_size(model, menus, Limit(reachable - 16, "test"))


def test_what_binds_is_named():
    rules = {"embed": "int8", "layers.1": "keep"}
    menus = measure_menus(net(), {}, step_of(rules))
    with pytest.raises(BudgetError, match=r"layers\.1 alone takes 46,\d+ at keep; rules and excludes fix 2 sites"):
        plan_size(net(), menus, Limit(5000, "test"))


def test_a_limit_is_checked_before_anything_is_measured(monkeypatch):
    step = step_of()
    low = smallest_size(net(), menus_of())
    monkeypatch.setattr("tersor.search.plan.measured_option", lambda *_: pytest.fail("measured"))
    check_reachable(net(), step, CANDIDATES, Limit(low, "test"))
    check_reachable(net(), step, CANDIDATES, None)
    with pytest.raises(BudgetError, match=f"{low:,} bytes"):
        check_reachable(net(), step, CANDIDATES, Limit(low - 16, "test"))


def test_rules_and_excludes_pin_their_sites():
    rules = {"layers.*": "int6", "embed": "hqq:int4-asym"}
    recipe = tersor.plan(net(), ratio="5x", rules=rules, exclude=["layers.0"])
    schemes = dict(assigned(recipe, net()))
    assert schemes["embed"] == "hqq:int4-asym"
    assert schemes["layers.0"] == "keep"
    assert {schemes[f"layers.{i}"] for i in (1, 2, 3)} == {"mse:int6"}
    assert size_of(tersor.compress(net(), recipe).model) <= size_of(net()) // 5


def test_a_plan_is_a_recipe_of_exact_names():
    recipe = plan_size(net(), menus_of(), Limit(70_000, "test"), seed=7)
    assert recipe.seed == 7
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert set(recipe.steps[0].rules) <= {site.name for site in find_sites(net())}


def test_the_curvature_decides_who_gets_the_bits():
    """Two equal layers; the loss feels only one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    stats = {
        "0": Stats(torch.full((128,), 1.0), torch.ones(128)),
        "1": Stats(torch.full((128,), 1e-6), torch.ones(128)),
    }
    menus = measure_menus(model, stats, step_of())
    recipe = plan_size(model, menus, Limit(size_of(model) // 6, "test"))
    made = {site.name: site.bits_per_weight for site in tersor.compress(model, recipe).sites}
    assert made["0"] > made["1"] + 3


def test_sites_the_data_never_reaches_still_cost_something():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    stats = {"0": Stats(torch.ones(128), torch.ones(128)), "1": Stats(torch.zeros(128), torch.ones(128))}
    for menu in measure_menus(model, stats, step_of(), ["int8", "int4", "int2"]):
        losses = [option.loss for option in menu.options]
        assert 0 < losses[0] < losses[1] < losses[2]


def test_the_sampled_loss_is_close_to_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1000))
    stats = Stats(torch.rand(1000).pow(8), torch.rand(64))
    menu = measure_menus(model, {"0": stats}, step_of(), ["nearest:int4", "nearest:int3"])[0]
    for option in menu.options:
        made = tersor.compress(model, Recipe.of(option.scheme)).model
        whole = stats.loss(made[0].weight - model[0].weight.detach())
        assert 0.7 * whole < option.loss < 1.4 * whole


def test_plan_needs_exactly_one_limit():
    with pytest.raises(InputError, match="plan needs a limit"):
        tersor.plan(net())
    with pytest.raises(InputError, match="both limits"):
        tersor.plan(net(), size="1MB", ratio="4x")


@pytest.mark.parametrize(
    ("limit", "bits"),
    [({"ratio": "4x"}, 8.0), ({"bits": 5.0}, 5.0), pytest.param({"size": "90KB"}, None, marks=SLOW)],
)
def test_plan_takes_each_limit(limit, bits):
    made = tersor.compress(net(), tersor.plan(net(), **limit)).model
    num_parameters = sum(parameter.numel() for parameter in net().parameters())
    allowed = 90_000 if bits is None else num_parameters * bits / 8
    assert 0.97 * allowed < size_of(made) <= 1.02 * allowed


def test_mistakes_in_rules_are_told():
    with pytest.raises(UnknownName, match=r"did you mean 'layers\.3'"):
        tersor.plan(net(), ratio="4x", rules={"layers.33": "int8"})
    broken = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match="0: 1 of 16 weights are NaN or infinite"):
        tersor.plan(broken, ratio="4x")


@pytest.mark.parametrize("rules", [None, {"layers.0": "int4-g128"}])
def test_a_format_that_fits_nothing_is_told(rules, monkeypatch):
    monkeypatch.setattr(IntGroup, "why_not", lambda self, shape: f"has in={shape[1]} columns")
    with pytest.raises(FormatError, match=r"int4-g128: .* has in=.* columns"):
        measure_menus(net(), {}, step_of(rules), ["int4-g128"])


class Tokens:
    """Token ids as a task, for a model that turns them into logits."""

    name, output, description, fingerprint = "tokens", "logits", "random tokens", "0"

    def batches(self, split, batch_size=None):
        yield from torch.randint(0, 300, (16, 24), generator=torch.Generator().manual_seed(0)).split(batch_size or 8)

    def forward(self, model, batch):
        return model(batch)


class Reader(nn.Module):
    """An embedding that is tied to the head, one that is not, and sites of other kinds."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(300, 64), nn.Embedding(24, 64)
        self.rnn = nn.LSTM(64, 64, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.rnn(self.embed(ids) + self.place.weight)[0]
        x = x + self.layers(x)
        return self.head(x + self.conv(x.transpose(1, 2)).transpose(1, 2))


@cache
def reader() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


@cache
def nine_times_smaller() -> Recipe:
    return tersor.plan(reader(), Tokens(), ratio="9x")


def methods(recipe: Recipe, model: nn.Module) -> dict[str, str]:
    return {name: scheme.partition(":")[0] for name, scheme in assigned(recipe, model)}


def test_sites_that_show_their_inputs_get_feedback_for_the_same_bytes(tmp_path):
    found = methods(nine_times_smaller(), reader())
    assert {name for name, method in found.items() if method == "gptq"} == {"layers.0", "layers.2", "conv"}
    assert {found[name] for name in ("embed", "place", "rnn.weight_ih_l0", "rnn.weight_hh_l0")} == {"mse"}
    assert "gptq" not in methods(tersor.plan(reader(), ratio="9x"), reader()).values()


@pytest.mark.parametrize("ratio", [pytest.param("5x", marks=SLOW), "9x"])
def test_a_plan_with_feedback_is_as_exact(ratio, tmp_path):
    recipe = nine_times_smaller() if ratio == "9x" else tersor.plan(reader(), Tokens(), ratio=ratio)
    tersor.save(tersor.compress(reader(), recipe, Tokens()).model, tmp_path)
    limit = size_of(reader()) // int(ratio[0])
    assert 0.97 * limit < (tmp_path / WEIGHTS).stat().st_size <= limit


def test_a_method_that_was_asked_for_stays():
    wanted = ["keep", "mse:int4-g32", "hqq:int4-g64-asym", "int3-g32"]
    rules = {"conv": "mse:int4-g64", "layers.0": "int4-g64", "embed": "int4-g32"}
    recipe = tersor.plan(reader(), Tokens(), ratio="7x", rules=rules, candidates=wanted)
    found = dict(assigned(recipe, reader()))
    assert found["conv"] == "mse:int4-g64"
    assert found["layers.0"] == "gptq:int4-g64"
    assert found["embed"] == "mse:int4-g32"
    assert set(found.values()) <= {*wanted[:3], "mse:int3-g32", "gptq:int3-g32", "mse:int4-g64", "gptq:int4-g64"}


def test_feedback_pays(tmp_path):
    """The same bytes, and outputs nearer to the original's on the data it was fitted to."""
    recipe = tersor.plan(reader(), Tokens(), ratio="11x")
    plain = Recipe.from_yaml(recipe.to_yaml().replace("gptq:", "mse:"))
    made, before = (tersor.compress(reader(), r, Tokens()).model for r in (recipe, plain))
    assert size_of(made) == size_of(before)

    def loss(model: nn.Module) -> float:
        original = list(outputs(reader(), Tokens()))
        return divergence(original, outputs(model, Tokens()), "logits")

    assert loss(made) < loss(before)
