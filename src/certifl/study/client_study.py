"""A study in a client's own folder: what its deployed model is asked with, on its own machine.

```
studies/<id>/
  study.json            the client's number, shapes and class names of its images
  spec.toml             the study, with the client's own perturbation where it has one
  deployed.safetensors  the model that the client uses at test time
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from certifl.errors import InputError, ModelError, StoreError, StoreMismatch
from certifl.models import build
from certifl.path_checks import CLIENT_STUDY
from certifl.runs.atomic import load_tensors, read_json, write_json, write_text
from certifl.spec import Spec, load_stored
from certifl.study.opened_run import load_code

_ABOUT, _SPEC, _MODEL = CLIENT_STUDY, "spec.toml", "deployed.safetensors"


@dataclass(frozen=True)
class KeptStudy:
    """A client's folder of one study.

    Attributes:
        folder: `studies/<id>` in the client's folder.
    """

    folder: Path

    def exists(self) -> bool:
        """Whether this is such a folder."""
        return (self.folder / _ABOUT).is_file()

    def describe(self, spec: Spec, client: int, data: Mapping[str, Any]) -> None:
        """Write down what the deployed model needs to be used.

        Args:
            spec: of the study, as the client certifies it. client: its number.
            data: in_channels, image_size and class_names of its images.
        """
        deploys = spec.build_algorithm().deploys
        write_text(self.folder / _SPEC, spec.to_toml())
        write_json(
            self.folder / _ABOUT, {"client": client, "deploys": deploys, "data": dict(data)}
        )

    def spec(self) -> Spec:
        """The study.

        Raises:
            StoreError: it is missing or damaged.
        """
        return load_stored(self.folder / _SPEC)

    def about(self, asked: int | None) -> dict[str, Any]:
        """Number of the client, what it deploys, and of its images what a model depends on.

        Args:
            asked: the client that somebody asks for; None = the one whose folder this is.

        Raises:
            InputError: another client than this one. StoreError: the file is damaged.
        """
        held = read_json(self.folder / _ABOUT)
        try:
            client, data = int(held["client"]), held["data"]
            found = {
                "client": client,
                "deploys": str(held["deploys"]),
                "in_channels": int(data["in_channels"]),
                "image_size": tuple(map(int, data["image_size"])),
                "class_names": tuple(map(str, data["class_names"])),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.folder / _ABOUT} is damaged ({type(error).__name__}).") from (
                error
            )
        if asked is not None and asked != client:
            raise InputError(
                f"{self.folder} is of client {client} and holds its model alone: leave out "
                f"--client, or ask where client {asked} is."
            )
        return found

    def model(self, spec: Spec, about: Mapping[str, Any], code: Path | None = None) -> nn.Module:
        """The model that the client uses at test time, in evaluation mode.

        Raises:
            StoreMismatch: the client has not certified in this study yet.
            StoreError: the file is damaged. ModelError: it does not fit the network, or the
                network has code of its own and `code` does not name its folder.
        """
        path = self.folder / _MODEL
        if not path.is_file():
            raise StoreMismatch(
                f"{self.folder} holds no deployed model yet: a client keeps it when the study "
                "comes to certification."
            )
        load_code(self.folder, spec, code)
        model = build(
            spec.model.name,
            about["in_channels"],
            len(about["class_names"]),
            spec.seed,
            spec.model.options,
        )
        try:
            model.load_state_dict(load_tensors(path))
        except RuntimeError as error:
            raise ModelError(
                f"{path} does not fit the network {spec.model.name!r}: its code must be the one "
                "that was trained with."
            ) from error
        return model.eval()
