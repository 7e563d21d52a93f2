"""Trains each configuration of a file, one after the other in one process: what `accelerate launch` starts
twice in test_ranks.py."""

import json
import sys
from pathlib import Path

import torch

from alignlab.config.jobs import device_of
from alignlab.distributed.ranks import join
from alignlab.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    join(device_of("cpu"))
    for folder, c in json.loads(Path(sys.argv[1]).read_text()).items():
        train(c, Path(folder))
