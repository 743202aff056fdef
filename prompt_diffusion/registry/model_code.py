"""What MLflow runs to serve a registered model: a copy of this file lies beside it, all else is the installed package."""

import mlflow

from prompt_diffusion.registry.serving import ServedModel

mlflow.models.set_model(ServedModel())
