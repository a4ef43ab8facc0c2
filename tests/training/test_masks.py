"""Masks hold what was pruned wherever a weight lives, and a choice drops exactly the smallest."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError, UnknownName
from tersor.formats.semi_structured import SemiStructured
from tersor.nn.packed import Simulated
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.training.masks import MaskChoice, Masks, empty_sites, largest, sparsity_of


class Net(nn.Module):
    """One weight of every kind of fold: rows, transposed, recurrent, a lookup that is tied to the head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(3, 4, 3)
        self.up = nn.ConvTranspose1d(4, 5, 3)
        self.lstm = nn.LSTM(6, 3)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embedding.weight


def weights_of(model):
    return {site.name: site.matrix(model).clone() for site in find_sites(model)}


def textbook(weights, num_dropped):
    """The names and places of the weights that go: one after the other, smallest first."""
    entries = [
        (abs(w[i, j].item()), order, i, j)
        for order, w in enumerate(weights.values())
        for i in range(len(w))
        for j in range(w.shape[1])
    ]
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for _, order, i, j in sorted(entries)[:num_dropped]:
        list(masks.values())[order][i, j] = False
    return masks


@pytest.mark.parametrize("sparsity", [0.07, 0.5, 0.8, 0.99])
def test_global_is_one_threshold_over_all_sites(sparsity):
    model, masks = Net(), Masks()
    before = weights_of(model)
    MaskChoice(sparsity).tighten(model, masks)
    num_weights = sum(weight.numel() for weight in before.values())
    expected = textbook(before, round(sparsity * num_weights))
    assert masks.masks.keys() == before.keys()
    for name, weight in weights_of(model).items():
        assert torch.equal(masks.masks[name], expected[name]), name
        assert torch.equal(weight, before[name] * expected[name]), name
    assert abs(sparsity_of(masks) - sparsity) * num_weights <= 0.5


def test_site_ranks_each_by_itself_and_rules_have_their_own():
    model, masks = Net(), Masks()
    before = weights_of(model)
    MaskChoice(0.5, scope="site", rules={"lstm.*": 0.25, "lstm.weight_hh*": 0.75}, exclude=("conv",)).tighten(
        model, masks
    )
    wanted = {"embedding": 0.5, "up": 0.5, "lstm.weight_ih_l0": 0.25, "lstm.weight_hh_l0": 0.75}
    assert masks.masks.keys() == wanted.keys()
    for name, sparsity in wanted.items():
        expected = textbook({name: before[name]}, round(sparsity * before[name].numel()))
        assert torch.equal(masks.masks[name], expected[name]), name


def test_rules_take_a_site_out_of_the_global_ranking():
    model, masks = Net(), Masks()
    before = weights_of(model)
    MaskChoice(0.6, rules={"up": 0.0}).tighten(model, masks)
    assert masks.masks["up"].all()
    del before["up"]
    expected = textbook(before, round(0.6 * sum(weight.numel() for weight in before.values())))
    assert all(torch.equal(masks.masks[name], mask) for name, mask in expected.items())


def test_what_is_dropped_stays_dropped_and_counts():
    """Even where a weight that is left is zero as well."""
    model, masks = nn.Sequential(nn.Linear(4, 1)), Masks()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 1.0, 2.0, 4.0]]))
    MaskChoice(0.25).tighten(model, masks)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 9.0, 2.0, 4.0]]))
    MaskChoice(0.5).tighten(model, masks)
    assert masks.masks["0"].tolist() == [[False, False, True, True]]
    assert model[0].weight.tolist() == [[0.0, 0.0, 2.0, 4.0]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_a_pattern_is_reached_step_by_step(n, m):
    """At every share the smallest of what the pattern drops are gone, and in the end it fits, odd columns included."""
    torch.manual_seed(1)
    weights = {"a": torch.randn(5, 19), "b": torch.randn(3, 16)}
    pattern = SemiStructured(n, m)
    kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    final = {name: pattern.choose(weight.abs()) for name, weight in weights.items()}
    num_final = sum(int((~mask).sum()) for mask in final.values())
    for share in (0.0, 0.3, 0.8, 1.0):
        kept = largest(weights, kept, share, 0.5, pattern)
        dropped = torch.cat([weights[name][~mask].abs() for name, mask in kept.items()])
        to_come = torch.cat([weights[name][mask & ~final[name]].abs() for name, mask in kept.items()])
        assert len(dropped) == round(share * num_final)
        assert not len(dropped) or not len(to_come) or dropped.max() <= to_come.min()
        weights = {name: weight * kept[name] for name, weight in weights.items()}
    assert all(torch.equal(kept[name], final[name]) for name in kept)


def test_a_pattern_over_an_older_mask_gives_no_weight_back():
    torch.manual_seed(2)
    weights = {"a": torch.randn(6, 24)}
    older = {"a": torch.rand(6, 24) < 0.4}
    pattern = SemiStructured(2, 4)
    mask = largest(weights, older, 1.0, 0.5, pattern)["a"]
    assert not (mask & ~older["a"]).any()
    assert (mask.unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    enough = older["a"].unflatten(1, (-1, 4)).sum(-1) <= 2  # nothing more has to go there
    assert torch.equal(mask.unflatten(1, (-1, 4))[enough], older["a"].unflatten(1, (-1, 4))[enough])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_optimizer_moves_the_kept_weights_alone(optimizer):
    model, masks = Net(), Masks()
    MaskChoice(0.5).tighten(model, masks)
    before = weights_of(model)
    momentum = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    stepper = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **momentum)
    masks.enforce(model, stepper)
    for _ in range(3):
        sum((parameter - 1).square().sum() for parameter in model.parameters()).backward()
        stepper.step()
        stepper.zero_grad()
    for name, weight in weights_of(model).items():
        mask = masks.masks[name]
        assert not weight[~mask].any(), name
        assert (weight[mask] != before[name][mask]).all(), name
    states = [tensor for state in stepper.state.values() for tensor in state.values() if tensor.ndim == 2]
    assert any(bool((tensor == 0).any()) for tensor in states), "no gradient of a dropped weight is remembered"


class Double(Simulated):
    """Stands for fake quantization: what runs is made of what is trained."""

    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    ("module", "name"), [(nn.Linear(6, 4), "weight"), (nn.ConvTranspose1d(3, 4, 2), "weight"), (nn.LSTM(6, 4), None)]
)
def test_masks_are_held_under_a_parametrization(module, name):
    model, masks = nn.Sequential(module), Masks()
    name = name or "weight_hh_l0"
    site = next(site for site in find_sites(model) if site.parameter == f"0.{name}")
    MaskChoice(0.5).tighten(model, masks)
    mask = site.fold.unfold(masks.masks[site.name])
    parametrize.register_parametrization(module, name, Double())
    original = module.parametrizations[name].original
    with torch.no_grad():
        original.fill_(1.0)
    masks.apply(model)
    assert torch.equal(original != 0, mask)
    assert torch.equal(getattr(module, name), 2.0 * mask)


class Tripled(nn.Module):
    """A parametrization of somebody else's."""

    def forward(self, weight):
        return 3 * weight


@pytest.mark.parametrize(
    ("module", "name"),
    [(nn.Linear(6, 4), "weight"), (nn.ConvTranspose1d(3, 4, 2), "weight"), (nn.LSTM(6, 4), "weight_hh_l0")],
)
@pytest.mark.parametrize("chosen", ["before", "after"])
def test_masks_are_held_where_others_compute_the_weight(module, name, chosen):
    """What runs is masked, whether the masks or the parametrization were there first."""
    module = copy.deepcopy(module)
    model, masks = nn.Sequential(module), Masks()
    site = next(site for site in find_sites(model) if site.parameter == f"0.{name}")
    if chosen == "before":
        MaskChoice(0.5).tighten(model, masks)
    parametrize.register_parametrization(module, name, Tripled())
    computed = getattr(module, name).detach().clone()
    if chosen == "after":
        MaskChoice(0.5).tighten(model, masks)
    masks.apply(model)
    mask = site.fold.unfold(masks.masks[site.name])
    assert not mask.all()
    assert torch.equal(getattr(module, name).detach(), computed * mask)
    held = {id(each.parameter) for each in masks.held(model)}
    assert id(getattr(module, name)) in held, "it is what an optimizer sees"


def test_packed_sites_are_refused_unless_they_are_excluded():
    import tersor

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    packed = tersor.compress(model, Recipe.of("keep", {"1": "int8"})).model
    with pytest.raises(InputError, match=r"1 is packed already: prune before the weights step, or .*exclude"):
        MaskChoice(0.5).groups(packed)
    assert [site.name for site in MaskChoice(0.5, exclude=("1",)).groups(packed)[0][0]] == ["0"]


def test_patterns_are_checked():
    model = nn.Sequential(nn.Linear(4, 4))
    for choice in (MaskChoice(0.5, exclude=("fc",)), MaskChoice(0.5, rules={"fc": 0.5})):
        with pytest.raises(UnknownName, match="site pattern 'fc'"):
            choice.groups(model)
    with pytest.raises(InputError, match="exclude matches every site"):
        MaskChoice(0.5, exclude=("*",)).groups(model)


def test_a_site_without_a_weight_is_said():
    model, masks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Masks()
    with torch.no_grad():
        model[0].weight.mul_(0.001)
    MaskChoice(0.6).tighten(model, masks)
    assert empty_sites(masks) == ["0: every weight was pruned; use scope: site, a rule of its own, or exclude it"]
