"""Parquet files in memory."""

import sys
from pathlib import Path

import pyarrow as pa

import prompt_diffusion
from prompt_diffusion.store.codec import open_parquet
from prompt_diffusion.store.sharded import encode_shard


def test_a_file_is_read_from_memory_that_is_not_python_s():
    data = encode_shard(pa.table({"x": [1, 2, 3]}))
    references = sys.getrefcount(data)
    file = open_parquet(data)
    assert sys.getrefcount(data) == references
    assert file.read()["x"].to_pylist() == [1, 2, 3]


def test_nothing_reads_by_arrow_s_datasets_whose_threads_end_after_the_interpreter():
    package = Path(prompt_diffusion.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "pq.read_table(" in path.read_text()]
    assert found == []
