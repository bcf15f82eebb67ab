"""Recipes: strict at every level, overridable from shell and Python, and the same after being saved."""

from __future__ import annotations

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
        ("evaluate: {zzz: 1}", "'evaluate.zzz'", "Known: batch_size, instruction, max_new_tokens, source"),
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
        (["name=a/b"], "names the run folder"),
        (["name=.."], "names the run folder"),
    ],
)
def test_contradictions_are_refused(overrides, said):
    with pytest.raises(RecipeError, match=said.replace(".", r"\.")):
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
        assert load_recipe(name).evaluate.source == "builtin:clinic[:100]", name
