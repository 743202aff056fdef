"""What MLflow runs to serve a registered model: a copy of this file lies beside it, all else is the installed package.

MLflow runs that copy as it then is, unchecked: who can write to the registry's artifacts can run code where a model is served.
"""

import mlflow

from prompt_diffusion.registry.serving import ServedModel

mlflow.models.set_model(ServedModel())
