"""Who may import whom: scripts import support, support imports rlhf, and rlhf imports neither."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RLHF, SUPPORT = sorted((ROOT / "rlhf").glob("*.py")), sorted((ROOT / "support").glob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
MATHEMATICS = {"torch", "numpy", "einops", "jaxtyping"}  # and triton, inside a function that needs it


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in [*RLHF, *SUPPORT, *SCRIPTS]}


def imports(source: str, known: set[str] = frozenset(MODULES)) -> dict[str, bool]:
    """Imported module -> whether every import of it is inside a function. `lazy_import("x")` counts as an import."""
    tree, modules = ast.parse(source), {}
    inside = {id(x) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for x in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("lazy_import", "__import__"):
            names = [node.args[0].value]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [x.value for x in node.args[:1] if isinstance(x, ast.Constant)]
        for name in names:
            modules[name] = modules.get(name, True) and id(node) in inside
    return modules


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in turn, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return None
        found = next(filter(None, (visit(other, [*path, name]) for other in sorted(graph.get(name, ())))), None)
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


def test_imports_are_found_wherever_they_are():
    source = (
        "import os.path\nfrom rlhf import losses, require\nfrom support.rows import read_rows\n"
        "peft = lazy_import('peft')\ndef f():\n    from torch.nn.attention import varlen\n    import triton\n"
        "    return importlib.import_module('support.models')\n"
    )
    assert imports(source) == {
        "os.path": False,
        "rlhf.losses": False,
        "rlhf": False,
        "support.rows": False,
        "peft": False,
        "torch.nn.attention": True,
        "triton": True,
        "support.models": True,
    }


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}) is None
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("path", RLHF, ids=lambda path: path.name)
def test_rlhf_is_mathematics(path):
    """Only torch, numpy, einops, jaxtyping and the standard library; no file, flag, process or print."""
    source = path.read_text()
    for name, lazy in imports(source).items():
        top = name.split(".")[0]
        triton = top == "triton" and (lazy or path.name == "kernels.py")
        allowed = top in MATHEMATICS | {"rlhf"} or top in sys.stdlib_module_names or triton
        assert allowed, f"{path.name} imports {name}"
        assert name.split(".")[0] not in {"os", "sys", "pathlib", "subprocess", "multiprocessing", "argparse", "io"}
        assert not name.startswith("torch.distributed")
    calls = {getattr(x.func, "id", "") for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Call)}
    assert not calls & {"print", "open", "input"}


def test_rlhf_is_small():
    names = {"__init__", "advantages", "kernels", "logprobs", "losses", "optim", "tree"}
    lines = {path.stem: len(path.read_text().splitlines()) for path in RLHF}
    assert lines.keys() == names and sum(lines.values()) <= 1690
    assert sum(lines.values()) - lines["optim"] - lines["kernels"] <= 1420


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.name)
def test_support_imports_no_script(path):
    names = {name.split(".")[0] for name in imports(path.read_text())}
    others = {"ablations", "benchmarks", "evidence", "recipes", "tests"}
    assert not names & ({script.stem for script in SCRIPTS} | others)


def test_no_circles():
    graph = {name: {x for x in imports(path.read_text()) if x in MODULES} for name, path in MODULES.items()}
    for package in ("rlhf", "support"):
        graph[package] = {name for name in graph[package] if name != package}
    assert circle(graph) is None


@pytest.mark.parametrize("script", ["train_dpo", "train_ppo"])
def test_a_script_loads_only_what_every_run_needs(script):
    """Each of these takes a while to load."""
    code = f"import sys, {script}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"torch._dynamo", "torch.nn.attention.varlen", "datasets", "matplotlib.pyplot", "peft", "wandb", "sympy"}
    assert "transformers" in loaded.split() and not heavy & {*loaded.split()}
