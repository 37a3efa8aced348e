"""The structure of the package: which folder may import from which, and how large code may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxmorph"
COMMANDS = ("__main__", "train", "evaluate", "plot")
# What a folder may import from, itself and what is outside the package apart. One line is one rule.
RULES = {
    "cli": "",
    "system": "cli",
    "data": "cli config",
    "config": "cli",
    "model": "cli config",
    "storage": "cli system",
    "step": "cli config data model",
    "growth": "cli config model step",
    "morphs": "cli model",
    "morphs/gpt": "cli config model step morphs",
    "report": "cli system step",
    "training": "cli system data config model storage step growth morphs morphs/gpt report",
}
LONGEST = 400  # lines of a module
LONGEST_FUNCTION = 40  # lines, its docstring not counted
# Functions that may be longer, each with the reason why it is not cut.
LONGER_FUNCTIONS: dict[str, str] = {}
WITHOUT_JAX = ("config", "growth", *COMMANDS)


def _folder(module: str) -> str:
    """The folder a module of the package lies in; a command is one by itself."""
    parts = module.split(".")[1:]
    return "morphs/gpt" if parts[:2] == ["morphs", "gpt"] else parts[0]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: import by full name"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if _exists(name))


def _exists(name: str) -> bool:
    if not name.startswith("jaxmorph."):
        return False
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


MODULES = {_module(path): path for path in ROOT.rglob("*.py")}


def wrong_imports(rules: dict[str, str]) -> set[tuple[str, str]]:
    """Return (module, imported module) wherever an import breaks the rules of folders."""
    return {
        (module, imported)
        for module, path in MODULES.items()
        if module != "jaxmorph" and _folder(module) not in COMMANDS
        for imported in _imports(path)
        if _folder(imported) not in {_folder(module), *rules[_folder(module)].split()}
    }


def test_every_folder_has_a_rule_and_a_line_that_says_what_it_is():
    folders = {_folder(module) for module in MODULES if module != "jaxmorph"}
    assert folders == {*RULES, *COMMANDS}
    for folder in RULES:
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    names = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(names) <= 14, sorted(names)


def test_imports_keep_to_the_rules_of_folders():
    assert wrong_imports(RULES) == set()


def test_an_import_that_a_rule_does_not_allow_is_found():
    found = wrong_imports(RULES | {"growth": "cli config model"})
    assert ("jaxmorph.growth.fitting", "jaxmorph.step.memory") in found


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {name: set(_imports(path)) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert graph == {}


def test_no_module_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def function_lengths(module: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the functions of a module, those in others too, and their lines without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            said = 0 if docstring is None else _lines(docstring)
            yield f"{module}.{node.name}", _lines(node) - said


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_no_function_is_long_but_those_with_a_reason():
    long = {
        name
        for module, path in MODULES.items()
        for name, length in function_lengths(module, ast.parse(path.read_text()))
        if length > LONGEST_FUNCTION
    }
    assert long == LONGER_FUNCTIONS.keys()


def test_the_length_of_a_function_is_that_of_its_code():
    code = (
        'def f():\n    """One.\n\n    Two.\n    """\n    def g():\n        pass\n\n    return g\n'
    )
    assert dict(function_lengths("m", ast.parse(code))) == {"m.f": 5, "m.g": 2}


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_what_is_known_without_arrays_loads_no_jax(name):
    modules = [module for module in MODULES if module.split(".")[1:2] == [name]]
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
