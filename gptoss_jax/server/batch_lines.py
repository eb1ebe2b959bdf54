"""The lines of OpenAI's batch format, all checked before a model is loaded.

Knows what a line is. What is in a line's body is the endpoint's business, whose answer may be that
the body is wrong.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptOssError
from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.parameters import read_json

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
KEYS = ("custom_id", "method", "url", "body")
EXPECTED = 'expected {"custom_id": "...", "method": "POST", "url": "/v1/...", "body": {...}}'
# What asks for an answer in another way than as a line of the output.
WAYS = {
    "stream": "an answer of a batch is written when it is complete",
    "background": "a whole batch runs in the background",
    "store": "answers of a batch are in its output and nowhere else",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One request.

    Attributes:
      number: Of the line in the file, from 1.
      custom_id: What its answer is called.
      url: One of URLS.
      body: JSON.
    """

    number: int
    custom_id: str
    url: str
    body: bytes

    def sent(self, seed: int) -> bytes:
        """The body for the endpoint, with `seed` unless it has one."""
        body = json.loads(self.body)
        if body.get("seed") is None:
            body["seed"] = seed
        if self.url == "/v1/responses":
            body["store"] = False
        return json.dumps(body).encode()


def read_lines(path: Path) -> tuple[list[Line], str]:
    """The lines of a file, blank ones skipped, and the SHA-256 of its bytes.

    Raises:
      GptOssError: The file cannot be read or is empty, or lines are no requests or have the
        custom_id of an earlier one; names the first of them and how many more there are.
    """
    if not path.is_file():
        raise GptOssError(f"{path}: no such file: give a file with one request a line")
    data = path.read_bytes()
    lines: list[Line] = []
    seen: dict[str, int] = {}
    wrong: list[str] = []
    for number, row in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not row.strip():
            continue
        try:
            line = _read(number, row)
            if (other := seen.setdefault(line.custom_id, number)) != number:
                raise GptOssError(
                    f"custom_id {_short(line.custom_id)} is that of line {other} too: give each "
                    "its own"
                )
            lines.append(line)
        except GptOssError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f" ({len(wrong) - 1} more bad lines)" if len(wrong) > 1 else ""
        raise GptOssError(f"{path} {wrong[0]}{more}")
    if not lines:
        raise GptOssError(f"{path} holds no requests: give one JSON object a line")
    return lines, hashlib.sha256(data).hexdigest()


def _read(number: int, row: bytes) -> Line:
    try:
        text = row.decode()
    except UnicodeDecodeError:
        raise GptOssError(f"not UTF-8: {EXPECTED} in UTF-8") from None
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise GptOssError(f"not JSON ({reason}): {_cut(text)}: {EXPECTED}") from None
    try:
        found = read_json(row)
    except ApiError as error:  # repeated keys, NaN
        raise GptOssError(error.message.replace("the body holds", "it holds")) from None
    if not isinstance(found, dict):
        raise GptOssError(f"found {_short(found)}: {EXPECTED}")
    for key in found:
        if key not in KEYS:
            raise GptOssError(f"unknown key {_short(key)}: {EXPECTED}")
    for key in KEYS:
        if key not in found:
            raise GptOssError(f"{key} is missing: {EXPECTED}")
    custom_id, body = found["custom_id"], found["body"]
    if not isinstance(custom_id, str) or not custom_id:
        raise GptOssError(f"custom_id is {_short(custom_id)}: expected text, not empty")
    if found["method"] != "POST":
        raise GptOssError(f'method is {_short(found["method"])}: expected "POST"')
    if found["url"] not in URLS:
        raise GptOssError(f"url is {_short(found['url'])}: expected one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise GptOssError(f"body is {_short(body)}: expected an object")
    for way, reason in WAYS.items():
        if body.get(way):
            raise GptOssError(f"body.{way} is {_short(body[way])}: leave it out: {reason}")
    return Line(number, custom_id, found["url"], json.dumps(body).encode())


def _short(value: Any) -> str:
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
