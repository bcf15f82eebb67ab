"""Recipes: strict at every level, overridable from shell and Python, and the same after being saved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from medcot.errors import RecipeError
from medcot.recipe import Checkpointing, OverLength, Precision, Recipe, dump_recipe, list_recipes, load_recipe

DISTILLS = {
    "r1-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "r1-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "r1-qwen-14b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "r1-qwen-32b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "r1-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "r1-llama-70b": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
}


def _write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Strictness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("trian: {}", "'trian'", "Did you mean 'train'?"),
        ("train: {learning_rte: 1}", "'train.learning_rte'", "Did you mean 'learning_rate'?"),
        ("data: {colums: {}}", "'data.colums'", "Did you mean 'columns'?"),
        ("push: {adaptor: me/x}", "'push.adaptor'", "Did you mean 'adapter'?"),
        (
            "evaluate: {zzz: 1}",
            "'evaluate.zzz'",
            "Known: ask_form, batch_size, max_new_tokens, reuse, seed, seeds, source, temperature, top_p",
        ),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path, text, key, nearest):
    path = _write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert key in caught.value.value and str(path) in caught.value.value and caught.value.remedy == nearest


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("modle=embedded", "model"),
        ("train.max_step=3", "max_steps"),
        ("lora.rank.r=3", "'lora.rank' in default is not a recipe key"),
        ("data.columns.qestion=Q", "question"),
        ("data.sources=[{source: a, wieght: 1}]", "weight"),
        ("data.validation.fracton=0.1", "fraction"),
        ("data.mix=[a, b]", "'data.mix' in default is not a recipe key"),
    ],
)
def test_an_unknown_key_in_an_override_names_the_nearest(override, nearest):
    with pytest.raises(RecipeError) as caught:
        load_recipe("default", [override])
    assert nearest in str(caught.value)


def test_unknown_keys_beyond_the_first_are_counted():
    with pytest.raises(RecipeError, match=r"\(1 more problem\(s\) after this one\)"):
        load_recipe("default", ["train.a=1", "train.b=2"])


@pytest.mark.parametrize(
    "override",
    [
        "train.batch_size=0",
        "train.batch_size=many",
        "train.learning_rate=-1",
        "train.learning_rate=fast",
        "lora.dropout=1.5",
        "lora.init=best",
        "model.precision=fp9",
        "prompt.style=haiku",
        "data.over_length=cut",
        "train.warmup=-1",
        "ask.top_p=0",
        "data.validation=1",
        "data.validation=-0.1",
        "data.validation.fraction=half",
        "data.identifiers=hide",
        "data.remove_duplicates=some",
        "train.validate_steps=0",
        "train.max_steps={a: 1}",
        "model=[1]",
    ],
)
def test_a_value_that_breaks_its_rule_is_quoted(override):
    key, _, value = override.partition("=")
    with pytest.raises(RecipeError) as caught:
        load_recipe("tutorial-8b", [override])
    assert key in caught.value.value and value.strip("{}[]").partition(":")[0] in caught.value.value


def test_a_recipe_cannot_be_changed():
    recipe = load_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.batch_size = 3  # type: ignore[misc]


# Contradictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.max_steps=5", "train.epochs=2"], "max_steps=5 and epochs=2.0 are both set"),
        (["train.micro_batch_size=9"], "micro_batch_size=9 is larger than batch_size=8"),
        (["push.merged=me/x"], "save.merged is false"),
        (["push={adapter: me/x, merged: me/x}", "save.merged=true"], "both go to 'me/x'"),
        (["data.source=a.jsonl", "data.sources=[b.jsonl]"], "source=a.jsonl and sources (of 1) are both set"),
        (["data.sources=[a.jsonl]", "data.config=en"], "config=en beside sources"),
        (["data.sources=[{source: a, weight: 2}, b]"], "have the weights 2, null"),
        (["data.sources=[a, b]", "data.repeat=true"], "the sources have no weights"),
        (["data.repeat=true"], "goes with data.sources"),
        (["data.source=null"], "source=null and no sources"),
        (["data.validation={source: v.jsonl, fraction: 0.1}"], "fraction=0.1 and source=v.jsonl are both set"),
        (["data.validation.split=test"], "split=test without a source"),
        (["name=a/b"], "names the run folder"),
        (["name=.."], "names the run folder"),
    ],
)
def test_contradictions_are_refused(overrides, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe("tutorial-8b", overrides)


def test_switching_from_steps_to_epochs_takes_two_overrides():
    recipe = load_recipe("tutorial-8b", ["train.max_steps=null", "train.epochs=0.5"])
    assert recipe.train.max_steps is None and recipe.train.epochs == 0.5


# Shorthands and overrides ---------------------------------------------------------------------------------------------


def test_a_lone_string_stands_for_the_first_key_of_a_stage(tmp_path):
    recipe = load_recipe(_write(tmp_path, "model: embedded\ndata: my.jsonl\ntracking: none\nevaluate: builtin:clinic"))
    assert recipe.model.source == "embedded" and recipe.data.source == "my.jsonl"
    assert recipe.tracking.tracker == "none" and recipe.evaluate.source == "builtin:clinic"
    assert recipe.name == "mine"


def test_a_lone_string_keeps_the_rest_of_a_stage():
    recipe = load_recipe("tutorial-8b", ["data=my.jsonl", "model=some/model"])
    assert recipe.data.source == "my.jsonl" and recipe.data.config == "en"
    assert recipe.model.source == "some/model" and recipe.model.precision is Precision.NF4


def test_a_shorthand_in_a_file_and_a_dotted_override_are_merged(tmp_path):
    recipe = load_recipe(_write(tmp_path, "data: my.jsonl"), ["data.split=test", "data.num_proc=1"])
    assert (recipe.data.source, recipe.data.split, recipe.data.num_proc) == ("my.jsonl", "test", 1)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=2E-05", "train.learning_rate", 2e-5),
        ("train.max_steps=3", "train.max_steps", 3),
        ("train.save_steps=null", "train.save_steps", None),
        ("evaluate.source=null", "evaluate.source", None),
        ("train.train_on_prompt=true", "train.train_on_prompt", True),
        ("train.gradient_checkpointing=offload", "train.gradient_checkpointing", Checkpointing.OFFLOAD),
        ("data.over_length=truncate_think", "data.over_length", OverLength.TRUNCATE_THINK),
        ("data=builtin:clinic[:100]", "data.source", "builtin:clinic[:100]"),
        ("tracking.run_name=a: b: c", "tracking.run_name", "a: b: c"),
        ("data.source=x=y.jsonl", "data.source", "x=y.jsonl"),
        ("data.columns={question: Q, response: A}", "data.columns", {"question": "Q", "response": "A"}),
        ("data.columns.question=Q", "data.columns", {"question": "Q"}),
        ("ask.questions=[Why so, 'How, then?']", "ask.questions", ("Why so", "How, then?")),
        ("lora.targets=[q_proj, v_proj]", "lora.targets", ("q_proj", "v_proj")),
        ("tracking.project=A project", "tracking.project", "A project"),
        ("tracking.run_name='off'", "tracking.run_name", "off"),
        ("tracking.run_name=nan", "tracking.run_name", "nan"),
    ],
)
def test_overrides_are_read_as_they_are_meant(override, path, value):
    found = load_recipe("tutorial-8b", [override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("gradient_checkpointing", ["on", "off"])
def test_checkpointing_on_and_off_survive_yaml(tmp_path, gradient_checkpointing):
    # YAML 1.1 reads a bare on or off as a boolean.
    override = f"train.gradient_checkpointing={gradient_checkpointing}"
    assert load_recipe("default", [override]).train.gradient_checkpointing == gradient_checkpointing
    path = _write(tmp_path, f"train: {{gradient_checkpointing: {gradient_checkpointing}}}")
    assert load_recipe(path).train.gradient_checkpointing == gradient_checkpointing


def test_later_overrides_win_and_lose_to_none_before():
    recipe = load_recipe("default", ["train.seed=1", "train.seed=2"], {"train": {"seed": 0}})
    assert recipe.train.seed == 2


@pytest.mark.parametrize("override", ["train.seed", "=3", ""])
def test_an_override_needs_key_and_value(override):
    with pytest.raises(RecipeError, match=r"An override is written key\.sub=value"):
        load_recipe("default", [override])


def test_python_keywords_are_merged_into_their_stages():
    recipe = load_recipe("tutorial-8b", (), {"data": Path("x.jsonl"), "train": {"max_steps": 3}, "lora": {"r": 4}})
    assert recipe.data.source == "x.jsonl" and recipe.data.config == "en"
    assert recipe.train.max_steps == 3 and recipe.train.train_on_prompt is True
    assert recipe.lora.r == 4 and recipe.lora.alpha == 16


def test_columns_given_in_python_replace_those_of_the_recipe(tmp_path):
    path = _write(tmp_path, "data: {columns: {question: A, reasoning: B}}")
    assert load_recipe(path, (), {"data": {"columns": {"response": "C"}}}).data.columns == {"response": "C"}


def test_a_recipe_object_is_a_starting_point():
    start = load_recipe("tutorial-8b")
    changed = load_recipe(start, ["train.max_steps=3"])
    assert changed.train.max_steps == 3 and start.train.max_steps == 60
    assert changed.model == start.model


# Sources and validation -----------------------------------------------------------------------------------------------


def test_several_sources_have_each_their_own_columns_and_weight(tmp_path):
    text = """
data:
  sources:
    - a.jsonl
    - {source: owner/set, config: en, split: test, weight: 2, revision: abc, columns: {question: Q}}
"""
    with pytest.raises(RecipeError, match="weights null, 2"):
        load_recipe(_write(tmp_path, text))
    data = load_recipe(_write(tmp_path, text.replace("- a.jsonl", "- {source: a.jsonl, weight: 0.5}"))).data
    assert data.source is None and data.named == "a.jsonl + owner/set" and data.origins == data.sources
    first, second = data.sources
    assert (first.source, first.weight, first.split, first.config) == ("a.jsonl", 0.5, "train", None)
    assert (second.weight, second.config, second.split, second.columns) == (2, "en", "test", {"question": "Q"})


def test_one_source_is_its_own_origin():
    data = load_recipe("tutorial-8b").data
    assert data.origins == (data,) and data.named == data.source and data.sources == ()


@pytest.mark.parametrize("value", ["[a.jsonl, b.jsonl]", "[{source: a.jsonl}, b.jsonl]"])
@pytest.mark.parametrize("key", ["data", "data.sources"])
def test_sources_take_the_place_of_the_recipe_s_source_and_what_belongs_to_it(key, value):
    assert load_recipe("tutorial-8b").data.config == "en"
    data = load_recipe("tutorial-8b", [f"{key}={value}", "data.num_proc=1"]).data
    assert data.source is None and data.config is None and data.num_proc == 1
    assert [source.source for source in data.sources] == ["a.jsonl", "b.jsonl"]


def test_a_source_takes_the_place_of_the_recipe_s_sources(tmp_path):
    text = "data: {sources: [{source: a, weight: 1}, {source: b, weight: 2}], repeat: true, num_proc: 1}"
    for override in ("data=my.jsonl", "data.source=my.jsonl"):
        data = load_recipe(_write(tmp_path, text), [override]).data
        assert (data.source, data.sources, data.repeat, data.num_proc) == ("my.jsonl", (), False, 1)


def test_sources_from_python_may_be_paths():
    data = load_recipe("default", (), {"data": [Path("a.jsonl"), {"source": Path("b.jsonl")}]}).data
    assert data.named == "a.jsonl + b.jsonl"
    assert load_recipe("default", (), {"data": {"validation": Path("v.jsonl")}}).data.validation.source == "v.jsonl"


def test_validation_is_a_number_or_a_source(tmp_path):
    assert load_recipe("default").data.validation.fraction == 0
    for nothing in ("null", "0"):
        validation = load_recipe("default", [f"data.validation={nothing}"]).data.validation
        assert (validation.source, validation.fraction) == (None, 0)
    assert load_recipe("default", ["data.validation=0.05"]).data.validation.fraction == 0.05
    path = _write(tmp_path, "data: {validation: v.jsonl}")
    named = load_recipe(path, ["data.validation.split=test"]).data.validation
    assert (named.source, named.split) == ("v.jsonl", "test")
    assert load_recipe(path, ["data.validation=0.1"]).data.validation.source is None
    assert load_recipe(path, ["data.validation.fraction=0.1"]).data.validation.source is None
    number = _write(tmp_path, "data: {validation: 0.1}")
    assert load_recipe(number, ["data.validation.source=v.jsonl"]).data.validation.source == "v.jsonl"


def test_what_the_doctor_is_told():
    data = load_recipe("default").data
    assert (data.accept, data.against, data.identifiers) == ((), None, "report")
    assert data.remove_contaminated is True and data.remove_duplicates == "exact"
    data = load_recipe("default", ["data.accept=bos_doubled", "data.against=[]", "data.remove_duplicates=none"]).data
    assert (data.accept, data.against, data.remove_duplicates) == (("bos_doubled",), (), "none")
    assert load_recipe("default", ["data.against=[medqa, t.jsonl]"]).data.against == ("medqa", "t.jsonl")


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=[a.jsonl, b.jsonl]"],
        ["data.sources=[{source: a, weight: 1}, {source: b, weight: 3.5}]", "data.repeat=true"],
        ["data.validation=0.05", "data.seed=1"],
        ["data.validation={source: v.jsonl, split: test}", "data.against=[]"],
        ["data.identifiers=mask", "data.accept=[a, b]", "train.validate_steps=3"],
    ],
)
def test_data_keys_survive_being_saved(tmp_path, overrides):
    recipe = load_recipe("default", overrides)
    assert load_recipe(_write(tmp_path, dump_recipe(recipe))) == recipe
    assert load_recipe(recipe) == recipe


# Files ----------------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_recipe(_write(tmp_path, "")) == Recipe(name="mine")


def test_an_empty_stage_is_its_defaults(tmp_path):
    assert load_recipe(_write(tmp_path, "train:\nlora:\n")).train == Recipe().train


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a: [", "is not YAML"), (b"- 1", "holds a list"), (b"just words", "holds a str"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, said):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_a_missing_file_and_an_unknown_name_are_told_apart(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"no recipe is named 'tutorial-8'.*Did you mean 'tutorial-8b'"):
        load_recipe("tutorial-8")


# Shipped --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_survives_being_saved(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert load_recipe(_write(tmp_path, dump_recipe(recipe), "other.yaml")) == recipe


def test_a_saved_recipe_writes_every_default_out():
    values = yaml.safe_load(dump_recipe(load_recipe()))
    for name, field in Recipe.model_fields.items():
        stage = field.annotation
        if name not in ("name", "description"):
            assert set(values[name]) == set(stage.model_fields), name


def test_overrides_survive_being_saved(tmp_path):
    overrides = ["train.learning_rate=1e-4", "evaluate.source=null", "ask.questions=['yes', 'a: b']", "train.epochs=2"]
    recipe = load_recipe("default", [*overrides, "train.gradient_checkpointing=off"])
    assert load_recipe(_write(tmp_path, dump_recipe(recipe))) == recipe


def test_the_shipped_recipes_name_the_six_distills():
    assert list_recipes().keys() >= {"default", "tutorial-8b", "tutorial-8b-full", *DISTILLS}
    assert {name: load_recipe(name).model.source for name in DISTILLS} == DISTILLS
    assert next(iter(list_recipes())) == "default"


@pytest.mark.parametrize("name", ["tutorial-8b", "tutorial-8b-full"])
def test_the_tutorial_is_the_tutorial(name):
    recipe = load_recipe(name)
    assert recipe.model.source == DISTILLS["r1-llama-8b"]
    assert (recipe.model.precision, recipe.model.max_seq_length) == (Precision.NF4, 2048)
    assert recipe.prompt.style == "tutorial"
    assert recipe.train.train_on_prompt and recipe.train.batch_size == 8 and recipe.train.learning_rate == 2e-4
    assert (recipe.train.weight_decay, recipe.train.schedule, recipe.train.logging_steps) == (0.01, "linear", 10)
    lora = recipe.lora
    assert (lora.r, lora.alpha, lora.dropout, lora.bias, lora.seed, len(lora.targets)) == (16, 16, 0, "none", 3407, 7)
    assert recipe.ask.max_new_tokens == 1200
    assert recipe.tracking.project == "Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset"
    if name == "tutorial-8b":
        assert recipe.data.source == "FreedomIntelligence/medical-o1-reasoning-SFT[:500]"
        assert (recipe.train.max_steps, recipe.train.warmup) == (60, 5)
    else:
        assert recipe.data.source == "FreedomIntelligence/medical-o1-reasoning-SFT"
        assert recipe.train.epochs == 1 and 0 < recipe.train.warmup < 1


def test_only_the_tutorial_trains_on_the_prompt():
    trained = {name for name in list_recipes() if load_recipe(name).train.train_on_prompt}
    assert trained == {"tutorial-8b", "tutorial-8b-full"}


def test_every_recipe_is_judged_on_the_clinic():
    for name in list_recipes():
        assert "builtin:clinic:100" in (load_recipe(name).evaluate.source or ""), name
