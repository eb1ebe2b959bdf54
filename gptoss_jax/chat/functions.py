"""Python functions as tools: the schema from type hints and docstring, and the call with the
model's arguments.

Knows signatures (through pydantic). Refuses to know conversations. What the model sends is
untrusted: arguments are checked against the type hints before the function sees them, and every
failure becomes text for the model.
"""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, cast

from gptoss_jax.chat.messages import Tool
from gptoss_jax.errors import GptOssError

_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def tool_from_function(function: Callable[..., Any]) -> Tool:
    """The Tool of a function: its name, its docstring's text before `Args:`, a JSON schema of its
    typed parameters.

    Descriptions of parameters are read from the docstring's `Args:` (Google style). Raises
    GptOssError for a coroutine function, *args, **kwargs, or a type that has no JSON schema.
    """
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic.json_schema import GenerateJsonSchema

    class Untitled(GenerateJsonSchema):
        def field_title_should_be_set(self, schema) -> bool:
            return False

    name = getattr(function, "__name__", "")
    if inspect.iscoroutinefunction(function):
        raise GptOssError(f"tool {name} is a coroutine function: give a plain function")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise GptOssError(
                f"tool {name}: parameter {parameter} cannot be given by name: use plain named "
                "parameters"
            )
    try:
        schema = TypeAdapter(cast(Any, function)).json_schema(schema_generator=Untitled)
    except (PydanticUserError, NameError) as error:
        first = str(error).splitlines()[0]
        raise GptOssError(
            f"tool {name}: its type hints have no JSON schema ({first}): use plain types"
        ) from None
    description, arguments = _read_docstring(inspect.getdoc(function) or "")
    for key, text in arguments.items():
        if key in schema.get("properties", {}):
            schema["properties"][key].setdefault("description", text)
    return Tool(name, description, schema if schema.get("properties") else None)


def call_function(function: Callable[..., Any], arguments: str) -> str:
    """Calls the function with JSON arguments; returns its result (a string as it is, the rest as
    JSON).

    Whatever goes wrong comes back as text that starts with `error:`: no JSON, arguments that do not
    fit, an exception.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ArgsKwargs

    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        return f"error: the arguments are not JSON ({error}); send one JSON object"
    if not isinstance(given, dict):
        return (
            "error: the arguments are not a JSON object; send one JSON object with the "
            "parameters' names"
        )
    try:
        value = TypeAdapter(cast(Any, function)).validate_python(ArgsKwargs((), given))
    except ValidationError as error:
        # the function may validate things of its own; both are the caller's business
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        return f"error: {'; '.join(faults)}"
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return str(value)


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Description, and the descriptions of the arguments."""
    head, _, rest = text.partition("Args:\n")
    arguments: dict[str, str] = {}
    name = None
    for line in rest.splitlines():
        if line and not line[0].isspace():
            break  # the next section
        if found := _ARGUMENT.fullmatch(line.strip()):
            name = found[1]
            arguments[name] = found[2]
        elif name is not None:
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    return re.split(r"\n(?:Returns|Raises|Yields|Example|Examples):\n", head)[0].strip(), arguments
