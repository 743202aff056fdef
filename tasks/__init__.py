"""How often: retries, time limits, the one cache policy, Prefect's artifacts."""

from tasks.plain_errors import install

install()
