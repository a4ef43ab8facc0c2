"""Distillation: the loss is the formula's, a cached teacher says what a live one says, every kind of model learns."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import tersor
from tersor.core.errors import DataError, InputError
from tersor.recipe import Recipe
from tersor.tasks import open_task
from tersor.tasks.inputs import scoring
from tersor.training import DistilStep, FinetuneStep, Job, StudentStep
from tersor.training.distil import Distillation
from tersor.training.features import hidden_loss, pairs_of_blocks, relation_loss
from tersor.training.journal import Journal
from tersor.training.teacher_cache import TeacherCache, predictions
from zoo import SIZES, pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "abcdefghij"
BERT = {**SIZES, "vocab_size": 12, "max_position_embeddings": 32}
WIDER = {**BERT, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, and padding."""
    vocab = {name: number for number, name in enumerate(("[PAD]", "?", *LETTERS))}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", pad_token="[PAD]")


def words(number, seed):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), rng.integers(3, 9))) for _ in range(number)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Words, whose class is whether they have more letters of the first half of the alphabet; without labels; text."""
    folder = tmp_path_factory.mktemp("data")
    for name, number, seed in (("eval", 60, 1), ("train", 160, 2)):
        labelled = [(word, int(sum(letter < "f" for letter in word) * 2 > len(word))) for word in words(number, seed)]
        lines = [f"{word},{label}" for word, label in labelled]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (folder / "plain.txt").write_text("\n".join(words(160, 3)) + "\n")
    pairs = [
        f"{one},{other},{number % 5}"
        for number, (one, other) in enumerate(zip(words(60, 4), words(60, 5), strict=True))
    ]
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")
    return folder


def classifier(seed=0, **options):
    torch.manual_seed(seed)
    return pretrained("BertForSequenceClassification", **{**BERT, "initializer_range": 0.3, **options})().eval()


def classification(data, tokenizer, train="train.csv", **options):
    return open_task("classification", data / "eval.csv", train=data / train, tokenizer=tokenizer, options={**options})


@pytest.fixture
def labelled(data, tokenizer):
    return classification(data, tokenizer, calibration_examples=32)


@pytest.fixture
def unlabelled(data, tokenizer):
    return classification(data, tokenizer, train="plain.txt", calibration_examples=32)


def language_model(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_key_value_heads": 2, "vocab_size": 12, "max_position_embeddings": 64, "pad_token_id": 0}
    return pretrained("LlamaForCausalLM", **{**sizes, "initializer_range": 0.3, **options})().eval()


@pytest.fixture
def text(data, tokenizer):
    return open_task(
        "perplexity", data / "eval.csv", train=data / "plain.txt", tokenizer=tokenizer, options={"context": 16}
    )


def encoder(seed=0, **options):
    torch.manual_seed(seed)
    return pretrained("BertModel", **{**BERT, "initializer_range": 0.3, **options})().eval()


@pytest.fixture
def pairs(data, tokenizer):
    return open_task("similarity", data / "pairs.csv", train=data / "pairs.csv", tokenizer=tokenizer)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(step, task, student, teacher, num=3, cache=None):
    objective = Distillation(step, task, student, teacher)
    objective.cache = cache
    with torch.no_grad(), scoring(student):
        return [objective(student, batch).item() for batch, _ in zip(task.epoch(3, 16), range(num), strict=False)]


# The loss.


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 4.0), (1.0, 2.0)])
def test_it_is_the_formula(labelled, alpha, temperature):
    student, teacher = classifier(1), classifier(2)
    step = DistilStep(alpha=alpha, temperature=temperature)
    batch = next(labelled.epoch(3, 16))
    with torch.no_grad():
        z, v = (labelled.forward(model, batch).double() for model in (student, teacher))
    total = 0.0
    for one, other, row in zip(z.tolist(), v.tolist(), batch.rows, strict=True):
        q1, q, p = (
            [math.exp(x / t) for x in logits] for logits, t in ((one, 1), (one, temperature), (other, temperature))
        )
        cross_entropy = -math.log(q1[labelled.labels[row]] / sum(q1))
        kl = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        total += alpha * cross_entropy + (1 - alpha) * temperature**2 * kl
    assert losses(step, labelled, student, teacher, 1)[0] == pytest.approx(total / 16, rel=1e-4)


def test_of_tokens_only_padding_is_left_out(data, tokenizer):
    """A model that predicts every token: the loss is the mean over tokens, however long the padding."""
    task = open_task(
        "fidelity", data / "plain.txt", train=data / "plain.txt", tokenizer=tokenizer, config=masked(0).config
    )
    student, teacher = masked(1), masked(2)
    batch = next(task.epoch(3, 16))
    with torch.no_grad():
        z, v = (task.forward(model, batch).log_softmax(-1) for model in (student, teacher))
    per_token = (v.exp() * (v - z)).sum(-1)
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    told = [row[:length] for row, length in zip(per_token, lengths, strict=True)]
    assert losses(DistilStep(temperature=1), task, student, teacher, 1)[0] == pytest.approx(
        torch.cat(told).mean().item(), rel=1e-5
    )


def masked(seed):
    torch.manual_seed(seed)
    return pretrained("BertForMaskedLM", **{**BERT, "initializer_range": 0.3})().eval()


def test_of_a_language_model_every_token_counts(text):
    student, teacher = language_model(1), language_model(2)
    batch = next(text.epoch(3, 16))
    with torch.no_grad():
        z, v = (text.forward(model, batch).log_softmax(-1) for model in (student, teacher))
    expected = (v.exp() * (v - z)).sum(-1).mean().item()
    assert losses(DistilStep(temperature=1), text, student, teacher, 1)[0] == pytest.approx(expected, rel=1e-5)


def test_embeddings_are_compared_at_unit_length(pairs):
    student, teacher = encoder(1), encoder(2)
    batch = next(pairs.epoch(3, 16))
    with torch.no_grad():
        ours, theirs = (pairs.forward(model, batch) for model in (student, teacher))
    cosine = (ours * theirs).sum(-1).mean().item()
    assert losses(DistilStep(), pairs, student, teacher, 1)[0] == pytest.approx(2 - 2 * cosine, rel=1e-4)
    assert losses(DistilStep(loss="cosine"), pairs, student, teacher, 1)[0] == pytest.approx(1 - cosine, rel=1e-4)


def test_dkd_takes_labels_where_there_are_any_and_the_teachers_choice_where_not(labelled, unlabelled):
    student, teacher = classifier(1, num_labels=4), classifier(2, num_labels=4)
    step = DistilStep(loss="dkd")
    labels = labelled.labels.copy()
    with_labels = losses(step, labelled, student, teacher)
    labelled.labels[:] = -1
    without = losses(step, labelled, student, teacher)
    for start in range(0, 160, 16):  # the teacher's choice as labels gives the same as no labels
        with torch.no_grad():
            batch = labelled.inputs.batch(np.arange(60 + start, 60 + start + 16))
            labelled.labels[batch.rows] = labelled.forward(teacher, batch).argmax(-1).numpy()
    assert losses(step, labelled, student, teacher) == pytest.approx(without, rel=1e-5)
    assert with_labels != pytest.approx(without, rel=1e-3)
    labelled.labels[:] = labels


# Hidden states and relations.


def test_blocks_are_paired_by_depth():
    teacher = encoder(num_hidden_layers=6)
    for num, expected in ((2, [2, 5]), (3, [1, 3, 5]), (4, [0, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5])):
        pairs = pairs_of_blocks(encoder(num_hidden_layers=num), teacher)
        assert pairs == [(f"encoder.layer.{i}", f"encoder.layer.{j}") for i, j in enumerate(expected)]


def slow_relations(vectors, num_heads, length):
    """Softmax of scaled dot products, token by token, without the padding: [head][position][position]."""
    size = vectors.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = vectors[:length, head * size : (head + 1) * size].double()
        rows = []
        for one in part:
            scores = [float(one @ other) / math.sqrt(size) for other in part]
            exps = [math.exp(score) for score in scores]
            rows.append([e / sum(exps) for e in exps])
        heads.append(rows)
    return heads


def test_relations_against_a_slow_version():
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    lengths = [5, 3]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    found = []
    for ours, theirs, length in zip(student, teacher, lengths, strict=True):
        for p_head, q_head in zip(slow_relations(theirs, 4, length), slow_relations(ours, 4, length), strict=True):
            found += [
                sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in zip(p_head, q_head, strict=True)
            ]
    assert relation_loss(student, teacher, 4, mask).item() == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert relation_loss(student[:1], teacher[:1], 4).item() == pytest.approx(sum(found[:20]) / 20, rel=1e-4)


def test_hidden_states_of_padding_do_not_count():
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3]])
    kept = torch.cat([(student - teacher)[0], (student - teacher)[1, :3]])
    torch.testing.assert_close(hidden_loss(student, teacher, mask), kept.square().mean())


def test_looking_inside_adds_nothing_to_a_copy_and_something_to_another(labelled, unlabelled):
    student = classifier(1)
    step = DistilStep(hidden=1, relation=1)
    assert losses(step, labelled, student, copy.deepcopy(student)) == pytest.approx([0, 0, 0], abs=1e-5)
    other = classifier(2)
    plain, hidden, relation = (
        losses(DistilStep(**inside), unlabelled, student, other)[0] for inside in ({}, {"hidden": 1}, {"relation": 1})
    )
    assert hidden > plain + 0.01
    assert relation > plain + 0.001


@pytest.mark.parametrize("make", [classifier, language_model])
def test_a_narrower_student_learns_hidden_states_and_relations_through_projections(make, unlabelled, text):
    task = unlabelled if make is classifier else text
    teacher = make(2, hidden_size=48, num_hidden_layers=4)
    job = Job(make(1), teacher, task)
    before = state_of(teacher)
    step = DistilStep(num_steps=40, batch_size=16, learning_rate=5e-3, hidden=1, relation=1, num_evaluations=0)
    objective = Distillation(step, task, job.model, teacher)
    assert [tuple(p.shape) for p in objective.project_hidden.parameters()] == [(48, 32), (48, 32)]
    step.run(job)
    assert np.mean(job.curves[0].losses[-5:]) < 0.8 * np.mean(job.curves[0].losses[:3])
    assert same(before, state_of(teacher))
    assert job.model.state_dict().keys() == make(1).state_dict().keys()  # no projection, no hook is left
    assert not any(module._forward_hooks for module in job.model.modules())


# Learning.


def test_a_student_learns_from_words_without_labels(labelled, unlabelled):
    teacher = classifier(0, **WIDER, initializer_range=0.05)
    FinetuneStep(epochs=12, batch_size=16, learning_rate=2e-3, num_evaluations=0).run(Job(teacher, teacher, labelled))
    assert labelled.score(teacher).value > 0.85
    before = state_of(teacher)
    job = Job(classifier(1, initializer_range=0.05), teacher, unlabelled)
    untaught = unlabelled.score(job.model).value
    DistilStep(epochs=12, batch_size=16, learning_rate=2e-3, num_evaluations=0).run(job)
    assert unlabelled.score(job.model).value > (untaught + labelled.score(teacher).value) / 2  # more than half the way
    assert same(before, state_of(teacher))
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("loss", ["kd", "dkd", "skew-kl", "skew-reverse-kl", "mse", "cosine"])
def test_every_loss_brings_the_student_nearer(loss, unlabelled):
    teacher, job = (
        classifier(2, num_labels=3),
        Job(classifier(1, num_labels=3), classifier(2, num_labels=3), unlabelled),
    )
    before = losses(DistilStep(), unlabelled, job.model, teacher)
    DistilStep(num_steps=30, batch_size=32, learning_rate=3e-3, loss=loss, num_evaluations=0).run(job)
    after = losses(DistilStep(loss=loss), unlabelled, job.model, teacher)
    untaught = losses(DistilStep(loss=loss), unlabelled, classifier(1, num_labels=3), teacher)
    assert np.mean(after) < 0.5 * np.mean(untaught)
    assert np.mean(losses(DistilStep(), unlabelled, job.model, teacher)) < np.mean(before)


def test_an_encoder_learns_a_wider_teachers_embeddings(pairs):
    teacher = encoder(2, hidden_size=48)
    job = Job(encoder(1), teacher, pairs)
    DistilStep(num_steps=40, batch_size=16, learning_rate=3e-3, num_evaluations=0).run(job)
    assert np.mean(job.curves[0].losses[-5:]) < 0.5 * np.mean(job.curves[0].losses[:3])
    assert pairs.forward(job.model, next(pairs.epoch(0, 4))).shape[-1] == 32


def test_a_language_model_learns_what_the_teacher_predicts(text):
    job = Job(language_model(1), language_model(2, num_hidden_layers=3), text)
    DistilStep(num_steps=40, batch_size=8, learning_rate=5e-3, temperature=1, num_evaluations=0).run(job)
    assert np.mean(job.curves[0].losses[-5:]) < 0.5 * np.mean(job.curves[0].losses[:3])


def test_images_and_custom_models_too(tmp_path):
    rng = np.random.default_rng(0)
    x, x_train = (rng.normal(size=(number, 1, 6, 6)).astype(np.float32) for number in (30, 64))
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(30) % 3, x_train=x_train, y_train=np.arange(64) % 3)
    task = open_task("classification", tmp_path / "data.npz", options={"calibration_examples": 8})
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()
    before = state_of(teacher)
    job = Job(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), teacher, task)
    DistilStep(epochs=8, learning_rate=0.02, alpha=0.1, num_evaluations=0).run(job)
    assert np.mean(job.curves[0].losses[-3:]) < np.mean(job.curves[0].losses[:3])
    assert same(before, state_of(teacher))


# The cache.


@pytest.mark.parametrize("kind", ["classes", "tokens", "language model", "embeddings"])
def test_a_cached_teacher_says_what_a_live_one_says(kind, data, tokenizer, labelled, text, pairs, tmp_path):
    unlabelled = {"train": data / "plain.txt", "tokenizer": tokenizer, "config": masked(0).config}
    task, student, teacher = {
        "classes": lambda: (labelled, classifier(1), classifier(2)),
        "tokens": lambda: (open_task("fidelity", data / "plain.txt", **unlabelled), masked(1), masked(2)),
        "language model": lambda: (text, language_model(1), language_model(2)),
        "embeddings": lambda: (pairs, encoder(1), encoder(2)),
    }[kind]()  # fmt: skip
    alpha = 0.0 if kind == "tokens" else 0.4
    cache = TeacherCache(tmp_path / "cache")
    cache.fill(task, teacher, 16)
    live, cached = (losses(DistilStep(alpha=alpha), task, student, teacher, cache=c) for c in (None, cache))
    assert cached == pytest.approx(live, rel=1e-5)


def test_top_k_of_the_whole_vocabulary_is_exact_and_of_less_never_more(text, tmp_path):
    student, teacher = language_model(1), language_model(2)
    found = {}
    for top_k in (1, 4, 11, 12, 99, None):
        cache = TeacherCache(tmp_path / str(top_k), top_k=top_k, temperature=2.0)
        cache.fill(text, teacher, 16)
        step = DistilStep(cache=True, top_k=top_k, temperature=2.0)
        found[top_k] = np.array(losses(step, text, student, teacher, cache=cache))
    live = losses(DistilStep(temperature=2.0), text, student, teacher)
    assert (found[12] == live).all()
    assert (found[99] == live).all()
    assert (found[None] == live).all()
    assert (found[1] < found[4]).all()
    assert (found[4] < found[11]).all()
    np.testing.assert_allclose(found[11], live, rtol=1e-5)


def test_dkd_finds_its_target_among_the_classes_kept_or_in_the_rest(labelled, tmp_path):
    student, teacher = classifier(1, num_labels=5), classifier(2, num_labels=5)
    cache = TeacherCache(tmp_path / "four", top_k=4, temperature=2.0)
    cache.fill(labelled, teacher, 16)
    step = DistilStep(loss="dkd", cache=True, top_k=4)
    live = losses(DistilStep(loss="dkd"), labelled, student, teacher)
    np.testing.assert_allclose(losses(step, labelled, student, teacher, cache=cache), live, rtol=1e-4)


def test_training_on_the_cache_is_training_on_the_teacher(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    curves = []
    for cache in (False, True):
        job = Job(classifier(1), classifier(2), labelled)
        DistilStep(num_steps=20, batch_size=16, learning_rate=1e-3, cache=cache, num_evaluations=0).run(job)
        curves.append(job.curves[0].losses)
    np.testing.assert_allclose(*curves, rtol=1e-3)
    assert not list(tmp_path.iterdir())


def test_the_teacher_runs_once_and_a_killed_run_ends_in_the_same_weights(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr("tersor.training.teacher_cache.BATCHES_A_FILE", 2)
    rows_seen = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier(2)

        def forward(self, input_ids, attention_mask):
            rows_seen.append(len(input_ids))
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    teacher = Counted()
    step = DistilStep(num_steps=30, batch_size=16, learning_rate=1e-3, cache=True, num_evaluations=0, alpha=0.2)

    def run(name, stop_at=None):
        def progress(what, done, total):
            if stop_at and what.startswith(stop_at[0]) and done >= stop_at[1]:
                raise KeyboardInterrupt

        job = Job(
            classifier(1), teacher, labelled, 3, progress, journal=Journal(tmp_path / name / "j.safetensors", "k", 0)
        )
        step.run(job)
        return state_of(job.model)

    straight = run("straight")
    probe = 16  # the check before anything is done
    assert sum(rows_seen) == probe + labelled.num_train
    rows_seen.clear()
    for stop_at in (("running the teacher", 70), ("distil", 11)):
        with pytest.raises(KeyboardInterrupt):
            run("killed", stop_at)
    assert same(run("killed"), straight)
    assert sum(rows_seen) == 3 * probe + labelled.num_train + 16  # of the file that was not finished, one batch again


def test_another_teacher_is_not_read_from_the_cache(labelled, tmp_path):
    student = classifier(1)
    for seed in (2, 3):
        job = Job(
            copy.deepcopy(student), classifier(seed), labelled, journal=Journal(tmp_path / "j.safetensors", str(seed))
        )
        DistilStep(num_steps=1, batch_size=16, cache=True, num_evaluations=0, warmup=0).run(job)
        live = Job(copy.deepcopy(student), classifier(seed), labelled)
        DistilStep(num_steps=1, batch_size=16, num_evaluations=0, warmup=0).run(live)
        assert job.curves[0].losses == pytest.approx(live.curves[0].losses, rel=1e-4)


def test_predictions_stand_in_the_order_of_the_batch(text, pairs):
    batch = next(text.epoch(0, 4))
    output = torch.randn(4, 16, 12)
    assert torch.equal(predictions(output, batch).view(4, 16, 12), output)


# Recipes.

RECIPE = """
seed: 1
steps:
- step: finetune
  epochs: 3
  learning_rate: 0.002
- step: student
  layers: 1
  width: 0.5
- step: distil
  epochs: 2
  learning_rate: 0.002
  cache: true
- step: weights
  scheme: int8-dynamic
  rules: {'*embeddings*': int4}
"""


@pytest.fixture
def folder(tmp_path, tokenizer):
    classifier(0, initializer_range=0.1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_recipe_cuts_a_student_teaches_it_and_packs_it(folder, data, tmp_path):
    outcome = tersor.compress(
        folder,
        Recipe.from_yaml(RECIPE),
        "classification",
        data=data / "eval.csv",
        train=data / "train.csv",
        output=tmp_path / "out",
        batch_sizes=1,
    )
    assert [curve["name"] for curve in outcome.manifest["training"]] == ["finetune", "distil"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (1, 16, 24)
    done = RECIPE.replace("int8-dynamic", "gptq:int8/int8-dynamic").replace("int4", "mse:int4")  # the methods it chose
    assert Recipe.from_yaml((tmp_path / "out" / "recipe.yaml").read_text()) == Recipe.from_yaml(done)
    original, compressed = outcome.scorecards
    assert compressed.file_bytes < original.file_bytes / 4
    loaded = tersor.load(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 1
    assert same(state_of(loaded), state_of(outcome.model))


def test_the_teacher_is_the_model_that_the_student_was_cut_from(labelled):
    """Not what the recipe was given: that one was never fine-tuned."""
    model = classifier(0)
    recipe = Recipe.validated(
        {
            "steps": [
                {"step": "finetune", "num_steps": 5},
                {"step": "student", "layers": 1},
                {"step": "distil", "num_steps": 1},
            ]
        },
        "here",
    )
    seen = []

    def progress(what, done, total):
        if what.startswith("distil"):
            seen.append(done)

    made = tersor.compress(model, recipe, labelled, progress=progress)
    tuned = classifier(0)
    job = Job(tuned, model, labelled)
    FinetuneStep(num_steps=5).run(job)
    StudentStep(layers=1).run(job)
    assert job.teacher is tuned
    DistilStep(num_steps=1).run(job)
    assert job.curves[1].losses == pytest.approx(made.curves[1].losses, rel=1e-5)
    assert seen == [1]


def test_a_teacher_from_a_folder_or_an_artifact(folder, labelled, tmp_path):
    teacher = classifier(0, initializer_range=0.1)
    int8 = tersor.compress(teacher, Recipe.of("int8")).model
    tersor.save(int8, tmp_path / "int8", source=folder)
    for path, model in ((folder, teacher), (tmp_path / "int8", int8)):
        job, expected = Job(classifier(1), classifier(3), labelled), Job(classifier(1), model, labelled)
        DistilStep(num_steps=3, teacher=str(path), num_evaluations=0).run(job)
        DistilStep(num_steps=3, num_evaluations=0).run(expected)
        assert job.curves[0].losses == pytest.approx(expected.curves[0].losses, rel=1e-5)


# What cannot be.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -0.1}, "alpha: .*greater than or equal to 0"),
        ({"alpha": 1.1}, "alpha: .*less than or equal to 1"),
        ({"temperature": 0}, "temperature: .*greater than 0"),
        ({"temperature": "inf"}, "temperature: .*finite"),
        ({"loss": "skew-lk"}, "unknown loss 'skew-lk': did you mean 'skew-kl'"),
        ({"cache": True, "hidden": 1}, "with hidden or relation use cache: false"),
        ({"top_k": 5}, "top_k is 5.*add cache: true"),
        ({"top_k": 5, "cache": True, "loss": "mse"}, "leave top_k out"),
        ({"teachr": "x"}, "teachr: Extra inputs"),
    ],
)
def test_a_recipe_says_what_is_wrong(fields, message):
    with pytest.raises(InputError, match=message):
        Recipe.validated({"steps": [{"step": "distil", **fields}]}, "here")


def test_teachers_that_do_not_fit_are_refused_before_training(labelled, text, pairs, tmp_path):
    def refused(match, student, original, task, **fields):
        job = Job(student, original, task)
        with pytest.raises(InputError, match=match):
            DistilStep(**fields).run(job)
        assert not job.curves

    refused("over 3 classes and the student over 2", classifier(1), classifier(2, num_labels=3), labelled)
    refused(
        "teacher's vocabulary has 20 tokens and the student's 12", classifier(1), classifier(2, vocab_size=20), labelled
    )
    refused("vocabulary has 20 tokens", language_model(1), language_model(2, vocab_size=20), text)
    names = ({0: "bad", 1: "good"}, {0: "good", 1: "bad"})
    student, teacher = (classifier(1, id2label=id2label) for id2label in names)
    refused("class 0 is 'good' for the teacher and 'bad' for the student", student, teacher, labelled)
    refused(
        "loss kd compares probabilities, and task 'similarity' gives embedding",
        encoder(1),
        encoder(2),
        pairs,
        loss="kd",
    )
    refused("gives embedding; leave top_k out", encoder(1), encoder(2), pairs, cache=True, top_k=4)
    refused(
        "5, and does not divide a width of 32", classifier(1), classifier(2), labelled, relation=1, num_relation_heads=5
    )
    small, large = classifier(1), classifier(2, num_hidden_layers=3)
    refused("the student has 3 blocks and the teacher 2", large, small, labelled, hidden=1)
    refused("no stack of at least two alike blocks", classifier(1, num_hidden_layers=1), large, labelled, hidden=1)
    refused("nowhere is no folder", small, large, labelled, teacher=str(tmp_path / "nowhere"))


def test_data_that_cannot_teach_is_refused(data, tokenizer, unlabelled, tmp_path):
    without = open_task("classification", data / "eval.csv", tokenizer=tokenizer)
    with pytest.raises(DataError, match="--train FILE"):
        DistilStep().run(Job(classifier(1), classifier(2), without))
    with pytest.raises(DataError, match="without a label: label them, or distil"):
        DistilStep(alpha=0.5).run(Job(classifier(1), classifier(2), unlabelled))
    x, y = np.zeros((20, 1, 4, 4)), np.arange(20) % 2
    np.savez(tmp_path / "d.npz", x=x, y=y, x_train=x, y_train=y)
    task = open_task("classification", tmp_path / "d.npz", options={"augment": "flip", "calibration_examples": 2})
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(InputError, match="cache: the task augments its images"):
        DistilStep(cache=True).run(Job(net, copy.deepcopy(net), task))


def test_a_recipe_is_checked_before_the_original_is_measured(folder, data, tmp_path):
    """The sites of the student, not of what it is cut from: one layer is left."""
    for steps, message in (
        ([{"step": "student", "layers": 1}, {"step": "weights", "rules": {"*.layer.1.*": "int8"}}], "layer.1"),
        ([{"step": "student", "layers": 7}], "asks for 7 layers"),
        ([{"step": "distil", "teacher": "nowhere"}], "nowhere is no folder"),
    ):
        with pytest.raises(tersor.TersorError, match=message):
            tersor.compress(
                folder,
                Recipe.validated({"steps": steps}, "here"),
                "classification",
                data=data / "eval.csv",
                train=data / "train.csv",
                output=tmp_path / "out",
                on_progress=lambda what, done, total: pytest.fail(what) if what.startswith("evaluating") else None,
            )
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_a_factory_brings_its_weights(tmp_path, monkeypatch):
    """What the message about an artifact of a custom model advises is what a recipe takes."""
    (tmp_path / "teachers.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(4, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    artifact = tmp_path / "artifact"
    tersor.save(tersor.compress(net, "mse:int8").model, artifact)
    manifest = json.loads((artifact / "tersor.json").read_text())
    manifest["model"]["factory"] = "teachers:net"
    (artifact / "tersor.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"teacher: 'teachers:net' with teacher_weights: .*artifact"):
        DistilStep(teacher=str(artifact)).check_teacher()
    with pytest.raises(InputError, match="give its weights as teacher_weights"):
        DistilStep(teacher="teachers:net").check_teacher()
    step = DistilStep(teacher="teachers:net", teacher_weights=str(artifact))
    step.check_teacher()
    x = torch.randn(5, 4)
    assert torch.allclose(step.teacher_of(None)(x), net(x), atol=0.05)
