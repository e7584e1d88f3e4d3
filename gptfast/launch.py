"""What torchrun says to each process that it starts. Without torch: the command line asks first."""

import os

# Of all processes, of this host's, and where they meet.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def num_ranks() -> int:
    """How many processes were started together; 1 where torchrun has started none."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def place() -> tuple[int, int, int]:
    """Of several: the rank of this process, its rank on this host, and how many are on it."""
    rank, _, local_rank, local_size = (int(os.environ[name]) for name in VARIABLES[:4])
    return rank, local_rank, local_size
