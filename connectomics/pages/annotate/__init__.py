"""``pytc annotate``: a page that draws labels, served from this machine to this machine."""

from connectomics.pages.annotate.drawing_server import DrawingServer
from connectomics.pages.annotate.edit_log import EditLog
from connectomics.pages.annotate.predicted import PredictedLabels

__all__ = ["DrawingServer", "EditLog", "PredictedLabels"]
