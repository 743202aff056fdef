"""What MLflow runs to serve a registered model: a copy of this file lies beside it, all else is the installed package.

MLflow runs that copy whatever it holds, and checks no digest of it: where others can write to the artifacts, they choose what
``mlflow models serve`` and ``mlflow.pyfunc.load_model`` execute. Our own ``load`` neither fetches nor runs it.
"""

import mlflow

from prompt_diffusion.registry.serving import ServedModel

mlflow.models.set_model(ServedModel())
