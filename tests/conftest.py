"""For every test: the repository root and this folder on the path, and one thread, as cores are shared."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
torch.set_num_threads(1)
