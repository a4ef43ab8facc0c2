"""Students cut from their teachers: the right layers, the right elements of each axis, and folders that load."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from cli_runner import tersor as run_tersor
from tersor.core.errors import InputError
from tersor.recipe import Recipe
from tersor.steps.preview import Preview, Pruning
from tersor.training import StudentStep
from tersor.training.student import evenly, make_student
from zoo import SIZES, pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {**SIZES, "num_hidden_layers": 4}
TEXT = {"vocab_size": 40, "max_position_embeddings": 32}
QWEN = {"head_dim": 16, "num_key_value_heads": 2, "pad_token_id": 0}
TEACHERS = {
    "bert": ("BertForSequenceClassification", {**SMALL, **TEXT}),
    "roberta": ("RobertaForSequenceClassification", {**SMALL, **TEXT}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 40, "max_position_embeddings": 32, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48},
    ),
    "mpnet": ("MPNetModel", {**SMALL, **TEXT}),
    "vit": ("ViTForImageClassification", {**SMALL, "image_size": 16, "patch_size": 4}),
    "llama": ("LlamaForCausalLM", {**SMALL, **TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**SMALL, **TEXT, **QWEN}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "eos_token_id": 0},
    ),
}
STACKS = {"vit": "vit.layers", "bert": "bert.encoder.layer", "llama": "model.layers", "gpt2": "transformer.h"}


def teacher_of(name):
    torch.manual_seed(0)
    kind, options = TEACHERS[name]
    model = pretrained(kind, **options)().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model):
    if "pixel_values" in model.main_input_name:
        return model(torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)).logits
    output = model(input_ids=torch.arange(3, 15).view(2, 6))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def test_layers_are_those_that_distilbert_takes():
    assert evenly(12, 6) == [0, 2, 4, 7, 9, 11]
    for num in range(1, 13):
        for chosen in range(1, num + 1):
            places = evenly(num, chosen)
            assert places == sorted(set(places))
            assert len(places) == chosen
            assert places[0] == 0
            assert places[-1] == (num - 1 if chosen > 1 else 0)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("layers", [2, (1, 2, 3)])
def test_fewer_layers_is_the_teacher_without_the_others(name, layers):
    teacher = teacher_of(name)
    student = make_student(teacher, StudentStep(layers=layers))
    kept = [0, 3] if layers == 2 else layers
    cut = copy.deepcopy(teacher)
    path, _, last = STACKS[name].rpartition(".")
    stack = cut.get_submodule(STACKS[name])
    setattr(cut.get_submodule(path), last, nn.ModuleList(stack[layer] for layer in kept))
    for number, block in enumerate(cut.get_submodule(STACKS[name])):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    cut.config = student.config
    for part in cut.modules():
        if hasattr(part, "config"):
            part.config = student.config
    assert len(student.get_submodule(STACKS[name])) == len(kept)
    torch.testing.assert_close(run(student), run(cut))


@pytest.mark.parametrize("name", TEACHERS)
def test_every_architecture_gives_a_student_that_runs_and_owns_its_weights(name):
    teacher = teacher_of(name)
    step = StudentStep(layers=2) if name == "gpt2" else StudentStep(layers=2, width=0.5)
    before = copy.deepcopy(teacher.state_dict())
    student = make_student(teacher, step)
    assert torch.isfinite(run(student)).all()
    assert student.num_parameters() < (0.75 if name == "gpt2" else 0.4) * teacher.num_parameters()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "gpt2"])
def test_shapes_without_weights_are_those_with_them(name):
    teacher, step = teacher_of(name), StudentStep(layers=3, width=0.5)
    bare, made = make_student(teacher, step, weights=False), make_student(teacher, step)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    assert all(parameter.is_meta for parameter in bare.parameters())


def test_width_takes_the_same_places_of_the_stream_and_whole_heads():
    """Heads 0 and 3 of 4, in all of their 8 dimensions; of other axes evenly spaced places."""
    teacher = teacher_of("bert")
    student = make_student(teacher, StudentStep(layers=(2,), width=0.5))
    stream, middle = evenly(32, 16), evenly(48, 24)
    heads = [*range(8), *range(24, 32)]
    ours, theirs = student.bert.encoder.layer[0], teacher.bert.encoder.layer[2]

    def assert_cut(small, large, rows, columns):
        expected = large.weight.detach().numpy()[np.ix_(rows, columns)]
        assert np.array_equal(small.weight.detach().numpy(), expected)
        assert np.array_equal(small.bias.detach().numpy(), large.bias.detach().numpy()[rows])

    for name in ("query", "key", "value"):
        assert_cut(getattr(ours.attention.self, name), getattr(theirs.attention.self, name), heads, stream)
    assert_cut(ours.attention.output.dense, theirs.attention.output.dense, stream, heads)
    assert_cut(ours.intermediate.dense, theirs.intermediate.dense, middle, stream)
    assert_cut(ours.output.dense, theirs.output.dense, stream, middle)
    assert_cut(student.classifier, teacher.classifier, [0, 1], stream)
    words, all_words = (m.bert.embeddings.word_embeddings.weight for m in (student, teacher))
    assert torch.equal(words, all_words[:, stream])
    assert torch.equal(ours.output.LayerNorm.weight, theirs.output.LayerNorm.weight[stream])


def test_heads_of_queries_stay_with_their_keys():
    """4 heads of queries on 2 of keys: one head of keys is left, with both its heads of queries."""
    teacher = teacher_of("llama")
    student = make_student(teacher, StudentStep(hidden=16))
    assert student.config.num_attention_heads == 2
    assert student.config.num_key_value_heads == 1
    assert student.config.head_dim == 8
    ours, theirs = (model.model.layers[1].self_attn for model in (student, teacher))
    stream = evenly(32, 16)
    assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight[:8][:, stream])
    assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[:16][:, stream])
    assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight[stream][:, :16])
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_one_head_alone_is_the_teacher_with_the_others_cut_off():
    """All width but the heads: a student with half the heads is the teacher whose other heads give nothing."""
    teacher = teacher_of("qwen3")
    student = make_student(teacher, StudentStep(num_heads=2))
    silenced = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in silenced.model.layers:
            layer.self_attn.o_proj.weight[:, 2 * 16 :] = 0
    torch.testing.assert_close(run(student), run(silenced))


def test_a_narrower_head_where_the_hidden_size_shrinks_alone():
    student = make_student(teacher_of("bert"), StudentStep(hidden=16, num_heads=4))
    assert student.bert.encoder.layer[0].attention.self.query.weight.shape == (16, 16)
    assert torch.isfinite(run(student)).all()


def test_the_configuration_has_one_entry_a_layer():
    student = make_student(teacher_of("qwen3"), StudentStep(layers=3))
    assert len(student.config.layer_types) == student.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("bert", {"layers": 5}, r"the teacher has 4 \(0 to 3\), and the student asks for 5 layers"),
        ("bert", {"layers": (0, 9)}, "asks for layer 9"),
        ("bert", {"width": 0.3}, r"hidden_size is 32, and would become 9\.6; take width 0\.2812 or 0\.3125"),
        ("bert", {"hidden": 64}, "hidden_size is 32, and the student asks for 64"),
        ("bert", {"hidden": 18, "num_heads": 4}, "hidden_size is 18, and 4 heads do not divide it"),
        ("bert", {"num_heads": 2}, "heads of 8 dimensions would become heads of 16"),
        ("llama", {"num_heads": 3}, "2 heads of queries share one of keys; take a multiple of 2"),
        ("gpt2", {"width": 0.5}, "queries, keys and values in one matrix; cut layers alone"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_way_out(name, step, message):
    with pytest.raises(InputError, match=message):
        make_student(teacher_of(name), StudentStep(**step))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({}, "give layers, width, hidden"),
        ({"layers": 0}, "expected a number from 1"),
        ({"layers": [2, 1]}, "in rising order"),
        ({"width": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_recipe_with_an_impossible_student_is_refused(step, message):
    with pytest.raises(InputError, match=message):
        Recipe.validated({"steps": [{"step": "student", **step}]}, "here")


def test_what_is_no_teacher_is_refused():
    with pytest.raises(InputError, match="knows Hugging Face models, and Sequential is none"):
        make_student(nn.Sequential(nn.Linear(2, 2)), StudentStep(layers=1))
    with pytest.raises(InputError, match="unknown model type for student 'mamba'"):
        make_student(pretrained("MambaForCausalLM", hidden_size=8, num_hidden_layers=2)(), StudentStep(layers=1))
    teacher = teacher_of("bert")
    with pytest.raises(InputError, match="after a step that prunes"):
        StudentStep(layers=1).check(Preview(teacher, pruned={"x": Pruning(0.5)}))


LOAD = """
import sys, torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
print(model(input_ids=torch.arange(3, 15).view(2, 6)).logits.flatten().tolist())
"""


def test_the_verb_writes_a_folder_that_transformers_loads(tmp_path, capsys):
    teacher = teacher_of("bert")
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    made = run_tersor(
        capsys, "student", tmp_path / "teacher", "--layers", "0,3", "--width", "0.5", "-o", tmp_path / "out", "--json"
    )
    assert made.status == 0, made.stderr
    expected = make_student(teacher, StudentStep(layers=(0, 3), width=0.5))
    assert made.json["student"]["parameters"] == expected.num_parameters()
    assert made.json["student"]["num_hidden_layers"] == 2
    assert (tmp_path / "out" / "tokenizer.json").exists()
    printed = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "out"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    torch.testing.assert_close(torch.tensor(json.loads(printed)), run(expected).flatten())
    shown = run_tersor(capsys, "student", tmp_path / "teacher", "--layers", "2", "-o", tmp_path / "other")
    assert shown.status == 0
    assert "teacher and student" in shown.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give layers, width"),
        (["--layers", "many"], "--layers 'many' is not a number"),
        (["--layers", "9"], "the teacher has 4"),
        (["--width", "2"], "less than or equal to 1"),
    ],
)
def test_the_verb_refuses_and_leaves_nothing(tmp_path, capsys, flags, message):
    teacher_of("bert").save_pretrained(tmp_path / "teacher")
    made = run_tersor(capsys, "student", tmp_path / "teacher", *flags, "-o", tmp_path / "out")
    assert made.status == 2
    assert message in made.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_transformers_reads_the_configuration_back(tmp_path):
    student = make_student(teacher_of("qwen3"), StudentStep(layers=2, width=0.5))
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(again), run(student))
