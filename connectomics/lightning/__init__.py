"""The training loop on PyTorch Lightning: module, trainer, callbacks, checkpoints.

Importing this package imports nothing: PyTorch Lightning takes seconds. Take what is needed from the modules:

- `connectomics.pipeline.train`: `train`, `choose_run_dir`;
- `connectomics.lightning.checkpoints`: `load_module`, `read_checkpoint`;
- `connectomics.lightning.module`: `ConnectomicsModule`;
- `connectomics.lightning.trainer`: `build_trainer`.
"""
