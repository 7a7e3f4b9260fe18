"""The command line as somebody meets it who has read nothing: help, usage, wrong specs."""

import os

import pytest

import tiny_study as tiny

COMMANDS = ("quickstart", "run", "report", "verify", "certify", "predict", "list")


def test_help_of_every_command():
    whole = tiny.cli("--help")
    whole.fine()
    for command in COMMANDS:
        assert f"  {command} " in whole.out
        answer = tiny.cli(command, "--help")
        answer.fine()
        assert "Usage: certifl" in answer.out
        assert "--help" in answer.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fly"], "No such command 'fly'"),
        (["run", "--nope"], "No such option"),
        (["run"], "Missing argument"),
        (["predict", "x.png"], "--run"),
        (["certify", "--n", "many"], "valid integer"),
        (["predict", "x.png", "--run", "x", "--n", "0"], "'--n'"),
    ],
)
def test_usage_errors_end_with_two(arguments, says):
    answer = tiny.cli(*arguments)
    assert answer.code == 2
    assert says in answer.err


def test_exit_codes_of_a_real_process(tmp_path):
    spec = tiny.write_spec(tmp_path)
    out = tmp_path / "run"
    wrong = tiny.process("run", spec, "--out", out, "--set", "trainign.lr=1")
    wrong.refused("trainign", "Did you mean 'training'?")  # others in tests/spec
    assert not out.exists()


# Wrong specs: one line that names the key and what is allowed; nothing is written.


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.train_images=5000", ["train_images", "1397"]),
        ("data.test_images=5000", ["test_images", "400"]),
        ("data.name=./missing", ["./missing", "train/CLASS/*.png"]),
        ("data.label_column=digit", ["digits has no columns"]),
        ("model.name=no_such_module:make", ["no_such_module", "PYTHONPATH"]),
        ("model.name=json:dumps", ["json:dumps", "in_channels"]),
    ],
)
def test_a_wrong_setting_is_one_clear_line_and_writes_nothing(setting, words, tmp_path):
    spec = tiny.write_spec(tmp_path)
    out = tmp_path / "runs" / "wrong"
    tiny.cli("run", spec, "--out", out, "--set", setting).refused(*words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.toml"]


def test_more_clients_than_training_images(tmp_path):
    spec = tiny.write_spec(tmp_path)
    few = ("--set", "data.train_images=3", "--set", "clients.count=4")
    tiny.cli("run", spec, "--out", tmp_path / "r", *few).refused("4 clients", "3 training")
    assert not (tmp_path / "r").exists()


def test_a_wrong_device_is_refused_before_anything_is_written(tmp_path):
    spec = tiny.write_spec(tmp_path)
    tiny.cli("run", spec, "--out", tmp_path / "r", "--device", "warp9").refused(
        "'warp9'", "cuda:1"
    )
    assert not (tmp_path / "r").exists()


def test_files_that_are_no_spec(tmp_path):
    out = ("--out", tmp_path / "r")
    tiny.cli("run", tmp_path / "none.toml", *out).refused("no spec at", "examples")
    tiny.cli("run", tmp_path, *out).refused("is a folder", ".toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    tiny.cli("run", tmp_path / "bad.toml", *out).refused("TOML", "line 1")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    tiny.cli("run", tmp_path / "bytes.toml", *out).refused("TOML")
    assert not (tmp_path / "r").exists()


def test_a_missing_data_set_names_the_three_ways(tmp_path):
    spec = tiny.write_spec(tmp_path, "data.name=someones/mushrooms")
    out = ("--out", tmp_path / "r")
    (tmp_path / "data").mkdir()
    for place in ([], ["--data-dir", tmp_path / "data"]):
        answer = tiny.cli("run", spec, *out, *place)
        answer.refused("(1)", "--data-dir", "(2)", "certifl[hub]", "(3)", "digits")
    tiny.cli("run", spec, *out, "--data-dir", tmp_path / "none").refused("does not exist")
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    spec = tiny.write_spec(tmp_path)
    below_a_file = spec / "run"
    tiny.cli("run", spec, "--out", below_a_file).refused("tiny.toml is a file", "--out")
    for asked in (("run", spec, "--out"), ("deploy", "init")):
        tiny.cli(*asked, spec).refused("is a file")
    assert "[data]" in spec.read_text()
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        tiny.cli("run", spec, "--out", closed / "r").refused("Cannot write", "--out", code=1)


def test_a_folder_with_strangers_is_left_alone(tmp_path):
    spec = tiny.write_spec(tmp_path)
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"]):
        tiny.cli("run", spec, "--out", place, *more).refused("thesis.tex", "--out")
    assert [p.name for p in place.iterdir()] == ["thesis.tex"]


def test_answer_within_without_workers_leaves_no_folder_in_the_way(tmp_path):
    spec, out = tiny.write_spec(tmp_path), tmp_path / "run"
    tiny.cli("run", spec, "--out", out, "--answer-within", "5").refused("needs --workers")
    assert not out.exists()


def test_what_clients_share_is_refused_before_any_of_them_is_asked(tmp_path):
    spec = tiny.write_spec(tmp_path)
    asked = ("deploy", "run", spec, "--kit", tmp_path / "none", "--share", "everything")
    tiny.cli(*asked).refused("share must be one of none, curve, rows")


def test_help_shows_whole_sentences_and_list_every_name():
    commands = tiny.cli("--help").out.partition("Studies:")[2]
    groups = [line[:-1] for line in commands.splitlines() if line.endswith(":")]
    assert groups == ["Models", "Federation", "Results", "Installation"]
    assert "quickstart" in commands
    assert "..." not in commands
    tiny.cli("list").fine(
        "digits", "small_cnn", "mixture", "smooth_flow", "sequential", "column", "trimmed-mean",
        "krum", "scan", "fedrep", "objectives augmented, consistency, smoothadv, macer, stability",
    )  # fmt: skip
