"""What is written is run: every public name, every docstring's example, every block of the README."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import jaxfa

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ["jaxfa", *(module.name for module in pkgutil.walk_packages(jaxfa.__path__, "jaxfa."))]


@pytest.mark.parametrize("name", jaxfa.__all__)
def test_every_public_name_exists_and_is_documented(name):
    thing = getattr(jaxfa, name)
    text = inspect.getdoc(thing)
    assert text
    assert text.splitlines()[0].rstrip().endswith((".", "``")), text.splitlines()[0]
    if inspect.isfunction(thing):
        assert "Example:" in text
        assert "Source:" in text or name == "backprop"
        for argument in inspect.signature(thing).parameters:
            assert re.search(rf"^\s+{argument}: ", text, re.MULTILINE), f"{name} does not describe {argument}"


def test_the_list_of_names_is_complete():
    public = {name for name, thing in vars(jaxfa).items() if not name.startswith("_") and not inspect.ismodule(thing)}
    assert set(jaxfa.__all__) == public | {"conservation", "diagnostics"}
    assert sorted(jaxfa.__all__, key=str) == list(jaxfa.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_a_docstring_runs(name):
    module = importlib.import_module(name)
    assert module.__doc__
    results = doctest.testmod(module)
    assert results.failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("jaxfa.nn")])
def test_every_public_function_of_a_method_has_an_example(name):
    module = importlib.import_module(name)
    for thing in vars(module).values():
        if inspect.isfunction(thing) and thing.__module__ == name and thing.__name__ in jaxfa.__all__:
            assert ">>> " in inspect.getdoc(thing), thing.__name__


def test_the_readme_runs_from_top_to_bottom():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, "README.md has no ```python block"
    namespace = {"__name__": "__readme__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
