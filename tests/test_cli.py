"""The command line: its map, exit codes, start-up, terminals, and that commands hand their flags on unchanged."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
from tiny_simipu import tiny_config
from transformers import pipeline

from simipu_hf import cli
from simipu_hf.cli import show
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.configuration_simipu import SimIPUDepthConfig
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from simipu_hf.modeling.processing_simipu import SimIPUProcessor


def flatten(commands: dict, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Commands by their words."""
    flat = {}
    for name, command in commands.items():
        flat |= flatten(command, (*prefix, name)) if isinstance(command, dict) else {(*prefix, name): command}
    return flat


COMMANDS = flatten(cli.COMMANDS)


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
    assert all(name in out for name in cli.COMMANDS)
    assert run("--version")[:2] == (0, f"{cli.__version__}\n")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_an_example_and_a_function(run, words):
    code, out, err = run(*words, "--help")
    assert (code, err) == (0, "")
    module = f"simipu_hf.{'_'.join(words).replace('-', '_')}"
    assert re.search(rf"simipu-hf {' '.join(words)} --|launch -m {module} --", inspect.getdoc(COMMANDS[words]))
    flags = re.findall(r"^\W*(--\w\S*)", out, flags=re.M)
    assert flags
    assert not [flag for flag in flags if "-" in flag.removeprefix("--")]  # underscores, as in transformers' examples


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["export", "--output_dir", "x"], 2, "--model"),
        ([], 2, "pretrain"),
        (["data"], 2, "synthesize"),
        (["pretrain", "--data_dir", "x"], 2, "--output_dir"),
        (["pretrain", "--data_dir", "x", "--output_dir", "y", "--learnin_rate", "1"], 2, "--learning_rate"),
        (["pretrain", "--config", "nowhere.yaml"], 1, "error: --config nowhere.yaml: no such file"),
        (["visualize", "--output_dir", "x", "--frames", "one"], 1, "error: --frames 'one'"),
        (["export", "--model", "a", "--output_dir", "b", "--prefix", "x"], 1, "does nothing without"),
        (["export", "--model", "a", "--output_dir", "b", "--image_size", "64", "64"], 1, "does nothing without"),
        (["visualize", "--output_dir", "b", "--data_dir", "a", "--device", "cuda"], 1, "does nothing without"),
        (["data", "push", "--data", "a", "--repo_id", "b/c", "--private", "--public"], 1, "not both"),
        (["data", "inspect", "--data_dir", "a", "--picture_path", "thesis.tex"], 1, "ends in .png"),
    ],
)
def test_mistakes_end_with_a_message_and_no_traceback(run, argv, code, message):
    found, out, err = run(*argv)
    assert found == code
    assert message in out + err
    assert "Traceback" not in err
    if code == 1:
        assert len(err.splitlines()) == 1


def test_a_command_for_one_process_refuses_a_launcher(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("compare-depth", "--image_encoders", "a=random:resnet10t", "--output_dir", "x")
    assert code == 1
    assert err == "error: simipu-hf compare-depth: expected one process, found 2: start it without a launcher\n"
    assert run("compare-depth", "--help")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "")
    assert run("--version")[0] == 0


def test_json_has_no_nan(capsys):
    show({"abs_rel": math.nan}, as_json=True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"abs_rel": None}


def test_a_debug_switch_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SIMIPU_DEBUG", "1")
    with pytest.raises(SimIPUError):
        cli.main(["visualize", "--output_dir", "x", "--frames", "one"])


def test_flags_reach_the_functions(run, monkeypatch, tmp_path):
    results = {
        "hub.export.export_image_encoder": {"path": "y"},
        "data.synthetic.synthesize_drive": "drive",
        "benchmark.step.benchmark_step": {"seconds": 1},
        "pretrain.pretrain": None,
    }
    called = {name: Mock(return_value=result) for name, result in results.items()}
    for name, function in called.items():
        monkeypatch.setattr(f"simipu_hf.{name}", function)
    code, out, _ = run("export", "--model", "a", "--output_dir", "y", "--channel_order", "rgb", "--json")
    assert (code, json.loads(out)) == (0, {"path": "y"})
    drive = ("data", "synthesize", "--output_dir", "d", "--image_size", "96", "320", "--num_frames", "3")
    assert run(*drive)[1] == "drive\n"
    assert json.loads(run("benchmark", "step", "--image_size", "96", "320", "--json")[1]) == {"seconds": 1}
    config = tmp_path / "flags.yaml"
    config.write_text("data_dir: KITTI\nseed: 3\nmax_steps: 9\n", encoding="utf-8")
    run("pretrain", "--config", str(config), "--output_dir", "o", "--no_sync_batch_norm", "--seed", "4")

    export, synthesize, step, pretrain = called.values()
    export.assert_called_once_with("a", "y", "timm", "img_backbone", "rgb", False, None)
    synthesize.assert_called_once_with("d", 3, (96, 320), 0, None)
    assert step.call_args.args[0].image_size == (96, 320)
    (arguments,) = pretrain.call_args.args
    assert (arguments.data_dir, arguments.seed, arguments.max_steps) == ("KITTI", 4, 9)
    assert arguments.sync_batch_norm is False


def test_inspecting_damaged_data_exits_with_one(run, tmp_path):
    (tmp_path / "training" / "image_2").mkdir(parents=True)
    code, out, err = run("data", "inspect", "--data_dir", str(tmp_path), "--json")
    assert code == 1
    assert not out
    assert err.startswith("error: ")
    assert "scenes can be chosen" in run("data", "inspect", "--data_dir", str(tmp_path), "--scenes", "none")[2]


# --- in a process of its own ---


def python(program: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, env=env, check=False)


HEAVY = """
import sys
from simipu_hf.cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "matplotlib", "datasets", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize("argv", [["--help"], ["pretrain", "--help"], ["export", "--bogus"]], ids=" ".join)
def test_a_help_text_imports_nothing_heavy(argv):
    """Time is not asserted; what takes it is."""
    assert python(HEAVY, *argv).stdout.decode().splitlines()[-1] == "[]"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_output_survives_terminals_that_cannot_encode_it(encoding):
    text = "≤ 1.25 ↓ Δ ✓ 日本"
    program = f"from simipu_hf.errors import *; raise SystemExit(exit_code_of(lambda: print({text!r})))"
    result = python(program, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"1.25" in result.stdout
    for code, argv in ((0, ["compare-depth", "--help"]), (1, ["pretrain", "--config", "日本/Δ ≤"])):
        result = python("from simipu_hf.cli import main; main()", *argv, PYTHONIOENCODING=encoding)
        assert result.returncode == code, result.stderr
        assert b"Traceback" not in result.stderr


def test_a_command_ends_as_it_should_when_nobody_reads_its_output_any_more(tmp_path):
    program = """
import signal, sys
from pathlib import Path
from simipu_hf.errors import TrainingInterrupted, exit_code_of

def run():
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("y", file=sys.stderr)
    Path(sys.argv[1]).touch()
    raise TrainingInterrupted("saved", exit_code=130)

raise SystemExit(exit_code_of(run))
"""
    command, saved = [sys.executable, "-c", program, str(tmp_path / "saved")], tmp_path / "saved"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 130
    assert saved.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGTERM that a program could answer")
def test_sigterm_removes_what_is_unfinished(tmp_path):
    program = """
import os, signal, sys
from simipu_hf.errors import exit_code_of
from simipu_hf.files import atomic_folder

def run():
    with atomic_folder(sys.argv[1]) as beside:
        (beside / "file").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        print("not reached")

raise SystemExit(exit_code_of(run))
"""
    result = python(program, str(tmp_path / "target"))
    assert (result.returncode, result.stdout) == (143, b"")
    assert not list(tmp_path.iterdir())


AUTO = """
import sys
{imports}
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModel.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
images, points = AutoImageProcessor.from_pretrained(sys.argv[1]), AutoFeatureExtractor.from_pretrained(sys.argv[1])
depth = AutoConfig.from_pretrained(sys.argv[2])
found = (config, model, processor, images, points, depth)
print(*(f"{{type(one).__module__}}.{{type(one).__name__}}" for one in found))
assert "SimIPUModel" in dir(simipu_hf)
"""
NAMES = "AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoProcessor"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """A model folder without code in it, and a depth model's configuration."""
    folder = tmp_path_factory.mktemp("auto")
    SimIPUForPreTraining(tiny_config()).save_pretrained(folder / "model")
    SimIPUProcessor.from_preset("recommended", num_points=256).save_pretrained(folder / "model")
    SimIPUDepthConfig().save_pretrained(folder / "depth")
    for file in folder.rglob("*.json"):
        values = {name: value for name, value in json.loads(file.read_text("utf-8")).items() if name != "auto_map"}
        file.write_text(json.dumps(values), encoding="utf-8")
    return [str(folder / "model"), str(folder / "depth")]


@pytest.mark.parametrize(
    "imports",
    [
        f"from transformers import {NAMES}\nimport simipu_hf",
        f"import simipu_hf\nfrom transformers import pipeline, Trainer, {NAMES}",
    ],
)
def test_auto_classes_know_simipu_in_either_order_of_imports(imports, folders):
    result = python(AUTO.format(imports=imports), *folders)
    assert result.returncode == 0, result.stderr.decode()
    names = [name.rpartition(".")[2] for name in result.stdout.decode().split()]
    assert names == [
        *("SimIPUConfig", "SimIPUModel", "SimIPUProcessor", "SimIPUImageProcessor", "SimIPUFeatureExtractor"),
        "SimIPUDepthConfig",
    ]
    assert "transformers_modules" not in result.stdout.decode()


def test_a_pipeline_does_not_ask_for_code_that_is_imported(tmp_path, monkeypatch):
    config = SimIPUDepthConfig(image_config={"architecture": "test_resnet"})
    SimIPUForDepthEstimation(config).save_pretrained(tmp_path)
    SimIPUImageProcessor().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    loaded = pipeline("depth-estimation", str(tmp_path), device="cpu")
    assert type(loaded.image_processor) is SimIPUImageProcessor
    assert not asked
