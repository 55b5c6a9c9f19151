"""Structured logs on stderr: one JSON object a line, or text with name=value behind it."""

import json
import logging
import time


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with the record's extra fields."""

    _usual = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        body = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        body |= {k: v for k, v in vars(record).items() if k not in self._usual}
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


class _TextFormatter(logging.Formatter):
    """Time, level, message, then extra fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{time.strftime('%H:%M:%S', time.localtime(record.created))} "
            f"{record.levelname.lower()} {record.getMessage()}"
        )
        extra = {k: v for k, v in vars(record).items() if k not in _JsonFormatter._usual}
        if extra:
            line += " " + " ".join(f"{k}={v}" for k, v in extra.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def log_to_stderr(*, as_json: bool) -> None:
    """Has this process's loggers write there."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())
    for name in ("jaxsys", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO if name == "jaxsys" else logging.WARNING)
        logger.propagate = False
