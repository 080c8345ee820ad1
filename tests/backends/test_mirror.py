"""The two backends are one design twice: same files, classes, order, methods and parameter names.

The trees are parsed, not imported, so this runs without either framework. torch has a `device` parameter where MLX has
a default device; a name that only one backend has, or has
with other parameters, is allowed by standing in the docstring of `g3n_mlx/backends/__init__.py` as `file.py:Name` or
`file.py:Class.method`.
"""

import ast
import re
from pathlib import Path

import pytest

from g3n_mlx import backends

BACKENDS = Path(__file__).resolve().parents[2] / "g3n_mlx" / "backends"
ALLOWED = set(re.findall(r"`(\w+\.py):([\w.]+)`", backends.__doc__ or ""))
SAME_NAME = {"forward": "__call__"}  # a torch module's forward is an MLX module's __call__


def files(backend: str) -> dict[str, ast.Module]:
    return {path.name: ast.parse(path.read_text("utf-8")) for path in sorted((BACKENDS / backend).glob("*.py"))}


def signature(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    names = [name for name in names if name != "device"]
    return names + [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument]


def outline(tree: ast.Module, allowed: set[str]) -> list[tuple[str, list[str]]]:
    """(qualified name, parameter names) of every class, method and function, in order."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in allowed:
            found.append((node.name, signature(node)))
        elif isinstance(node, ast.ClassDef) and node.name not in allowed:
            found.append((node.name, []))
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    name = f"{node.name}.{SAME_NAME.get(member.name, member.name)}"
                    if name not in allowed:
                        found.append((name, signature(member)))
    return found


def test_both_have_the_same_files():
    assert list(files("mlx")) == list(files("torch"))


@pytest.mark.parametrize("name", sorted(files("mlx").keys() & files("torch").keys()))
def test_same_classes_methods_and_parameters(name):
    allowed = {allowed for file, allowed in ALLOWED if file == name}
    mlx, torch = (outline(files(backend)[name], allowed) for backend in ("mlx", "torch"))
    assert [one for one in mlx if one not in torch] == [one for one in torch if one not in mlx] == []
    assert mlx == torch, "same names in another order"


def test_no_allowance_is_out_of_date():
    """Every allowed name still exists in one of the backends."""
    trees = {backend: files(backend) for backend in ("mlx", "torch")}
    for file, name in ALLOWED:
        found = [outline(tree[file], set()) for tree in trees.values() if file in tree]
        assert any(name in dict(one) for one in found), f"{file}:{name}"
        assert len(found) < 2 or found[0] != found[1], f"{file} differs no more"
