"""Written-out sums: the reasoning that gpt-oss-tiny learns, at three lengths. Knows integers and
text, no conversations.

High effort names every place, the carry and the result so far; medium writes each column's sum; low
only the columns' results. Each character follows from few others near it, which is what a small
network can learn reliably.
"""

import hashlib

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")
HELD_OUT_PERCENT = 5


def held_out(operation: str, first: int, second: int) -> bool:
    """Whether a sum belongs to the evaluation and must not occur in training.

    Addition ignores the order, and a subtraction goes with its negative, so that no twin leaks.

    Args:
      operation: "+" or "-".
      first: First operand.
      second: Second operand.
    """
    low, high = sorted((first, second))
    digest = hashlib.blake2b(f"{high}{operation}{low}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def result(numbers: tuple[int, ...], operations: str) -> int:
    """Value of numbers[0] op numbers[1] op ..., from left to right; `operations` holds "+" and
    "-"."""
    value = numbers[0]
    for operation, number in zip(operations, numbers[1:], strict=True):
        value = value + number if operation == "+" else value - number
    return value


def expression(numbers: tuple[int, ...], operations: str, space: str = "") -> str:
    """The sum as text: "347+285", or with `space` between the parts "347 + 285"."""
    parts = [str(numbers[0])]
    for operation, number in zip(operations, numbers[1:], strict=True):
        parts += [operation, str(number)]
    return space.join(parts)


def reasoning(numbers: tuple[int, ...], operations: str, effort: str) -> str:
    """Scratchpad for a sum of two or more numbers, each step of two numbers on its own lines.

    Args:
      numbers: Operands, not negative; intermediate results are not negative either, except the
        last.
      operations: One "+" or "-" between each two operands.
      effort: "low", "medium" or "high".

    Returns:
      The text for the analysis channel.
    """
    value, steps = numbers[0], []
    for operation, number in zip(operations, numbers[1:], strict=True):
        steps.append(_two_numbers(value, operation, number, effort))
        value = result((value, number), operation)
    return "\n".join(steps)


def _two_numbers(first: int, operation: str, second: int, effort: str) -> str:
    lines = [f"{first}{operation}{second}"]
    if operation == "-":
        swap = first < second
        if effort == "high":
            lines[0] += f": {_compare(first, second)}"
        if swap:
            lines[0] += (
                f", so -({second}-{first})" if effort == "high" else f" = -({second}-{first})"
            )
            first, second = second, first
    columns = _columns(first, operation, second)
    if effort == "low":
        return f"{lines[0]}: " + ",".join(str(total) for _, total, _, _ in columns)
    if effort == "medium":
        return f"{lines[0]}: " + ", ".join(f"{text}={total}" for text, total, _, _ in columns)
    word = "carry" if operation == "+" else "borrow"
    for place, (text, total, carry, so_far) in zip(PLACES, columns, strict=False):
        lines.append(f"{place}: {text}={total}, {word} {carry}, {so_far}")
    return "\n".join(lines)


def _compare(first: int, second: int) -> str:
    """Which number is larger, by length and else digit by digit: "3>2 digits" or "5=5, 1<4"."""
    a, b = str(first), str(second)
    if len(a) != len(b):
        return f"{len(a)}{'<' if len(a) < len(b) else '>'}{len(b)} digits"
    pairs = []
    for left, right in zip(a, b, strict=True):
        sign = "=" if left == right else "<" if left < right else ">"
        pairs.append(f"{left}{sign}{right}")
        if sign != "=":
            break
    return ", ".join(pairs)


def _columns(first: int, operation: str, second: int) -> list[tuple[str, int, int, str]]:
    """Columns from the ones on: (text such as "4+8+1", its value, carry or borrow out, result so
    far)."""
    a, b = str(first)[::-1], str(second)[::-1]
    columns, carry, so_far, place = [], 0, "", 0
    while place < max(len(a), len(b)) or carry:
        left = int(a[place]) if place < len(a) else 0
        right = int(b[place]) if place < len(b) else 0
        terms = [left, right] + ([carry] if carry else [])
        total = left + right + carry if operation == "+" else left - right - carry
        so_far = f"{total % 10}{so_far}"
        carry = int(total > 9) if operation == "+" else int(total < 0)
        columns.append((operation.join(str(term) for term in terms), total, carry, so_far))
        place += 1
    return columns
