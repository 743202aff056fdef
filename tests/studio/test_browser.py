"""The page, driven as a person would."""

import re

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import prompt_diffusion
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.data.transforms import decode_image, resize_image
from prompt_diffusion.generation import read_record
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.fingerprint import compute_digest
from tests.sharing import PATIENCE_SECONDS

pytestmark = pytest.mark.timeout(1200)


def drop(page, field, path):
    page.locator(f"#{field} input[type=file]").set_input_files(path)
    page.locator(f"#{field} img").wait_for()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def download(page, tmp_path):
    with page.expect_download() as started:
        page.get_by_role("button", name="Download PNG").filter(visible=True).first.click()
    path = tmp_path / started.value.suggested_filename
    started.value.save_as(path)
    return path


def wait_for_history(page, count):
    page.wait_for_function("count => document.querySelectorAll('#history img').length == count", arg=count)


def read_toast(page):
    toast = page.locator(".toast-body").first
    toast.wait_for()
    return " ".join(toast.inner_text().split())


def read(path):
    return resize_image(decode_image(path.read_bytes()), 32)


def test_what_is_generated_is_what_the_library_gives_for_that_seed(page, studio, scene_files, tmp_path):
    for field in ("source", "target", "query"):
        drop(page, field, scene_files[field])
    page.get_by_label("Text", exact=True).fill("a red cube")
    page.get_by_label("Steps").filter(visible=True).fill("2")
    press(page, "Generate")
    wait_for_history(page, 1)
    file = download(page, tmp_path)
    record = read_record(file.read_bytes())
    assert page.locator("strong").filter(visible=True).all_inner_texts() == [f"Seed {record.request.seed}"]
    assert file.name == f"prompt-diffusion-seed-{record.request.seed}.png"
    assert record.request.model == studio.reference
    assert record.images == {
        role: compute_digest(scene_files[name].read_bytes())
        for role, name in (("query", "query"), ("example_1_source", "source"), ("example_1_target", "target"))
    }
    expected = prompt_diffusion.load(studio.reference, Settings(tracking_uri=studio.tracking_uri, cache_dir=tmp_path))(
        "a red cube",
        (read(scene_files["source"]), read(scene_files["target"])),
        read(scene_files["query"]),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(record.request.seed),
        output_type="uint8",
    ).images[0]
    np.testing.assert_array_equal(decode_image(file.read_bytes()), expected)

    press(page, "Generate")  # another seed is drawn
    wait_for_history(page, 2)
    page.locator("#history img").nth(1).click()
    page.locator("#comparison").get_by_text(f"Seed {record.request.seed}").wait_for()
    page.locator("#history img").nth(0).click()
    page.locator("#comparison").get_by_text(re.compile(r"Seed \d+")).nth(1).wait_for()
    page.locator("#history img").nth(1).click()
    page.get_by_label("Text", exact=True).fill("")
    press(page, "Use these settings and images again")
    page.wait_for_function(
        "seed => [...document.querySelectorAll('input')].some(field => field.value == seed)",
        arg=str(record.request.seed),
    )
    assert page.get_by_label("Text", exact=True).input_value() == "a red cube"
    press(page, "Generate")
    wait_for_history(page, 3)
    assert download(page, tmp_path).read_bytes() == file.read_bytes()


def test_a_pair_is_made_of_a_photograph_by_the_vision_task_and_its_annotator(page, scene_files, tmp_path):
    page.get_by_text("No pair at hand?").click()
    drop(page, "photograph", scene_files["source"])
    page.get_by_label("Vision task").click()
    page.get_by_role("option", name="canny → image").click()
    page.wait_for_function("document.querySelector('[aria-label=Annotator]').value == 'canny'")
    press(page, "Make the pair")
    page.locator("#target img").wait_for()
    drop(page, "query", scene_files["query"])
    press(page, "Turn the query into its map")
    page.locator("#query img[src*=canny]").wait_for()
    press(page, "Generate")
    wait_for_history(page, 1)
    images = read_record(download(page, tmp_path).read_bytes()).images
    shown = {
        field: page.request.get(page.locator(f"#{field} img").get_attribute("src")).body()
        for field in ("source", "target", "query")
    }
    canny = build_annotator("canny")
    for field, name in (("source", "source"), ("query", "query")):
        photograph = decode_image(scene_files[name].read_bytes())
        np.testing.assert_array_equal(decode_image(shown[field]), canny.annotate(photograph[None])[0])
    assert shown["target"] == scene_files["source"].read_bytes()
    assert images == {
        "query": compute_digest(shown["query"]),
        "example_1_source": compute_digest(shown["source"]),
        "example_1_target": compute_digest(shown["target"]),
    }


def test_an_edit_shows_the_map_in_between_and_the_models_tab_every_version(page, studio, scene_files, tmp_path):
    page.get_by_role("tab", name="Edit").click()
    drop(page, "edit-image", scene_files["query"])
    press(page, "Edit")
    assert "an edit needs a prompt" in read_toast(page).lower()
    page.get_by_label("New text").fill("a red cube")
    page.get_by_role("button", name="Edit", exact=True).filter(visible=True).click()
    page.locator("#map-between img").wait_for()
    wait_for_history(page, 1)
    record = read_record(download(page, tmp_path).read_bytes())
    assert (record.request.mode, record.request.condition, set(record.images)) == ("edit", "depth", {"query"})

    page.get_by_role("tab", name="Models").click()
    page.locator("#versions [role=gridcell]").filter(has_text="challenger").click()
    page.locator("#card").get_by_text("Random weights for tests").first.wait_for()
    assert "models:/tiny/1" in page.locator("#card").inner_text()


def test_what_is_too_large_or_no_image_is_refused_in_a_sentence(page, studio, tmp_path):
    heavy, wide, text = tmp_path / "heavy.png", tmp_path / "wide.png", tmp_path / "text.png"
    heavy.write_bytes(b"\x89PNG" + bytes(21 * 2**20))
    Image.new("1", (5000, 5000)).save(wide)
    text.write_text("no image")
    for path, sentence in (
        (heavy, "exceed the maximum allowed size of 20.0 Mb"),
        (wide, "the image has 5000 x 5000 pixels, more than 16 megapixels"),
        (text, "is not an image file that can be read"),
    ):
        page.locator("#query input[type=file]").set_input_files(path)
        if path != heavy:  # which never arrives
            page.locator("#query img").wait_for(state="attached")
            press(page, "Generate")
        assert sentence in read_toast(page)
        page.locator(".toast-close").first.click()
        page.locator(".toast-body").wait_for(state="detached")
        if path != heavy:
            page.locator("#query [aria-label*=lear], #query [aria-label*=emove]").first.click()
    assert "Traceback" not in studio.log.read_text()


@pytest.mark.parametrize("path", ["/etc/hostname", __file__])
def test_no_file_but_the_visitor_s_is_served(studio, path):
    assert httpx.get(f"{studio.address}/gradio_api/file={path}", timeout=PATIENCE_SECONDS).status_code == 403
