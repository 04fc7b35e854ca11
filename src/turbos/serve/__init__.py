"""Serving a model over HTTP: OpenAI's interface, sessions, and a page to chat with it."""
