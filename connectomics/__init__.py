"""CellMap volumes from disk to a scored submission, on PyTorch Lightning, MONAI and Hydra."""

__version__ = "0.1.0"
