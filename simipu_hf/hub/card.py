"""Model and data-set cards, written from what a run left on disk: `config.json`, `run.yaml`, `metrics.jsonl`."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.weights import read_json

GENERATED = "<!-- Written by simipu-hf from the files beside it. Delete this line to keep your own edits. -->"
CURVES = "training_curves.png"
EVALUATIONS = "eval_results.json"
KITTI_LICENSE = "cc-by-nc-sa-3.0"

CITATION = """```bibtex
@inproceedings{li2022simipu,
  title     = {SimIPU: Simple 2D Image and 3D Point Cloud Unsupervised Pre-training for Spatial-Aware Visual
               Representations},
  author    = {Li, Zhenyu and Chen, Zehui and Li, Ang and Fang, Liangji and Jiang, Qinhong and Liu, Xianming and
               Jiang, Junjun and Zhou, Bolei and Zhao, Hang},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2022},
  note      = {arXiv:2112.04680}
}
```"""

KITTI_CITATION = """```bibtex
@inproceedings{geiger2012kitti,
  title     = {Are we ready for Autonomous Driving? The KITTI Vision Benchmark Suite},
  author    = {Geiger, Andreas and Lenz, Philip and Urtasun, Raquel},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2012}
}
```"""


def write_model_card(folder: str | Path, repo_id: str | None = None, encoder_repo_id: str | None = None) -> Path:
    """Write `README.md`, and the curves of the run, into a model or encoder folder.

    Args:
        folder: a run, a checkpoint, a converted model, or an encoder folder.
        repo_id: name under which the card's snippets load it; the folder's name if there is none yet.
        encoder_repo_id: repository of the encoder alone, to point to.

    Returns:
        the card. One without the line that marks it as generated was edited by somebody, and stays as it is.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if path.is_file() and GENERATED not in path.read_text(encoding="utf-8"):
        return path
    if metrics := _metrics(folder):
        from simipu_hf.visualization import draw_training_curves, save_figure  # importing matplotlib takes seconds

        figure = draw_training_curves(metrics)
        if figure is not None:
            save_figure(figure, folder / CURVES)
    path.write_text(model_card(folder, repo_id, encoder_repo_id), encoding="utf-8")
    return path


def model_card(folder: str | Path, repo_id: str | None = None, encoder_repo_id: str | None = None) -> str:
    """The text of the card of a model or encoder folder (see [`write_model_card`])."""
    folder = Path(folder)
    config, run = read_json(folder / "config.json"), _run(folder)
    name = repo_id or folder.name
    if "architecture" in config:
        kind, architecture, load = "encoder", config["architecture"], _load_encoder(name, config["architecture"])
    elif "image_config" in config:
        kind = "depth" if config.get("model_type") == "simipu_depth" else "simipu"
        architecture = config["image_config"]["architecture"]
        has_encoder = (folder / "image_encoder" / "config.json").is_file()
        load = _load_depth(name) if kind == "depth" else _load_simipu(name, config, has_encoder)
    else:
        raise SimIPUError(f"{folder / 'config.json'}: neither a SimIPU model nor a timm encoder")
    evaluations = _evaluations(folder)
    sections = [
        f"---\n{_metadata(name, kind, architecture, run, evaluations).to_yaml()}\n---",
        GENERATED,
        f"# {name.split('/')[-1]}",
        _introduction(kind, architecture, encoder_repo_id),
        "## Load it",
        load,
        _input_section(folder, config),
        *_training_sections(run),
        *_result_sections(folder, evaluations),
        _limits(kind, run),
        f"## Citation\n\n{CITATION}",
    ]
    if _trained_on_kitti(run):
        sections.append(KITTI_CITATION)
    if run.get("versions"):
        rows = "\n".join(f"- {package} {version}" for package, version in run["versions"].items())
        sections.append(f"## Versions\n\n{rows}")
    return "\n\n".join(section for section in sections if section) + "\n"


def add_evaluation(
    folder: str | Path, task: str, dataset: str, split: str, metrics: dict[str, float], protocol: str
) -> Path:
    """Keep an evaluation's result in `eval_results.json`, from which the card's `model-index` is made.

    Args:
        task: the Hub's name of the task, such as `"depth-estimation"`.
        dataset, split: what it was evaluated on.
        metrics: name -> value.
        protocol: in words: crop, range, alignment, number of images.
    """
    path = Path(folder) / EVALUATIONS
    entry = {"task": task, "dataset": dataset, "split": split, "protocol": protocol, "metrics": dict(metrics)}
    key = ("task", "dataset", "split", "protocol")
    others = [e for e in _evaluations(Path(folder)) if any(e.get(k) != entry[k] for k in key)]
    path.write_text(json.dumps([*others, entry], indent=2) + "\n", encoding="utf-8")
    return path


def dataset_card(repo_id: str, license: str | None, rows: int | None = None, splits: list[str] | None = None) -> str:
    """The card of a data set in the row contract.

    Args:
        license: the Hub's name of the licence; `None` means that the rows come from KITTI.
    """
    metadata = DatasetCardData(
        license=license or KITTI_LICENSE,
        task_categories=["image-feature-extraction", "depth-estimation"],
        tags=["lidar", "autonomous-driving", "simipu", *(["kitti"] if license is None else [])],
        pretty_name=repo_id.split("/")[-1],
    )
    warning = (
        "> **Licence.** These rows are derived from the KITTI data set, which is published under CC BY-NC-SA 3.0: "
        "no commercial use, name the authors, share under the same terms. Read "
        "https://www.cvlibs.net/datasets/kitti before you make this repository public.\n"
    )
    size = "rows" if rows is None else f"{rows} rows"
    if splits:
        size += f" in {', '.join(splits)}"
    return "\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---",
            GENERATED,
            f"# {repo_id.split('/')[-1]}",
            "",
            f"Camera and LiDAR pairs for SimIPU pre-training: {size}.",
            "",
            warning if license is None else "",
            "| column | content |",
            "| --- | --- |",
            "| `frame_id` | name of the instant |",
            "| `image` | camera image |",
            "| `points` | LiDAR scan: little-endian float32, x y z in metres and reflectance |",
            "| `camera_projection` | 3 x 4, rectified camera to pixels |",
            "| `lidar_to_camera` | 4 x 4, LiDAR to rectified camera |",
            "",
            "```python",
            "import numpy as np",
            "from datasets import load_dataset",
            "",
            f'rows = load_dataset("{repo_id}")',
            "row = next(iter(rows.values()))[0]",
            'points = np.frombuffer(row["points"], "<f4").reshape(-1, 4)',
            "```",
            "",
            KITTI_CITATION if license is None else "",
        ]
    )


def _metadata(name: str, kind: str, architecture: str, run: dict[str, Any], evaluations: list[dict]) -> ModelCardData:
    arguments = run.get("arguments") or {}
    base = arguments.get("model_name_or_path")
    if arguments.get("pretrained_image_encoder"):
        base = f"timm/{architecture}"
    dataset = arguments.get("dataset_name")
    return ModelCardData(
        model_name=name.split("/")[-1],
        library_name="timm" if kind == "encoder" else "transformers",
        pipeline_tag="depth-estimation" if kind == "depth" else "image-feature-extraction",
        license=KITTI_LICENSE if _trained_on_kitti(run) else (run.get("data") or {}).get("license"),
        tags=[
            "simipu",
            "self-supervised",
            "lidar",
            "autonomous-driving",
            *(["custom_code"] if kind != "encoder" else ["timm"]),
        ],
        datasets=[dataset]
        if dataset and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not Path(dataset).exists()
        else None,
        base_model=base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
        eval_results=[
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
        or None,
    )


def _introduction(kind: str, architecture: str, encoder_repo_id: str | None) -> str:
    method = (
        "pre-trained with [SimIPU](https://arxiv.org/abs/2112.04680) on pairs of camera images and LiDAR scans, "
        "without labels: image features are pulled towards the features of the 3-D points that project onto them"
    )
    text = {
        "encoder": f"The image encoder, a plain timm `{architecture}`, {method}. No point cloud is needed to use it.",
        "simipu": f"An image encoder (timm `{architecture}`) and a point encoder, {method}. "
        "What it is for is the image encoder; the rest is here to continue the pre-training.",
        "depth": f"Metric depth from one camera image: a timm `{architecture}` with a DenseDepth-style decoder, "
        "fine-tuned with simipu-hf.",
    }[kind]
    if encoder_repo_id:
        text += f" The image encoder alone is [{encoder_repo_id}](https://huggingface.co/{encoder_repo_id})."
    return text


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _load_encoder(name: str, architecture: str) -> str:
    return "\n\n".join(
        [
            "With timm: a feature pyramid for a detector or a depth network, or pooled features, and the transform "
            "that fits.",
            _python(f"""
import timm
import torch
from PIL import Image

pyramid = timm.create_model("hf-hub:{name}", pretrained=True, features_only=True).eval()
maps = pyramid(torch.randn(1, 3, 384, 1248))  # one feature map a stage

model = timm.create_model("hf-hub:{name}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.new("RGB", (1242, 375))  # your picture
features = model(transform(image).unsqueeze(0))
"""),
            "With transformers (which uses timm), no remote code:",
            _python(f"""
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
image = Image.new("RGB", (1242, 375))  # your picture
features = model(**processor(image, return_tensors="pt")).last_hidden_state

extract = pipeline("image-feature-extraction", model="{name}")
features = extract(image)
"""),
            "As the backbone of a transformers model, here UperNet and DETR. Load the weights yourself: transformers "
            "5 resets the running statistics of batch norms in a `TimmBackbone`, also in its `from_pretrained`.",
            _python(f"""
import timm
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    TimmBackbone,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

weights = timm.create_model("hf-hub:{name}", pretrained=True, features_only=True).state_dict()
prefixed = {{f"_backbone.{{key}}": value for key, value in weights.items()}}

backbone = TimmBackbone.from_pretrained("hf-hub:{name}", out_indices=(1, 2, 3, 4))
backbone.load_state_dict(prefixed)

config = TimmBackboneConfig(backbone="{architecture}", out_indices=[1, 2, 3, 4])
segmenter = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, use_auxiliary_head=False))
segmenter.backbone.load_state_dict(prefixed)

config = TimmBackboneConfig(backbone="{architecture}", out_indices=[4])
detector = DetrForObjectDetection(DetrConfig(backbone_config=config))
detector.model.backbone.model.load_state_dict(weights, strict=False)  # frozen batch norms count no batches
""")
            if architecture.startswith("resnet")
            else "",
        ]
    )


def _load_simipu(name: str, config: dict[str, Any], has_encoder: bool) -> str:
    snippets = [
        "Both encoders, with transformers, timm and the code in this repository (read it first):",
        _python(f"""
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
image = Image.new("RGB", (1242, 375))  # your picture
with torch.no_grad():
    maps = model.get_image_features(processor(image, return_tensors="pt")["pixel_values"])
encoder = model.image_encoder  # the plain timm model
"""),
    ]
    if has_encoder:
        snippets += [
            "The image encoder alone, no remote code, with transformers or with timm:",
            _python(f"""
import timm
from huggingface_hub import snapshot_download
from transformers import AutoModel

encoder = AutoModel.from_pretrained("{name}", subfolder="image_encoder")

folder = snapshot_download("{name}", allow_patterns="image_encoder/*")
encoder = timm.create_model(f"local-dir:{{folder}}/image_encoder", pretrained=True, features_only=True)
"""),
        ]
    if "AutoModelForPreTraining" in (config.get("auto_map") or {}):
        snippets += [
            "With the projection heads, to go on pre-training:",
            _python(f"""
from transformers import AutoModelForPreTraining, AutoProcessor

model = AutoModelForPreTraining.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
"""),
        ]
    return "\n\n".join(snippets)


def _load_depth(name: str) -> str:
    return _python(f"""
from PIL import Image
from transformers import pipeline

estimate = pipeline("depth-estimation", model="{name}", trust_remote_code=True)
image = Image.new("RGB", (1242, 375))  # your picture
depth = estimate(image)["predicted_depth"]  # metres, height x width of the picture
""")


def _input_section(folder: Path, config: dict[str, Any]) -> str:
    from simipu_hf.hub.image_encoder import read_input_convention

    if "architecture" in config:
        order = (config.get("simipu") or {}).get("channel_order", "rgb")
        cfg = config.get("pretrained_cfg") or {}
        said = f"{order.upper()} channels, mean {cfg.get('mean')}, std {cfg.get('std')} for values from 0 to 1"
    else:
        convention = read_input_convention(folder)
        order, said = convention.channel_order, str(convention)
    text = f"Input: {said}."
    if order == "bgr":
        text += (
            " The image encoder itself expects BGR. This repository's own processor reorders the channels; "
            "timm's and transformers' transforms for the encoder alone do not: pass `pixels[:, [2, 1, 0]]`."
        )
    return text


def _training_sections(run: dict[str, Any]) -> list[str]:
    if not run:
        return []
    data, arguments = run.get("data") or {}, run.get("arguments") or {}
    facts = {key: value for key, value in data.items() if value not in (None, "", [], {})}
    rows = "\n".join(f"| {str(key).replace('_', ' ')} | {_cell(value)} |" for key, value in facts.items())
    sections = [f"## Training data\n\n| | |\n| --- | --- |\n{rows}" if rows else ""]
    command = redact(str(run.get("command", "")))
    recipe = "\n".join(
        f"| `{key}` | {_cell(value)} |"
        for key, value in arguments.items()
        if value not in (None, "", [], {}) and not key.startswith(("hub_", "push_", "report_", "output_", "overwrite"))
    )
    sections.append(
        "## Recipe\n\n"
        + (f"```bash\n{command}\n```\n\n" if command else "")
        + (
            f"<details><summary>All settings</summary>\n\n| flag | value |\n| --- | --- |\n{recipe}\n\n</details>"
            if recipe
            else ""
        )
    )
    return sections


def _result_sections(folder: Path, evaluations: list[dict]) -> list[str]:
    sections = []
    metrics = _metrics(folder)
    if metrics:
        last = {key: value for line in metrics for key, value in line.items() if isinstance(value, (int, float))}
        told = [k for k in last if k == "step" or "loss" in k or "chance" in k or "top" in k or k.startswith("eval/")]
        rows = "\n".join(f"| {key} | {last[key]:.6g} |" for key in told)
        picture = f"![Losses over optimizer steps]({CURVES})\n\n" if (folder / CURVES).is_file() else ""
        sections.append(f"## Training curves\n\n{picture}Last logged values:\n\n| | |\n| --- | --- |\n{rows}")
    found = [*sorted(folder.glob("*.png")), *sorted(folder.glob("pictures/*.png"))]
    pictures = [p.relative_to(folder).as_posix() for p in found if p.name != CURVES][:6]
    if pictures:
        sections.append("## Pictures\n\n" + "\n\n".join(f"![{Path(p).stem.replace('_', ' ')}]({p})" for p in pictures))
    for entry in evaluations:
        rows = "\n".join(f"| {metric} | {value:.6g} |" for metric, value in entry["metrics"].items())
        sections.append(
            f"## Evaluation: {entry['task']} on {entry['dataset']}, {entry['split']}\n\n{entry['protocol']}\n\n"
            f"| metric | value |\n| --- | --- |\n{rows}"
        )
    return sections


def _limits(kind: str, run: dict[str, Any]) -> str:
    text = (
        "## Intended use and limits\n\n"
        "A starting point for 3-D tasks from road images (depth, detection, segmentation); features are not meant to "
        "be used as they are. It saw only the cameras, places and weather of its training data, and was not "
        "evaluated for any use in which people's safety depends on it."
    )
    if kind == "depth":
        text = text.replace("; features are not meant to be used as they are", "")
    if _trained_on_kitti(run):
        text += (
            " Its training images are KITTI's, published under CC BY-NC-SA 3.0 (no commercial use). KITTI's "
            "benchmarks share drives: check the overlap before you compare on one of them."
        )
    elif "kitti" in str((run.get("data") or {}).get("dataset")).lower():
        text += (
            " Its training data lies in KITTI's layout; if it is KITTI's own, CC BY-NC-SA 3.0 applies (no commercial "
            "use)."
        )
    return text


def _trained_on_kitti(run: dict[str, Any]) -> bool:
    arguments, data = run.get("arguments") or {}, run.get("data") or {}
    if data.get("license"):
        return data["license"] == KITTI_LICENSE
    # not by the builder's name: it also reads other data in KITTI's layout
    return any("kitti" in str(arguments.get(name)).lower() for name in ("data_dir", "dataset_name"))


def redact(text: str) -> str:
    """`text` without Hub tokens."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_…", text)
    return re.sub(r"(--hub_token[ =])\S+", r"\1…", text)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _run(folder: Path) -> dict[str, Any]:
    path = _in_run(folder, "run.yaml")
    if path is None:
        return {}
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SimIPUError(f"{path}: no readable YAML: {error}") from error
    return run if isinstance(run, dict) else {}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    from simipu_hf.training.metrics import read_metrics

    path = _in_run(folder, "metrics.jsonl")
    return [] if path is None else read_metrics(path)


def _in_run(folder: Path, name: str) -> Path | None:
    """A file of the run that `folder` is, or is a checkpoint or the encoder of."""
    places = [folder]
    if re.fullmatch(r"checkpoint-\d+|image_encoder", folder.name):
        places.append(folder.parent)
    return next((place / name for place in places if (place / name).is_file()), None)


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    path = folder / EVALUATIONS
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [{**entry, "metrics": {k: float(v) for k, v in entry["metrics"].items()}} for entry in content]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SimIPUError(f"{path}: expected the list that add_evaluation writes: {error!r}") from error
