"""YAML with bounds: aliases counted, fields named once, numbers left as written where that is asked."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from errata.files import DEEPEST, MOST_DIGITS, MOST_NODES, Fail

SCALARS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
BOOL, TRUTH = "tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$")


class Loader(yaml.SafeLoader):
    """The safe loader, with fields named once and numbers of a bounded length."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node; a document may nest no deeper than its reader will."""
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct a value, and say where one is that cannot be, as a date that does not exist."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as problem:
            raise yaml.constructor.ConstructorError(None, None, str(problem), node.start_mark) from problem

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, and refuse a field that it names twice."""
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field {key.value!r:.60} stands twice; leave one out", key.start_mark
                )
            keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """Construct a scalar, and refuse numbers that take long to read."""
        if node.tag in SCALARS and len(node.value) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value):,} characters", node.start_mark
            )
        return super().construct_scalar(node)


class WrittenLoader(Loader):
    """Only true, false and null are values; all else is the text it is written as."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        letter: [
            *((tag, pattern) for tag, pattern in resolvers if tag in KEPT),
            *([(BOOL, TRUTH)] if letter in "tTfF" else []),
        ]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load(text: str, fail: Fail, *, written: bool) -> tuple[Any, list[int]]:
    """Parse one document; return it with the lines on which its items begin.

    Raises what ``fail`` makes of the reason; RecursionError for a document nested too deeply.
    """
    loader: Loader | None = None
    try:
        loader = (WrittenLoader if written else Loader)(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        if size(node, {}, 0) > MOST_NODES:
            raise fail(f"its aliases come to more than {MOST_NODES:,} values; write out what is meant")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return loader.construct_document(node), [item.start_mark.line + 1 for item in items]
    except yaml.YAMLError as problem:
        raise fail(f"not YAML: {_reason(problem)}") from problem
    finally:
        if loader is not None:
            loader.dispose()


def size(node: Any, known: dict[int, int], depth: int) -> int:
    """Count the values of a node with its aliases written out. Raises RecursionError for one within itself."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        parts = (
            node.value if isinstance(node, yaml.SequenceNode) else [x for pair in node.value for x in pair]
        )
        known[id(node)] = 1 + sum(size(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _reason(problem: yaml.YAMLError) -> str:
    mark = getattr(problem, "problem_mark", None)
    what = getattr(problem, "problem", None) or str(problem).splitlines()[0]
    return what + (f" at line {mark.line + 1}" if mark else "")
