"""MLflow's database in a file: made whole before it has its name, and recognised where it is not.

MLflow makes its tables in place, in a hundred statements: who is killed meanwhile, or not alone, leaves a file that no later
run can open. So the tables are made in a temporary file beside it, under a lock, and the whole file is put in its place.
"""

import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy.engine import make_url

_SIDES = ("", "-journal", "-wal", "-shm")  # what SQLite keeps beside a database


def find_database(uri: str) -> Path | None:
    """Return the file of a SQLite tracking URI; None for a server, another database, and one in memory."""
    if not uri.startswith("sqlite:///"):
        return None
    name = make_url(uri).database
    return None if not name or name == ":memory:" else Path(name)


def check_database(path: Path) -> None:
    """Raise ValueError, in one sentence, for a file that is no database of MLflow's, or one whose tables are half made."""
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path} is not there, or empty: no registry has been made yet")
    revision = _read_revision(path)
    if revision is None:
        raise ValueError(
            f"{path} is a half-made database of MLflow's, as a process leaves it that is killed while it makes the tables: "
            "no run of a model can be in it yet, so delete it and run the same command again"
        )


def make_database(path: Path) -> None:
    """Make the database where there is none; of all that do so at once, one does. ValueError as `check_database` raises it."""
    if path.is_file() and path.stat().st_size and _read_revision(path) is not None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _hold(path.with_name(f".{path.name}.lock")):
        for left in path.parent.glob(f".{path.name}.*.new*"):  # of a process that was killed: one makes it at a time
            left.unlink()
        if path.is_file() and path.stat().st_size:
            check_database(path)
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
        try:
            _make_tables(temporary)
            os.replace(temporary, path)
        finally:
            for side in _SIDES:
                Path(f"{temporary}{side}").unlink(missing_ok=True)


def _make_tables(path: Path) -> None:
    """Make MLflow's tables in a file that is nobody else's, all in it when this returns."""
    from mlflow.store.db import utils
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401 - imports every table, and so do the next
    from mlflow.store.model_registry import sqlalchemy_store as _  # noqa: F401

    engine = utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    try:
        utils._initialize_tables(engine)
    finally:
        engine.dispose()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read_revision(path: Path) -> str | None:
    """Return the version of the tables, None where they were never finished; ValueError for a file that is no database."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "alembic_version" not in names:
                return None
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no SQLite database ({error}): point MLFLOW_TRACKING_URI elsewhere") from error
    return None if row is None else str(row[0])


@contextmanager
def _hold(path: Path) -> Iterator[None]:
    """Keep other processes and threads of this machine out for the time of the block; a killed holder lets go."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
