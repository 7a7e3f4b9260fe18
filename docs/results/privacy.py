"""Make docs/results/privacy.md: what differential privacy costs in certified accuracy.

    python docs/results/privacy.py [--runs runs/privacy]

Runs that are finished in the folder are not repeated. All of them take about two minutes of one
core that does nothing else. Any other study is compared in the same way: run it with and without
its section [privacy], then `certifl report` both.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certifl.experiments.run import Options, run
from certifl.models import small_cnn
from certifl.report import summary_rows
from certifl.report.wording import markdown_table
from certifl.runs.folder import RunFolder
from certifl.spec import load
from paging import machine_words

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent.parent / "examples" / "digits_private.toml"
PLAIN = ("privacy={kind = 'none'}",)
# One client more or less: many clients with few images each, and as few weights as will do.
MANY = (
    "clients.count=100",
    "model.options.width=4",
    "training.batch_size=16",
    "training.lr=0.2",
    "certification.images=2",
)
PRIVATE = ("privacy.kind=client", "privacy.max_norm=0.3")
STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    "example": {
        "none": (*PLAIN, "training.lr=0.2"),
        "8": (),
        "4": ("privacy.target_epsilon=4.0",),
        "2": ("privacy.target_epsilon=2.0",),
        "1": ("privacy.target_epsilon=1.0",),
    },
    "client": {
        "none": (*MANY, *PLAIN),
        "8": (*MANY, *PRIVATE),
        "4": (*MANY, *PRIVATE, "privacy.target_epsilon=4.0"),
        "2": (*MANY, *PRIVATE, "privacy.target_epsilon=2.0"),
    },
}
TITLES = {
    "example": "Of every image: 4 clients, each adds noise to its own steps",
    "client": "Of every client: 100 clients, the server adds noise to their average",
}


def command(settings: Sequence[str]) -> str:
    """The command of one run."""
    options = " ".join(f'--set "{one}"' if " " in one else f"--set {one}" for one in settings)
    return f"certifl run examples/{EXAMPLE.name} {options}".rstrip()


def ensure(settings: Sequence[str], folder: Path) -> Path:
    """The finished run folder; computed where it is missing."""
    return run(load(EXAMPLE, settings), Options(folder, device="cpu")).path


def section(study: str, folders: Mapping[str, Path]) -> list[str]:
    """One kind of privacy as Markdown."""
    rows = summary_rows(list(folders.values()))
    radii = [share["radius_text"] for share in rows[0]["accuracy"][1:]]
    head = ["ε", "noise multiplier", "accuracy", "ACR (95 %)", *(f"at {r}" for r in radii)]
    manifest = RunFolder(folders["none"]).manifest()
    width = 4 if study == "client" else 8
    weights = sum(p.numel() for p in small_cnn(1, 10, width=width).parameters())
    return [
        f"## {TITLES[study]}",
        "",
        markdown_table(
            head,
            [
                _cells(asked, folder, row)
                for (asked, folder), row in zip(folders.items(), rows, strict=True)
            ],
        ),
        "",
        f"{manifest['data']['train_images']:,} training images, {rows[0]['images']} certified "
        f"test images, `small_cnn` with {weights:,} weights, federated averaging, one training "
        "each. Commands:",
        "",
        "```",
        *(command(settings) for settings in STUDIES[study].values()),
        "```",
        "",
    ]


def _cells(asked: str, folder: Path, row: Mapping[str, Any]) -> list[str]:
    privacy = RunFolder(folder).manifest().get("privacy")
    noise, spent = "0", "none"
    if privacy is not None:
        low, high = min(privacy["noise_multiplier"]), max(privacy["noise_multiplier"])
        noise = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        spent = asked
        assert max(privacy["epsilon"]) <= float(asked)
    shares = [share["text"] for share in row["accuracy"]]
    interval = f"{row['acr_low_text']} to {row['acr_high_text']}"
    return [spent, noise, shares[0], f"{row['acr_text']} ({interval})", *shares[1:]]


def page(runs: Path) -> str:
    """The whole page."""
    done = {
        study: {
            asked: ensure(settings, runs / f"{study}-{asked}")
            for asked, settings in asked_of.items()
        }
        for study, asked_of in STUDIES.items()
    }
    manifests = [RunFolder(f).manifest() for folders in done.values() for f in folders.values()]
    parts = [line for study, folders in done.items() for line in section(study, folders)]
    return "\n".join(
        [
            "# What privacy costs in certified accuracy",
            "",
            "Made by `python docs/results/privacy.py`. [What is protected, and from whom]"
            "(../privacy.md).",
            "",
            "Digits, rotation with σ = 15°, δ = 1e-5. ε bounds what the trained models reveal "
            "about one image, or about one client; it is an upper bound from the RDP accountant. "
            "Accuracy: certified accuracy at radius 0. In parentheses: 95 % intervals over test "
            "images.",
            "",
            *parts,
            "Private and plain training have learning rates of their own, found by hand on these "
            "images; that search is not accounted for. With few images privacy costs more: at the "
            "same ε, the noise in an average falls as 1 / (images or clients in it).",
            "",
            f"{machine_words(manifests[0])}.",
            "",
        ]
    )


def main() -> None:
    """Compute what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/privacy"))
    text = page(parser.parse_args().runs)
    (HERE / "privacy.md").write_text(text)


if __name__ == "__main__":
    main()
