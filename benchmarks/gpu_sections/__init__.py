"""The sections of ``benchmarks/gpu.py``, one module each with ``run(section)``, and what they share."""
