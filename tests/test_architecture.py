"""The house rules, checked on the source: who may import whom, how long things may get, and what is never written."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("rlhf", "actors", "cluster")  # each may import itself and those before it
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Third-party packages that a core file may import while it is being imported.
LIGHT = {"torch", "numpy", "pydantic", "yaml"}
# The parts of the core that prepare models and data or write records: they may name these too.
HEAVY_CORE = ("rlhf/models/", "rlhf/data/", "rlhf/runs/")
# Packages that live in one place.
HOMES = {
    "vllm": ("actors/vllm/",),
    "deepspeed": ("actors/deepspeed/",),
    "ray": ("actors/", "cluster/"),
}
NEVER_AT_START = {
    "ray",
    "vllm",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "plotly",
    "openai",
    "trl",
}


@dataclass(frozen=True)
class Import:
    """One import statement: top-level package, line, and whether it runs when the file is imported."""

    package: str
    line: int
    at_module_level: bool


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(tree: ast.AST, module_level: bool = True) -> Iterator[Import]:
    """Yields imports; those under ``if TYPE_CHECKING`` or in a function do not run at import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name.split(".")[0], node.lineno, module_level)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield Import(node.module.split(".")[0], node.lineno, module_level)
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(node)
        yield from imports_of(node, module_level and not deferred)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


ALL = source_files(*LAYERS)


def offences(paths: list[Path], rule: Callable[[Path, ast.Module], Iterable[object]]) -> list[str]:
    """Every breach of a rule as ``file: breach``."""
    return [f"{name_of(path)}: {breach}" for path in paths for breach in rule(path, parse(path))]


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_there_is_something_to_check() -> None:
    assert {name_of(path).split("/")[0] for path in ALL} == set(LAYERS)


def test_imports_go_one_way() -> None:
    """cluster -> actors -> rlhf, and nobody imports the tests."""

    def rule(path: Path, tree: ast.Module) -> Iterator[Import]:
        layer = LAYERS.index(name_of(path).split("/")[0])
        forbidden = {*LAYERS[layer + 1 :], "tests", "benchmarks"}
        return (found for found in imports_of(tree) if found.package in forbidden)

    assert offences(ALL, rule) == []


def test_each_engine_lives_in_one_place() -> None:
    def rule(path: Path, tree: ast.Module) -> Iterator[Import]:
        return (found for found in imports_of(tree) if not name_of(path).startswith(HOMES.get(found.package, ("",))))

    assert offences(ALL, rule) == []


def test_core_files_import_light_packages_only() -> None:
    allowed = LIGHT | {"rlhf", "__future__"} | set(sys.stdlib_module_names)

    def rule(_: Path, tree: ast.Module) -> Iterator[Import]:
        return (found for found in imports_of(tree) if found.at_module_level and found.package not in allowed)

    assert offences(core_files(), rule) == []


def core_files() -> list[Path]:
    return [path for path in source_files("rlhf") if not name_of(path).startswith(HEAVY_CORE)]


def test_importing_the_core_loads_nothing_heavy() -> None:
    names = [name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in core_files()]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"print(sorted(set(sys.modules) & {NEVER_AT_START!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_files_stay_short() -> None:
    lengths = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in ALL}
    assert {name: lines for name, lines in lengths.items() if lines >= MAX_FILE_LINES} == {}


def test_functions_stay_short() -> None:
    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        for function in functions_of(tree):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines >= MAX_FUNCTION_LINES:
                yield f"{function.name} has {lines} lines"

    assert offences(ALL, rule) == []


def test_at_most_five_positional_parameters() -> None:
    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        for function in functions_of(tree):
            names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            if names[:1] == ["ctx"]:  # torch.autograd.Function calls these by position
                continue
            if len([name for name in names if name not in ("self", "cls")]) > 5:
                yield f"{function.name} (line {function.lineno}): pass the rest by keyword"

    assert offences(ALL, rule) == []


def dangerous_calls(tree: ast.AST) -> Iterator[str]:
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "cloudpickle.load", "os.system", "yaml.load_all"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in forbidden or (called == "yaml.load" and "_UniqueKeyLoader" not in ast.unparse(node)):
            yield f"{called} (line {node.lineno})"
        for keyword in node.keywords:
            constant_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("trust_remote_code", "shell") and not constant_false:
                yield f"{keyword.arg} (line {node.lineno})"


def test_nothing_dangerous_is_called() -> None:
    assert offences(ALL, lambda _, tree: dangerous_calls(tree)) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "pickle.load(file)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_danger_rule_notices(line: str) -> None:
    assert list(dangerous_calls(ast.parse(line)))


def test_no_error_is_swallowed() -> None:
    """A broad ``except`` may add to an error on its way, but not end it."""

    def rule(_: Path, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = "" if node.type is None else ast.unparse(node.type)
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if caught in {"", "Exception", "BaseException"} and not raises:
                yield f"except {caught} (line {node.lineno})"

    assert offences(ALL, rule) == []


def test_no_loose_ends() -> None:
    words = ("TODO", "FIXME", "XXX", "placeholder", "NotImplementedError")
    paths = [path for path in (*ALL, *source_files("tests", "benchmarks")) if path != Path(__file__).resolve()]
    found = {name_of(path): [w for w in words if w in path.read_text(encoding="utf-8")] for path in paths}
    assert {name: left for name, left in found.items() if left} == {}
    assert [name for name in found if name.endswith("utils.py")] == []
