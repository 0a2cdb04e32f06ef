"""Pack predictions for the portal, and check a submission before it is uploaded."""

from connectomics.submission.export import ExportResult, export_submission
from connectomics.submission.findings import Finding
from connectomics.submission.validate import validate_submission

__all__ = ["ExportResult", "Finding", "export_submission", "validate_submission"]
