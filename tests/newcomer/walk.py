"""With four new entries in the tables: the laws, and one model compressed, saved, loaded and exported.

python walk.py SCRATCH
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

import tersor
from tersor.exporters import EXPORTS
from tersor.formats import FORMATS
from tersor.methods import METHODS
from tersor.schemes.scheme import usual_method
from tersor.tasks import open_task
from tersor.testing import check_exporter, check_format, check_method, check_task
from tersor.training.tune_scales import prepared_parts

scratch = Path(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(1)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()
model.save_pretrained(scratch / "model")
np.savez(scratch / "ids.npz", ids=np.random.default_rng(0).integers(0, 50, (16, 8)))
task = open_task("states", scratch / "ids.npz")

check_format(FORMATS["ternary"])
check_method(METHODS["median"](), [FORMATS[name] for name in ("ternary", "int4-g32", "nf4", "coded")])
check_task(task, model)
check_exporter(EXPORTS["halves"])

assert usual_method(FORMATS["ternary"], sees_inputs=True) == "gptq"
rules = {"*.query": "ternary", "*.key": "keep"}  # query by the usual method with inputs, gptq
made = tersor.run(tersor.Recipe.of("median(times=2.0):ternary", rules), model, task)
packed = made.model.get_submodule("encoder.layer.0.attention.self.value").packed
assert packed.format == FORMATS["ternary"]
assert [part.name for part in prepared_parts(packed)] == ["scale"]
assert {site.scheme.split(":")[0] for site in made.sites} == {"gptq", "median(times=2.0)"}

tersor.save(made.model, scratch / "small", source=scratch / "model")
loaded = tersor.load(scratch / "small")
ids = torch.arange(8).view(1, 8)
with torch.no_grad():
    assert torch.equal(loaded(ids).last_hidden_state, made.model(ids).last_hidden_state)
assert task.score(loaded).num_examples == 8

exported = tersor.export(scratch / "small", scratch / "plain", to="halves")
assert "outputs differ from the artifact's by" in (exported.opened or ""), exported
print("every law is kept, and the way to the disk and back is whole")
