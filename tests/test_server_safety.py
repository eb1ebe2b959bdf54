"""What keeps the server safe: keys, limits, clients that go, engines that fail, and what is logged."""

import asyncio
import json
import logging
import re
import socket

import httpx
import pytest
from serving import DATE, HELLO, USER, A, E, F, R, S, app_of, chat, events, local, served, until

from gptoss_jax.errors import GptOssError
from gptoss_jax.server.security import check_exposure, read_keys
from gptoss_jax.server.settings import ServerSettings

ENDLESS = f"{A}" + " on and on" * 3000
KEY = {"Authorization": "Bearer sesame-1"}


def kept(**more):
    return ServerSettings(api_keys=("other", "sesame-1"), date=DATE, **more)


def routes(router):
    """(path, method) of every route, those of included routers too."""
    for route in router.routes:
        if hasattr(route, "path"):
            yield from ((route.path, method) for method in sorted(route.methods))
        else:  # newer FastAPIs keep included routers as they are
            yield from routes(route.original_router)


def test_every_route_asks_for_a_key():
    async def knock():
        app, engine = app_of(HELLO, settings=kept())
        async with local(app) as client:
            paths = list(routes(app))
            assert len(paths) > 12
            pages = [path for path, _ in paths if path == "/" or path.startswith("/page/")]
            for path, method in [*paths, ("/nowhere", "GET"), ("/v1/../metrics", "GET")]:
                filled = path.replace("{model:path}", "x")
                for headers in (
                    {},
                    {"Authorization": "Bearer no"},
                    {"Authorization": "sesame-1"},
                    {"Authorization": "Basic sesame-1"},
                    {"Authorization": "Bearer sesame-1x"},
                    {"X-API-Key": "sesame-1"},
                ):
                    answer = await client.request(method, filled, headers=headers)
                    if path == "/health" or path in pages:
                        assert answer.status_code < 400
                        continue
                    assert answer.status_code == 401, (method, path)
                    if method != "HEAD":
                        assert answer.json()["error"]["code"] == "invalid_api_key"
                assert (await client.request(method, filled, headers=KEY)).status_code != 401
            assert not engine.requests
            answer = await client.post("/v1/chat/completions", json={"messages": USER}, headers=KEY)
            assert answer.status_code == 200

    asyncio.run(knock())


def test_a_key_of_strange_bytes_is_wrong_and_no_error():
    async def knock():
        app, _ = app_of(HELLO, settings=kept())
        async with local(app) as client:
            for raw in (b"Bearer \xff\xfe", b"Bearer \xc3\xa9", b"", b"Bearer"):
                answer = await client.get("/v1/models", headers={"Authorization": raw})
                assert answer.status_code == 401

    asyncio.run(knock())


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    monkeypatch.setenv("GPTOSS_API_KEYS", "three, one,")
    assert read_keys(file) == ("three", "one", "two")
    monkeypatch.delenv("GPTOSS_API_KEYS")
    assert read_keys(None) == ()
    file.write_text("# none\n")
    with pytest.raises(GptOssError, match="no API key"):
        read_keys(file)


def test_other_machines_need_a_key_or_a_word():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.10"):
        check_exposure(host, (), False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(GptOssError, match="no-auth"):
            check_exposure(host, (), False)
        check_exposure(host, ("key",), False)
        check_exposure(host, (), True)


def test_a_server_without_keys_answers_to_its_own_name_only():
    async def ask(host):
        app, _ = app_of(HELLO, repeat=True, settings=ServerSettings(hosts=("localhost", "::1")))
        async with local(app) as client:
            return await client.get("/v1/models", headers={"Host": host})

    for host in ("localhost", "localhost:8000", "LOCALHOST:1", "[::1]:8000"):
        assert asyncio.run(ask(host)).status_code == 200
    for host in (
        "evil.example",
        "localhost.evil.example:8000",
        "",
        "127.0.0.1",
        "[::2]",
        "[::1",
        "]",
    ):
        answer = asyncio.run(ask(host))
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    "bad",
    [
        {"max_n": 0},
        {"date": "today"},
        {"api_keys": ("é",)},
        {"max_top_logprobs": 21},
        {"request_seconds": float("nan")},
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(GptOssError):
        ServerSettings(**bad)


def whole(answer):
    """Has it come to the end of its Content-Length?"""
    head, _, body = answer.partition(b"\r\n\r\n")
    said = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return said is not None and len(body) >= int(said[1])


def raw(address, data, wait=5.0):
    """Sends bytes as they are; what comes back until that is whole, or the server hangs up or falls
    silent.
    """
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as sock:
        for part in data if isinstance(data, list) else [data]:
            sock.sendall(part)
        out = b""
        try:
            while not whole(out) and (part := sock.recv(65536)):
                out += part
        except TimeoutError:
            pass
    return out


def head(**headers):
    lines = "".join(f"{key.replace('_', '-')}: {value}\r\n" for key, value in headers.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{lines}\r\n".encode()


def test_bodies_have_a_limit_while_they_are_read():
    app, engine = app_of(HELLO, settings=ServerSettings(max_body_bytes=1000, body_seconds=3))
    with served(app) as address:
        said = raw(address, head(Content_Length=10**12))  # refused before a byte has come
        assert said.startswith(b"HTTP/1.1 413 ")
        chunk = b"258\r\n" + b"x" * 600 + b"\r\n"
        said = raw(address, head(Transfer_Encoding="chunked") + chunk * 3)
        assert said.startswith(b"HTTP/1.1 413 ")
        assert b"body_too_large" in said
        said = raw(address, head(Content_Length=50) + b"{")  # and never the rest
        assert said.startswith(b"HTTP/1.1 408 ")
        assert raw(address, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": USER})
        assert answer.status_code == 200  # others are not harmed
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [], "temperature": NaN}',
        b'{"messages": [], "temperature": Infinity}',
        b'{"messages": [], "temperature": -Infinity}',
        b'{"messages": [], "temperature": 1e999}',
        b'{"messages": [], "n": 1' + b"0" * 5000 + b"}",
        b'{"n": 1, "n": 2}',
        b"{",
        b"",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"messages": ' + b'{"a":' * 100_000,
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"\\ud800": 1}',
    ],
)
def test_what_is_no_request_is_400_or_404(body):
    async def send():
        app, _ = app_of(HELLO)
        async with local(app) as client:
            headers = {"Content-Type": "application/json"}
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
                answer = await client.post(path, content=body, headers=headers)
                assert answer.status_code in (400, 404), (path, answer.text)
                assert answer.json()["error"]["message"]

    asyncio.run(send())


def test_deep_json_where_anything_may_stand():
    """What clients send back of their own reading is left alone, however deep."""
    deep: list = []
    for _ in range(400):
        deep = [deep]
    function = {"name": "f", "arguments": "{}", "parsed_arguments": deep}
    made = {"id": "a", "type": "function", "index": 0, "function": function}
    history = [
        *USER,
        {"role": "assistant", "content": "x", "parsed": deep, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "a", "content": "y"},
    ]

    async def send(**body):
        app, _ = app_of(HELLO)
        return await chat(app, **body)

    assert asyncio.run(send(messages=history)).status_code == 200
    for body in (
        {"metadata": {"a": deep}},
        {"logit_bias": {"1": deep}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": deep}}}]},
        {"guided_json": {"a": deep}},
        {"nonsense": deep},
        {"messages": deep},
    ):
        assert asyncio.run(send(**body)).status_code == 400


def test_lone_surrogates_are_replaced():
    async def send():
        app, engine = app_of(HELLO)
        body = b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}'
        async with local(app) as client:
            headers = {"Content-Type": "application/json"}
            answer = await client.post("/v1/chat/completions", content=body, headers=headers)
        return answer, engine.tokenizer.decode(engine.requests[0].prompt)

    answer, prompt = asyncio.run(send())
    assert answer.status_code == 200
    assert "a\ufffdb" in prompt


def test_other_paths_and_methods_have_openai_s_shape():
    async def send():
        app, _ = app_of(HELLO)
        async with local(app) as client:
            answer = await client.get("/v1/nothing")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            answer = await client.get("/v1/chat/completions")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert answer.json()["error"]["code"] == "method_not_allowed"
            answer = await client.post("/v1/embeddings", json={"input": "x", "model": "y"})
            assert answer.status_code == 400
            assert "embedding" in answer.json()["error"]["message"]

    asyncio.run(send())


def test_a_full_queue_is_429_and_a_closing_engine_503():
    async def send():
        app, engine = app_of(HELLO, capacity=0)
        answers = [await chat(app), await chat(app, stream=True)]
        engine.closing = True
        return [*answers, await chat(app)]

    busy, streamed, closing = asyncio.run(send())
    for answer in (busy, streamed):
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert closing.status_code == 503
    assert closing.json()["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_engine_that_fails_is_500_and_tells_nothing(path, capsys):
    async def send():
        secret = RuntimeError("the prompt was: tell nobody")
        app, _ = app_of(HELLO, repeat=True, fail_after=6, failure=secret)
        async with local(app) as client:
            body = {"messages": USER} if "chat" in path else {"prompt": "hi"}
            whole = await client.post(path, json=body)
            return whole, await client.post(path, json={**body, "stream": True})

    whole, streamed = asyncio.run(send())
    assert whole.status_code == 500
    assert whole.json()["error"]["type"] == "server_error"
    assert streamed.status_code == 200
    assert events(streamed.text)[-1]["error"]["type"] == "server_error"
    said = capsys.readouterr()
    assert "RuntimeError" in said.err
    assert "nobody" not in whole.text + streamed.text + said.err + said.out


def test_an_engine_s_refusal_is_the_client_s_mistake():
    async def send():
        app, _ = app_of(HELLO, fail_after=0, failure=GptOssError("too many of these"))
        return await chat(app)

    answer = asyncio.run(send())
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "too many of these")


def test_a_request_that_takes_too_long_is_408():
    async def send():
        settings = ServerSettings(request_seconds=0.2, date=DATE)
        app, engine = app_of(ENDLESS, repeat=True, delay=0.01, settings=settings)
        whole, streamed = await chat(app), await chat(app, stream=True)
        async with local(app) as client:
            text = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4000})
        until(lambda: not engine.running)
        return whole, streamed, text, engine

    whole, streamed, text, engine = asyncio.run(send())
    for answer in (whole, text):
        assert answer.status_code == 408
        assert answer.headers["x-should-retry"] == "false"
    assert events(streamed.text)[-1]["error"]["code"] == "timeout"
    assert len(engine.cancelled) == 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels(path, stream):
    app, engine = app_of(ENDLESS, repeat=True, delay=0.002)
    body = {"messages": USER} if "chat" in path else {"prompt": "x", "max_tokens": 4000}
    with served(app) as address:
        host, port = address.removeprefix("http://").split(":")
        data = json.dumps({**body, "stream": stream, "n": 2}).encode()
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            until(lambda: engine.running and engine.generated > 20)
            if stream:
                assert sock.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: not engine.running)
        assert sorted(engine.cancelled) == [(0, 0), (0, 1)]
        until(lambda: app.state.service.running == 0)


def test_a_silent_stream_is_kept_alive():
    settings = ServerSettings(keepalive_seconds=0.1, date=DATE)
    app, engine = app_of(HELLO, settings=settings)
    engine.held.clear()
    with served(app) as address:
        body = {"messages": USER, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            parts = answer.iter_text()
            text = ""
            while text.count(": still working") < 3:
                text += next(parts)
            engine.held.set()
            text += "".join(parts)
    assert "Hello" in text
    assert text.endswith("data: [DONE]\n\n")


def test_a_draining_server_takes_nothing_and_finishes():
    async def drain():
        app, engine = app_of(HELLO, repeat=True)
        engine.held.clear()
        running = asyncio.create_task(chat(app))
        while not engine.requests:
            await asyncio.sleep(0.01)
        app.state.service.draining = True
        refused = await chat(app)
        async with local(app) as client:
            health = await client.get("/health")
        assert app.state.service.running == 1
        engine.held.set()
        return await running, refused, health

    finished, refused, health = asyncio.run(drain())
    assert finished.status_code == 200
    assert (refused.status_code, health.status_code) == (503, 503)
    assert refused.headers["retry-after"] == "5"


def test_the_log_and_errors_do_not_hold_what_was_said(capsys, caplog):
    caplog.set_level(logging.DEBUG)

    async def send():
        app, _ = app_of(HELLO, repeat=True, settings=ServerSettings(log=True, date=DATE))
        secret = [{"role": "user", "content": "my-secret-words"}]
        await chat(app, messages=secret)
        await chat(app, messages=secret, stream=True)
        await chat(app, messages=secret, nonsense=1)

    asyncio.run(send())
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 3
    assert all(
        word in lines[0]
        for word in (
            "/v1/chat/completions",
            "scripted",
            " 200 ",
            "prompt=",
            "cached=0",
            "completion=14",
            "ttft=",
            "tok/s",
            "finish=stop",
        )
    )
    assert " 400 " in lines[2]
    everything = said.out + said.err + caplog.text
    for word in ("my-secret-words", "Hello", "Think"):
        assert word not in everything


def test_cors_is_off_unless_asked_for():
    async def ask(settings):
        app, _ = app_of(HELLO, settings=settings)
        origin = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        async with local(app) as client:
            before = await client.options("/v1/chat/completions", headers=origin)
            answer = await client.post(
                "/v1/chat/completions", headers={**origin, **KEY}, json={"messages": USER}
            )
            return before, answer

    before, answer = asyncio.run(ask(kept()))
    assert before.status_code == 401
    assert "access-control-allow-origin" not in answer.headers
    before, answer = asyncio.run(ask(kept(cors_origins=("https://page.example",))))
    assert before.status_code == answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    before, answer = asyncio.run(ask(kept(cors_origins=("https://else.example",))))
    assert "access-control-allow-origin" not in answer.headers


def test_metrics_count_what_happened():
    async def send():
        app, _ = app_of(HELLO, repeat=True)
        await chat(app)
        await chat(app, stream=True)
        await chat(app, n=0)
        async with local(app) as client:
            await client.get("/made-up-path")
            return (await client.get("/metrics")).text

    text = asyncio.run(send())
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    route = 'route="/v1/chat/completions"'
    assert values[f'gptoss_http_requests_total{{{route},status="200"}}'] == "2.0"
    assert values[f'gptoss_http_requests_total{{{route},status="400"}}'] == "1.0"
    assert values["gptoss_time_to_first_token_seconds_count"] == "2.0"
    assert values["gptoss_time_between_tokens_seconds_count"] == str(2 * 13.0)
    assert values["gptoss_request_completion_tokens_sum"] == "28.0"
    assert values['gptoss_completions_finished_total{reason="stop"}'] == "2.0"
    assert values["gptoss_engine_slots"] == "8.0"
    assert values["gptoss_engine_generated_tokens_total"] == "28.0"
    assert "made-up" not in text  # paths of clients are no labels


def test_one_bad_request_never_harms_another():
    """Twenty good ones at once with as many of every bad kind."""

    async def send():
        app, engine = app_of(lambda request: [HELLO] * request.sampling.n, delay=0.0005)
        bad = [
            {"n": 10**9},
            {"messages": [{"role": "user"}]},
            {"guided_regex": "("},
            {"logit_bias": {"x": 1}},
            {"tools": [{}]},
        ]
        good = [chat(app, stream=i % 2 == 0, seed=i) for i in range(20)]
        mixed = [chat(app, **body) for body in bad for _ in range(4)]
        answers = await asyncio.gather(*good, *mixed)
        assert [a.status_code for a in answers] == [200] * 20 + [400] * 20
        assert all("Hello" in a.text for a in answers[:20])
        assert not engine.running

    asyncio.run(send())


def test_reasoning_is_never_in_the_content():
    async def send():
        app, _ = app_of(f"{A}secret{E}{S}{A}more{E}{S}{F}a{E}{S}{F}b{R}", repeat=True)
        return await chat(app)

    message = asyncio.run(send()).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("a\nb", "secret\nmore")
