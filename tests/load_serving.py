"""Load on a real server: 64 clients that ask, stream, cancel, hang up, send long prompts and
nonsense.

    python tests/load_serving.py --minutes 5            # starts gptoss serve on a free port
    python tests/load_serving.py --minutes 5 --address http://127.0.0.1:8000 --pid PID

It fails if an error is not the client's, an answer with a seed differs from the one given alone, an
answer holds another client's numbers, slots or queue do not come back, or the server's resident
memory grows after its first fifth. tests/test_server_engine.py runs a few seconds of it.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import time

import httpx

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
NONSENSE = [
    {"messages": []},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}], "n": 10**6},
    {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"messages": [{"role": "user", "content": "x"}], "nonsense": True},
    {"messages": [{"role": "user", "content": "x"}], "guided_regex": "("},
    {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"-1": 1}},
    {"messages": [{"role": "user", "content": "x"}], "model": "gpt-none"},
    {"messages": [{"role": "user", "content": "word " * 20_000}]},
    {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}},
]  # fmt: skip


@dataclasses.dataclass
class Report:
    """What happened."""

    done: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 0
    first: list[float] = dataclasses.field(default_factory=list)  # seconds to the first token
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # seconds, bytes

    def text(self) -> str:
        first = sorted(self.first) or [0.0]
        lines = [f"{name:<12} {count}" for name, count in sorted(self.done.items())]
        lines.append(f"tokens of whole answers {self.tokens}")
        middle, late = first[len(first) // 2], first[int(len(first) * 0.99)]
        lines.append(f"first token: median {middle:.3f} s, 99th percentile {late:.3f} s")
        if self.memory:
            sizes = [size for _, size in self.memory]
            lines.append(f"resident memory {sizes[0] >> 20} to {sizes[-1] >> 20} MiB")
        return "\n".join([*lines, *(f"WRONG: {text}" for text in self.wrong[:20])])


def body_of(number: int) -> dict:
    """One of the requests whose answers are known: sums and texts, with and without a grammar."""
    draw = random.Random(number)
    a, b = draw.randrange(100, 999), draw.randrange(100, 999)
    body = {
        "messages": [{"role": "user", "content": f"What is {a} + {b}?"}],
        "seed": number,
        "temperature": (0, 1, 1.3)[number % 3],
        "max_tokens": draw.randrange(8, 48),
        "reasoning_effort": draw.choice(["low", "medium"]),
    }
    if number % 5 == 1:
        body["guided_regex"] = f"{a}:[0-9]{{3,6}}"
    if number % 5 == 2:
        body |= {"n": 2, "stop": ["+"], "logprobs": True}
    return body


def essence(choices: list[dict]) -> str:
    """What must be equal whatever else is running."""
    return json.dumps([(c["message"].get("reasoning"), c["message"]["content"], c["finish_reason"]) for c in choices])  # fmt: skip


def streamed(lines: list[str], n: int) -> str:
    """The same of a stream."""
    texts: list[dict] = [{"reasoning": None, "content": "", "reason": None} for _ in range(n)]
    for line in lines:
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            into = texts[choice["index"]]
            delta = choice["delta"]
            if "reasoning" in delta:
                into["reasoning"] = (into["reasoning"] or "") + delta["reasoning"]
            into["content"] += delta.get("content") or ""
            into["reason"] = choice["finish_reason"] or into["reason"]
    return json.dumps([(t["reasoning"], t["content"], t["reason"]) for t in texts])


class Client:
    """One of the clients: does one thing after the other, drawn by its own generator."""

    def __init__(self, number: int, api: httpx.AsyncClient, alone: dict[int, str], report: Report):
        self.draw, self.api, self.alone, self.report = random.Random(number), api, alone, report

    async def run(self, until: float) -> None:
        kinds = [self.whole, self.stream, self.cancel, self.hang_up, self.long, self.nonsense]
        while time.monotonic() < until:
            (kind,) = self.draw.choices(kinds, [6, 6, 2, 2, 1, 3])
            try:
                await kind()
                self.report.done[kind.__name__] += 1
            except Exception as error:
                self.report.wrong.append(f"{kind.__name__}: {type(error).__name__} {error}")

    def wrong(self, text: str) -> None:
        self.report.wrong.append(text)

    def known(self) -> tuple[int, dict]:
        number = self.draw.choice(list(self.alone))
        return number, body_of(number)

    async def whole(self) -> None:
        number, body = self.known()
        answer = await self.api.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return self.wrong(f"{answer.status_code} {answer.text[:200]}")
        made = answer.json()
        self.report.tokens += made["usage"]["completion_tokens"]
        if essence(made["choices"]) != self.alone[number]:
            self.wrong(f"{number}: {essence(made['choices'])} but alone {self.alone[number]}")

    async def stream(self) -> None:
        number, body = self.known()
        began, lines = time.monotonic(), []
        async with self.api.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:  # fmt: skip
            if answer.status_code != 200:
                return self.wrong(f"{answer.status_code} {await answer.aread()}")
            async for line in answer.aiter_lines():
                if len(lines) == 1 + body.get("n", 1):  # the roles came before the first token
                    self.report.first.append(time.monotonic() - began)
                lines += [line] if line else []
        if lines[-1] != "data: [DONE]":
            self.wrong(f"the stream ends with {lines[-1][:100]}")
        if streamed(lines, body.get("n", 1)) != self.alone[number]:
            self.wrong(f"{number} streamed: {streamed(lines, body.get('n', 1))} but alone {self.alone[number]}")  # fmt: skip

    async def cancel(self) -> None:
        _, body = self.known()
        body |= {"stream": True, "max_tokens": 400, "n": 2}
        async with self.api.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.aiter_lines()
            for _ in range(self.draw.randrange(1, 30)):
                if await anext(lines, None) is None:
                    break

    async def hang_up(self) -> None:
        """A connection that is broken before, in or after the request."""
        url = self.api.base_url
        _, body = self.known()
        body |= {"max_tokens": 400, "stream": self.draw.random() < 0.5}
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"  # fmt: skip
        reader, writer = await asyncio.open_connection(url.host, url.port)
        sent = head.encode() + data
        writer.write(sent[: self.draw.choice([20, len(head) + 10, len(sent), len(sent)])])
        await writer.drain()
        await asyncio.sleep(self.draw.random() * 0.5)
        writer.transport.abort()
        del reader

    async def long(self) -> None:
        text = " ".join(self.draw.choices(WORDS, k=self.draw.randrange(50, 300)))
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
        answer = await self.api.post("/v1/chat/completions", json=body)
        told = answer.json().get("error", {}).get("code")
        if answer.status_code != 200 and told != "context_length_exceeded":
            self.wrong(f"long: {answer.status_code} {answer.text[:200]}")

    async def nonsense(self) -> None:
        answer = await self.api.post("/v1/chat/completions", json=self.draw.choice(NONSENSE))
        if answer.status_code not in (400, 404):
            self.wrong(f"nonsense: {answer.status_code} {answer.text[:200]}")


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


async def numbers(api: httpx.AsyncClient) -> dict[str, float]:
    """The server's metrics."""
    text = (await api.get("/metrics")).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def load(
    address: str, clients: int, seconds: float, pid: int | None = None, known: int = 40
) -> Report:
    """Asks every known request alone, then all at once with everything else, and checks what is
    left.

    Args:
      address: Of the server.
      clients: How many at once.
      seconds: How long.
      pid: The server's process, if its memory is to be watched.
      known: How many different requests have their answer compared.
    """
    report = Report()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as api:
        alone = {}
        for number in range(known):
            answer = await api.post("/v1/chat/completions", json=body_of(number))
            assert answer.status_code == 200, answer.text
            alone[number] = essence(answer.json()["choices"])
        began = time.monotonic()
        until = began + seconds

        async def watch() -> None:
            while time.monotonic() < until and pid is not None:
                report.memory.append((time.monotonic() - began, resident(pid)))
                await asyncio.sleep(1)

        workers = [Client(number, api, alone, report).run(until) for number in range(clients)]
        await asyncio.gather(watch(), *workers)
        await settled(api, report)
    late = [size for at, size in report.memory if at > seconds / 5]
    if late and late[-1] > late[0] * 1.05 + (32 << 20):
        report.wrong.append(f"memory grew from {late[0] >> 20} to {late[-1] >> 20} MiB")
    return report


async def settled(api: httpx.AsyncClient, report: Report) -> None:
    """Slots and queue must come back soon after the last client has gone."""
    for _ in range(100):
        made = await numbers(api)
        if not (made["gptoss_engine_slots_busy"] or made["gptoss_engine_queue"]):
            break
        await asyncio.sleep(0.1)
    else:
        report.wrong.append("slots or queue are still in use 10 s after the last request")
    for name, value in made.items():
        if name.startswith("gptoss_http_requests_total") and 'status="5' in name:
            report.wrong.append(f"{name} {value:g}")


@contextlib.contextmanager
def server(*options: str):
    """gptoss serve on a free port: its address and process."""
    command = [sys.executable, "-m", "gptoss_jax.cli.main", "serve", "--port", "0"]
    options = ("--date", "2026-01-01", *options)
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            said = next((line for line in iter(process.stdout.readline, "") if "served at" in line), "")  # fmt: skip
            yield said.split()[-1], process.pid
        finally:
            process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--address")
    parser.add_argument("--pid", type=int)
    parser.add_argument("options", nargs="*", help="of gptoss serve, after --")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        address, pid = given.address, given.pid
        if address is None:
            address, pid = stack.enter_context(server(*given.options))
        report = asyncio.run(load(address, given.clients, given.minutes * 60, pid))
    print(report.text())
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
