"""Chat over a scripted model: history, the tool loop, effort, interruptions. The script stands in
for the weights."""

import dataclasses
import json
from typing import Annotated, Literal

import pytest
from fakes import ScriptedModel
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax.chat import Chat, Tool
from gptoss_jax.chat import messages as m
from gptoss_jax.chat.functions import call_function, tool_from_function
from gptoss_jax.chat.parse import Delta
from gptoss_jax.chat.session import Reply, ToolResult
from gptoss_jax.errors import GptOssError

DAY = "2026-01-01"
THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{}<|return|>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call_text(name, arguments):
    return (
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
    )


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def prompts(model):
    return [model.tokenizer.decode(prompt) for prompt in model.prompts]


def test_reply_has_its_parts():
    model = ScriptedModel(THINK + FINAL.format("hi"))
    chat = Chat(model, date=DAY)
    reply = chat.send("hello")
    assert (reply.final, reply.analysis, reply.finish_reason) == ("hi", "hm", "stop")
    assert reply.messages == [m.analysis("hm"), m.final("hi")]
    assert chat.history == [m.user("hello"), *reply.messages]
    assert reply.prompt_tokens == len(model.prompts[0])
    assert (
        reply.completion_tokens == 12
    )  # channel analysis message hm end start assistant, channel final message hi return
    assert reply.repairs == []


def test_the_model_gets_harmonys_stop_tokens():
    model = ScriptedModel(FINAL.format("hi"))
    Chat(model, date=DAY).send("hello")
    assert set(model.settings[0].stop_token_ids) == {200002, 200012, 199999}


def test_the_next_prompt_holds_the_answer_without_the_reasoning():
    model = ScriptedModel(THINK + FINAL.format("hi"), FINAL.format("yes"))
    chat = Chat(model, date=DAY)
    chat.send("hello")
    chat.send("more?")
    tail = prompts(model)[1].partition("<|start|>user")[2]
    assert tail == (
        "<|message|>hello<|end|><|start|>assistant<|channel|>final<|message|>hi<|end|>"
        "<|start|>user<|message|>more?<|end|><|start|>assistant"
    )


def test_effort_changes_between_turns():
    model = ScriptedModel(FINAL.format("1"), FINAL.format("2"))
    chat = Chat(model, reasoning_effort="low", date=DAY)
    chat.send("a")
    chat.reasoning_effort = "high"
    chat.send("b")
    assert ["Reasoning: low" in p for p in prompts(model)] == [True, False]
    assert "Reasoning: high" in prompts(model)[1]
    with pytest.raises(
        GptOssError, match=r"^unknown reasoning effort 'max': use low, medium or high$"
    ):
        chat.reasoning_effort = "max"
    assert chat.reasoning_effort == "high"


def test_a_function_is_run_and_its_result_fed_back():
    model = ScriptedModel(THINK + call_text("add", '{"a": 2, "b": 3}'), FINAL.format("5"))
    chat = Chat(model, tools=[add], date=DAY)
    reply = chat.send("2+3?")
    assert reply.final == "5"
    assert reply.messages[2] == m.result("add", "5")
    assert (
        "// Adds two numbers.\ntype add = (_: {\na: number,\nb: number,\n}) => any;"
        in prompts(model)[0]
    )
    # an unfinished tool loop keeps its reasoning
    assert prompts(model)[1].endswith(
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant "
        "to=functions.add<|channel|>commentary "
        '<|constrain|>json<|message|>{"a": 2, "b": 3}<|call|><|start|>functions.add '
        "to=assistant<|channel|>commentary"
        "<|message|>5<|end|><|start|>assistant"
    )


def test_failures_of_a_function_are_told_to_the_model():
    def divide(a: float, b: float) -> float:
        return a / b

    scripts = [
        '{"a": 1, "b": 0}',
        '{"a": 1',
        '{"a": 1}',
        "[1, 2]",
        '{"a": 1, "b": 2, "c": 3}',
        '{"a": "x", "b": 1}',
    ]
    model = ScriptedModel(
        *[call_text("divide", script) for script in scripts], FINAL.format("sorry")
    )
    reply = Chat(model, tools=[divide], date=DAY).send("1/0?")
    results = [message.content for message in reply.messages if message.role == "tool"]
    assert results[0] == "error: ZeroDivisionError: float division by zero"
    assert results[1].startswith("error: the arguments are not JSON (")
    assert results[2] == "error: b: Missing required argument"
    assert results[3].startswith("error: the arguments are not a JSON object")
    assert results[4] == "error: c: Unexpected keyword argument"
    assert results[5].startswith("error: a: Input should be a valid number")
    assert reply.final == "sorry"


def test_a_tool_that_was_not_enabled_never_runs():
    ran = []

    def secret() -> str:
        ran.append(1)
        return "x"

    model = ScriptedModel(
        call_text("secret", "{}"),
        "<|channel|>analysis to=python code<|message|>1+1<|call|>",
        "<|channel|>commentary to=functions.add.run<|message|>{}<|call|>",
        FINAL.format("no"),
    )
    reply = Chat(model, tools=[add], date=DAY).send("?")
    assert not ran
    assert [(x.name, x.content) for x in reply.messages if x.role == "tool"] == [
        ("functions.secret", "error: there is no tool functions.secret; the tools are add"),
        ("python", "error: there is no tool python; the tools are add"),
        ("functions.add.run", "error: there is no tool functions.add.run; the tools are add"),
    ]
    assert reply.final == "no"
    model = ScriptedModel(call_text("add", '{"a": 1, "b": 1}'), FINAL.format("2"))
    reply = Chat(model, date=DAY).send("?")
    assert (
        reply.messages[1].content
        == "error: there is no tool functions.add; there are no tools, answer without"
    )


def test_described_tools_are_handed_back():
    model = ScriptedModel(THINK + call_text("weather", '{"city": "Oslo"}'), FINAL.format("cold"))
    chat = Chat(model, tools=[WEATHER], date=DAY)
    reply = chat.send("Oslo?")
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.tool_calls
    assert (call.name, call.arguments, call.parsed) == (
        "weather",
        '{"city": "Oslo"}',
        {"city": "Oslo"},
    )
    with pytest.raises(GptOssError, match=r"calls of weather wait for results"):
        chat.send("hello?")
    with pytest.raises(GptOssError, match="expected results for the calls"):
        chat.send_tool_results({"other": 1})
    reply = chat.send_tool_results({call.id: {"celsius": -3}})
    assert (reply.final, reply.finish_reason, reply.tool_calls) == ("cold", "stop", [])
    assert chat.history[3] == m.result("weather", '{"celsius": -3}')
    assert "hm<|end|>" in prompts(model)[1]
    with pytest.raises(GptOssError, match="no tool call waits for a result"):
        chat.send_tool_results([1])


def test_results_in_order_for_parallel_calls_of_both_kinds():
    both = call_text("add", '{"a": 1, "b": 1}').replace("<|call|>", "<|end|><|start|>assistant")
    model = ScriptedModel(both + call_text("weather", "{}"), FINAL.format("ok"))
    chat = Chat(model, tools=[add, Tool("weather")], date=DAY)
    reply = chat.send("?")
    assert [call.name for call in reply.tool_calls] == ["weather"]
    assert [x.content for x in reply.messages if x.role == "tool"] == ["2"]
    assert chat.send_tool_results(["sun"]).final == "ok"


def test_endless_calls_end():
    model = ScriptedModel(*[call_text("add", '{"a": 1, "b": 1}')] * 3)
    reply = Chat(model, tools=[add], date=DAY, max_tool_rounds=2).send("?")
    assert reply.finish_reason == "tool_limit"
    assert len(reply.tool_calls) == 1
    assert sum(x.role == "tool" for x in reply.messages) == 2


def test_stream_is_the_reply_in_parts():
    model = ScriptedModel(
        THINK + call_text("add", '{"a": 1, "b": 2}'), FINAL.format("It is 3."), piece=1
    )
    events = list(Chat(model, tools=[add], date=DAY).stream("?"))
    reply = events[-1]
    assert isinstance(reply, Reply)
    assert [event.text for event in events if isinstance(event, ToolResult)] == ["3"]
    for channel, text in (
        ("final", "It is 3."),
        ("analysis", "hm"),
        ("commentary", '{"a": 1, "b": 2}'),
    ):
        assert (
            "".join(e.text for e in events if isinstance(e, Delta) and e.channel == channel) == text
        )


def test_a_cut_reply_says_so():
    model = ScriptedModel(THINK + FINAL.format("a long answer"))
    reply = Chat(model, date=DAY, max_new_tokens=11).send("?")
    assert (reply.final, reply.finish_reason) == ("a", "length")
    model = ScriptedModel(call_text("add", '{"a": 1, "b": 2}'))
    chat = Chat(model, tools=[add], date=DAY, max_new_tokens=12)
    reply = chat.send("?")
    assert (reply.finish_reason, reply.tool_calls, chat.history) == ("length", [], [m.user("?")])


def test_malformed_output_is_reported_not_raised():
    model = ScriptedModel(THINK + "I cannot help.<|return|>")
    reply = Chat(model, date=DAY).send("?")
    assert (reply.final, reply.repairs) == (
        "I cannot help.",
        ["<|return|> in a header", "text without header"],
    )


WORDS = [
    "assistant", "analysis", "final", "commentary", " to=", "functions.", "add",
    "python", " json", "{}", "/é",
    "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>",
]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=25).map("".join))
@example("functions. json<|start|>")
@example("functions.{}<|start|>")
@settings(max_examples=150, deadline=None)
def test_whatever_the_model_says_the_conversation_goes_on(output):
    model = ScriptedModel(output, output, FINAL.format("ok"), FINAL.format("ok"))
    chat = Chat(model, tools=[add], date=DAY, max_tool_rounds=1)
    chat.send("?")
    chat.reset() if chat._pending else None
    chat.send("and now?")
    assert model.tokenizer.decode(chat.prompt()).endswith("<|start|>assistant")


def test_an_interrupted_answer_is_kept_as_far_as_it_came():
    model = ScriptedModel(THINK + FINAL.format("one two three"), FINAL.format("ok"), piece=1)
    chat = Chat(model, date=DAY)
    for event in chat.stream("count"):
        if isinstance(event, Delta) and event.text == " two":
            break
    assert chat.history == [m.user("count"), m.analysis("hm"), m.final("one two")]
    chat.send("go on")
    assert "final<|message|>one two<|end|>" in prompts(model)[1]


def test_an_interruption_before_the_answer_undoes_the_turn():
    chat = Chat(ScriptedModel(THINK + FINAL.format("x"), piece=1), date=DAY)
    for event in chat.stream("count"):
        if isinstance(event, Delta):
            break
    assert chat.history == []


def test_an_error_of_the_model_leaves_the_history_alone():
    class TooLong(ScriptedModel):
        def stream(self, *args, **kwargs):
            raise GptOssError("too long")

    chat = Chat(TooLong(), date=DAY)
    with pytest.raises(GptOssError, match="too long"):
        chat.send("x")
    assert chat.history == []
    model = ScriptedModel(call_text("weather", "{}"), FINAL.format("ok"))
    chat = Chat(model, tools=[WEATHER], date=DAY)
    chat.send("x")
    chat.model = TooLong()
    with pytest.raises(GptOssError, match="too long"):
        chat.send_tool_results([1])
    chat.model = model
    assert chat.send_tool_results([1]).final == "ok"


def test_response_format_and_instructions_reach_the_prompt():
    model = ScriptedModel('<|channel|>final <|constrain|>json<|message|>{"a": 1}<|return|>')
    chat = Chat(model, date=DAY, instructions="Be brief.", response_format={"type": "object"})
    assert json.loads(chat.send("?").final) == {"a": 1}
    wanted = (
        "# Instructions\n\nBe brief.\n\n# Response Formats\n\n## response\n\n"
        + '{"type":"object"}<|end|>'
    )
    assert wanted in prompts(model)[0]


def test_messages_of_other_roles_may_be_sent():
    model = ScriptedModel(FINAL.format("ok"))
    Chat(model, date=DAY).send([{"role": "system", "content": "Be kind."}, m.user("hi")])
    assert "<|start|>developer<|message|># Instructions\n\nBe kind.<|end|>" in prompts(model)[0]


@pytest.mark.parametrize("message", ["", []])
def test_an_empty_message_is_refused(message):
    with pytest.raises(GptOssError, match=r"^the message is empty: write something$"):
        Chat(ScriptedModel(), date=DAY).send(message)


def test_schema_of_a_function():
    @dataclasses.dataclass
    class Place:
        city: str
        country: str = "no"

    def search(
        query: str,
        place: Place,
        kind: Literal["news", "web"] = "web",
        limit: Annotated[int | None, "unused"] = None,
        tags: list[str] = [],  # noqa: B006
    ) -> dict:
        """Searches.

        Really.

        Args:
            query: What to look for,
                in words.
            kind (str): Where.

        Returns:
            limit: not an argument
        """
        return {"q": query, "where": place.country}

    tool = tool_from_function(search)
    assert (tool.name, tool.description) == ("search", "Searches.\n\nReally.")
    properties = tool.parameters["properties"]
    assert properties["query"] == {"type": "string", "description": "What to look for, in words."}
    assert properties["kind"]["enum"] == ["news", "web"]
    assert "description" not in properties["limit"]
    assert tool.parameters["required"] == ["query", "place"]
    assert (
        call_function(search, '{"query": "é", "place": {"city": "Oslo"}}')
        == '{"q": "é", "where": "no"}'
    )


def test_functions_that_cannot_be_tools():
    async def later():
        pass

    def many(*args):
        pass

    with pytest.raises(GptOssError, match="tool later is a coroutine function"):
        tool_from_function(later)
    with pytest.raises(GptOssError, match=r"tool many: parameter \*args cannot be given by name"):
        tool_from_function(many)
    with pytest.raises(GptOssError, match="tool name '<lambda>' is not allowed"):
        tool_from_function(lambda: 1)
    with pytest.raises(GptOssError, match="two tools are called 'add'"):
        Chat(ScriptedModel(), tools=[add, Tool("add")])
