"""Numbers of a JSON schema in words that llguidance gets right (found out with llguidance 1.9.1).

Knows what its ranges do with float64. Every change makes the schema stricter or leaves it as it is.
"""

import decimal
import math
from typing import Any, TypeGuard

EXACT = 2**53  # integers and bounds beyond it are clamped or lose digits
DIGITS, PLACES = 12, 15  # of a bound that is kept: significant ones, and after the point
LOWEST, HIGHEST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
BOUNDS = (*LOWEST, *HIGHEST)


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_exact(value: int | float) -> bool:
    """Does llguidance write this constant as it is? It reads fractions like 0.09082778693718753
    wrong by a bit.
    """
    if isinstance(value, int):
        return abs(value) <= EXACT
    number = decimal.Decimal(str(value)).normalize().as_tuple()
    places = -int(number.exponent)
    return len(number.digits) <= PLACES and places <= PLACES and abs(value) <= 10.0**PLACES


def tighten(node: dict[str, Any], kinds: set[str]) -> None:
    """Changes a subschema's bounds.

    Args:
      node: Changed in place.
      kinds: Types that it allows.
    """
    step = node.get("multipleOf")
    if "number" in kinds and is_number(step) and step == int(step):
        kinds = kinds - {"number"} | {"integer"}  # it panics at multiples of 3 up to 2.75
        node["type"] = sorted(kinds)
    if "number" in kinds:
        _round(node)
    for keys, sign in ((LOWEST, 1), (HIGHEST, -1)):
        for key in keys:
            if is_number(node.get(key)):
                node[key] = sign * max(sign * node[key], -EXACT)


def _round(node: dict[str, Any]) -> None:
    """Gives a fraction's bounds digits that llguidance keeps, and says those inclusively that it
    would include anyway: whole ones of an interval that holds no other whole number.
    """
    bounds = [node[key] for key in BOUNDS if is_number(node.get(key))]
    narrow = len(bounds) > 1 and max(bounds) - min(bounds) <= 1
    for (inclusive, exclusive), sign in ((LOWEST, 1), (HIGHEST, -1)):
        rounding = decimal.ROUND_CEILING if sign > 0 else decimal.ROUND_FLOOR
        context = decimal.Context(prec=DIGITS, Emin=DIGITS - 1 - PLACES, rounding=rounding)
        for key in (inclusive, exclusive):
            value = node.get(key)
            if not is_number(value):
                continue
            exact = decimal.Decimal(str(value))
            if key == exclusive and narrow and value == int(value):
                exact = context.next_plus(exact) if sign > 0 else context.next_minus(exact)
                other = node.get(inclusive, -sign * math.inf)
                node[inclusive] = sign * max(sign * float(exact), sign * other)
                del node[exclusive]
            elif isinstance(value, float):
                node[key] = float(context.plus(exact))
