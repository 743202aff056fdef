"""A user's mistake in a run's log: its sentence, and no traceback; with Prefect's logging level DEBUG both."""

import logging

# Those alone that nothing but the user can change. A lost connection is none: `StoreError` and `ConnectionError` are retried.
USER_MISTAKES = (
    ValueError, ImportError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError
)  # fmt: skip
_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")


class PlainErrors(logging.Filter):
    """Takes the traceback of a user's mistake out of a record: every flow that it passes through would print it again."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True: the record itself stays."""
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno > logging.DEBUG and isinstance(error, USER_MISTAKES):
            logging.getLogger(record.name).debug("The traceback:", exc_info=record.exc_info)
            record.exc_info = record.exc_text = None
        return True


def install() -> None:
    """Filter the loggers through which Prefect tells of failures; again is as once."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, PlainErrors) for known in logger.filters):
            logger.addFilter(PlainErrors())
