"""Public functions that take or return a tensor say in which shape."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.test_layers import SOURCE

SHAPE = re.compile(r"``\[[^`]*\]")
"""A shape in a docstring: ``[n, d]``, ``[rows]``, ``[...]`` for any."""
LEAST_SHARE = 0.9


def names_tensor(annotation: ast.expr | None) -> bool:
    """Whether an annotation holds Tensor, also inside of another type or of a quoted annotation."""
    if annotation is None:
        return False
    return any(
        (isinstance(node, ast.Name) and node.id == "Tensor")
        or (isinstance(node, ast.Attribute) and node.attr == "Tensor")
        or (isinstance(node, ast.Constant) and re.search(r"\bTensor\b", str(node.value)) is not None)
        for node in ast.walk(annotation)
    )


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Yield public functions and the public methods of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def takes_tensor(function: ast.FunctionDef) -> bool:
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    annotations = [one.annotation for one in parameters if one is not None]
    return any(map(names_tensor, [*annotations, function.returns]))


def tensor_functions(source: str) -> dict[str, bool]:
    """Return the public tensor functions of a source text, and whether each names a shape."""
    return {
        f"{function.lineno} {function.name}": bool(SHAPE.search(ast.get_docstring(function) or ""))
        for function in public(ast.parse(source).body)
        if takes_tensor(function)
    }


def test_public_tensor_functions_name_their_shapes():
    found = {
        f"{path.relative_to(SOURCE)}:{name}": shaped
        for path in sorted(SOURCE.rglob("*.py"))
        for name, shaped in tensor_functions(path.read_text()).items()
    }
    missing = [name for name, shaped in found.items() if not shaped]
    share = 1 - len(missing) / len(found)
    assert len(found) > 100, "the functions were not found"
    assert share >= LEAST_SHARE, f"{share:.0%} of {len(found)} name shapes; these do not: {missing}"


def test_rooms_of_mathematics_and_edits_are_complete():
    for room in ("linalg", "edits", "locate", "methods", "stats"):
        for path in sorted((SOURCE / room).rglob("*.py")):
            missing = [name for name, shaped in tensor_functions(path.read_text()).items() if not shaped]
            assert not missing, f"{path.relative_to(SOURCE)} names no shape in {missing}"


def test_the_search_sees_a_function_without_shapes():
    source = '''
class Site:
    def keys(self, rows: "list[Tensor]") -> None:
        """Add keys."""

def norm(matrix: torch.Tensor) -> float:
    """Return the norm of ``[n, d]``."""

def _private(matrix: Tensor) -> None: ...

def size(path: str) -> int: ...
'''
    assert tensor_functions(source) == {"3 keys": False, "6 norm": True}
