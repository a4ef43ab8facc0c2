"""The public names, each called once on a small model as one would type it first."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError, UnknownName
from tersor.tasks.data import Data

NAMES = {
    *("EXPORTS", "FORMATS", "METHODS", "METRICS", "TASKS"),
    *("Compressed", "Events", "Exported", "Metric", "Recipe", "Result", "Scores", "Site", "TersorError", "Tolerance"),
    *("Verdict", "bench", "compare", "compress", "evaluate", "export", "find_sites", "finetune", "inspect", "judge"),
    *("load", "open_task", "pack", "plan", "run", "save", "unpack", "verify"),
}
QUICK = {"batch_sizes": 1, "timing_seconds": 0.1}
MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 2))
"""


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A folder with a model of two layers in a file of its own, and points that a line parts."""
    (tmp_path / "api_model.py").write_text(MODEL)
    x = np.random.default_rng(0).normal(size=(80, 8)).astype(np.float32)
    np.savez(tmp_path / "points.npz", x=x, y=(x[:, 0] > 0).astype(np.int64), x_train=x, y_train=(x[:, 0] > 0) * 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("api_model", None)


@pytest.fixture
def model(inside):
    from api_model import make

    return make()


POINTS = {"task": "classification", "data": "points.npz"}


def test_these_names_are_public_and_no_other():
    assert set(tersor.__all__) == NAMES
    assert all(getattr(tersor, name).__doc__ for name in NAMES if callable(getattr(tersor, name)))


@pytest.mark.parametrize("ask", [{"size": "5kB"}, {"size": 5000}, {"ratio": 2}, {"bits": 16}], ids=str)
def test_a_budget_and_a_verdict(inside, ask):
    result = tersor.compress("api_model:make", **ask, **POINTS, formats=["int4", "int8"], **QUICK)
    assert isinstance(result.recipe, tersor.Recipe)
    assert result.verdict.outcome in ("within", "exceeds", "cannot tell")
    assert result.verdict.sentence() in result.report
    assert result.scorecards[1].file_bytes <= result.limit.num_bytes
    result.save("smaller")
    assert "# smaller" in (inside / "smaller" / "README.md").read_text()
    assert tersor.verify("smaller").checked.is_whole
    x = torch.ones(3, 8)
    again = tersor.load("smaller", model=nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 2)))
    assert torch.equal(again(x), result.model(x))
    with pytest.raises(InputError, match="smaller exists"):
        result.save("smaller")
    result.save("smaller", overwrite=True)


def test_the_smallest_within_a_drop(inside):
    trials = []
    result = tersor.compress(
        "api_model:make", drop="50%", **POINTS, formats=["int2", "int8"], output="out", on_trial=trials.append, **QUICK
    )
    assert result.verdict.outcome == "within"
    assert trials == result.trials != []
    assert (inside / "out" / "tersor.json").exists()


def test_a_module_in_memory_stays_as_it_is(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    notes = []
    result = tersor.compress(model, "int8", **POINTS, on_note=notes.append, dtype="bfloat16", **QUICK)
    assert result.verdict is not None
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert next(iter(result.model.parameters())).dtype == torch.bfloat16
    assert notes == result.notes
    result.save("smaller")
    tersor.load("smaller", model=model)


def test_a_module_and_a_recipe_are_compressed_in_memory(model):
    """The call of old: a task that calibrates, and no verdict."""
    task = tersor.open_task("classification", "points.npz")
    seen = []
    result = tersor.compress(model, tersor.Recipe.of("gptq:int4"), task, progress=lambda *each: seen.append(each))
    assert [site.scheme for site in result.sites] == ["gptq:int4"] * 2
    assert result.verdict is None
    assert "0: gptq:int4" in result.report
    assert seen
    done = tersor.run("gptq:int4", model, task)
    x = torch.ones(3, 8)
    assert torch.equal(done.model(x), result.model(x))
    result.save("in-memory")
    assert tersor.compress(model, "gptq:int4", task, drop="1%", **QUICK).verdict is not None
    assert torch.equal(tersor.load("in-memory", model=model)(x), done.model(x))


def test_a_recipe_file_and_a_task_in_memory(inside, model):
    (inside / "recipe.yaml").write_text(tersor.Recipe.of("int8").to_yaml())
    task = tersor.open_task("classification", "points.npz")
    result = tersor.compress("api_model:make", "recipe.yaml", task, **QUICK)
    assert {site.scheme for site in result.sites} == {"gptq:int8"}
    with pytest.raises(InputError, match="a task in memory brings its own data"):
        tersor.compress("api_model:make", "int8", task, data="points.npz")


def test_evaluate_compare_inspect(inside, model):
    tersor.save(tersor.compress(model, "int8").model, "smaller")
    card = tersor.evaluate(model, **POINTS, **QUICK).scorecard
    assert 0 <= card.score <= 1
    small = tersor.evaluate("api_model:make", weights="smaller", **POINTS, **QUICK).scorecard
    assert small.file_bytes < card.file_bytes
    found = tersor.compare(model, "api_model:make", data=Data("classification", inside / "points.npz"), **QUICK)
    assert found.verdicts[0].drop == 0
    assert len(found.scorecards) == 2
    inspected = tersor.inspect(model, "int4")
    assert [site.name for site in inspected.sites] == ["0", "2"]
    assert [row["format"] for row in inspected.formats] == ["mse:int4"]


def test_finetune(inside):
    made = tersor.finetune("api_model:make", "tuned", num_steps=4, **POINTS)
    assert (inside / "tuned").is_dir()
    assert len(made.curve.losses) == 4
    with pytest.raises(InputError, match="learning_rat"):
        tersor.finetune("api_model:make", "again", learning_rat=1, **POINTS)


def test_bench(inside):
    found = tersor.bench("api_model:make", "api_model:make", batch_sizes=2, seconds=0.05, memory=False)
    assert [timing.latency.batch_size for timing in found.timings] == [2, 2]


def test_export_by_suffix(inside):
    pytest.importorskip("onnxruntime")
    made = tersor.export("api_model:make", "small.onnx", shape=(8,))
    assert (made.to, made.output.name) == ("onnx", "small.onnx")
    with pytest.raises(InputError, match="name the client"):
        tersor.export("api_model:make", "small.bin")


def test_pack_and_unpack(inside, model):
    from safetensors.torch import load_file, save_file

    save_file(model.state_dict(), "w.safetensors")
    assert tersor.pack("w.safetensors", "w.tersor").after > 0
    tersor.unpack("w.tersor", "back.safetensors")
    assert all(torch.equal(load_file("back.safetensors")[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tersor.compress("api_model:make", sise="1MB"), "unknown argument 'sise': did you mean 'size'"),
        (lambda: tersor.evaluate("api_model:make", dtype="fp99"), "unknown --dtype 'fp99'"),
        (lambda: tersor.compress("api_model:make", "int8", size="1MB"), "--recipe says everything already"),
        (lambda: tersor.compress("api_model:make"), "say what you want"),
        (lambda: tersor.compress("nowhere/at/all", "int8"), "no such"),
        (lambda: tersor.bench("api_model:make", threads=0), "--threads '0' is not"),
    ],
)
def test_mistakes_are_named(inside, call, message):
    with pytest.raises((InputError, UnknownName), match=message):
        call()
    assert sorted(path.name for path in inside.iterdir() if path.name != "__pycache__") == [
        "api_model.py",
        "points.npz",
    ]


class Net(nn.Module):
    pass


TEXTS, LOADER = ["one", "two"], torch.utils.data.DataLoader(torch.zeros(4, 2))
WRONG = [
    (tersor.compress, ("m", 4), {}, "recipe=4 is of type int; give a Recipe"),
    (tersor.compress, ("m", {"format": "int4"}), {}, "recipe=.* is of type dict"),
    (tersor.compress, ("m", nn.Linear), {}, "recipe=... is the class Linear"),
    (tersor.compress, ("m", "w8a8"), {"data": LOADER}, "data=... is of type DataLoader; give the path"),
    (tersor.compress, ("m", "w8a8"), {"calibration": TEXTS}, "calibration=.* is of type list; give the path"),
    (tersor.compress, ("m", "w8a8"), {"task": LOADER}, "task=... is of type DataLoader"),
    (tersor.compress, ("m",), {"ratio": 4, "formats": 4}, "formats=4 is of type int; give a name"),
    (tersor.compress, ("m",), {"ratio": 4, "threads": 2.5}, "threads=2.5 is of type float"),
    (tersor.compress, ("m", "w8a8"), {"seed": "x"}, "seed='x' is of type str; give a whole number"),
    (tersor.compress, ("m",), {"ratio": 4, "on_progress": 3}, "on_progress=3 is of type int; give a function"),
    (tersor.evaluate, ("m", "text", TEXTS), {}, "data=.* is of type list"),
    (tersor.compare, (), {}, r"models=\(\) is of type tuple; give one model"),
    (tersor.bench, (), {}, "models="),
    (tersor.finetune, ("m", None, "text"), {}, "output=None is of type NoneType; give the path"),
    (tersor.finetune, ("m", "out", "text"), {"lora": 16}, "lora=16 is of type int; give a mapping"),
    (tersor.export, ("m", "a.onnx"), {"shape": "4"}, "shape='4' is of type str; give a list of whole numbers"),
    (tersor.export, ("m", "a.onnx"), {"shape": [None, 64]}, "shape="),
    (tersor.inspect, ("m", [4]), {}, r"formats=\[4\] is of type list"),
    (tersor.load, (None,), {}, "folder=None"),
    (tersor.load, ("nowhere",), {"model": Net}, "model=... is the class Net; give an instance"),
    (tersor.load, ("nowhere",), {"dtype": "x"}, "dtype='x' is of type str"),
    (tersor.verify, (4,), {}, "artifact=4 is of type int"),
    (tersor.pack, (Net(), "out"), {}, "model=... is of type Net; give the path"),
]


@pytest.mark.parametrize(("verb", "args", "more", "message"), WRONG)
def test_arguments_of_the_wrong_type_are_named_before_anything_is_done(inside, verb, args, more, message):
    with pytest.raises(tersor.TersorError, match=message):
        verb(*args, **more)
