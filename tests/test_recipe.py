"""Recipes: YAML in and out, which rule wins, and messages that say the place and the way out."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import tersor
from tersor.core.errors import DataError, FormatError, InputError, TersorError, UnknownName
from tersor.formats import FORMATS
from tersor.methods import METHODS
from tersor.nn.sites import find_sites, matches
from tersor.pipeline import check_steps
from tersor.recipe import Recipe
from tersor.schemes.scheme import Scheme, parse_rule
from tersor.steps import step_visitor
from tersor.training import FinetuneStep
from tersor.transforms.awq import Awq
from tersor.transforms.smooth import Smooth


def known_schemes() -> list[str]:
    schemes = ["keep", "int8-dynamic", "int8/int8-dynamic", "magnitude(sparsity=0.25):bitmask", "hqq(p=0.5):int4-asym"]
    for format in FORMATS.values():
        schemes += [format.name, *(f"{m}:{format.name}" for m in METHODS if METHODS[m]().accepts(format) is None)]
    return schemes


schemes = st.sampled_from(known_schemes())
patterns = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
recipes = st.builds(
    Recipe.of,
    schemes,
    st.dictionaries(patterns, schemes, max_size=4),
    st.lists(patterns, max_size=3),
    st.integers(0, 2**63 - 1),
    bias_correction=st.booleans(),
    keep_float=st.sampled_from(["auto", "none", 0, 3]),
)


def test_a_recipe_from_before_cpu_is_for_any():
    old = Recipe.from_yaml("tersor: 1\nseed: 0\nsteps: [{step: weights, scheme: int8-static}]")
    assert old.steps[0].cpu == "any"
    assert old.for_cpu("vnni").steps[0].cpu == "vnni"
    assert Recipe.from_yaml(old.for_cpu("vnni").to_yaml()) == old.for_cpu("vnni")


@given(recipes)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_yaml_round_trips(recipe):
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert list(again.steps[0].rules) == list(recipe.steps[0].rules), "the order of rules decides"


@given(recipes)
@settings(deadline=None, max_examples=20)
def test_files_round_trip(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_file(path) == recipe


@given(schemes)
@settings(deadline=None)
def test_schemes_round_trip(text):
    scheme = parse_rule(text)
    assert scheme is None or Scheme.parse(str(scheme)) == scheme


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 32)
        self.inner = nn.ModuleDict({"head": nn.Linear(32, 32), "body": nn.Linear(32, 32)})


def assigned(**options) -> dict[str, str]:
    step = Recipe.of(**options).steps[0]
    return {site.name: str(scheme) if scheme else "keep" for site, scheme in step.assign(find_sites(Block()))}


def test_the_last_matching_rule_wins():
    assert assigned(scheme="int8", rules={"*head": "int4", "inner.*": "bf16"}) == {
        "head": "mse:int4",
        "inner.head": "nearest:bf16",
        "inner.body": "nearest:bf16",
    }
    assert assigned(scheme="int8", rules={"inner.*": "bf16", "*head": "int4"})["inner.head"] == "mse:int4"


def test_a_rule_may_keep():
    assert assigned(scheme="int8", rules={"*": "int4", "head": "keep"})["head"] == "keep"


def test_exclude_wins_over_rules():
    assert assigned(scheme="int8", rules={"inner.head": "int4"}, exclude=["*.head"]) == {
        "head": "keep",
        "inner.head": "keep",
        "inner.body": "mse:int8",
    }


def test_a_leading_star_dot_matches_at_the_top():
    assert matches("*.head", "head")
    assert matches("*.head", "inner.head")
    assert not matches("*.head", "inner.ahead")
    assert not matches("head", "inner.head")
    assert not matches("*.Head", "head"), "names are case-sensitive"


def test_excluded_sites_are_left_alone_and_others_are_not():
    model = Block()
    model.forward = lambda x: x
    made = tersor.compress(model, Recipe.of("int8", exclude=["head"]))
    assert [site.name for site in made.sites] == ["inner.head", "inner.body"]
    assert isinstance(made.model.head, nn.Linear)


def test_steps_run_in_order():
    steps = [{"scheme": "magnitude(sparsity=0.5):bitmask"}, {"scheme": "int8"}]
    made = tersor.compress(nn.Sequential(nn.Linear(32, 32)), Recipe.validated({"steps": steps}, "test"))
    assert made.sites[0].scheme == "mse:int8"
    assert (made.model[0].weight == 0).float().mean() > 0.45


# Mistakes.


@pytest.mark.parametrize(
    ("scheme", "hint"),
    [
        ("int4-g63", "did you mean 'int4-g64'"),
        ("hqqq:int4-asym", "did you mean 'hqq'"),
        ("magnitude(sparcity=0.5):bitmask", "did you mean 'sparsity'"),
        ("int8/int8-dinamic", "did you mean 'int8-dynamic'"),
        ("hqq", "names a method without a format"),
        ("hqq:int4", "use int4-asym"),
        ("magnitude:int4", "use bitmask"),
        ("magnitude(sparsity=half):bitmask", "sparsity=half is not a number"),
        ("magnitude(sparsity=True):bitmask", "sparsity=True is not a number"),
        ("magnitude(sparsity=__import__('os')):bitmask", "not a number"),
        ("magnitude(sparsity=1.5):bitmask", r"sparsity=1.5 is not a fraction"),
        ("magnitude(sparsity=-1):bitmask", r"not a fraction"),
        ("a b:int4", "not a method"),
        ("", "unknown format ''"),
        (":", "unknown format ''"),
    ],
)
def test_unknown_schemes_say_what_was_meant(scheme, hint):
    with pytest.raises(InputError, match=hint):
        Recipe.of(scheme)
    with pytest.raises(InputError, match=rf"steps\.0\.rules.*{hint}"):
        Recipe.of("keep", {"head": scheme})


@given(st.text(max_size=20))
@settings(deadline=None)
def test_any_text_is_a_scheme_or_an_error_of_ours(text):
    try:
        parse_rule(text)
    except TersorError as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize("options", [{"rules": {"inner.haed": "int4"}}, {"exclude": ["inner.haed"]}])
def test_a_pattern_that_matches_nothing_says_the_nearest_site(options):
    with pytest.raises(UnknownName, match=r"'inner.haed': did you mean 'inner.head'\? see `tersor inspect MODEL`"):
        assigned(scheme="int8", **options)


def test_a_format_that_does_not_fit_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(step_visitor, "compress_site", lambda *_: pytest.fail("work had started"))
    monkeypatch.setattr(FinetuneStep, "run", lambda *_: pytest.fail("training had started"))
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(24, 8))
    with pytest.raises(FormatError, match=r"q4_k: 1 has in=24 columns.*--exclude '1'"):
        tersor.compress(model, Recipe.of("q4_k"))
    steps = [{"step": "finetune"}, {"scheme": "q4_k"}]
    with pytest.raises(FormatError, match=r"q4_k: 1 has in=24 columns.*--exclude '1'"):
        check_steps(Recipe.validated({"steps": steps}, "test"), model, is_whole=False)
    with pytest.raises(DataError, match="finetune: no task has no train split"):
        tersor.compress(model, Recipe.validated({"steps": steps}, "test"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [{scheme: int9}]", r"steps\.0\.scheme: .*unknown format 'int9'"),
        ("steps: [{scheme: int8}, {scheme: 5}]", r"steps\.1\.scheme: Input should be a valid string"),
        ("steps: [{shceme: int8}]", r"steps\.0\.shceme: Extra inputs are not permitted"),
        ("steps: [{step: weigths}]", r"steps\.0\.step: 'weigths' is no kind of step"),
        ("steps: [{rules: [int8]}]", r"steps\.0\.rules: Input should be a valid dictionary"),
        ("steps: [{exclude: 3}]", r"steps\.0\.exclude: Input should be a valid tuple"),
        ("steps: 3", "steps: Input should be a valid tuple"),
        ("steps: []\nseed: -1", "seed: Input should be greater than or equal to 0"),
        ("steps: []\nseed: lots", "seed: Input should be a valid integer"),
        ("steps: []\ntersor: 2", "tersor: Input should be 1"),
        ("steps: []\nbudget: 4x", "budget: Extra inputs are not permitted"),
        ("steps: [", "not YAML"),
        ("\t", "not YAML"),
        ("steps: []\nseed: 2020-99-99", "not YAML: month must be in 1..12"),
        ("[" * 5000, "not YAML"),
        ("scheme: int8", "a recipe is a mapping with a list of `steps`"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_mistakes_in_yaml_name_the_place(text, message):
    with pytest.raises(InputError, match=f"my.yaml: {message}"):
        Recipe.from_yaml(text, "my.yaml")


@pytest.mark.parametrize("tag", ["object/apply:os.system", "object:torch.nn.Linear", "name:os.system", "module:os"])
def test_yaml_cannot_make_python_objects(tag, tmp_path):
    with pytest.raises(InputError, match="could not determine a constructor"):
        Recipe.from_yaml(f"steps: []\nseed: !!python/{tag} ['touch {tmp_path}/made']")
    assert not list(tmp_path.iterdir())


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_any_file_is_a_recipe_or_an_error_of_ours(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("recipe") / "any.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"any\.yaml"):
        Recipe.from_file(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the recipe"):
        Recipe.from_file(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read the recipe"):
        Recipe.from_file(tmp_path)


def test_a_recipe_is_frozen():
    recipe = Recipe.of("int8")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_the_same_recipe_makes_the_same_bytes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    recipe = Recipe.of("hqq:int3-g32-asym", {"1": "int5"})
    first, second = (tersor.compress(model, recipe).model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# Transforms.


def test_transforms_are_spelled_in_full_and_read_back():
    recipe = Recipe.of("int3-g64", transforms=[" smooth( alpha=0.5 )", "awq(format=int4-g64)", "fold-bn"])
    assert [step.transform for step in recipe.steps[:3]] == ["smooth(alpha=0.5)", "awq(format=int4-g64)", "fold-bn"]
    assert recipe.weights == recipe.steps[3:]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_awq_takes_the_format_of_the_weights_that_follow():
    recipe = Recipe.of("int3-g64", transforms=["awq", "awq(format=int2-g32)", "smooth"])
    transforms = [recipe.transform_of(number) for number in range(3)]
    assert transforms == [Awq(format="int3-g64"), Awq(format="int2-g32"), Smooth()]
    alone = Recipe.from_yaml("steps: [{step: transform, transform: awq}]")
    assert alone.transform_of(0) == Awq()


def test_of_two_equal_transforms_each_takes_the_format_that_follows_it():
    awq = {"step": "transform", "transform": "awq"}
    recipe = Recipe.validated({"steps": [awq, {"scheme": "int4-g32"}, awq, {"scheme": "int3-g64"}]}, "test")
    assert recipe.transform_of(0) == Awq(format="int4-g32")
    assert recipe.transform_of(2) == Awq(format="int3-g64")


@pytest.mark.parametrize("pattern", ["20", "*.head", "inner.*"])
def test_a_single_pattern_is_one_pattern(pattern):
    assert Recipe.of("int8", exclude=pattern) == Recipe.of("int8", exclude=[pattern])
    assert Recipe.of("int8", transforms="fold-bn") == Recipe.of("int8", transforms=["fold-bn"])
    for step in ("weights", "qat", "prune", "lottery"):
        scheme = {"scheme": "int8"} if step in ("weights", "qat") else {}
        text = Recipe.validated({"steps": [{"step": step, **scheme, "exclude": pattern}]}, "test")
        assert text.steps[0].exclude == (pattern,)


def test_a_single_pattern_and_a_single_candidate_of_a_plan():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(21)))
    recipe = tersor.plan(model, ratio="2.5x", exclude="20", candidates="int8")
    found = {site.name: scheme for site, scheme in recipe.weights[0].assign(find_sites(model))}
    assert [name for name, scheme in found.items() if scheme is None] == ["20"]
    assert {str(scheme) for scheme in found.values() if scheme} == {"mse:int8"}


# The usual method: the best that the data at hand allows.


class Reader(nn.Module):
    """A looked-up weight, one that shows its inputs, and one that a module of its own runs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.rnn = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Tokens:
    name = description = fingerprint = "tokens"
    output = "logits"

    def __init__(self, seed=0):
        self.x = torch.randint(0, 40, (64, 6), generator=torch.Generator().manual_seed(seed))

    def batches(self, split, batch_size=None):
        return iter(self.x.split(batch_size or 32))

    def forward(self, model, batch):
        return model(batch)


def reader():
    torch.manual_seed(0)
    return Reader().eval()


def chosen(recipe, task, model=None):
    return {site.name: site.scheme for site in tersor.compress(model or reader(), recipe, task).sites}


def test_the_usual_method_reads_the_inputs_where_calibration_shows_them():
    recipe = Recipe.of("int8", {"head": "int8-dynamic"})
    looked_up = dict.fromkeys(("embed", "rnn.weight_ih_l0", "rnn.weight_hh_l0"), "mse:int8")
    assert chosen(recipe, Tokens()) == {**looked_up, "head": "gptq:int8/int8-dynamic"}
    assert chosen(recipe, None) == {**looked_up, "head": "mse:int8/int8-dynamic"}


def test_the_recipe_of_the_result_names_every_method_and_makes_the_same_again():
    made = tersor.compress(reader(), "int4-g32", Tokens())
    step = made.recipe.weights[0]
    assert step.scheme == "gptq:int4-g32"
    assert step.rules["embed"] == "mse:int4-g32"
    again = tersor.compress(reader(), Recipe.from_yaml(made.recipe.to_yaml()), Tokens())
    assert all(
        torch.equal(a, b)
        for a, b in zip(made.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )


def test_the_usual_method_with_data_loses_less_than_the_one_without():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()

    class Numbers(Tokens):
        def __init__(self):
            self.x = torch.randn(256, 32) @ torch.randn(32, 32).triu()

    task = Numbers()

    def loss(recipe):
        return (tersor.compress(model, recipe, task).model(task.x) - model(task.x)).square().mean()

    assert loss("int4") < 0.7 * loss("mse:int4")
    assert loss("2:4") < 0.7 * loss("magnitude:2:4")


def test_a_method_that_is_named_stays():
    assert chosen(Recipe.of("nearest:int8", exclude="rnn*"), Tokens()) == {
        "embed": "nearest:int8",
        "head": "nearest:int8",
    }


def test_zeros_that_an_earlier_step_made_stay():
    steps = [{"scheme": "magnitude(sparsity=0.5):bitmask", "exclude": ["embed", "rnn*"]}, {"scheme": "int8"}]
    made = tersor.compress(reader(), Recipe.validated({"steps": steps}, "test"), Tokens())
    assert (made.model.head.packed.encoded.decode() == 0).float().mean() >= 0.5
    assert {site.name: site.scheme for site in made.sites}["head"] == "mse:int8"


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_every_format_names_its_usual_methods(format):
    for name in format.usual_methods:
        assert METHODS[name]().accepts(format) is None


def test_a_recipe_may_be_a_scheme_and_its_mistakes_are_ours():
    assert chosen("nearest:int8", None) == chosen(Recipe.of("nearest:int8"), None)
    with pytest.raises(InputError, match=r"did you mean 'int4-g64'"):
        tersor.compress(reader(), "int4-g63")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            "{step: transform, transform: smoth}",
            r"steps\.0\.transform: unknown transform 'smoth': did you mean 'smooth'",
        ),
        ("{step: transform, transform: smooth(alfa=1)}", "unknown option of smooth 'alfa': did you mean 'alpha'"),
        ("{step: transform, transform: smooth(alpha=2)}", r"steps\.0\.transform: smooth: alpha=2 is not in \[0, 1\]"),
        ("{step: transform, transform: smooth(alpha=x)}", "smooth: alpha=x is not a number"),
        ("{step: transform}", r"steps\.0\.transform: Field required"),
        ("{step: shrink}", r"steps\.0\.step: 'shrink' is no kind of step; known: weights, transform"),
        ("{scheme: int9}", r"steps\.0\.scheme: unknown format 'int9'"),
    ],
)
def test_a_mistake_in_a_step_is_named_with_its_place(step, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_yaml(f"steps: [{step}]")
