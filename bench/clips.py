"""How long a start takes to check its clips: the first start decodes them, the second does not.

    python bench/clips.py [CLIPS]     # 2,900 by default, of 10 s, for each format

The clips are links to 20 files, so they are in the page cache: a slow disk adds its own time.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import read_questions

FORMATS = {"wav, 16 kHz, mono": ("wav", 16_000, 1), "flac, 44.1 kHz, stereo": ("flac", 44_100, 2),
           "mp3, 44.1 kHz, stereo": ("mp3", 44_100, 2)}
FILES, SECONDS = 20, 10


def main(count):
    print(f"| {count} clips of {SECONDS} s | first start: s, CPU s | second start: s, CPU s |\n"
          "|---|---|---|")
    for name, (suffix, rate, channels) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            rng = np.random.default_rng(0)
            for i in range(FILES):
                noise = 0.1 * rng.standard_normal((SECONDS * rate, channels))
                soundfile.write(folder / f"{i}.{suffix}", noise, rate)
            rows = []
            for i in range(FILES, count + FILES):
                os.link(folder / f"{i % FILES}.{suffix}", folder / f"{i}.{suffix}")
                rows.append({"id": str(i), "audio": f"{i}.{suffix}", "question": "Which sound?",
                             "choices": ["a bell", "a drum"], "answer": "a bell"})
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
            cells = []
            for _ in range(2):
                started, cpu = time.perf_counter(), time.process_time()
                read_questions(folder / "rows.jsonl")
                cells.append(f"{time.perf_counter() - started:.1f}, "
                             f"{time.process_time() - cpu:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2900)
