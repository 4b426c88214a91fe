"""What is left of a process group. Used by the tests that start servers."""

import time
from pathlib import Path


def members(group):
    """Process ids of a process group; zombies, which have ended and wait for their parent, do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for_end(group, seconds=20):
    """Is the group gone within these seconds?"""
    until = time.monotonic() + seconds
    while members(group) and time.monotonic() < until:
        time.sleep(0.1)
    return not members(group)
