"""Model and data-set cards: `templates/`, filled in from what a run left on disk."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import timm
import yaml
from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData

from simipu_hf.data.sources import full_path, hub_license, split_source
from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_write, write_json
from simipu_hf.hub.sources import read_input_convention
from simipu_hf.hub.weights import InputConvention, read_json, timm_template
from simipu_hf.modeling.image_encoder import TimmModel
from simipu_hf.training.logging import read_metrics
from simipu_hf.training.run_folder import short_digest

GENERATED = "<!-- Written by simipu-hf from the files beside it. Delete this line to keep your own edits. -->"
CURVES = "training_curves.png"
EVALUATIONS = "eval_results.json"
KITTI_LICENSE = "cc-by-nc-sa-3.0"
TAGS = ("simipu", "self-supervised", "lidar", "autonomous-driving")
TASKS = {"depth": "depth-estimation", "detection": "object-detection"}


def write_model_card(folder: str | Path, repo_id: str | None = None, encoder_repo_id: str | None = None) -> Path:
    """Write `README.md` into a model or encoder folder.

    Args:
        folder: a run, a checkpoint, a converted model, or an encoder folder.
        repo_id: name under which the card's snippets load it; the folder's name if there is none yet.
        encoder_repo_id: repository of the encoder alone, to point to.

    Returns:
        the card. One without the line that marks it as generated was edited by somebody, and stays as it is.
    """
    path = Path(folder) / "README.md"
    if not path.is_file() or GENERATED in path.read_text(encoding="utf-8-sig"):
        text = model_card(folder, repo_id, encoder_repo_id)
        with atomic_write(path) as stream:
            stream.write(text)
    return path


def model_card(folder: str | Path, repo_id: str | None = None, encoder_repo_id: str | None = None) -> str:
    """The text of the card of a model or encoder folder (see [`write_model_card`])."""
    folder = Path(folder)
    config, run, evaluations = read_json(folder / "config.json"), _run(folder), _evaluations(folder)
    name, about = repo_id or folder.name, config.get("simipu") or {}
    if "architecture" in config:
        kind, architecture = "encoder", config["architecture"]
        order = about.get("channel_order", "rgb")
        pyramid = _pyramid(timm_template(architecture, config.get("model_args")), about)
        convention = InputConvention.from_data_config(config.get("pretrained_cfg") or {}, order)
    elif "image_config" in config:
        kind, architecture = config["model_type"].removeprefix("simipu_"), config["image_config"]["architecture"]
        pyramid = None
        convention = read_input_convention(folder)
    else:
        raise SimIPUError(f"{folder / 'config.json'}: neither a SimIPU model nor a timm encoder")
    settings = run.get("arguments", {}) | run.get("recipe", {})  # which fills what was not given
    hidden = ("hub_", "push_", "report_", "output_")
    text = _render(
        kind,
        _metadata(name, kind, architecture, run, evaluations),
        name=name,
        architecture=architecture,
        classes=config.get("classes") or [],
        encoder_repo_id=encoder_repo_id,
        input=convention,
        image_size=convention.size or (384, 1248),
        pyramid=pyramid,
        has_encoder=(folder / "image_encoder" / "config.json").is_file(),
        has_heads="SimIPUForPreTraining" in (config.get("architectures") or []),
        untrained=about.get("untrained"),
        run=run,
        settings={key: value for key, value in settings.items() if not str(key).startswith(hidden)},
        metrics=_last_metrics(folder),
        curves=CURVES if (folder / CURVES).is_file() else None,
        pictures=_pictures(folder),
        evaluations=evaluations,
        kitti=_trained_on_kitti(run),
    )
    return redact(text)


def _pyramid(template: TimmModel, about: dict[str, Any]) -> list[int] | None:
    """The last four stages that were trained, of as many resolutions, where transformers takes their maps."""
    strides = [grid[0] if grid else None for grid in about.get("feature_grids") or []]
    # it takes the maps of its backbones for channels first
    if len({*strides, None}) <= len(strides) or getattr(template, "output_fmt", "NCHW") == "NHWC":
        return None
    info: Any = template.feature_info
    behind = tuple(f"{name}." for name in about.get("untrained") or [])
    trained = [stage for stage in range(len(strides)) if not f"{info[stage]['module']}.".startswith(behind)]
    return trained[-4:] if len(trained) > 3 else None


def dataset_card(
    repo_id: str, license: str | None, splits: dict[str, int], header: DatasetCardData | None = None
) -> str:
    """The card of a data set in the row contract.

    Args:
        license: the Hub's name of the licence; `None` takes KITTI's terms, and says so.
        splits: rows of each split.
        header: what the folder's own card says of its files and columns.
    """
    metadata, tags = header or DatasetCardData(), ["lidar", "autonomous-driving", "simipu"]
    metadata.license = license or KITTI_LICENSE
    if license != "other":
        metadata.pop("license_name", None)
    metadata.task_categories = ["image-feature-extraction", "depth-estimation"]
    tags += ["kitti"] if license is None else []
    metadata["tags"] = list(dict.fromkeys([*(metadata.get("tags") or []), *tags]))
    metadata.pretty_name = repo_id.split("/")[-1]
    return _render("dataset", metadata, name=repo_id, kitti=license is None, splits=splits)


def add_evaluation(
    folder: str | Path,
    task: str,
    dataset: str,
    split: str,
    metrics: dict[str, float],
    protocol: str,
    frames: Sequence[str] = (),
) -> Path:
    """Keep an evaluation's result in `eval_results.json`, from which the card's `model-index` is made.

    Args:
        task: the Hub's name of the task, such as `"depth-estimation"`.
        dataset, split: what it was evaluated on.
        metrics: name -> value; one that is not finite is left out.
        protocol: in words: crop, range, alignment, number of images.
        frames: the sources as they were given. A result takes the place of an earlier one of the same frames; other
            frames of a data set, and another data set of the same name, have a result of their own.
    """
    path = Path(folder) / EVALUATIONS
    given = [[full_path(source), rest] for source, rest in map(split_source, frames)]
    entry = {
        **{"task": task, "dataset": dataset, "split": split, "protocol": protocol},
        **{"frames": short_digest(given), "metrics": _finite(metrics)},
    }
    key = ("task", "dataset", "split", "protocol", "frames")
    others = [e for e in _evaluations(Path(folder)) if any(e.get(k, entry[k]) != entry[k] for k in key)]
    write_json(path, [*others, entry])
    return path


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    """JSON and the Hub's model-index take no NaN."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}


def redact(text: str) -> str:
    """`text` without Hub tokens, what an address has of passwords and signatures, and the folders of this machine: of
    an absolute path its last part stays."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_…", text)
    text = re.sub(r"""(\w://)(?:[^/\s"'\\]|\\(?!["']))+@""", r"\1…@", text)
    # what closes behind it, such as a bracket, stays
    text = re.sub(r"""(\w://[^\s"'?#\\]+)\?[^\s"'#\\]+?(?=[()\[\]{},`<>]*(?:[\s"'#\\]|$))""", r"\1?…", text)
    text = re.sub(r"\bfile:/{2,3}(?=/|[A-Za-z]:)", "", text)
    start = r"(?<![\w/:.~…\\-])"  # not inside a relative path or an address
    known = [folder for folder in (Path.cwd(), Path.home()) if folder.name]
    for folder in sorted(known, key=lambda folder: -len(folder.parts)):
        # their names may hold spaces and quotes, at which the patterns below end
        for written in {str(folder), folder.as_posix(), str(folder).replace("\\", "\\\\")}:
            text = re.sub(start + re.escape(written) + r"(?=[/\\])", re.escape(folder.anchor) + "-", text)
    # whole values, whose folders may be named anything: quoted ones, and those of a line of YAML
    absolute = r"(?:/|[A-Za-z]:[/\\])"
    folders = r"""(?:[^"'#\n]|\#(?=[^:"'\n]*[/\\]))*[/\\]"""  # a # begins a split where no slash comes before a :
    # quoted, alone or behind a flag; in a cell of a table, behind a YAML key
    start_of_value = r"""((?<=["'@])|["']-[\w-]+=|(?<=\| )|^\s*(?:- |[\w.]+: ))"""
    text = re.sub(rf"(?m){start_of_value}{absolute}{folders}", r"\1…/", text)
    # of another machine, of a drive; in JSON \ is written \\
    text = re.sub(start + r"\\{2,4}[\w-][\w.-]{2,}\\{1,2}(?:[\w.@+$-]+\\{1,2})*([\w.@+$-]*)", r"…/\1", text)
    root = r"(?:/|[A-Za-z]:(?:/|\\{1,2}))"
    return re.sub(start + root + r"(?:[\w.@+-]+[/\\]+)+([\w.@+-]*)", r"…/\1", text)


def _render(template: str, metadata: CardData, **facts: Any) -> str:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("simipu_hf", "hub/templates"))
    card = environment.get_template(f"{template}.md.j2")
    text = card.render(card_data=metadata.to_yaml(), generated=GENERATED, **facts)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _metadata(
    name: str, kind: str, architecture: str, run: dict[str, Any], evaluations: list[dict[str, Any]]
) -> ModelCardData:
    arguments, is_encoder = run.get("arguments", {}), kind == "encoder"
    task = TASKS.get(kind, "image-feature-extraction")
    base = arguments.get("model_name_or_path") or arguments.get("image_encoder")
    if arguments.get("pretrained_image_encoder"):
        # an encoder folder names its architecture without the tag of the weights that it started from
        named = timm.get_pretrained_cfg(arguments.get("image_encoder") or architecture)
        base = getattr(named, "hf_hub_id", None)
    licenses = [KITTI_LICENSE] if _trained_on_kitti(run) else []
    licenses += [name for name in _licenses(run) if hub_license(name)[0] not in licenses]
    license, license_name = hub_license(" and ".join(licenses))
    results = [
        EvalResult(
            task_type=entry["task"],
            dataset_type=re.sub(r"\W+", "-", entry["dataset"].lower()),
            dataset_name=entry["dataset"],
            dataset_split=entry["split"],
            metric_type=metric,
            metric_name=f"{metric} ({entry['protocol']})",
            metric_value=value,
        )
        for entry in evaluations
        for metric, value in entry["metrics"].items()
    ]
    return ModelCardData(
        model_name=name.split("/")[-1],
        library_name="timm" if is_encoder else "transformers",
        # what transformers has no pipeline for would be offered with one that fails
        pipeline_tag=task if kind in ("encoder", "depth") else None,
        license=license,
        license_name=license_name,
        tags=[*TAGS, task, "timm" if is_encoder else "custom_code"],
        datasets=_repositories(arguments.get("dataset_name")),
        base_model=_repositories(base),
        eval_results=results or None,
    )


def _repositories(names: Any) -> list[str] | None:
    """Those of `names`, one or several, that can be repositories on the Hub."""
    names = names if isinstance(names, list) else [names]
    return [n for n in names if re.fullmatch(r"[\w.-]+/[\w.-]+", str(n)) and not Path(n).exists()] or None


def _last_metrics(folder: Path) -> dict[str, float]:
    path = _in_run(folder, "metrics.jsonl")
    last = {key: value for line in read_metrics(path) for key, value in line.items()} if path else {}
    told = re.compile(r"step|eval/.*|.*(loss|chance|top).*")
    return {key: v for key, v in last.items() if told.fullmatch(key) and isinstance(v, (int, float))}


def _pictures(folder: Path) -> list[str]:
    found = [*sorted(folder.glob("*.png")), *sorted(folder.glob("pictures/*.png"))]
    return [path.relative_to(folder).as_posix() for path in found if path.name != CURVES][:6]


def _licenses(run: dict[str, Any]) -> list[str]:
    """Of the rows, each once; those of several sources stand one under the other, as `datasets` joins them."""
    joined = run.get("data", {}).get("license") or ""
    return list({hub_license(name): name for name in joined.split("\n\n") if name}.values())


def _trained_on_kitti(run: dict[str, Any]) -> bool:
    arguments, licenses = run.get("arguments", {}), _licenses(run)
    if any(hub_license(name)[0] == KITTI_LICENSE for name in licenses):
        return True
    places = ["image_encoder", "model_name_or_path"]  # what it started from
    given = [arguments.get(name) for name in ("data_dir", "dataset_name", "train_frames")]
    if any(isinstance(names, list) and len(names) > 1 for names in given) or not licenses:
        # not by the builder's name: it also reads other data in KITTI's layout
        places += ["data_dir", "dataset_name", "train_frames", "train_list", "image_dir"]
    return any("kitti" in str(arguments.get(name)).lower() for name in places)


def _run(folder: Path) -> dict[str, Any]:
    """The parts of `run.yaml` that have our form; a file of that name may be another program's."""
    path = _in_run(folder, "run.yaml")
    if path is None:
        return {}
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SimIPUError(f"{path}: no readable YAML: {error}") from error
    parts = run if isinstance(run, dict) else {}
    return {name: part for name, part in parts.items() if isinstance(part, dict) or name == "command"}


def run_of(folder: Path) -> Path:
    """The run that `folder` is, or is a checkpoint or the encoder of."""
    in_a_run = re.fullmatch(r"checkpoint-\d+|image_encoder", folder.name) and not (folder / "run.yaml").is_file()
    return folder.parent if in_a_run else folder


def _in_run(folder: Path, name: str) -> Path | None:
    return next((place / name for place in (folder, run_of(folder)) if (place / name).is_file()), None)


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    path = folder / EVALUATIONS
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        named = ("task", "dataset", "split", "protocol")
        return [
            {**entry, **{name: str(entry[name]) for name in named}, "metrics": _finite(entry["metrics"])}
            for entry in content
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SimIPUError(f"{path}: expected the list that add_evaluation writes: {error!r}") from error
