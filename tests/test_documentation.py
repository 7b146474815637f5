"""What README.md, CONTRIBUTING.md and docs/ say is so: snippets run, commands and flags exist, links lead somewhere.

A Python snippet behind `<!-- test: NAME -->` runs as printed, in a folder that holds

- `KITTI`: a few synthetic frames in KITTI object layout, with the splits train, val and test,
- `OUT`: a pre-trained model as a run leaves it, small, with random weights,
- `official.pth`: an official checkpoint of an image encoder,
- `my.yaml`: flags of a run.

`<!-- test: NAME, after OTHER -->` runs it behind another snippet of the same document. Other Python snippets compile.
"""

import ast
import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import torch
import tyro
from accelerate.commands.launch import launch_command_parser
from tiny_run import reset_accelerate
from tiny_simipu import tiny_config

from simipu_hf import cli
from simipu_hf.data.synthetic import synthesize_drive
from simipu_hf.hub.export import write_timm
from simipu_hf.hub.sources import find_image_encoder
from simipu_hf.modeling.configuration_simipu import (
    PRESETS,
    SimIPUConfig,
    SimIPUImageConfig,
    SimIPUPointNet2Config,
    SimIPUSparseConvConfig,
)
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.arguments import parse_arguments

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# flags of other people's commands that the texts name
OTHER_FLAGS = {"--index-url", "--logdir", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal"}


@dataclass(frozen=True)
class Snippet:
    """A fenced block. `name` and `after` are those of its test mark."""

    document: Path
    line: int
    language: str
    text: str
    name: str | None = None
    after: str | None = None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT).as_posix()}:{self.line}"


def find_snippets(document: Path) -> Iterator[Snippet]:
    """Every fenced block of a document, in order."""
    text = document.read_text(encoding="utf-8")
    mark = r"(?:^<!-- test: (?P<name>[\w-]+)(?:, after (?P<after>[\w-]+))? -->\s+)?"
    for block in re.finditer(mark + r"^(?P<fence>```)(?P<language>.*)\n(?P<text>(?s:.*?))^```", text, flags=re.M):
        line = text.count("\n", 0, block.start("fence")) + 1
        yield Snippet(document, line, **{key: block[key] for key in ("language", "text", "name", "after")})


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


def inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(document))


SNIPPETS = [snippet for document in DOCUMENTS for snippet in find_snippets(document)]
PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]
MARKED = [snippet for snippet in PYTHON if snippet.name is not None]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """The folder in which snippets run."""
    folder = tmp_path_factory.mktemp("documentation")
    synthesize_drive(
        folder / "KITTI",
        num_frames=6,
        image_size=(96, 320),
        azimuth_steps=512,
        num_workers=0,
    )
    torch.manual_seed(0)
    SimIPUForPreTraining(tiny_config(architecture="resnet18")).save_pretrained(folder / "OUT")
    SimIPUProcessor.from_preset("recommended", image_size=(64, 96), num_points=256).save_pretrained(folder / "OUT")
    write_timm(find_image_encoder(folder / "OUT"), folder / "OUT" / "image_encoder")
    flags = {"data_dir": "KITTI", "output_dir": "OUT2"}
    (folder / "OUT" / "run.yaml").write_text(json.dumps({"arguments": flags}), encoding="utf-8")
    (folder / "my.yaml").write_text(json.dumps(flags), encoding="utf-8")
    official = timm.create_model("resnet18", num_classes=0).state_dict()
    torch.save(
        {"state_dict": {f"backbone.{name}": value for name, value in official.items()}}, folder / "official.pth"
    )
    return folder


@pytest.fixture
def inside(workspace, monkeypatch) -> Path:
    """The working folder is `workspace`, and nothing is written beyond it."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(workspace / "cache"))
    yield workspace
    reset_accelerate()


@pytest.mark.parametrize("snippet", MARKED, ids=lambda s: f"{s.document.stem}-{s.name}")
def test_snippet_runs_as_printed(snippet, inside):
    run_snippet(snippet)


@functools.cache  # each once, also where others run behind it
def run_snippet(snippet: Snippet) -> None:
    if snippet.after is not None:
        (before,) = [s for s in MARKED if s.document == snippet.document and s.name == snippet.after]
        run_snippet(before)
    exec(compile(snippet.text, str(snippet), "exec"), {"__name__": "__main__"})


def test_marks_are_unique_and_belong_to_python():
    names = [(snippet.document, snippet.name) for snippet in SNIPPETS if snippet.name is not None]
    assert len(set(names)) == len(names) == len(MARKED)
    marks = sum(document.read_text(encoding="utf-8").count("\n<!-- test: ") for document in DOCUMENTS)
    assert marks == len(MARKED), "a mark is not directly before its snippet"


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_snippet_compiles_and_imports_what_exists(snippet):
    tree = ast.parse(snippet.text, str(snippet))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "simipu_hf":
            exec(compile(ast.Module([node], type_ignores=[]), str(snippet), "exec"), {})


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """The words of every command of a shell snippet, environment variables before it left out."""
    text = snippet.text.replace("\\\n", " ")
    text = re.sub(r"\$\(\([^)]*\)\)|\$\{?\w+\}?", "1", text)  # as numbers: arithmetic and variables
    text = re.sub(r"\$\([^)]*\)", "word", text)
    for line in text.splitlines():
        yield from split_commands(shlex.split(line, comments=True))


def split_commands(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in ("&&", "||", "|", ";"):
            command.append(word)
            continue
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
            command.pop(0)
        if command[:1] == ["srun"] and "bash" in command:
            yield from split_commands(shlex.split(command[-1]))
        elif command:
            yield command
        command = []


SHELL = [
    pytest.param(command, id=f"{snippet}-{number}")
    for snippet in SNIPPETS
    if snippet.language in ("bash", "shell", "sh", "console")
    for number, command in enumerate(commands(snippet))
    if command[0] in ("simipu-hf", "accelerate") or "simipu_hf" in " ".join(command)
]


@pytest.mark.parametrize("command", SHELL)
def test_command_exists_and_takes_these_flags(command, inside):
    """It is parsed as `simipu-hf` does, without being run; a module has the flags of the command of its name."""
    if command[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(command[2:])
        assert launched.module, f"{command}: launch with -m"
        command = ["python", "-m", launched.training_script, *launched.training_script_args]
    if command[:2] == ["python", "-m"]:
        package, name = command[2].split(".")
        assert package == "simipu_hf"
        command = ["simipu-hf", name.replace("_", "-"), *command[3:]]
    assert command[0] == "simipu-hf", f"nothing here knows how to check {command}"
    function, argv = find_command(command[1:])
    assert not isinstance(function, dict), "a command is missing"
    if dataclasses.is_dataclass(function):
        parse_arguments(function, argv)
    else:
        without_effect = functools.wraps(function)(lambda *args, **kwargs: None)
        tyro.cli(without_effect, args=argv, use_underscores=True)


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words begin with, and the words behind it."""
    command = cli.COMMANDS
    while words and isinstance(command, dict):
        assert words[0] in command, f"no command {words[0]} among {', '.join(command)}"
        command, words = command[words[0]], words[1:]
    return command, words


def test_commands_in_the_text_exist():
    for document in DOCUMENTS:
        for code in inline_code(document):
            if code.startswith("simipu-hf "):
                find_command(re.match(r"[a-z-]+((?: [a-z][\w-]*)*)", code)[1].split())


def test_flags_in_the_text_exist(capsys):
    known = OTHER_FLAGS | {"--config", "--version"} | set(launch_command_parser()._option_string_actions)
    with pytest.raises(SystemExit):
        cli.main(["--tyro-print-completion", "bash"])
    completion = capsys.readouterr().out
    assert all(command in completion for command in (*cli.COMMANDS, *cli.COMMANDS["data"]))
    known |= set(re.findall(r"--[a-z][\w-]*", completion))
    for document in DOCUMENTS:
        for code in inline_code(document):
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
            assert named <= known, f"{document.name}: `{code}`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"`[^`\n]*`", "", prose(document))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{document.name}: {target}"


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_files_and_fields_in_the_text_exist(document):
    fields = {
        "image_config": {f.name for f in dataclasses.fields(SimIPUImageConfig)},
        "point_config": {
            f.name for kind in (SimIPUPointNet2Config, SimIPUSparseConvConfig) for f in dataclasses.fields(kind)
        },
    }
    for code in inline_code(document):
        if re.fullmatch(r"[\w/]+/\w+\.(py|md|yaml)", code):
            assert (ROOT / code).is_file(), f"{document.name}: `{code}`"
        for section, field in re.findall(r"\b(image_config|point_config)\.(\w+)", code):
            assert field in fields[section], f"{document.name}: `{code}`"


def test_official_differences_are_documented():
    text = (ROOT / "docs" / "from_the_official_code.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    official = PRESETS["official"]["model"]
    for name, value in official.items():
        for field in [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]:
            assert any(f"`{field}`" in row for row in rows), field
    assert set(official) <= {f.name for f in dataclasses.fields(SimIPUConfig)}


def test_messages_in_troubleshooting_exist_in_the_code():
    said = list(literals())
    headings = re.findall(
        r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.M
    )
    assert len(headings) > 30
    for heading in headings:
        for piece in filter(None, (piece.strip() for piece in heading.split("…"))):
            assert any(piece in literal for literal in said), f"no message contains {piece!r} ({heading})"


def literals() -> Iterator[str]:
    """Every string of the package but docstrings, `…` for what is put in."""
    for folder in ("simipu_hf", "modeling", "dataset_scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
