"""The server: engine, slot-based KV cache, sampling and the OpenAI-compatible HTTP surface."""
