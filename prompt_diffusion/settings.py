"""Where things live on this machine: the one place that reads the environment."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Places, each from an environment variable, with defaults that need nothing but a checkout."""

    model_config = SettingsConfigDict(
        env_prefix="PROMPT_DIFFUSION_", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )

    store: str = "outputs/store"
    """Root of all sealed manifests: a folder or an s3:// address (PROMPT_DIFFUSION_STORE)."""
    cache_dir: Path = Path("outputs/cache")
    """Folder for local copies of weights (PROMPT_DIFFUSION_CACHE_DIR)."""
    weights_dir: Path | None = None
    """Folder with weights that were fetched by hand, for machines without a hub (PROMPT_DIFFUSION_WEIGHTS_DIR)."""
    tracking_uri: str = Field(default="sqlite:///outputs/mlflow.db", alias="MLFLOW_TRACKING_URI")
    """MLflow's tracking server or database (MLFLOW_TRACKING_URI)."""
    studio_password: SecretStr | None = None
    """What the studio asks of every visitor; without it, a page that other machines can reach draws one
    (PROMPT_DIFFUSION_STUDIO_PASSWORD)."""
    registered_model: str = "prompt-diffusion"
    """Name under which models are registered (PROMPT_DIFFUSION_REGISTERED_MODEL)."""


def load_settings() -> Settings:
    """Read the environment; ValueError where the working directory, which relative places begin at, was deleted."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ValueError(
            "the working directory was deleted: change into another one and run the command again"
        ) from None
    return Settings()
