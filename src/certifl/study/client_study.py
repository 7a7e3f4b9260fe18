"""A study in a client's own folder: its deployed model, for predictions on its own machine.

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

_METADATA, _SPEC, _MODEL = CLIENT_STUDY, "spec.toml", "deployed.safetensors"


@dataclass(frozen=True)
class ClientStudy:
    """A client's folder of one study.

    Attributes:
        folder: `studies/<id>` in the client's folder.
    """

    folder: Path

    def exists(self) -> bool:
        """Whether this is such a folder."""
        return (self.folder / _METADATA).is_file()

    def describe(self, spec: Spec, client: int, data: Mapping[str, Any]) -> None:
        """Store what is needed to use the deployed model.

        Args:
            spec: of the study, as the client certifies it. client: its number.
            data: in_channels, image_size and class_names of its images.
        """
        deploys = spec.build_algorithm().deploys
        write_text(self.folder / _SPEC, spec.to_toml())
        write_json(
            self.folder / _METADATA, {"client": client, "deploys": deploys, "data": dict(data)}
        )

    def spec(self) -> Spec:
        """The study.

        Raises:
            StoreError: it is missing or damaged.
        """
        return load_stored(self.folder / _SPEC)

    def metadata(self, client: int | None = None) -> dict[str, Any]:
        """The client's number, what it deploys, and properties of its images.

        Args:
            client: its expected number; None = any.

        Raises:
            InputError: another client than this one. StoreError: the file is damaged.
        """
        stored = read_json(self.folder / _METADATA)
        try:
            own, data = int(stored["client"]), stored["data"]
            metadata = {
                "client": own,
                "deploys": str(stored["deploys"]),
                "in_channels": int(data["in_channels"]),
                "image_size": tuple(map(int, data["image_size"])),
                "class_names": tuple(map(str, data["class_names"])),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.folder / _METADATA} is damaged ({type(error).__name__})."
            ) from (error)
        if client is not None and client != own:
            raise InputError(
                f"{self.folder} is of client {own} and has only its model: leave out "
                f"--client, or use the folder of client {client}."
            )
        return metadata

    def model(
        self, spec: Spec, metadata: Mapping[str, Any], code: Path | None = None
    ) -> nn.Module:
        """The client's model for test time, in evaluation mode.

        Raises:
            StoreMismatch: the client has not certified in this study yet.
            StoreError: the file is damaged. ModelError: it does not fit the network, or the
                network has user code and `code` does not name its folder.
        """
        path = self.folder / _MODEL
        if not path.is_file():
            raise StoreMismatch(
                f"{self.folder} has no deployed model yet: a client stores it when "
                "certification starts."
            )
        load_code(self.folder, spec, code)
        model = build(
            spec.model.name,
            metadata["in_channels"],
            len(metadata["class_names"]),
            spec.seed,
            spec.model.options,
        )
        try:
            model.load_state_dict(load_tensors(path))
        except RuntimeError as error:
            raise ModelError(
                f"{path} does not fit the network {spec.model.name!r}: its code must be the one "
                "that was used for training."
            ) from error
        return model.eval()
