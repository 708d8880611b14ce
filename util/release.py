"""Continuing a run of the published code: its `latest.pth` turned into what a checkpoint of ours holds.

The release saves model (with `module.` names), optimizer, epoch (from 0) and previous_best after each epoch; V2 also
model_ema, previous_best_ema and best_epoch_ema. Neither settings nor lists are in the file: they are assumed to be
those of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def is_release(state: Any) -> bool:
    """Whether this is a training checkpoint of the release."""
    needed = {"model", "optimizer", "epoch", "previous_best"}
    return isinstance(state, Mapping) and needed <= state.keys() and not {"iteration", "config", "run"} & state.keys()


def adopt(state: Mapping[str, Any], config: Mapping[str, Any], run: Mapping[str, str], steps: int) -> dict[str, Any]:
    """The release's checkpoint as one of ours, at epochs of `steps` steps. The optimiser's state stays as it is.

    `config` holds the keys of this run, `run` identifies its method and lists, as in a checkpoint of ours. Values of a
    wrong kind are left for later checks.
    """
    if not isinstance(state["epoch"], int):
        return {**state, "iteration": 0, "config": {}, "run": {}}
    epoch = state["epoch"] + 1
    own = {"epoch": epoch, "iteration": epoch * steps, "config": dict(config), "run": dict(run)}
    best, best_epoch = state["previous_best"], state.get("best_epoch")
    if "model_ema" in state:
        own |= {"teacher": state["model_ema"], "teacher_updates": torch.tensor(epoch * steps)}
        if config.get("evaluate") != "student":  # best.pth follows the teacher here
            best, best_epoch = state.get("previous_best_ema", best), state.get("best_epoch_ema")
    told = isinstance(best_epoch, int)
    own |= {"previous_best": best, "best_epoch": best_epoch + 1 if told else epoch}
    own["note"] = (
        f"a checkpoint of the published code after {epoch} epochs; it tells neither settings nor lists, so they are "
        f"assumed to be those of this run, whose epochs have {steps} iterations"
        f"{'' if told else '; its best epoch is not told'}"
    )
    return {"model": state["model"], "optimizer": state["optimizer"], **own}


def without_frozen(optimizer: Any, model: nn.Module) -> Any:
    """The optimiser's state without the parameters that need no gradient, which the release keeps in its groups.

    What is not a state of all the model's parameters is given back as it is.
    """
    named = list(model.named_parameters())
    groups = [[p for name, p in named if ("backbone" in name.split(".")) == backbone] for backbone in (True, False)]
    try:
        saved, state_of = optimizer["param_groups"], optimizer["state"]
        counts = [len(group["params"]) for group in saved]
    except (KeyError, TypeError):  # a stranger's; loading it says what is wrong
        return optimizer
    if counts[:1] == [0] and not any(p.requires_grad for p in groups[0]):
        groups[0] = []  # of a locked backbone the release keeps nothing
    whole = counts == [len(group) for group in groups]
    if not whole or all(parameter.requires_grad for group in groups for parameter in group):
        return optimizer
    state, kept, number = {}, [], 0
    for group, parameters in zip(saved, groups, strict=True):
        numbers = []
        for index, parameter in zip(group["params"], parameters, strict=True):
            if parameter.requires_grad:
                if index in state_of:
                    state[number] = state_of[index]
                numbers.append(number)
                number += 1
        kept.append({**group, "params": numbers})
    return {"state": state, "param_groups": kept}
