"""The demo's report: one HTML file with its pictures inside, that asks the network for nothing."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from simipu_hf.evaluation.depth import HIGHER_IS_BETTER
from simipu_hf.hub.files import written_aside

SHOWN_METRICS = {"abs_rel": "AbsRel", "rmse": "RMSE (m)", "silog": "SILog", "a1": "δ &lt; 1.25"}

# The policy forbids every request, also those of the 3-D page, which inherits it.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>SimIPU demo</title>
<style>
  :root { color-scheme: dark; --text: #e8eaed; --faint: #a3aab5; --panel: #1c2027; --line: #343a44; }
  * { box-sizing: border-box; }
  body { margin: 0; background: #14171c; color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
  main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px; }
  h1 { font-size: 30px; margin: 0 0 8px; }
  h2 { font-size: 21px; margin: 48px 0 8px; padding-top: 16px; border-top: 1px solid var(--line); }
  p { max-width: 78ch; margin: 8px 0; }
  a { color: #5aa9ff; }
  nav { margin: 16px 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; margin: 20px 0; }
  .tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
  .tile b { display: block; font-size: 25px; }
  .tile span, figcaption, .faint { color: var(--faint); font-size: 14px; }
  figure { margin: 16px 0; }
  figure img { width: 100%; height: auto; display: block; border: 1px solid var(--line); border-radius: 8px; }
  iframe { width: 100%; height: 620px; border: 1px solid var(--line); border-radius: 8px; background: #14171c; }
  table { border-collapse: collapse; margin: 12px 0; display: block; overflow-x: auto; }
  th, td { border-bottom: 1px solid var(--line); padding: 6px 16px 6px 0; text-align: left; vertical-align: top; }
  td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
  pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
  pre { overflow-x: auto; }
  code, pre { font: 14px/1.5 ui-monospace, monospace; }
</style>
</head>
<body>
<main>
<h1>SimIPU: what the demo did</h1>
<p>An image encoder was taught about 3-D space without labels: the feature of the image at a pixel is pulled towards
the feature of the LiDAR point that projects there, and two views of a scan towards each other. The product is the
image encoder; to use it, no point cloud is needed.</p>
$tiles
<nav>$links</nav>
$sections
</main>
</body>
</html>
""")


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the report of a demo.

    Args:
        results: as in `results.json`; the pictures it names lie in the folder of `path`.
        path: of the HTML file; it appears whole or not at all.
    """
    stages, folder = results["stages"], path.parent
    pictures = [folder / name for name in stages["pictures"]["files"]]

    def picture(ending: str, caption: str) -> str:
        return _figure(next(file for file in pictures if file.stem.endswith(ending)), caption)

    scene = next(file for file in pictures if file.suffix == ".html")
    sections = {
        "What was done": _what_was_done(results),
        "The data": picture(
            "_points",
            "The LiDAR scan over the image of the same instant. Where a point falls is known from the calibration "
            "alone: this is the only supervision there is.",
        ),
        "Two views": picture(
            "_matches",
            "The scan as it is and after a random rotation, scaling, mirroring and shift. Lines join points that the "
            "Hungarian algorithm matched; the intra-modal loss pulls their features together.",
        ),
        "Training": picture(
            "training_curves",
            "Both losses, with the level of a uniform guess dashed: below it, something was learnt. Orange: frames "
            "that were not trained on.",
        )
        + _learnt_by_heart(stages),
        "Features": picture(
            "_shared_features",
            "Image and points in the space in which they are compared. The colours are three principal components, "
            "fitted to the image and used for the points unchanged: the same colour means the same direction.",
        )
        + picture("_image_features", "The stages of the image encoder itself, each with its own three components."),
        "Retrieval": picture(
            "_retrieval",
            "For a near, a middle and a far point: how similar each place of the image is to it, and where the point "
            "really is. The frame was held out.",
        )
        + _recall(stages["pretraining"]["held_out"], stages["encoder"]["feature_shapes"]),
        "In 3-D": "<p>Drag to rotate, wheel or pinch to zoom; choose the colours at the top left. "
        f"The same page on its own: <code>{escape(scene.relative_to(folder).as_posix())}</code>.</p>"
        f'<iframe title="The scan in 3-D" sandbox="allow-scripts" '
        f'srcdoc="{escape(scene.read_text(encoding="utf-8"))}"></iframe>',
        "Depth": _depth(stages["depth"], folder / "pictures" / "depth.png"),
        "Use the encoder": _use_encoder(stages["encoder"]),
        "Next steps": _next_steps(results),
    }
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    page = _PAGE.substitute(
        tiles=_tiles(stages),
        links="".join(f'<a href="#{anchors[title]}">{escape(title)}</a>' for title in sections),
        sections="\n".join(
            f'<section id="{anchors[title]}"><h2>{escape(title)}</h2>{body}</section>'
            for title, body in sections.items()
        ),
    )
    with written_aside(path, overwrite=True) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def _tiles(stages: dict[str, Any]) -> str:
    held_out, depth = stages["pretraining"]["held_out"], stages["depth"]
    metrics = depth["metrics"]
    seconds = sum(stage.get("seconds", 0) for stage in stages.values())
    tiles = [
        (f"{seconds / 60:.1f} min", "from nothing to this report"),
        (
            f"{held_out['inter_modal_loss']:.2f}",
            f"image-point loss on held-out frames; a guess has {held_out['inter_modal_chance']:.2f}",
        ),
        ("equal", f"weights and features in plain timm and transformers: a {stages['encoder']['architecture']}"),
        (
            f"{depth['abs_rel_change_percent']:+.0f} %".replace("-", "\N{MINUS SIGN}"),
            f"depth error (AbsRel) against random weights: {metrics['pretrained']['abs_rel']:.3f} instead of "
            f"{metrics['scratch']['abs_rel']:.3f}",
        ),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles
        )
        + "</div>"
    )


def _what_was_done(results: dict[str, Any]) -> str:
    stages = results["stages"]
    data, pretraining, depth, encoder = (stages[name] for name in ("data", "pretraining", "depth", "encoder"))
    height, width = data["image_size"]
    what = {
        "data": f"{data['source']}: {data['train_frames']} frames to train on, {data['held_out_frames']} held out, "
        f"{width} x {height} pixels, {data['points_per_scan']:,} points a scan",
        "pretraining": f"{pretraining['steps']} steps of {pretraining['rows_per_step']} frames, "
        f"{pretraining['seconds_per_step']:.2f} s a step, without labels",
        "encoder": f"{encoder['architecture']}, {encoder['parameters'] / 1e6:.1f} million parameters; the same "
        "weights and features in both",
        "depth": f"linear map on frozen features, fitted to the LiDAR depth of {depth['train_frames']} frames, tested "
        f"on {depth['test_frames']} held-out ones",
        "pictures": f"of a held-out frame, in {Path(stages['pictures']['files'][0]).parent.as_posix()}/",
    }
    rows = [
        [escape(stages[name]["title"]), escape(text), f"{stages[name]['seconds']:.0f}"] for name, text in what.items()
    ]
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        _table(["stage", "what", "seconds"], rows)
        + f'<p class="faint">Seed {results["seed"]}; {escape(packages)}.</p>'
    )


def _learnt_by_heart(stages: dict[str, Any]) -> str:
    held_out = stages["pretraining"]["held_out"]
    if held_out["inter_modal_loss"] < held_out["inter_modal_chance"]:
        return ""
    return (
        f"<p>On held-out frames the inter-modal loss is no better than a guess: which point belongs to which pixel of "
        f"{stages['data']['train_frames']} training frames was learnt by heart. More frames are what helps.</p>"
    )


def _recall(held_out: dict[str, Any], feature_shapes: Sequence[Sequence[int]]) -> str:
    share = held_out.get("recall_within_2_cells")
    if share is None:
        return ""
    _, height, width = feature_shapes[-3]  # the finest of the stages that the model compares with points
    chance = min(1.0, 13 / (height * width))  # 13 cells have their centre within two cells of another's
    return (
        "<p>Over all held-out frames, the most similar place lies within two feature cells of the true one for "
        f"{share:.0%} of the points; a place drawn at random would for about {chance:.1%}.</p>"
    )


def _depth(depth: dict[str, Any], picture: Path) -> str:
    names = {"scratch": "random weights", "pretrained": "pre-trained here"}
    head = [
        "image encoder, frozen",
        *(f"{text} {'↑' if n in HIGHER_IS_BETTER else '↓'}" for n, text in SHOWN_METRICS.items()),
    ]
    rows = [
        [text, *(f"{depth['metrics'][name][metric]:.3f}" for metric in SHOWN_METRICS)] for name, text in names.items()
    ]
    change = depth["abs_rel_change_percent"]
    verdict = (
        f"The pre-trained features lower the depth error by {-change:.0f} %."
        if change < 0
        else "The pre-trained features do not lower the depth error here: too short a run, or too few frames."
    )
    return (
        f"<p>A linear map from the frozen features to depth, fitted to the LiDAR points of {depth['train_frames']} "
        f"frames and tested on {depth['test_frames']} held-out ones: what it gets right, the features must hold. "
        f"{verdict} The random weights are of one seed; <code>simipu-hf compare-depth</code> trains a decoder, and "
        "the encoder with it, over several.</p>"
        + _table(head, rows)
        + _figure(
            picture,
            "A held-out frame. Near is red, far is blue; the scale is logarithmic. No LiDAR point falls on the sky: "
            "what is predicted there was never asked for.",
        )
    )


def _use_encoder(encoder: dict[str, Any]) -> str:
    folder = encoder["path"]
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in encoder["feature_shapes"])
    code = f'''import timm
import torch

pyramid = timm.create_model("local-dir:{folder}", pretrained=True, features_only=True).eval()
maps = pyramid(torch.randn(1, 3, 96, 320))  # one feature map a stage

from transformers import AutoModel

model = AutoModel.from_pretrained("{folder}").eval()
features = model(torch.randn(1, 3, 96, 320)).last_hidden_state'''
    return (
        "<p>Plain timm and plain transformers load it; neither needs this package.</p>"
        f"<pre>{escape(code)}</pre>"
        f"<p>Checked in this run: both hold exactly the weights that were trained, and give the same features. "
        f"The maps of a frame here are {shapes}.</p>"
    )


def _next_steps(results: dict[str, Any]) -> str:
    commands = """# look at your data first, then pre-train on it (KITTI layout, Parquet, or a data set of the Hub)
simipu-hf data inspect --data_dir KITTI
simipu-hf pretrain --data_dir KITTI --output_dir my_run

# does it help? fine-tune for depth from that run and from random weights, over several seeds
simipu-hf compare-depth --image_encoders simipu=my_run --train_frames KITTI#train --test_frames KITTI#val \\
    --image_size 96 320 --output_dir comparison"""
    synthetic = results["data_dir"] is None
    limits = (
        "A few minutes on generated streets show that everything works, and no more: for real images, pre-train on "
        "real frames. <code>simipu-hf demo --data_dir KITTI --output_dir kitti_demo</code> is this demo on yours."
        if synthetic
        else "A few minutes on a few frames show that everything works on these data, no more: train longer, on all."
    )
    return f"<p>{limits}</p><pre>{escape(commands)}</pre>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; those that are numbers stand to the right."""
    classes = [' class="number"' if cell.replace(".", "", 1).isdigit() else "" for cell in rows[0]]
    lines = [("th", head), *(("td", row) for row in rows)]
    return (
        "<table>"
        + "".join(
            "<tr>" + "".join(f"<{tag}{cls}>{cell}</{tag}>" for cell, cls in zip(cells, classes, strict=True)) + "</tr>"
            for tag, cells in lines
        )
        + "</table>"
    )


def _figure(file: Path, caption: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
