"""What the README, the constraints and the Makefile promise is what is there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medcot.recipe import Recipe, list_recipes, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PINS = {
    canonicalize_name(Requirement(line).name): Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


UNPINNED = {"triton"}  # PyTorch's CUDA builds each want a version of their own, and a pin would keep them out


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    found = [Requirement(line) for lines in (PROJECT["dependencies"], *extras) for line in lines]
    return [requirement for requirement in found if requirement.name not in UNPINNED]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
    pin = next(iter(PINS[canonicalize_name(requirement.name)].specifier))
    assert pin.operator == "=="
    assert "+" not in pin.version, "a local version such as 2.13.0+cpu fits one build only"
    assert requirement.specifier.contains(pin.version, prereleases=True)


def test_every_pin_is_one_exact_version():
    assert [name for name, pin in PINS.items() if [s.operator for s in pin.specifier] != ["=="] or pin.url] == []


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_every_import_of_the_package_is_a_declared_dependency_or_the_standard_library():
    import sys

    modules = {"yaml": "pyyaml", "llama_cpp": "llama-cpp-python"}
    optional = {"google", "kaggle_secrets"}  # a notebook's own vault, looked for where it exists
    optional |= UNPINNED  # the kernels run where PyTorch is a CUDA build
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py"))
    found = {name.split(".")[0] for tree in trees for node in ast.walk(tree) for name in imported(node)}
    foreign = {name for name in found if name not in sys.stdlib_module_names} - {"medcot", "_typeshed"} - optional
    assert {canonicalize_name(modules.get(name, name)) for name in foreign} <= declared


def test_the_readme_lists_the_shipped_recipes_as_they_describe_themselves():
    block = README.partition("<!-- recipes:")[2].partition("<!-- /recipes -->")[0]
    listed = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", block, re.MULTILINE))
    assert listed == list_recipes()


def known_keys() -> set[str]:
    stages = Recipe.model_fields
    keys = set(stages)
    for name, field in stages.items():
        if hasattr(field.annotation, "model_fields"):
            keys |= {f"{name}.{key}" for key in field.annotation.model_fields}
    return keys | {"data.columns.question", "data.columns.reasoning", "data.columns.response", "data.columns.*"}


def test_every_recipe_key_that_the_readme_names_exists():
    prefix = "|".join(Recipe.model_fields)
    named = set(re.findall(rf"(?<![\w./-])((?:{prefix})\.(?:columns\.)?[a-z_*]+)(?=[`=,)\s])", README))
    assert named - known_keys() - {"model.load", "model.device"} == set()
    assert len(named) > 30


def test_the_readmes_recipe_file_is_a_recipe(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1)
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path)
    assert yaml.safe_load(text)["data"]["columns"] == dict(recipe.data.columns)


def test_the_readmes_commands_are_commands_of_the_command_line():
    from medcot.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"medcot (run|recipes|doctor|ask|report|\w+)(?= --| [a-z]+-|`)", README)) <= commands


def test_every_set_up_command_uses_the_constraints():
    for name in ("README.md", "Makefile", "CONTRIBUTING.md"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            # PyTorch's CPU build comes from its own index, at the pinned version.
            if re.search(r"pip install (?!--quiet)", line) and "download.pytorch.org" not in line:
                assert "-c constraints.txt" in line, line
    pytorch = re.search(r"pip install torch==(\S+) --index-url", README).group(1)
    assert PINS["torch"].specifier.contains(pytorch)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/INTENDED_USE.md"])
def test_local_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", path.read_text(encoding="utf-8")):
        if target != "docs/report.png":
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "docs/INTENDED_USE.md"])
def test_the_intended_use_is_stated(name):
    text = " ".join((ROOT / name).read_text(encoding="utf-8").replace("*", "").lower().split())
    assert "research and education" in text
    assert "not for diagnosis" in text


def test_the_makefile_says_what_each_target_does():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("help", "setup", "run", "test", "clean"):
        assert re.search(rf"^{target}:.*## \w", text, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")
