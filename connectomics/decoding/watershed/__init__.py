"""Seeded watershed of volumes of any size, block by block, equal to that of the whole array."""
