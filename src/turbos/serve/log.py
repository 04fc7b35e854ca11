"""The log of a server: one JSON object a line, for programs to read; what was said is never in it by itself.

>>> record = logging.LogRecord("turbos.serve", logging.INFO, "", 0, "request", None, None)
>>> record.fields = {"status": 200}
>>> line = json.loads(JsonLines().format(record))
>>> line["event"], line["status"], line["level"]
('request', 200, 'info')
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO


class JsonLines(logging.Formatter):
    """Writes a record's message as `event`, its `fields` beside it, and an error's trace as `trace`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= record.__dict__.get("fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


@contextmanager
def log_to(stream: TextIO, level: int) -> Iterator[None]:
    """Send what the server and its HTTP library log to a stream and nowhere else, as long as the context lasts."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    levels = {"turbos.serve": level, "uvicorn.error": max(level, logging.WARNING)}
    loggers = [logging.getLogger(name) for name in levels]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(levels[logger.name])
    try:
        yield
    finally:
        for logger, (handlers, propagate, least) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(least)
