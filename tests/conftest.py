"""For all tests: the folders to import from, and one thread, as the tests share the cores."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "infra"), str(HERE.parent / "vllm_plugin")]
torch.set_num_threads(1)

# Use the same examples every time, so that a commit either passes or fails. To look for new ones:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
