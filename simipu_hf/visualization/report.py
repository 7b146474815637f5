"""The demo's report: one HTML file with its pictures inside, that asks the network for nothing."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from simipu_hf.files import atomic_write

from .scene import POLICY


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the report of a demo whose `results` are those of `results.json`; their pictures lie beside `path`."""

    def image(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode((path.parent / name).read_bytes()).decode("ascii")

    def html(name: str) -> str:
        return (path.parent / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=PackageLoader("simipu_hf", "visualization"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["endswith"] = str.endswith
    # 13 cells have their centre within two cells of another's; on the finest of the stages compared with points
    _, height, width = results["stages"]["encoder"]["feature_shapes"][-3]
    page = environment.get_template("report.html.j2").render(
        results=results, image=image, html=html, policy=POLICY, recall_of_chance=min(1.0, 13 / (height * width))
    )
    with atomic_write(path) as stream:
        stream.write(page)
    return path
