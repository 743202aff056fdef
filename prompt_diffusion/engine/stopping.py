"""How a training says that it was asked to stop; imports no torch, so that what decides about retries can name it."""


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop, and has saved a checkpoint
    """The run was asked to stop (SIGTERM or Ctrl-C) and has saved a checkpoint."""
