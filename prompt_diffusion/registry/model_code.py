"""What MLflow runs to serve a registered model: a copy of this file is beside it; all else is the installed package.

MLflow runs that copy whatever it contains, without checking a digest: whoever can write to the artifacts chooses what
``mlflow models serve`` and ``mlflow.pyfunc.load_model`` execute. Our own ``load`` neither fetches nor runs it.
"""

import mlflow

from prompt_diffusion.registry.serving import ServedModel

mlflow.models.set_model(ServedModel())
