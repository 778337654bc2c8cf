"""A YAML loader with limits: bounded aliases, no duplicate fields, optionally without converting numbers."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from errata.limits import DEEPEST, MOST_DIGITS, MOST_NODES, Fail

SCALARS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
TAGS_TO_CONVERT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
BOOL, TRUTH = "tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$")


class Loader(yaml.SafeLoader):
    """The safe loader, which also refuses duplicate fields and very long numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node. Raises RecursionError beyond the maximum depth."""
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct a value; an impossible one, such as a date that does not exist, is an error with its position."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as problem:
            raise yaml.constructor.ConstructorError(None, None, str(problem), node.start_mark) from problem

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; refuse duplicate fields."""
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field {key.value!r:.60} is there twice; remove one", key.start_mark
                )
            keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """Construct a scalar; refuse very long numbers, which are slow to parse."""
        if node.tag in SCALARS and len(node.value) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value):,} characters", node.start_mark
            )
        return super().construct_scalar(node)


class TextLoader(Loader):
    """A loader that converts only true, false and null; everything else stays text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        letter: [
            *((tag, pattern) for tag, pattern in resolvers if tag in TAGS_TO_CONVERT),
            *([(BOOL, TRUTH)] if letter in "tTfF" else []),
        ]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load(text: str, fail: Fail, *, as_text: bool) -> tuple[Any, list[int]]:
    """Parse one document; return it with the lines on which its items begin.

    Raises ``fail(reason)``; RecursionError for a document nested too deeply.
    """
    loader: Loader | None = None
    try:
        loader = (TextLoader if as_text else Loader)(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        if size(node, {}, 0) > MOST_NODES:
            raise fail(f"its aliases expand to more than {MOST_NODES:,} values; write the values out")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return loader.construct_document(node), [item.start_mark.line + 1 for item in items]
    except yaml.YAMLError as problem:
        raise fail(f"not YAML: {_reason(problem)}") from problem
    finally:
        if loader is not None:
            loader.dispose()


def size(node: Any, counts: dict[int, int], depth: int) -> int:
    """Count the values of a node with its aliases expanded. Raises RecursionError for a cyclic alias."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        parts = (
            node.value if isinstance(node, yaml.SequenceNode) else [x for pair in node.value for x in pair]
        )
        counts[id(node)] = 1 + sum(size(part, counts, depth + 1) for part in parts)
    return counts[id(node)]


def _reason(problem: yaml.YAMLError) -> str:
    mark = getattr(problem, "problem_mark", None)
    what = getattr(problem, "problem", None) or str(problem).splitlines()[0]
    return what + (f" at line {mark.line + 1}" if mark else "")
