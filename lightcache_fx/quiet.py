"""Torch's own logs of what is expected to fail, and is tried all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export._trace")
"""Loggers that report a failure of which the error tells as well."""


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Keep warnings and errors of these loggers back; debugging output that was asked for (`TORCH_LOGS`) is not."""
    loggers, asked = [logging.getLogger(name) for name in _LOUD], _AskedFor()
    for logger in loggers:
        logger.addFilter(asked)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(asked)


class _AskedFor(logging.Filter):
    """One for each time, as a logger has a filter once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING
