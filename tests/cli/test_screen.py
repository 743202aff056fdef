"""What a long command shows, and where its log goes."""

import io
import os
import subprocess
import sys

import pytest

from prompt_diffusion.cli import screen
from prompt_diffusion.cli.screen import Screen, say_seconds, show_run
from tasks.progress import PROGRESS


@pytest.fixture
def shown(monkeypatch):
    """Return what a screen prints where there is no terminal, at once instead of every minute."""
    monkeypatch.setattr(screen, "_SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    handler = Screen(stream)
    PROGRESS.addHandler(handler)
    level = PROGRESS.level
    PROGRESS.setLevel("DEBUG")
    yield stream
    PROGRESS.setLevel(level)
    PROGRESS.removeHandler(handler)
    handler.close()


def test_a_part_is_shown_when_it_begins_with_its_stages_and_when_it_is_over(shown):
    PROGRESS.debug("train", extra={"part": "train", "place": "3/6"})
    PROGRESS.debug("[a] model", extra={"percent": 10.0})
    PROGRESS.debug("another", extra={"percent": 50.0})
    PROGRESS.debug("[a] model", extra={"percent": 100.0})
    PROGRESS.debug("another", extra={"percent": 75.0})
    PROGRESS.debug("train", extra={"part": "train", "place": "3/6", "seconds": 61.2})
    assert shown.getvalue().splitlines() == [
        "[3/6] train ...",
        "[3/6] train · [a] model: 10 %",
        "[3/6] train · [a] model: 10 % · another: 50 %",
        "[3/6] train · another: 75 %",
        "[3/6] train · 61 s",
    ]


@pytest.mark.parametrize(("seconds", "said"), [(4.4, "4 s"), (89.0, "89 s"), (540.0, "9 min"), (9000.0, "2.5 h")])
def test_a_duration_is_said_as_a_person_says_it(seconds, said):
    assert say_seconds(seconds) == said


def test_what_a_run_and_its_children_print_goes_to_the_log(tmp_path, capfd):
    log = tmp_path / "outputs" / "run.log"
    with show_run(log, is_verbose=False) as terminal:
        os.write(1, b"from this process\n")
        subprocess.run([sys.executable, "-c", "import sys; print('from a child', file=sys.stderr)"], check=True)
        terminal.write("for the terminal\n")
    os.write(1, b"afterwards\n")
    out, err = capfd.readouterr()
    assert (out, err) == ("afterwards\n", "for the terminal\n")
    assert log.read_text() == "from this process\nfrom a child\n"


def test_a_run_that_fails_says_where_its_log_is_and_gives_the_output_back(tmp_path, capfd):
    log = tmp_path / "run.log"
    with pytest.raises(KeyboardInterrupt), show_run(log, is_verbose=False):
        raise KeyboardInterrupt
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == f"the log: {log}\nafterwards\n"


def test_with_verbose_everything_is_printed_as_it_comes(tmp_path, capfd):
    with show_run(tmp_path / "run.log", is_verbose=True):
        os.write(1, b"from this process\n")
    assert capfd.readouterr().out == "from this process\n"
    assert not (tmp_path / "run.log").exists()
