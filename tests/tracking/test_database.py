"""MLflow's database appears whole or not at all, whoever is killed or comes at the same time; a half-made one is named."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prompt_diffusion.registry import list_versions
from prompt_diffusion.settings import Settings, load_settings
from prompt_diffusion.tracking.client import check_tracking_uri, connect, find_or_create_run, hide_password, knock
from prompt_diffusion.tracking.database import find_database, make_database


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "mlflow.db"
    make_database(path)
    return path


FIRST_RUN = """
import sys
from pathlib import Path
from prompt_diffusion.settings import Settings
from prompt_diffusion.tracking.client import connect, find_or_create_run
settings = Settings(tracking_uri=sys.argv[1])
print(find_or_create_run(connect(settings), settings, "first", "f" * 32)[0])
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from mlflow.store.db import utils
from sqlalchemy import event
from sqlalchemy.engine import Engine
from prompt_diffusion.tracking.database import make_database

seen = 0

def count(*_):
    global seen
    seen += 1
    if seen == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Engine, "before_cursor_execute", count)
make_database(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("statement", [1, 40, 150])
def test_a_kill_while_the_tables_are_made_leaves_nothing_that_counts(
    tmp_path: Path, statement: int, whole: Path
) -> None:
    path = tmp_path / "mlflow.db"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(statement)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not path.exists()


def test_after_a_kill_the_next_run_makes_the_database_and_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    subprocess.run([sys.executable, "-c", KILLED, str(path), "60"], capture_output=True, check=False)
    assert list(tmp_path.glob(".mlflow.db.*.new*"))
    make_database(path)
    assert {file.name for file in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    settings = Settings(tracking_uri=f"sqlite:///{path}")
    assert find_or_create_run(connect(settings), settings, "first", "f" * 32)[1]


def test_first_runs_at_once_meet_in_one_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", FIRST_RUN, uri]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=False), range(2)))
    assert [each.returncode for each in made] == [0, 0], made[0].stderr + made[1].stderr


def test_a_half_made_database_is_named_at_once_and_left_alone(tmp_path: Path, whole: Path) -> None:
    for name, statements in {
        "no version": ["DELETE FROM alembic_version"],
        "no table of versions": ["DROP TABLE alembic_version"],
        "tables missing": ["DROP TABLE experiments"],
        "an earlier version": ["UPDATE alembic_version SET version_num = '451aebb31d03'"],
    }.items():
        path = tmp_path / f"{name}.db"
        shutil.copyfile(whole, path)
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()
        before = path.read_bytes()
        settings = Settings(tracking_uri=f"sqlite:///{path}")
        for ask in (connect, list_versions):
            with pytest.raises(ValueError, match=r"is a half-made database of MLflow's.*delete it") as caught:
                ask(settings)
            assert "\n" not in str(caught.value)
        assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(ValueError, match="is no SQLite database"):
        connect(Settings(tracking_uri=f"sqlite:///{path}"))


def test_an_empty_file_counts_as_none(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.touch()
    make_database(path)
    assert path.stat().st_size == whole.stat().st_size


@pytest.mark.parametrize("folder", ["a b", "a#b", "a%20b", "ä"])
def test_a_database_lies_where_its_address_says(tmp_path: Path, whole: Path, folder: str) -> None:
    uri = f"sqlite:///{tmp_path}/{folder}/mlflow.db"
    path = find_database(uri)
    assert path is not None
    path.parent.mkdir()
    shutil.copyfile(whole, path)
    settings = Settings(tracking_uri=uri)
    find_or_create_run(connect(settings), settings, "x", "f" * 32)
    with sqlite3.connect(path) as connection:
        ((location,),) = connection.execute("SELECT artifact_location FROM experiments WHERE name = 'prompt-diffusion'")
    connection.close()
    assert location == (path.parent / "mlartifacts").as_uri()


def test_a_question_mark_in_a_path_is_refused_and_options_are_not() -> None:
    for uri in ("sqlite:////data/what?/mlflow.db", "sqlite:////data/mlflow?.db"):
        with pytest.raises(ValueError, match="has a question mark in its path") as caught:
            check_tracking_uri(uri)
        assert "\n" not in str(caught.value)
    check_tracking_uri("sqlite:////data/mlflow.db?timeout=30")
    assert find_database("sqlite:////data/mlflow.db?timeout=30") == Path("/data/mlflow.db")
    assert find_database("sqlite:///:memory:") is None
    assert find_database("http://host:5000") is None


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:secret@127.0.0.1:1",
        "http://secret@127.0.0.1:1",
        "http://me:se@cret@127.0.0.1:1",
        "http://me:secret@127.0.0.1:port",
    ],
)
def test_a_password_is_never_said(uri: str, tmp_path: Path) -> None:
    settings = Settings(tracking_uri=uri, cache_dir=tmp_path)
    said = []
    for ask in (lambda: check_tracking_uri(uri), lambda: knock(settings), lambda: list_versions(settings)):
        try:
            ask()
        except (ValueError, ConnectionError) as error:
            said.append(str(error))
    assert said
    assert not [text for text in said if "secret" in text or "cret" in text or "me:" in text]
    assert hide_password(f"API request to {uri}/api failed").endswith("/api failed")


def test_a_deleted_working_directory_is_one_sentence(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before = Path.cwd()
    os.chdir(gone)
    try:
        gone.rmdir()
        with pytest.raises(ValueError, match="the working directory was deleted"):
            load_settings()
    finally:
        os.chdir(before)
