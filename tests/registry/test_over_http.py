"""The registry behind MLflow's own server, which also hands out the files."""

import prompt_diffusion
from prompt_diffusion.registry import ModelFacts, fetch, list_versions, record_metrics, register_folder
from prompt_diffusion.settings import Settings
from tests.mlflow_server import Server


def test_a_model_that_was_registered_at_a_server_is_fetched_once(tmp_path, pipeline_folder, make_mlflow_database):
    server = Server(tmp_path, make_mlflow_database)
    server.start()
    try:
        settings = Settings(tracking_uri=server.uri, cache_dir=tmp_path / "cache")
        registered = register_folder(pipeline_folder, settings, facts=ModelFacts(title="Far away"))
        record_metrics(registered, settings, {"rmse/image_to_depth": 0.25})
        folder = fetch(registered.uri, settings)
        assert "0.25" in (folder / "README.md").read_text()
        artifacts = tmp_path / "artifacts"
        artifacts.rename(tmp_path / "away")
        pipeline = prompt_diffusion.load("models:/prompt-diffusion@challenger", settings)
        assert pipeline.unet.config.sample_size == 8
        (version,) = list_versions(settings)
        assert version.metrics == {"rmse/image_to_depth": 0.25}
    finally:
        server.kill()
