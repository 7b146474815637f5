"""The same file, byte for byte, as a loading script of datasets 3.6.0, the last version that runs scripts.

Needs an interpreter of its own, named by SIMIPU_DATASETS36_PYTHON:

    python -m venv ENV && ENV/bin/pip install datasets==3.6.0 pillow
    SIMIPU_DATASETS36_PYTHON=ENV/bin/python pytest tests/dataset_scripts/test_kitti_datasets36.py
"""

import hashlib
import inspect
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kitti_folders import build

from simipu_hf.data.conversion import convert_to_parquet
from simipu_hf.dataset_scripts import kitti

READ = """
import hashlib, json, sys
import datasets, numpy as np
script, name, root, parquet = sys.argv[1:]
assert datasets.__version__ == "3.6.0", datasets.__version__
options = dict(data_dir=root, trust_remote_code=True)
rows = {
    "normal": datasets.load_dataset(script, name, num_proc=2, **options),
    "streaming": datasets.load_dataset(script, name, streaming=True, **options),
    "parquet": datasets.load_dataset(parquet) if parquet else {},
}
digests = {kind: {split: [digest(row) for row in data[split]] for split in data} for kind, data in rows.items()}
print(json.dumps(digests))
"""


def digest(row: dict) -> str:
    values = {key: row[key] for key in sorted(row) if key not in ("image", "points")}
    result = hashlib.sha256(json.dumps(values).encode())
    result.update(np.asarray(row["image"]).tobytes() + row["points"])
    return result.hexdigest()


def read_with_datasets36(name: str, root: Path, tmp_path: Path, parquet: str = "") -> dict:
    python = os.environ.get("SIMIPU_DATASETS36_PYTHON")
    if not python:
        pytest.skip("SIMIPU_DATASETS36_PYTHON is not set")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf36"), "HF_HUB_OFFLINE": "1"}
    for variable in ("PYTHONPATH", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        environment.pop(variable, None)
    command = [python, "-c", inspect.getsource(digest) + READ, kitti.__file__, name, str(root), parquet]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read_here(name: str, root: Path, tmp_path: Path) -> dict:
    return {split: [*map(digest, rows)] for split, rows in build(root, name, tmp_path / "cache").items()}


def test_object_rows_and_their_parquet(object_root, tmp_path):
    root = object_root({"train": "000000\n000001\n", "val": "000002\n"})
    convert_to_parquet(tmp_path / "parquet", data_dir=root)
    old = read_with_datasets36("object", root, tmp_path, str(tmp_path / "parquet"))
    here = read_here("object", root, tmp_path)
    assert old == {"normal": here, "streaming": here, "parquet": here}


def test_raw_rows(raw_root, tmp_path):
    old, here = read_with_datasets36("raw", raw_root, tmp_path), read_here("raw", raw_root, tmp_path)
    assert old == {"normal": here, "streaming": here, "parquet": {}}


@pytest.mark.parametrize("name", ["object", "raw"])
def test_real_rows(request, tmp_path, name):
    root = request.getfixturevalue("kitti_mini" if name == "object" else "kitti_raw_mini")
    old, here = read_with_datasets36(name, root, tmp_path), read_here(name, root, tmp_path)
    assert old["normal"] == old["streaming"] == here
