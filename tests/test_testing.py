"""tersor.testing: the laws for strangers. What keeps them passes; whatever breaks one is told so in a sentence."""

import subprocess
import sys
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.errors import TersorError
from tersor.exporters import EXPORTS
from tersor.exporters.contract import Misfit
from tersor.formats import FORMATS
from tersor.formats.contract import Encoded, Grid, UsualMethods
from tersor.formats.int_group import IntGroup
from tersor.formats.trainable import Trainable, single
from tersor.methods import METHODS
from tersor.methods.contract import MethodFor
from tersor.tasks.inputs import Batch
from tersor.tasks.scores import METRICS, Scores
from tersor.testing import LawBroken, check_exporter, check_format, check_method, check_task
from tersor.testing.exporters import places
from tersor.testing.formats import FORMAT_TABLE_LAWS, laws_of

# Formats.


@pytest.mark.parametrize("name", ["int5-g32", "nf4-dq", "coded", "2:4+int4-g64", "bitmask", "lowrank", "fp8-e4m3"])
def test_formats_of_the_table_keep_the_laws(name):
    check_format(FORMATS[name])


class Broken(IntGroup):
    """A 5-bit grid with one fault."""

    @property
    def name(self):
        return "mine"


class Drifts(Broken):
    def decode(self, encoded):
        return super().decode(encoded) * (1 + 1e-6)


class Overflows(Broken):
    def storable(self, scale):
        return scale.half()


class Grows(Broken):
    def fake_quantize(self, weight, params):
        return super().fake_quantize(1.2 * weight, params)

    def encode(self, weight, params):
        return super().encode(1.2 * weight, params)


class RoundsUp(Broken):
    def quantize(self, weight, params):
        codes = self.grouped(weight) / self.divisor(params["scale"]).unsqueeze(-1) + self.zero_point(params)
        return (codes - 1e-3).ceil_().clamp_(0, 31).flatten(1)[:, : weight.shape[1]]


class Misplaced(Broken):
    def layout(self, shape):
        return {**super().layout(shape), "scale": (torch.float32, super().layout(shape)["scale"][1])}


class Infinite(Broken):
    def decode(self, encoded):
        weight = super().decode(encoded)
        return weight.masked_fill(weight == weight.max(), torch.inf)


class Together(Broken):
    def decode(self, encoded):
        return super().decode(encoded) * len(encoded.parts["scale"])


class Rereads(Broken):
    def encode(self, weight, params):
        encoded = super().encode(weight, params)
        encoded.parts["codes"].made_here = True
        return encoded

    def decode(self, encoded):
        return super().decode(encoded) + (not hasattr(encoded.parts["codes"], "made_here"))


class Overwrites(Broken):
    def encode(self, weight, params):
        encoded = super().encode(weight, params)
        weight.mul_(0.5)
        return encoded


class Wavers(Broken):
    turns = count()

    def fit(self, weight, shrink=1.0):
        params = super().fit(weight, shrink)
        return {"scale": params["scale"] * (1 + 0.25 * (next(self.turns) % 2))}


class Projects(Broken):
    def projector(self, params, shape):
        project = super().projector(params, shape)
        return lambda values, j: -project(-values, j)


class Shrinks(Broken):
    def fit(self, weight, shrink=1.0):
        return super().fit(weight, shrink if isinstance(shrink, float) else shrink.mean().item() * 0.9)


class Trains(Broken):
    @property
    def trainable_parts(self):
        return {"scale": Trainable(single)}


class Shows(Broken):
    def as_integers(self, encoded):
        return super().as_integers(encoded)._replace(scale=-encoded.parts["scale"])


class Packs(Broken):
    def packing(self, parts, shape):
        return {"codes": (4, shape[1])}


class Unspeakable(Broken):
    @property
    def name(self):
        return "my format"


class Unusual(Broken):
    usual_methods = UsualMethods("nearest", "mse", "gtpq")


class Refuses(Broken):
    def why_not(self, shape):
        return None if shape[1] % 32 == 0 else "is too narrow"


FAULTS = {
    "what_is_stored_is_what_was_computed": (
        Drifts,
        r"decode\(encode\(w\)\) is not fake_quantize\(w\): at \[0, 0\] -?\d",
    ),
    "decoded_is_finite_float32": (Infinite, "decode gives 1 numbers that are NaN or infinite; raise FormatError"),
    "fake_quantize_is_idempotent": (Grows, "changes what it made itself: at "),
    "fake_quantize_is_nearest": (RoundsUp, r"misses the nearest value of \d+ weights"),
    "layout_is_exact": (Misplaced, "scale is torch.float16, the layout says torch.float32"),
    "rows_decode_alone": (Together, r"rows \[7\] decoded alone are not those of the whole matrix"),
    "parts_survive_a_file": (Rereads, r"decode\(encode\(w\)\) changed after a save and load: at"),
    "inputs_are_left_alone": (Overwrites, "the weight that was given has changed"),
    "same_input_same_bytes": (Wavers, "the same weight gives other bytes: (codes|scale): at"),
    "projector_is_fake_quantize": (Projects, "projector rounds columns 0, 4, ... to other values"),
    "shrink_is_by_group": (Shrinks, "fit with half the range for every group is not: scale: at"),
    "trainable_parts_are_stored_exactly": (
        Trains,
        "scale is not stored as it is .* torch.float32 instead of",
    ),
    "views_are_the_weight": (Shows, r"\(codes - zero_points\) \* scale of as_integers is not the weight: at"),
    "packing_fits_the_parts": (Packs, "packing says that 128 codes of 4 bits fill a row of codes, which has 80 bytes"),
    "name_finds_it": (Unspeakable, "the name 'my format' is not safe in a scheme"),
    "usual_methods_fill_it": (
        Unusual,
        "usual_methods.with_inputs is 'gtpq', which is no method; those are autoround",
    ),
    "misfit_names_a_way_out": (Refuses, "why_not of 16 x 1 does not say 1: 'is too narrow'"),
    "overflow_is_said": (Overflows, "decode to infinity or NaN; raise FormatError where parts overflow"),
}


def test_no_law_of_formats_is_empty():
    assert FAULTS.keys() == {law.__name__ for law in (*laws_of(Broken(5)), *FORMAT_TABLE_LAWS)}


@pytest.mark.parametrize("law", [*laws_of(IntGroup(5)), *FORMAT_TABLE_LAWS], ids=lambda law: law.__name__)
def test_a_fault_is_said_in_a_sentence(law, monkeypatch):
    """Each law by itself finds the fault that is made for it; all together they name the format and the weight."""
    fault, sentence = FAULTS[law.__name__]
    format = fault(5)
    of_the_name = law in FORMAT_TABLE_LAWS
    monkeypatch.setattr("tersor.testing.formats.laws_of", lambda format: [] if of_the_name else [law])
    monkeypatch.setattr("tersor.testing.formats.FORMAT_TABLE_LAWS", [law] if of_the_name else [])
    with pytest.raises(LawBroken, match=sentence) as found:
        check_format(format)
    assert str(found.value).startswith(f"format {format.name}{': ' if of_the_name else ' on '}")
    assert isinstance(found.value, TersorError)
    check_format(Broken(5))


def test_an_error_of_the_entry_itself_is_said_of_it():
    class Raises(Broken):
        def encode(self, weight, params):
            raise RuntimeError("shape mismatch\nin a kernel")

    with pytest.raises(LawBroken, match=r"format mine: it raises RuntimeError: shape mismatch"):
        check_format(Raises(5))


# Methods.


@pytest.mark.parametrize("name", ["nearest", "kmeans", "svd"])
def test_methods_of_the_table_keep_the_laws(name):
    check_method(METHODS[name]())


@dataclass(frozen=True)
class Mine(MethodFor[Grid]):
    """Rounds to nearest, with one fault."""

    fault: str = ""

    name = "mine"
    needs = frozenset({"column_weight"})
    fills = Grid
    refusal = "rounds to a grid, and {format} has none; use int4-g64"
    turns = count()

    def fill(self, weight, format, stats):
        encoded = format.encode(weight, format.fit(weight))
        if self.fault == "wavers":
            return format.encode(weight, format.fit(weight, 1.0 - 0.25 * (next(self.turns) % 2)))
        if self.fault == "writes" and stats.column_weight is not None:
            stats.column_weight.mul_(2.0)
        if self.fault == "reshapes":
            return Encoded(format, (encoded.shape[1], encoded.shape[0]), encoded.parts)
        if self.fault == "jumps":
            return format.encode(-5 * weight, format.fit(-5 * weight))
        return encoded


def test_a_method_of_ones_own_keeps_the_laws():
    check_method(Mine(), [FORMATS[name] for name in ("int4-g32", "coded", "nf4")])


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("wavers", "method mine with format int4-g32 on .*: the same weight and statistics give other bytes"),
        ("writes", "compress changes the statistic column_weight that it is given: at"),
        ("reshapes", r"compress gives the shape \(\d+, \d+\), not"),
        ("jumps", "a weight went further than the range of its row"),
    ],
)
def test_a_methods_fault_is_said_in_a_sentence(fault, sentence):
    with pytest.raises(LawBroken, match=sentence):
        check_method(Mine(fault), [FORMATS["int4-g32"]], of=1)


def test_a_method_that_fits_nothing_and_one_that_shows_no_way_out():
    with pytest.raises(LawBroken, match="method mine: it accepts none of the 1 formats"):
        check_method(Mine(), [FORMATS["coded"]])

    class Curt(Mine):
        refusal = "cannot fill {format}"

    with pytest.raises(LawBroken, match="names no way out, such as '; use int4-g64': 'mine cannot fill coded'"):
        check_method(Curt(), [FORMATS["coded"]])
    with pytest.raises(TersorError, match="mine rounds to a grid, and coded has none; use int4-g64"):
        Mine().compress(torch.ones(2, 2), FORMATS["coded"], None)


# Tasks.


class Numbers:
    """Regression on random numbers, with one fault."""

    name, output, description, fingerprint = "numbers", "values", "64 rows of random numbers", "0"
    num_train = 32

    def __init__(self, fault=""):
        self.fault, self.x = fault, torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def prepare(self, original):
        pass

    def batches(self, split, batch_size=None):
        rows = np.arange(0, 16) if split == "calibration" else np.arange(8 if self.fault == "overlaps" else 16, 32)
        size = 8 if batch_size is None or self.fault == "sizes" else batch_size
        if self.fault == "shuffles":
            rows = np.random.default_rng().permutation(rows)
        for first in range(0, len(rows), size):
            yield Batch(rows[first : first + size], {"x": self.x[rows[first : first + size]]})

    def forward(self, model, batch):
        if self.fault == "evaluates":
            model.eval()
        output = model(batch.inputs["x"])
        return output.detach() if self.fault == "detaches" else output

    def score(self, model, split="eval"):
        was = model.training
        model.eval()
        rows = torch.cat([self.forward(model, batch) for batch in self.batches(split)]).detach().mean(1, keepdim=True)
        if self.fault != "stays":
            model.train(was)
        rows = rows.double().numpy()
        return Scores(METRICS["mean"], np.hstack([rows, rows]) if self.fault == "widens" else rows)

    def epoch(self, seed, batch_size=None):
        order = np.random.default_rng(None if self.fault == "reseeds" else seed).permutation(np.arange(32, 64))
        for first in range(0, 32, 8):
            yield Batch(order[first : first + 8], {"x": self.x[order[first : first + 8]]})

    def loss(self, output, batch):
        return output.square().mean(1) if self.fault == "rows" else output.square().mean()


FAULTS_OF_TASKS = {
    "overlaps": r"rows \[8, 9, 10, 11, 12\] are in the calibration split and in the eval split",
    "sizes": r"batches\('calibration', batch_size=1\) gives a batch of 8",
    "shuffles": r"batches\('calibration'\) gives other data the second time: at \[0",
    "evaluates": "forward changes the training mode of the model",
    "detaches": "forward gives no gradient to the parameters; calibration needs it",
    "stays": "score does not undo the evaluation mode",
    "widens": r"examples of shape \(16, 2\); the metric mean wants \[example, 1\]",
    "reseeds": "epoch gives other data for the same seed",
    "rows": r"loss gives the shape \[8\]; it must be a scalar",
}


def test_a_task_of_ones_own_keeps_the_laws():
    check_task(Numbers(), nn.Linear(8, 3))


@pytest.mark.parametrize("fault", FAULTS_OF_TASKS)
def test_a_tasks_fault_is_said_in_a_sentence(fault):
    with pytest.raises(LawBroken, match=f"task numbers: .*{FAULTS_OF_TASKS[fault]}"):
        check_task(Numbers(fault), nn.Linear(8, 3))


def test_a_task_says_its_output():
    task = Numbers()
    task.output = "numbers"
    with pytest.raises(LawBroken, match="output is 'numbers'; it must be one of logits, embedding, values"):
        check_task(task, nn.Linear(8, 3))


# Exporters.


@pytest.mark.parametrize("name", EXPORTS)
def test_clients_of_the_table_keep_the_laws(name):
    check_exporter(EXPORTS[name])


class Vague(type(EXPORTS["gptq"])):
    def why_not(self, packed):
        misfit = super().why_not(packed)
        return misfit and Misfit(misfit.holds, "int4-g32")


class Strict(type(EXPORTS["gptq"])):
    def why_not(self, packed):
        return Misfit(self.holds, "int4-g32") if packed.scheme == "bf16" else super().why_not(packed)


@pytest.mark.parametrize(
    ("client", "sentence"),
    [
        (Vague, r"exporter gptq, model.embed_tokens \(embedding, 64 x 256\) in int8: why_not advises int4-g32, and"),
        (Strict, "in bf16: it is refused; a client keeps what it cannot pack: Misfit"),
    ],
)
def test_a_clients_fault_is_said_in_a_sentence(client, sentence):
    with pytest.raises(LawBroken, match=sentence):
        check_exporter(client())


def test_clients_are_tried_on_every_kind_of_place():
    assert {site.kind for site in places()} == {"linear", "embedding", "conv"}


def test_no_test_framework_is_needed():
    code = "import sys, tersor.testing; sys.exit('pytest' in sys.modules or 'hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
