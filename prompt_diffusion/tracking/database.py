"""MLflow's database in a file: made whole before it has its name, and recognised where it is not.

MLflow makes its tables in place, in a hundred statements: who is killed meanwhile, or not alone, leaves a file that no later
run can open. So the tables are made in a temporary file beside it, under a lock, and the whole file is put in its place.
"""

import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.engine import URL, make_url

from prompt_diffusion.store.local_files import hold

_SIDES = ("", "-journal", "-wal", "-shm")  # what SQLite keeps beside a database


def find_database(uri: str) -> Path | None:
    """Return the file of a SQLite tracking URI; None for a server, another database, and one in memory.

    ValueError where the file's name was cut at a question mark, which begins the options of such an address.
    """
    if not uri.startswith("sqlite:///"):
        return None
    url = make_url(uri)
    cut = uri.partition("?")[2]
    if cut and ("/" in cut or "=" not in cut):
        raise ValueError(
            f"{uri!r} has a question mark in its path, which ends the path there: choose a folder without one"
        )
    return None if not url.database or url.database == ":memory:" else Path(url.database)


def check_database(path: Path) -> None:
    """Raise ValueError, in one sentence, for a file that is no database, or one whose tables are half made."""
    if _is_half_made(path):
        raise ValueError(
            f"{path} is a half-made database of MLflow's, as a process leaves it that is killed while it makes the tables; "
            "nothing is in it yet: unless another program is making it now, delete it and run the same command again"
        )


def make_database(path: Path) -> None:
    """Make the database where there is none; of all that do so at once, one does. ValueError as `check_database` raises it."""
    if not _is_missing(path):
        check_database(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path.with_name(f".{path.name}.lock")):
        if not _is_missing(path):
            check_database(path)
            return
        for left in path.parent.glob(f".{path.name}.*.new*"):  # of a process that was killed: one makes it at a time
            left.unlink()
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
        try:
            _make_tables(temporary)
            temporary.replace(path)
        finally:
            for side in _SIDES:
                Path(f"{temporary}{side}").unlink(missing_ok=True)


def _make_tables(path: Path) -> None:
    """Make MLflow's tables in a file that is nobody else's, all in it when this returns."""
    from mlflow.store.db import utils

    engine = create_engine(URL.create("sqlite", database=str(path)))
    try:
        utils._initialize_tables(engine)
    finally:
        engine.dispose()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_missing(path: Path) -> bool:
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


def _is_half_made(path: Path) -> bool:
    """Say whether a database's tables were never finished; ValueError for a file that is no database."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not {"alembic_version", "experiments"} <= names:
                return True
            if connection.execute("SELECT 1 FROM experiments").fetchone() is not None:
                return (
                    False  # finished once, for MLflow makes an experiment right after; its version is MLflow's to judge
                )
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        raise ValueError(f"the database {path} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no SQLite database ({error}): point MLFLOW_TRACKING_URI elsewhere") from error
    from mlflow.store.db import utils

    return revision is None or revision[0] != utils._get_latest_schema_revision()
