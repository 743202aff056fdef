"""Deliver to MLflow what trainings on this machine could not: ``python -m prompt_diffusion.tracking``."""

import logging
import sys

from prompt_diffusion.settings import load_settings
from prompt_diffusion.tracking.delivery import deliver_outboxes


def main() -> int:
    """Deliver every outbox; return 1 where something is left, which a warning names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        left = deliver_outboxes(load_settings())
    except ValueError as error:
        sys.exit(f"error: {error}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
