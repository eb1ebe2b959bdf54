"""JSON schemas for the tests of the grammar: random ones, nasty ones, and the check of a value."""

import json
import random
from fractions import Fraction

import jsonschema

STRINGS = ["a", "ab", "abc", "", "é", "日本", "😀", 'say "hi"', "back\\slash", "new\nline", "a/b", " ", "\t", "null", "{", "<|end|>"]  # fmt: skip
CONTROLS = ["\u0001", "\u001f", "\x7f"]  # possible where no other keys are
PATTERNS = ["^[a-z]+$", "^\\d{3}-\\d{4}$", "a", "^(foo|bar)?$", "[0-9]$", "^.{2,5}$", "^[A-Z][a-z]*( [A-Z][a-z]*)*$", "^\\S+@\\S+$", "^[^\"]*$", "^\\w*$", "^é+$"]  # fmt: skip
FORMATS = ["date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "uri", "duration"]  # fmt: skip
KEYS = ["a", "b", "name", "é", 'q"uote', "with space", "type", "properties", "$ref", "", "new\nline"]  # fmt: skip


def random_schema(seed: int) -> dict:
    """A schema of every supported kind; some have no valid value and some are refused."""
    choose = random.Random(seed)
    names = [f"d{number}" for number in range(choose.randrange(3))]
    schema = _node(choose, 0, names, root=True)
    schema = {} if schema is True else schema
    if names:
        schema["$defs"] = {name: _node(choose, 1, names) for name in names}
    return schema


def _node(choose: random.Random, depth: int, names: list[str], root: bool = False):
    kinds = ["string", "integer", "number", "const", "enum", "boolean", "null", "types"]
    if depth < 3:
        kinds += ["object", "object", "object", "array", "array", "anyOf", "allOf", "oneOf"]
        kinds += ["ref", "ref"] * bool(names) + ["any"]
    kind = "object" if root and choose.random() < 0.7 else choose.choice(kinds)
    node = globals()[f"_{kind}"](choose, depth, names)
    if choose.random() < 0.1 and isinstance(node, dict):
        node = {"title": "T", "description": "what it is", **node, "x-mine": 1}
    return node


def _some(choose, chance=0.5):
    return choose.random() < chance


def _string(choose, depth, names):
    node: dict = {"type": "string"}
    if _some(choose, 0.3):
        node["pattern"] = choose.choice(PATTERNS)
    elif _some(choose, 0.3):
        node["format"] = choose.choice(FORMATS)
    elif _some(choose):
        node["minLength"] = choose.randrange(4)
        node["maxLength"] = node["minLength"] + choose.randrange(5)
    return node


def _bounds(choose, node, draw):
    if _some(choose):
        node[choose.choice(["minimum", "exclusiveMinimum"])] = low = draw()
        if _some(choose):
            node[choose.choice(["maximum", "exclusiveMaximum"])] = low + abs(draw())
    elif _some(choose):
        node[choose.choice(["maximum", "exclusiveMaximum"])] = draw()
    return node


def _integer(choose, depth, names):
    node = _bounds(
        choose, {"type": "integer"}, lambda: choose.choice([0, 1, -1, 7, 100, -250, 12345, 2**40])
    )
    if _some(choose, 0.2):
        node["multipleOf"] = choose.choice([1, 2, 3, 5, 10, 17, 0.5])
    return node


def _number(choose, depth, names):
    node = _bounds(
        choose,
        {"type": "number"},
        lambda: choose.choice([0, 1, 0.1, -0.5, 2.75, 1e-3, 1234.5, -99.99, 1e9]),
    )
    if _some(choose, 0.15):
        node["multipleOf"] = choose.choice([0.01, 0.5, 0.25, 3, 0.3])
    return node


def _value(choose, depth=0):
    kind = choose.randrange(8 if depth < 2 else 6)
    if kind < 2:
        return choose.choice(CONTROLS if _some(choose, 0.02) else STRINGS)
    if kind < 4:
        return choose.choice([0, 1, -1, 1.5, 0.1, 1e-7, 123456789, -2.5e8, 10.0])
    if kind < 6:
        return choose.choice([True, False, None])
    if kind == 6:
        return [_value(choose, depth + 1) for _ in range(choose.randrange(3))]
    return {choose.choice(KEYS): _value(choose, depth + 1) for _ in range(choose.randrange(3))}


def _const(choose, depth, names):
    return {"const": _value(choose)}


def _enum(choose, depth, names):
    return {"enum": [_value(choose) for _ in range(choose.randint(1, 6))]}


def _boolean(choose, depth, names):
    return {"type": "boolean"}


def _null(choose, depth, names):
    return {"type": "null"}


def _types(choose, depth, names):
    kinds = ["string", "number", "integer", "boolean", "null"] + ["array", "object"] * (depth < 3)
    return {"type": choose.sample(kinds, choose.randint(1, 3))}


def _any(choose, depth, names):
    return choose.choice([{}, True])


def _object(choose, depth, names):
    keys = choose.sample(KEYS, choose.randrange(5))
    node: dict = {"type": "object"}
    if keys or _some(choose):
        node["properties"] = {key: _node(choose, depth + 1, names) for key in keys}
    if _some(choose, 0.8):
        node["required"] = [key for key in keys if _some(choose, 0.6)]
        if _some(choose, 0.1):
            node["required"].append("further")
    rest = choose.randrange(5)
    if rest < 3:
        node["additionalProperties"] = False if rest < 2 else _node(choose, depth + 1, names)
    if _some(choose, 0.1):
        node["patternProperties"] = {"^x_": _node(choose, depth + 1, names)}
    if _some(choose, 0.1):
        node["minProperties"] = 1
    if _some(choose, 0.1):
        node["maxProperties"] = choose.randint(1, 4)
    return node


def _array(choose, depth, names):
    node: dict = {"type": "array"}
    if _some(choose, 0.8):
        node["items"] = _node(choose, depth + 1, names)
    if _some(choose, 0.2):
        node["prefixItems"] = [_node(choose, depth + 1, names) for _ in range(choose.randint(1, 2))]
        if _some(choose):
            node["items"] = False
    if _some(choose):
        node["minItems"] = choose.randrange(3)
        node["maxItems"] = node["minItems"] + choose.randrange(3)
    return node


def _anyOf(choose, depth, names):
    return {"anyOf": [_node(choose, depth + 1, names) for _ in range(choose.randint(1, 3))]}


def _oneOf(choose, depth, names):
    kinds = choose.sample([_string, _integer, _boolean, _null, _object], 2)
    return {"oneOf": [kind(choose, depth + 1, names) for kind in kinds]}


def _allOf(choose, depth, names):
    return {"allOf": [_object(choose, depth + 1, names), _object(choose, depth + 1, names)]}


def _ref(choose, depth, names):
    return {"$ref": f"#/$defs/{choose.choice(names)}"}


class _Exact(float):
    """A float that knows the digits it was written with."""

    digits: str


def _exact(text: str) -> _Exact:
    value = _Exact(text)
    value.digits = text
    return value


def _multiple_of(validator, divisor, instance, schema):
    """jsonschema divides floats (0.07 is no multiple of 0.01 there); this divides the decimals."""
    if not validator.is_type(instance, "number"):
        return
    digits = Fraction(instance.digits if isinstance(instance, _Exact) else instance)
    if digits % Fraction(str(divisor)):
        yield jsonschema.ValidationError(f"{instance!r} is not a multiple of {divisor}")


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {"multipleOf": _multiple_of}
)


def check(text: str, schema) -> None:
    """Raises jsonschema.ValidationError or ValueError unless the text is JSON and valid."""
    has_fractions = "multipleOf" in json.dumps(schema)
    validator = _Validator if has_fractions else jsonschema.Draft202012Validator
    value = json.loads(text, parse_float=_exact)
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(value)


def _nested(levels: int, wrap) -> dict:
    node: dict = {"type": "integer"}
    for _ in range(levels):
        node = wrap(node)
    return node


def _closed(**properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_NODE = _closed(v={"type": "integer"}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})

NASTY = {
    "linked list": {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"},
    "tree": _closed(children={"type": "array", "items": {"$ref": "#"}}),
    "two that refer to each other": {
        "$defs": {
            "a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "additionalProperties": False},
            "b": {"type": "array", "items": {"$ref": "#/$defs/a"}},
        },
        "$ref": "#/$defs/b",
    },
    "overlapping objects": {
        "anyOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "null"}}, "required": ["a", "b"]},
        ]
    },
    "overlapping numbers": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "number", "maximum": -2}, {"const": "3"}]},
    "enum of everything": {"enum": [*STRINGS, *CONTROLS, "\u2028", "\ufeff", "\ud7ff", None, True, 0, -1.5, [], {}, {"a": [1]}]},
    "no properties": {"type": "object", "properties": {}},
    "nothing at all": {"type": "object", "properties": {}, "additionalProperties": False},
    "required without properties": {"type": "object", "required": ["x", "y"]},
    "required of a kind": {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
    "a map": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "minProperties": 1},
    "keys by pattern": {"type": "object", "patternProperties": {"^n_[a-z]+$": {"type": "integer"}}, "additionalProperties": False},
    "keys that begin alike": {"type": "object", "properties": {"ab": {"const": 1}, "a": {"const": 2}}, "patternProperties": {"^z": {"type": "null"}}},
    "a key spelled otherwise": {"type": "object", "properties": {"a": {"type": "integer"}, "\n": {"type": "null"}}, "required": ["a"]},
    "long string": {"type": "string", "minLength": 1, "maxLength": 3000},
    "empty string": {"type": "string", "maxLength": 0},
    "length and pattern": {"type": "string", "minLength": 5, "maxLength": 5, "pattern": "^[a-c]*$"},
    "telephone": {"type": "string", "pattern": "^(\\+\\d{1,3})?[ -]?\\d{3}-\\d{4}$"},
    "not anchored": {"type": "string", "pattern": "\\d"},
    "no quote, no backslash": {"type": "string", "pattern": '^[^\\s"\\\\]+$'},
    "beyond ascii": {"type": "string", "pattern": "^日+$"},
    "no items": {"type": "array", "items": False},
    "a tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "string", "maxLength": 2}], "items": False, "minItems": 2},
    "three": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3},
    "big enum": {"enum": [f"value {number}" for number in range(3000)]},
    "between": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "around zero": {"type": "number", "minimum": -0.1, "maximum": 0.1},
    "below one": {"type": "number", "minimum": 0.999999, "exclusiveMaximum": 1},
    "few integers": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "sevens": {"type": "integer", "multipleOf": 7, "minimum": -50, "maximum": 50},
    "cents": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 10},
    "threes that are numbers": {"type": "number", "multipleOf": 3, "maximum": 2.75},
    "null": {"const": None},
    "constant": {"const": {"a": [1, {"b": None}]}},
    "nul": {"const": "\u0000"},
    "exact numbers": {"enum": [0.1, 1e-7, 123456.789, -0.5, 2**53 - 1, 0.123456789012345]},
    "many types": {"type": ["object", "array", "integer"], "properties": {"a": {"const": 1}}, "items": {"type": "null"}, "minimum": 5},
    "all of": {
        "allOf": [{"$ref": "#/$defs/p"}, {"properties": {"k": {"const": 1}}, "required": ["k"]}],
        "$defs": {"p": {"type": "object", "properties": {"k": {"type": "integer"}, "m": {"type": "boolean"}}}},
    },
    "one of": {
        "oneOf": [
            _closed(kind={"const": "cat"}, lives={"type": "integer", "minimum": 1, "maximum": 9}),
            _closed(kind={"const": "dog"}, name={"type": "string", "maxLength": 5}),
        ],
        "discriminator": {"propertyName": "kind"},
    },
    "properties called as keywords": _closed(**{"$ref": {"type": "integer"}, "enum": {"maxLength": 2}, "type": {"type": "null"}, "properties": {"type": "object"}}),
    "escaped pointer": _closed(**{"a/b~c": {"type": "integer"}, "q": {"$ref": "#/properties/a~1b~0c"}}),
    "anything": {},
    "any object": {"type": "object"},
    "annotated": {"title": "x", "description": "y", "default": {}, "examples": [1], "deprecated": True, "type": "boolean"},
    "date of this century": {"type": "string", "format": "date", "pattern": "^20"},
    "300 optional": {"type": "object", "properties": {f"p{n}": {"type": "boolean"} for n in range(300)}, "additionalProperties": False},
    "deep objects": _nested(40, lambda node: _closed(a=node)),
    "deep arrays": _nested(40, lambda node: {"type": "array", "items": node, "minItems": 1, "maxItems": 1}),
    **{form: {"type": "string", "format": form} for form in FORMATS},
}  # fmt: skip
