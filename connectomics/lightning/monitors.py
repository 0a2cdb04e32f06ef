"""Check the metrics that choose the best checkpoint and stop training early, before a run starts."""

from __future__ import annotations

from collections.abc import Iterable

from connectomics.config import RunConfig
from connectomics.config.few_labels import is_pretraining
from connectomics.config.heads import heads_of
from connectomics.data.volumes import CropVolume
from connectomics.errors import ConfigError, require_known
from connectomics.metrics.challenge.rules import DEFAULT_RULES, get_rules

_BLOCK = (128, 128, 128)
_HIGH, _NEITHER = ("dice", "iou", "score"), ("train/known", "train/lr")  # better if high; neither better nor worse
_HEAD_METRICS = {"affinities": "dice", "boundary": "dice", "distance": "mae", "lsd": "mae"}


def logged_names(config: RunConfig) -> list[str]:
    """Return the metrics that a run logs per epoch; those of a class only if the validation crops contain it."""
    if is_pretraining(config):
        return ["val/loss", "train/loss", "train/lr"]
    metrics = ["dice", "iou", *(["score"] if config.training.val_score else [])]
    heads = heads_of(config)
    return [
        *(f"val/{metric}" for metric in metrics),
        *(f"val/{name}/{metric}" for name in config.dataset.classes for metric in metrics),
        *(f"val/{head.name}/{_HEAD_METRICS[head.kind]}" for head in heads),
        "train/loss",
        *(f"train/{name}" for name in config.model.loss_functions),
        *(f"train/loss/{head.name}" for head in heads),
        "train/known",
        "train/lr",
    ]


def check_monitors(config: RunConfig) -> None:
    """Raise `ConfigError` if a monitored score needs ``training.val_score``, or if ``mode`` takes the worst for the
    best; `UnknownNameError` for a metric that the run does not log."""
    for group, chosen in (("checkpoint", config.checkpoint), ("early_stopping", config.early_stopping)):
        monitor = chosen.monitor
        if monitor.startswith("val/") and monitor.endswith("/score") and not config.training.val_score:
            raise ConfigError(
                f"{group}.monitor is {monitor}, which is computed only with training.val_score=true (it is false); "
                f"set that, or {group}.monitor=val/dice"
            )
        require_known("metric", [monitor], logged_names(config), f"{group}.monitor")
        better = "max" if monitor.rsplit("/", 1)[-1] in _HIGH else "min"
        if chosen.mode != better and monitor not in _NEITHER:
            raise ConfigError(
                f"{group}.mode is {chosen.mode}, but the {better}imum of {monitor} is better; set {group}.mode={better}"
            )


def check_monitored_classes(config: RunConfig, crops: Iterable[CropVolume | None]) -> None:
    """Raise `ConfigError` if a monitored class is absent from the validation crops, so that it is never logged.

    Labels are read up to the first crop that holds the class, and only if the metric of a class is monitored.
    """
    monitors = {}
    if config.checkpoint.save_top_k != 0:
        monitors["checkpoint"] = config.checkpoint.monitor
    if config.early_stopping.patience > 0:
        monitors["early_stopping"] = config.early_stopping.monitor
    own: list[CropVolume] | None = None
    for group, monitor in monitors.items():
        first, *of = monitor.split("/")[:-1]
        if first != "val" or not of:
            continue
        own = [crop for crop in crops if crop is not None] if own is None else own
        if any(_holds(config, crop, of, monitor.endswith("/score")) for crop in own):
            continue
        what = f"no known voxel where {of[0]} is present"
        if len(of) > 1 or monitor.endswith("/score"):
            what += ", or no object ids of it"
        raise ConfigError(
            f"{group}.monitor is {monitor}, which is never logged: the validation crops have {what}; set "
            f"{group}.monitor=val/dice or a metric of another class, or put a crop with {of[0]} on the validation side "
            "of the split"
        )


def _holds(config: RunConfig, crop: CropVolume, of: list[str], scored: bool) -> bool:
    """Return whether a crop has ground truth for a metric of a class (``[class]``) or a head (``[class, kind]``)."""
    name = of[0]
    for _, block in crop.grid.blocks(_BLOCK):
        if len(of) > 1:
            number = list(dict.fromkeys(head.class_name for head in heads_of(config))).index(name)
            found = bool((crop.read_ids(block)[number] > 0).any())
        elif scored and get_rules(DEFAULT_RULES).is_instance(name):
            annotated = crop.read_instances(name, block)
            found = annotated is not None and bool(annotated[0][annotated[1]].any())
        else:
            labels = crop.read_label_codes(block)
            present, known = labels.states.tables([name])
            found = bool((present & known)[0][labels.codes].any())
        if found:
            return True
    return False
