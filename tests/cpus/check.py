"""What is the same on every processor: artifacts, exports, kernels and golden bytes.

    python tests/cpus/check.py write FOLDER       here: artifacts and exports, and what they compute
    python tests/cpus/check.py compare FOLDER     anywhere: the same files, loaded and computed; 1 where one differs

Sums of int8 products must be the same to the last bit, in PyTorch and in the exports. Float sums are added in another
order by other vectors, so outputs may differ by a few units in the last place. Where an input of a layer lies halfway
between two of its integers, such a unit can tip it over: few outputs may differ by that step.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tersor
from tersor.core.processor import instruction_sets
from tersor.formats import FORMATS
from tersor.formats.contract import Encoded
from tersor.kernels import reference
from tersor.runtimes import open_session

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden.write import read

SCHEMES = (
    *("nearest:int8", "nearest:int8/int8-dynamic", "nearest:int8/int8-static", "nearest:int4-g32", "nearest:int3-g32"),
    *("nearest:int2-g32-asym", "nearest:nf4", "nearest:nf4-dq", "nearest:fp8-e4m3", "nearest:fp16", "nearest:bf16"),
    *("nearest:mxfp4", "nearest:nvfp4", "kmeans:codebook16", "svd:lowrank", "waterfill:coded"),
)
EXPORTED = {  # file, scheme, net
    "mlp-dynamic.onnx": ("nearest:int8/int8-dynamic", "mlp"),
    "mlp-static.onnx": ("nearest:int8/int8-static", "mlp"),
    "cnn-static.onnx": ("nearest:int8/int8-static", "cnn"),
    "cnn-weights.onnx": ("nearest:int8", "cnn"),
    "mlp-static.xml": ("nearest:int8/int8-static", "mlp"),
    "cnn-static.xml": ("nearest:int8/int8-static", "cnn"),
}
FLOAT = 2e-5  # of the largest output, that float sums in another order may differ by
STEP, FEW = 0.02, 0.02  # of the largest output, and the share of outputs that may differ by so much


class Layers(nn.Module):
    """Convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 3, groups=32), nn.ReLU())
        self.linear = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 10))

    def forward(self, x):
        return self.linear(self.conv(x).amax(2))


class Recurrent(nn.Module):
    """Convolutions, an LSTM and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 3, groups=32), nn.ReLU())
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.linear = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 10))

    def forward(self, x):
        return self.linear(self.lstm(self.conv(x).transpose(1, 2))[0][:, -1])


def mlp() -> nn.Module:
    """Linear layers with odd numbers of columns, and weights of one sign beside each other."""
    net = nn.Sequential(nn.Linear(67, 128), nn.ReLU(), nn.Linear(128, 33), nn.ReLU(), nn.Linear(33, 10))
    net[0].weight.data[::2] = net[0].weight.data[::2].abs() + 0.05
    return net


def cnn() -> nn.Module:
    """Convolutions, one of them depthwise, and a linear layer."""
    features = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6()]
    return nn.Sequential(
        *features, nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (67,)),
    "cnn": (cnn, (3, 12, 12)),
    "layers": (Layers, (8, 20)),
    "recurrent": (Recurrent, (8, 20)),
}


def made(name: str) -> nn.Module:
    """A net with weights that depend on nothing."""
    torch.manual_seed(0)
    return NETS[name][0]().eval()


def inputs(name: str, num_rows: int = 16) -> torch.Tensor:
    """Inputs of a net, the same everywhere."""
    values = np.random.default_rng(1).standard_normal((num_rows, *NETS[name][1]), np.float32)
    return torch.from_numpy(values)


class Rows:
    """Rows to calibrate on."""

    name, output, description, fingerprint = "rows", "logits", "made-up rows", "0"

    def __init__(self, net: str):
        self.net = net

    def prepare(self, original):
        return None

    def batches(self, split, batch_size=None):
        yield inputs(self.net, 64)

    def forward(self, model, batch):
        return model(batch)


def write(folder: Path) -> None:
    """Write everything that `compare` reads."""
    outputs = {}
    for net, scheme, place in artifacts():
        model = tersor.run(tersor.Recipe.of(scheme), made(net), Rows(net)).model
        tersor.save(model, folder / place)
        outputs[place] = run_artifact(folder / place, net)
    for file, (scheme, net) in EXPORTED.items():
        model = tersor.run(tersor.Recipe.of(scheme), made(net), Rows(net)).model
        np.savez(folder / f"{net}.npz", x=inputs(net, 64).numpy())
        to = "onnx" if file.endswith(".onnx") else "openvino"
        tersor.export(model, folder / file, to, data=folder / f"{net}.npz")
        outputs[file] = run_file(folder / file, net)
    np.savez(folder / "outputs.npz", **outputs)


def artifacts() -> Iterator[tuple[str, str, str]]:
    """Yields every net with every scheme, and the folder it lies in."""
    for net in ("layers", "recurrent"):
        for number, scheme in enumerate(SCHEMES):
            yield net, scheme, f"{net}-{number}"


def run_artifact(folder: Path, net: str) -> np.ndarray:
    """The output of an artifact."""
    with torch.inference_mode():
        return tersor.load(folder, model=made(net))(inputs(net)).numpy()


def run_file(path: Path, net: str) -> np.ndarray:
    """The output of an exported file."""
    session = open_session(str(path))
    (name,) = (each.name for each in session.inputs)
    return next(iter(session.run({name: inputs(net).numpy()}).values()))


def differs(found: np.ndarray, expected: np.ndarray) -> str:
    """The difference between two outputs in words; empty where they are the same."""
    largest = np.abs(expected).max()
    away = np.abs(found - expected) / largest
    if not np.isfinite(found).all() or away.max() > STEP:
        return f"{away.max():.2%} away"
    share = (away > FLOAT).mean()
    return f"{share:.1%} of the outputs differ, by up to {away.max():.3%}" if share > FEW else ""


def compare(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields what was tried, and in what it differs."""
    with np.load(folder / "outputs.npz") as file:
        expected = dict(file)
    for name in FORMATS:
        parts, decoded = read(name)
        found = Encoded(FORMATS[name], tuple(decoded.shape), parts).decode()
        yield f"golden bytes of {name}", "" if torch.equal(found, decoded) else "other weights"
    yield from kernels()
    for net, scheme, place in artifacts():
        if net == "recurrent" and os.environ.get("TERSOR_NO_LSTM"):
            print(f"skipped {net} net, {scheme}: the emulator cannot run PyTorch's LSTM", flush=True)
            continue
        yield f"{net} net, {scheme}", differs(run_artifact(folder / place, net), expected[place])
    for file, (_, net) in EXPORTED.items():
        try:
            found = run_file(folder / file, net)
        except tersor.TersorError as error:
            print(f"skipped {file}: {error}", flush=True)
            continue
        yield f"export, {file}", differs(found, expected[file])


def kernels() -> Iterator[tuple[str, str]]:
    """Yields int8 layers of many shapes, each against the exact integer sums of its codes."""
    generator = np.random.default_rng(0)
    for rows, columns, outputs in ((1, 64, 7), (5, 67, 33), (33, 256, 64), (2, 1536, 40), (128, 128, 128)):
        for kind in ("free", "one sign"):
            weight = torch.from_numpy(generator.standard_normal((outputs, columns), np.float32))
            layer = nn.Linear(columns, outputs, bias=False)
            layer.weight.data = weight.abs() if kind == "one sign" else weight
            x = torch.from_numpy(generator.standard_normal((rows, columns), np.float32))
            model = tersor.run(tersor.Recipe.of("nearest:int8/int8-dynamic"), nn.Sequential(layer)).model.eval()
            with torch.inference_mode():
                fast = model(x)
                with reference():
                    plain = model(x)
            away = float((fast - plain).abs().max() / plain.abs().max())
            yield f"int8 layer of {rows}x{columns}x{outputs}, {kind}", "" if away <= 1e-6 else f"{away:.2%} away"


def main() -> None:
    """Write, or compare and say what differs."""
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "write":
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        return
    print(f"as a processor with {', '.join(instruction_sets())}", flush=True)
    failed = passed = 0
    try:
        for what, why in compare(folder):
            passed, failed = passed + (not why), failed + bool(why)
            print(f"{'DIFFERS' if why else 'same'}  {what}{': ' + why if why else ''}", flush=True)
    except Exception:
        traceback.print_exc()
        failed += 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
