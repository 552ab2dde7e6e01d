"""What is written is run: every public name, every docstring's example, every block of README and docs."""

import ast
import contextlib
import dataclasses
import doctest
import functools
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import runpy
import subprocess
import sys

import pytest

import jaxfa
from experiments.__main__ import EXPERIMENTS
from experiments.common import methods as compare
from experiments.common import readme, sweep
from tests.methods import METHODS

ROOT = pathlib.Path(__file__).parent.parent
README, DOCS, EXAMPLES = ROOT / "README.md", ROOT / "docs", ROOT / "experiments" / "examples"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
SCRIPTS = [script for script in sorted(EXAMPLES.glob("*.py")) if script.stem != "__init__"]
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


def blocks_of(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def scripts_of(page):
    return re.findall(r"^```\{literalinclude\} (.*)$", page.read_text(), re.MULTILINE)


@functools.cache
def printed_by(script):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script))
    return printed.getvalue()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs_and_says_what_came_of_it(script):
    is_program = '__name__ == "__main__"' in script.read_text()  # these have tests of their own
    assert printed_by(script) or is_program


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom_and_prints_what_it_shows(page, capsys):
    namespace = {"__name__": f"__{page.stem}__"}
    for block in blocks_of(page):
        exec(compile(block, page.name, "exec"), namespace)
    quoted = [EXAMPLES / "own_model.py"] if page == README else [DOCS / script for script in scripts_of(page)]
    printed = capsys.readouterr().out + "".join(printed_by(script.resolve()) for script in quoted)
    for shown in blocks_of(page, "text"):
        assert " ".join(shown.split()) in " ".join(printed.split())


def test_the_example_of_an_experiment_writes_a_report(tmp_path):
    example = importlib.import_module("experiments.examples.own_experiment")
    tiny = {"epochs": 1, "seeds": 1, "images": 128, "test_images": 64, "ranks": (2,), "out": tmp_path}
    config = dataclasses.replace(example.EXPERIMENT.preset("cpu"), **tiny)
    assert "LDFA" in sweep.run(example.EXPERIMENT, config).read_text()


def test_the_readme_is_a_door():
    text = README.read_text()
    assert len(text.split()) <= 900
    block = blocks_of(README)[0]
    assert block in (EXAMPLES / "own_model.py").read_text()
    assert f"## In {len(list(filter(str.strip, block.splitlines())))} lines\n" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text()
    for name in re.findall(r"`((?:jaxfa|experiments|tests|docs)/[a-z0-9_/.]+)`", text):
        assert (ROOT / name).exists(), name
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text) + scripts_of(page)
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_citation_is_of_this_version():
    assert f"version: {jaxfa.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_page_is_in_the_index():
    listed = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= set(listed)


def test_every_room_and_file_of_the_library_is_in_the_designs_tree():
    tree = (DOCS / "design.md").read_text().partition("```\njaxfa/\n")[2].partition("experiments/")[0]
    there = [path for path in (ROOT / "jaxfa").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    listed = re.findall(r"^  (\S+)", tree, re.MULTILINE)
    assert sorted(listed) == sorted(path.name + "/" * path.is_dir() for path in there if path.stem != "__init__")


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference.md").read_text()
    modules = [importlib.import_module(name) for name in re.findall(r"automodule:: ([\w.]+)$", text, re.MULTILINE)]
    listed = set(re.findall(r"auto(?:function|class):: (\w+)$", text, re.MULTILINE))
    listed |= {name for module in modules for name in getattr(module, "__all__", ())}
    assert set(jaxfa.__all__) - {name for name in jaxfa.__all__ if inspect.ismodule(getattr(jaxfa, name))} <= listed
    assert {jaxfa.nn, jaxfa.stacks, jaxfa.factored, jaxfa.diagnostics, jaxfa.conservation} == set(modules)


def strings_of(path):
    """Every string of a file: its docstrings, its messages; of what is no program, all of it."""
    text = path.read_text()
    nodes = ast.walk(ast.parse(text)) if path.suffix == ".py" else [ast.Constant(text)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("folder", ["jaxfa", "experiments", "."])
def test_whatever_a_text_names_is_there_as_spelled(folder):
    files = PAGES if folder == "." else sorted((ROOT / folder).rglob("*.py"))
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


RULES = [name for name in jaxfa.__all__ if getattr(getattr(jaxfa, name), "__module__", "").startswith("jaxfa.rules.")]
RULES = [name for name in RULES if inspect.isfunction(getattr(jaxfa, name))]


@pytest.mark.parametrize("file", sorted((ROOT / "jaxfa" / "rules").glob("[a-z]*.py")), ids=lambda file: file.stem)
def test_a_file_of_a_method_gives_a_public_rule(file):
    assert f"jaxfa.rules.{file.stem}" in {getattr(jaxfa, name).__module__ for name in RULES}, "jaxfa/__init__.py"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_in_every_table(name):
    """What CONTRIBUTING asks of a new rule."""
    assert any(method.name == name or method.name.startswith(f"{name}_") for method in METHODS), "tests/methods.py"
    assert f"| `{name}(" in README.read_text(), "README.md"
    assert {"backprop": "bp"}.get(name, name) in compare.METHODS, "experiments/common/methods.py"


def test_every_experiment_is_on_the_page_of_experiments():
    text = (DOCS / "reproduction.md").read_text()
    assert [name for name in EXPERIMENTS if f"`{name}`" not in text.partition("## Experiments")[2]] == []


def test_a_result_fills_the_rows_of_its_rules():
    rows = [
        "| rule | error | feedback | paper | old |",
        "|-|-|-|-|-|",
        "| `fa()` | | | | 1 |",
        "| `mine(2)` | | | | 2 |",
        "| `other()` | | | | 3 |",
    ]
    text = "\n".join(["<!-- rules -->", *rows, "<!-- /rules -->"])
    arms = {"fa": {"last": {"mean": 97.26, "std": None}, "angle": {"mean": 61.7, "std": None}}}
    columns = {"digits": {"arms": arms, "diverged": {"mine": "diverged in epoch 2"}}}
    _, head, _, *filled, _ = readme.fill(text, columns).split("\n")
    assert head == "| rule | error | feedback | paper | digits |"
    assert filled == [
        "| `fa()` | | | | 97.3,\N{NO-BREAK SPACE}62° |",
        "| `mine(2)` | | | | diverged |",
        "| `other()` | | | | |",
    ]
