"""Pages and figures: the report page, the pages of ``pytc inspect`` and ``pytc view``, and pictures of slices.

- `connectomics.pages.report` writes ``report.html``.
- `connectomics.pages.figures` makes pictures of slices from numpy arrays; `connectomics.pages.colors` has the colors.
- `connectomics.pages.inspect` shows training batches; `connectomics.pages.view` serves volumes to a viewer.
"""
