"""From the text of a YAML file to plain values, and the line on which each of them stands.

The first step of loading; the schema comes after it. PyYAML's safe loader reads the text to a tree of nodes, which
still know their lines; the values are built here from those nodes, so that each value and its line come from one
place. Only what the schema can use is built: text, whole numbers, decimal fractions, true and false, null, lists and
mappings with text keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import yaml

from stickyproxy.config.errors import ConfigError, ConfigErrors, PathInFile, render_key, render_path

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_VALUES = 100_000  # aliases unfold to at most this many values; a file of 1000 upstreams has some 4000
MAX_DEPTH = 50  # the deepest key of the schema stands at 5

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + "str", _TAG + "timestamp", _TAG + "value", _TAG + "merge"}  # a date is the text that was written
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")  # no octal, hexadecimal or base-60 numbers, no underscores
_FRACTION = re.compile(r"[-+]?[0-9]{1,18}\.[0-9]{0,18}")

# What PyYAML says -> what a person can use. Those it words with a text of the file in them are worded anew without
# it: the text may be part of a secret.
_PROBLEMS = {
    "found character '\\t'": "a tab where a space belongs; YAML indents with spaces",
    "found undefined alias": "an alias (*name) without its anchor (&name); text that begins with * needs quotes",
    "second occurrence": "an anchor (&name) that was given before",
    "found undefined tag handle": "a tag (!name) that is not known; text that begins with ! needs quotes",
    "duplicate tag handle": "a tag handle that was given before",
    "but found another document": "a second document begins; a configuration is one document",
}


@dataclass(frozen=True, slots=True)
class Document:
    """The plain value of a YAML text.

    `lines` says where each value stands, counted from 1; a value with a key stands where its key does. `mistakes` are
    the faults that left a value to go on with, such as a key given twice: report them with those of the schema.
    `presets` names the preset of each value that comes from one and stands on no line.
    """

    value: object
    lines: Mapping[PathInFile, int]
    mistakes: tuple[ConfigError, ...]
    presets: Mapping[PathInFile, str] = field(default_factory=dict)


def read_document(text: str) -> Document:
    """Return the plain value of a YAML text; of an empty one, an empty mapping.

    Raises `ConfigErrors` with one error where the text is not YAML or goes beyond `MAX_VALUES` or `MAX_DEPTH`.
    """
    node = _compose(text)
    builder = _Builder()
    value = None if node is None else builder.build(node, ())
    return Document({} if value is None else value, builder.lines, tuple(builder.mistakes))


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _not_yaml(f"the character U+{ord(text[error.position]):04X} may not stand in YAML", line) from None
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else loader.line + 1
        raise _not_yaml(_reword(error.problem or "the text ends too early"), line) from None
    except RecursionError:
        raise _not_yaml(f"values nest deeper than {MAX_DEPTH} levels", loader.line + 1) from None
    except (ValueError, OverflowError):  # PyYAML passes escapes such as "\UFFFFFFFF" to chr() unchecked
        raise _not_yaml("a number or an escape that is out of range", loader.line + 1) from None
    finally:
        loader.dispose()


def _not_yaml(message: str, line: int) -> ConfigErrors:
    return ConfigErrors([ConfigError("", line, f"not valid YAML: {message}")])


def _reword(problem: str) -> str:
    return next((words for start, words in _PROBLEMS.items() if problem.startswith(start)), problem)


@dataclass(slots=True)
class _Builder:
    """Builds values from nodes; each alias is built again at each place where it stands."""

    lines: dict[PathInFile, int] = field(default_factory=dict)
    mistakes: list[ConfigError] = field(default_factory=list)
    _built: int = 0
    _open: set[int] = field(default_factory=set)

    def build(self, node: yaml.Node, path: PathInFile) -> object:
        """Return the value of a node; a part that cannot be built is reported and left out (None)."""
        self.lines.setdefault(path, _line_of(node))
        self._built += 1
        if self._built > MAX_VALUES:
            raise _not_yaml(f"more than {MAX_VALUES} values, with aliases written out", _line_of(node))
        if id(node) in self._open:
            raise _not_yaml("an alias that stands inside its own anchor", _line_of(node))
        if len(path) > MAX_DEPTH:
            raise _not_yaml(f"values nest deeper than {MAX_DEPTH} levels", _line_of(node))
        if isinstance(node, yaml.ScalarNode):
            return self._build_scalar(node, path)
        self._open.add(id(node))
        try:
            return self._build_list(node, path) if isinstance(node, yaml.SequenceNode) else self._build_map(node, path)
        finally:
            self._open.remove(id(node))

    def _build_scalar(self, node: yaml.ScalarNode, path: PathInFile) -> object:
        text = node.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._report(path, "half of a surrogate pair is not text")
            return None
        match node.tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return yaml.SafeLoader.bool_values.get(text.lower(), text)
            case "int":
                return int(text) if _WHOLE.fullmatch(text) else text
            case "float":
                return float(text) if _FRACTION.fullmatch(text) else text
            case _:
                if node.tag not in _TEXT_TAGS:
                    self._report(path, "tags (!name) are not read; text that begins with ! needs quotes")
                return text

    def _build_list(self, node: yaml.SequenceNode, path: PathInFile) -> list[object]:
        self._check_tag(node, path, "seq")
        return [self.build(item, (*path, position)) for position, item in enumerate(node.value)]

    def _build_map(self, node: yaml.Node, path: PathInFile) -> dict[str, object]:
        self._check_tag(node, path, "map")
        found: dict[str, object] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = _line_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.append(ConfigError(render_path(path), line, "a key must be text"))
            elif key_node.tag == _TAG + "merge":
                self.mistakes.append(ConfigError(render_path(path), line, "merge keys (<<) are not read; write it out"))
            elif key_node.value in found:
                text = f"the key '{render_key(key_node.value)}' stands here twice, first in line"
                text = f"{text} {first_lines[key_node.value]}"
                self.mistakes.append(ConfigError(render_path((*path, key_node.value)), line, text))
            else:
                first_lines[key_node.value] = line
                self.lines[*path, key_node.value] = line
                found[key_node.value] = self.build(value_node, (*path, key_node.value))
        return found

    def _check_tag(self, node: yaml.Node, path: PathInFile, kind: str) -> None:
        if node.tag != _TAG + kind:
            self._report(path, "tags (!name) are not read")

    def _report(self, path: PathInFile, message: str) -> None:
        self.mistakes.append(ConfigError(render_path(path), self.lines[path], message))


def _line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
