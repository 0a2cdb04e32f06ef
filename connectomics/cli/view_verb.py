"""The verb view: volumes in neuroglancer (or napari)."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli.paths import InOption, OutOption


def view(
    root: Annotated[str | None, typer.Argument(help="Data root: raw, and the truth of its crops.")] = None,
    predictions: Annotated[Path | None, InOption(help="Folder that predict wrote.")] = None,
    labels: Annotated[Path | None, InOption(help="Folder that decode wrote.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Which data set; default: the only one.")] = None,
    crop: Annotated[list[str] | None, typer.Option(help="Only this crop; may be repeated.")] = None,
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    port: Annotated[int, typer.Option(help="Of the page; 0: any that is free.", min=0, max=65535)] = 0,
    bind: Annotated[
        str, typer.Option(help="Who may connect: this machine only, unless another address is given.")
    ] = "127.0.0.1",
    state: Annotated[Path | None, OutOption(help="Write the page's state here, as JSON, to share it.")] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the browser.")] = False,
    napari: Annotated[bool, typer.Option("--napari", help="Look in napari instead, where it is installed.")] = False,
) -> None:
    """Look at raw, truth, what is known, probabilities, labels and uncertainty, where they lie, in nm.

    A link is printed; the page is served to this machine only, until Ctrl-C. On a cluster forward its ports with ssh.

    Examples:

      pytc view data/phantom --dataset phantom-iso --class mito

      pytc view data/phantom --predictions outputs/predictions --labels outputs/labels --open
    """
    from connectomics.io.replacing import has_keys, require_own
    from connectomics.io.write import write_file
    from connectomics.report.view import ViewSources, collect_layers, open_viewer

    if state is not None:
        require_own(state, has_keys("dimensions", "layers"), "view")
    found = collect_layers(
        ViewSources(
            root, predictions, labels, dataset, None if crop is None else tuple(crop),
            None if class_name is None else tuple(class_name),
        )
    )  # fmt: skip
    if napari:
        from connectomics.report.view.in_napari import show_in_napari

        show_in_napari(found)
        return
    viewing = open_viewer(found, bind, port)
    if state is not None:
        write_file(state, json.dumps(viewing.state, indent=1).encode())
        print(f"state: {state}")
    for layer in found.layers:
        print(f"  {layer.name}{'' if layer.visible else ' (off)'}")
    print(viewing.url, flush=True)
    if browser:
        import webbrowser

        webbrowser.open(viewing.url)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("closed")
    finally:
        viewing.close()
