"""What /v1/responses does not honour is refused by name; null is absent."""

import openai
import pytest
from responding import WEATHER
from serving import HELLO, app_of, served

MESSAGE_ITEM = {"role": "user", "content": "hi"}
REFUSED = [
    ({"nonsense": 1}, "nonsense"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"context_management": []}, "context_management"),
    ({"n": 2}, "n"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"truncation": "auto"}, "truncation"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"effort": "none"}}, "reasoning.effort"),
    ({"reasoning": {"effort": "minimal"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ({"include": ["web_search_call.results"]}, "include.0"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{**WEATHER, "name": "a b"}]}, "tools.0.name"),
    ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "other"}, "tools": [WEATHER]}, "tool_choice"),
    ({"background": True, "store": False}, "background"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"temperature": 3}, "temperature"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"metadata": {str(k): "v" for k in range(17)}}, "metadata"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"model": "gpt-5"}, "model"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
    ({"input": [{**MESSAGE_ITEM, "channel": "final"}]}, "input.0.channel"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
    ({"input": [MESSAGE_ITEM, {"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.1.call_id"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]}, "input.0"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "a.b", "arguments": "{}"}]}, "input.0.name"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
    ({"input": [{**MESSAGE_ITEM, "id": "m"}, {**MESSAGE_ITEM, "id": "m"}]}, "input.1"),
    ({"input": [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}]}]}, "input.0.content"),
    ({"input": [{"type": "reasoning", "encrypted_content": "gAAAAB"}]}, "input.0.encrypted_content"),
    ({"input": [{"type": "reasoning", "encrypted_content": "gptoss1.AAAA"}]}, "input.0.encrypted_content"),
    ({"input": "long " * 5000}, "input"),
]  # fmt: skip


@pytest.fixture(scope="module")
def one_server():
    app, engine = app_of(HELLO, repeat=True)
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:  # fmt: skip
        yield api, engine
    engine.close(0)


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)])  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(one_server, body, param):
    api, engine = one_server
    before = len(engine.requests)
    with pytest.raises(openai.APIStatusError) as caught:
        api.post("/responses", cast_to=object, body={"model": "scripted", "input": "hi", **body})
    assert caught.value.status_code in (400, 404)
    place = caught.value.param
    assert place == param or place.startswith(f"{param}."), (place, caught.value.message)
    assert len(engine.requests) == before


def test_null_is_absent(one_server):
    api, _ = one_server
    names = ["instructions", "previous_response_id", "store", "background", "stream", "stream_options", "include", "reasoning", "text", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens", "temperature", "top_p", "top_logprobs", "truncation", "metadata", "user", "service_tier", "conversation", "prompt", "moderation", "context_management", "seed"]  # fmt: skip
    body = {"model": "scripted", "input": "hi", **dict.fromkeys(names)}
    assert api.post("/responses", cast_to=object, body=body)["status"] == "completed"
    part = {"type": "output_text", "text": "yes", "logprobs": None, "prompt_cache_breakpoint": None}
    item = {
        "type": "message",
        "role": "assistant",
        "content": [part],
        "id": None,
        "created_by": None,
    }
    body = {"model": "scripted", "input": [item, MESSAGE_ITEM]}
    assert api.post("/responses", cast_to=object, body=body)["status"] == "completed"
