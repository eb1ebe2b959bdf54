"""One response as it is made: events of a turn in, events of the Responses API out.

Knows the shapes of events and output items, and their order:

    response.created [response.queued] response.in_progress
    reasoning   output_item.added content_part.added reasoning_text.delta* reasoning_text.done
                content_part.done output_item.done
    message     output_item.added content_part.added output_text.delta* output_text.done
                content_part.done output_item.done
    call        output_item.added function_call_arguments.delta* function_call_arguments.done
                output_item.done
    response.completed | response.incomplete | response.failed

An item that is cut ends like the others, with status incomplete. A cancelled response ends with
response.incomplete and status cancelled. Refuses to know where events go.
"""

from collections.abc import Sequence
from typing import Any

from gptoss_jax.server.chat_completions import logprob_dict
from gptoss_jax.server.conversation import (
    CallDelta,
    CallEnd,
    CallStart,
    Event,
    Finished,
    ItemEnd,
    PreambleDelta,
    ReasoningDelta,
    TextDelta,
    Usage,
)
from gptoss_jax.server.responses_items import new_id, output_text, reasoning_item, seal
from gptoss_jax.tokenizer import Tokenizer

Json = dict[str, Any]
OVER = ("completed", "incomplete", "failed", "cancelled")


class Writer:
    """Makes the events of one response, and keeps the response as it is so far.

    Args:
      response: The response object without output; its status is that of the first event.
      tokenizer: Spells tokens of log probabilities.
      sealed: Reasoning items get encrypted_content too.

    `response` is always a whole object; objects that were handed out are never changed.
    """

    def __init__(self, response: Json, tokenizer: Tokenizer, sealed: bool = False):
        self.response = response
        self._tokenizer, self._sealed = tokenizer, sealed
        self._sequence = 0
        self._item: Json | None = None  # the open one, as it began
        self._texts: list[str] = []  # its text so far
        self._logprobs: list[Json] = []

    def start(self) -> list[Json]:
        """The first events, up to in_progress if the response is not queued."""
        out = [self._event("response.created", response=self.response)]
        kind = "queued" if self.response["status"] == "queued" else "in_progress"
        return [*out, self._event(f"response.{kind}", response=self.response)]

    def feed(self, event: Event, now: float) -> list[Json]:
        """What an event of the turn makes; Finished makes the last ones (at the time `now`)."""
        out = []
        if self.response["status"] == "queued":
            self._set(status="in_progress")
            out.append(self._event("response.in_progress", response=self.response))
        if isinstance(event, ReasoningDelta):
            return [*out, *self._reasoning(event)]
        if isinstance(event, TextDelta | PreambleDelta):
            return [*out, *self._text(event)]
        if isinstance(event, CallStart):
            return [*out, self._call(event)]
        if isinstance(event, CallDelta):
            return [*out, self._delta("function_call_arguments", event.text)]
        if isinstance(event, CallEnd | ItemEnd):
            return [*out, *self._end_item("completed" if event.complete else "incomplete")]
        assert isinstance(event, Finished)
        usage = _usage(event.usage)
        if event.reason == "length":
            details = {"reason": "max_output_tokens"}
            return [*out, *self.end("incomplete", incomplete_details=details, usage=usage)]
        return [*out, *self.end("completed", completed_at=int(now), usage=usage)]

    def end(self, status: str, **fields: Any) -> list[Json]:
        """The last events: what is open ends incomplete, then the response as `status`."""
        out = self._end_item("incomplete")
        self._set(status=status, **fields)
        kind = "incomplete" if status == "cancelled" else status
        return [*out, self._event(f"response.{kind}", response=self.response)]

    def retract(self, events: Sequence[Json]) -> None:
        """The last events are told to nobody: others come in their place."""
        self._sequence = events[0]["sequence_number"]

    def _set(self, **fields: Any) -> None:
        self.response = {**self.response, **fields}

    def _event(self, kind: str, **fields: Any) -> Json:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}

    def _place(self) -> Json:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"])}

    def _added(self, item: Json, part: Json | None) -> list[Json]:
        self._item, self._texts, self._logprobs = item, [], []
        index = len(self.response["output"])
        out = [self._event("response.output_item.added", output_index=index, item=item)]
        if part is not None:
            where = {**self._place(), "content_index": 0}
            out.append(self._event("response.content_part.added", **where, part=part))
        return out

    def _delta(self, kind: str, text: str, **fields: Any) -> Json:
        self._texts.append(text)
        return self._event(f"response.{kind}.delta", **self._place(), delta=text, **fields)

    def _reasoning(self, event: ReasoningDelta) -> list[Json]:
        out = []
        if self._item is None:
            item = reasoning_item(new_id("rs"), [], "in_progress")
            out = self._added(item, {"type": "reasoning_text", "text": ""})
        return [*out, self._delta("reasoning_text", event.text, content_index=0)]

    def _text(self, event: TextDelta | PreambleDelta) -> list[Json]:
        out = []
        if self._item is None:
            item = {
                "type": "message",
                "id": new_id("msg"),
                "role": "assistant",
                "content": [],
                "status": "in_progress",
                "phase": "commentary" if isinstance(event, PreambleDelta) else "final_answer",
            }
            out = self._added(item, output_text(""))
        logprobs = [logprob_dict(entry, self._tokenizer) for entry in event.logprobs]
        self._logprobs += logprobs
        shown = [_short(logprob) for logprob in logprobs]
        return [*out, self._delta("output_text", event.text, content_index=0, logprobs=shown)]

    def _call(self, event: CallStart) -> Json:
        item = {
            "type": "function_call",
            "id": new_id("fc"),
            "call_id": event.id,
            "name": event.name,
            "arguments": "",
            "status": "in_progress",
        }
        return self._added(item, None)[0]

    def _end_item(self, status: str) -> list[Json]:
        if self._item is None:
            return []
        text, where, out = "".join(self._texts), self._place(), []
        item = {**self._item, "status": status}
        if item["type"] == "function_call":
            item["arguments"] = text
            kind = "response.function_call_arguments.done"
            out.append(self._event(kind, **where, arguments=text))
        else:
            where["content_index"] = 0
            if item["type"] == "reasoning":
                part, more = {"type": "reasoning_text", "text": text}, {}
                kind = "response.reasoning_text.done"
                item |= {"encrypted_content": seal(text)} if self._sealed else {}
            else:
                part = output_text(text, self._logprobs)
                more = {"logprobs": [_short(logprob) for logprob in self._logprobs]}
                kind = "response.output_text.done"
            item["content"] = [part]
            out.append(self._event(kind, **where, text=text, **more))
            out.append(self._event("response.content_part.done", **where, part=part))
        index = len(self.response["output"])
        out.append(self._event("response.output_item.done", output_index=index, item=item))
        self._item = None
        self._set(output=[*self.response["output"], item])
        return out


def _short(logprob: Json) -> Json:
    """As events show it: without bytes."""
    top = [{"token": t["token"], "logprob": t["logprob"]} for t in logprob["top_logprobs"]]
    return {"token": logprob["token"], "logprob": logprob["logprob"], "top_logprobs": top}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def failure(message: str, code: str = "server_error") -> Json:
    """The error of a failed response."""
    return {"code": code, "message": message}
