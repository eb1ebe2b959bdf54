"""What the server's owner decides: keys, limits, dates."""

import dataclasses
import datetime
from collections.abc import Sequence

from gptoss_jax.chat.messages import check_date
from gptoss_jax.errors import GptOssError


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    Attributes:
      max_body_bytes: Larger bodies are refused while they are read.
      body_seconds: Longest wait for a body.
      max_messages: Messages of one conversation.
      max_n: Completions of one prompt.
      max_prompts: Prompts of one /v1/completions request.
      max_top_logprobs: Likeliest tokens reported at each place, at most 20.
      max_stops: Stop strings of one request.
      max_stop_length: Characters of a stop string.
      max_tools: Tools of one request.
      max_schema_bytes: Of a JSON schema, regex, grammar or list of choices, each.
      max_schema_depth: Nesting of a JSON schema.
      request_seconds: Longest answer, the wait in the queue included.
      drain_seconds: How long SIGTERM lets running requests finish.
      keepalive_seconds: A stream that has been silent for so long gets a comment.
      allow_control_tokens: /v1/completions accepts control tokens as ids.
      max_stored: Most stored responses (/v1/responses); those not used for longest go first.
      max_stored_bytes: Most bytes of stored responses; likewise.
      stored_seconds: How long a stored response stays after its last use.
    """

    max_body_bytes: int = 16 * 2**20
    body_seconds: float = 60.0
    max_messages: int = 2048
    max_n: int = 64
    max_prompts: int = 64
    max_top_logprobs: int = 20
    max_stops: int = 16
    max_stop_length: int = 256
    max_tools: int = 128
    max_schema_bytes: int = 256 * 1024
    max_schema_depth: int = 32
    request_seconds: float = 1800.0
    drain_seconds: float = 30.0
    keepalive_seconds: float = 15.0
    allow_control_tokens: bool = False
    max_stored: int = 10_000
    max_stored_bytes: int = 512 * 2**20
    stored_seconds: float = 30 * 86_400.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not (value > 0 or (value == 0 and field.name == "drain_seconds")):
                raise GptOssError(f"{field.name} is {value}: expected a positive number")
        if self.max_top_logprobs > 20:
            raise GptOssError(f"max_top_logprobs is {self.max_top_logprobs}: at most 20")


@dataclasses.dataclass(frozen=True)
class ServerSettings(Limits):
    """How the server behaves: its limits, and

    Attributes:
      api_keys: Keys that open every route but /health; none of them: no key is asked for.
      date: "YYYY-MM-DD" that the model is told. None: the day on which the request comes, in the
        server's time zone; all cached prefixes change at midnight then.
      cors_origins: Origins whose pages may call; none by default.
      hosts: Names that the Host header may have, without port; none of them: any. A server on
        loopback without keys needs them: a page could give its own name this machine's address.
      store: File of /v1/responses (server/store.py); None keeps responses in memory only.
      log: One line a request on stdout.
    """

    api_keys: Sequence[str] = ()
    date: str | None = None
    cors_origins: Sequence[str] = ()
    hosts: Sequence[str] = ()
    store: str | None = None
    log: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not all(key and key.isascii() and key.isprintable() for key in self.api_keys):
            raise GptOssError("an API key is empty or not printable ASCII: use letters and digits")
        if self.date is not None:
            check_date(self.date)

    def today(self) -> str:
        """The date that the model is told now."""
        return self.date or datetime.date.today().isoformat()
