"""For every test: the repository root and this folder on the path, and one thread, as cores are shared."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
torch.set_num_threads(1)

# The same examples every time: a commit passes or fails. To look for new ones: pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
