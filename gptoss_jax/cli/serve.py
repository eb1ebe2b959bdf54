"""An OpenAI-compatible server: /v1/chat/completions, /v1/responses, /v1/completions, /v1/models,
/tokenize, /detokenize, /health, /metrics, and a chat page at /.

It listens on this machine only unless --host says otherwise, and then asks for an API key
(--api-key-file, or GPTOSS_API_KEYS with commas between keys). SIGTERM: no new requests, the running
ones finish within --drain-seconds, exit code 0.
"""

import asyncio
import dataclasses
import importlib.util
import signal
import socket
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptoss_jax.cli.loading import ModelArguments, load_model, working
from gptoss_jax.errors import GptOssError
from gptoss_jax.server.settings import Limits, ServerSettings

LOOPBACK = ("localhost", "127.0.0.1", "::1")
NEEDED = ("fastapi", "uvicorn", "llguidance", "prometheus_client")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss serve`."""

    model: Annotated[ModelArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelArguments
    )
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """0 takes a free one."""
    name: str | None = None
    """Name that requests give as `model`; by default the Hub id or the folder's name."""
    adapter: tuple[str, ...] = ()
    """Adapters as NAME=FOLDER; requests give NAME as `model`."""
    slots: int = 32
    """Completions that are generated at once."""
    queue: int = 256
    """Requests that may wait; more are refused with 429."""
    pages: int | None = None
    """Pages of the prefix cache, 0 for none; by default a quarter of what the slots take."""
    drafts: int = 0
    """Tokens to guess ahead from what was written before: the same answers, some of them sooner."""
    api_key_file: Path | None = None
    """File with API keys, one a line."""
    no_auth: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Serve other machines without a key."""
    date: str | None = None
    """Date that the model is told, YYYY-MM-DD; by default today, and all cached prefixes change at
    midnight.
    """
    cors: tuple[str, ...] = ()
    """Origins (https://example.org) whose pages may call."""
    allowed_host: tuple[str, ...] = ()
    """Without a key: further names by which the server may be called (of a proxy before it)."""
    store: Path | None = None
    """File that keeps what /v1/responses stores; by default it is kept in memory only."""
    log: bool = False
    """Print one line a request, without what was said."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Limits)


def run(arguments: Arguments) -> int:
    """Loads the model, serves until a signal comes."""
    check_installed()
    from gptoss_jax.server.security import check_exposure, read_keys

    keys = read_keys(arguments.api_key_file)
    check_exposure(arguments.host, keys, arguments.no_auth)
    settings = ServerSettings(
        **dataclasses.asdict(arguments.limits),
        api_keys=keys,
        date=arguments.date,
        cors_origins=arguments.cors,
        hosts=()
        if keys or arguments.no_auth
        else (*LOOPBACK, arguments.host, *arguments.allowed_host),
        store=None if arguments.store is None else str(arguments.store),
        log=arguments.log,
    )
    if settings.store is not None:
        from gptoss_jax.server.store import Store

        Store(settings.store).close()  # a mistake is told before the model is loaded
    # before the model is loaded, which may take minutes
    with bind(arguments.host, arguments.port) as sock:
        engine = _engine(arguments)
        try:
            return serve(engine, settings, sock)
        finally:
            engine.close(drain=0)


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address; nobody can connect to it yet."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise GptOssError(
            f"cannot listen on {host} port {port} ({error}): give another --host or --port"
        ) from None
    return sock


def check_installed() -> None:
    """Refuses to begin without the libraries of the extra [serve]."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise GptOssError(f"it needs {', '.join(missing)}: pip install 'gptoss_jax[serve]'")


def adapter_folders(given: tuple[str, ...]) -> dict[str, Path]:
    """Name -> folder of `--adapter NAME=FOLDER`."""
    out: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder or name in out:
            raise GptOssError(f"--adapter {text}: give each as NAME=FOLDER, each name once")
        out[name] = Path(folder)
    return out


def _engine(arguments: Arguments) -> Any:
    model = load_model(arguments.model, adapters=adapter_folders(arguments.adapter))
    from gptoss_jax.batching import Engine, EngineSettings
    from gptoss_jax.chat.grammar import completion_grammar
    from gptoss_jax.chat.messages import ResponseFormat
    from gptoss_jax.chat.render import harmony

    name = arguments.name
    if name is None and Path(model.name).is_dir():
        name = Path(model.name).resolve().name
    model = dataclasses.replace(model, name=name or model.name)
    with working("compiling"):
        sizes = {"slots": arguments.slots, "max_queue": arguments.queue, "pages": arguments.pages}
        engine = Engine(model, EngineSettings(**sizes, drafts=arguments.drafts))
        engine.warm_up()
        harmony()
        # the vocabulary as a grammar reads it takes seconds, the first time
        completion_grammar(engine.tokenizer, response_format=ResponseFormat({"type": "object"}))
    return engine


def serve(engine: Any, settings: ServerSettings, sock: socket.socket) -> int:
    """Serves on the socket until a signal has come and the running requests have ended; the exit
    code."""
    import uvicorn

    from gptoss_jax.server.app import create_app

    app = create_app(engine, settings)
    service = app.state.service

    class Server(uvicorn.Server):
        """uvicorn's, draining before it ends."""

        signal = 0
        ends = 0.0

        def handle_exit(self, sig: int, frame: Any) -> None:
            if service.draining:  # the second signal: at once
                self.should_exit = self.force_exit = True
            self.signal = self.signal or sig
            self.ends = self.ends or time.monotonic() + settings.drain_seconds
            service.draining = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = sock.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"{engine.name} is served at http://{host}:{port}", flush=True)

        async def on_tick(self, counter: int) -> bool:
            over = await super().on_tick(counter)
            if over or not service.draining:
                return over
            numbers = engine.statistics()
            idle = not (service.running or numbers["slots_busy"] or numbers["queue"])
            return idle or time.monotonic() > self.ends

        async def shutdown(self, sockets: Any = None) -> None:
            # what still runs ends with an error that says so
            await asyncio.to_thread(engine.close, 0)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    server = Server(config)
    server.run(sockets=[sock])
    return 130 if server.signal == signal.SIGINT else 0
