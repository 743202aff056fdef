import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.data.records import (
    CONDITION_MAP_SCHEMA,
    IMAGE_PAIR_SCHEMA,
    ImagePair,
    arrays_table,
    condition_maps_table,
    generations_table,
    image_pairs_table,
    read_array,
)


def make_pair() -> ImagePair:
    return ImagePair(
        sample_id="a/1",
        group_id="a",
        seed=1,
        input_prompt="a cat",
        edit_instruction="make it a dog",
        edited_prompt="a dog",
        input_image=b"before",
        edited_image=b"after",
        split="validation",
        source_uri="a/1",
        exact_maps={"seg": (b"s0", b"s1"), "depth": (b"d0", b"d1")},
    )


def test_a_pair_keeps_every_field_in_its_table() -> None:
    (row,) = image_pairs_table([make_pair()]).to_pylist()
    assert row["input_image"] == {"bytes": b"before", "path": None}
    assert row["edited_image"]["bytes"] == b"after"
    assert [entry["condition"] for entry in row["exact_maps"]] == ["depth", "seg"]
    assert row["exact_maps"][1]["edited_map"]["bytes"] == b"s1"
    texts = ("sample_id", "group_id", "input_prompt", "edit_instruction", "edited_prompt", "split", "source_uri")
    assert [row[name] for name in texts] == ["a/1", "a", "a cat", "make it a dog", "a dog", "validation", "a/1"]
    assert row["seed"] == 1


def test_no_pairs_make_an_empty_table_of_the_same_schema() -> None:
    assert image_pairs_table([]).schema.equals(image_pairs_table([make_pair()]).schema, check_metadata=True)


@pytest.mark.parametrize("schema", [IMAGE_PAIR_SCHEMA, CONDITION_MAP_SCHEMA])
def test_the_metadata_declares_every_column_to_hugging_face(schema: pa.Schema) -> None:
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert set(features) == set(schema.names)
    images = {name for name in schema.names if pa.types.is_struct(schema.field(name).type)}
    assert images == {name for name in features if features[name] == {"_type": "Image"}}
    assert images


def test_nested_features_stand_in_the_order_of_their_fields() -> None:
    """Hugging Face ``datasets`` ignores the features of a column whose field order differs: its images become bytes."""
    features = json.loads(IMAGE_PAIR_SCHEMA.metadata[b"huggingface"])["info"]["features"]["exact_maps"]
    assert features["_type"] == "List"
    assert list(features["feature"]) == [field.name for field in IMAGE_PAIR_SCHEMA.field("exact_maps").type.value_type]
    assert features["feature"]["edited_map"] == {"_type": "Image"}


def test_a_table_read_back_has_the_schema_that_was_written() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table := image_pairs_table([make_pair()]), sink)
    found = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert str(found.schema) == str(table.schema)
    assert found.equals(table)


def test_condition_maps_stand_beside_their_samples() -> None:
    rows = condition_maps_table(["a", "b"], [b"1", b"2"], [b"3", b"4"]).to_pylist()
    assert rows[1] == {
        "sample_id": "b",
        "input_map": {"bytes": b"2", "path": None},
        "edited_map": {"bytes": b"4", "path": None},
    }


def test_generations_name_their_vision_task_and_seed() -> None:
    (row,) = generations_table(["a"], "image_to_depth", [2**62], [b"png"]).to_pylist()
    assert row == {
        "sample_id": "a",
        "vision_task": "image_to_depth",
        "seed": 2**62,
        "image": {"bytes": b"png", "path": None},
    }


def test_arrays_come_back_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    mean, text = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 2, 2), (3, 5, 7)))
    table = arrays_table({"sample_id": ["a", "b", "c"]}, {"edited_mean": mean, "embedding": text})
    assert np.array_equal(read_array(table, "edited_mean"), mean)
    assert np.array_equal(read_array(table, "embedding"), text)
    assert np.array_equal(read_array(table.slice(1, 1), "embedding"), text[1:2])


def test_arrays_refuse_another_number_of_samples() -> None:
    with pytest.raises(ValueError, match=r"different lengths: \{'sample_id': 2, 'mean': 1\}"):
        arrays_table({"sample_id": ["a", "b"]}, {"mean": np.zeros((1, 4, 2, 2), np.float32)})


def test_an_unknown_array_is_refused_by_name() -> None:
    table = arrays_table({"sample_id": ["a"]}, {"mean": np.zeros((1, 4, 2, 2), np.float32)})
    with pytest.raises(ValueError, match="no array 'std': there are mean"):
        read_array(table, "std")
