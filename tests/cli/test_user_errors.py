"""What people do wrong, verb by verb: each mistake is one line that says what was found and what to do.

Words of a case are split at blanks; ``{name}`` is one of the `places`. Mistakes of `pytc fetch`, which need a server,
are listed in tests/cellmap/test_fetch.py, those of `pytc ingest`, which need files of many formats, in
tests/cellmap/test_ingest.py; here are the others that people make with them.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import numpy as np
import pytest

from connectomics.cli import main
from tests.cli.small_way import Way

#: verb -> (arguments, what the line says). "usage:" begins what the parser of arguments refuses, with status 2;
#: "found:" what `validate` finds, which is its result and not an error of its own.
CASES: dict[str, list[tuple[str, str]]] = {
    "doctor": [
        ("--at {text}", "--at: expected a folder"),
        ("--s3 janelia-cosem-datasets", "s3://"),
        ("--s3 {root}", "s3://"),
        ("now", "usage:unexpected extra argument"),
        ("--jsn", "usage:--json"),
    ],
    "demo": [
        ("--out {root}", "--overwrite"),
        ("--out {text}", "text.txt"),
        ("--out {new} --data {nowhere}", "nowhere"),
        ("--out {new} --data {empty}", "is not a data set"),
        ("--out {new} --data {root}", "is not a data set"),
        ("--out {new} --data {text}", "is not a data set"),
        ("--out {new} --config {nowhere}.yaml", "nowhere.yaml"),
        ("--out {new} --config {root}", "is a folder"),
        ("--out {new} --preset huge", "small"),
        ("--out {new} training.max_epoch=1", "did you mean 'training.max_epochs'"),
        ("--out {new} training.max_epochs=many", "max_epochs"),
        ("--out {new} phantom", "key=value"),
    ],
    "phantom": [
        ("", "usage:OUT"),
        ("{root}", "--overwrite"),
        ("{text}", "text.txt"),
        ("{text}/below", "text.txt"),
        ("{new} --preset smal", "did you mean 'small'"),
        ("{new} --size -5", "size"),
        ("{new} --size 1", "size"),
        ("{new} --size nan", "size"),
        ("{new} --size big", "usage:--size"),
        ("{new} --seed x", "usage:--seed"),
        ("{new} --seed -1", "seed"),
    ],
    "fetch": [
        ("", "usage:ROOT"),
        ("{new} --for {config} --class mito", "--for determines what is fetched"),
        ("{new} --context -5", "--context"),
        ("{new} --no-labels", "nothing to fetch"),
        ("{new} --from http://example.org/bucket", "expected an S3 URL"),
        ("{new} --from {root}", "expected an S3 URL"),
        ("{new} --threads 0", "usage:--threads"),
    ],
    "ingest": [
        ("{new}", "nothing to ingest: give --dataset"),
        ("{root} --proposals {empty}", "no proposals.csv"),
        ("{new} --dataset a", "nothing to ingest"),
        ("{new} --dataset a --raw {empty}", "empty"),
        ("{new} --dataset a --raw {text}", "unknown format"),
        ("{new} --dataset a --raw {npy}", "--voxel-size"),
        ("{new} --dataset a --raw {npy} --voxel-size 8,8", "--voxel-size"),
        ("{new} --dataset a --raw {npy} --voxel-size 0", "--voxel-size"),
        ("{text} --dataset a --raw {npy} --voxel-size 8", "text.txt"),
        ("{new} --dataset a --raw {npy} --voxel-size 8 --range 1", "--range: expected LOW,HIGH"),
        ("{root} --dataset set-b --labels mito={npy}", "did you mean 'set-a'"),
        ("{root} --dataset set-a --labels mito={npy} --begin 1,2", "--begin"),
    ],
    "describe": [
        ("", "usage:ROOT"),
        ("{nowhere}", "no data root at"),
        ("{text}", "text.txt"),
        ("{empty}", "empty"),
        ("{root}/set-a", "{root}"),
        ("{root}/set-a/set-a.zarr", "{root}"),
        ("{predictions}", "predictions"),
        ("{root} --dataset set-b", "did you mean 'set-a'"),
        ("{root} --crop crop11", "did you mean 'crop1'"),
        ("{root} --class mitos", "did you mean 'mito'"),
        ("{root} --voxel-size wide", "one number or three"),
        ("{root} --voxel-size 8,8", "--voxel-size"),
        ("{root} --voxel-size -8", "--voxel-size"),
    ],
    "inspect": [
        ("", "usage:CONFIG"),
        ("{nowhere}.yaml", "nowhere.yaml"),
        ("phantm", "'phantom'"),
        ("{text}", "text.txt"),
        ("{root}", "is a folder"),
        ("{config} --out {new}.html dataset.data_root={nowhere}", "no data root at"),
        ("{config} --out {new}.html dataset.classes=[mitto]", "mito"),
        ("{config} --out {new}.html data.patch_size=[16,16]", "data.patch_size"),
        ("{config} --out {new}.html --batches 0", "at least 1"),
        ("{config} --out {new}.pdf", ".html"),
        ("{config} --out {page}", "--overwrite"),
        ("{config} --out {empty}", ".html"),
    ],
    "cache": [
        ("--dir {text}", "text.txt"),
        ("--dir {cache} --clear --verify", "give one of them"),
        ("--dir {cache} --older-than -1", "at least 0"),
        ("--dir {cache} --older-than week", "usage:--older-than"),
        ("--dir {cache} --crop set-a/crop11", "did you mean 'set-a/crop1'"),
        ("--dir {cache} --crop crop1", "did you mean 'set-a/crop1'"),
        ("clear", "usage:clear"),
        ("--clean", "usage:--clear"),
    ],
    "plan": [
        ("{root}", "usage:--class"),
        ("{nowhere} --class mito", "no data root at"),
        ("{text} --class mito", "text.txt"),
        ("{empty} --class mito", "empty"),
        ("{root}/set-a --class mito", "{root}"),
        ("{root} --class mitoo", "did you mean 'mito'"),
        ("{root} --class nuc", "nuc"),
        ("{root} --class mito --dataset set-b", "did you mean 'set-a'"),
        ("{root} --class mito --no-trial --out {text}", "text.txt"),
        ("{root} --class mito --no-trial --out {planned}", "--overwrite"),
    ],
    "train": [
        ("", "usage:give a configuration file"),
        ("{nowhere}.yaml", "nowhere.yaml"),
        ("{text}", "text.txt"),
        ("{broken_yaml}", "broken.yaml"),
        ("{list_yaml}", "list.yaml"),
        ("{binary}", "binary.dat"),
        ("{root}", "is a folder"),
        ("{config} training.max_epoch=3", "did you mean 'training.max_epochs'"),
        ("{config} traning.max_epochs=3", "did you mean 'training"),
        ("{config} training.max_epochs=many", "training.max_epochs"),
        ("{config} training.max_epochs", "key=value"),
        ("{config} --run-dir {new} model.architecture=unett", "did you mean"),
        ("{config} --run-dir {new} optimizer.name=sgd", "did you mean 'SGD'"),
        ("{config} --run-dir {new} dataset.classes=[mitoo]", "did you mean 'mito'"),
        ("{config} --run-dir {new} dataset.classes=[]", "dataset.classes"),
        ("{config} --run-dir {new} dataset.crops=[crop11]", "did you mean 'crop1'"),
        ("{config} --run-dir {new} dataset.datasets=[set-b]", "did you mean 'set-a'"),
        ("{config} --run-dir {new} dataset.data_root={nowhere}", "no data root at"),
        ("{config} --run-dir {new} dataset.voxel_size=[0,0,0]", "dataset.voxel_size"),
        ("{config} --run-dir {new} dataset.train_val_split=2", "dataset.train_val_split"),
        ("{config} --run-dir {new} data.patch_size=[16,16]", "data.patch_size"),
        ("{config} --run-dir {new} data.patch_size=[15,16,16]", "patch_size"),
        ("{config} --run-dir {new} data.batch_size=0", "data.batch_size"),
        ("{config} --run-dir {new} data.batch_size=-1", "data.batch_size"),
        ("{config} --run-dir {new} optimizer.lr=-1", "optimizer.lr"),
        ("{config} --run-dir {new} system.accelerator=gpuu", "accelerator"),
        ("{config} --run-dir {new} training.precision=17", "precision"),
        ("{config} --run-dir {text}", "text.txt"),
        ("{config} --run-dir {new} --checkpoint {nowhere}.ckpt", "no checkpoint at"),
        ("{config} --run-dir {new} --checkpoint {text}", "text.txt"),
        ("{config} --run-dir {new} --checkpoint {run}", "run"),
        ("{config} --run-dir {new} --checkpoint {checkpoint} dataset.classes=[er]", "classes"),
        ("{config} --run-dir {run} dataset.classes=[er]", "run"),
    ],
    "runs": [
        ("{nowhere}", "nowhere"),
        ("{text}", "text.txt"),
        ("--compare {run}", "at least two runs"),
        ("--compare {run} {empty}", "not a run folder"),
        ("--compare {run} {nowhere}", "nowhere"),
        ("--compare {run} {config}", "not a run folder"),
        ("{broken_run}", "broken_run"),
        ("--comapre {run} {run}", "usage:--compare"),
    ],
    "package": [
        ("", "usage:SOURCE"),
        ("{nowhere}", "no checkpoint at"),
        ("{text} --out {new}.pytc", "text.txt"),
        ("{config} --out {new}.pytc", "run.yaml"),
        ("{empty} --out {new}.pytc", "without checkpoints"),
        ("{root} --out {new}.pytc", "without checkpoints"),
        ("{run} --out {package}", "--overwrite"),
        ("{run} --out {empty}", "is a folder"),
        ("{run} --out {new}.pytc --scores {nowhere}", "no scores at"),
        ("{run} --out {new}.pytc --scores {text}", "text.txt"),
        ("{run} --out {new}.pytc --scores {broken_json}", "broken.json"),
        ("{run} --out {new}.pytc --scores {empty}", "empty"),
    ],
    "predict": [
        ("", "usage:give --checkpoint"),
        ("{config}", "usage:--checkpoint"),
        ("{nowhere}.yaml --checkpoint {checkpoint}", "nowhere.yaml"),
        ("{config} --out {new} --checkpoint {nowhere}.ckpt", "no checkpoint at"),
        ("--out {new} --checkpoint {nowhere}", "no checkpoint at"),
        ("{config} --out {new} --checkpoint {text}", "text.txt"),
        ("{config} --out {new} --checkpoint {empty}", "empty"),
        ("{config} --out {new} --checkpoint {checkpoint} dataset.classes=[er,mito]", "was trained for classes"),
        ("{config} --out {new} --checkpoint {checkpoint} dataset.data_root={nowhere}", "no data root at"),
        ("{config} --out {new} --checkpoint {checkpoint} dataset.crops=[crop11]", "did you mean 'crop1'"),
        ("{config} --out {new} --checkpoint {checkpoint} --crops {nowhere}.csv", "nowhere.csv"),
        ("{config} --out {new} --checkpoint {checkpoint} --crops {text}", "text.txt"),
        ("{config} --out {new} --checkpoint {checkpoint} --crops {empty}", "empty"),
        ("{config} --out {new} --checkpoint {checkpoint} --crops chalenge", "challenge"),
        ("{config} --out {new} --checkpoint {checkpoint} --box set-a:", "a box is DATASET"),
        ("{config} --out {new} --checkpoint {checkpoint} --box set-b:0,0,0:8,8,8", "did you mean 'set-a'"),
        ("{config} --out {new} --checkpoint {checkpoint} --box set-a:9000,0,0:9008,8,8", "no raw"),
        ("{config} --out {new} --checkpoint {checkpoint} --box set-a:0,0,0:8,8,8 --crops {table}", "--box"),
        ("{config} --out {new} --checkpoint {checkpoint} --device tpu", "tpu"),
        ("{config} --out {new} --checkpoint {checkpoint} --device gpu", "gpu"),
        ("{config} --out {new} --checkpoint {checkpoint} --resume", "--resume"),
        ("{config} --out {text} --checkpoint {checkpoint}", "text.txt"),
        ("{config} --out {new} --checkpoint {checkpoint} inference.overlap=2", "inference.overlap"),
        ("{config} --out {new} --checkpoint {checkpoint} inference.tta=flip", "tta"),
        ("--checkpoint {nowhere}", "nowhere"),
        ("--checkpoint {text}", "text.txt"),
        ("--checkpoint {package} --out {new} dataset.data_rot={root}", "did you mean 'dataset.data_root'"),
    ],
    "decode": [
        ("{predictions}", "usage:OUT"),
        ("{nowhere} {new}", "nowhere"),
        ("{text} {new}", "text.txt"),
        ("{empty} {new}", "empty"),
        ("{root} {new}", "root"),
        ("{labels} {new}", "labels"),
        ("{half_predictions} {new}", "half"),
        ("{predictions} {new} --class mitoo", "did you mean 'mito'"),
        ("{predictions} {new} --config {nowhere}.yaml", "nowhere.yaml"),
        ("{predictions} {new} decoding.default.threshold=2", "threshold"),
        ("{predictions} {new} decoding.default.method=watershd", "must be one of threshold"),
        ("{predictions} {new} decoding.clases.mito.threshold=0.4", "did you mean 'decoding.classes"),
        ("{predictions} {new} decoding.classes.mito.treshold=0.4", "threshold"),
        ("{predictions} {new} decoding.classes.mitoo.threshold=0.4", "mito"),
        ("{predictions} {text}", "text.txt"),
        ("{predictions} {predictions}", "predictions"),
        ("{predictions} {new} --resume", "--resume"),
    ],
    "measure": [
        ("{labels}", "usage:--out"),
        ("{nowhere} --out {new}", "nowhere"),
        ("{text} --out {new}", "text.txt"),
        ("{empty} --out {new}", "empty"),
        ("{root} --out {new}", "root"),
        ("{predictions} --out {new}", "run decode first"),
        ("{half_labels} --out {new}", "half"),
        ("{labels} --out {new} --class mitoo", "did you mean 'mito'"),
        ("{labels} --out {new} --crop crop11", "did you mean 'crop1'"),
        ("{labels} --out {new} --dataset set-b", "did you mean 'set-a'"),
        ("{labels} --out {new} --contact mito", "such as mito:er:30"),
        ("{labels} --out {new} --contact mito:er:wide", "such as mito:er:30"),
        ("{labels} --out {new} --contact mito:err:30", "did you mean 'er'"),
        ("{labels} --out {new} --contact mito:er:-3", "contact"),
        ("{labels} --out {new} --format excel", "csv"),
        ("{labels} --out {new} data.num_workers=2", "engine.key=value"),
        ("{labels} --out {new} engine.worker=2", "did you mean 'engine.workers'"),
        ("{labels} --out {new} engine.workers=-2", "engine.workers"),
        ("{labels} --out {text}", "text.txt"),
    ],
    "mesh": [
        ("{labels} {new}", "usage:--class"),
        ("{nowhere} {new} --class mito", "nowhere"),
        ("{text} {new} --class mito", "text.txt"),
        ("{empty} {new} --class mito", "empty"),
        ("{predictions} {new} --class mito", "run decode first"),
        ("{half_labels} {new} --class mito", "half"),
        ("{labels} {new} --class mitoo", "did you mean 'mito'"),
        ("{labels} {new} --class mito --crop crop11", "did you mean 'crop1'"),
        ("{labels} {new} --class mito --dataset set-b", "did you mean 'set-a'"),
        ("{labels} {new} --class mito --format stl", "ply"),
        ("{labels} {new} --class mito --simplify 0", "simplify"),
        ("{labels} {new} --class mito --max-error-nm -1", "max_error_nm above 0"),
        ("{labels} {new} --class mito --id 9999", "choose one"),
        ("{labels} {new} --class mito --id one", "usage:--id"),
        ("{labels} {text} --class mito", "text.txt"),
    ],
    "run-task": [
        ("", "usage:FILE"),
        ("{nowhere}.json", "nowhere.json"),
        ("{text}", "text.txt"),
        ("{broken_json}", "broken.json"),
        ("{empty}", "empty"),
        ("{config}", "run.yaml"),
        ("{scores}", "scores.json"),
        ("{odd_task}", "unknown kind of task"),
        ("{task} data.num_workers=3", "engine.key=value"),
        ("{task} engine.worker=3", "did you mean 'engine.workers'"),
        ("{task} --overwrite --device tpu", "tpu"),
    ],
    "status": [
        ("", "usage:OUT"),
        ("{nowhere}", "nowhere"),
        ("{empty}", "no task.json below"),
        ("{text}", "text.txt"),
    ],
    "array": [
        ("-- decode a b", "usage:--jobs"),
        ("--jobs 2", "usage:words"),
        ("--jobs 0 -- decode a b", "at least 1 job"),
        ("--jobs 2 --time soon -- decode a b", "hours:minutes"),
        ("--jobs 2 --queue pbs -- decode a b", "slurm"),
        ("--jobs 2 -- train {config}", "expected a command of predict"),
    ],
    "evaluate": [
        ("{labels}", "usage:ROOT"),
        ("{nowhere} {root}", "nowhere"),
        ("{text} {root}", "text.txt"),
        ("{empty} {root}", "empty"),
        ("{predictions} {root}", "run decode first"),
        ("{half_labels} {root}", "half"),
        ("{labels} {nowhere}", "no data root at"),
        ("{labels} {labels}", "labels"),
        ("{labels} {root} --class mitoo", "did you mean 'mito'"),
        ("{labels} {root} --crop crop11", "did you mean 'crop1'"),
        ("{labels} {root} --dataset set-b", "did you mean 'set-a'"),
        ("{labels} {root} --rules 2027-01", "2026-06"),
        ("{labels} {root} --out {empty}", "empty"),
    ],
    "tune": [
        ("{predictions}", "usage:ROOT"),
        ("{nowhere} {root} --out {new}", "nowhere"),
        ("{empty} {root} --out {new}", "empty"),
        ("{labels} {root} --out {new}", "labels"),
        ("{half_predictions} {root} --out {new}", "half"),
        ("{predictions} {nowhere} --out {new}", "no data root at"),
        ("{predictions} {root} --out {new} --class mitoo", "did you mean 'mito'"),
        ("{predictions} {root} --out {new} --trials 0", "at least one trial"),
        ("{predictions} {root} --out {new} --minutes -1", "positive time"),
        ("{predictions} {root} --out {new} --config {nowhere}.yaml", "nowhere.yaml"),
        ("{predictions} {root} --out {new} decoding.default.method=watershd", "must be one of threshold"),
        ("{predictions} {root} --out {text}", "text.txt"),
    ],
    "export": [
        ("", "usage:LABELS"),
        ("{nowhere} {new}.zip --crops {table}", "nowhere"),
        ("{text} {new}.zip --crops {table}", "text.txt"),
        ("{empty} {new}.zip --crops {table}", "empty"),
        ("{root} {new}.zip --crops {table}", "root"),
        ("{half_labels} {new}.zip --crops {table}", "half"),
        ("{labels} {new}.zip", "no predictions for the crop table"),
        ("{labels} {new}.zip --crops {nowhere}.csv", "nowhere.csv"),
        ("{labels} {new}.zip --crops {text}", "text.txt"),
        ("{labels} {new}.zip --crops {broken_json}", "broken.json"),
        ("{labels} {new}.zip --crops {table} --class mitoo", "did you mean 'mito'"),
        ("{labels} {new}.zip --crops {table} --dataset set-b", "did you mean 'set-a'"),
        ("{labels} {run} --crops {table}", "was not written by export"),
        ("{labels} {new}.zip --crops {table} --probabilities {nowhere}", "nowhere"),
        ("{one_label} {new}.zip --crops {table} --strict", "crop"),
    ],
    "propose": [
        ("{run}", "usage:DATA"),
        ("{nowhere} {root} --out {new}", "nowhere"),
        ("{text} {root} --out {new}", "text.txt"),
        ("{empty} {root} --out {new}", "empty"),
        ("{broken_run} {root} --out {new}", "broken_run"),
        ("{run} {nowhere} --out {new}", "no data root at"),
        ("{run} {text} --out {new}", "text.txt"),
        ("{run} {empty} --out {new}", "empty"),
        ("{run} {root} --out {empty}/../text.txt", "was not written by propose"),
        ("{run} {root} --out {new} --dataset set-b", "did you mean 'set-a'"),
        ("{run} {root} --out {new} --box set-a:0,0,0:9,9", "a box is"),
        ("{run} {root} --out {new} --size 8,64,64", "no free box"),
        ("{run} {root} --out {new} --device cuda:99", "cuda:99"),
        ("{run} {root} --out {new} inference.ttta=flips", "tta"),
    ],
    "validate": [
        ("", "usage:SUBMISSION"),
        ("{nowhere}.zip --crops {table}", "no submission at"),
        ("{text} --crops {table}", "found:is not a zip file"),
        ("{binary} --crops {table}", "found:is not a zip file"),
        ("{empty} --crops {table}", "found:got nothing"),
        ("{submission} --crops {nowhere}.csv", "nowhere.csv"),
        ("{submission} --crops {text}", "text.txt"),
        ("{submission} --crops {submission}", "submission.zip"),
        ("{submission} --crops {table} --class mitoo", "did you mean 'mito'"),
        ("{submission} --crops {table} --truth {nowhere}", "nowhere"),
        ("{submission} --crops {table} --truth {root}", "root"),
        ("{submission} --crops {table} --out {empty}", "empty"),
    ],
    "score": [
        ("{submission}", "usage:TRUTH"),
        ("{nowhere}.zip {truth} --out {new}", "no submission at"),
        ("{text} {truth} --out {new}", "text.txt"),
        ("{empty} {truth} --out {new}", "empty"),
        ("{predictions} {truth} --out {new}", "run decode first"),
        ("{half_labels} {truth} --out {new}", "half"),
        ("{submission} {nowhere}.zarr --out {new}", "no folder at"),
        ("{submission} {root} --out {new}", "root"),
        ("{submission} {truth} --out {new} --class mitoo", "did you mean 'mito'"),
        ("{submission} {truth} --out {new} --crop crop11", "did you mean 'crop1'"),
        ("{submission} {truth} --out {new} --rules 2027-01", "2026-06"),
        ("{submission} {truth} --out {new} --crops {text}", "text.txt"),
        ("{submission} {truth} --out {text}", "text.txt"),
    ],
    "report": [
        ("{new}.html --run {nowhere}", "nothing at"),
        ("{new}.html --run {empty}", "empty"),
        ("{new}.html --run {text}", "text.txt"),
        ("{new}.html --root {nowhere}", "nothing at"),
        ("{new}.html --scores {text}", "text.txt"),
        ("{new}.html --scores {broken_json}", "broken.json"),
        ("{new}.html --scores {evaluation}", "evaluation.json"),
        ("{new}.html --evaluation {scores}", "scores.json"),
        ("{new}.html --run {run} --scores {scores} --scores {scores}", "2 --scores for 1 --run"),
        ("{new}.html --crops {text}", "text.txt"),
        ("{new}.html --crops {table} --root {root} --labels {empty}", "empty"),
        ("{new}.html --run {run} --pictures -1", "pictures"),
        ("{new}.html", "nothing to"),
    ],
    "view": [
        ("", "nothing to look at"),
        ("{nowhere}", "nowhere"),
        ("{text}", "text.txt"),
        ("{empty}", "empty"),
        ("--labels {nowhere}", "nowhere"),
        ("--predictions {empty}", "empty"),
        ("{root} --dataset set-b", "did you mean 'set-a'"),
        ("{root} --class mitoo", "did you mean 'mito'"),
        ("{root} --crop crop11", "did you mean 'crop1'"),
        ("{root} --port 99999", "usage:--port"),
        ("{root} --bind 300.1.1.1", "300.1.1.1"),
    ],
}


@pytest.fixture(scope="module")
def places(way: Way, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a small run left, and what is wrong beside it."""
    base = tmp_path_factory.mktemp("wrong")
    (base / "text.txt").write_text("Dear diary, today the network did not learn.\n")
    (base / "binary.dat").write_bytes(bytes(range(256)))
    (base / "broken.yaml").write_text("data: [1, 2")
    (base / "list.yaml").write_text("- one\n- two\n")
    (base / "broken.json").write_text('{"crops": [')
    (base / "odd_task.json").write_text('{"kind": "sing", "format": 1}')
    (base / "page.html").write_text("mine")
    (base / "empty").mkdir()
    (base / "broken_run").mkdir()
    (base / "broken_run/config.yaml").write_text("data: [1, 2")
    (base / "planned").mkdir()
    np.save(base / "volume.npy", np.zeros((8, 8, 8), np.uint8))
    for name, folder in (("half_predictions", way.predictions), ("half_labels", way.labels)):
        attrs = Path(shutil.copytree(folder, base / name)) / "set-a.zarr/crop1/mito/.zattrs"
        about = json.loads(attrs.read_text())
        about["connectomics"]["complete"] = False
        attrs.write_text(json.dumps(about))
    shutil.copytree(way.labels, base / "one_label")
    shutil.rmtree(base / "one_label/set-a.zarr/crop2")
    assert main(["plan", str(way.root), "--class", "mito", "--no-trial", "--out", str(base / "planned")]) == 0
    assert main(["package", str(way.run), "--out", str(base / "package.pytc")]) == 0
    names = "root config run checkpoint predictions labels table truth submission scores evaluation"
    return {
        **{name: str(getattr(way, name)) for name in names.split()},
        **{name: str(base / name) for name in ("empty", "broken_run", "planned", "half_predictions", "half_labels")},
        "text": str(base / "text.txt"), "binary": str(base / "binary.dat"), "broken_yaml": str(base / "broken.yaml"),
        "list_yaml": str(base / "list.yaml"), "broken_json": str(base / "broken.json"),
        "odd_task": str(base / "odd_task.json"), "page": str(base / "page.html"), "npy": str(base / "volume.npy"),
        "one_label": str(base / "one_label"), "package": str(base / "package.pytc"),
        "task": str(way.predictions / "set-a.zarr/crop1/task.json"), "cache": str(way.base / "cache"),
        "nowhere": str(base / "nowhere"), "new": str(base / "new"),
    }  # fmt: skip


def problem(verb: str, arguments: str, said: str, places: dict[str, str], capfd: pytest.CaptureFixture[str]) -> str:
    """What is not as it must be with one case; "" where all is well."""
    capfd.readouterr()
    kind, _, expected = ("", "", said) if ":" not in said[:6] else said.partition(":")
    expected = expected.format(**places)
    try:
        status = main([verb, *(word.format(**places) for word in arguments.split())])
    except Exception as error:  # the very thing that must not be
        return f"raises {type(error).__name__}: {error}"
    captured = capfd.readouterr()
    shown = captured.out if kind == "found" else captured.err
    lines = [line for line in shown.splitlines() if line.startswith("error:")]
    if status != (2 if kind == "usage" else 1):
        return f"status {status}: {shown[-300:]}"
    if "Traceback" in shown:
        return "shows a traceback"
    if kind:
        return "" if expected.lower() in shown.lower() else f"does not say {expected!r}: {shown!r}"
    if len(lines) != 1:
        return f"{len(lines)} lines of error"
    if expected not in lines[0]:
        return f"does not say {expected!r}: {lines[0]}"
    left = sorted(path.name for path in Path(places["new"]).parent.glob("new*"))
    return f"left {left}" if left and verb != "train" else ""  # train keeps the log of what went wrong


@pytest.mark.parametrize("verb", CASES)
def test_a_mistake_is_one_helpful_line(
    verb: str,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # what defaults to the working directory is written there, if it is
    found = {}
    for arguments, said in CASES[verb]:
        shutil.rmtree(places["new"], ignore_errors=True)
        wrong = problem(verb, arguments, said, places, capfd)
        if wrong:
            found[f"{verb} {arguments}"] = wrong
    assert not found, "\n".join(f"{case}\n    {wrong}" for case, wrong in found.items())
    assert not list(tmp_path.iterdir())


def test_every_case_names_places_that_are_there(places: dict[str, str]) -> None:
    words = [text for cases in CASES.values() for case in cases for text in case]
    used = {name for text in words for _, name, _, _ in string.Formatter().parse(text) if name}
    assert used <= set(places)
