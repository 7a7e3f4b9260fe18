"""Deployed models on the Hugging Face hub, or in a folder: pushed with a card, and loaded.

```
README.md             the card: perturbation, sigma, curve, what it means and how to verify
study.json, spec.toml, deployed.safetensors     as `ClientStudy` reads them
card.json             the numbers of the card, and the fingerprint of the weights
certificates.parquet  only with share = "rows": every test image's votes
```
Rows describe private test images, so the default shares a curve. Nothing in such a folder is ever
run: weights are safetensors, and a network of one's own needs the folder of its code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from certifl.certification import Certificates
from certifl.certification.metadata import of_client
from certifl.errors import (
    CertiflError,
    DataUnavailable,
    InputError,
    StoreError,
    StoreMismatch,
    first_line,
)
from certifl.models import fingerprint, is_users_code
from certifl.models.state import constants_of
from certifl.path_checks import CLIENT_STUDY
from certifl.perturbations import family_label, format_amount, received_words
from certifl.runs.atomic import read_json, save_tensors, write_json, write_text
from certifl.safe_io import MALFORMED
from certifl.smoothing import even_grid, floor_text
from certifl.spec import Spec
from certifl.spec.sections import STORED
from certifl.study.opened_run import ClientStudy, Deployed, OpenRun, open_deployed
from certifl.study.privacy import noiseless, planned_spending, release_words

PREFIX = "hf:"
SHARES = ("curve", "rows")
CARD, CERTIFICATES = "card.json", "certificates.parquet"
_OF_A_NETWORK = ("model_fingerprint", "quantization", "agreement_with_float32")
_FILES = ["README.md", CLIENT_STUDY, "spec.toml", "deployed.safetensors", CARD, CERTIFICATES]
_STEPS = 8


def push(
    run: Path,
    target: str,
    client: int | None = None,
    share: str = "curve",
    public: bool = False,
    code: Path | None = None,
) -> str:
    """Push the model that a client deploys, with its card.

    Args:
        run: a finished run, or a client's own folder of a study.
        target: "hf:OWNER/NAME", or a folder that does not exist yet.
        client: of the run; None = 0, or the client whose folder it is.
        share: "curve", or "rows" to add every test image's certificate with its votes.
        public: whether everybody may see the repository of the hub; a new one is private else.
        code: the folder of the network's own code.

    Returns:
        Where it is now: an address or a folder.

    Raises:
        InputError: an option that is not allowed, or a public repository. StoreMismatch: no
            finished run, or the folder exists. DataUnavailable: the hub did not take it, or the
            extra is missing.
    """
    if share not in SHARES:
        raise InputError(f"share must be one of {', '.join(SHARES)}; got {share!r}.")
    if not target.startswith(PREFIX) and Path(target).exists():
        raise StoreMismatch(f"{target} exists already: name a new folder, or {PREFIX}OWNER/NAME.")
    deployed, opened = open_deployed(run, client, code)
    stored = run / CERTIFICATES
    if opened is not None:
        certificates = _of_one(opened.certificates, deployed.client)
    elif stored.is_file():
        certificates = Certificates.load(stored)
    else:
        raise StoreMismatch(f"{run} holds no certificates yet: nothing is known of its model.")
    int8 = certificates.conditions.get("precision") == "int8"
    if int8 and deployed.spec.privacy.kind != "none":
        raise InputError(
            "The certificates are of a network in int8, whose ranges of activations on training "
            "images have no noise: no epsilon of its [privacy] bounds them, so they are not "
            "published. Certify in float32 or bfloat16."
        )
    if int8 and share != "rows":
        raise InputError(
            "The certificates are of a network in int8, whose ranges of activations disclose "
            'training images: share = "rows" (--share rows) publishes them in its record, else '
            "certify in float32 or bfloat16. Without them nobody can vote with that network."
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        privacy = _privacy(run, deployed, opened)
        _write(folder, target, deployed, certificates, share, privacy)
        if target.startswith(PREFIX):
            with _hub(target) as hub:
                api, name = hub.HfApi(), target.removeprefix(PREFIX)
                address = api.create_repo(name, private=not public, exist_ok=True)
                if not public and not api.repo_info(name).private:
                    raise InputError(
                        f"{target} exists and everybody can see it: nothing was uploaded. Name "
                        "another repository, or say that the model may be public (--public)."
                    )
                api.upload_folder(repo_id=name, folder_path=str(folder))
                return str(address)
        shutil.copytree(folder, target)
    return str(Path(target).resolve())


def load(source: str | Path, code: Path | None = None) -> Deployed:
    """A model that was pushed: the network, its study and its perturbation.

    Args:
        source: "hf:OWNER/NAME", or a folder. code: as `OpenRun`.

    Raises:
        DataUnavailable: it cannot be fetched from the hub.
        StoreMismatch: weights other than the card's.
        StoreError, ModelError: as `ClientStudy.deployed`.
    """
    folder = local_folder(source)
    deployed = ClientStudy(folder).deployed(None, code)
    check_card(folder, deployed.model)
    return deployed


def check_card(folder: Path, model: nn.Module) -> None:
    """Refuse weights, or files beside them, that the card of a pushed model is not about.

    Raises:
        StoreMismatch: they are others. StoreError: the card is missing or damaged.
    """
    card = read_json(folder / CARD)
    named = card.get("model_fingerprint") if isinstance(card, dict) else None
    if named != fingerprint(model):
        raise StoreMismatch(
            f"The weights in {folder} are not those that its card is about: {named!r:.40}. Its "
            "certificates say nothing about them."
        )
    constants = constants_of(model)
    if constants != card.get("constants", constants):
        named = card["constants"] if isinstance(card["constants"], dict) else {}
        other = sorted(k for k in constants if constants[k] != named.get(k, constants[k]))
        raise StoreMismatch(
            f"The network of {folder} is made from a model of the hub that changed since its card "
            f"was written: {', '.join(other) or 'other entries'}. Its certificates say nothing "
            "about the present network."
        )


def local_folder(source: str | Path) -> Path:
    """The folder of a pushed model on this machine; one of the hub is fetched.

    Raises:
        DataUnavailable: it cannot be fetched from the hub, or the extra is missing.
    """
    name = str(source)
    if not name.startswith(PREFIX):
        return Path(source)
    with _hub(name) as hub:
        base = name.removeprefix(PREFIX)
        return Path(hub.snapshot_download(base, allow_patterns=_FILES))


def _of_one(everything: Certificates, client: int) -> Certificates:
    """A client's certificates without what the metadata say of others' networks."""
    certificates = everything.of_client(client)
    own = {
        name: {str(client): value[str(client)]}
        for name, value in certificates.conditions.items()
        if name in _OF_A_NETWORK and isinstance(value, Mapping) and str(client) in value
    }
    return dataclasses.replace(certificates, conditions={**certificates.conditions, **own})


def _privacy(run: Path, deployed: Deployed, opened: OpenRun | None) -> dict[str, Any]:
    """The card's entry on the privacy of training; empty without.

    Raises:
        StoreError: the run does not say what was spent.
    """
    spec, spent = deployed.spec, list[float]()
    if spec.privacy.kind == "none":
        return {}
    if noiseless(spec):
        pass
    elif opened is not None:
        try:
            listed = opened.entry("privacy")["epsilon"]
            count = (
                spec.clients.count
                if spec.privacy.kind == "example"
                else spec.clients.training_count
            )
            spent = [float(listed[client]) for client in range(count)]
        except MALFORMED as error:
            raise StoreError(f"{run} does not say what privacy was spent ({error!r}).") from error
    elif spec.privacy.kind == "client":
        spent = planned_spending(spec)
    else:
        spent = ClientStudy(run).epsilon() or []
    words = release_words(spec, deployed.client, spent)
    return {"privacy": {"kind": spec.privacy.kind, "delta": spec.privacy.delta, "words": words}}


def _write(
    folder: Path,
    target: str,
    deployed: Deployed,
    certificates: Certificates,
    share: str,
    privacy: Mapping[str, Any],
) -> None:
    spec = _publishable(deployed.spec)
    data = {
        "in_channels": deployed.in_channels,
        "image_size": list(deployed.image_size),
        "class_names": list(deployed.class_names),
    }
    ClientStudy(folder).describe(spec, deployed.client, data)
    save_tensors(folder / "deployed.safetensors", deployed.model.state_dict())
    numbers = {**card_numbers(deployed, certificates, spec.data.name), **privacy}
    write_json(folder / CARD, numbers)
    write_text(folder / "README.md", card_text(numbers, target, share == "rows", spec.model.name))
    if share == "rows":
        certificates.save(folder / CERTIFICATES)


def _publishable(spec: Spec) -> Spec:
    """The spec without the folders of its data and weights, which say more of a machine."""
    name = spec.model.name
    if name.startswith("hf:") and name[3:4] in (".", "~", "/"):
        raise InputError(
            f"The network was made from {name}, a folder of this machine, which nobody else can "
            "load. Push that model to the hub first, and train from its name there."
        )
    values = spec.model_dump(exclude_none=True)
    base, bracket, column = spec.data.name.partition("[")
    values["data"]["name"] = Path(base).name + bracket + column
    if spec.model.weights is not None:
        values["model"]["weights"] = Path(spec.model.weights).name  # which need not be here
    return Spec.model_validate(values, context=STORED)


def card_numbers(deployed: Deployed, certificates: Certificates, data: str) -> dict[str, Any]:
    """What the card says of a model and its client's certificates, as data.

    Raises:
        InputError: the client certified nothing, or its test images have no labels.
    """
    metadata = of_client(certificates.conditions, deployed.client)
    largest = float(certificates.radius.max()) if len(certificates) else 0.0
    radii = metadata.get("radii") or (even_grid(largest, _STEPS) if largest > 0.0 else [0.0])
    named = ("family", "sigma", "unit", "norm", "law", "threat", "estimator", "alpha", "n0", "n")
    return {
        "format": 1,
        "data": data,
        "prepared": deployed.spec.data.preparation().described,
        "deploys": deployed.deploys,
        "model_fingerprint": fingerprint(deployed.model),
        **({"constants": constants} if (constants := constants_of(deployed.model)) else {}),
        "perturbation": metadata["description"],
        **{name: metadata[name] for name in (*named, "precision", "seed") if name in metadata},
        "images": len(certificates),
        "radii": [float(radius) for radius in radii],
        "certified_accuracy": certificates.certified_accuracy(list(map(float, radii))).tolist(),
        "average_certified_radius": certificates.average_certified_radius(),
        "abstained": int(certificates.abstained.sum()),
    }


def card_text(numbers: dict[str, Any], target: str, rows: bool, network: str) -> str:
    """The card: what is certified, the curve, what it means, and how to use and verify it."""
    unit = numbers["unit"]
    curve = "\n".join(
        f"| {floor_text(radius, 4)} | {floor_text(100 * share, 1)} % |"
        for radius, share in zip(numbers["radii"], numbers["certified_accuracy"], strict=True)
    )
    verify = _VERIFY_ROWS if rows else _VERIFY_CURVE
    code = f"--code DIR (the folder of {network!r})" if is_users_code(network) else ""
    return _TEXT.format(
        **{k: v for k, v in numbers.items() if isinstance(v, (str, int, float))},
        what=family_label(numbers["family"]),
        described=numbers["perturbation"],
        received=received_words(numbers["family"]),
        acr=format_amount(numbers["average_certified_radius"], unit),
        sure=f"{100 * (1 - numbers['alpha']):.6g}",
        curve=curve,
        target=target,
        network=network,
        code=code,
        verify=verify.format(target=target),
        privacy=_PRIVACY.format(**numbers["privacy"]) if "privacy" in numbers else "",
    )


_TEXT = """\
---
library_name: certifl
pipeline_tag: image-classification
tags: [certified-robustness, randomized-smoothing, federated-learning]
---
# A smoothed classifier, certified against {what}

The model that one client of a federation deploys ({deploys}, network {network}), trained and
certified by certifl.

| | |
|---|---|
| perturbation | `{described}` |
| sigma | {sigma:.6g} {unit} |
| data | {data}, {images} test images of the client |
| average certified radius | {acr} |
| abstained | {abstained} of {images} |
| risk | alpha = {alpha:g} an image, {n} votes at most, estimator {estimator} |
| weights | SHA-256 `{model_fingerprint}` |
{privacy}
| radius ({unit}, {norm}) | certified accuracy |
|---|---|
{curve}

**What it means.** For each single image, with probability at least {sure} % over the votes, the
smoothed classifier's class does not change within the radius. {threat}

**Images that arrive changed.** {received}

**Use.** It is the smoothed classifier that is certified, not the network's single answer:

```
certifl predict IMAGE --run {target} {code}
```

{verify}"""
_PRIVACY = """\
| privacy of training (kind = "{kind}") | {words} |
"""
_VERIFY_CURVE = """\
**Verify.** The test images are private, so the votes behind the curve are not here: it is the
publisher's statement. Certify images of your own: `certifl predict IMAGE --run {target} --n 10000`
counts fresh votes. Loading compares the weights with the fingerprint above.
"""
_VERIFY_ROWS = """\
**Verify.** `certificates.parquet` has the votes of every test image: `certifl verify
certificates.parquet` recomputes each radius from them. Loading compares the weights with the
fingerprint above; `certifl predict IMAGE --run {target} --n 100000` counts fresh votes on an image
of your own.
"""


@contextlib.contextmanager
def _hub(name: str) -> Iterator[Any]:
    """The hub's client; whatever it raises says that exchanging `name` with the hub failed."""
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise DataUnavailable(
            "Models of the Hugging Face hub need the package `huggingface_hub`: install the extra "
            "`certifl[hub]`, or name a folder."
        ) from error
    try:
        yield huggingface_hub
    except CertiflError:
        raise
    except Exception as error:  # the hub's client raises many unrelated types
        raise DataUnavailable(
            f"Exchanging {name} with the Hugging Face hub failed ({type(error).__name__}: "
            f"{first_line(error)}). Check its name, the network and `hf auth login`."
        ) from error
