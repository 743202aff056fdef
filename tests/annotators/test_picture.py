import numpy as np

from prompt_diffusion.annotators.picture import load_photographs, render_picture


def test_the_picture_has_a_row_for_each_photograph_and_a_column_for_each_annotator() -> None:
    photographs = load_photographs()
    assert len(photographs) == 7
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.std() > 20 for image in photographs.values())
    sheet = render_picture(("canny", "scribble_canny"), longest_side=96, tile_width=48)
    assert sheet.shape[1:] == (3 * 48, 3)
    assert sheet.shape[0] == sum(round(48 * thumbnail_ratio(image)) for image in photographs.values())
    grey = sheet[:, 48:]
    assert (grey[..., :1] == grey).all()
    assert not (sheet[:, :48, :1] == sheet[:, :48]).all()


def thumbnail_ratio(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> float:
    """Height over width of the photograph once its longest side is 96."""
    height, width = image.shape[:2]
    longest = max(height, width)
    return round(height * 96 / longest) / round(width * 96 / longest)
