"""/v1/completions, /tokenize and /detokenize over a scripted engine."""

import asyncio

import pytest
from fakes import scripted_logprob
from serving import DATE, HELLO, USER, WEATHER, app_of, events, local

from gptoss_jax.chat import ChatSettings, Tool, from_openai
from gptoss_jax.chat.render import render
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.server.shapes import Text, TextCompletion, Tokens
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()


def post(path, *scripts, settings=None, engine=None, **body):
    async def send():
        app, made = app_of(*scripts, repeat=True, settings=settings, **(engine or {}))
        async with local(app) as client:
            return await client.post(path, json=body), made

    return asyncio.run(send())


def complete(*scripts, engine=None, **body):
    """The answer's JSON, checked to be the sum of its stream; and the engine."""
    whole, made = post("/v1/completions", *scripts, engine=engine, **body)
    assert whole.status_code == 200, whole.text
    TextCompletion.model_validate(whole.json())
    streamed, _ = post("/v1/completions", *scripts, engine=engine, **body, stream=True)
    chunks = events(streamed.text)
    for choice in whole.json()["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"] is not None:
            for key, values in choice["logprobs"].items():
                assert [value for c in mine for value in c["logprobs"][key]] == values
    return whole.json(), made


TEXT = [*FULL.encode(" world, né 🧮 and"), FULL.stop_ids[2]]


def test_text_is_continued_as_it_stands():
    answer, engine = complete(TEXT, prompt="Hello<|start|>", max_tokens=50)
    assert answer["choices"][0]["text"] == " world, né 🧮 and"
    assert answer["choices"][0]["finish_reason"] == "stop"
    ids = FULL.encode("Hello<|start|>")
    assert list(engine.requests[0].prompt) == ids
    assert FULL.special["<|start|>"] not in ids
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["completion_tokens"] == len(TEXT)


def test_sixteen_tokens_unless_told():
    answer, _ = complete([17] * 100, prompt="Hello")
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_several_prompts_and_n():
    scripts = [[*FULL.encode(word), FULL.stop_ids[0]] for word in ("a", "b", "c", "d")]
    answer, engine = complete(*scripts, prompt=["one", "two"], n=2, seed=4)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in answer["choices"]] == ["a", "b", "c", "d"]
    assert answer["usage"]["prompt_tokens"] == 2
    assert [list(r.prompt) for r in engine.requests] == [FULL.encode("one"), FULL.encode("two")]


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_prompts_of_ids(prompt):
    _, engine = complete(TEXT, prompt=prompt)
    assert list(engine.requests[0].prompt) == [1, 2, 3]


def test_echo():
    answer, _ = complete(TEXT, prompt=["Hello", "Hi"], echo=True)
    texts = [c["text"] for c in answer["choices"]]
    assert texts == ["Hello world, né 🧮 and", "Hi world, né 🧮 and"]


def test_stop_strings():
    answer, engine = complete(TEXT, prompt="Hello", stop=["é"])
    assert answer["choices"][0]["text"] == " world, n"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert engine.requests[0].stop == ("é",)


def test_logprobs_in_the_older_shape():
    answer, _ = complete(TEXT, prompt="Hello", logprobs=2)
    given, ids = answer["choices"][0]["logprobs"], TEXT[:-1]
    assert given["tokens"] == [FULL.decode([token]) for token in ids]
    assert given["token_logprobs"] == [scripted_logprob(token).logprob for token in ids]
    # halves of characters have the same text, and the shape has one value for a text
    assert all(1 <= len(top) <= 2 for top in given["top_logprobs"])
    assert all(
        top[token] >= max(top.values())
        for top, token in zip(given["top_logprobs"], given["tokens"], strict=True)
    )
    text = answer["choices"][0]["text"]
    for token, start in zip(given["tokens"], given["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert text[start:].startswith(token)
    answer, _ = complete(TEXT, prompt="Hello", logprobs=0)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{}] * len(ids)


def test_ignore_eos_and_adapters():
    _, engine = complete(TEXT, prompt="x", ignore_eos=True, model="lora", engine={"adapters": ["lora"]})  # fmt: skip
    assert engine.requests[0].sampling.ignore_eos
    assert engine.requests[0].adapter == "lora"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": [201_088]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": [1.5]}, None),
        ({"prompt": [True]}, None),
        ({"prompt": [200_006]}, "prompt"),
        ({"prompt": "word " * 5000}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "x", "n": 1000}, "n"),
        ({"prompt": ["x"] * 33, "n": 2}, "n"),
        ({}, "prompt"),
    ],
)
def test_refused(body, param):
    answer, engine = post("/v1/completions", TEXT, **body)
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param
    assert not engine.requests


def test_control_tokens_only_if_the_owner_allows_them():
    settings = ServerSettings(allow_control_tokens=True)
    answer, engine = post("/v1/completions", TEXT, settings=settings, prompt=[200_006, 5])
    assert answer.status_code == 200
    assert list(engine.requests[0].prompt) == [200_006, 5]


def test_one_prompt_of_several_that_is_refused_cancels_the_others():
    async def send():
        app, engine = app_of([17] * 4000, repeat=True, capacity=1, delay=0.001)
        async with local(app) as client:
            answer = await client.post(
                "/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 4000}
            )
            while engine.running:
                await asyncio.sleep(0.01)
            return answer, engine

    answer, engine = asyncio.run(send())
    assert answer.status_code == 429
    assert engine.cancelled == [(0, 0)]


def test_tokenize_and_detokenize():
    text = "Hello <|start|> né"
    answer, _ = post("/tokenize", HELLO, prompt=text, return_token_strs=True)
    Tokens.model_validate(answer.json())
    assert answer.json()["tokens"] == FULL.encode(text)
    assert answer.json()["count"] == len(FULL.encode(text))
    assert answer.json()["max_model_len"] == 4096
    assert answer.json()["token_strs"] == [FULL.decode([token]) for token in FULL.encode(text)]
    back, _ = post("/detokenize", HELLO, tokens=FULL.encode(text))
    Text.model_validate(back.json())
    assert back.json() == {"prompt": text}
    assert post("/detokenize", HELLO, tokens=[200_006])[0].json() == {"prompt": "<|start|>"}
    assert post("/detokenize", HELLO, tokens=[10**6])[0].status_code == 400


def test_tokenize_a_conversation_as_it_would_be_read():
    answer, _ = post("/tokenize", HELLO, messages=USER, tools=[WEATHER], reasoning_effort="low")
    spec = WEATHER["function"]
    tool = Tool(spec["name"], spec["description"], spec["parameters"])
    expected = render(from_openai(USER), FULL, ChatSettings("low", DATE, tools=[tool]))
    assert answer.json()["tokens"] == expected
    assert (
        post("/tokenize", HELLO, messages=USER, nonsense=1)[0].json()["error"]["param"]
        == "nonsense"
    )
    assert post("/tokenize", HELLO, prompt=1)[0].json()["error"]["param"] == "prompt"
    assert post("/tokenize", HELLO)[0].status_code == 400
