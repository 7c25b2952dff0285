"""For all tests."""

import os

import torch

# One thread each: the tests share two cores with Ray's processes, and sums come out the same on any machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
