"""``scripts/main.py``: one command with ``--mode`` instead of verbs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from connectomics.cli import join_lists, label_verbs, predict_verbs, run_guarded, score_verbs, train_verbs
from connectomics.cli.options import input_path, output_path

_MODES = ("train", "test", "predict", "evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and run; return the exit status of ``pytc``."""
    parser = argparse.ArgumentParser(
        description="Train, predict or evaluate with one configuration file.",
        epilog="examples: main.py --config tutorials/cellmap_cos7.yaml data.batch_size=4 | "
        "main.py --config tutorials/cellmap_cos7.yaml --mode test --checkpoint best.ckpt dataset.crops=[crop234]",
    )
    parser.add_argument("--config", required=True, help="configuration file")
    parser.add_argument("--mode", choices=_MODES, default="train", help="test: predict, decode and evaluate")
    parser.add_argument("--checkpoint", help="resume from it (train), or use it (the other modes)")
    parser.add_argument("--fast-dev-run", action="store_true", help="run one batch of everything")
    parser.add_argument("--out", help="folder for predictions and labels; default: beside the checkpoint")
    parser.add_argument("overrides", nargs="*", help="key=value ...")
    options = parser.parse_intermixed_args(join_lists(sys.argv[1:] if arguments is None else arguments))
    return run_guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from connectomics.config import load_config
    from connectomics.errors import InputError

    checkpoint = None if options.checkpoint is None else input_path(options.checkpoint)
    if options.mode == "train":
        train_verbs.train(options.config, options.overrides, checkpoint, fast_dev_run=options.fast_dev_run)
        return
    if checkpoint is None:
        raise InputError(f"--mode {options.mode} needs --checkpoint FILE")
    out = checkpoint.parent.parent if options.out is None else output_path(options.out)
    if options.mode in ("test", "predict"):
        predict_verbs.predict(options.config, options.overrides, [checkpoint], out=out / "predictions")
    if options.mode in ("test", "evaluate"):
        config = load_config(options.config, options.overrides)
        file = input_path(options.config)
        label_verbs.decode(out / "predictions", out / "labels", file, overrides=options.overrides)
        rules, root = config.score.rules, config.dataset.data_root
        score_verbs.evaluate(out / "labels", root, out=out / "evaluation.json", rules=rules)
