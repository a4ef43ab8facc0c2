"""Every method in every format that it fills, on weights and inputs that break arithmetic: what comes back is about as
good as it is on ordinary ones, or it is refused with the site's name."""

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import ModelError, TersorError
from tersor.formats import FORMATS
from tersor.methods import METHODS
from tersor.methods.stats import Stats
from tersor.nn.sites import find_sites
from tersor.schemes.scheme import Scheme
from tersor.steps.result import check_result
from tersor.steps.step_visitor import compress_site

NUM_ROWS, NUM_COLUMNS, NUM_TOKENS = 8, 64, 120
DENSE = "fp16 bf16 int8 int4-g32 int3-g32-asym nf4 fp8-e4m3 mxfp4 nvfp4 codebook16 coded lowrank int4-g64+lowrank"
SPARSE = "bitmask 2:4 bitmask+int8 2:4+int4-g64"
SCHEMES = [
    Scheme(made, FORMATS[name])
    for method in METHODS.values()
    for name in f"{DENSE} {SPARSE}".split()
    if (made := method()).accepts(FORMATS[name]) is None and not (made.name == "zero-mask" and "2:4" in name)
]


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, INPUTS = numbers(NUM_ROWS, NUM_COLUMNS, seed=1) * 0.05, numbers(NUM_TOKENS, NUM_COLUMNS, seed=2)
ROWS, COLUMNS = torch.arange(NUM_ROWS).unsqueeze(1), torch.arange(NUM_COLUMNS)
OUTLIER = torch.zeros_like(WEIGHT).index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(1e30))
WEIGHTS = {
    "large": WEIGHT * 2e7,
    "tiny": WEIGHT * 2e-7,
    "an outlier": WEIGHT + OUTLIER,
    "rows apart": WEIGHT * torch.logspace(-7, 7, NUM_ROWS).unsqueeze(1),
    "columns apart": WEIGHT * torch.logspace(-7, 7, NUM_COLUMNS),
    "zero rows": WEIGHT * (ROWS % 2),
    "all zero": WEIGHT * 0,
}
RANK_ONE = numbers(NUM_TOKENS, 1, seed=3) @ numbers(1, NUM_COLUMNS, seed=4)
X = {
    "large": INPUTS * 1e10,
    "tiny": INPUTS * 1e-8,
    "dead": INPUTS * 0,
    "half dead": INPUTS * (COLUMNS % 2),
    "singular": RANK_ONE,
    "one large": INPUTS * torch.where(COLUMNS == 3, 1e5, 1.0),
}


def stats_of(x):
    moment = (x.t().double() @ x.double() / len(x)).float()
    energy = moment.diagonal()
    return Stats(
        second_moment=moment,
        cross_moment=moment,
        sample=x[:50],
        num_tokens=len(x),
        row_weight=energy.mean() * (1 + torch.arange(NUM_ROWS) / NUM_ROWS),
        column_weight=energy / energy.mean().clamp_min(1e-30),
    )


def error_of(scheme, weight, x):
    """The relative error of weights or outputs, whichever is less. Raises what is raised on the way."""
    site, stats = find_sites(nn.Sequential(nn.Linear(NUM_COLUMNS, NUM_ROWS)))[0], stats_of(x)
    encoded = compress_site(site, weight, scheme, stats)
    check_result(site, scheme, encoded, weight, stats)
    decoded, weight, x = encoded.decode().double(), weight.double(), x.double()
    assert decoded.isfinite().all(), f"{scheme} is not finite"
    of_weights, of_outputs = (
        float((decoded - weight).mul(1).matmul(m).norm() / weight.matmul(m).norm().clamp_min(1e-300))
        for m in (torch.eye(NUM_COLUMNS).double(), x.t())
    )
    return min(of_weights, of_outputs)


@pytest.fixture(scope="module")
def ordinary():
    return {str(scheme): error_of(scheme, WEIGHT, INPUTS) for scheme in SCHEMES}


@pytest.mark.parametrize(
    ("weight", "x"),
    [*((weight, INPUTS) for weight in WEIGHTS.values()), *((WEIGHT, x) for x in X.values())],
    ids=[*(f"weights: {name}" for name in WEIGHTS), *(f"inputs: {name}" for name in X)],
)
def test_the_result_is_as_good_as_ever_or_refused(weight, x, ordinary):
    refusals = []
    for scheme in SCHEMES:
        try:
            found = error_of(scheme, weight, x)
        except TersorError as problem:
            refusals.append(str(problem))
            continue
        most = 0.96 if scheme.format.name == "coded" else 1.5 * ordinary[str(scheme)] + 0.1
        assert found <= most, f"{scheme}: {found:.3g}, and {ordinary[str(scheme)]:.3g} on ordinary weights"
    assert all(text.startswith("0: ") for text in refusals)
    assert len(refusals) < len(SCHEMES)
    if weight is WEIGHT:
        assert not refusals, "no input is a reason to refuse ordinary weights"


def test_wanda_keeps_the_largest_where_no_input_says_more():
    scheme = Scheme.parse("wanda:bitmask")
    kept = compress_site(find_sites(nn.Sequential(nn.Linear(64, 8)))[0], WEIGHT, scheme, stats_of(INPUTS * 0)).decode()
    for row, now in zip(WEIGHT, kept, strict=True):
        assert set(row.abs().topk(32).indices.tolist()) == set(now.nonzero().flatten().tolist())


def test_rows_that_are_lost_are_noted():
    model = nn.Sequential(nn.Linear(64, 8))
    model[0].weight.data = WEIGHT * torch.where(ROWS < 2, 1e-6, 1.0)
    made = tersor.compress(model, "nearest:int8")
    assert len(made.notes) == 1
    assert made.notes[0].startswith("0: 2 of 8 rows become zero in nearest:int8")
    assert not tersor.compress(model, "nearest:bf16").notes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["nearest:int8", "gptq:int4-g32", "waterfill:coded", "svd:lowrank", "smooth"])
def test_a_weight_that_is_no_number_is_named_before_any_work(value, scheme):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[2, 3] = value
    recipe = tersor.Recipe.of("int8", transforms=[scheme]) if scheme == "smooth" else scheme
    with pytest.raises(ModelError, match="1: 1 of 16 weights are NaN or infinite, the first in row 2, column 3"):
        tersor.compress(model, recipe, Toy())


class Toy:
    """Four numbers in, four out."""

    name, output, description, fingerprint = "toy", "values", "toy", "0"

    def prepare(self, model):
        raise AssertionError("no work may start")

    def batches(self, split, batch_size=None):
        raise AssertionError("no work may start")

    def forward(self, model, batch):
        return model(batch)

    def score(self, model, progress=None):
        raise AssertionError("no work may start")
