"""What the data path costs: by stage, beside its limits, and beside the official loader (`pytc bench data`)."""

from connectomics.data.bench.peer_environment import PeerError, ensure_environment
from connectomics.data.bench.run import DataBench, bench_data

__all__ = ["DataBench", "PeerError", "bench_data", "ensure_environment"]
