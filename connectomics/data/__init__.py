"""Volumes to batches: crops at the run's voxel size, splits, samplers, augmentation, data sets, the data module."""
