"""Structured output: what masks let through is valid, what is valid they let through, and what
cannot be promised is refused."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal

import jsonschema
import numpy as np
import pytest
from schemas import CONTROLS, NASTY, STRINGS, check, random_schema

from gptoss_jax.batching.requests import Busy
from gptoss_jax.chat import grammar_tokens, grammar_trial
from gptoss_jax.chat import messages as m
from gptoss_jax.chat.grammar import Choice, Lark, Regex, completion_grammar
from gptoss_jax.chat.parse import parse, well_formed
from gptoss_jax.chat.render import render_training
from gptoss_jax.errors import GptOssError
from gptoss_jax.hub import resolve
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()
TINY = load_tokenizer(resolve("gpt-oss-tiny"))
PARTS = re.compile(r"(<\|[a-z_0-9]+\|>)")
A, F, C = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "<|channel|>commentary"
E, S = "<|end|>", "<|start|>assistant"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = m.Tool("weather", "The weather.", CITY)
STRICT = m.Tool("weather", "The weather.", CITY, strict=True)
NOW = m.Tool("now", "The time.")
PERSON = m.ResponseFormat(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def ids_of(text, tokenizer=TINY):
    """Text with control tokens by name -> ids."""
    out = []
    for part in PARTS.split(text):
        out += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
    return out


def allowed(mask, tokenizer=TINY):
    """bool [V]."""
    words = np.full(-(-tokenizer.vocab_size // 32), 0xFFFFFFFF, np.uint32)
    mask.fill(words)
    return np.unpackbits(words.view(np.uint8), bitorder="little")[: tokenizer.vocab_size] == 1


def accepts(grammar, text, tokenizer=TINY, ended=True):
    """Is the text allowed token by token, by masks and by accept, and over (or not) after it?"""
    mask = grammar.mask()
    for token in ids_of(text, tokenizer):
        usual = allowed(mask, tokenizer)[token]
        fits = mask.accept(token)
        assert fits or not usual
        if not fits:
            return False
    stops = set(tokenizer.stop_ids)
    return (set(np.flatnonzero(allowed(mask, tokenizer))) == stops) == ended


class Driver:
    """A model that knows nothing: random logits at temperature 1.5, with some weight on what closes."""

    def __init__(self, tokenizer, seed, closing=None):
        if closing is None:  # one in ten, whatever the size of the vocabulary
            closing = 1.5 * (np.log(tokenizer.vocab_size) - 2)
        self.tokenizer, self.draw = tokenizer, np.random.default_rng(seed)
        self.noise = self.draw.gumbel(size=2 * tokenizer.vocab_size)
        self.logits = np.zeros(tokenizer.vocab_size)
        for text in ['"', "}", "]", '"}', "}}", "]}", ",", '":']:
            self.logits[tokenizer.encode(text)] = closing
        for name in ("<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>"):
            self.logits[tokenizer.special[name]] = 1.5 * closing

    def finish(self, grammar, prefix="", limit=400):
        """Ids of a completion that begins with the prefix, and whether it ended by itself."""
        mask = grammar.mask()
        ids = ids_of(prefix, self.tokenizer)
        assert all(mask.accept(token) for token in ids)
        for _ in range(limit):
            (able,) = np.nonzero(allowed(mask, self.tokenizer))
            assert able.size, (self.tokenizer.decode(ids), mask.error)
            start = self.draw.integers(self.tokenizer.vocab_size)
            scores = self.logits[able] / 1.5 + self.noise[start : start + able.size]
            ids.append(int(able[np.argmax(scores)]))
            assert mask.accept(ids[-1])
            if ids[-1] in self.tokenizer.stop_ids:
                return ids, True
        return ids, False


def run_schemas(tokenizer, seeds, limit):
    """Drives a random completion of each random schema: how many ended, were cut, were refused."""
    ended = cut = refused = 0
    driver = Driver(tokenizer, seeds[0])
    for seed in seeds:
        schema = random_schema(seed)
        try:
            grammar = completion_grammar(tokenizer, response_format=m.ResponseFormat(schema))
        except GptOssError:
            refused += 1
            continue
        ids, whole = driver.finish(grammar, F, limit)
        read = parse(ids, tokenizer)
        assert not read.repairs
        if whole:
            check(read.messages[-1].content, schema)
        ended, cut = ended + whole, cut + (not whole)
    return ended, cut, refused


@pytest.mark.parametrize(("tokenizer", "count"), [(TINY, 250), (FULL, 20)], ids=["tiny", "full"])
def test_random_schemas_hold(tokenizer, count):
    ended, cut, refused = run_schemas(tokenizer, range(10_000, 10_000 + count), 300)
    assert ended > 0.5 * count, (ended, cut, refused)
    assert refused < 0.35 * count


@pytest.mark.slow
def test_two_thousand_schemas_hold():
    ended, cut, refused = run_schemas(FULL, range(2000), 250)
    assert ended > 1000
    assert ended + cut + refused == 2000


@pytest.mark.parametrize("name", NASTY)
def test_nasty_schemas_hold(name):
    grammar = completion_grammar(TINY, response_format=m.ResponseFormat(NASTY[name]))
    driver, ended = Driver(TINY, 0), 0
    for _ in range(6):
        ids, whole = driver.finish(grammar, F, 700)
        if whole:
            ended += 1
            check(parse(ids, TINY).messages[-1].content, NASTY[name])
    assert ended >= 2


def first_accepted(seeds):
    """The grammar of two of the first of these random schemas that is not refused, or None."""
    for seed in seeds:
        schema = random_schema(seed)
        schema = {"type": "array", "items": schema, "minItems": 2, "$defs": schema.pop("$defs", {})}
        with contextlib.suppress(GptOssError):
            return completion_grammar(TINY, response_format=m.ResponseFormat(schema))


@pytest.mark.parametrize("start", range(20_000, 20_120, 10))
def test_no_dead_end_without_any_weight(start):
    grammar = first_accepted(range(start, start + 10))
    assert grammar is not None, "ten schemas in a row are refused"
    driver = Driver(TINY, start, closing=0.0)
    for _ in range(4):
        driver.finish(grammar, F, 150)


# what must be let through, and what must not, schema by schema
CASES = [
    ({"type": "integer"}, ["0", "-7", "123"], ["01", "1.0", "+1", "", "1 ", " 1", "0x1"]),
    ({"type": "number"}, ["0.5", "-1e-5", "3E+2"], [".5", "1.", "NaN", "Infinity", "--1"]),
    ({"type": "number", "exclusiveMaximum": 1}, ["0.99", "-5"], ["1", "1.0"]),
    ({"type": "string"}, ['""', '"日本"', '"a\\n"', '"\\u0001"'], ['"', '"a\n"', "'a'", '"\\x41"', '"\\ud83d"']),
    ({"type": "string", "maxLength": 2}, ['"日本"', '"😀😀"'], ['"abc"']),
    ({"type": "object"}, ["{}", '{"a":1}', '{"a": {"b": []}}', '{\n  "a": 1\n}'], ["{a:1}", '{"a":1,}', "[]", "{  }", '{"a":\n\n1}']),
    (PERSON.schema, ['{"name":"A","age":3}', '{"name": "A", "age": 3}'], ['{"age":3,"name":"A"}', '{"name":"A"}', '{"name":"A","age":3,"b":1}', '{"name":"A","age":"3"}']),
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, ['{"a":1,"b":"x"}'], ['{"a":1,"a":"x"}', '{"a":1,"\\u0061":"x"}']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2023-12-31"'], ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"', '"2023-13-01"', '"2023-1-1"']),
    ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59Z"', '"2024-01-01T00:00:00.5+01:00"'], ['"2024-01-01T00:00:60Z"', '"2024-01-01"', '"2024-01-01T00:00:00"']),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["null", "1"], ["nul", "1null", "true"]),
    ({"enum": ["a", "ab", 1, None]}, ['"a"', '"ab"', "1", "null"], ['"b"', '"abc"', "11", "a"]),
    ({"type": "integer", "multipleOf": 7, "minimum": -8, "maximum": 20}, ["-7", "0", "7", "14"], ["1", "21", "-14"]),
    ({"type": "integer", "minimum": -(2**63), "maximum": 2**63}, ["9007199254740992"], ["9223372036854775809"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_values_let_through(schema, good, bad):
    grammar = completion_grammar(TINY, response_format=m.ResponseFormat(schema))
    for text in good:
        check(text, schema)
        assert accepts(grammar, f"{F}{text}<|return|>"), text
    for text in bad:
        assert not accepts(grammar, f"{F}{text}<|return|>"), text


def test_numbers_keep_their_bounds():
    """Random intervals, and the numbers around their ends, in several spellings."""
    draw = random.Random(0)
    let = kept = 0
    for _ in range(120):
        digits, base = draw.randrange(4), draw.choice([0, 0, 1, -1, 5, -5, 99, 10**6, -(10**6)])
        low, high = sorted(
            round(
                base + draw.choice([-1, 1]) * draw.randrange(12) / 10 ** draw.randint(0, digits),
                digits,
            )
            for _ in range(2)
        )
        schema = {
            "type": "number",
            draw.choice(["minimum", "exclusiveMinimum"]): low,
            draw.choice(["maximum", "exclusiveMaximum"]): high,
        }
        if draw.random() < 0.3:
            schema.popitem()
        try:
            grammar = completion_grammar(TINY, response_format=m.ResponseFormat(schema))
        except GptOssError:
            assert high - low < 1e-3
            continue
        validator = jsonschema.Draft202012Validator(schema)
        for _ in range(25):
            near = Decimal(str(draw.choice([low, high]))) + Decimal(
                draw.randint(-12, 12)
            ) / 10 ** draw.randrange(5)
            text = format(near.normalize(), "f")
            text += draw.choice(["", "0" if "." in text else ".0"])
            mask = grammar.mask()
            taken = all(mask.accept(token) for token in ids_of(f"{F}{text}<|return|>"))
            valid = validator.is_valid(float(text))
            assert valid or not taken, (schema, text)
            let, kept = let + valid, kept + taken
    assert kept > 0.8 * let > 500


def agrees(grammar, language, tokenizer, walks, prefix=""):
    """Compares the mask with the language, a finite set of texts with control tokens as names: at
    many places on the way to its texts, a token is accepted if and only if some text goes on so,
    and allowed if it is accepted (where there is no choice of text: only if it is a usual one).

    Bytes are characters below 256 here, control tokens characters above.
    """
    names = {token: name for name, token in tokenizer.special.items()}
    symbol = {name: chr(256 + token) for token, name in names.items()}
    spelled = [
        "".join(symbol.get(part) or part.encode().decode("latin-1") for part in PARTS.split(text))
        for text in language
    ]
    pieces = [
        symbol[names[token]]
        if token in names
        else tokenizer.decode_bytes([token]).decode("latin-1")
        for token in range(tokenizer.vocab_size)
    ]
    draw, compared = np.random.default_rng(0), set()
    for _ in range(walks):
        mask, ids, done = grammar.mask(), ids_of(prefix, tokenizer), ""
        for token in ids:
            assert mask.accept(token)
        while done not in spelled:
            going = [text[len(done) :] for text in spelled if text.startswith(done)]
            expected = np.array([any(text.startswith(piece) for text in going) for piece in pieces])
            found = allowed(mask, tokenizer)
            wrong = found != expected
            if len({text[0] for text in going}) == 1:
                wrong = found & ~expected
                assert found.any()
            assert not wrong.any(), (done, [pieces[token] for token in np.flatnonzero(wrong)])
            compared.add(done)
            for token in {int(t) for t in draw.choice(np.flatnonzero(expected), 3)} | {
                int(t) for t in draw.integers(tokenizer.vocab_size, size=3)
            }:
                other = grammar.mask()
                assert all(other.accept(before) for before in ids)
                assert other.accept(token) == expected[token], (done, pieces[token])
            ids.append(int(draw.choice(np.flatnonzero(expected))))
            assert mask.accept(ids[-1])
            done += pieces[ids[-1]]
    return len(compared)


def spellings(value):
    """Every way in which the grammar may write a constant: control characters have several."""
    if not isinstance(value, str):
        return [json.dumps(value)]
    ways = []
    for character in value:
        short = json.dumps(character, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
        code = f"{ord(character):04x}"
        several = character < " " or character == "\x7f"
        ways.append({short, f"\\u{code}", f"\\u{code.upper()}"} if several else {short})
    return [f'"{"".join(way)}"' for way in itertools.product(*ways)]


FINITE = {
    "choice": Choice(["yes", "no", "yes and no", "日本", "日", "", 'say "x"\n', "a\\b", "\x01\x7f", "/", "<|end|>"[1:]]),
    "regex": Regex("a(b|cé){1,3}|x?/[0-9]"),
    "alternatives": Regex("ab|ac"),
    "newline": Regex("a\n[/]b"),
    "lark": Lark('start: word ("," word)? // two\nword: "foo" | /ba[rz]/ | "<"'),
    "enum": m.ResponseFormat({"enum": [*STRINGS[:-1], *CONTROLS, 1, None, True, 0.5]}),
}  # fmt: skip
LANGUAGE = {
    "choice": FINITE["choice"].options,
    "regex": ["a" + "".join(t) for n in (1, 2, 3) for t in itertools.product(["b", "cé"], repeat=n)]
    + [f"{x}/{d}" for x in ("", "x") for d in range(10)],
    "alternatives": ["ab", "ac"],
    "newline": ["a\n/b"],
    "lark": [",".join(t) for n in (1, 2) for t in itertools.product(["foo", "bar", "baz", "<"], repeat=n)],
    "enum": None,
}  # fmt: skip


@pytest.mark.parametrize("name", FINITE)
def test_masks_agree_with_brute_force(name):
    grammar = completion_grammar(TINY, response_format=FINITE[name])
    texts = LANGUAGE[name]
    if texts is None:
        texts = [text for value in FINITE[name].schema["enum"] for text in spellings(value)]
    assert agrees(grammar, [f"{text}<|return|>" for text in texts], TINY, 25, F) > 3


def test_the_header_agrees_with_brute_force():
    tools = [m.Tool("get", strict=True), m.Tool("get_all", strict=True), m.Tool("other")]
    types = ["", " <|constrain|>json", "<|constrain|>json", " json"]
    thoughts = [A, f"{C}<|message|>"]
    calls = [
        header
        for name in ("get", "get_all", "other")
        for kind in types
        for header in (
            f" to=functions.{name}{C}{kind}<|message|>",
            f"{C} to=functions.{name}{kind}<|message|>",
        )
    ]
    everything = completion_grammar(TINY, tools)
    assert agrees(everything, [*thoughts, *calls, F], TINY, 40) > 40
    forced = completion_grammar(TINY, tools, "required")
    assert agrees(forced, [*thoughts, *calls], TINY, 20) > 20
    after = f"{A}hm{E}{S}"
    assert agrees(forced, [*thoughts, *calls], TINY, 20, after) > 20
    named = completion_grammar(TINY, tools, "functions.get")
    assert (
        agrees(named, [*thoughts, *(c for c in calls if "get" in c and "all" not in c)], TINY, 20)
        > 10
    )
    bare = completion_grammar(TINY, tools, "required", reasoning=False)
    assert agrees(bare, [thoughts[1], *calls], TINY, 20) > 20
    answer = completion_grammar(TINY, response_format=PERSON)
    finals = [f"<|channel|>final{kind}<|message|>" for kind in types]
    assert agrees(answer, [A, *finals], TINY, 20) > 10
    word = completion_grammar(TINY, response_format=Regex("a"))
    assert agrees(word, [A, F], TINY, 10) > 5
    assert agrees(completion_grammar(TINY, tools, "none"), [A, F], TINY, 10) > 5


@pytest.mark.parametrize("tokenizer", [TINY, FULL], ids=["tiny", "full"])
def test_free_text_is_utf8_without_control_tokens(tokenizer):
    grammar = completion_grammar(tokenizer, [STRICT])
    starts = [
        b"",
        b"hello",
        "é".encode()[:1],
        "日".encode()[:1],
        "日".encode()[:2],
        "😀".encode()[:3],
        b"\xf4",
    ]

    def may_begin(data):
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return error.reason == "unexpected end of data"
        return True

    for head in (A, F, f"{C}<|message|>"):
        for start in starts:
            mask = grammar.mask()
            for token in [*ids_of(head, tokenizer), *tokenizer._encode_bytes(start)]:
                assert mask.accept(token)
            found = allowed(mask, tokenizer)
            for name, token in tokenizer.special.items():
                end = "<|return|>" if head == F else "<|end|>"
                assert found[token] == (name == end and start in (b"", b"hello")), name
            ordinary = range(0, tokenizer.vocab_size, 1 if tokenizer is TINY else 97)
            for token in set(ordinary) - set(tokenizer.special.values()):
                assert found[token] == may_begin(start + tokenizer.decode_bytes([token]))


JSON = '{"name": "Zoë 日本 😀", "age": 3}'
CALLED = '{"city": "Zürich"}'
RENDERED = [
    ([m.final(JSON)], dict(response_format=PERSON)),
    ([m.analysis("Hm, {} 日本"), m.final(JSON)], dict(response_format=PERSON)),
    ([m.Message("assistant", JSON, channel="final", content_type="<|constrain|>json")], dict(response_format=PERSON)),
    ([m.analysis("Hm"), m.Message("assistant", JSON, channel="final", content_type="json")], dict(response_format=PERSON)),
    ([m.final("yes")], dict(response_format=Choice(["yes", "no"]))),
    ([m.analysis("Hm"), m.final("Hello <|start|> you")], dict(tools=[STRICT])),
    ([m.call("weather", CALLED)], dict(tools=[STRICT, NOW])),
    ([m.analysis("Hm"), m.preamble("Let me see."), m.call("weather", CALLED)], dict(tools=[STRICT, NOW])),
    ([m.analysis("Hm"), m.call("now", "{}")], dict(tools=[WEATHER, NOW], tool_choice="required")),
    ([m.analysis("Hm"), m.call("weather", CALLED)], dict(tools=[WEATHER, NOW], tool_choice="functions.weather")),
    ([m.analysis("Hm"), m.call("weather", CALLED)], dict(tools=[WEATHER, NOW], response_format=PERSON)),
    ([m.analysis("Hm"), m.final(JSON)], dict(tools=[WEATHER, NOW], response_format=PERSON)),
    ([m.analysis("Hm"), m.final("no tools")], dict(tools=[WEATHER, NOW], tool_choice="none")),
]  # fmt: skip


@pytest.mark.parametrize("tokenizer", [TINY, FULL], ids=["tiny", "full"])
@pytest.mark.parametrize(("messages", "asked"), RENDERED)
def test_what_harmony_renders_is_accepted(tokenizer, messages, asked):
    rendered = render_training([m.user("Hi"), *messages], tokenizer)
    emitted = [i for i, own in zip(rendered.ids, rendered.emitted, strict=True) if own]
    mask = completion_grammar(tokenizer, **asked).mask()
    for token in emitted:
        assert allowed(mask, tokenizer)[token], tokenizer.decode([token])
        assert mask.accept(token)
    assert set(np.flatnonzero(allowed(mask, tokenizer))) == set(tokenizer.stop_ids)
    for token in (*tokenizer.stop_ids, tokenizer.encode("a")[0]):
        assert mask.accept(token) == (token in tokenizer.stop_ids)


def test_calls():
    strict = completion_grammar(TINY, [STRICT, NOW])
    before, after = f" to=functions.weather{C} <|constrain|>json", f"{C} to=functions.weather json"
    for header in (before, after, f"{C} to=functions.weather"):
        assert accepts(strict, f"{header}<|message|>{CALLED}<|call|>")
        assert not accepts(strict, f"{header}<|message|>{{}}<|call|>")
        assert not accepts(strict, f"{header}<|message|>{CALLED}<|return|>")
        assert not accepts(strict, f"{header}<|message|>{CALLED}<|end|>")
    assert accepts(strict, f"{F}free text<|return|>")
    assert not accepts(strict, f"{F}free text<|call|>")
    assert not accepts(strict, f" to=functions.other{C}<|message|>{{}}<|call|>")
    assert not accepts(strict, f" to=python{C}<|message|>{{}}<|call|>")
    assert accepts(strict, f' to=functions.now{C}<|message|>{{"any": 1}}<|call|>')  # not strict
    required = completion_grammar(TINY, [WEATHER, NOW], "required")
    assert accepts(
        required, f"{A}hm{E}{S}{C}<|message|>Wait.{E}{S}{before}<|message|>{CALLED}<|call|>"
    )
    assert accepts(required, f" to=functions.now{C}<|message|>{{}}<|call|>")
    assert not accepts(required, f' to=functions.now{C}<|message|>{{"any": 1}}<|call|>')
    assert not accepts(required, f"{F}free text<|return|>")
    one = f"{before}<|message|>{CALLED}"
    assert not accepts(required, f"{one}{E}{S}{one}<|call|>")
    several = completion_grammar(TINY, [WEATHER, NOW], "required", parallel=True)
    assert accepts(several, f"{one}{E}{S}{one}<|call|>")
    assert accepts(several, f"{one}<|call|>")
    named = completion_grammar(TINY, [WEATHER, NOW], "functions.now")
    assert not accepts(named, f"{one}<|call|>")


def test_thoughts_come_to_an_end():
    thought = f"{A}hm{E}{S}"
    for asked in ({"tools": [STRICT]}, {"response_format": Regex("a")}):
        grammar = completion_grammar(TINY, **asked)
        assert accepts(grammar, f"{thought * 8}{F}a<|return|>")
        assert not accepts(grammar, f"{thought * 9}{F}a<|return|>")


def test_random_calls_are_harmony():
    grammar = completion_grammar(TINY, [STRICT, NOW], "required")
    driver, ended = Driver(TINY, 3), 0
    for _ in range(12):
        ids, whole = driver.finish(grammar, limit=600)
        if whole:
            ended += 1
            read = parse(ids, TINY, ["weather", "now"])
            assert well_formed(ids, TINY)
            call = read.messages[-1]
            assert (read.stop, call.function in ("weather", "now")) == ("<|call|>", True)
            tool = STRICT if call.function == "weather" else NOW
            jsonschema.validate(json.loads(call.content), tool.parameters or {"maxProperties": 0})
    assert ended >= 4


def test_nothing_to_constrain():
    assert completion_grammar(TINY) is None
    assert completion_grammar(TINY, [WEATHER, NOW]) is None
    assert completion_grammar(TINY, tool_choice="none") is None
    assert completion_grammar(TINY, [WEATHER], "none") is not None


def test_tools_that_are_not_strict_may_have_what_is_not_supported():
    odd = m.Tool(
        "odd", "", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    )
    grammar = completion_grammar(TINY, [odd, WEATHER], "required")
    assert grammar.loose == ("odd",)
    assert accepts(grammar, f'{C} to=functions.odd<|message|>{{"b": [1, 1]}}<|call|>')
    assert not accepts(grammar, f"{C} to=functions.odd<|message|>[]<|call|>")
    with pytest.raises(GptOssError, match="tool odd: at #/properties/a: keyword 'uniqueItems'"):
        completion_grammar(TINY, [m.Tool("odd", "", odd.parameters, strict=True)])


def test_equal_grammars_are_compiled_once():
    first = completion_grammar(TINY, [STRICT], response_format=PERSON)
    again = completion_grammar(
        TINY, [STRICT], response_format=m.ResponseFormat(dict(PERSON.schema))
    )
    assert first.compiled is again.compiled
    assert first.compiled is not completion_grammar(TINY, [STRICT]).compiled
    one, two = first.mask(), first.mask()  # and followed each on its own
    assert one.accept(ids_of("<|channel|>")[0])
    assert not np.array_equal(allowed(one), allowed(two))


def test_a_mask_refuses_without_change():
    mask = completion_grammar(TINY, response_format=PERSON).mask()
    before = allowed(mask)
    assert not mask.accept(ids_of("x")[0])
    assert not mask.accept(TINY.special["<|return|>"])
    assert np.array_equal(allowed(mask), before)
    words = np.full(-(-TINY.vocab_size // 32) + 3, 7, np.uint32)
    mask.fill(words)
    assert not words[-3:].any()
    with pytest.raises(ValueError, match="uint32"):
        mask.fill(words.astype(np.int64))


def test_a_full_lexer_is_made_anew(monkeypatch):
    """llguidance's lexer keeps what it has seen, for all completions of a grammar, up to a limit."""
    pattern = Regex("(.*[ab].{9})+c.{10,60}")
    reference = completion_grammar(TINY, response_format=pattern)
    monkeypatch.setitem(grammar_tokens.LIMITS, "max_lexer_states", 1500)
    compiled = grammar_tokens.CompiledGrammar(reference.compiled._grammar, TINY)
    made = []
    monkeypatch.setattr(
        grammar_tokens.CompiledGrammar,
        "again",
        lambda self, tokens, do=grammar_tokens.CompiledGrammar.again: (
            made.append(1),
            do(self, tokens),
        )[1],
    )
    draw = np.random.default_rng(0)
    for _ in range(25):
        mask, other = grammar_tokens.CompletionMask(compiled, TINY), reference.mask()
        for token in ids_of(F):
            assert mask.accept(token)
            assert other.accept(token)
        for _ in range(60):
            able = allowed(mask)
            assert np.array_equal(able, allowed(other))
            token = int(draw.choice(np.flatnonzero(able)))
            assert mask.accept(token)
            assert other.accept(token)
            if token in TINY.stop_ids:
                break
    assert made


def test_a_mask_that_cannot_go_on_is_empty(monkeypatch):
    monkeypatch.setitem(grammar_tokens.LIMITS, "max_lexer_states", 60)
    grammar = completion_grammar(TINY, response_format=Regex("(.*[ab].{9})+c.{10,61}"))
    mask = grammar.mask()
    for token in ids_of(F):
        assert mask.accept(token)
    for _ in range(40):
        able = np.flatnonzero(allowed(mask))
        if not able.size:
            break
        assert mask.accept(able[0])
    assert not able.size
    assert "too many states" in mask.error
    assert not mask.accept(ids_of("a")[0])
    assert not allowed(mask).any()


OBJECT = {"type": "object"}
REFUSED = [
    ({"not": {}}, "at #: keyword 'not' is not supported"),
    ({**OBJECT, "properties": {"a": {"if": {}, "then": {}}}}, "at #/properties/a: keyword 'if'"),
    ({"type": "array", "uniqueItems": True}, "keyword 'uniqueItems'"),
    ({"type": "string", "format": "regex"}, "format 'regex' is not supported"),
    ({"type": "string", "format": "unknown"}, "format 'unknown' is not supported"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "(a)\\1"}, "backreferences are not supported"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"type": "strnig"}, "Invalid type: strnig"),
    ({"$ref": "#/$defs/a"}, "leads nowhere"),
    ({"$ref": "http://localhost/x"}, "use #/\\$defs/NAME"),
    ({"$ref": "#"}, "only an endless value|refers to itself"),
    ({**OBJECT, "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "only an endless value"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers to itself"),
    ({**OBJECT, "minProperties": 3}, "minProperties 3 is not supported"),
    ({"enum": []}, "anyOf is empty"),
    ({"const": 2**53 + 1}, "is not exact"),
    ({"const": -(2**63)}, "is not exact"),
    ({"enum": [1, 0.09082778693718753]}, "is not exact"),
    ({"const": 123.45678901234568}, "is not exact"),
    ({"const": 1e22}, "is not exact"),
    ({"const": [{"a": 1.0095404089341e-10}]}, "is not exact"),
    ({"minimum": 2**60, "type": "integer"}, "beyond 2\\*\\*53"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum \\(3\\) is greater than maximum"),
    ({"type": "number", "multipleOf": 0.5, "minimum": 0.001, "maximum": 0.501}, "dead end"),
    (
        # where a random walk does not come
        {**OBJECT, "properties": {"a": {"type": "string", "minLength": 500}, "b": {"type": "string", "pattern": "^\x01$"}}, "required": ["a", "b"]},
        "dead end",
    ),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported"),
    ({"items": [{}]}, "use prefixItems"),
    ({"properties": []}, "properties must be an object"),
    ({"a": object()}, "is not JSON"),
    ({"a": float("nan")}, "is not JSON"),
    ({"const": "\ud800"}, "is not JSON"),
    ({**OBJECT, "properties": {"a": {"const": "\x01"}}}, "character '\\\\x01' in const or enum"),
    ({"description": "x" * 300_000}, "at most 262144"),
    ({**OBJECT, "properties": {f"p{n}": {} for n in range(1001)}}, "more than 1000 optional"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_schemas_refused(schema, message):
    with pytest.raises(GptOssError, match=message) as caught:
        completion_grammar(TINY, response_format=m.ResponseFormat(schema))
    assert str(caught.value).startswith("response format response: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Regex("("), "regex: .*unclosed group"),
        (Regex("(?<=a)b"), "regex: .*look-around"),
        (Regex("a" * 70_000), "regex: it has 70000 characters"),
        (Choice([]), "choice: expected texts"),
        (Choice(["a", 1]), "choice: expected texts"),
        (Lark("start: <|return|>"), "grammar: tokens"),
        (Lark("start: <[5]>"), "grammar: tokens"),
        (Lark('start: "a" <[*]> /b/'), "grammar: tokens"),
        (Lark('start: a\na[max_tokens=3]: /b*/'), "max_tokens is not supported"),
        (Lark('%llguidance {"no_forcing": true}\nstart: "a"'), "options in %llguidance"),
        (Lark('begin: "a"'), "grammar: no start rule"),
        (Lark("start: @answer"), "unknown grammar"),
        (Lark("start: start"), "dead end"),
        (Lark('start: a "b"'), 'unknown name: "a"'),
        (Lark('start: "\ud800"'), "not Unicode"),
    ],
)  # fmt: skip
def test_structures_refused(structure, message):
    with pytest.raises(GptOssError, match=message):
        completion_grammar(TINY, response_format=structure)


def test_tool_choices_refused():
    with pytest.raises(GptOssError, match="fits none of the tools \\(weather, now\\)"):
        completion_grammar(TINY, [WEATHER, NOW], "functions.other")
    with pytest.raises(GptOssError, match="there are none"):
        completion_grammar(TINY, [], "required")
    with pytest.raises(GptOssError, match="must be of type object"):
        completion_grammar(TINY, [m.Tool("a", "", {"type": "array"}, strict=True)])


def rules(count, text, last='"a"'):
    return Lark(
        "\n".join(
            ["start: a0", *(text.format(n, n + 1) for n in range(count)), f"a{count}: {last}"]
        )
    )


def bomb(key, levels=30):
    defs = {
        f"d{n}": {key: [{"$ref": f"#/$defs/d{n - 1}"}, {"$ref": f"#/$defs/d{n - 1}", "title": "x"}]}
        for n in range(1, levels)
    }
    defs["d0"] = {"type": "object", "properties": {"a": {"type": "string"}}}
    return m.ResponseFormat({"$ref": f"#/$defs/d{levels - 1}", "$defs": defs})


# each takes seconds, gigabytes or the whole process where nothing stops it; None: it is cheap after all
COSTLY = {
    "rules in a chain": (rules(5000, "a{}: a{}"), "more than 1.5 s"),
    "rules in a chain, too deep for a small stack": (rules(1500, "a{}: a{}"), "more than 1.5 s"),
    "terminals in a chain": (Lark(rules(5000, "a{}: a{}").grammar.replace("a", "A").replace("stArt", "start")), "more than 1.5 s"),
    "doubling rules": (rules(40, "a{}: a{} a{}".replace("{} a{}", "{1} a{1}", 1).replace("{}", "{0}", 1)), "Too many items"),
    "doubling terminals": (Lark("start: A0\n" + "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(40)) + '\nA40: "a"'), "too big"),
    "parentheses": (Lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deeply nested"),
    "a constant in Lark": (Lark('start: %json {"const": -9223372036854775808}'), "more than 1.5 s"),
    "a billion letters": (Lark('start: "a"{1000000000}'), "Too many items"),
    "groups": (Regex("(" * 5000 + "a" + ")" * 5000), "exceeds the nesting limit|nest"),
    "nested repetitions": (Regex("((a{0,100}){0,100}){0,100}"), None),
    "ambiguous repetition": (Regex("(x+x+)+y"), None),
    "a large difference": (Lark("start: A\nA: " + " & ".join(f"/(?s:.*){c}(?s:.*)/" for c in "abcdefghijklmnopqrstuvwxyz")), "too many expressions"),
    "a pattern that remembers": (m.ResponseFormat({"type": "string", "pattern": "^(.*[ab].{25})+c$", "maxLength": 1000}), "Unable to determine"),
    "multiples of a prime": (m.ResponseFormat({"type": "integer", "multipleOf": 999983}), "more than 1.5 s"),
    "anyOf doubled": (bomb("anyOf"), None),
    "allOf doubled": (bomb("allOf"), None),
    "references in a chain": (m.ResponseFormat({"$ref": "#/$defs/d0", "$defs": {**{f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(5000)}, "d5000": {}}}), "nested deeper|more than 1.5 s"),
    "schemas in schemas": (m.ResponseFormat(json.loads('{"items":' * 400 + "{}" + "}" * 400)), "nested deeper"),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_costly_ones_are_refused_in_time(name):
    structure, message = COSTLY[name]
    wall, cpu = time.monotonic(), time.process_time()
    if message is None:
        Driver(TINY, 0).finish(completion_grammar(TINY, response_format=structure), F, 50)
    else:
        with pytest.raises(GptOssError, match=message):
            completion_grammar(TINY, response_format=structure)
    assert time.process_time() - cpu < 2  # of ours; what the other process may use, it enforces
    assert time.monotonic() - wall < grammar_trial.PATIENCE


def test_time_is_limited_whatever_signals_are_blocked():
    """Threads of a server block signals, and who they start inherits that."""
    grammar_trial._close()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        with pytest.raises(GptOssError, match=r"more than 1\.5 s"):
            completion_grammar(
                TINY, response_format=m.ResponseFormat({"type": "integer", "multipleOf": 999979})
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_process_that_tries_is_light():
    code = "import sys, gptoss_jax.chat.grammar_trial as g; print(g.try_here('{\"json_schema\": {}}'), sorted({'jax', 'numpy', 'tiktoken'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == " []\n"


def test_without_llguidance_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GptOssError, match=r"pip install 'gptoss_jax\[serve\]'"):
        completion_grammar(TINY, response_format=Choice(["a"]))


def test_a_busy_machine_says_so(monkeypatch):
    grammar_trial._start()
    os.kill(grammar_trial._child.pid, signal.SIGSTOP)  # else it may answer in no time
    monkeypatch.setattr(grammar_trial, "PATIENCE", 0.0)
    with pytest.raises(Busy, match="try again later"):
        completion_grammar(TINY, response_format=Choice(["late"]))
    monkeypatch.undo()
    completion_grammar(TINY, response_format=Choice(["late"]))


def test_the_process_that_tries_is_replaced():
    completion_grammar(TINY, response_format=Choice(["one"]))
    first = grammar_trial._child
    first.kill()
    first.wait()
    completion_grammar(TINY, response_format=Choice(["two"]))
    assert grammar_trial._child is not first
    with pytest.raises(GptOssError, match=r"more than 1\.5 s"):
        completion_grammar(TINY, response_format=rules(5001, "a{}: a{}"))
    completion_grammar(TINY, response_format=Choice(["three"]))
