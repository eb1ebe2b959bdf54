"""An OpenAI-compatible server over the batching engine."""
