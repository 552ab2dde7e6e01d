"""What is written is run: every public name, every docstring's example, every block of the README."""

import ast
import doctest
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

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
    assert set(jaxfa.__all__) == public | {"conservation", "diagnostics", "factored", "rules", "stacks"}
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


@pytest.mark.parametrize("name", MODULES)
def test_the_docstring_of_a_public_function_fits_a_screen(name):
    module = importlib.import_module(name)
    for thing in vars(module).values():
        if inspect.isfunction(thing) and thing.__module__ == name:
            assert len((thing.__doc__ or "").splitlines()) <= 36, thing.__name__


def test_the_readme_runs_from_top_to_bottom():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, "README.md has no ```python block"
    namespace = {"__name__": "__readme__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def strings_of(path):
    """Every string of a file: its docstrings, its messages; of what is no program, all of it."""
    text = path.read_text()
    nodes = ast.walk(ast.parse(text)) if path.suffix == ".py" else [ast.Constant(text)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("folder", ["jaxfa", "experiments", "."])
def test_whatever_a_text_names_is_there_as_spelled(folder):
    files = [ROOT / "README.md"] if folder == "." else sorted((ROOT / folder).rglob("*.py"))
    scopes = {jaxfa.jaxprs.flows.ERROR, *(getattr(jaxfa.ops, name) for name in dir(jaxfa.ops) if name.isupper())}
    named = re.findall(r"\bjaxfa[.][.\w]*\w", "\n".join(text for file in files for text in strings_of(file)))
    assert named
    for name in set(named) - scopes:
        functools.reduce(getattr, name.split(".")[1:], jaxfa)


@pytest.mark.parametrize("name", MODULES)
def test_whatever_a_docstring_refers_to_is_in_its_module(name):
    module = importlib.import_module(name)
    file = pathlib.Path(module.__file__)
    for target in re.findall(r":(?:func|class|mod):`([\w.]+)`", "".join(strings_of(file))):
        assert target.startswith("jaxfa.") or hasattr(module, target), target


def test_one_import_is_enough_and_the_core_does_not_wait_for_flax():
    code = "import sys, jaxfa; assert 'flax' not in sys.modules; jaxfa.nn.attach, jaxfa.stacks.mesh; jaxfa.no_such"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'jaxfa' has no attribute 'no_such'"
