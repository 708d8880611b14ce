"""The documents: links, paths, commands, flags and keys that they name exist; documents with mistakes are refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.documents import (
    broken_links,
    commands,
    documents,
    fault_of,
    missing_paths,
    parser_of,
    refused_commands,
    unknown_keys,
    unknown_names,
)

ROOT = Path(__file__).resolve().parents[1]
README_WORDS = 1200


@pytest.mark.parametrize("rule", [broken_links, missing_paths, unknown_keys, unknown_names, refused_commands])
def test_what_the_documents_name_exists(rule):
    assert rule(ROOT) == []


def test_the_documents_are_found_with_their_commands():
    texts = documents(ROOT)
    assert {"README.md", "docs/training.md", "splits/README.md", "configs/pascal.yaml"} <= set(texts)
    assert shlex.split("dataset=pascal method=unimatch exp=r101 split=92 sh scripts/train.sh 4") in list(
        commands(texts["configs/pascal.yaml"])
    )
    assert sum(1 for text in texts.values() for _ in commands(text)) > 30


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def pages(root: Path, readme: str, **others: str) -> Path:
    """Write a README and pages in docs/."""
    for name, text in {"README.md": readme, **{f"docs/{name}.md": text for name, text in others.items()}}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_broken_links_are_found(tmp_path):
    readme = (
        "[a](docs/a.md) [b](docs/b.md) ![c](docs/c.png) [d](https://x.org/d) [e](docs/a.md#two-words) [f](docs/a.md#no)"
    )
    root = pages(tmp_path, readme, a="# One\n\n## Two words\n\n[g](#one) [h](../README.md) [i](i.md)", k="")
    assert broken_links(root) == [
        "README.md: docs/b.md: no such file",
        "README.md: docs/c.png: no such file",
        "README.md: docs/a.md#no: no such heading",
        "docs/a.md: i.md: no such file",
        "docs/k.md: not linked from README.md",
    ]


def test_missing_paths_are_found(tmp_path):
    text = "`docs/a.md` `docs/b.md` `util/c.py` `unimatch.py` `exp/d` `configs/leaves.yaml` `scripts/NAME.py`\n"
    root = pages(tmp_path, f"{text}```sh\nsh scripts/e.sh > docs/f.txt\n```\n", a="`a.md` `util/g.py`")
    assert missing_paths(root) == [
        *(f"README.md: {path}: no such file" for path in ("docs/b.md", "docs/f.txt", "scripts/e.sh", "unimatch.py")),
        "README.md: util/c.py: no such file",
        "docs/a.md: util/g.py: no such file",
    ]


def test_unknown_keys_are_found(tmp_path):
    readme = "`epochs: 3` `epoch: 3` `error: no`\n```yaml\nlr: 0.1\nrate: 0.1\n# note: 1\n```\n"
    assert unknown_keys(pages(tmp_path, readme)) == ["README.md: rate: no such key", "README.md: epoch: no such key"]


def test_names_that_occur_nowhere_in_the_code_are_found(tmp_path):
    root = pages(tmp_path, "`conf_thresh` `conf_tresh` `--known` `--unknown` `a/path_of/some_file` `tensorboard --x`")
    (root / "unimatch.py").write_text("conf_thresh = add('--known')", encoding="utf-8")
    assert unknown_names(root) == [f"README.md: {x}: occurs nowhere in the code" for x in ("conf_tresh", "--unknown")]


@pytest.mark.parametrize(
    "command",
    [
        "python unimatch.py --config F --labeled-id-path F --save-path D --set epochs=3 lr=1",
        "torchrun --nproc-per-node 4 fixmatch.py --config ... --set amp=bf16",
        "python -m scripts.predict photos/ --checkpoint F --out D",
        "python -m scripts.benchmark",
        "dataset=pascal split=92 sh scripts/train.sh 4 --set epochs=3",
        "method=my_method dataset=leaves split=few sh scripts/train.sh 1",
        "tensorboard --logdir exp",
        "curl -L https://x.org",
    ],
)
def test_commands_that_work_are_not_refused(command):
    assert fault_of(ROOT, shlex.split(command)) is None


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python unimatch.py --config F --label-path F", "unimatch has no --label-path"),
        ("python unimatch.py --config F --labeled-id-path F", "required: --save-path"),
        ("python unimatch.py ... --set epoch=3", "no key epoch"),
        ("python unimatch.py --config F --labeled-id-path F --save-path D --resume maybe", "invalid choice"),
        ("torchrun fixmatch.py --config ... --labelled ...", "fixmatch has no --labelled"),
        ("python -m scripts.predicts photos/", "no module scripts.predicts"),
        ("python -m scripts.prepare_data imagenet --source downloads", "invalid choice"),
        ("python -m scripts.evaluate --checkpoint F --modes x", "has no --modes"),
        ("python -m scripts.make_splits --images D --labels D", "required: --output"),
        ("sh scripts/trains.sh 4", "no script scripts/trains.sh"),
        ("data=pascal sh scripts/train.sh 4", "knows no variable data"),
        ("dataset=pascal split=93 sh scripts/train.sh 4", "no split 93"),
        ("dataset=voc split=92 sh scripts/train.sh 4", "no recipe of voc"),
        ("method=supervise sh scripts/train.sh 4", "no method supervise"),
        ("sh scripts/train.sh 4 --set epoch=3", "no key epoch"),
    ],
)
def test_commands_with_a_mistake_are_refused(command, fault):
    assert fault in fault_of(ROOT, shlex.split(command))


def test_commands_come_from_blocks_spans_and_recipes(tmp_path):
    root = pages(tmp_path, "`python a.py` `b` `x=1 sh c.sh`\n```sh\nd \\\n  e  # f\n\n# g\n```\n```yaml\nh: 1\n```\n")
    (root / "configs").mkdir()
    (root / "configs/i.yaml").write_text("# A recipe:\n#\n#   python j.py\n#   it's a table\nlr: 1\n", encoding="utf-8")
    found = [words for text in documents(root).values() for words in commands(text)]
    assert found == [["d", "e"], ["python", "a.py"], ["x=1", "sh", "c.sh"], ["python", "j.py"]]


def test_a_parser_is_the_programs_own():
    assert {"--config", "--resume", "--set"} <= set(parser_of(ROOT, "unimatch")._option_string_actions)
    assert "--double-batch" not in parser_of(ROOT, "unimatch")._option_string_actions
