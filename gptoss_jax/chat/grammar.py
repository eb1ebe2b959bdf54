"""What a completion may be: a grammar over all of it, from the token after `<|start|>assistant` to
its stop token.

Knows harmony's messages, tool choice and response formats. Refuses to know generation: a `Grammar`
gives masks (batching.TokenMask), and whoever generates asks them. llguidance does the work;
grammar_schema.py makes it right for JSON schemas, grammar_trial.py safe, grammar_tokens.py speaks
to it. The whole completion is one grammar, so that the model reasons freely, writes its own
headers and cannot leave the format:

    completion  thought{0,8} (answer | call)
    thought     <|channel|>analysis<|message|> TEXT <|end|><|start|>assistant
                <|channel|>commentary<|message|> TEXT <|end|><|start|>assistant     with tools
    answer      <|channel|>final JSON-TYPE? <|message|> what is asked for <|return|>
    call         to=functions.NAME<|channel|>commentary JSON-TYPE? <|message|> ARGUMENTS <|call|>
                <|channel|>commentary to=functions.NAME JSON-TYPE? <|message|> ARGUMENTS <|call|>
    JSON-TYPE   <|constrain|>json, with or without a space before it, or ` json`

TEXT is any UTF-8 without control tokens. A name is one of the tools on offer. The stop token comes
as soon as nothing else can, and is allowed as soon as the answer is whole. With too few tokens the
text is the beginning of a valid one.

What is guaranteed of a completion that ends by itself: the answer is valid under the response
format; the arguments of a strict tool, and of every tool when a call is required, are valid under
its parameters (those of a tool that is not strict, as far as these are supported, else a JSON
object: `Grammar.loose` names such tools); calls name tools on offer. Blanks in JSON are at most one
space, or a line break and 48 spaces, at a place. What is not bounded, the schema should bound:
strings (maxLength), arrays (maxItems), digits of numbers (minimum and maximum), depth of recursion.
"""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

from gptoss_jax.chat.grammar_schema import constrained, prepare
from gptoss_jax.chat.grammar_tokens import CompiledGrammar, CompletionMask
from gptoss_jax.chat.grammar_trial import try_grammars
from gptoss_jax.chat.messages import ResponseFormat, Tool
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer

MOST_CHARACTERS = 64 * 1024  # of a regex, a Lark grammar, or choices together
MOST_TOTAL = 1024 * 1024  # of all schemas of a request as JSON
MOST_THOUGHTS = 8  # messages before the last, so that there is one
_ANY_OBJECT = {"type": "object"}
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
_TEXT = "/(?s:.*)/"
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"i?|/(?!/)(?:\\.|[^/\\])+/[imslux]*|(?://|#)[^\n]*', re.S)


@dataclasses.dataclass(frozen=True)
class Regex:
    """The answer as a whole matches a regular expression (Rust's syntax, no look-around)."""

    pattern: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """The answer is one of these texts."""

    options: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Lark:
    """The answer is what a Lark grammar's `start` makes (llguidance's dialect, without tokens)."""

    grammar: str


Structure = ResponseFormat | Regex | Choice | Lark


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A compiled grammar, shared by all completions of its kind.

    `loose` names the tools whose arguments are any JSON object, because their parameters have what
    is not supported and they are not strict.
    """

    loose: tuple[str, ...]
    compiled: CompiledGrammar = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)

    def mask(self) -> CompletionMask:
        """A mask for one completion, at its beginning."""
        return CompletionMask(self.compiled, self.tokenizer)


def completion_grammar(
    tokenizer: Tokenizer,
    tools: Sequence[Tool] = (),
    tool_choice: str = "auto",
    response_format: Structure | None = None,
    parallel: bool = False,
    reasoning: bool = True,
) -> Grammar | None:
    """The grammar of the completions of a prompt that ends with `<|start|>assistant`.

    A new one takes milliseconds; the first one of a process 0.1 s more, and 1.3 s more with the
    full vocabulary. Equal ones are made once. May be called from any thread.

    Args:
      tokenizer: Of the model.
      tools: Those on offer.
      tool_choice: "auto"; "none" (an answer); "required" (a call); "functions.NAME" (a call of it).
      response_format: What the answer must be; a `ResponseFormat` is a JSON schema.
      parallel: Several calls in one completion are allowed (all but the last end with `<|end|>`).
      reasoning: Analysis may come first.

    Returns:
      The grammar, or None if there is nothing to constrain.

    Raises:
      GptOssError: A schema, pattern or grammar is malformed, not supported (the message says what
        and where) or too costly; the choice is not among the tools.
    """
    offered, forced = _offered(tools, tool_choice)
    strict = [tool.name for tool in offered if tool.strict]
    unasked = response_format is None and not forced and not strict
    if unasked and (tool_choice == "auto" or not tools):
        return None
    if importlib.util.find_spec("llguidance") is None:
        raise GptOssError("structured output needs llguidance: pip install 'gptoss_jax[serve]'")
    parts: dict[str, dict[str, Any]] = {}
    loose = []
    for number, tool in enumerate(offered):
        parts[f"tool_{number}"], exact = _arguments(tool, forced or tool.strict)
        if not exact:
            loose.append(tool.name)
    if not forced and response_format is not None:
        parts["answer"] = _answer(response_format)
    if sum(len(json.dumps(part)) for part in parts.values()) > MOST_TOTAL:
        raise GptOssError(
            f"the schemas together have more than {MOST_TOTAL} characters: offer fewer tools"
        )
    lark = _layout(
        tokenizer,
        [tool.name for tool in offered],
        answer=None if forced else ("@answer" if "answer" in parts else _TEXT),
        typed=isinstance(response_format, ResponseFormat),
        parallel=parallel,
        reasoning=reasoning,
        preamble=bool(offered),
    )
    grammars = [{"lark_grammar": lark}, *({"name": name, **part} for name, part in parts.items())]
    return Grammar(
        tuple(loose), _compiled(json.dumps({"grammars": grammars}), tokenizer), tokenizer
    )


def _offered(tools: Sequence[Tool], choice: str) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be."""
    if choice in ("auto", "none"):
        return list(tools) if choice == "auto" else [], False
    offered = [tool for tool in tools if choice in ("required", f"functions.{tool.name}")]
    if not offered:
        names = ", ".join(tool.name for tool in tools) or "there are none"
        raise GptOssError(
            f"tool_choice {choice!r} fits none of the tools ({names}): use auto, none, required or "
            "functions.NAME"
        )
    return offered, True


@functools.lru_cache(maxsize=128)
def _compiled(grammar: str, tokenizer: Tokenizer) -> CompiledGrammar:
    return CompiledGrammar(grammar, tokenizer)


def _arguments(tool: Tool, bound: bool) -> tuple[dict[str, Any], bool]:
    """The grammar of a tool's arguments, and whether it is that of its parameters."""
    what = f"tool {tool.name}"
    schema = _NOTHING if tool.parameters is None else tool.parameters
    if not bound:
        return {"json_schema": prepare(_ANY_OBJECT, what)}, True
    try:
        kind = schema.get("type", "object")
        if kind != "object":
            raise GptOssError(f"{what}: its parameters must be of type object, got {kind!r}")
        return _tried({"json_schema": prepare({"type": "object", **schema}, what)}, what), True
    except GptOssError:
        if tool.strict:
            raise
        return {"json_schema": prepare(_ANY_OBJECT, what)}, False


def _answer(structure: Structure) -> dict[str, Any]:
    if isinstance(structure, ResponseFormat):
        what = f"response format {structure.name}"
        return _tried({"json_schema": prepare(structure.schema, what)}, what)
    if isinstance(structure, Choice):
        texts = list(structure.options)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise GptOssError(f"choice: expected texts to choose from, got {texts!r:.60}")
        _check_size("choice", "".join(texts))
        return _tried({"lark_grammar": "start: " + " | ".join(map(_literal, texts))}, "choice")
    if isinstance(structure, Regex):
        _check_size("regex", structure.pattern)
        return _tried({"lark_grammar": f"start: {_regex(structure.pattern)}"}, "regex")
    if not isinstance(structure, Lark):
        raise GptOssError(f"response format: expected one of {Structure}, got {structure!r:.60}")
    _check_size("grammar", structure.grammar)
    rest = _QUOTED.sub('""', structure.grammar)
    if "<" in rest:
        raise GptOssError("grammar: tokens (<...>) are not supported: use text and regexes")
    if found := re.search(r"\[[^\]]*\b(stop|max_tokens|temperature)\b", rest):
        raise GptOssError(f"grammar: the attribute {found[1]} is not supported: remove it")
    if re.search(r"%llguidance\s*\{\s*[^}\s]", rest):
        raise GptOssError("grammar: options in %llguidance are not supported: leave it empty")
    return _tried({"lark_grammar": structure.grammar}, "grammar")


def _tried(part: dict[str, Any], what: str) -> dict[str, Any]:
    parts = [part]
    if "json_schema" in part:
        parts += [{"json_schema": schema} for schema in constrained(part["json_schema"])]
    try_grammars([json.dumps(part) for part in parts], what)
    return part


def _check_size(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise GptOssError(f"{what}: expected text, got {text!r:.60}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GptOssError(f"{what}: it is not Unicode: {error}") from None
    if len(text) > MOST_CHARACTERS:
        raise GptOssError(
            f"{what}: it has {len(text)} characters, at most {MOST_CHARACTERS} are taken: make it "
            "shorter"
        )


def _literal(text: str) -> str:
    """The text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _regex(pattern: str) -> str:
    """The pattern as a literal of a Lark grammar, alternatives held together."""
    inner = re.sub(
        r"\\.|/|\n", lambda m: {"/": r"\/", "\n": r"\n"}.get(m[0], m[0]), pattern, flags=re.S
    )
    return f"/(?:{inner})/"


def _layout(
    tokenizer: Tokenizer,
    names: Sequence[str],
    answer: str | None,
    typed: bool,
    parallel: bool,
    reasoning: bool,
    preamble: bool,
) -> str:
    """The Lark grammar of the messages; contents are in grammars of their own."""

    def token(name: str) -> str:
        return f"<[{tokenizer.special[name]}]>"

    channel, message = token("<|channel|>"), token("<|message|>")
    following = f'{token("<|end|>")} {token("<|start|>")} "assistant"'
    kinds = ['" "? ' + f'{token("<|constrain|>")} "json"', '" json"']
    rules = {"text": [_TEXT], "type": kinds}
    rules["thought"] = [
        f'{channel} "{name}" {message} text {following}'
        for name in ["analysis"] * reasoning + ["commentary"] * preamble
    ]
    rules["last"] = []
    if answer is not None:
        header = f'{channel} "final"' + " type?" * typed
        rules["last"].append(f"{header} {message} {answer} {token('<|return|>')}")
    if names:
        more = f" ({following} call)*" if parallel else ""
        rules["last"].append(f"call{more} {token('<|call|>')}")
        rules["call"] = []
        for number, name in enumerate(names):
            to, rest = f" to=functions.{name}", f"type? {message} @tool_{number}"
            rules["call"].append(f'"{to}" {channel} "commentary" {rest}')
            rules["call"].append(f'{channel} "commentary{to}" {rest}')
    rules["start"] = [f"thought{{0,{MOST_THOUGHTS}}} last" if rules["thought"] else "last"]
    return "\n".join(f"{name}: {' | '.join(parts)}" for name, parts in rules.items() if parts)
