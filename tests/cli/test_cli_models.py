"""Commands that ask a model: predict and certify."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import certifl
import tiny_study as tiny
from certifl.certification import Certificates
from certifl.certification import counts as engine
from certifl.data import load, to_float
from certifl.models import build, state_of
from certifl.runs.atomic import load_tensors
from certifl.study import certify as certifying

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    split = load("digits").test
    path = tmp_path_factory.mktemp("pictures") / "digit.png"
    Image.fromarray(split.images[0, 0].numpy()).save(path)
    return path, int(split.labels[0])


def test_predict_answers_with_label_radius_and_meaning(finished, digit):
    answer = tiny.cli("predict", digit[0], "--run", finished, "--client", "1", "--n", "2000")
    answer.fine("client 1", "rotation", "0.001", "interpol")
    assert "label" in answer.out or "abstained" in answer.out


def test_predict_takes_grey_and_colour_of_the_right_size_only(finished, digit, tmp_path):
    gray = Image.open(digit[0])
    gray.convert("RGB").save(tmp_path / "color.png")
    gray.resize((12, 10)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    run = ("--run", finished)
    plain = tiny.cli("predict", digit[0], *run)
    color = tiny.cli("predict", tmp_path / "color.png", *run)
    assert plain.code == color.code == 0
    assert "image  " not in plain.out
    changed = "image   converted to gray: the certificate holds for the converted image\n"
    assert color.out.replace(changed, "") == plain.out != color.out
    tiny.cli("predict", tmp_path / "large.png", *run).refused("10 x 12", "8 x 8", "resize")
    tiny.cli("predict", tmp_path / "large.png", *run, "--resize").fine("resized from 10 x 12")
    tiny.cli("predict", tmp_path / "text.png", *run).refused("not an image", "PNG")
    tiny.cli("predict", tmp_path / "none.png", *run).refused("no image file")
    tiny.cli("predict", digit[0], *run, "--client", "2").refused("0 to 1")
    tiny.cli("predict", digit[0], "--run", tmp_path).refused("not a run folder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "net.safetensors"
    save_file(build("small_cnn", 1, 10, seed=0).state_dict(), path)
    return path


def test_predict_takes_a_model_that_no_study_trained(digit, trained):
    own = ("predict", digit[0], "--model", "small_cnn", "--weights", trained, "--n", "300")
    rotation = ("--family", "rotation", "--sigma", "18deg", "--precision", "float32")
    said = tiny.cli(*own, "--classes", "10", *rotation)
    said.fine("small_cnn with", "rotation", "0.001")
    assert tiny.cli(*own, "--data", "digits", *rotation).out == said.out
    network = build("small_cnn", 1, 10, seed=0)
    network.load_state_dict(load_file(trained))
    image = to_float(load("digits").test.images[:1])
    label = certifl.predict(
        network.eval(), image, certifl.Rotation("18deg"), n=300, radius=True, precision="float32"
    ).labels[0]
    assert ("abstained:" if label < 0 else f"(class {label})") in said.out
    tiny.cli(*own, "--classes", ",".join("abcdefghij")).fine("abstained" if label < 0 else "label")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "either --run"),
        (("--model", "small_cnn"), "needs --weights"),
        (("--model", "small_cnn", "--weights", "none.pt"), "no weights at"),
        (("--run", "x", "--model", "small_cnn"), "either --run"),
        (("--run", "x", "--classes", "3"), "leave out --classes"),
        (("--model", "small_cnn", "--client", "1"), "--client"),
    ],
)
def test_predict_refuses_what_does_not_go_together(digit, arguments, says):
    tiny.cli("predict", digit[0], *arguments).refused(says)


def test_predict_needs_the_classes_of_the_weights(digit, trained):
    own = ("predict", digit[0], "--model", "small_cnn", "--weights", trained)
    tiny.cli(*own).refused("--classes", "--data")
    tiny.cli(*own, "--classes", "7").refused("does not fit", "(7, 256)")
    tiny.cli(*own, "--classes", "1").refused("at least two")
    tiny.cli(*own, "--classes", "7", "--data", "digits").refused("--classes")


def test_predict_never_answers_with_an_older_model(copied, digit):
    tiny.replace_a_checkpoint(copied)
    tiny.cli("predict", digit[0], "--run", copied).refused("final checkpoint", code=1)


QUICK = ("--images", "5", "--n", "300", "--family", "rotation", "--sigma", "18deg")


def test_certify_the_model_of_a_run(finished, tmp_path):
    table, file = tmp_path / "c.tsv", tmp_path / "c.parquet"
    tiny.cli("certify", "--run", finished, "--client", "1", *QUICK, "--out", table).fine(
        "images 5", "ACR"
    )
    header, *rows = table.read_text().splitlines()
    assert header.split("\t")[:5] == ["idx", "label", "predict", "radius", "correct"]
    assert len(rows) == 5
    tiny.cli("certify", "--run", finished, "--client", "1", *QUICK, "--out", file).fine()
    whole = Certificates.load(file)
    assert set(whole.client.tolist()) == {1}
    assert whole.index.tolist() == Certificates.load(table).index.tolist()
    tiny.cli("verify", file).fine("5 certificates")
    tiny.cli("certify", "--run", finished, *QUICK, "--out", file).refused("exists", "--overwrite")
    tiny.cli("certify", "--run", finished, *QUICK, "--out", file, "--overwrite").fine()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.parquet", "c.tsv"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    state = state_of(build("small_cnn", 1, 10, seed=3))
    save_file(state, folder / "net.safetensors")
    torch.save(state, folder / "net.pt")
    torch.save({"state_dict": state}, folder / "wrapped.pt")
    torch.save(build("small_cnn", 1, 10, seed=3), folder / "whole.pt")
    torch.save([1, 2], folder / "list.pt")
    save_file(state_of(build("small_cnn", 3, 10, seed=3)), folder / "color.safetensors")
    for name in ("text.pt", "text.safetensors"):
        (folder / name).write_text("no weights")
    (folder / "cut.safetensors").write_bytes((folder / "net.safetensors").read_bytes()[:500])
    return folder


def test_certify_weights_in_either_format(weights, tmp_path):
    made = []
    for name in ("net.safetensors", "net.pt", "wrapped.pt"):
        out = tmp_path / f"{name}.parquet"
        given = ("--model", "small_cnn", "--weights", weights / name, "--data", "digits")
        tiny.cli("certify", *given, *QUICK, "--out", out).fine("images 5", "Rotations")
        made.append(Certificates.load(out))
    assert made[0].same_results(made[1])
    assert made[0].same_results(made[2])


def test_certify_refuses_what_cannot_be_meant(weights, finished, tmp_path):
    out = ("--out", tmp_path / "c.parquet")
    net = ("--model", "small_cnn", "--weights", weights / "net.pt", "--data", "digits")
    certify = ("certify", *out, *QUICK)
    tiny.cli(*certify).refused("--run", "--model")
    tiny.cli(*certify, "--run", finished, *net).refused("either")
    tiny.cli(*certify, "--run", finished, "--weights", weights / "net.pt").refused("--weights")
    tiny.cli(*certify, "--run", finished, "--data", "mnist").refused("digits")
    tiny.cli(*certify, "--model", "small_cnn").refused("--weights", "--data")
    tiny.cli(*certify, *net, "--client", "1").refused("--client", "--run")
    tiny.cli(*certify, "--run", finished, "--client", "9").refused("0 to 1")
    tiny.cli(*certify, *net, "--n", "0").refused("n must lie between")
    tiny.cli(*certify, *net, "--alpha", "0.9").refused("alpha", "0.5")
    tiny.cli(*certify, *net, "--estimator", "guess").refused("sequential")
    tiny.cli(*certify, *net, "--family", "shear").refused("smooth_flow")
    tiny.cli(*certify, *net, "--sigma=-2").refused("above 0")
    tiny.cli(*certify, *net, "--precision", "half").refused("bfloat16")
    tiny.cli(*certify, *net, "--device", "warp9").refused("warp9")
    tiny.cli("certify", *net, "--out", tmp_path / "c.csv").refused(".parquet", ".tsv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.pt", ["no weights at"]),
        ("whole.pt", ["not a plain file of weights", "state_dict"]),
        ("list.pt", ["state_dict"]),
        ("color.safetensors", ["does not fit small_cnn", "conv1.weight is (16, 3, 3, 3) where"]),
        ("cut.safetensors", ["Cannot read", "save_file"]),
        ("text.pt", ["model.state_dict()"]),
        ("text.safetensors", ["model.state_dict()"]),
    ],
)
def test_weights_that_are_none(name, words, weights, tmp_path):
    given = ("--model", "small_cnn", "--weights", weights / name, "--data", "digits")
    out = tmp_path / "c.parquet"
    tiny.cli("certify", *given, *QUICK, "--out", out).refused(*words)
    assert not list(tmp_path.iterdir())


def test_certify_goes_on_where_it_was_stopped_and_only_with_the_same_question(
    weights, tmp_path, monkeypatch
):
    net = ("--model", "small_cnn", "--weights", weights / "net.pt", "--data", "digits")
    votes = ("--images", "4", "--n", "6000", "--estimator", "top-class")
    asked = ("certify", *net, *votes, "--device", "cpu")
    narrow, wide = ("--sigma", "0.05"), ("--sigma", "0.5")
    for name, sigma in (("narrow", narrow), ("wide", wide)):
        tiny.cli(*asked, *sigma, "--out", tmp_path / f"{name}.parquet").fine()

    monkeypatch.setattr(certifying, "_SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(engine, "_CALLS_PER_BATCH", 4)
    real, batches = engine.advance, 0

    def stopped(*given: object) -> None:
        nonlocal batches
        batches += 1
        if batches == 4:
            raise KeyboardInterrupt
        real(*given)

    out = tmp_path / "again.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "advance", stopped)
        answer = tiny.cli(*asked, *narrow, "--out", out)
    assert answer.code == 130
    assert "same command resumes it" in answer.err
    kept = tmp_path / ".again.parquet.votes.safetensors"
    cast = int(load_tensors(kept)["estimation"].sum())
    assert 0 < cast < 4 * 6000
    # Another noise at the same place must not take over votes of the first.
    shutil.copy(kept, tmp_path / ".other.parquet.votes.safetensors")
    tiny.cli(*asked, *wide, "--out", tmp_path / "other.parquet").fine()
    other = Certificates.load(tmp_path / "other.parquet")
    assert other.same_results(Certificates.load(tmp_path / "wide.parquet"))
    # The same question goes on, and ends as if nothing had happened.
    spent = []
    monkeypatch.setattr(engine, "advance", lambda *given: spent.append(real(*given)))
    tiny.cli(*asked, *narrow, "--out", out).fine()
    assert Certificates.load(out).same_results(Certificates.load(tmp_path / "narrow.parquet"))
    assert len(spent) < 4 * 6000 / 2048  # fewer batches than from the beginning
    assert not kept.exists()


def test_votes_of_a_network_whose_code_changed_are_cast_again(weights, tmp_path, monkeypatch):
    net = ("--model", "small_cnn", "--weights", weights / "net.pt", "--data", "digits")
    asked = ("certify", *net, "--images", "2", "--n", "200", "--device", "cpu")
    kept: list[str] = []

    def key_of(code: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(certifying, "code_fingerprint", lambda _: code)
            patch.setattr(certifying._Saver, "save", lambda saver, _: kept.append(saver._key))
            tiny.cli(*asked, "--out", tmp_path / f"{len(kept)}.parquet").fine()
        return kept[-1]

    assert key_of("") == key_of("") != key_of("another")
