"""The table of model versions."""

from datetime import UTC, datetime

import pytest

pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

from prompt_diffusion.registry import ModelVersionSummary
from prompt_diffusion.studio.models_tab import tabulate


def test_the_table_of_versions_has_a_column_for_each_metric_and_none_that_is_empty():
    def version(number, **metrics):
        return ModelVersionSummary(
            name="m",
            version=number,
            uri=f"models:/m/{number}",
            aliases=(),
            created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
            title="",
            source="",
            fingerprint="",
            vision_tasks=(),
            licences={},
            metrics=metrics,
        )

    headers, rows = tabulate([version("2", **{"rmse/image_to_hed": 0.1}), version("1")])
    assert headers == ["model", "version", "registered (UTC)", "RMSE image → hed"]
    assert rows == [["m", "2", "2026-01-02 03:04", "0.1"], ["m", "1", "2026-01-02 03:04", ""]]
