"""``pytc inspect``: training batches as the network gets them, as numbers and as one page.

Take `inspect_data` from `connectomics.pages.inspect.data`, and `write_page` from `connectomics.pages.inspect.page`.
"""
