"""The command line: its map, its exit codes, and that each command hands its flags to its function unchanged."""

import json

import pytest
import typer

from simipu_hf import cli
from simipu_hf.errors import SimIPUError

COMMANDS = sorted(c.name or c.callback.__name__ for c in cli.app.registered_commands)
DATA_COMMANDS = sorted(c.name for c in cli.data_app.registered_commands)
BENCHMARK_COMMANDS = sorted(c.name for c in cli.benchmark_app.registered_commands)


@pytest.fixture
def run(capsys):
    """Runs a command line; its exit code, standard output and standard error."""

    def call(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def test_map(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in (*COMMANDS, "data", "benchmark"))
    assert run("--version")[:2] == (0, f"{cli.__version__}\n")


@pytest.mark.parametrize(
    "command",
    [[name] for name in COMMANDS]
    + [["data", n] for n in DATA_COMMANDS]
    + [["benchmark", n] for n in BENCHMARK_COMMANDS],
    ids=" ".join,
)
def test_every_command_has_help_and_an_example(run, command):
    code, out, err = run(*command, "--help")
    assert code == 0
    assert not err
    callback = next(
        c.callback
        for group in (cli.app, cli.data_app, cli.benchmark_app)
        for c in group.registered_commands
        if (c.name or c.callback.__name__) == command[-1]
        and (group is cli.app) == (len(command) == 1)
        and (len(command) == 1 or (group is cli.data_app) == (command[0] == "data"))
    )
    assert f"simipu-hf {' '.join(command)} --" in callback.__doc__
    assert "--" in out


def test_options_are_spelled_with_underscores():
    for group in (cli.app, cli.data_app, cli.benchmark_app):
        for command in typer.main.get_command(group).commands.values():
            for option in command.params:
                assert "-" not in option.opts[0].removeprefix("--"), (command.name, option.opts)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["export", "--output_dir", "x"], 2, "--model"),
        (["export", "--model", "x", "--output_dir", "x", "--format", "onnx"], 2, "onnx"),
        (["bogus"], 2, "bogus"),
        (["pretrain", "--data_dir", "x"], 1, "error: --output_dir is missing"),
        (["pretrain", "--learnin_rate", "1"], 2, "did you mean --learning_rate?"),
        (["data", "convert", "--to", "csv", "--output_dir", "x"], 1, "error: --to csv"),
        (["visualize", "--output_dir", "x", "--frames", "one"], 1, "error: --frames 'one'"),
    ],
)
def test_mistakes_end_with_a_message_and_no_traceback(run, argv, code, message):
    found, _, err = run(*argv)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    if code == 1:
        assert len(err.splitlines()) == 1


def test_a_debug_switch_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SIMIPU_DEBUG", "1")
    with pytest.raises(SimIPUError):
        cli.main(["data", "convert", "--to", "csv", "--output_dir", "x"])


def test_flags_reach_the_functions(run, monkeypatch):
    calls = []

    def record(name, result):
        def call(*args, **kwargs):
            calls.append((name, args, kwargs))
            return result

        return call

    monkeypatch.setattr("simipu_hf.hub.export.export_image_encoder", record("export", {"path": "y"}))
    monkeypatch.setattr("simipu_hf.data.synthetic.synthesize_drive", record("synthesize", "drive"))
    monkeypatch.setattr("simipu_hf.pretrain.main", record("pretrain", 130))
    code, out, _ = run("export", "--model", "a", "--output_dir", "y", "--channel_order", "rgb", "--json")
    assert code == 0
    assert json.loads(out) == {"path": "y"}
    assert (
        run("data", "synthesize", "--output_dir", "d", "--image_size", "96", "320", "--num_frames", "3")[1]
        == "drive\n"
    )
    assert run("pretrain", "--image_size", "96", "320", "--no_sync_batch_norm")[0] == 130
    assert calls == [
        ("export", ("a", "y", "timm", "img_backbone", "rgb", False), {}),
        ("synthesize", ("d", 3, (96, 320), 0, None), {}),
        ("pretrain", (["--image_size", "96", "320", "--no_sync_batch_norm"],), {}),
    ]


def test_inspecting_damaged_data_exits_with_one(run, tmp_path):
    (tmp_path / "training" / "image_2").mkdir(parents=True)
    code, out, err = run("data", "inspect", "--data_dir", str(tmp_path), "--json")
    assert code == 1
    assert json.loads(out)["problems"] if out else err.startswith("error: ")
