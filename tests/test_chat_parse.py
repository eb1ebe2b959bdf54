"""The tolerant parser: the corpus of malformed outputs case by case, openai-harmony's own parser on
good ones."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.chat import messages as m
from gptoss_jax.chat.parse import Delta, MessageEnd, MessageStart, Parser, Stop, parse, well_formed
from gptoss_jax.chat.render import harmony, render, render_training
from gptoss_jax.tokenizer import HARMONY_SPECIALS, kept_ids, load_tokenizer, write_kept

FULL = load_tokenizer()
PARTS = re.compile(r"(<\|[a-z_0-9]+\|>)")
CALL = "functions.calc"


def tokens(text, tokenizer=FULL):
    """Text with control tokens by name -> ids."""
    out = []
    for part in PARTS.split(text):
        out += [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
    return out


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """The smallest vocabulary: 256 bytes and the control tokens, so every character beyond ASCII is
    split."""
    folder = tmp_path_factory.mktemp("bytes")
    write_kept(folder / "kept_tokens.txt", kept_ids([]))
    return load_tokenizer(folder)


def short(messages):
    return [(x.channel, x.recipient, x.content) for x in messages]


F = "<|channel|>final<|message|>"
A = "<|channel|>analysis<|message|>"
E, S, R, C = "<|end|>", "<|start|>assistant", "<|return|>", "<|call|>"
THOUGHT, ANSWER = ("analysis", None, "hm"), ("final", None, "hi")
CALLED = ("commentary", CALL, '{"a":1}')
ARGS = '<|message|>{"a":1}'

# (serving.md's list, items c.1, c.2 and a.8) output, messages, stop, what was mended
CORPUS = [
    ("end, then return", f"{A}hm{E}{S}{F}hi{E}{R}", [THOUGHT, ANSWER], R, ["stop after <|end|>"]),
    ("double end", f"{A}hm{E}{E}{S}{F}hi{R}", [THOUGHT, ANSWER], R, ["repeated <|end|>"]),
    ("double start", f"{A}hm{E}<|start|>{S}{F}hi{R}", [THOUGHT, ANSWER], R, ["repeated <|start|>"]),
    ("stray text before start", f"{A}hm{E} so\n{S}{F}hi{R}", [THOUGHT, ANSWER], R, ["stray text"]),
    ("stray space before start", f"{A}hm{E}\n{S}{F}hi{R}", [THOUGHT, ANSWER], R, []),
    ("stray text is the answer", f"{A}hm{E}hi{R}", [THOUGHT, ANSWER], R, None),
    ("stray text after the answer", f"{F}hi{E}more words{R}", [ANSWER], R, ["stray text"]),
    ("no start", f"{A}hm{E}{F}hi{R}", [THOUGHT, ANSWER], R, ["missing <|start|>"]),
    (
        "role but no start",
        f"{A}hm{E}assistant{F}hi{R}",
        [THOUGHT, ANSWER],
        R,
        ["missing <|start|>"],
    ),
    ("no end", f"{A}hm{F}hi{R}", [THOUGHT, ANSWER], R, None),
    ("no end, but start", f"{A}hm{S}{F}hi{R}", [THOUGHT, ANSWER], R, ["<|start|> inside content"]),
    ("message twice", f"{F}<|message|>hi{R}", [ANSWER], R, ["<|message|> inside content"]),
    ("reserved token inside", f"{F}h<|reserved_200013|>i{R}", [ANSWER], R, None),
    ("constrain inside", f"{F}h<|constrain|>i{R}", [ANSWER], R, None),
    ("empty channel", f"<|channel|><|message|>hi{R}", [ANSWER], R, ["channel"]),
    ("no channel", f"<|message|>hi{R}", [ANSWER], R, ["channel"]),
    (
        "final without message",
        f'<|channel|>final {{"a":1}}{R}',
        [("final", None, '{"a":1}')],
        R,
        None,
    ),
    (
        "final json without message",
        f'<|channel|>final json{{"a":1}}{R}',
        [("final", None, '{"a":1}')],
        R,
        None,
    ),
    (
        "final constrained without message",
        f"<|channel|>final <|constrain|>json[1]{R}",
        [("final", None, "[1]")],
        R,
        None,
    ),
    (
        "analysis without message",
        f"<|channel|>analysis hm{E}{S}{F}hi{R}",
        [THOUGHT, ANSWER],
        R,
        None,
    ),
    ("channel alone", f"<|channel|>final{R}", [], R, None),
    ("refusal alone", f"I'm sorry, I can't.{R}", [("final", None, "I'm sorry, I can't.")], R, None),
    (
        "refusal, then header",
        f"I'm sorry.{E}{S}{F}hi{R}",
        [("final", None, "I'm sorry."), ANSWER],
        R,
        ["text without header"],
    ),
    (
        "refusal after start",
        f"{A}hm{E}{S}I'm sorry.{R}",
        [THOUGHT, ("final", None, "I'm sorry.")],
        R,
        None,
    ),
    (
        "refusal before channel",
        f"I'm sorry.{F}hi{R}",
        [("final", None, "I'm sorry."), ANSWER],
        R,
        None,
    ),
    ("one word", f"42{R}", [("final", None, "42")], R, None),
    ("role alone", f"{A}hm{E}{S}{R}", [THOUGHT], R, None),
    (
        "commentary?",
        f"<|channel|>commentary?<|message|>hi{E}{S}{F}hi{R}",
        [("commentary", None, "hi"), ANSWER],
        R,
        None,
    ),
    ("comment", f"<|channel|>comment to={CALL}{ARGS}{C}", [CALLED], C, ["channel"]),
    (
        "thinking",
        f"<|channel|>thinking<|message|>hm{E}{S}{F}hi{R}",
        [THOUGHT, ANSWER],
        R,
        ["channel"],
    ),
    ("unknown channel", f"<|channel|>reply<|message|>hi{R}", [ANSWER], R, ["channel"]),
    (
        "channel in the role",
        f"{A}hm{E}{S}final<|message|>hi{R}",
        [THOUGHT, ANSWER],
        R,
        ["channel without marker"],
    ),
    (
        "to=assistant, two channels",
        f"<|channel|>commentary to=assistant<|channel|>commentary<|message|>hi{E}{S}{F}hi{R}",
        [("commentary", None, "hi"), ANSWER],
        R,
        ["repeated channel", "recipient"],
    ),
    ("recipient in the channel", f"<|channel|>commentary to={CALL}{ARGS}{C}", [CALLED], C, []),
    ("recipient in the role", f" to={CALL}<|channel|>commentary{ARGS}{C}", [CALLED], C, []),
    (
        "recipient without to=",
        f"{CALL}<|channel|>commentary{ARGS}{C}",
        [CALLED],
        C,
        ["recipient without to="],
    ),
    ("bare recipient", f"<|channel|>commentary to=calc{ARGS}{C}", [CALLED], C, ["recipient"]),
    ("function.", f"<|channel|>commentary to=function.calc{ARGS}{C}", [CALLED], C, ["recipient"]),
    (
        "twice functions.",
        f"<|channel|>commentary to=functions.{CALL}{ARGS}{C}",
        [CALLED],
        C,
        ["recipient"],
    ),
    (
        "dotted recipient",
        f"<|channel|>commentary to=functions.a.b{ARGS}{C}",
        [("commentary", "functions.a.b", '{"a":1}')],
        C,
        [],
    ),
    (
        "python",
        f"<|channel|>analysis to=python code<|message|>1+1{C}",
        [("analysis", "python", "1+1")],
        C,
        [],
    ),
    (
        "browser",
        f"<|channel|>analysis to=browser.open{ARGS}{C}",
        [("analysis", "browser.open", '{"a":1}')],
        C,
        [],
    ),
    ("call on analysis", f"<|channel|>analysis to={CALL}{ARGS}{C}", [CALLED], C, ["channel"]),
    ("call on final", f"<|channel|>final to={CALL}{ARGS}{C}", [CALLED], C, ["channel"]),
    ("call without channel", f" to={CALL}{ARGS}{C}", [CALLED], C, ["channel"]),
    ("call ends with return", f"<|channel|>commentary to={CALL}{ARGS}{R}", [CALLED], R, []),
    (
        "call ends with end",
        f"<|channel|>commentary to={CALL}{ARGS}{E}{S}{F}hi{R}",
        [CALLED, ANSWER],
        R,
        [],
    ),
    (
        "call without message",
        f"<|channel|>commentary to=functions.now{C}",
        [("commentary", "functions.now", "")],
        C,
        None,
    ),
    ("call header ends with return", f"<|channel|>commentary to=functions.now{R}", [], R, None),
    (
        "code, not json",
        f"<|channel|>commentary to={CALL} code<|message|>1+1{C}",
        [("commentary", CALL, "1+1")],
        C,
        [],
    ),
    (
        "other role",
        f"{F}hi{E}<|start|>user<|message|>ok{E}{S}{F}2{R}",
        [ANSWER, ("final", None, "2")],
        R,
        None,
    ),
    (
        "invented result",
        f"<|channel|>commentary to={CALL}{ARGS}{E}<|start|>{CALL} "
        f"to=assistant<|channel|>commentary<|message|>9{E}"
        f"{S}{F}hi{R}",
        [CALLED, ANSWER],
        R,
        ["message of another role"],
    ),
    ("return in a header", f"{A}hm{E}{S}<|channel|>fi{R}", [THOUGHT], R, None),
    ("endoftext", f"{A}hm{E}{S}{F}hi<|endoftext|>", [THOUGHT, ANSWER], "<|endoftext|>", []),
    (
        "endoftext in a header",
        f"{A}hm{E}{S}<|channel|><|endoftext|>",
        [THOUGHT],
        "<|endoftext|>",
        None,
    ),
    ("cut in content", f"{A}hm", [THOUGHT], None, []),
    ("cut in a header", f"{A}hm{E}{S}<|channel|>fin", [THOUGHT], None, None),
    ("cut in a recipient", "<|channel|>commentary to=functions.ca", [], None, None),
    ("nothing", "", [], None, []),
    ("stop at once", R, [], R, None),
    ("text after the stop", f"{F}hi{R}more", [ANSWER], R, ["token after the stop"]),
    (
        "long header",
        f"<|channel|>final {'x ' * 200}{R}",
        [("final", None, "x " * 200)],
        R,
        ["header too long"],
    ),
    (
        "long refusal",
        f"{'No way. ' * 50}{R}",
        [("final", None, "No way. " * 50)],
        R,
        ["header too long"],
    ),
]


@pytest.mark.parametrize(
    ("name", "text", "expected", "stop", "repairs"), CORPUS, ids=[case[0] for case in CORPUS]
)
def test_malformed_output_has_its_outcome(name, text, expected, stop, repairs, bytewise):
    for tokenizer in (FULL, bytewise):
        if "reserved" in text and tokenizer is bytewise:
            continue
        ids = tokens(text, tokenizer)
        got = parse(ids, tokenizer, functions=["calc"])
        assert short(got.messages) == expected
        assert got.stop == stop
        if repairs is None:
            assert got.repairs or stop is None
        else:
            assert got.repairs == repairs
        if repairs:
            assert not well_formed(ids, tokenizer)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (f"<|channel|>commentary to={CALL} <|constrain|>json", "<|constrain|>json"),
        (f"<|channel|>commentary to={CALL}<|constrain|>json", "<|constrain|>json"),
        (f"<|channel|>commentary <|constrain|>json to={CALL}", "<|constrain|>json"),
        (f"<|channel|>commentary<|constrain|> json to={CALL}", "<|constrain|>json"),
        (f" to={CALL}<|channel|>commentary <|constrain|>json", "<|constrain|>json"),
        (f"<|channel|>commentary to={CALL} json", "json"),
        (f"<|channel|>commentary to={CALL} code", "code"),
        (f"<|channel|>commentary json to={CALL}", "json"),
        (f"<|channel|>commentary to={CALL}", None),
    ],
)
def test_content_type_in_every_spelling(header, kind):
    (message,) = parse(tokens(f"{header}{ARGS}{C}"), FULL).messages
    assert (message.channel, message.recipient, message.content) == CALLED
    assert message.content_type == kind


def test_the_text_of_a_control_token_stays_text():
    ids = tokens(F) + FULL.encode(f"a {E}{S}<|return|> b") + tokens(R)
    assert short(parse(ids, FULL).messages) == [("final", None, f"a {E}{S}<|return|> b")]
    assert well_formed(ids, FULL)


def test_constrained_final_is_no_call():
    (message,) = parse(tokens(f"<|channel|>final <|constrain|>json{ARGS}{R}"), FULL).messages
    assert (message.recipient, message.content_type) == (None, "<|constrain|>json")


def test_a_function_may_be_called_like_a_builtin():
    ids = tokens(f"<|channel|>commentary to=python{ARGS}{C}")
    assert parse(ids, FULL, functions=["python"]).messages[0].recipient == "functions.python"
    assert parse(ids, FULL).messages[0].recipient == "python"


def test_characters_split_over_tokens_come_whole(bytewise):
    text = "né 🧮 日本"
    parser = Parser(bytewise)
    deltas = []
    for token in tokens(f"{F}{text}{R}", bytewise):
        deltas += [event.text for event in parser.feed(token) if isinstance(event, Delta)]
    assert deltas == list(text)
    half = tokens(F, bytewise) + bytewise.encode("é")[:1] + tokens(f"{R}", bytewise)
    assert short(parse(half, bytewise).messages) == [("final", None, "\ufffd")]
    split = bytewise.encode("é")
    between = (
        tokens(A, bytewise)
        + split[:1]
        + tokens(f"{E}{S}{F}", bytewise)
        + split[1:]
        + tokens(R, bytewise)
    )
    assert [x.content for x in parse(between, bytewise).messages] == ["\ufffd", "\ufffd"]


def test_events_in_order():
    parser = Parser(FULL)
    events = [event for token in tokens(f"{A}hm{E}{S}{F}a b") for event in parser.feed(token)]
    assert parser.channel == "final"
    events += parser.close()
    assert events == [
        MessageStart("analysis", None, None),
        Delta("analysis", None, "hm"),
        MessageEnd(m.analysis("hm"), complete=True),
        MessageStart("final", None, None),
        Delta("final", None, "a"),
        Delta("final", None, " b"),
        MessageEnd(m.final("a b"), complete=False),
        Stop(None),
    ]
    assert parser.close() == []


CONTROL = [FULL.special[name] for name in HARMONY_SPECIALS] + [FULL.special["<|reserved_200013|>"]]
WORDS = [
    token
    for text in (
        " assistant",
        "assistant",
        "analysis",
        "final",
        "commentary",
        " to",
        "=functions",
        ".calc",
        "{",
        "user",
    )
    for token in FULL.encode(text)
]
anything = st.lists(
    st.one_of(st.sampled_from(CONTROL), st.sampled_from(WORDS), st.integers(-5, 201_100)),
    max_size=40,
)


@given(anything)
@settings(max_examples=400, deadline=None)
def test_never_raises_and_events_agree_with_messages(ids):
    parser = Parser(FULL, ["calc"])
    events = [event for token in ids for event in parser.feed(token)] + parser.close()
    ended = [event.message for event in events if isinstance(event, MessageEnd)]
    assert ended == parser.messages
    assert isinstance(events[-1], Stop) or any(isinstance(e, Stop) for e in events)
    assert sum(isinstance(event, Stop) for event in events) == 1
    text, started = "", False
    for event in events:
        if isinstance(event, MessageStart):
            assert not started
            text, started = "", True
        elif isinstance(event, Delta):
            assert started
            assert event.text
            text += event.text
        elif isinstance(event, MessageEnd):
            assert started
            assert text == event.message.content
            assert event.message.channel in m.CHANNELS
            started = False


names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
texts = st.one_of(text, st.sampled_from(list(HARMONY_SPECIALS)).map(lambda s: f"a{s}b"))
thoughts = st.lists(st.one_of(texts.map(m.analysis), texts.map(m.preamble)), max_size=3)
calls = st.builds(m.call, names, st.dictionaries(texts, texts, max_size=2))
turns = st.tuples(thoughts, st.one_of(calls, texts.map(m.final))).map(
    lambda pair: [*pair[0], pair[1]]
)


def emitted(turn, tokenizer):
    rendered = render_training([m.user("?"), *turn], tokenizer, m.ChatSettings(date="2026-01-01"))
    return [token for token, mine in zip(rendered.ids, rendered.emitted, strict=True) if mine]


@given(turns)
@settings(max_examples=150, deadline=None)
def test_good_output_agrees_with_openai_harmony(turn):
    ids = emitted(turn, FULL)
    got = parse(ids, FULL)
    theirs = harmony().parse_messages_from_completion_tokens(ids, _assistant())
    assert got.repairs == []
    assert got.messages == turn
    assert [(x.channel, x.recipient, x.content_type, x.content[0].text) for x in theirs] == [
        (x.channel, x.recipient, x.content_type, x.content) for x in got.messages
    ]
    assert well_formed(ids, FULL)
    assert not well_formed(ids[:-1], FULL)
    assert not well_formed([*ids, *ids], FULL)


@given(turns, st.data())
@settings(max_examples=150, deadline=None)
def test_one_wrong_token_is_seen_where_the_library_sees_it(turn, data):
    ids = emitted(turn, FULL)
    at = data.draw(st.integers(0, len(ids) - 1))
    new = data.draw(st.lists(st.sampled_from(CONTROL + WORDS), max_size=2))
    ids[at : at + 1] = new
    if not well_formed(ids, FULL):
        return
    theirs = harmony().parse_messages_from_completion_tokens(ids, _assistant())
    assert [x.content[0].text for x in theirs] == [x.content for x in parse(ids, FULL).messages]


def _assistant():
    from openai_harmony import Role

    return Role.ASSISTANT


@given(turns)
@settings(max_examples=50, deadline=None)
def test_good_output_of_a_pruned_vocabulary(bytewise, turn):
    ids = emitted(turn, bytewise)
    assert parse(ids, bytewise).messages == turn
    assert well_formed(ids, bytewise)


@pytest.mark.parametrize(
    "text",
    [
        f"{F}hi{E}",  # ends on end
        f"{F}hi",
        f"{A}hm{R}",  # no answer
        f"<|channel|>commentary<|message|>hi{R}",
        f"<|channel|>commentary to={CALL}{ARGS}{R}",  # call ends with return
        f"{F}hi{C}",
        f"<|channel|>analysis to={CALL}{ARGS}{C}",
        f"<|channel|>comment<|message|>hi{R}",
        f"{F}hi{R}{R}",
        f"{F}h<|channel|>i{R}",
        f"<|channel|>commentary to=calc{ARGS}{C}",
        f"<|channel|>final words<|message|>hi{R}",
        f"{A}hm{E}<|start|>user{F}hi{R}",
        "",
    ],
)
def test_not_well_formed(text):
    assert not well_formed(tokens(text), FULL)


def test_history_of_a_parsed_turn_renders_to_the_same_tokens():
    turn = [m.analysis("need a tool"), m.call("calc", json.dumps({"a": "<|end|>"}))]
    ids = emitted(turn, FULL)
    chat = m.ChatSettings(date="2026-01-01")
    prompt = render([m.user("?")], FULL, chat)
    again = render([m.user("?"), *parse(ids, FULL).messages], FULL, chat)
    assert again[: len(prompt) + len(ids)] == prompt + ids
