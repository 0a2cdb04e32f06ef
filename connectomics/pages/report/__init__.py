"""The report page: what it is made from, one module per section, and `build_report`, which joins them."""
