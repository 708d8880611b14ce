"""util/analysis.py and what evaluate writes: against slow definitions, and against the training log."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.files import IGNORE_INDEX
from model import build_model
from scripts import evaluate as evaluate_script
from tests.helpers import make_dataset, run_script
from util.analysis import BINS, Analysis, boundary_counts
from util.config import load_config
from util.evaluate import Scores
from util.evaluation_report import FILES, errors

pytestmark = pytest.mark.slow


def _maps(seed: int, shape=(30, 41), nclass: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction and a label of blocks, with ignored pixels in the label."""
    rng = np.random.default_rng(seed)
    blocks = [np.kron(rng.integers(0, nclass, (6, 9)), np.ones((5, 5), int))[: shape[0], : shape[1]] for _ in range(2)]
    label = np.where(rng.random(shape) < 0.1, IGNORE_INDEX, blocks[0])
    prediction = np.where(rng.random(shape) < 0.8, blocks[0], blocks[1])
    return torch.from_numpy(prediction), torch.from_numpy(label.astype(np.uint8))


def _boundary_slowly(values: np.ndarray, ignored: np.ndarray, wanted: int, distance: int) -> set[tuple[int, int]]:
    height, width = values.shape
    region = set()
    for y in range(height):
        for x in range(width):
            if values[y, x] != wanted or ignored[y, x]:
                continue
            for v in range(y - distance, y + distance + 1):
                for u in range(x - distance, x + distance + 1):
                    inside = 0 <= v < height and 0 <= u < width
                    if not inside or (not ignored[v, u] and values[v, u] != wanted):
                        region.add((y, x))
    return region


@pytest.mark.parametrize("seed", range(3))
def test_boundary_counts_equal_an_obvious_loop(seed):
    prediction, label = _maps(seed)
    distance = max(1, round(0.02 * np.hypot(30, 41)))
    ignored = label.numpy() == IGNORE_INDEX
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for wanted in range(6):
        regions = [_boundary_slowly(values.numpy(), ignored, wanted, distance) for values in (prediction, label)]
        expected[0, wanted], expected[1, wanted] = len(regions[0] & regions[1]), len(regions[0] | regions[1])
    assert torch.equal(boundary_counts(prediction, label, 6), expected)
    assert expected[1, :4].min() > 0 and expected[1, 4:].max() == 0


def test_a_boundary_is_as_wide_as_the_rounded_share_of_the_diagonal():
    """Of 60 x 60 pixels 1.7, that is 2: of the upper half all but 26 x 56 pixels inside are near its border."""
    label = torch.zeros(60, 60, dtype=torch.uint8)
    label[30:] = 1
    assert boundary_counts(label.long(), label, 2).tolist() == [[344, 344], [344, 344]]


def test_a_confidence_at_the_threshold_is_confident_and_an_image_without_labels_is_never_among_the_worst():
    analysis = Analysis(4, 2, 0.25, torch.device("cpu"))
    scores = Scores(torch.zeros(2, 4, 3, 3), True)  # each class has a probability of 0.25
    label = torch.stack([torch.full((3, 3), IGNORE_INDEX), torch.zeros(3, 3, dtype=torch.int64)])
    analysis(scores, label, [torch.tensor([0, 1])])
    analysis.finish()
    assert analysis.confident == {"share": 1.0, "accuracy": 1.0}
    assert [number for number, _ in analysis.worst(2)] == [1, 0]


def test_an_image_without_a_labelled_pixel_has_no_boundary():
    prediction, label = _maps(0)
    assert boundary_counts(prediction, torch.full_like(label, IGNORE_INDEX), 4).sum() == 0


@pytest.fixture(scope="module")
def observed():
    """An analysis of three images, and what it saw: confidences, whether right, and each image's maps."""
    analysis = Analysis(4, 3, 0.6, torch.device("cpu"))
    confidences, rights, maps = [], [], []
    for number in (2, 0, 1):
        logits = 2 * torch.randn(1, 4, 30, 41, generator=torch.manual_seed(number))
        _, label = _maps(number)
        analysis(Scores(logits, True), label[None], [torch.tensor([number])])
        probabilities = logits.softmax(1)[0].double().numpy()
        valid = label.numpy() != IGNORE_INDEX
        confidences += probabilities.max(0)[valid].tolist()
        rights += (probabilities.argmax(0) == label.numpy())[valid].tolist()
        maps.append((number, probabilities.argmax(0), label.numpy()))
    analysis.finish()
    return SimpleNamespace(analysis=analysis, confidences=confidences, rights=rights, maps=maps)


def test_calibration_equals_its_definition(observed):
    bins = [[0, 0, 0.0] for _ in range(BINS)]
    for confidence, right in zip(observed.confidences, observed.rights, strict=True):
        one = bins[min(int(confidence * BINS), BINS - 1)]
        one[0] += 1
        one[1] += right
        one[2] += confidence
    calibration = observed.analysis.calibration
    np.testing.assert_allclose(torch.stack(list(calibration)).T, bins, rtol=1e-6)
    total = len(observed.confidences)
    ece = sum(count / total * abs(right / count - sure / count) for count, right, sure in bins if count)
    assert calibration.ece == pytest.approx(ece, rel=1e-6)


def test_the_confident_share_equals_its_definition(observed):
    sure = [right for confidence, right in zip(observed.confidences, observed.rights, strict=True) if confidence >= 0.6]
    expected = {"share": len(sure) / len(observed.rights), "accuracy": sum(sure) / len(sure)}
    assert observed.analysis.confident == pytest.approx(expected)
    assert 0.05 < expected["share"] < 0.95


def test_the_worst_images_come_first(observed):
    values = {}
    for number, prediction, label in observed.maps:
        prediction = np.where(label == IGNORE_INDEX, IGNORE_INDEX, prediction)
        pairs = [(prediction == c, label == c) for c in range(4)]
        ious = [100 * (p & t).sum() / (p | t).sum() for p, t in pairs if (p | t).any()]
        values[number] = np.mean(ious)
    expected = sorted(values.items(), key=lambda item: item[1])
    assert observed.analysis.worst(2) == [(number, pytest.approx(value)) for number, value in expected[:2]]


def test_the_picture_of_errors_tells_right_wrong_and_ignored():
    image = np.full((1, 3, 3), 100, np.uint8)
    shown = errors(image, np.array([[0, 1, 255]]), np.array([[0, 0, 0]]))
    assert shown[0, 2].tolist() == [100] * 3 and shown[0, 0, 2] > shown[0, 0, 0] and shown[0, 1, 0] > shown[0, 1, 2]


# What evaluate writes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs on tiny data, in which predictions of all classes occur."""
    data = make_dataset(tmp_path_factory.mktemp("data"), val=5)
    data.configure(epochs=2, keep_last=2, lr=0.02)
    done = run_script("unimatch.py", *data.arguments(data.root / "exp"))
    assert done.returncode == 0, done.stderr
    return data


@pytest.mark.slow
def test_evaluate_gives_the_training_logs_figures_to_the_last_digit(trained, tmp_path, capsys):
    logged = re.findall(r"  mIoU +([\d.]+)", (trained.root / "exp/train.log").read_text())
    assert len(logged) == 2
    for number, name in enumerate(("epoch-0001.pth", "latest.pth")):
        checkpoint = torch.load(trained.root / "exp" / name, weights_only=True)
        published = {f"module.{key}": value for key, value in checkpoint["model"].items()}
        torch.save({"model": published, "epoch": number}, tmp_path / "published.pth")
        config = ("--config", str(trained.config))
        for argv in ((str(trained.root / "exp" / name),), (str(tmp_path / "published.pth"), *config)):
            evaluate_script.main(["--checkpoint", *argv])
            assert re.search(r"  mIoU +([\d.]+)", capsys.readouterr().out)[1] == logged[number]


@pytest.mark.slow
def test_metrics_are_the_same_with_two_processes_and_pictures_are_written(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    checkpoint = trained.root / "exp/latest.pth"
    evaluate_script.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "one"), "--worst", "2"])
    out = capsys.readouterr().out
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scripts.evaluate")
    done = run_script(*launch, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "two"), "--worst", "2")
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for key in ("expected_calibration_error", "ece", "calibration"):  # sums in another order
        assert str(found[0].pop(key))[:6] == str(found[1].pop(key))[:6]
    assert found[0] == found[1] and found[0]["checkpoint_sha256"] == found[0]["checkpoint"]["sha256"]
    assert f"{found[0]['mIoU']:.2f}" in out and f"pixel accuracy {found[0]['pixel_accuracy']:.2f}" in out
    confusion = np.array(found[0]["confusion"])
    assert found[0]["pixel_accuracy"] == pytest.approx(100 * confusion.trace() / confusion.sum())
    assert found[0]["classes"][1]["pixels"] == confusion[1].sum()
    for name in FILES:
        contents = [(tmp_path / folder / name).read_bytes() for folder in ("one", "two")]
        if name.endswith(".png"):
            assert contents[0] == contents[1]
            with Image.open(tmp_path / "one" / name) as picture:
                assert min(picture.size) > 200
    again = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "one"), "--worst"]  # its own are replaced
    evaluate_script.main([*again, "2", "--colors", "colorblind"])
    assert (tmp_path / "one/worst.png").read_bytes() != (tmp_path / "two/worst.png").read_bytes()
    evaluate_script.main([*again, "0"])
    assert not (tmp_path / "one/worst.png").exists() and (tmp_path / "one/metrics.json").exists()


def test_files_of_others_are_not_replaced(tmp_path):
    pytest.importorskip("matplotlib")
    data = make_dataset(tmp_path, val=1)
    torch.save(build_model(load_config(data.config)).state_dict(), tmp_path / "model.pth")
    (tmp_path / "metrics.json").write_text('{"mIoU": 80}')
    with pytest.raises(ValueError, match=r"metrics\.json: exists, and these tools did not write it"):
        arguments = ["--config", str(data.config), "--checkpoint", str(tmp_path / "model.pth")]
        evaluate_script.main([*arguments, "--out", str(tmp_path)])
