"""Configs in YAML with those that they are based on, read without running anything of them."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from retina_focal.errors import UserError
from retina_focal.files import check_regular, decoded, read_bounded

BASE_KEY = "_BASE_"
# What no config comes near; more is an attack on memory or time. Aliases count as what they repeat.
MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
MAX_DEPTH = 32
MAX_LETTERS = 10_000  # of one value
MAX_DIGITS = 100  # of a number
MAX_FILES = 100

TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {
    TAG + name
    for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")
}
EVAL_TAG = TAG + "python/object/apply:eval"
# The anchor sizes in detectron2's Base-RetinaNet.yaml: the one expression that a config of its zoo
# computes. It is known by its text, without its spaces.
EXPRESSION = "[[x,x*2**(1.0/3),x*2**(2.0/3)]forxin[32,64,128,256,512]]"


def expression_value() -> list[list[float]]:
    """What `EXPRESSION` computes."""
    return [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]


def read_text(path: str | Path) -> str:
    """A config's text.

    Raises:
        UserError: it is no regular file, no UTF-8, or larger than any config.
    """
    return decoded(read_bounded(path, MAX_BYTES, "config"), path)


def read_yaml(path: str | Path, numbered: bool = False) -> dict:
    """The keys of one YAML file, ``_BASE_`` included.

    Args:
        numbered: whether keys may be whole numbers, as in lists of classes.
    Raises:
        UserError: see `read_text`; it is no YAML of KEY: VALUE, has a tag other than YAML's own, a
            key twice, or is larger or deeper than any config.
    """
    text = read_text(path)
    try:
        loaded = _Loader(text, numbered).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML has none of
        raise UserError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is no YAML file of KEY: VALUE")
    return loaded


def read_yaml_with_bases(path: str | Path, find: Callable[[str], str | None]) -> dict:
    """The keys of a YAML file, merged over those of the files that its ``_BASE_`` names.

    Args:
        find: the path of a config that the package has under a name, or None.
    Raises:
        UserError: see `read_yaml` and `bases`; or the files name each other in a circle.
    """
    return _read_with_bases(str(path), find, [], [0])


def bases(path: str | Path, keys: dict, find: Callable[[str], str | None]) -> list[str]:
    """The paths of the files that ``_BASE_`` names: one or a list.

    They are relative to the config's folder, absolute, or names of the package's configs.

    Raises:
        UserError: one is a URL, a LazyConfig (which is code), not there or no regular file.
    """
    names = keys.get(BASE_KEY, [])
    names = names if isinstance(names, list) else [names]
    found = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: {BASE_KEY} is {name!r}; expected the path of a YAML file")
        if "://" in name:
            raise UserError(
                f"{path}: {BASE_KEY} is the URL '{name}'; expected a file: fetch it, look through "
                "it, and name your copy"
            )
        if name.endswith(".py"):
            raise UserError(
                f"{path}: {BASE_KEY} is '{name}', which is code; expected a YAML file: a "
                "LazyConfig is run only where --config-file names it"
            )
        file = os.path.join(os.path.dirname(path), os.path.expanduser(name))
        if not os.path.lexists(file):
            file = find(name) or file
        try:
            check_regular(file)
        except UserError as error:
            raise UserError(f"{path}: {BASE_KEY}: {error}") from error
        found.append(file)
    return found


def _read_with_bases(
    path: str, find: Callable[[str], str | None], above: list[str], count: list[int]
) -> dict:
    """`above`: the files that led here; `count`: of files read so far."""
    real = os.path.realpath(path)
    if real in above:
        circle = " -> ".join([*above[above.index(real) :], real])
        raise UserError(f"{path} is based on itself: {circle}; take one {BASE_KEY} out")
    count[0] += 1
    if count[0] > MAX_FILES:
        raise UserError(f"{above[0]} is based on more than {MAX_FILES} files")
    keys = read_yaml(path)
    merged: dict = {}
    for base in bases(path, keys, find):
        _merge(_read_with_bases(base, find, [*above, real], count), merged, path)
    keys.pop(BASE_KEY, None)
    _merge(keys, merged, path)
    return merged


def _merge(new: dict, into: dict, path: str) -> None:
    """As detectron2 does: a node into the node of its name, any other value in place of the old."""
    for key, value in new.items():
        if isinstance(value, dict):
            # A node of its own, also where an alias repeats one.
            node = into.setdefault(key, {})
            if not isinstance(node, dict):
                raise UserError(f"{path}: {key} is a node, but a value in a file of {BASE_KEY}")
            _merge(value, node, path)
        else:
            into[key] = value


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what no config needs, and names the line."""

    def __init__(self, text: str, numbered: bool = False):
        super().__init__(text)
        self.key_tags = {TAG + "str", *([TAG + "int"] if numbered else [])}
        self.depth = 0
        self.num_nodes = 0
        self.sizes: dict[int, int] = {}  # values of a node, those of its aliases included

    def compose_node(self, parent: Node | None, index: object) -> Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _error("an alias stands inside of what it repeats", event)
            return node
        self.depth += 1
        self.num_nodes += 1
        if self.depth > MAX_DEPTH:
            raise _error(f"nodes and lists are nested deeper than {MAX_DEPTH}", event)
        if self.num_nodes > MAX_VALUES:
            raise _error(f"there are more than {MAX_VALUES:,} values", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        self._check(node)
        return node

    def _check(self, node: Node) -> None:
        if node.tag not in PLAIN_TAGS and not _is_known_expression(node):
            tag = node.tag.replace(TAG, "!!")[:200]
            raise _error(f"the tag {tag} is refused: tags can run code; write the value", node)
        if isinstance(node, ScalarNode) and len(node.value) > MAX_LETTERS:
            raise _error(f"a value has more than {MAX_LETTERS:,} letters", node)
        size = 1 + sum(self.sizes[id(child)] for child in _children(node))
        if size > MAX_VALUES:
            raise _error(f"there are more than {MAX_VALUES:,} values, those of aliases too", node)
        self.sizes[id(node)] = size
        if isinstance(node, MappingNode):
            _check_keys(node, self.key_tags)

    def construct_scalar_of(self, node: ScalarNode) -> int | float | bool:
        """A number or a truth value."""
        try:
            if len(node.value) <= MAX_DIGITS:
                return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
            problem = f"a number has more than {MAX_DIGITS} digits"
        except (ValueError, LookupError):
            problem = f"{_shown(node)} is no {node.tag.removeprefix(TAG)}"
        raise _error(problem, node)

    def construct_expression(self, node: SequenceNode) -> list[list[float]]:
        return expression_value()


for _name in ("int", "float", "bool"):
    _Loader.add_constructor(TAG + _name, _Loader.construct_scalar_of)
_Loader.add_constructor(TAG + "timestamp", yaml.SafeLoader.construct_yaml_str)
_Loader.add_constructor(EVAL_TAG, _Loader.construct_expression)


def _error(problem: str, node: Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [x for pair in node.value for x in pair]
    return node.value if isinstance(node, SequenceNode) else []


def _check_keys(node: MappingNode, tags: set[str]) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == TAG + "merge":
            continue
        if key.tag not in tags or not isinstance(key, ScalarNode):
            raise _error(f"the key {_shown(key)} is no text", key)
        if key.value in lines:
            raise _error(f"the key {key.value[:100]} stands in line {lines[key.value]} too", key)
        lines[key.value] = key.start_mark.line + 1


def _is_known_expression(node: Node) -> bool:
    """Whether it is the expression of detectron2's Base-RetinaNet.yaml."""
    if node.tag != EVAL_TAG or not isinstance(node, SequenceNode) or len(node.value) != 1:
        return False
    (text,) = node.value
    return isinstance(text, ScalarNode) and re.sub(r"\s", "", text.value) == EXPRESSION


def _shown(node: Node) -> str:
    return node.value[:100] if isinstance(node, ScalarNode) else "that is a list or a node"
