"""What each published dataset is: its classes, colours, folder layout and way of evaluation.

A label's value is the index into `classes` and `palette`; 255 is ignored everywhere. Any other dataset is described by
its config alone, see `configs/custom.yaml`.
"""

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class DatasetInfo:
    """A published dataset.

    `image` and `label` are paths relative to `data_root`, as the lists in `splits/` write them. Filled in are `{id}`,
    `{part}` (one of `parts`: the name of the training and of the validation folder) and, for Cityscapes, `{city}`.
    `unlabeled` is the list or the folder of all training images, of which the labelled ones are left out;
    `eval_mode` is the one of the published figures: "original" or "sliding_window". `supervised_epoch`: to so many
    images UniMatch V2's supervised baseline repeats a labelled list that is shorter. `reference_batch_v2`: labelled
    images of a step of UniMatch V2 as published, over all processes.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    eval_mode: str
    image: str
    label: str
    unlabeled: str
    supervised_epoch: int
    reference_batch_v2: int
    parts: tuple[str, str] = ("train", "val")


def voc_palette(n: int) -> tuple[RGB, ...]:
    """The first n colours (n from 0 to 256) of the Pascal VOC colour map, all different; 0 is black.

    The bits of the index are dealt out to red, green and blue in turn, into ever lower bits of the colour, so that
    neighbouring indices get distant colours (VOC development kit, VOCcolormap.m). It serves any number of classes.
    """
    if not 0 <= n <= 256:
        raise ValueError(f"a palette of {n} colours: an 8-bit label has between 0 and 256 values")
    return tuple(_voc_colour(index) for index in range(n))


def _voc_colour(index: int) -> RGB:
    red = green = blue = 0
    for bit in range(7, -1, -1):
        red |= (index & 1) << bit
        green |= (index >> 1 & 1) << bit
        blue |= (index >> 2 & 1) << bit
        index >>= 3
    return red, green, blue


_PASCAL_CLASSES = (
    "background",
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

# Index = trainId, colours as in the official cityscapesscripts.
_CITYSCAPES: dict[str, RGB] = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}

# Background, then the 80 things by ascending category id. COCO's ids run from 1 to 90 with gaps; these are consecutive.
_COCO_CLASSES = (
    "background",
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)

# The official order of the 150 classes of SceneParse150; label value i is the official label minus 1.
_ADE20K_CLASSES = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet"),
    *("sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water"),
    *("painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk"),
    *("rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard"),
    *("chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path"),
    *("stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase"),
    *("blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm"),
    *("kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel"),
    *("light", "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver", "airplane"),
    *("dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster"),
    *("stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool"),
    *("barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank"),
    *("trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture"),
    *("hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor"),
    *("bulletin board", "shower", "radiator", "glass", "clock", "flag"),
)

CATALOG: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="pascal",
            classes=_PASCAL_CLASSES,
            palette=voc_palette(len(_PASCAL_CLASSES)),
            eval_mode="original",
            image="JPEGImages/{id}.jpg",
            label="SegmentationClass/{id}.png",
            unlabeled="splits/pascal/train.txt",
            supervised_epoch=3000,
            reference_batch_v2=16,
        ),
        DatasetInfo(
            name="cityscapes",
            classes=tuple(_CITYSCAPES),
            palette=tuple(_CITYSCAPES.values()),
            eval_mode="sliding_window",
            image="leftImg8bit/{part}/{city}/{id}_leftImg8bit.png",
            label="gtFine/{part}/{city}/{id}_gtFine_labelTrainIds.png",
            unlabeled="splits/cityscapes/train.txt",
            supervised_epoch=3000,
            reference_batch_v2=8,
        ),
        DatasetInfo(
            name="coco",
            classes=_COCO_CLASSES,
            palette=voc_palette(len(_COCO_CLASSES)),
            eval_mode="original",
            image="{part}2017/{id}.jpg",
            label="masks/{id}.png",
            unlabeled="train2017",
            supervised_epoch=30_000,
            reference_batch_v2=16,
        ),
        DatasetInfo(
            name="ade20k",
            classes=_ADE20K_CLASSES,
            palette=voc_palette(len(_ADE20K_CLASSES)),
            eval_mode="original",
            image="images/{part}/{id}.jpg",
            label="annotations/{part}/{id}.png",
            unlabeled="images/training",
            supervised_epoch=6000,
            reference_batch_v2=8,
            parts=("training", "validation"),
        ),
    )
}
