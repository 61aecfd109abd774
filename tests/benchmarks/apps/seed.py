"""The seed of the comparison: FastAPI and sentence-transformers, one text a request, as many such services are.

Started by uvicorn with one process. The endpoint is a plain function, so FastAPI runs it in its pool of threads.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI(title="seed")
model = SentenceTransformer(os.environ["MODEL_PATH"], device="cpu")


class PredictRequest(BaseModel):
    """One text."""

    text: str


class PredictResponse(BaseModel):
    """Its vector."""

    embedding: list[float]


@app.get("/health")
def get_health() -> dict[str, str]:
    """Say that the server is up; the model was loaded before."""
    return {"status": "healthy"}


@app.post("/predict")
def predict(request: PredictRequest) -> PredictResponse:
    """Embed one text."""
    embedding = model.encode([request.text])[0]
    return PredictResponse(embedding=embedding.tolist())
