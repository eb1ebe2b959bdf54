"""JSON schemas for a grammar: what is not supported is refused by name and place, and what
llguidance would get wrong is refused or said in words that it gets right.

Knows JSON schema (draft 2020-12) and llguidance's limits with it. Refuses to know tokens and
harmony. Every rewriting makes the schema stricter or leaves it as it is, so what a grammar of the
result accepts is valid under the schema that was given:

    bounds beyond 2**53              2**53, where llguidance's ranges are exact
    bounds of fractions              at most 12 digits, which llguidance keeps
    multiples of a whole number      integers, where llguidance does not panic
    date, time, date-time            no 29 February in other years, no year 0, no second 60
    `\\u0000` in a string            only where a key cannot be spelled in two ways by it

Refused although llguidance takes them: numbers that floats do not hold, minProperties that a
repeated key could meet, schemas that only an infinite value satisfies, keywords of old drafts.
"""

import collections
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from gptoss_jax.chat import grammar_numbers as numbers
from gptoss_jax.errors import GptOssError

MOST_BYTES = 256 * 1024  # of one schema as JSON
MOST_DEPTH = 100  # of the schema's own nesting; llguidance reads 127
MOST_OPTIONAL = 1000  # properties of one object; each doubles what may come next
WHITESPACE = r"\x20|\n\x20{0,48}"  # at most once at a place, so that blanks end

_UNSUPPORTED = frozenset(
    "not if then else contains minContains maxContains propertyNames uniqueItems dependencies "
    "dependentRequired dependentSchemas unevaluatedProperties unevaluatedItems $dynamicRef "
    "$dynamicAnchor $recursiveRef $recursiveAnchor extends disallow divisibleBy".split()
)
_FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri".split()
)  # that llguidance has
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_ONES = ("items", "additionalProperties")
_SINGLE = (*numbers.BOUNDS, "multipleOf", "pattern", "format", "minLength", "maxLength")
_SCALARS = {"string", "number", "integer", "boolean", "null"}

_YEAR = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_FOURS = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|(?:[0-9]{{2}}{_FOURS}|{_FOURS}00)-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def prepare(schema: Any, what: str) -> dict[str, Any]:
    """The schema as llguidance is to read it; the one given is not changed.

    Args:
      schema: JSON schema.
      what: Named in errors, e.g. "response format".

    Raises:
      GptOssError: The schema is no JSON, too large, or has what is not supported.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
        root = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise GptOssError(f"{what}: the schema is not JSON: {error}") from None
    if len(text) > MOST_BYTES:
        raise GptOssError(
            f"{what}: the schema has {len(text)} characters, at most {MOST_BYTES} are taken: make "
            "it smaller"
        )
    if root is True:
        root = {}
    if not isinstance(root, dict):
        raise GptOssError(f"{what}: expected a JSON schema (an object), got {text[:60]}")
    _Check(root, what).run()
    root["x-guidance"] = {
        "whitespace_pattern": WHITESPACE,
        "json_allowed_escapes": 'nrbtf\\"' if _open(root) else 'nrbtf\\"u',
    }
    return root


def constrained(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a prepared schema says of single strings and numbers, each as a schema of its own: where
    these are possible, and their values, shows a trial better than where they stand.
    """
    found: dict[str, dict[str, Any]] = {}
    stack: list[Any] = [schema]
    while stack:
        node = stack.pop()
        if not isinstance(node, dict):
            continue
        own = {key: node[key] for key in _SINGLE if key in node}
        if own and not {"const", "enum"} & node.keys():
            own["type"] = sorted(_types(node) & _SCALARS)
            own["x-guidance"] = schema["x-guidance"]
            if own["type"]:
                found[json.dumps(own)] = own
        stack += [child for _, child in _children(node)]
    return list(found.values())


class _Check:
    """One pass over every subschema, references followed."""

    def __init__(self, root: dict[str, Any], what: str):
        self.root, self.what = root, what
        self.places: dict[int, str] = {}  # id of a subschema -> JSON pointer
        self.nodes: list[dict[str, Any]] = []

    def refuse(self, place: str, reason: str) -> NoReturn:
        raise GptOssError(f"{self.what}: at {place}: {reason}")

    def run(self) -> None:
        queue = collections.deque([(self.root, "#", 0)])
        while queue:
            node, place, depth = queue.popleft()
            if isinstance(node, bool) or id(node) in self.places:
                continue
            if not isinstance(node, dict):
                self.refuse(place, f"expected a JSON schema, got {json.dumps(node)[:60]}")
            if depth > MOST_DEPTH:
                self.refuse(place, f"nested deeper than {MOST_DEPTH}: make the schema flatter")
            self.places[id(node)] = place
            self.nodes.append(node)
            self.check(node, place)
            for name, child in _children(node):
                queue.append((child, f"{place}/{name}", depth + 1))
            if "$ref" in node:
                queue.append((self.target(node), node["$ref"], depth))
        endless = _endless(self.nodes, self.target)
        if endless is not None:
            self.refuse(
                self.places[id(endless)],
                "only an endless value would be valid: make a property on the way optional, or "
                "allow null",
            )
        circle = _circle(self.nodes, self.target)
        if circle is not None:
            self.refuse(self.places[id(circle)], "it refers to itself: remove the reference")
        if _open(self.root):
            self.check_characters()
        for node in self.nodes:
            _tighten(node)

    def check(self, node: dict[str, Any], place: str) -> None:
        for key in node:
            if key in _UNSUPPORTED:
                self.refuse(place, f"keyword {key!r} is not supported: remove it")
        if "$id" in node and node is not self.root:
            self.refuse(place, "$id is supported at the root only: remove it")
        for key in (*_LISTS, "enum", "required"):
            if not isinstance(node.get(key, []), list):
                self.refuse(place, f"{key} must be a list")
        for key in _MAPS:
            if not isinstance(node.get(key, {}), dict):
                self.refuse(place, f"{key} must be an object")
        if isinstance(node.get("items"), list):
            self.refuse(place, "items must be a schema: use prefixItems for the first ones")
        kinds = _types(node)
        form = node.get("format")
        if form is not None and form not in _FORMATS and "string" in kinds:
            self.refuse(
                place,
                f"format {form!r} is not supported: use {', '.join(sorted(_FORMATS))}, a pattern, "
                "or no format",
            )
        required = {name for name in node.get("required", []) if isinstance(name, str)}
        least = node.get("minProperties", 0)
        if isinstance(least, int | float) and least > len(required) + 1:
            self.refuse(
                place,
                f"minProperties {least} is not supported with {len(required)} required "
                "properties: name them in required",
            )
        properties = node.get("properties", {})
        if len(properties) - len(required & set(properties)) > MOST_OPTIONAL:
            self.refuse(place, f"more than {MOST_OPTIONAL} optional properties: require some")
        for key in ("const", "enum"):
            for value in _leaves(node.get(key)):
                if numbers.is_number(value) and not numbers.is_exact(value):
                    self.refuse(place, f"the number {value} in {key} is not exact: use a string")
        for key in (*numbers.BOUNDS, "multipleOf"):
            value = node.get(key)
            if numbers.is_number(value):
                beyond = value > numbers.EXACT if key in numbers.LOWEST else value < -numbers.EXACT
                if (
                    beyond
                    or not math.isfinite(value)
                    or (key == "multipleOf" and value > numbers.EXACT)
                ):
                    self.refuse(place, f"{key} {value} is beyond 2**53, which is not supported")

    def target(self, node: dict[str, Any]) -> Any:
        pointer = node["$ref"]
        place = self.places.get(id(node), "#")
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            self.refuse(place, f"$ref {pointer!r} is not supported: use #/$defs/NAME")
        found: Any = self.root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                self.refuse(place, f"$ref {pointer!r} leads nowhere: define it in #/$defs")
        return found

    def check_characters(self) -> None:
        """Without `\\u`, which could spell a known key in another way, JSON has no words for some
        characters.
        """
        for node in self.nodes:
            for value in [*_leaves(node.get("const")), *_leaves(node.get("enum"))]:
                bad = [c for c in str(value) if (c < " " and c not in "\b\f\n\r\t") or c == "\x7f"]
                if isinstance(value, str) and bad:
                    self.refuse(
                        self.places[id(node)],
                        f"the character {bad[0]!r} in const or enum is not supported beside "
                        "objects with further properties: set additionalProperties to false",
                    )


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in _LISTS:
        for number, child in enumerate(node.get(key, ())):
            yield f"{key}/{number}", child
    for key in _MAPS:
        for name, child in node.get(key, {}).items():
            yield f"{key}/{name}", child
    for key in _ONES:
        if key in node:
            yield key, node[key]


def _types(node: Mapping[str, Any]) -> set[str]:
    """The types that the node's own words allow."""
    kinds = node.get("type", [*_SCALARS, "object", "array"])
    return set(kinds) if isinstance(kinds, list) else {kinds}


def _leaves(value: Any) -> Iterator[Any]:
    """Strings (keys too) and numbers in a JSON value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str | int | float) and not isinstance(item, bool):
            yield item


def _open(root: dict[str, Any]) -> bool:
    """Is there an object with rules for some keys that takes other keys too?"""
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            rules = any(node.get(key) for key in ("properties", "patternProperties", "required"))
            if rules and node.get("additionalProperties") is not False:
                return True
            stack += node.values()
    return False


def _tighten(node: dict[str, Any]) -> None:
    numbers.tighten(node, _types(node))
    if node.get("format") in _PATTERNS and "string" in _types(node):
        pattern = _PATTERNS[node.pop("format")]
        if "pattern" in node:
            node["allOf"] = [*node.get("allOf", []), {"pattern": pattern}]
        else:
            node["pattern"] = pattern


def _endless(nodes: list[dict[str, Any]], target) -> dict[str, Any] | None:
    """A subschema that no finite value satisfies, or None.

    Least fixed point: a node is finite as soon as each of its needs has one finite subschema.
    """
    missing: dict[int, int] = {}
    waiting: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    ready = []
    for node in nodes:
        needs = _needs(node, target)
        missing[id(node)] = len(needs)
        for number, need in enumerate(needs):
            for child in need:
                waiting[id(child)].append((id(node), number))
        if not needs:
            ready.append(id(node))
    met: set[tuple[int, int]] = set()
    finite = set(ready)
    while ready:
        for need in waiting[ready.pop()]:
            if need in met:
                continue
            met.add(need)
            missing[need[0]] -= 1
            if missing[need[0]] == 0:
                finite.add(need[0])
                ready.append(need[0])
    return next((node for node in nodes if id(node) not in finite), None)


def _circle(nodes: list[dict[str, Any]], target) -> dict[str, Any] | None:
    """A subschema whose check of a value begins with the same check, or None."""
    state: dict[int, bool] = {}  # open, or done
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                state[id(node)] = True
                continue
            if isinstance(node, bool) or state.get(id(node)):
                continue
            if id(node) in state:
                return node
            state[id(node)] = False
            stack.append((node, True))
            same = [child for key in ("allOf", "anyOf", "oneOf") for child in node.get(key, ())]
            same += [target(node)] if "$ref" in node else []
            stack += [(child, False) for child in same]
    return None


def _needs(node: dict[str, Any], target) -> list[list[dict[str, Any]]]:
    """Lists of subschemas, of each of which one must be finite for the node to be."""
    if "const" in node or "enum" in node:
        return []
    needs = [[child] for child in node.get("allOf", ())]
    needs += [node[key] for key in ("anyOf", "oneOf") if node.get(key)]
    if "$ref" in node:
        needs.append([target(node)])
    kinds = _types(node)
    if kinds == {"object"}:
        rest = node.get("additionalProperties", True)
        properties = node.get("properties", {})
        needs += [
            [properties.get(name, rest)]
            for name in node.get("required", ())
            if isinstance(name, str)
        ]
    if kinds == {"array"}:
        first = node.get("prefixItems", [])
        least = node.get("minItems", 0)
        least = int(least) if isinstance(least, int | float) else 0
        needs += [[child] for child in first[:least]]
        if least > len(first):
            needs.append([node.get("items", True)])
    # true and false are finite here: that false has no value at all, llguidance finds
    return [need for need in needs if not any(isinstance(child, bool) for child in need)]
