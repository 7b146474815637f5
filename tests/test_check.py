"""What `simipu-hf check` says where things work, are absent, and are broken on purpose."""

import json
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from simipu_hf import check as check_module
from simipu_hf.check import CheckReport, Finding, checks
from simipu_hf.cli import main
from simipu_hf.modeling import point_ops

CPU = torch.device("cpu")


def finding(name: str) -> Finding:
    """One check, run alone."""
    return check_module._run(name, dict(checks(CPU))[name])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What agrees is tested elsewhere, on clouds of real size; here, what is said of it."""
    monkeypatch.setattr(check_module, "POINTS", 2048)
    monkeypatch.setattr(check_module, "CENTRES", 128)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("furthest_point_sample, numba", "pass"),
        ("furthest_point_sample_features, numba", "pass"),
        ("ball_query, numba", "pass"),
        ("group_max, numba", "pass"),
        ("point encoder, backward", "pass"),
        ("step, recommended, float32", "pass"),
        ("furthest_point_sample, triton", "absent"),
        ("step, official, fp16", "absent"),
        ("two processes", "absent"),
    ],
)
def test_what_works_passes_and_what_is_not_there_is_absent(name: str, status: str) -> None:
    found = finding(name)
    assert found.status == status, found


def test_a_broken_kernel_fails_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = point_ops.numba_ball_query

    def wider(points, centers, radii, slots):
        return right(points, centers, [(low, 1.05 * high) for low, high in radii], slots)

    monkeypatch.setattr(point_ops, "numba_ball_query", wider)
    found = finding("ball_query, numba")
    assert found.status == "fail"
    assert "ball_query with numba differs from its definition" in found.detail
    assert "grouping_backend" in found.advice


def test_a_kernel_that_raises_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point_ops, "numba_sample", lambda *_: 1 / 0)
    found = finding("furthest_point_sample, numba")
    assert found.status == "fail"
    assert "ZeroDivisionError" in found.detail


def test_optional_packages_are_found_by_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "spconv_cu120-2.3.8.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: spconv-cu120\nVersion: 2.3.8\n", "utf-8")
    (folder / "top_level.txt").write_text("spconv\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert "spconv 2.3.8" in finding("optional packages").detail


def test_too_little_room_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
    assert finding("disk").status == "fail"
    if sys.platform == "linux":
        assert "--shm-size" in finding("shared memory").advice


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a text once ended the check with an IndexError."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", Mock(side_effect=TimeoutError))
    assert finding("Hub").detail.endswith("refuses or cannot be reached: TimeoutError")


def test_exit_code_and_json_follow_the_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = CheckReport([Finding("a", "pass", "fine"), Finding("b", "fail", "broken", "mend it")])
    monkeypatch.setattr(check_module, "check", lambda arguments: report)
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--json"])
    assert stopped.value.code == 1
    assert json.loads(capsys.readouterr().out)["findings"][1]["advice"] == "mend it"
    report.findings.pop()
    with pytest.raises(SystemExit) as stopped:
        main(["check"])
    assert stopped.value.code == 0
    assert "everything that is there works" in capsys.readouterr().out


@pytest.mark.cuda
def test_everything_passes_on_this_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    report = check_module.check()
    assert report.passed, str(report)
