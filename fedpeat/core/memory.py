"""How much memory has this process used?"""

import sys

import psutil
import torch


def peak_rss_mib() -> float:
    """Return the largest resident memory of this process so far, MiB."""
    try:
        import resource
    except ImportError:  # Windows, where psutil knows the peak
        return psutil.Process().memory_info().peak_wset / 2**20  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_gpu_mib() -> float:
    """Return the largest GPU memory allocated by this process so far, MiB; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
