"""A table's rows come with their places; what is wrong with one is its own, what is wrong with all is one sentence."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.data.sources.tables import quote_names, read_csv, read_jsonl, read_parquet

COLUMNS = ("file_name", "caption", "group")


def list_problems(table: object) -> list[tuple[str, str]]:
    return [(row.place, row.problem) for row in table.rows if row.problem]  # type: ignore[attr-defined]


def test_a_csv_line_of_more_cells_than_the_header_says_so_with_its_line() -> None:
    table = read_csv(b"file_name,caption,group\n0.png,portrait, 4k, detailed,anna\n1.png,fine,anna\n", COLUMNS)
    assert list_problems(table) == [("line 2", "line 2 has 5 cells, the header 3: put the caption in quotes")]
    assert table.rows[1].values == {"file_name": "1.png", "caption": "fine", "group": "anna"}


def test_a_csv_place_is_the_first_line_of_its_record_whatever_stands_before() -> None:
    table = read_csv(b'file_name,caption\r\n\r\n0.png,"two\nlines"\r\n1.png,a,b\r\n', COLUMNS)
    assert [row.place for row in table.rows] == ["line 3", "line 5"]
    assert table.rows[1].problem.startswith("line 5 has 3 cells")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'file_name,caption\n0.png,fine\n1.png,"open\n2.png,fine\n', 3),
        (b'file_name,caption\n0.png,"a "wild" cat"\n', 2),
        (b'file_name,caption\n0.png,"' + b"x" * 200_000, 2),
    ],
    ids=["open to the end", "single inside", "too long"],
)
def test_a_quote_that_breaks_a_csv_is_told_by_its_line(data: bytes, line: int) -> None:
    with pytest.raises(ValueError, match=rf"^line {line}: .*is a quote open"):
        read_csv(data, COLUMNS)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"file_name;caption", "separated by semicolons: separate them by commas"),
        (b"file_name\tcaption", "separated by tabs"),
        (b"file_name,caption,caption", "names the column 'caption' twice"),
    ],
)
def test_a_csv_header_that_would_be_misread_is_refused(header: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_csv(header + b"\n0.png;x\n", COLUMNS)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_a_newline_ends_a_json_line(mark: str) -> None:
    for ending in ("\n", "\r\n"):
        text = f'{{"file_name": "a.png", "caption": "one{mark}two"}}{ending}{{"file_name": "b.png", "caption": "x"}}'
        # The controls below 0x20 must be escaped in JSON itself: the line is refused whole, not cut.
        table = read_jsonl(text.encode(), COLUMNS)
        assert len(table.rows) == 2
        if mark >= " ":
            assert table.rows[0].values["caption"] == f"one{mark}two"


def test_odd_json_lines_are_problems_of_their_own() -> None:
    lines = [
        '{"file_name": "a.png"}',
        "7",
        '{"caption": ' + "9" * 5_000 + "}",
        "[" * 100_000,
        '{"caption": "a", "caption": "b"}',
        '{"file_name": "b.png"}',
    ]
    table = read_jsonl("\n".join(lines).encode(), COLUMNS)
    problems = dict(list_problems(table))
    assert list(problems) == ["line 2", "line 3", "line 4", "line 5"]
    assert problems["line 2"] == "line 2 is not a JSON object"
    assert all(problems[f"line {number}"].startswith(f"line {number} is not JSON") for number in (3, 4))
    assert problems["line 5"] == "line 5 names 'caption' twice"


@pytest.mark.parametrize("text", ['[{"file_name": "a.png"}]', '\n [\n {"file_name": "a.png"}\n]'])
def test_a_json_array_is_called_one(text: str) -> None:
    with pytest.raises(ValueError, match="it is a JSON array: write one object a line"):
        read_jsonl(text.encode(), COLUMNS)


def test_one_object_over_many_lines_is_told_with_its_first_line() -> None:
    with pytest.raises(ValueError, match="no line of it is a JSON object, as one a line is needed: line 1 is not JSON"):
        read_jsonl(b'{\n"file_name": "a.png"\n}', COLUMNS)


@pytest.mark.parametrize("read", [read_csv, read_jsonl])
@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("cp1252", r"line 2 is not UTF-8 \(it has the byte 0xe9\), it may be Windows-1252: save it as UTF-8"),
        ("utf-16", "it is UTF-16, not UTF-8: save it as UTF-8"),
        ("utf-16-le", "it is UTF-16, not UTF-8: save it as UTF-8"),
    ],
)
def test_another_encoding_is_named(read: object, encoding: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read("file_name,caption\na.png,émigré\n".encode(encoding), COLUMNS)  # type: ignore[operator]


def encode_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_parquet_columns_that_nobody_asked_for_are_not_read() -> None:
    far = pa.array([2**62], pa.timestamp("us"))  # a date that Python has not
    table = read_parquet(encode_parquet(pa.table({"file_name": ["a.png"], "caption": ["x"], "taken": far})), COLUMNS)
    assert table.columns == ("file_name", "caption", "taken")
    assert table.rows[0].values == {"file_name": "a.png", "caption": "x"}


def test_a_parquet_text_that_is_not_utf_8_is_given_as_its_bytes() -> None:
    texts = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    table = read_parquet(encode_parquet(pa.table({"file_name": ["a", "b"], "caption": texts})), COLUMNS)
    assert [row.values["caption"] for row in table.rows] == ["fine", b"caf\xe9"]
    assert table.rows[1].place == "row 2"


def test_names_that_are_no_plain_words_are_quoted() -> None:
    assert quote_names(["caption", " caption", "file name", ""]) == "caption, ' caption', 'file name', ''"
    assert quote_names([]) == "none"
