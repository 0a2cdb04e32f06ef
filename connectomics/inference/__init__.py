"""A network over a volume: windows, blending, blocks, and the task that writes probabilities."""
