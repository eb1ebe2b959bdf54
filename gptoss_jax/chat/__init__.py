"""Conversations in the harmony format: messages, rendering, tolerant parsing, the Chat session.
Names load lazily."""

import importlib

_HOMES = {
    "Chat": "session",
    "ChatSettings": "messages",
    "Message": "messages",
    "Parser": "parse",
    "Reply": "reply",
    "ResponseFormat": "messages",
    "Tool": "messages",
    "from_openai": "messages",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'gptoss_jax.chat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptoss_jax.chat.{_HOMES[name]}"), name)
