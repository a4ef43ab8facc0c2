"""The page folder: complete, the same numbers as ONNX Runtime's, and run by Chromium as any visitor would."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import tersor
import tersor.exporters.check
from cli_runner import tersor as command
from tersor import Recipe, export
from tersor.checkpoint.seal import SEAL
from tersor.core.errors import FormatError, InputError
from tersor.exporters import web
from tersor.exporters.folder import PROVENANCE
from tersor.runtimes import runtime_named


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """Latencies are not judged here, and no node_modules lies about."""
    monkeypatch.setattr(tersor.exporters.check, "SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(400, 10))


SHAPES = {linear: (64,), convolutions: (3, 9, 9)}


class Calibration:
    """Random inputs as a task to calibrate on."""

    name, output, description, fingerprint = "examples", "values", "", ""

    def __init__(self, shape: tuple[int, ...]):
        self.inputs = {"x": torch.randn(16, *shape)}

    def prepare(self, original):
        pass

    def batches(self, split, batch_size=None):
        yield self.inputs

    def forward(self, model, batch):
        return model(batch["x"])

    def score(self, model, split="eval"):
        raise NotImplementedError


def exported(build, scheme: str, **options):
    """The page of a small model, in the folder `page`."""
    model = tersor.compress(build(), Recipe.of(scheme), Calibration(SHAPES[build])).model
    tersor.save(model, Path("artifact"))
    return export(
        f"test_web:{build.__name__}", "page", to="web", weights="artifact", shape=SHAPES[build], options=options
    )


def package(folder: Path, name: str = "onnxruntime-web") -> Path:
    """A folder like npm's, with files of a few bytes."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name, "version": "9.8.7", "license": "MIT"}))
    for file in web.FILES:
        (folder / "dist" / file).write_text(file)
    return folder


class Page(NamedTuple):
    """What a page's folder says."""

    feeds: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    made: dict[str, np.ndarray]


def read(folder: Path) -> Page:
    """The examples of a page, and what ONNX Runtime makes of them now."""
    about, data = json.loads((folder / PROVENANCE).read_text()), (folder / "examples.bin").read_bytes()

    def array(place: dict[str, Any]) -> np.ndarray:
        dtype = np.dtype(place["type"])
        return np.frombuffer(data, dtype, place["bytes"] // dtype.itemsize, place["offset"])

    feeds = {each["name"]: array(each).reshape(each["dims"]) for each in about["inputs"]}
    expected = {each["name"]: array(each) for each in about["outputs"]}
    return Page(feeds, expected, runtime_named("onnx").open(folder / "model.onnx").run(feeds))


def test_the_folder_holds_the_model_its_examples_and_what_onnx_runtime_made_of_them():
    made = exported(linear, "int8/int8-dynamic")
    folder = made.output
    assert {path.name for path in folder.iterdir()} == {
        *("model.onnx", "index.html", "app.js", "examples.bin", PROVENANCE, SEAL)
    }
    assert made.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    page = read(folder)
    assert page.feeds["x"].shape == (4, 64)
    assert np.array_equal(page.expected["output"], page.made["output"].reshape(-1))
    about = json.loads((folder / PROVENANCE).read_text())
    assert about["sites"] == made.formats
    assert about["formats"] == "2 sites int8/int8-dynamic"
    assert made.check is not None
    assert made.check.difference < 0.02


def test_without_the_npm_package_the_note_and_the_page_say_what_to_run():
    made = exported(linear, "int8")
    line = json.loads((made.output / PROVENANCE).read_text())["runtime"]["install"]
    assert line.startswith("npm install onnxruntime-web && ")
    assert any(line in note for note in made.notes)
    assert any("in no browser" in note for note in made.notes)


def test_the_line_that_is_said_fills_ort(tmp_path):
    """Its second half, that is; npm would make the package."""
    package(tmp_path / "node_modules" / "onnxruntime-web")
    subprocess.run(web.INSTALL.split(" && ", 1)[1], shell=True, check=True, cwd=tmp_path)
    assert {path.name for path in (tmp_path / "ort").iterdir()} == set(web.FILES)


def test_the_runtime_is_copied_from_node_modules_or_where_it_is_said_to_be(tmp_path):
    package(tmp_path / "elsewhere")
    made = exported(linear, "int8", runtime_path=tmp_path / "elsewhere")
    assert {path.name for path in (made.output / "ort").iterdir()} == {*web.FILES, "package.json"}
    shutil.rmtree("page")
    shutil.rmtree("artifact")
    package(tmp_path / "node_modules" / "onnxruntime-web")
    assert "ort/ is onnxruntime-web 9.8.7" in exported(linear, "int8").notes


def test_what_is_no_onnxruntime_web_is_refused_before_work_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(web.Onnx, "write", None)  # never reached
    with pytest.raises(InputError, match=r"nowhere has no package\.json; run `npm install onnxruntime-web`"):
        exported(linear, "int8", runtime_path="nowhere")
    shutil.rmtree("artifact")
    with pytest.raises(InputError, match="other is another package"):
        exported(linear, "int8", runtime_path=package(tmp_path / "other", "onnxruntime-node"))
    (package(tmp_path / "old") / "dist" / web.FILES[1]).unlink()
    args = ["test_web:linear", "--shape", "64", "-o", "page", "--runtime-path", "old", "--to"]
    refused = command(capsys, "export", *args, "web")
    assert (refused.status, refused.stdout) == (2, "")
    assert f"old has no dist/{web.FILES[1]}" in " ".join(refused.stderr.split())
    assert "takes no option runtime-path" in command(capsys, "export", *args, "bitsandbytes").stderr
    assert not Path("page").exists()


def test_formats_that_onnx_cannot_hold_are_refused_or_decoded():
    with pytest.raises(FormatError, match=r"web holds integer grids.*--decode"):
        exported(linear, "nf4")
    shutil.rmtree("artifact")
    assert exported(linear, "nf4", decode=True).check.difference < 1e-3


def test_large_outputs_are_thinned_out_over_all_columns(monkeypatch):
    monkeypatch.setattr(web, "NUM_KEPT", 100)
    made = np.arange(40 * 12, dtype=np.float32).reshape(40, 12)
    _, (place,), data = web.lay_out({"x": np.zeros((1, 3), np.int64)}, {"y": made})
    assert place["stride"] == 5
    kept = np.frombuffer(data, np.float32, offset=place["offset"])
    assert np.array_equal(kept, made.reshape(-1)[::5])
    assert {int(value) % 12 for value in kept} == set(range(12))


def test_an_earlier_page_is_replaced_and_other_folders_are_not():
    again = {"to": "web", "shape": (64,), "overwrite": True}
    for _ in range(2):
        export("test_web:linear", "page", **again)
    Path("thesis").mkdir()
    (Path("thesis") / "text").touch()
    with pytest.raises(InputError, match="does not touch it"):
        export("test_web:linear", "thesis", **again)
    assert {path.name for path in Path.cwd().iterdir()} == {"page", "thesis"}


# In Chromium.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODULES = [Path(folder) for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder]
NPM = next((p for f in (*MODULES, Path("node_modules").absolute()) if (p := f / "onnxruntime-web").exists()), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
SECONDS = 120
VISITOR = b"""<!doctype html><iframe src="index.html"></iframe><script>
const frame = document.querySelector("iframe");
setInterval(() => {
  const page = frame.contentWindow, body = page.document.body, state = body?.dataset.state;
  if (!state || state === "running" || window.told) return;
  window.told = true;
  const { difference, latency, outputs } = page.result ?? {};
  const values = Object.entries(outputs ?? {}).map(([name, each]) => [name, Array.from(each.data, Number)]);
  const told = { state, text: body.innerText, difference, latency, outputs: Object.fromEntries(values) };
  fetch("/told", { method: "POST", body: JSON.stringify(told) });
}, 50);
</script>"""


def visit(folder: Path) -> dict[str, Any]:
    """Serve the folder, open its page in Chromium, and return what the page shows and has computed."""
    told: dict[str, Any] = {}
    done = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/visitor.html":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(VISITOR)

        def do_POST(self) -> None:
            told.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder.absolute().parent / 'profile'}",
             f"http://127.0.0.1:{server.server_port}/visitor.html"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            assert done.wait(SECONDS), f"the page did not end within {SECONDS} s"
        finally:
            os.killpg(browser.pid, signal.SIGTERM)
            browser.wait()
            server.shutdown()
    return told


def relative(made: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.array(made, np.float64) - expected.reshape(-1)) / np.linalg.norm(expected))


def in_chromium(test):
    """Slow, and skipped where Chromium or the npm package is missing."""
    for mark in (
        pytest.mark.skipif(NPM is None, reason="no onnxruntime-web; npm install it, and set NODE_PATH to node_modules"),
        pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium"),
        pytest.mark.slow,
    ):
        test = mark(test)
    return test


def agrees(folder: Path, limit: float) -> dict[str, Any]:
    """What the page said. Its outputs are those of ONNX Runtime within `limit`, and it says how far they are."""
    page, told = read(folder), visit(folder)
    assert told["state"] == "done", told["text"]
    found = max(relative(told["outputs"][name], array) for name, array in page.made.items())
    assert found < limit
    assert told["difference"] == pytest.approx(found, rel=1e-3, abs=1e-7)
    assert told["latency"] > 0
    return told


@in_chromium
@pytest.mark.parametrize(
    ("build", "scheme"),
    [
        (linear, "int8/int8-dynamic"),
        (linear, "int4-g32"),
        (convolutions, "int8/int8-static"),
        (convolutions, "int8"),
    ],
)
def test_computes_what_onnx_runtime_and_the_model_compute(build, scheme):
    made = exported(build, scheme, runtime_path=NPM)
    # ONNX Runtime rounds the inputs of MatMulNBits to int8 here, but not in the browser, nor does the model.
    is_float = scheme in ("int4-g32", "int8")
    told = agrees(made.output, 0.02 if is_float else 1e-5)
    x = torch.from_numpy(read(made.output).feeds["x"].copy())
    with torch.no_grad():
        expected = tersor.load("artifact", model=build())(x)
    assert relative(told["outputs"]["output"], expected.numpy()) < (1e-5 if is_float else 0.02)


@in_chromium
def test_half_precision():
    export("test_web:linear", "page", to="web", shape=(64,), options={"dtype": "fp16", "runtime_path": NPM})
    agrees(Path("page"), 5e-3)


@in_chromium
def test_minilm_in_int8(minilm, capsys):
    """As a user would: two commands."""
    made = command(capsys, "compress", minilm, "--format", "int8-dynamic", "-o", "small", "--json")
    assert made.status == 0, made.stderr
    page = command(capsys, "export", "small", "--to", "web", "-o", "page", "--runtime-path", NPM, "--json")
    assert page.status == 0, page.stderr
    # With one scale for all tokens the least difference in a float moves many codes: ONNX Runtime without its
    # optimizations is 11 % from itself. What must hold: the page is as near to the model as ONNX Runtime is.
    told = agrees(Path("page"), 0.25)
    feeds = {name: torch.from_numpy(array.copy()) for name, array in read(Path("page")).feeds.items()}
    with torch.no_grad():
        expected = tersor.load("small")(**feeds).last_hidden_state
    found = relative(told["outputs"]["last_hidden_state"], expected.numpy())
    assert found < 1.3 * page.json["check"]["difference"]


@in_chromium
def test_wrong_numbers_are_seen():
    folder = exported(linear, "int8", runtime_path=NPM).output
    data = bytearray((folder / "examples.bin").read_bytes())
    place = json.loads((folder / PROVENANCE).read_text())["outputs"][0]
    values = np.frombuffer(data, np.float32, place["bytes"] // 4, place["offset"])
    values[:] = -values
    (folder / "examples.bin").write_bytes(data)
    told = visit(folder)
    assert told["difference"] == pytest.approx(2.0, rel=0.01)
    assert f"{100 * told['difference']:.4f} % from onnxruntime" in told["text"]


@in_chromium
def test_a_page_without_the_runtime_says_what_to_run():
    told = visit(exported(linear, "int8").output)
    assert told["state"] == "failed"
    assert web.INSTALL in told["text"]
