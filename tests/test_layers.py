"""The structure of the package: who may import whom, and how large a module may be."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jaxmorph"
LAYERS = {
    "words": "errors yaml_file json_file command_line config run_shape starting resolve signatures "
    "architecture schedules operations scaling_schedule plan",
    "parts": "precision attention blocks lora model optimizer tokenization corpora data sharding",
    "state": "faults run_folder array_files manifest checkpoint state resume",
    "changes": "morphs transitions",
    "loop": "host_memory stopping progress run_record figures timeline report metrics dry_run "
    "summary programs sampling stages orchestrator preparation loop",
    "doors": "train evaluate plot",
}
ORDER = [module for modules in LAYERS.values() for module in modules.split()]
LONGEST = 400


def _imports(name: str) -> set[str]:
    """Return the modules of the package that a module, or a package in it, imports."""
    module = PACKAGE / f"{name}.py"
    files = [module] if module.exists() else sorted((PACKAGE / name).glob("*.py"))
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "jaxmorph":
                found |= {module.split(".")[0]} if module else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] for name in names if name[0] == "jaxmorph" and len(name) > 1}
    return found - {"__version__", name}


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules == set(ORDER)


def test_modules_import_only_from_those_before_them():
    wrong = {
        name: later
        for place, name in enumerate(ORDER)
        if (later := _imports(name) - set(ORDER[:place]))
    }
    assert wrong == {}


def test_no_module_is_long():
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_importing_the_package_imports_no_jax():
    text = (PACKAGE / "__init__.py").read_text()
    assert "jax" not in {name.split(".")[0] for name in _top_level(text)}


def _top_level(text: str) -> set[str]:
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names
