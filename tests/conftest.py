"""For all tests: the folders to import from, and one thread, as the tests share the cores."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from hypothesis import settings

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "infra"), str(HERE.parent / "vllm_plugin"),
                str(HERE.parent / "examples")]
torch.set_num_threads(1)
# What data.check_clips keeps goes there, and not into the user's own folder.
CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHE.name

# Use the same examples every time, so that a commit either passes or fails. To look for new ones:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
