"""3-D detection from frames to a table: fine-tuning, evaluation, the saved model, comparison, refused labels."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from detection_rows import PROJECTION, make_row, save_rows
from tiny_run import COMPARISON, FINE_TUNING

from simipu_hf.compare_detection import compare_detection
from simipu_hf.data.detection import DetectionFrame
from simipu_hf.data.kitti_objects import KittiObjects, read_objects_folder, write_objects_folder
from simipu_hf.errors import SimIPUError
from simipu_hf.evaluate_detection import (
    MEANS,
    Found,
    detect,
    evaluate_detection,
    format_table,
    score,
    write_predictions,
)
from simipu_hf.finetune_detection import finetune_detection, mean_dimensions
from simipu_hf.hub.sources import load_dense_model
from simipu_hf.modeling.modeling_simipu_detection import SimIPUForMonocular3DDetection
from simipu_hf.training.arguments import CompareDetectionArguments, DetectionArguments, EvaluateDetectionArguments
from simipu_hf.visualization.figures import draw_objects


@pytest.fixture(scope="session")
def frames(tmp_path_factory) -> str:
    return save_rows(tmp_path_factory.mktemp("detection_frames"))


def detection_arguments(frames, output_dir, **changes) -> DetectionArguments:
    fields = {
        "train_frames": [f"{frames}#train"],
        "test_frames": [f"{frames}#test"],
        "output_dir": str(output_dir),
        "image_size": (64, 192),
        "hidden_size": 16,
        "max_steps": 2,
        "eval_steps": 1,
        "keep_frames": True,
    }
    return DetectionArguments(**{**FINE_TUNING, **fields, **changes})


@pytest.fixture(scope="session")
def run(frames, tmp_path_factory) -> Path:
    return finetune_detection(detection_arguments(frames, tmp_path_factory.mktemp("runs") / "run"))


def test_folder_holds_model_evaluation_pictures_and_card(run):
    saved = json.loads((run / "detection_evaluation.json").read_text())
    assert saved["num_labels"] == {"Car": 2, "Pedestrian": 0, "Cyclist": 0}
    assert saved["metrics"]["ap_3d"] is None  # the cars are too small to count
    assert len(list((run / "pictures").iterdir())) == 2
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "eval/ap_3d" in line] == [1, 2]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "object-detection" in card
    assert "3-D boxes of Car, Pedestrian, Cyclist" in card


def test_evaluation_of_the_model_and_of_its_files_are_one(run, frames, tmp_path):
    arguments = {"model": str(run), "test_frames": [f"{frames}#test"], "output_dir": str(tmp_path / "out")}
    result = evaluate_detection(EvaluateDetectionArguments(**arguments, device="cpu", json=True, min_overlap=0.01))
    assert result["num_frames"] == 2
    labels = {f"{i:06d}": KittiObjects.from_row(make_row(i)["objects"]) for i in range(4, 6)}
    write_objects_folder(tmp_path / "labels", labels)
    folders = {"predictions": str(tmp_path / "out" / "predictions"), "labels": str(tmp_path / "labels")}
    again = evaluate_detection(EvaluateDetectionArguments(**folders, json=True, min_overlap=0.01))
    assert again["metrics"] == pytest.approx(result["metrics"], abs=1e-6, nan_ok=True)
    frame = DetectionFrame.from_row(make_row(4))
    network, processor = load_dense_model(SimIPUForMonocular3DDetection, run)
    found = detect(network, frame.image, frame.camera_projection, processor)
    written = read_objects_folder(folders["predictions"], with_scores=True)["000004"]
    np.testing.assert_allclose(written.location, found.location, atol=1e-3)
    same = [Found(name, found, found) for name in ("a/1", "a_1")]
    with pytest.raises(SimIPUError, match="found a_1 twice"):
        write_predictions(tmp_path / "twice", same)
    (tmp_path / "labels" / "000005.txt").unlink()
    with pytest.raises(SimIPUError, match=r"expected labels of every frame.*no 000005\.txt"):
        evaluate_detection(EvaluateDetectionArguments(**folders))


def test_means_are_over_the_classes_with_a_label_that_counts_and_say_so():
    def objects(**heights):
        rows = [make_row(0, type=kind, bbox=[9.0, 9.0, 50.0, 9.0 + high])["objects"] for kind, high in heights.items()]
        return KittiObjects.from_row({name: [row[name][0] for row in rows] for name in rows[0]})

    labels = objects(Car=60, Pedestrian=24, Van=60)
    perfect = dataclasses.replace(labels, score=np.ones(3))
    result = score([Found("a", perfect, labels)] * 80, ["Car", "Pedestrian", "Cyclist"])
    assert result["mean_over"] == ["Car"]
    assert result["metrics"]["ap_3d"] == result["metrics"]["ap_2d"] == 100
    assert "\nmoderate, mean over Car: ap_3d 100.00, ap_bev 100.00, ap_2d 100.00\n" in format_table(result)
    nothing = score([Found("a", perfect, labels)], ["Pedestrian"])
    assert nothing["mean_over"] == []
    assert np.isnan([nothing["metrics"][name] for name in MEANS]).all()
    assert "\nno mean at moderate, as no class has a label that counts\n" in format_table(nothing)


def test_comparison_of_encoders(frames, tmp_path, monkeypatch):
    monkeypatch.setattr("simipu_hf.evaluation.detection.MIN_HEIGHT", (9, 9, 9))  # the cars are small
    arguments = CompareDetectionArguments(
        train_frames=[f"{frames}#train"],
        test_frames=[f"{frames}#test"],
        output_dir=str(tmp_path),
        image_size=(64, 192),
        hidden_size=16,
        max_steps=2,
        **COMPARISON,
    )
    with monkeypatch.context() as patch:
        patch.setattr("simipu_hf.evaluation.detection.MIN_HEIGHT", (99, 99, 99))
        with pytest.raises(SimIPUError, match=r"labels of .* that count at moderate"):
            compare_detection(arguments)
    result = compare_detection(arguments)
    assert result["guess"]["name"] == "no detection"
    runs = {(run["encoder"], run["mode"]): run for run in result["runs"]}
    assert runs["scratch", "full"]["train_loss"] == runs["other", "full"]["train_loss"]  # random weights of one seed
    assert result["table"][1]["level"]["points"] == [0.0]
    report = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "ap_3d ↑" in report
    assert len(re.findall(r"\(pictures/\S+\.png\)", report)) == 4


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Bicycle"}, "expected a class of Car.*found 'Bicycle'"),
        ({"bbox": [9.0, 0.0, 2.0, 5.0]}, "left <= right"),
    ],
)
def test_a_bad_label_is_named_before_training(tmp_path, change, message):
    frames = save_rows(tmp_path, **change)
    with pytest.raises(SimIPUError, match=f"frame 000001, object 0: .*{message}"):
        finetune_detection(detection_arguments(frames, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_frames_without_labels_are_refused(frames, tmp_path):
    with pytest.raises(SimIPUError, match="expected labels of Tram, found none"):
        finetune_detection(detection_arguments(frames, tmp_path / "run", classes=["Car", "Tram"]))
    unlabelled = [{**row, "objects": {name: [] for name in row["objects"]}} for row in map(make_row, range(2))]
    datasets.Dataset.from_list(unlabelled).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "rows")
    with pytest.raises(SimIPUError, match="expected labelled objects, found none in any of 2 frames"):
        finetune_detection(detection_arguments(frames, tmp_path / "run", test_frames=[str(tmp_path / "rows")]))
    with pytest.raises(SimIPUError, match="2 of 2 frames are also trained on"):
        finetune_detection(detection_arguments(frames, tmp_path / "run", train_frames=[frames, f"{frames}#test"]))


def test_sizes_are_the_benchmarks_or_those_of_the_labels(monkeypatch, capsys):
    labels = [KittiObjects.from_row(make_row(i, type="Tram", dimensions=[3, 2, 10 + i])["objects"]) for i in range(3)]
    assert mean_dimensions(labels, ["Tram", "Car"]) == [[3, 2, 11], [1.53, 1.63, 3.88]]
    monkeypatch.setenv("RANK", "1")  # another process than the first
    mean_dimensions(labels, ["Tram", "Car"])
    assert capsys.readouterr().err.count("labels: 3 Tram") == 1


def test_boxes_lie_where_the_image_shows_them():
    frame = DetectionFrame.from_row(make_row(2))
    figure = draw_objects(frame.frame_id, frame.image, PROJECTION, frame.objects)
    front, above = figure.axes
    drawn = np.concatenate(front.collections[0].get_segments())
    x, z = frame.objects.location[0, [0, 2]]
    centre = PROJECTION[:2, :3] @ [x / z, (1.5 - 0.75) / z, 1]
    assert (drawn.min(axis=0) < centre).all()
    assert (drawn.max(axis=0) > centre).all()
    outline = above.collections[0].get_segments()[0]
    np.testing.assert_allclose(outline[:4].mean(axis=0), [z, x])
    np.testing.assert_allclose(np.ptp(outline, axis=0), [1.6, 3.9])  # rotation 0: along x
