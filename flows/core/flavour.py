"""The model's files in MLflow's sentence-transformers flavour: how they are written, and found again. Core layer."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.errors import EkibenError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "torch", "numpy")  # what loading the model takes
MODULES_FILE = "modules.json"  # marks a sentence-transformers folder


def save_flavour(model: SentenceTransformer, folder: Path, example: list[str], *, run_id: str, logged: Any) -> None:
    """Write `model` into `folder` as the files of the logged model `logged`.

    Args:
        model: The model.
        folder: Does not exist yet.
        example: A few texts: the input example; their vectors give the signature.
        run_id: The run that made the model.
        logged: MLflow's entity of the logged model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flavour imports modules that sentence-transformers has renamed
        import mlflow.sentence_transformers
        from mlflow.models import Model, infer_signature

        mlflow.sentence_transformers.save_model(
            model,
            str(folder),
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=run_id,
            ),
            signature=infer_signature(example, model.encode(example, show_progress_bar=False)),
            input_example=example,
            pip_requirements=_pins(),  # without them MLflow loads the model in a second process to find out
            create_model_card=False,  # it would look the base model up on the hub
        )


def fetch_model(logged: Any, to: Path, *, tracking_uri: str) -> Path:
    """Download a logged model.

    Args:
        logged: MLflow's entity of the logged model.
        to: The folder for its files; created when missing.
        tracking_uri: Where the model was logged; a server hands out its files.

    Returns:
        The sentence-transformers folder, for `SentenceTransformer(path)`.

    Raises:
        EkibenError: the logged model holds no sentence-transformers folder.
    """
    from mlflow.artifacts import download_artifacts

    to.mkdir(parents=True, exist_ok=True)
    # Not `models:/<id>`: MLflow would resolve it through the process-wide tracking URI, whatever is given here.
    files = Path(download_artifacts(logged.artifact_location, dst_path=str(to), tracking_uri=tracking_uri))
    # The folder's name is MLflow's business: the shallowest one with a list of modules is the model.
    found = min(files.rglob(MODULES_FILE), key=lambda path: len(path.parts), default=None)
    if found is None:
        raise EkibenError(f"the logged model {logged.model_id} holds no {MODULES_FILE}: train it again")
    return found.parent


def _pins() -> list[str]:
    # Without the local part of a version (2.13.0+cpu), which package indexes do not know.
    return [f"{package}=={metadata.version(package).partition('+')[0]}" for package in PACKAGES]
