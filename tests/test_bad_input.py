"""Bad input to the real scripts: exit status 2 and one line on stderr that names what is wrong, before any training."""

import importlib
import os
import zipfile

import pytest
import torch
from PIL import Image

from dataset import DataError
from dataset.files import limit_image_pixels, read_image
from dataset.inputs import find_pictures
from dataset.lists import read_list
from dataset.loader import LoaderOptions, val_loader
from dataset.source import DataSource
from tests import faults
from tests.helpers import PROJECT_ROOT, run_script
from util.cli import parse_args, run_main
from util.errors import EXIT_STOPPED, EXIT_USER_ERROR


@pytest.fixture(autouse=True)
def usual_limit():
    """The limit of image sizes is one for the whole process; a script sets it."""
    limit = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = limit


# --- the faults: each takes (data, save_path), spoils something, and returns what the message must contain and, where
# the command line itself is at fault, further arguments


def missing_labeled_list(data, save_path):
    data.labeled.unlink()
    return [data.labeled, "no such list file"]


def missing_unlabeled_list(data, save_path):
    data.unlabeled.unlink()
    return [data.unlabeled, "neither a list file nor a folder"]


def missing_val_list(data, save_path):
    data.configure(val_id_path="no/such/val.txt")
    return ["no/such/val.txt", "no such list file"]


def empty_labeled_list(data, save_path):
    data.labeled.write_text("\n# nothing yet\n", encoding="utf-8")
    return [data.labeled, "the list is empty"]


def empty_unlabeled_list(data, save_path):
    data.unlabeled.write_text("", encoding="utf-8")
    return [data.unlabeled, "the list is empty"]


def empty_val_list(data, save_path):
    data.val.write_text("", encoding="utf-8")
    return [data.val, "the list is empty"]


def labeled_list_without_labels(data, save_path):
    data.labeled.write_text("images/labeled0.jpg\n", encoding="utf-8")
    return [f"{data.labeled}:1", "images/labeled0.jpg has no label"]


def no_unlabeled_source(data, save_path):
    data.configure(unlabeled_id_path=None)
    return ["--unlabeled-id-path", "unlabeled_id_path"]


def only_labelled_images_as_unlabelled(data, save_path):
    data.configure(unlabeled_id_path=str(data.labeled))
    return [data.labeled, "no unlabelled image"]


def missing_data_root(data, save_path):
    data.configure(data_root=str(data.root / "nowhere"))
    return [data.root / "nowhere", "no such folder", "data_root"]


def missing_config(data, save_path):
    data.config.unlink()
    return [data.config, "no such config file"]


def unreadable_yaml(data, save_path):
    data.config.write_text("dataset: tiny\nclasses: [a, b\n", encoding="utf-8")
    return [data.config, "not valid YAML", "line 3"]


def unknown_key(data, save_path):
    data.configure(conf_tresh=0.9)
    return [data.config, "unknown key 'conf_tresh'", "did you mean 'conf_thresh'?"]


def unknown_key_set(data, save_path):
    return ["--set epoch=3", "unknown key 'epoch'", "did you mean 'epochs'?"], ["--set", "epoch=3"]


def set_without_value(data, save_path):
    return ["--set epochs", "expected key=value"], ["--set", "epochs"]


def unknown_backbone(data, save_path):
    data.configure(backbone="resnet-51")
    return [data.config, "unknown backbone 'resnet-51'", "did you mean 'resnet50'?"]


def unknown_criterion(data, save_path):
    data.configure(criterion="OHEMLoss")
    return [data.config, "unknown criterion 'OHEMLoss'", "CELoss, OHEM"]


def crop_size_zero(data, save_path):
    data.configure(crop_size=0)
    return [data.config, "crop_size: 0 must be at least"]


def crop_size_text(data, save_path):
    return ["--set crop_size=big", "crop_size: expected a whole number, found 'big'"], ["--set", "crop_size=big"]


def too_few_labelled(data, save_path):
    data.configure(batch_size=5)
    return ["4 labelled images cannot fill one batch of 5"]


def too_few_unlabelled(data, save_path):
    data.unlabeled.write_text("images/unlabeled0.jpg\n", encoding="utf-8")
    return ["1 unlabelled image cannot fill one batch of 2"]


def save_path_is_a_file(data, save_path):
    save_path.write_text("in the way", encoding="utf-8")
    return [f"--save-path {save_path}", "cannot be written to"]


def save_path_under_a_file(data, save_path):
    (data.root / "file").write_text("in the way", encoding="utf-8")
    # The last of two --save-path counts.
    return [f"--save-path {data.root}/file/run", "cannot be written to"], ["--save-path", f"{data.root}/file/run"]


def missing_weights(data, save_path):
    data.configure(pretrained="no/such/weights.pth")
    return ["no/such/weights.pth: no such file", "resnet10", "pretrained: false"]


def weights_that_are_none(data, save_path):
    path = data.root / "weights.pth"
    path.write_text("<html>not found</html>", encoding="utf-8")
    data.configure(pretrained=str(path))
    return [path, "not a PyTorch checkpoint"]


def cuda_without_gpu(data, save_path):
    data.configure(device="cuda")
    return ["device: cuda", "no GPU", "device=cpu"]


def a_checkpoint_that_is_none(data, save_path):
    save_path.mkdir()
    (save_path / "latest.pth").write_text("half a file", encoding="utf-8")
    return [save_path / "latest.pth", "damaged or not a checkpoint"]


# Where a script is named, the fault is also tried on it as a process of its own.
FAULTS = {
    missing_labeled_list: None,
    missing_unlabeled_list: None,
    missing_val_list: None,
    empty_labeled_list: None,
    empty_unlabeled_list: "fixmatch",
    empty_val_list: None,
    labeled_list_without_labels: None,
    no_unlabeled_source: None,
    only_labelled_images_as_unlabelled: None,
    missing_data_root: None,
    missing_config: None,
    unreadable_yaml: "unimatch",
    unknown_key: None,
    unknown_key_set: None,
    set_without_value: None,
    unknown_backbone: None,
    unknown_criterion: None,
    crop_size_zero: None,
    crop_size_text: None,
    too_few_labelled: None,
    too_few_unlabelled: None,
    save_path_is_a_file: None,
    save_path_under_a_file: None,
    missing_weights: None,
    weights_that_are_none: None,
    cuda_without_gpu: None,
    a_checkpoint_that_is_none: None,
}


# What the check at a run's start sees; it decodes no image that ends as it should.
DATA_FAULTS = {fault: None for fault in faults.ERRORS if fault is not faults.image_damaged_inside}
DATA_FAULTS |= {
    faults.missing_label: "supervised",
}


def spoil(fault, data, save_path):
    """Apply a fault: the arguments of a run with it, and what its message must contain."""
    if fault in DATA_FAULTS:
        _, *fragments = fault(data)
        return data.arguments(save_path), list(map(str, fragments))
    result = fault(data, save_path)
    fragments, further = result if isinstance(result, tuple) else (result, [])
    return [*data.arguments(save_path), *further], list(map(str, fragments))


def assert_one_error(stderr, fragments, save_path):
    """Exactly one line on stderr, an error with all fragments; nothing trained."""
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ") and stderr.endswith("\n")
    for fragment in fragments:
        assert fragment in stderr
    assert "Traceback" not in stderr
    assert not [path for path in save_path.glob("*.pth") if zipfile.is_zipfile(path)]  # as torch.save writes them


def run_in_process(method, arguments):
    """What `python METHOD.py ARGUMENTS` does, in this process; returns its exit status."""
    main = importlib.import_module(method).main
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main(arguments))
    return stopped.value.code


@pytest.mark.parametrize("fault", [*FAULTS, *DATA_FAULTS], ids=lambda fault: fault.__name__)
def test_each_fault_is_one_line_and_status_2(data, tmp_path, capsys, monkeypatch, fault):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments, fragments = spoil(fault, data, tmp_path / "run")
    assert run_in_process("unimatch", arguments) == EXIT_USER_ERROR
    assert_one_error(capsys.readouterr().err, fragments, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "method"),
    [
        pytest.param(fault, method, id=f"{fault.__name__}-{method}")
        for fault, method in {**FAULTS, **DATA_FAULTS}.items()
        if method
    ],
)
def test_a_script_ends_with_one_line_and_status_2(data, tmp_path, fault, method):
    arguments, fragments = spoil(fault, data, tmp_path / "run")
    ended = run_script(f"{method}.py", *arguments, env={"CUDA_VISIBLE_DEVICES": ""})
    assert ended.returncode == 2
    assert_one_error(ended.stderr, fragments, tmp_path / "run")
    assert "iteration" not in ended.stdout


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({}, "4 labelled images cannot fill one batch of 6 (batch_size 2 x 3 processes)"),
        ({"batch_size": 1}, None),
    ],
)
def test_a_batch_is_counted_over_all_processes(data, tmp_path, capsys, monkeypatch, changes, fragment):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr("util.run.process_group", stop_here)
    data.configure(**changes)
    arguments = data.arguments(tmp_path / "run")
    if fragment is None:
        with pytest.raises(Reached):
            importlib.import_module("unimatch").main(arguments)
        return
    assert run_in_process("unimatch", arguments) == EXIT_USER_ERROR
    assert_one_error(capsys.readouterr().err, [fragment], tmp_path / "run")


class Reached(Exception):
    """The run came as far as to start."""


def stop_here(*arguments):
    arguments[-1]()  # what is prepared
    raise Reached


@pytest.mark.parametrize(("method", "fits"), [("unimatch", True), ("fixmatch", False), ("supervised", False)])
def test_a_single_image_is_a_batch_for_unimatch_only(data, tmp_path, capsys, monkeypatch, method, fits):
    monkeypatch.setattr("util.run.process_group", stop_here)
    arguments = [*data.arguments(tmp_path / "run"), "--set", "batch_size=1"]
    if fits:
        with pytest.raises(Reached):
            importlib.import_module(method).main(arguments)
        return
    assert run_in_process(method, arguments) == EXIT_USER_ERROR
    assert_one_error(capsys.readouterr().err, ["BatchNorm group of 1 image", method], tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_found_only_while_training_is_one_line_too(data, tmp_path, capsys, workers):
    path = data.root / "images/unlabeled3.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    arguments = [*data.arguments(tmp_path / "run"), "--set", "check_data=false", f"workers={workers}"]
    assert run_in_process("unimatch", arguments) == EXIT_USER_ERROR
    stderr = capsys.readouterr().err
    assert_one_error(stderr, ["unreadable image, truncated or damaged"], tmp_path / "run")
    assert stderr.startswith(f"error: {path}: ")


def test_a_line_break_in_a_name_does_not_break_the_message(data, capsys, tmp_path):
    arguments = [*data.arguments(tmp_path / "run"), "--set", "backbone=first\nsecond"]
    assert run_in_process("unimatch", arguments) == EXIT_USER_ERROR
    assert_one_error(capsys.readouterr().err, ["--set backbone=first", "unknown backbone"], tmp_path / "run")


@pytest.mark.parametrize("labels_listed", [False, True])
def test_labels_of_unlabelled_images_are_never_opened(data, tmp_path, labels_listed):
    if labels_listed:
        lines = data.unlabeled.read_text(encoding="utf-8").splitlines()
        lines = [f"{image} labels/no-such-{index}.png" for index, image in enumerate(lines)]
        data.unlabeled.write_text("\n".join(lines), encoding="utf-8")
    assert not list((data.root / "labels").glob("unlabeled*"))
    importlib.import_module("unimatch").main(data.arguments(tmp_path / "run"))
    assert (tmp_path / "run/latest.pth").is_file()


def test_lists_and_config_are_found_in_the_project_from_any_folder(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = "splits/pascal/train.txt"
    assert (PROJECT_ROOT / train).is_file()
    arguments = ["--config", "configs/pascal.yaml", "--labeled-id-path", "splits/pascal/92/labeled.txt"]
    arguments += ["--save-path", "run", "--set", f"data_root={data.root}", "device=cpu", "pretrained=false"]
    assert run_in_process("unimatch", arguments) == EXIT_USER_ERROR
    # All lists were found: what is missing is the first labelled image.
    assert_one_error(capsys.readouterr().err, [f"{data.root}/JPEGImages/", "no such image"], tmp_path / "run")


@pytest.mark.parametrize("method", ["unimatch", "fixmatch", "supervised"])
@pytest.mark.parametrize("argument", [["--local-rank", "1"], ["--local_rank=1"]])
def test_the_rank_that_old_launchers_pass_is_accepted(method, argument):
    required = ["--config", "c.yaml", "--labeled-id-path", "l.txt", "--save-path", "run"]
    assert parse_args(method, required + argument).config == "c.yaml"


def test_weights_of_another_stem_are_refused_before_earlier_results_are_moved(data, tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "tv.pth")
    data.configure(backbone="resnet50", pretrained=str(tmp_path / "tv.pth"))
    save_path = tmp_path / "run"
    save_path.mkdir()
    (save_path / "latest.pth").write_bytes(b"precious")
    assert run_in_process("unimatch", [*data.arguments(save_path), "--resume", "never"]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "tv.pth" in error and "7x7" in error and len(error.splitlines()) == 1
    assert (save_path / "latest.pth").read_bytes() == b"precious"


# --- hostile input: what asks for too much, or reaches further than it should


def bomb(path):
    """A PNG of a few kB that would take a gigabyte."""
    Image.new("1", (30_000, 30_000)).save(path)
    return [path, "900000000 pixels", "max_image_pixels is 100000000"]


def a_huge_image(data, save_path):
    return bomb(data.root / "images/unlabeled1.jpg")


def a_huge_label(data, save_path):
    return bomb(data.root / "labels/labeled1.png")


def an_image_above_the_limit_of_the_config(data, save_path):
    path = data.root / "images/labeled0.jpg"
    return [path, "the image has 1280 pixels", "max_image_pixels is 1279"], ["--set", "max_image_pixels=1279"]


def a_list_that_climbs_out(data, save_path):
    data.labeled.write_text("images/labeled0.jpg labels/../../a.png\n", encoding="utf-8")
    return [f"{data.labeled}:1", "labels/../../a.png lies outside data_root", "allow_outside_root: true"]


def an_absolute_path_in_a_list(data, save_path):
    with open(data.unlabeled, "a", encoding="utf-8") as file:
        file.write("/etc/passwd\n")
    return [f"{data.unlabeled}:7", "/etc/passwd lies outside data_root"]


def a_validation_list_that_climbs_out(data, save_path):
    data.val.write_text(f"{data.root}-other/a.jpg labels/val0.png\n", encoding="utf-8")
    return [f"{data.val}:1", "lies outside data_root"]


def an_unlabelled_folder_outside(data, save_path):
    data.configure(unlabeled_id_path="..")
    return ["..: neither a list file nor a folder under", "allow_outside_root: true"]


def laughter(data, save_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    data.config.write_text("\n".join(lines), encoding="utf-8")
    return [data.config, "line 2, column 10", "aliases (*name) are not accepted"]


def a_key_given_twice(data, save_path):
    text = data.config.read_text(encoding="utf-8")
    data.config.write_text(f"{text}lr: 0.5\n", encoding="utf-8")
    return [data.config, f"line {len(text.splitlines()) + 1}, column 1", "key 'lr' is given twice"]


def a_label_map_with_a_value_twice(data, save_path):
    return ["--set label_map=", "key 1 is given twice"], ["--set", "label_map={0: 0, 1: 1, 1: 2}"]


def a_key_of_a_megabyte(data, save_path):
    data.config.write_text("k" * 2**20 + ": 1\n", encoding="utf-8")
    return [data.config, "longer than 100000 characters"]


def a_key_of_some_kilobytes(data, save_path):
    data.config.write_text("? " + "k" * 5000 + "\n: 1\n", encoding="utf-8")
    return [data.config, "line 1, column 3", "a text of 5000 characters"]


def deep_nesting(data, save_path):
    return ["not valid YAML", "nested more than 10 levels deep"], ["--set", "classes=" + "[" * 500 + "]" * 500]


def a_number_without_end(data, save_path):
    return ["not valid YAML", "a text of 9002 characters"], ["--set", "epochs=0x" + "f" * 9000]


HOSTILE = [
    a_huge_image,
    a_huge_label,
    an_image_above_the_limit_of_the_config,
    a_list_that_climbs_out,
    an_absolute_path_in_a_list,
    a_validation_list_that_climbs_out,
    an_unlabelled_folder_outside,
    laughter,
    a_key_given_twice,
    a_label_map_with_a_value_twice,
    a_key_of_a_megabyte,
    a_key_of_some_kilobytes,
    deep_nesting,
    a_number_without_end,
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", HOSTILE, ids=lambda fault: fault.__name__)
def test_hostile_input_is_refused_in_one_line(data, tmp_path, capsys, fault):
    arguments, fragments = spoil(fault, data, tmp_path / "run")
    assert run_in_process("unimatch", arguments) == EXIT_USER_ERROR
    stderr = capsys.readouterr().err
    assert_one_error(stderr, fragments, tmp_path / "run")
    assert len(stderr) < 1500


@pytest.mark.parametrize("workers", [0, 1])
def test_a_huge_image_is_refused_in_mid_training_too(data, tmp_path, capsys, workers):
    arguments = [*data.arguments(tmp_path / "run"), "--set", "check_data=false", "max_image_pixels=1279"]
    assert run_in_process("unimatch", [*arguments, f"workers={workers}"]) == EXIT_USER_ERROR
    assert_one_error(capsys.readouterr().err, ["the image has 1280 pixels", "max_image_pixels is 1279"], tmp_path)


def test_worker_processes_that_are_no_copies_have_the_limit_too(data, monkeypatch):
    """As where Python does not fork: the limit reaches them with the loader."""
    limit_image_pixels(1279)
    loader = val_loader(read_list(data.val), DataSource(data.root), LoaderOptions(1))
    loader.multiprocessing_context = "spawn"
    with pytest.raises(DataError, match="max_image_pixels is 1279"):
        next(iter(loader))


@pytest.mark.slow
def test_images_may_lie_outside_the_root_if_the_config_says_so(data, tmp_path):
    (data.root / "inner").mkdir()
    for path in (data.labeled, data.unlabeled, data.val):
        lines = path.read_text(encoding="utf-8").split("\n")
        outside = [" ".join(f"../{name}" for name in line.split()) for line in lines]
        path.write_text("\n".join(outside), encoding="utf-8")
    data.configure(data_root=str(data.root / "inner"), allow_outside_root=True)
    importlib.import_module("supervised").main(data.arguments(tmp_path / "run"))
    assert (tmp_path / "run/latest.pth").is_file()


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript, whatever the file's name."""
    (tmp_path / "gs").write_text("#!/bin/sh\ntouch " + str(tmp_path / "ran") + "\n", encoding="utf-8")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    image = tmp_path / "image.jpg"
    image.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", encoding="utf-8")
    with pytest.raises(DataError, match="unreadable image"):
        read_image(image)
    assert not (tmp_path / "ran").exists()


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.slow
def test_a_file_with_code_in_it_is_refused_wherever_one_is_read_and_not_run(data, tmp_path, capsys):
    path, folder = tmp_path / "latest.pth", tmp_path / "made by the file"
    torch.save({"model": Code(folder)}, path)
    config = ["--config", str(data.config)]
    commands = {
        "unimatch": data.arguments(tmp_path),  # resumes from it
        "supervised": [*data.arguments(tmp_path / "run"), "--set", f"pretrained={path}"],
        "scripts.evaluate": [*config, "--checkpoint", str(path)],
        "scripts.predict": [*config, "--checkpoint", str(path), "--images", str(data.val), "--output", str(tmp_path)],
        "scripts.convert_backbone": ["resnet50", "--from", str(path), "--output", str(tmp_path / "new.pth")],
    }
    for script, arguments in commands.items():
        assert run_in_process(script, arguments) == EXIT_USER_ERROR
        stderr = capsys.readouterr().err
        assert len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and str(path) in stderr
        assert not folder.exists()


def test_predictions_stay_in_their_folder_wherever_the_images_are(data, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"../elsewhere/a.jpg\n{data.root}/images/val0.jpg\nimages/../b.jpg\n/c.jpg\n", encoding="utf-8")
    with pytest.raises(DataError, match="outside data_root"):
        find_pictures([listed], data.root)
    found = find_pictures([listed], data.root, allow_outside=True)
    assert [str(picture.place) for picture in found.pictures] == ["a.jpg", "images/val0.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8.00 GiB for an array with shape (20000, 20000)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_a_lack_of_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == EXIT_STOPPED
    assert capsys.readouterr().err == (
        "error: out of memory: lower batch_size or crop_size, or use more processes; predict: lower --tile and "
        f"--tile-above ({error})\n"
    )
