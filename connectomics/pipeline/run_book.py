"""The run book of a submission: a Makefile that fetches, trains, predicts, tunes, merges and validates."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib import resources

from connectomics.cellmap.crop_table import csv_rows

#: First line of the Makefiles that are written.
MARK = "# written by pytc plan --challenge"

_BOOK = """\
#
# `make -n` prints the commands and `make` runs them, from the data to submission.zip, in this folder. After an error or
# Ctrl-C, rerun it: finished steps (done/) are left out, and the step that was interrupted resumes. One step alone:
# make fetch | train | predict | tune | merge | validate (merge also decodes). Do not use make -j: steps share the GPU.
#
# To add a network for the same classes (another voxel size or seed), write NAME.yaml beside the others and run
# make PLANS='@PLANS@ NAME'. The better one by validation score is used for each class; with AVERAGE=2 the mean of both,
# which needs the same dataset.split_file in both.
#
@NOTES@

PYTC ?= pytc
DATA := @DATA@
CROPS ?= @CROPS@
PLANS ?= @PLANS@
# what to validate, if the crop table also asks for classes that no configuration has
CLASSES ?= @CLASSES@
# options and overrides of single steps, such as TRAIN="system.num_gpus=4"
FETCH ?=
TRAIN ?=
PREDICT ?=
TUNE ?=
MERGE ?=
AVERAGE ?= 1

all: validate
fetch: $(PLANS:%=done/fetch-%)
train: $(PLANS:%=done/train-%)
predict: $(PLANS:%=done/predict-%)
tune: $(PLANS:%=done/tune-%)
decode merge: done/merge

done/fetch-%: %.yaml
	@FETCH@
	@mkdir -p done && touch $@

done/train-%: done/fetch-%
	$(PYTC) train $*.yaml --run-dir runs/$* --resume $(TRAIN)
	@mkdir -p done && touch $@

done/predict-%: done/train-%
	$(PYTC) predict --checkpoint runs/$* --crops val --out val/$* $(PREDICT)
	$(PYTC) predict --checkpoint runs/$* --crops $(CROPS) --out test/$* $(PREDICT)
	@mkdir -p done && touch $@

done/tune-%: done/predict-%
	$(PYTC) tune val/$* $(DATA) --config runs/$*/config.yaml --out tuned/$* $(TUNE)
	@mkdir -p done && touch $@

SCORES := $(PLANS:%=--tuned tuned/%)
ifneq ($(AVERAGE),1)
# the mean has other best thresholds than each network alone
done/tune-mean: $(PLANS:%=done/tune-%)
	$(PYTC) merge val/mean $(PLANS:%=val/%) $(SCORES) --average $(AVERAGE)
	$(PYTC) tune val/mean $(DATA) --config val/mean/decoding.yaml --out tuned/mean $(TUNE)
	@mkdir -p done && touch $@
done/merge: done/tune-mean
MERGE += --average $(AVERAGE) --config tuned/mean/decoding.yaml
endif

done/merge: $(PLANS:%=done/tune-%)
	$(PYTC) merge submission.zip $(PLANS:%=test/%) $(SCORES) --crops $(CROPS) $(MERGE)
	@mkdir -p done && touch $@

validate: done/merge
	$(PYTC) validate submission.zip --crops $(CROPS) $(CLASSES:%=--class %)

.PHONY: all fetch train predict tune decode merge validate
.SECONDARY:
"""


def run_book(
    root: str,
    crops: str,
    plans: Sequence[str],
    notes: Sequence[str],
    source: str | None,
    classes: Sequence[str] = (),
) -> str:
    """Return the text of the Makefile.

    Args:
        root: data root. crops: crop table of the submission, its path or "challenge". plans: names of configurations
            beside the Makefile. notes: lines for its top.
        classes: what to validate; none: all that the table asks for.
        source: where `pytc fetch` finds the data, ``s3://bucket``; None: nowhere, the step does nothing.
    """
    fetch = "@: these data are not public"
    if source is not None:
        fetch = f"$(PYTC) fetch $(DATA) --from {_word(source)} --for $< --crops $(CROPS) $(FETCH)"
    filled = {
        "@NOTES@": "\n".join(f"# {note}" for note in notes),
        "@DATA@": _word(root),
        "@CROPS@": _word(crops),
        "@PLANS@": " ".join(plans),
        "@CLASSES@": " ".join(classes),
        "@FETCH@": fetch,
    }
    text = _BOOK
    for mark, value in filled.items():
        text = text.replace(mark, value)
    return f"{MARK}\n{text}"


def public_datasets() -> set[str]:
    """Return the names of the challenge's data sets."""
    table = resources.files("connectomics.cellmap").joinpath("tables/intensity_ranges.csv")
    return {row["dataset"] for _, row in csv_rows(table.read_text(encoding="utf-8"), ["dataset"], "the data sets")}


def _word(text: str) -> str:
    """Quote a text for the shell, and its dollar signs for make."""
    return shlex.quote(text).replace("$", "$$")
