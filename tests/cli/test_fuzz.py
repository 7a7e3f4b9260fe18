"""At least a thousand mutated files of every kind: each is read, or refused in a line.

No traceback, no use of the last handler, no hang, less than 1 GB of memory, and nothing that was
there is changed.
"""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from PIL import Image
from safetensors.torch import save_file

import fuzzing
import own_study
import tiny_study as tiny
from certifl.certification import Certificates
from certifl.deploy.bundle import Connection
from certifl.deploy.client.settings import Settings
from certifl.experiments.attack import Options as AttackOptions
from certifl.experiments.attack import attack_run
from certifl.experiments.run import Options, run
from certifl.models import build
from report_factory import keep_to_themselves

MOST_MEMORY = 1 << 30
SHORT = ("training.rounds=1", "certification.n=100", "certification.images=4")


def _idx(path: Path, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


def _data(base: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8)).astype(np.uint8)
    labels = np.arange(8, dtype=np.uint8) % 2
    for name in ("idx", "images", "table", "weights", "client", "folder"):
        (base / name).mkdir()
    for which in ("train", "t10k"):
        _idx(base / "idx" / f"{which}-images-idx3-ubyte.gz", images)
        _idx(base / "idx" / f"{which}-labels-idx1-ubyte.gz", labels)
    for split in ("train", "test"):
        for kind, ending in (("ash", "png"), ("oak", "jpg")):
            folder = base / "images" / split / kind
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(images[number]).save(folder / f"{number}.{ending}")
    Image.fromarray(images[0]).save(base / "gray.png")
    encoded = [{"bytes": (base / "gray.png").read_bytes(), "path": "gray.png"}] * 8
    for split in ("train", "test"):
        pq.write_table(
            pa.table({"image": encoded, "label": labels, "who": ["a", "b"] * 4}),
            base / "table" / f"{split}.parquet",
        )
    shutil.copy(base / "gray.png", base / "secret.png")
    shutil.copy(base / "gray.png", base / "folder")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    _data(place)
    run(tiny.spec(*SHORT), Options(place / "run"))
    attack_run(place / "run", AttackOptions(images=1, directions=2))
    run(own_study.spec(own_study.OWN, *SHORT), Options(place / "own", explore=False))
    shutil.copytree(place / "run", place / "curves")
    certificates = Certificates.load(place / "run" / "certificates.parquet")
    keep_to_themselves(place / "curves", certificates)
    save_file(build("small_cnn", 1, 10, seed=0).state_dict(), place / "weights/net.safetensors")
    certificates.save(place / "weights" / "rows.tsv")
    client = Settings(client=0, data="mine", classes=["a", "b"], max_epsilon=1.0)
    settings = tomli_w.dumps(client.model_dump(exclude_none=True))
    (place / "client" / "client.toml").write_text(settings)
    Connection.parse("127.0.0.1:9900", True).save(place / "client")
    return place


def test_there_are_enough_of_them():
    assert len(fuzzing.CASES) >= 1000


def test_no_mutated_file_is_believed_or_stumbled_over(base, tmp_path):
    step = os.environ.get("CERTIFL_FUZZ_STEP", "1")  # a larger one takes fewer
    command = [sys.executable, fuzzing.__file__, str(base), str(tmp_path), step]
    done = subprocess.run(
        command, capture_output=True, text=True, env=tiny.environment(), check=False, timeout=550
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = {line["case"]: line["wrong"] for line in lines if "case" in line}
    if done.returncode:
        wrong[lines[-1]["begun"]] = f"the process ended with {done.returncode}: {done.stderr}"
    shown = "\n\n".join(
        f"{case}: {fuzzing.CASES[case][0].base}/{fuzzing.CASES[case][0].file}, {what}"
        for case, what in wrong.items()
    )
    assert not wrong, f"{len(wrong)} cases\n{shown}"
    assert lines[-1]["peak"] < MOST_MEMORY
