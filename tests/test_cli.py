"""The command line through its entry point: the main job, every verb, every bad input, and its frozen flags."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from cli_runner import tersor
from tersor.checkpoint.container import Container
from tersor.cli import app, console
from tersor.cli.signals import Stopped
from tersor.formats.overflow import keeps_pair_rule
from tersor.recipe import Recipe
from tersor.search import trials
from tersor.search.runners import contract
from tersor.tasks.progress import score

FACTORY = """
from torch import nn

def digits_net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64),
        nn.ReLU(), nn.Linear(64, 10))
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conv net trained on scikit-learn's digits: `digits_factory.py`, `digits.safetensors`,
    `digits.npz` (test part)."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "digits_factory.py").write_text(FACTORY)
    namespace: dict = {}
    exec(FACTORY, namespace)
    torch.manual_seed(0)
    model = namespace["digits_net"]()
    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:900], order[900:]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    x_train, y_train = torch.tensor(x[train]), torch.tensor(labels[train])
    for _ in range(12):
        for batch in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
    save_file(model.state_dict(), folder / "digits.safetensors")
    np.savez(folder / "digits.npz", x=x[test], y=labels[test])
    return folder


@pytest.fixture
def inside(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder from which the factory can be imported; returns that folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(digits))
    return tmp_path


def digits_arguments(digits: Path) -> list[object]:
    return ["digits_factory:digits_net", "--weights", digits / "digits.safetensors"]


def labelled(digits: Path) -> list[object]:
    return ["--task", "classification", "--data", digits / "digits.npz", "--batch", "1"]


def test_a_custom_conv_net_meets_its_budget_and_loads_in_a_new_process(digits, inside, capsys):
    made = tersor(
        capsys, "compress", *digits_arguments(digits), "--ratio", "5x", "--drop", "3%", *labelled(digits),
        "-o", "small", "--json",
    )  # fmt: skip
    assert made.status == 0, made.stdout
    original, compressed = made.json["scorecards"]
    assert original["score"] > 0.95
    assert 0.97 * made.json["limit"]["bytes"] < compressed["file_bytes"] <= made.json["limit"]["bytes"]
    assert compressed["file_bytes"] == (inside / "small" / "model.safetensors").stat().st_size
    assert made.json["verdict"]["outcome"] in ("within", "cannot tell")
    assert made.json["verdict"]["mcnemar_p"] > 0
    # A new process scores the loaded artifact exactly like the one that was measured.
    again = subprocess.run(
        [Path(sys.executable).parent / "tersor", "evaluate", "digits_factory:digits_net", "--weights", "small",
         *map(str, labelled(digits)), "--json"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(digits)},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["scorecard"]["score"] == compressed["score"]


def test_the_saved_recipe_makes_the_same_bytes(digits, inside, capsys):
    first = ["compress", *digits_arguments(digits), *labelled(digits), "--bits", "6", "-o", "a", "--json"]
    assert tersor(capsys, *first).status == 0
    again = tersor(
        capsys,
        "compress",
        *digits_arguments(digits),
        *labelled(digits),
        "--recipe",
        "a/recipe.yaml",
        "-o",
        "b",
        "--json",
    )
    assert again.status == 0, again.stdout
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert Recipe.from_file(Path("a/recipe.yaml")) == Recipe.from_file(Path("b/recipe.yaml"))


@pytest.mark.parametrize("cpu", ["any", "vnni"])
def test_the_recipe_says_where_products_are_exact(cpu, digits, inside, capsys):
    given = ["--format", "nearest:int8-static", "--cpu", cpu, "-o", "small", "--timing-seconds", "0.1", "--json"]
    made = tersor(capsys, "compress", *digits_arguments(digits), *labelled(digits), *given)
    assert made.status == 0, made.stderr
    assert made.json["recipe"]["steps"][0]["cpu"] == cpu
    codes = [t for name, t in load_file(inside / "small" / "model.safetensors").items() if name.endswith(".codes")]
    assert all(keeps_pair_rule(each) for each in codes if each.shape[1] > 9 * 16) == (cpu == "any")


def test_drop_finds_the_smallest_defensible_model(digits, inside, capsys):
    made = tersor(capsys, "compress", *digits_arguments(digits), *labelled(digits), "--drop", "5%", "-o", "s", "--json")
    assert made.status == 0, made.stdout
    within = [t["bytes"] for t in made.json["trials"] if t["verdict"]["outcome"] == "within"]
    assert made.json["scorecards"][1]["file_bytes"] == min(within)
    assert made.json["verdict"]["outcome"] == "within"
    assert made.json["verdict"]["alpha"] < 0.05  # held to the level of a search of several trials


def test_a_search_tells_its_trials_makes_the_winner_once_and_goes_on_where_it_was_stopped(
    digits, inside, capsys, monkeypatch
):
    scored, judge = [], trials.judge
    monkeypatch.setattr(contract, "score", lambda *args: scored.append(args) or score(*args))

    def stop_in_the_third(*args, **options):
        if len(scored) == 3:
            raise Stopped(signal.SIGINT)
        return judge(*args, **options)

    start = ["compress", *digits_arguments(digits), *labelled(digits), "--drop", "5%", "--format", "int8", "--format"]
    start += ["int4", "-o", "s"]
    with monkeypatch.context() as patch:
        patch.setattr(trials, "judge", stop_in_the_third)
        stopped = tersor(capsys, *start)
    assert stopped.status == 130
    told = stopped.stderr.count("trial: ")
    assert told >= 2
    assert f"{told} trials had finished" in " ".join(stopped.stderr.split())
    assert sorted(path.name for path in inside.iterdir()) == [".s.trials"]

    scored.clear()
    made = tersor(capsys, *start)
    assert made.status == 0, made.stderr
    told = made.stderr.count("trial: ")
    assert told == len(json.loads(Path("s/tersor.json").read_text(encoding="utf-8"))["trials"])
    assert len(scored) <= told - 3, "the two that had been judged, and the third that had been scored, are known"
    assert not Path(".s.trials").exists()
    assert "evaluating the compressed model" not in made.stderr


@pytest.mark.parametrize(
    "trellis", [pytest.param(["--num-states", "0"], marks=pytest.mark.slow), []], ids=["steps", "trellis"]
)
def test_coded_weights_end_just_below_the_budget_and_the_recipe_makes_the_same_bytes(digits, inside, capsys, trellis):
    start = ["compress", *digits_arguments(digits), *labelled(digits)]
    made = tersor(capsys, *start, "--ratio", "12x", "--coded", *trellis, "-o", "a", "--json")
    assert made.status == 0, made.stdout
    assert ("num_states=64" in Path("a/recipe.yaml").read_text()) == (not trellis)
    limit = made.json["limit"]["bytes"]
    assert 0.995 * limit <= (inside / "a" / "model.tersor").stat().st_size <= limit
    assert made.json["scorecards"][1]["file_bytes"] == (inside / "a" / "model.tersor").stat().st_size
    again = tersor(capsys, *start, "--recipe", "a/recipe.yaml", "-o", "b", "--json")
    assert again.status == 0, again.stdout
    assert Path("a/model.tersor").read_bytes() == Path("b/model.tersor").read_bytes()
    scored = ["evaluate", "digits_factory:digits_net", "--weights", "a", *labelled(digits)]
    cards = [tersor(capsys, *scored, *lazy, "--json").json["scorecard"] for lazy in ([], ["--lazy"])]
    assert cards[0]["score"] == cards[1]["score"] == made.json["scorecards"][1]["score"]
    refusal = refused(capsys, inside, "evaluate", *digits_arguments(digits), *labelled(digits), "--lazy")
    assert "only an artifact's entropy-coded weights" in refusal


DEEP_COMPRESSION = """
steps:
- {step: prune, sparsity: 0.9, epochs: 8, batch_size: 64, learning_rate: 2.0e-3, alpha: 0.5, num_evaluations: 0}
- {step: weights, scheme: 'kmeans:codebook16-tensor'}
- {step: tune-scales, num_steps: 20, batch_size: 64, alpha: 0.5, num_evaluations: 0}
"""


def test_training_has_one_bar_however_its_loss_changes(monkeypatch):
    """A bar for every loss made each step slower than the one before."""
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, width=100))
    with console.progress_bars() as report:
        for work in ("prune", "tune-scales"):
            for step in range(5):
                report(f"{work}: loss {1 / (step + 1):.3g}", step, 4)
    shown = [line.partition(" ━")[0].strip() for line in written.getvalue().splitlines()]
    assert shown == ["prune: loss 0.2", "tune-scales: loss 0.2"]


def test_deep_compression_is_a_recipe(digits, inside, capsys):
    """Prune, retrain, share, retrain what is shared, code: as few values a site as were asked for, zeros that cost
    what their share says, and still the model."""
    images, labels = load_digits(return_X_y=True)
    train = np.random.default_rng(0).permutation(len(images))[:900]
    np.savez("train.npz", x=(images[train].reshape(-1, 1, 8, 8) / 16).astype(np.float32), y=labels[train])
    Path("deep.yaml").write_text(DEEP_COMPRESSION)
    made = tersor(
        capsys, "compress", *digits_arguments(digits), *labelled(digits), "--train", "train.npz", "--recipe",
        "deep.yaml", "-o", "shared", "--json",
    )  # fmt: skip
    assert made.status == 0, made.stdout
    assert made.json["verdict"]["drop"] < 0.05
    packed = tersor(capsys, "pack", "shared", "-o", "coded", "--json")
    assert packed.status == 0, packed.stdout
    back = tersor(capsys, "unpack", "coded", "-o", "plain", "--json")
    assert back.status == 0, back.stdout
    weights = {name: w for name, w in load_file("plain/model.safetensors").items() if w.ndim > 1}
    num_weights, num_kept = sum(w.numel() for w in weights.values()), sum(int((w != 0).sum()) for w in weights.values())
    assert num_kept <= 0.1 * num_weights + len(weights)
    assert all(len(w.unique()) <= 16 for w in weights.values())
    container = Container(inside / "coded" / "model.tersor")
    codes = sum(container.stored_bytes(name) for name in container.entries if name.endswith(".codes"))
    assert codes < 9 / 8 * num_kept  # Han et al. before Huffman: 4 bits for the value, 5 for the gap to the next


@pytest.mark.slow
def test_coded_weights_are_searched_for_a_drop(digits, inside, capsys):
    start = ["compress", *digits_arguments(digits), *labelled(digits), "--drop", "5%"]
    plain, made = tersor(capsys, *start, "-o", "p", "--json"), tersor(capsys, *start, "--coded", "-o", "s", "--json")
    assert made.status == 0, made.stdout
    within = [t["bytes"] for t in made.json["trials"] if t["verdict"]["outcome"] == "within"]
    assert made.json["scorecards"][1]["file_bytes"] == min(within)
    assert made.json["verdict"]["outcome"] == "within"
    assert min(within) < plain.json["scorecards"][1]["file_bytes"]


def test_biases_are_corrected(digits, inside, capsys):
    """The flag is a line of the recipe, and only biases differ."""
    start = ["compress", *digits_arguments(digits), *labelled(digits), "--format", "nearest:int4", "--json"]
    plain, made = tersor(capsys, *start, "-o", "p"), tersor(capsys, *start, "--bias-correction", "-o", "c")
    assert (plain.status, made.status) == (0, 0), made.stdout
    assert Recipe.from_file(Path("c/recipe.yaml")).weights[0].bias_correction
    one, other = load_file("p/model.safetensors"), load_file("c/model.safetensors")
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert "0.bias" in differ
    assert all(name.endswith(".bias") for name in differ)


def test_rules_excludes_and_the_tables(digits, inside, capsys):
    made = tersor(
        capsys, "compress", *digits_arguments(digits), *labelled(digits), "--format", "int4",
        "--rule", "8=hqq:int8-g32-asym", "--exclude", "10", "-o", "s",
    )  # fmt: skip
    assert made.status == 0, made.stderr
    assert "verdict:" in made.stdout
    assert "x smaller)" in made.stdout
    stored = load_file("s/model.safetensors")
    assert "10.weight" in stored
    assert stored["8.weight.zero_point"].shape == (64, 16)
    assert stored["0.weight.codes"].dtype is torch.uint8
    compared = tersor(
        capsys, "compare", *digits_arguments(digits), "digits_factory:digits_net", "--weights", "s",
        *labelled(digits), "--json",
    )  # fmt: skip
    assert compared.status == 0, compared.stdout
    assert compared.json["verdict"]["num_examples"] == compared.json["scorecards"][0]["num_examples"]
    assert compared.json["verdict"]["sentence"].startswith(compared.json["verdict"]["outcome"])


@pytest.mark.parametrize(("outcome", "status"), [("within", 0), ("exceeds", 1), ("cannot tell", 3)])
def test_the_exit_code_is_that_of_the_verdict_where_it_is_asked_for(outcome, status, digits, inside, capsys):
    """A model beside itself, and beside one without its last weights; tolerance 0 cannot be shown."""
    state = load_file(digits / "digits.safetensors")
    save_file({**state, "10.weight": torch.zeros_like(state["10.weight"])}, "broken.safetensors")
    other = "broken.safetensors" if outcome == "exceeds" else digits / "digits.safetensors"
    arguments = [
        "compare", *digits_arguments(digits), "digits_factory:digits_net", "--weights", other, *labelled(digits),
        "--drop", "0" if outcome == "cannot tell" else "5%", "--json",
    ]  # fmt: skip
    asked = tersor(capsys, *arguments, "--exit-code")
    assert (asked.json["verdict"]["outcome"], asked.status) == (outcome, status)
    assert status == 3 or tersor(capsys, *arguments).status == 0


@pytest.mark.parametrize("verb", ["formats", "methods"])
def test_the_tables_of_what_exists(verb, capsys):
    assert "int4-g64" in tersor(capsys, verb).stdout or verb == "methods"
    assert tersor(capsys, verb, "--json").json[verb]


def test_latency_says_the_batch_it_really_ran(digits, inside, capsys):
    shown = tersor(
        capsys, "evaluate", *digits_arguments(digits), "--task", "classification", "--data", digits / "digits.npz",
        "--task-option", "max_examples=50", "--batch", "1,4,999", "--json",
    )  # fmt: skip
    assert [latency["batch_size"] for latency in shown.json["scorecard"]["latency"]] == [1, 4, 50]


def test_inspect_counts_every_byte(digits, inside, capsys):
    shown = tersor(capsys, "inspect", *digits_arguments(digits), "--json").json
    model = load_file(digits / "digits.safetensors")
    site_bytes = sum(4 * site["weights"] for site in shown["sites"])
    assert site_bytes + shown["kept_bytes"] == sum(tensor.nbytes for tensor in model.values())
    assert {cost["format"] for cost in shown["formats"]} >= {"mse:int4", "nearest:bf16"}
    table = tersor(capsys, "inspect", *digits_arguments(digits))
    assert "int4-g128" in table.stdout
    assert table.status == 0


# Bad inputs: one clear message, a non-zero status, nothing left behind.


def refused(capsys, inside: Path, *arguments: object) -> str:
    before = sorted(inside.rglob("*"))
    result = tersor(capsys, *arguments)
    assert result.status == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert sorted(inside.rglob("*")) == before
    return " ".join(result.stderr.split("error:", 1)[1].split())


def test_missing_folder(inside, capsys):
    assert "no such file or folder" in refused(capsys, inside, "compress", "./nowhere", "--ratio", "4x", "-o", "out")


def test_pickled_weights_that_name_code(inside, capsys):
    folder = inside / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"a": print}, folder / "pytorch_model.bin")
    message = refused(capsys, inside, "compress", folder, "--ratio", "4x", "-o", "out")
    assert "print, whose code would run" in message
    assert "torch.save(" in message  # the way out
    message = refused(
        capsys, inside, "compress", "m:f", "--weights", folder / "pytorch_model.bin", "--bits", "4", "-o", "o"
    )
    assert "m" in message


def test_groups_wider_than_a_row(digits, inside, capsys):
    """9 columns in groups of 128: one group, shorter than the others would be."""
    made = tersor(
        capsys, "compress", *digits_arguments(digits), *labelled(digits), "--format", "int4-g128", "-o", "out", "--json"
    )
    assert made.status == 0, made.stderr
    sites = json.loads((inside / "out" / "tersor.json").read_text(encoding="utf-8"))["sites"]
    assert {site["format"] for site in sites.values()} == {"int4-g128"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(digits, inside, capsys, value):
    state = load_file(digits / "digits.safetensors")
    state["4.weight"][3, 2, 1, 1] = value
    save_file(state, inside / "bad.safetensors")
    message = refused(
        capsys,
        inside,
        "compress",
        "digits_factory:digits_net",
        "--weights",
        "bad.safetensors",
        "--ratio",
        "4x",
        "-o",
        "out",
    )
    assert "4.weight: 1 of 4608 values are NaN" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "empty"), ("sentence1,sentence2,score\na,b,c\nd,e,0.5\n", "line 2"), ("only one column\nx\n", "sentence1")],
)
def test_malformed_csv(minilm, inside, capsys, content, expected):
    (inside / "data.csv").write_text(content)
    message = refused(
        capsys, inside, "compress", minilm, "--task", "similarity", "--data", "data.csv", "--ratio", "4x", "-o", "out"
    )
    assert "data.csv" in message
    assert expected in message


def test_budget_below_every_format(digits, inside, capsys):
    message = refused(
        capsys, inside, "compress", *digits_arguments(digits), *labelled(digits), "--size", "2KB", "-o", "out"
    )
    assert "the nearest reachable file is" in message
    assert "bytes are stored as they are, and" in message
    reachable = message.split("--size ")[1].split(".")[0]
    made = tersor(
        capsys, "compress", *digits_arguments(digits), *labelled(digits), "--size", reachable, "-o", "out", "--json"
    )
    assert made.status == 0, made.stdout


def test_unwritable_and_existing_output(digits, inside, capsys):
    arguments = ["compress", *digits_arguments(digits), *labelled(digits), "--format", "int8"]
    assert "does not exist" in refused(capsys, inside, *arguments, "-o", "no/such/parent/out")
    if Path("/proc/self").exists():  # not even root can write there
        assert "cannot write in /proc" in refused(capsys, inside, *arguments, "-o", "/proc/out")
    (inside / "mine").mkdir()
    (inside / "mine" / "thesis.txt").write_text("precious")
    assert "exists" in refused(capsys, inside, *arguments, "-o", "mine")
    assert "mine: it holds thesis.txt" in refused(capsys, inside, *arguments, "-o", "mine", "--overwrite")


def test_unknown_names_suggest_the_nearest(digits, inside, capsys):
    start = ["compress", *digits_arguments(digits), "-o", "out"]
    assert "did you mean 'hqq'" in refused(capsys, inside, *start, "--format", "hq:int4")
    assert "did you mean 'hqq'" in refused(capsys, inside, *start, "--method", "hqqq", "--format", "int4")
    assert "did you mean 'int4-g64'" in refused(capsys, inside, *start, "--format", "int4-g63")
    assert "did you mean 'similarity'" in refused(capsys, inside, *start, "--task", "similarty", "--ratio", "4x")
    assert "fc" in refused(capsys, inside, *start, *labelled(digits), "--format", "int8", "--exclude", "fc")


def test_truncated_safetensors(digits, inside, capsys):
    whole = (digits / "digits.safetensors").read_bytes()
    (inside / "cut.safetensors").write_bytes(whole[:-100])
    message = refused(
        capsys,
        inside,
        "compress",
        "digits_factory:digits_net",
        "--weights",
        "cut.safetensors",
        "--ratio",
        "4x",
        "-o",
        "out",
    )
    assert "cut.safetensors: not a whole safetensors file" in message


def test_contradictions_and_nonsense(digits, inside, capsys):
    start = ["compress", *digits_arguments(digits), *labelled(digits), "-o", "out"]
    assert "give one" in refused(capsys, inside, *start, "--size", "1MB", "--ratio", "4x")
    assert "--size '8 apples'" in refused(capsys, inside, *start, "--size", "8 apples")
    assert "--ratio 'four'" in refused(capsys, inside, *start, "--ratio", "four")
    assert "say what you want" in refused(capsys, inside, *start)
    assert "use bitmask" in refused(capsys, inside, *start, "--format", "magnitude:int8")
    assert "sparsity" in refused(capsys, inside, *start, "--format", "magnitude(sparsity=2):bitmask")
    assert "--recipe says everything" in refused(
        capsys, inside, *start, "--recipe", write(inside / "r.yaml", Recipe.of("int8").to_yaml()), "--ratio", "4x"
    )
    assert "go with one --format" in refused(capsys, inside, *start, "--ratio", "4x", "--bias-correction")
    assert "go with one --format" in refused(capsys, inside, *start, "--ratio", "4x", "--keep-float", "auto")
    assert "not auto, none or a number" in refused(capsys, inside, *start, "--format", "int8", "--keep-float", "-1")
    assert "9 of 4 sites" in refused(capsys, inside, *start, "--format", "int8", "--keep-float", "9")
    assert "steps" in refused(capsys, inside, *start, "--recipe", write(inside / "bad.yaml", "scheme: int8"))
    assert (
        "no module named" in refused(capsys, inside, "compress", "nothing_here:f", "--bits", "4", "-o", "out").lower()
    )
    assert "KEY=VALUE" in refused(capsys, inside, *start, "--bits", "4", "--task-option", "context")


def test_what_cannot_be_compressed_is_said_at_once(digits, inside, capsys):
    Path("odd.py").write_text(
        "from torch import nn\n"
        "def norm(): return nn.Sequential(nn.LayerNorm(8))\n"
        "def tiny():\n"
        "    model = nn.Sequential(nn.Linear(8, 8))\n"
        "    nn.init.constant_(model[0].weight, 1e-9)\n"
        "    return model\n"
    )
    np.savez("x.npz", x=np.zeros((60, 8), np.float32))
    data = ["--data", "x.npz", "--batch", "1", "-o", "out"]
    assert "no weight that tersor can compress" in refused(
        capsys, inside, "compress", "odd:norm", "--ratio", "2x", *data
    )
    assert "every weight to zero" in refused(capsys, inside, "compress", "odd:tiny", "--format", "int8", *data)
    np.savez("wide.npz", x=np.zeros((60, 9), np.float32))
    data[1] = "wide.npz"
    assert "cannot take x of shape" in refused(capsys, inside, "compress", "odd:tiny", "--format", "int8", *data)
    many = ["--weights", "a", "--weights", "b", "--weights", "c"]
    assert "3 --weights for 2 models" in refused(capsys, inside, "compare", "odd:tiny", "odd:tiny", *many)
    os.symlink("/nonexistent", "link")
    assert "exists" in refused(capsys, inside, "compress", "odd:tiny", "--format", "int8", "-o", "link")


def test_the_rule_that_stands_last_counts(digits, inside, capsys):
    made = tersor(
        capsys, "compress", *digits_arguments(digits), *labelled(digits), "--rule", "0=int8", "--rule", "*=int4",
        "--rule", "0=int2", "-o", "s", "--json",
    )  # fmt: skip
    assert {report["name"]: report["scheme"] for report in made.json["site_reports"]}["0"] == "gptq:int2"
    assert (inside / "s" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_errors_under_json_are_json(inside, capsys):
    result = tersor(capsys, "compress", "./nowhere", "--ratio", "4x", "-o", "out", "--json")
    assert result.status == 2
    assert "no such file or folder" in result.json["error"]


def test_damaged_artifact(digits, inside, capsys):
    arguments = ["compress", *digits_arguments(digits), *labelled(digits), "--format", "int8", "-o", "a", "--json"]
    assert tersor(capsys, *arguments).status == 0
    shutil.copytree("a", "b")
    with open("b/model.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x55")
    damaged = ["evaluate", "digits_factory:digits_net", "--weights", "b", *labelled(digits)]
    assert "changed or damaged" in refused(capsys, inside, *damaged)


def test_code_that_an_artifact_names_is_not_run(digits, inside, capsys):
    arguments = ["compress", *digits_arguments(digits), *labelled(digits), "--format", "int8", "-o", "a", "--json"]
    assert tersor(capsys, *arguments).status == 0
    message = refused(capsys, inside, "evaluate", "a", *labelled(digits))
    assert "name it yourself: 'digits_factory:digits_net' with --weights a" in message


FLAGS = {
    "compress": "--output -o --size --ratio --bits --drop --coded --num-states --format --method --rule --exclude "
    "--transform --bias-correction --keep-float --cpu --recipe --weights --task --data --calibration --train "
    "--task-option --batch --timing-seconds --seed --threads --overwrite --stream --exit-code --dtype --json",
    "inspect": "--weights --format --sensitivity --measure --training-memory --batch-size --context --lora --base "
    "--optimizer --task --data --calibration --train --task-option --seed --dtype --json",
    "bench": "--runtime --weights --batch --threads --new-tokens --prompt --length --shape --task --data --task-option "
    "--dtype --seconds --cpu-time --no-memory --seed --json",
    "explain": "--against --runtime --weights --batch --length --shape --threads --dtype --seconds --rows --remeasure "
    "--seed --json",
    "evaluate": "--weights --task --data --calibration --task-option --batch --timing-seconds --threads --lazy "
    "--dtype --json",
    "compare": "--weights --task --data --calibration --task-option --drop --batch --timing-seconds --seed --threads "
    "--exit-code --dtype --json",
    "pack": "--output -o --overwrite --json",
    "unpack": "--output -o --overwrite --json",
    "verify": "--json",
    "info": "--against --json",
    "student": "--output -o --layers --width --hidden --intermediate --heads --dtype --overwrite --json",
    "finetune": "--output -o --lora --base --save-base --weights --task --data --calibration --train --task-option "
    "--epochs --steps --batch-size --accumulate --learning-rate --warmup --schedule --optimizer --weight-decay "
    "--precision --gradient-checkpointing --evaluations --patience --dtype --drop --seed --overwrite --exit-code "
    "--json",
    "merge": "--output -o --task --data --calibration --train --task-option --dtype --seed --overwrite --json",
    "export": "--to --output -o --weights --task --data --task-option --shape --fixed --dtype --per-token "
    "--float-outputs --decode --no-cache --cpu --runtime-path --threads --overwrite --json",
    "formats": "--json",
    "methods": "--json",
    "targets": "--json",
}


def test_flags_are_frozen():
    """A new flag is a decision: it is written here, too."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {opt for p in command.params for opt in (*p.opts, *p.secondary_opts) if opt.startswith("-")}
        for name, command in commands.items()
    }
    assert found == {name: set(flags.split()) for name, flags in FLAGS.items()}


def test_a_model_is_measured_in_another_type(digits, inside, capsys):
    half = tersor(capsys, "inspect", *digits_arguments(digits), "--dtype", "float16", "--json")
    assert {site["dtype"] for site in half.json["sites"]} == {"float16"}
    wrong = tersor(capsys, "inspect", *digits_arguments(digits), "--dtype", "fp16")
    assert wrong.status == 2
    assert "unknown --dtype 'fp16'" in wrong.stderr


def test_the_version_is_said(capsys):
    assert tersor(capsys, "--version").stdout.startswith("tersor ")
