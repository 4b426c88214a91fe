"""Questions about General MIDI sounds: which instrument is heard, alone, first or second.

    python examples/real_parts/questions.py FOLDER      # train.jsonl, test.jsonl, wav/

The sounds are those of the soundfont in the package pretty_midi, played by tinysoundfont. A name
stands for several of its presets ("guitar": nylon, steel, clean). The test questions have two
domains, and each keeps something apart from the training:

- `new instruments`: presets that the training never plays (the jazz guitar);
- `new notes`: presets of the training, on keys that it never plays.
"""

import json
import sys
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from build import package

SPLITS = {"train": 2000, "test": 500}  # numbers of questions, each with a clip of its own
RATE, SECONDS, GAP = 16_000, 0.7, 0.1  # Hz; of one sound and of the silence between two, seconds
# name: (General MIDI presets to train on, presets held out), counted from 0
INSTRUMENTS = {
    "piano": ((0, 1, 3), (2,)), "electric piano": ((4,), (5,)), "xylophone": ((13,), (12,)),
    "music box": ((10, 9), (8,)), "church bell": ((14,), ()), "organ": ((16, 18, 19), (17,)),
    "accordion": ((21,), (23,)), "guitar": ((24, 25, 27), (26,)),
    "distorted guitar": ((29,), (30,)), "bass guitar": ((33, 34), (35,)),
    "violin": ((40,), (110,)), "cello": ((42,), (43,)), "harp": ((46,), ()),
    "drum": ((116,), (117,)), "choir": ((52, 54), (53,)),
    "trumpet": ((56,), (59,)), "tuba": ((58,), (57,)),
    "saxophone": ((64, 65, 67), (66,)), "clarinet": ((71,), (70,)), "flute": ((73, 75), (74,)),
    "banjo": ((105,), (106,)), "bagpipe": ((109,), (111,)), "woodblock": ((115,), ()),
    "seashore": ((122,), ()), "birdsong": ((123,), ()), "telephone": ((124,), ()),
    "helicopter": ((125,), ()), "applause": ((126,), ())}
KEYS = range(50, 78)  # MIDI notes; every third one is for the tests
TEXT = {"one": "Which sound do you hear?", "first": "Which sound comes first?",
        "second": "Which sound comes second?"}


def write_questions(folder):
    """Writes both jsonl files and the clips into folder/wav, always the same ones."""
    import tinysoundfont  # only this function needs it

    (folder / "wav").mkdir(parents=True, exist_ok=True)
    synth = tinysoundfont.Synth(samplerate=RATE)
    font = synth.sfload(str(package("pretty_midi") / "TimGM6mb.sf2"))
    for number, (split, size) in enumerate(SPLITS.items()):
        rng, lines = np.random.default_rng([0, number]), []
        for i in tqdm(range(size), desc=f"{split} clips"):
            domain = "train" if split == "train" else ("new instruments", "new notes")[i % 2]
            row, samples = draw(f"{split}-{i}", domain, synth, font, rng)
            soundfile.write(folder / row["audio"], samples, RATE, "PCM_16")
            lines.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def draw(name, domain, synth, font, rng):
    """→ a row of the jsonl file, and the samples of its clip. Half of the clips hold two sounds.

    `heard` names the sounds in order. The wrong one of two is among the options.
    """
    kind = rng.choice(list(TEXT), p=[0.5, 0.25, 0.25])
    heard = list(rng.choice(list(presets_of(domain)), 1 if kind == "one" else 2, replace=False))
    others = [other for other in INSTRUMENTS if other not in heard]
    options = heard + list(rng.choice(others, 4 - len(heard), replace=False))
    sounds = [play(rng.choice(presets_of(domain)[sound]), rng.choice(keys_of(domain)), synth, font,
                   rng) for sound in heard]
    silence = np.zeros(int(GAP * RATE))
    samples = np.concatenate([sounds[0], *(part for s in sounds[1:] for part in (silence, s))])
    samples += 0.002 * rng.standard_normal(len(samples))  # a room is never quite silent
    return {"id": name, "audio": f"wav/{name}.wav", "question": TEXT[kind],
            "choices": [str(o) for o in rng.permutation(options)],
            "answer": str(heard[kind == "second"]), "domain": domain,
            "heard": [str(sound) for sound in heard]}, samples.clip(-1, 1)


def presets_of(domain):
    """{name: presets that the questions of a domain play}"""
    held_out = domain == "new instruments"
    return {name: presets[held_out] for name, presets in INSTRUMENTS.items() if presets[held_out]}


def keys_of(domain):
    """MIDI notes. `new notes` have keys of their own; `new instruments` are new on every key."""
    if domain == "new instruments":
        return KEYS
    return [key for key in KEYS if (key % 3 == 0) == (domain == "new notes")]


def play(preset, key, synth, font, rng):
    """One note → [samples] at 16 kHz, with a random velocity and loudness."""
    synth.sounds_off()
    synth.program_select(0, font, 0, int(preset))
    synth.noteon(0, int(key), int(rng.integers(70, 120)))
    both = np.frombuffer(bytes(synth.generate(int(SECONDS * RATE))), np.float32)
    synth.sounds_off()
    mono = both.reshape(-1, 2).mean(axis=1)
    return mono / (np.abs(mono).max() + 1e-6) * rng.uniform(0.3, 0.8)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: questions.py FOLDER")
    write_questions(Path(sys.argv[1]))
