"""Conversations in the harmony format: messages, rendering, tolerant parsing, the Chat session. Names load lazily."""
