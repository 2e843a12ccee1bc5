"""The tree is the architecture: imports flow one way, files and functions stay short, only the CLI prints.

Everything is read from the syntax trees, so imports inside functions count too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "routing_experts"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
# Low to high; a module imports from its own layer and from lower ones.
LAYERS = (
    *("errors", "config", "records", "optional", "nn", "models", "data", "training"),
    *("inference", "evaluation", "reports", "pocket", "api", "studies", "cli", "__main__", "autoload", "__init__"),
)
STRANGERS = {("evaluation", "training"), ("training", "evaluation")}
TORCH_FREE = ("errors", "config", "records", "optional", "reports")
HEAVY = {"torch", "torchvision", "transformers", "accelerate", "peft", "deepspeed", "tokenizers"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]
every_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def layer_of(parts: tuple[str, ...]) -> str:
    """The layer of a module by its dotted name's parts below the package; the package's own __init__ is the top."""
    return parts[0] if parts else "__init__"


def own_parts(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports, at whatever depth."""
    found = []
    package = (PACKAGE, *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*above, node.module) if node.module else above)
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            named = node.args[0] if node.args else None
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                found.append((node.lineno, named.value))
    return found


def imported_layers(path: Path) -> list[tuple[int, str, str]]:
    """Line, dotted name and layer of what a file imports from this package."""
    found = []
    for line, name in imports_of(path):
        root, *parts = name.split(".")
        if root == PACKAGE and parts != ["__version__"]:
            found.append((line, name, layer_of(tuple(parts[:1])) if parts and parts[0] in LAYERS else "__init__"))
    return found


def test_the_tree_is_found() -> None:
    assert FILES, f"no Python files in {SOURCE}"


@every_file
def test_every_file_belongs_to_a_layer(path: Path) -> None:
    layer = layer_of(own_parts(path))
    assert layer in LAYERS, f"{layer} is no layer: give it a place in LAYERS, and CONTRIBUTING.md a line"


@every_file
def test_imports_flow_one_way(path: Path) -> None:
    own = layer_of(own_parts(path))
    for line, name, layer in imported_layers(path):
        where = f"{path.name}:{line} imports {name}"
        assert LAYERS.index(layer) <= LAYERS.index(own), f"{where}: {own} is below {layer}"
        assert (own, layer) not in STRANGERS, f"{where}: {own} and {layer} never import each other"


@every_file
def test_the_method_needs_torch_alone(path: Path) -> None:
    if layer_of(own_parts(path)) == "nn":
        heavy = {name.split(".")[0] for _, name in imports_of(path)} & (HEAVY - {"torch"})
        assert not heavy, f"nn/{path.name} imports {sorted(heavy)}; what touches transformers belongs in models/"


@every_file
def test_plain_modules_stay_free_of_torch(path: Path) -> None:
    if layer_of(own_parts(path)) not in TORCH_FREE:
        return
    for line, name in imports_of(path):
        root = "torch" if name.startswith("safetensors.torch") else name.split(".")[0]
        assert root not in HEAVY, f"{path.name}:{line} imports {name}"
    for line, name, layer in imported_layers(path):
        assert layer in TORCH_FREE, f"{path.name}:{line} imports {name}, which may bring torch along"


def test_importing_the_package_is_light() -> None:
    code = f"import sys, {PACKAGE}; print(*sorted(set({sorted(HEAVY)}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"import {PACKAGE} loads {done.stdout}; make its public names lazy"


@every_file
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{path.name}: split it by concept"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {length} lines"


@every_file
def test_only_the_cli_prints(path: Path) -> None:
    if layer_of(own_parts(path)) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"{path.name}:{node.lineno} prints; return the value, or log it"
