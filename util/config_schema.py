"""The configuration's schema: every key of a recipe with its type, documentation, default and range.

A new key is one line here. Rules over several keys are in util/config_rules.py.
"""

from __future__ import annotations

import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from dataset.bands import Bands
from dataset.catalog import CATALOG, voc_palette
from dataset.colors import IGNORED_COLOUR
from dataset.lists import BAND_SUFFIXES, IMAGE_SUFFIXES
from dataset.transform import IMAGENET, Normalization
from model import BACKBONES, DINOV2_BACKBONES
from util.errors import ConfigError, quoted, suggest

EvalMode = Literal["original", "sliding_window", "center_crop"]
EVAL_MODES = typing.get_args(EvalMode)
LoggerName = Literal["tensorboard", "wandb", "mlflow", "csv"]


@dataclass(frozen=True)
class Criterion:
    """The supervised loss: `CELoss`, or `OHEM` with its two numbers (see util.losses)."""

    name: str = "CELoss"
    thresh: float = 0.7
    min_kept: int = 200_000


def _key(
    doc: str,
    default: Any = MISSING,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    shapes: bool = True,
) -> Any:
    """A field with its documentation and, for numbers, its range. Without a default the key is required."""
    metadata = {"doc": doc, "minimum": minimum, "above": above, "maximum": maximum, "shapes": shapes}
    return field(default=default, metadata=metadata)


def _setting(doc: str, default: Any = MISSING, **limits: float) -> Any:
    """A key that a resumed run may set to another value: it changes where, how fast or how finely rounded a run
    computes, but not what. So may keys for what happens at a fault, and paths of lists, whose contents are compared.
    """
    return _key(doc, default, shapes=False, **limits)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on besides its lists and its save path. Fields are the keys of the YAML files."""

    # data
    dataset: str = _key(
        "name of the data set; pascal, cityscapes, ade20k and coco bring their classes, palette and eval_mode"
    )
    data_root: str = _setting("folder that the paths in the list files are relative to")
    val_id_path: str | None = _setting(
        "list of the validation images and labels; default for published data sets: splits/DATASET/val.txt", None
    )
    crop_size: int = _key(
        "side of the square training crop, and of the sliding evaluation window, in pixels", minimum=16, maximum=8192
    )
    classes: tuple[str, ...] | None = _setting("class names; label value i is the i-th name", None)
    nclass: int | None = _key(
        "number of classes; implied by the data set or by `classes`", None, minimum=2, maximum=255
    )
    palette: tuple[tuple[int, int, int], ...] | None = _setting("one [red, green, blue] per class, 0 to 255", None)
    label_map: dict[int, int] | None = _key(
        "class (or 255, ignored) of values in the label files, such as {0: 0, 255: 1}; other values stay", None
    )
    label_colors: Literal["palette"] | tuple[tuple[int, int, int], ...] | None = _key(
        "labels are drawn in colours: one [red, green, blue] for each label value from 0, or `palette`, whose ignored "
        "pixels are [224, 224, 192]; label_map applies to the values",
        None,
    )
    channels: int = _key("channels of an image; other than 3: multi-band TIFF or .npy", 3, minimum=3, maximum=512)
    rgb_channels: tuple[int, int, int] = _key(
        "which channels, counted from 0, are red, green and blue: they get ImageNet's weights and the colour jitter",
        (0, 1, 2),
        minimum=0,
    )
    value_range: tuple[float, float] | None = _key(
        "stored values that become 0 and 255, others in proportion; without it only 8-bit images are read", None
    )
    mean: tuple[float, ...] | None = _key(
        "of each channel, of values from 0 to 1; default: ImageNet's, for 3 channels", None
    )
    std: tuple[float, ...] | None = _key("standard deviation of each channel, as for `mean`", None, above=0)
    unlabeled_id_path: str | None = _setting(
        "list of unlabelled images, or a folder of images under data_root; labelled images are left out of it; "
        "default for published data sets: all their training images",
        None,
    )
    eval_mode: EvalMode = _key("how a validation image is seen", "original")
    cutmix_partner: Literal["same_image", "other_image", "reversed_batch"] | None = _key(
        "what CutMix pastes: another view of the same image (as published) or of another image; with a teacher always "
        "the reversed batch",
        None,
    )
    # training
    epochs: int = _key("passes over the unlabelled images (supervised: over the labelled)", minimum=1)
    batch_size: int = _key("labelled images per process, and as many unlabelled ones", minimum=1)
    lr: float = _key("learning rate of the backbone", above=0)
    lr_multi: float = _key("the other parameters learn at lr * lr_multi", 1.0, above=0)
    accumulate: int = _key(
        "batches per process whose gradients make one optimiser step; BatchNorm sees one batch at a time", 1, minimum=1
    )
    reference_batch: int | None = _key(
        "labelled images per step, over all processes, that lr is meant for; default: 16 for model: dpt on pascal and "
        "coco, as UniMatch V2 publishes it, else 8",
        None,
        minimum=1,
    )
    scale_lr: bool = _key("scale lr by (labelled images per step) / reference_batch", False)
    optimizer: Literal["sgd", "adamw"] | None = _key("default: adamw on model: dpt, else sgd with momentum 0.9", None)
    weight_decay: float | None = _key("of every parameter; default: 0.0001 with sgd, 0.01 with adamw", None, minimum=0)
    betas: tuple[float, float] = _key("of adamw", (0.9, 0.999), minimum=0, maximum=0.999999)
    criterion: Criterion = _key("CELoss, or {name: OHEM, thresh: 0.7, min_kept: 200000}", Criterion())
    conf_thresh: float = _key("confidence from which a pseudo-label counts", 0.95, minimum=0, maximum=1)
    seed: int = _key(
        "seeds every draw: weights, order, geometry, colour, CutMix, dropout", 0, minimum=0, maximum=2**32 - 1
    )
    teacher: Literal["none", "ema"] | None = _key(
        "ema: pseudo-labels come from a moving average of the weights; default: for unimatch_v2, and for fixmatch on "
        "model: dpt",
        None,
    )
    teacher_decay: float = _key(
        "the teacher keeps this much of itself in a step, once it has seen enough", 0.996, minimum=0, maximum=1
    )
    evaluate: Literal["teacher", "student", "both"] | None = _key(
        "whose mIoU is measured; best.pth follows the first; default: the teacher's where there is one", None
    )
    supervised_epoch: int | None = _key(
        "images in an epoch of the supervised baseline, at least: a shorter list is repeated; default: on model: dpt "
        "as UniMatch V2 publishes it for the data set",
        None,
        minimum=1,
    )
    # model
    model: Literal["deeplabv3plus", "dpt"] = _key("the network; dpt goes with the DINOv2 backbones", "deeplabv3plus")
    backbone: str = _key(f"one of {', '.join((*BACKBONES, *DINOV2_BACKBONES))}")
    lock_backbone: bool = _key("keep the backbone's weights as they are: no gradient, no optimiser state", False)
    pretrained: bool | str = _key(
        "true: pretrained/BACKBONE.pth; false: from scratch; or the path of a weights file", True
    )
    init_from: str | None = _setting(
        "start from the weights of this segmentation checkpoint (other classes allowed) instead of `pretrained`; a run "
        "that is continued does not read it",
        None,
    )
    replace_stride_with_dilation: tuple[bool, bool, bool] = _key(
        "for the last three stages; [false, false, true] is output stride 16, [false, true, true] is 8",
        (False, False, True),
    )
    dilations: tuple[int, int, int] = _key("of the three atrous ASPP branches", (6, 12, 18), minimum=1)
    # running
    device: Literal["auto", "cpu", "cuda"] = _setting("auto: GPUs where there are any", "auto")
    workers: int | None = _setting(
        "loading processes per training process; default: a share of the cores, 8 at most", None, minimum=0, maximum=256
    )
    prefetch: int = _setting("batches that each loading process has ready", 2, minimum=1, maximum=64)
    persistent_workers: bool = _setting("keep the loading processes from one epoch to the next", True)
    pin_memory: bool | None = _setting(
        "load batches into pinned memory, for faster GPU copies; default: for GPUs", None
    )
    photometry: Literal["worker", "device"] = _key(
        "where the strong views' colours and blur are made; on the device a few values are a level off", "worker"
    )
    cache: Literal["none", "ram", "disk"] = _setting(
        "keep decoded images and labels in shared memory or on a disk", "none"
    )
    cache_gb: float = _setting("size of the cache in GB (1e9 bytes); once it is full it stays as it is", 16.0, above=0)
    cache_dir: str | None = _setting("folder for cache: disk, best on a local disk; default: ~/.cache/unimatch", None)
    channels_last: bool | None = _setting(
        "channels innermost in memory, for which CPU and 16-bit kernels are made; default: on CPUs", None
    )
    amp: Literal["none", "bf16", "fp16"] = _setting("16-bit autocast of the forward passes; fp16 needs a GPU", "none")
    compile: bool = _setting(
        "torch.compile the model; its first steps take minutes, and it needs a C++ compiler", False
    )
    cuda_graphs: bool = _setting(
        "launch a step's kernels together, as one CUDA graph, for small batches on fast GPUs; one process only", False
    )
    deterministic: bool = _setting("same bits in every run on the same GPU and versions; slower", False)
    tf32: bool | None = _setting(
        "let GPUs round float32 products to 10 bits of fraction; default: PyTorch's, in convolutions only", None
    )
    checkpoint_activations: Literal["none", "backbone", "all"] = _setting(
        "what is computed again in the backward pass instead of kept in memory; gradients are the same", "none"
    )
    check_data: bool = _setting("check images and labels before training starts", True)
    max_image_pixels: int = _setting(
        "images and labels of more pixels are refused before they are decoded", 100_000_000, minimum=1
    )
    allow_outside_root: bool = _setting("let list entries and the unlabelled folder lie outside data_root", False)
    on_bad_image: Literal["stop", "skip"] = _setting(
        "an image or label that cannot be read in mid-training stops the run, or its sample is replaced by another",
        "stop",
    )
    bad_image_limit: int = _setting("different faults of that kind before the run stops after all", 10, minimum=1)
    on_nonfinite: Literal["stop", "skip"] = _setting(
        "a step with a loss or gradient that is not finite stops the run, or is undone", "stop"
    )
    nonfinite_limit: int = _setting("undone steps before the run stops after all", 10, minimum=1)
    log_interval: int = _setting("iterations between two lines of the log", 50, minimum=1)
    logger: tuple[LoggerName, ...] = _setting(
        "where curves and pictures go: any of tensorboard, wandb, mlflow (their packages are needed) and csv",
        ("tensorboard",),
    )
    eval_interval: int = _setting("epochs between two evaluations", 1, minimum=1)
    checkpoint_minutes: float = _setting(
        "minutes between two checkpoints within an epoch; 0: only after epochs", 15.0, minimum=0
    )
    keep_last: int = _setting("checkpoints of the last epochs to keep, as epoch-0001.pth and so on", 0, minimum=0)
    dist_timeout: float = _setting(
        "seconds after which a process that does not answer has failed", 600.0, minimum=1, maximum=86_400
    )

    @property
    def step_images(self) -> int:
        """Labelled images that one process takes in a step, over all batches that it accumulates."""
        return self.batch_size * self.accumulate

    @property
    def optimizer_kind(self) -> Literal["sgd", "adamw"]:
        """The `optimizer`, or the one that goes with the model."""
        return self.optimizer or ("adamw" if self.model == "dpt" else "sgd")

    @property
    def color_values(self) -> dict[tuple[int, int, int], int] | None:
        """The label value of each colour of `label_colors`; None where labels hold indices."""
        if self.label_colors == "palette":
            return {IGNORED_COLOUR: 255} | {colour: index for index, colour in enumerate(self.palette)}
        return {colour: index for index, colour in enumerate(self.label_colors)} if self.label_colors else None

    @property
    def bands(self) -> Bands | None:
        """How images of other channels than 8-bit RGB are read; None for those."""
        if (self.channels, self.rgb_channels, self.value_range) == (3, (0, 1, 2), None):
            return None
        return Bands(self.channels, self.rgb_channels, self.value_range)

    @property
    def image_suffixes(self) -> frozenset[str]:
        """Of the images in a folder."""
        return BAND_SUFFIXES if self.bands else IMAGE_SUFFIXES

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of the channels. Raises ConfigError where they are not known."""
        if self.mean is None and self.std is None and self.channels == 3:
            return IMAGENET
        if self.mean is None or self.std is None:
            raise ConfigError(
                f"mean and std of the {self.channels} channels are missing: python -m scripts.check_data "
                "--channel-statistics prints them"
            )
        return Normalization(self.mean, self.std)

    def __post_init__(self) -> None:
        """Fill in what the data set implies, so that no list, name or colour of it is missing."""
        known = CATALOG.get(self.dataset)
        if known is None and self.val_id_path is None:
            raise ConfigError("key 'val_id_path' is missing (list of the validation images and labels)")
        classes = self.classes
        if classes is None and known is not None:
            classes = known.classes
        if classes is None and self.nclass is not None:
            classes = tuple(f"class {i}" for i in range(self.nclass))
        if classes is None:
            near = suggest(self.dataset, CATALOG)
            raise ConfigError(
                f"dataset {quoted(self.dataset)} is none of {', '.join(CATALOG)}{near}: list its `classes`"
            )
        palette = self.palette
        if palette is None:
            count = min(len(classes), 256)  # too many classes are refused later, with the key's name
            palette = known.palette if known and len(known.palette) == count else voc_palette(count)
        published = known.reference_batch_v2 if known is not None and self.model == "dpt" else 8
        implied = {"classes": classes, "palette": palette, "nclass": self.nclass or len(classes)}
        implied["reference_batch"] = self.reference_batch or published
        if known is not None:
            implied["val_id_path"] = self.val_id_path or f"splits/{self.dataset}/val.txt"
            implied["unlabeled_id_path"] = self.unlabeled_id_path or known.unlabeled
        for name, value in implied.items():
            object.__setattr__(self, name, value)


NOT_SHAPING = tuple(spec.name for spec in fields(Config) if not spec.metadata["shapes"])
