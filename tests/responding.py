"""What the tests of /v1/responses share: requests, and OpenAI's own types as a strict check."""

import functools
import itertools
import json
from typing import Annotated, get_args, get_origin

import pydantic
import serving
from fakes import harmony_ids
from openai._models import BaseModel as OpenAIModel
from openai.types import responses as shapes
from serving import ASKS

WEATHER = {"type": "function", **serving.WEATHER["function"], "strict": True}
CUT = len(harmony_ids(ASKS)) - 3  # tokens of it that end inside the arguments
BEGIN = ["created", "in_progress"]
REASONING = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"]  # fmt: skip
MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done"]  # fmt: skip
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]  # fmt: skip
# what OpenAI's types do not have, and OpenAI's service and ours send
BESIDE = {"Response": {"store"}}


adapter = functools.cache(pydantic.TypeAdapter)


def conforms(value, kind):
    """Valid under one of OpenAI's types, strictly: right types, and no key that the type lacks."""
    adapter(kind).validate_python(value, strict=True)
    assert not (unknown := list(beside(value, kind))), unknown


def beside(value, kind):
    """Keys of `value` that no type of `kind` has."""
    if get_origin(kind) is Annotated:
        yield from beside(value, get_args(kind)[0])
    elif isinstance(value, list):
        for item in value:
            options = [get_args(k)[0] for k in options_of(kind) if get_origin(k) is list]
            yield from min((list(beside(item, k)) for k in options), key=len)
    elif isinstance(value, dict):
        models = [k for k in options_of(kind) if isinstance(k, type) and issubclass(k, OpenAIModel)]
        models = [m for m in models if may_be(value, m)]
        fitting = [m for m in models if fits(value, m)]
        if fitting:
            yield from min((list(unknown_keys(value, m)) for m in fitting), key=len)


def options_of(kind):
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(kind) is None or get_origin(kind) in (list, dict):
        return [kind]
    return [o for k in get_args(kind) for o in options_of(k)]


def may_be(value, model):
    """Does the type's name allow it?"""
    field = model.model_fields.get("type")
    return field is None or value.get("type") in (None, *get_args(field.annotation))


def fits(value, model):
    try:
        model.model_validate(value, strict=True)
        return True
    except pydantic.ValidationError:
        return False


def unknown_keys(value, model):
    fields = {f.alias or name: f.annotation for name, f in model.model_fields.items()}
    for key, inner in value.items():
        if key in fields:
            yield from beside(inner, fields[key])
        elif key not in BESIDE.get(model.__name__, ()):
            yield f"{model.__name__}.{key}"


def ask(api, **body):
    """The answer's JSON as it was sent, checked against OpenAI's type."""
    body = {"model": "scripted", "input": "hi", **body}
    raw = api.responses.with_raw_response.create(**body)
    answer = json.loads(raw.text)
    conforms(answer, shapes.Response)
    return answer


def events_of(text):
    """The events of a stream as they were sent, each checked against OpenAI's types."""
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n", 1)
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
        conforms(out[-1], shapes.ResponseStreamEvent)
    assert [event["sequence_number"] for event in out] == list(
        range(out[0]["sequence_number"], out[0]["sequence_number"] + len(out))
    )
    return out


def stream(api, **body):
    body = {"model": "scripted", "input": "hi", "stream": True, **body}
    with api.responses.with_streaming_response.create(**body) as raw:
        return events_of("".join(raw.iter_text()))


def replay(api, id, **more):
    """The events of a response made in the background."""
    with api.responses.with_streaming_response.retrieve(id, stream=True, **more) as raw:
        return events_of("".join(raw.iter_text()))


def kinds(events):
    """Their types, deltas in a row as one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for name, _ in itertools.groupby(names)]


def same(first, second):
    """Two responses but for ids and times."""

    def bare(value):
        if isinstance(value, dict):
            skipped = ("id", "call_id", "created_at", "completed_at", "background", "usage")
            return {k: bare(v) for k, v in value.items() if k not in skipped}
        return [bare(item) for item in value] if isinstance(value, list) else value

    return bare(first) == bare(second)
