"""Certified labels over HTTP: the smoothed classifier of a network behind one address.

    pip install fastapi uvicorn python-multipart
    python examples/service.py net.safetensors
    curl -F image=@digit.png http://127.0.0.1:8000/predict

The certificate holds for the image as it was sent: an 8 x 8 gray PNG, for this network.
"""

from __future__ import annotations

import secrets
import sys

import numpy as np
import torch
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file

import certifl
from certifl.errors import InputError, RequestError

SIZE = (8, 8)


class Answer(BaseModel):
    """A class, or -1 where the votes do not decide, and its certified radius in radians."""

    label: int
    radius: float


def service(smoothed: certifl.SmoothedClassifier) -> FastAPI:
    """An application that answers POST /predict with a file named image."""
    app = FastAPI()

    @app.post("/predict")
    def predict(image: UploadFile) -> Answer:
        labels, radii = smoothed.predict(pixels(image))
        return Answer(label=int(labels[0]), radius=float(radii[0]))

    @app.exception_handler(RequestError)
    def refuse(_request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    return app


def pixels(image: UploadFile) -> torch.Tensor:
    """A file as (1, 1, h, w) in [0, 1]; its size is checked before it is decoded."""
    try:
        opened = Image.open(image.file, formats=("PNG",))
        if opened.size != SIZE or opened.mode != "L":
            raise InputError(f"An image must be 8-bit gray, {SIZE[0]} x {SIZE[1]} pixels.")
        gray = np.asarray(opened, np.float32)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{image.filename} is not a whole PNG file: {error}.") from error
    return torch.from_numpy(gray / 255)[None, None]


def main() -> None:
    import uvicorn

    network = certifl.models.build("small_cnn", in_channels=1, num_classes=10, seed=0)
    network.load_state_dict(load_file(sys.argv[1]))
    # A seed that nobody knows: whoever chooses the images cannot know the votes.
    seed = secrets.randbits(63)
    smoothed = certifl.SmoothedClassifier(network.eval(), certifl.Rotation("18deg"), seed=seed)
    uvicorn.run(service(smoothed))


if __name__ == "__main__":
    main()
