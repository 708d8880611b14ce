"""Published mIoU by data set, method, backbone and crop, as in the headers of the recipes in configs/."""

from __future__ import annotations

from util.config import Config

# (data set, backbone, crop): method -> split -> mIoU in percent. UniMatch (V1): arXiv 2208.09910, tables of the paper.
# DINOv2: the logs of UniMatch V2 (arXiv 2410.10777), single runs, the best epoch.
_PASCAL, _CITYSCAPES = ("92", "183", "366", "732", "1464"), ("1_16", "1_8", "1_4", "1_2")
_COCO, _ADE20K = ("1_512", "1_256", "1_128", "1_64", "1_32"), ("1_64", "1_32", "1_16", "1_8", "1_4")
TABLES: dict[tuple[str, str, int], tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    ("pascal", "resnet101", 321): (
        _PASCAL,
        {"unimatch": (75.2, 77.2, 78.8, 79.9, 81.2), "supervised": (45.1, 55.3, 64.8, 69.7, 73.5)},
    ),
    ("cityscapes", "resnet101", 801): (
        _CITYSCAPES,
        {"unimatch": (76.6, 77.9, 79.2, 79.5), "supervised": (66.3, 72.8, 75.0, 78.0)},
    ),
    ("cityscapes", "resnet50", 801): (
        _CITYSCAPES,
        {"unimatch": (75.0, 76.8, 77.5, 78.6), "supervised": (63.3, 70.2, 73.1, 76.6)},
    ),
    ("coco", "xception", 513): (
        _COCO,
        {"unimatch": (31.9, 38.9, 44.4, 48.2, 49.8), "supervised": (22.9, 28.0, 33.6, 37.8, 42.2)},
    ),
    ("pascal", "dinov2_small", 518): (
        _PASCAL,
        {"unimatch_v2": (79.03, 85.50, 85.85, 86.69, 87.82), "supervised": (66.98, 75.63, 81.82, 83.69, 85.56)},
    ),
    ("pascal", "dinov2_base", 518): (
        _PASCAL,
        {
            "unimatch_v2": (86.29, 87.92, 88.86, 89.98, 90.80),
            "fixmatch": (83.83, 87.37, 88.21, 89.88, 90.21),
            "unimatch": (86.03, 87.52, 88.66, 89.99, 90.43),
            "supervised": (76.86, 82.07, 85.27, 87.15, 88.30),
        },
    ),
    ("pascal", "dinov2_large", 518): (
        _PASCAL,
        {"unimatch_v2": (86.44, 87.56, 90.29, 91.13, 91.21), "supervised": (76.92, 82.42, 86.81, 89.42, 90.73)},
    ),
    ("cityscapes", "dinov2_small", 798): (
        _CITYSCAPES,
        {"unimatch_v2": (80.55, 81.86, 82.39, 82.61), "supervised": (77.15, 80.22, 81.69, 82.42)},
    ),
    ("cityscapes", "dinov2_base", 798): (
        _CITYSCAPES,
        {"unimatch_v2": (83.60, 84.30, 84.51, 85.14), "supervised": (80.79, 82.65, 83.98, 84.39)},
    ),
    ("ade20k", "dinov2_small", 518): (
        _ADE20K,
        {"unimatch_v2": (31.48, 38.10, 40.69, 44.41, 45.76), "supervised": (26.14, 32.70, 37.11, 39.83, 42.67)},
    ),
    ("ade20k", "dinov2_base", 518): (
        _ADE20K,
        {
            "unimatch_v2": (38.70, 45.00, 46.67, 49.84, 52.02),
            "fixmatch": (37.76, 43.23, 46.36, 49.51, 51.03),
            "unimatch": (36.67, 42.79, 45.92, 49.90, 51.11),
            "supervised": (32.06, 39.25, 42.82, 46.41, 49.02),
        },
    ),
    ("ade20k", "dinov2_large", 518): (
        _ADE20K,
        {"unimatch_v2": (39.95, 44.96, 49.33, 52.14, 54.16), "supervised": (33.18, 39.88, 45.02, 49.18, 51.78)},
    ),
    ("coco", "dinov2_small", 518): (
        _COCO,
        {"unimatch_v2": (39.33, 45.41, 53.17, 54.99, 57.01), "supervised": (29.44, 35.56, 44.63, 49.15, 52.04)},
    ),
    ("coco", "dinov2_base", 518): (
        _COCO,
        {
            "unimatch_v2": (47.93, 55.84, 58.66, 60.42, 63.31),
            "fixmatch": (46.71, 53.72, 57.43),
            "unimatch": (45.49, 54.34, 57.73),
            "supervised": (36.76, 45.77, 52.13, 56.24, 59.50),
        },
    ),
}


def published_miou(cfg: Config, split: str | None) -> dict[str, float]:
    """Method -> published mIoU where data set, split, backbone and crop are the same; empty where there is none."""
    splits, methods = TABLES.get((cfg.dataset, cfg.backbone, cfg.crop_size), ((), {}))
    if split not in splits:
        return {}
    column = splits.index(split)
    return {method: values[column] for method, values in methods.items() if column < len(values)}
