"""evaluate.py hide: greedy completions whose late tokens cannot see the audio."""

import copy

import pytest
import torch
from transformers import AttentionInterface

import evaluate
import hide
import tiny
from model import positions
from rollout import Sampling, sample

LONGEST = 12


MODELS = {"qwen3_omni": lambda: tiny.qwen3_omni(dtype=torch.float64, experts="eager"),
          "qwen2_audio": lambda: tiny.qwen2_audio(dtype=torch.float64),
          "qwen2_5_omni": lambda: tiny.qwen2_5_omni(dtype=torch.float64)}


@pytest.fixture(params=MODELS)
def greedy(request, tmp_path):
    """policy, prompts of three lengths, greedy completions"""
    policy = MODELS[request.param]()
    prompts = [policy.encode(q) for q in tiny.questions(tmp_path)]
    sampling = Sampling(temperature=0, max_new_tokens=LONGEST)
    return policy, prompts, sample(policy, prompts, 1, sampling, seed=0)


def finish_slowly(policy, prompt, kept, layers):
    """One question, without a cache: all rows are computed again for each new token."""
    ids, first = list(prompt.ids) + kept, len(prompt.ids) + len(kept) - 1

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Softmax attention with a mask that is built row by row."""
        length, groups = query.shape[2], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        for row in range(length):
            for column in range(length):
                unseen = (row >= first and ids[column] == policy.audio_token_id
                          and module.layer_idx in layers)
                if column > row or unseen:
                    scores[:, :, row, column] = -torch.inf
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("by_hand", attention)
    policy = copy.deepcopy(policy)
    policy.base.set_attn_implementation({"text_config": "by_hand"})
    while len(ids) < len(prompt.ids) + LONGEST:
        batch = policy.collate([prompt], [ids[len(prompt.ids):] or [0]])
        whole, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
        hidden = policy.base.model(input_ids=whole, attention_mask=mask, use_cache=False,
                                   position_ids=positions(mask), **batch.audio).last_hidden_state
        scores = policy.base.lm_head(hidden[0, -1])
        scores[policy.placeholder_ids] = -torch.inf
        ids.append(int(scores.argmax()))
        if ids[-1] in policy.eos_ids:
            break
    return ids[len(prompt.ids):]


@torch.no_grad()
@pytest.mark.parametrize("layers", [[], [1], [0, 1, 2]])
def test_against_attention_by_hand(greedy, layers):
    policy, prompts, completions = greedy
    texts = hide.finish_without_audio(policy, prompts, completions, layers, 0.5, LONGEST)
    for prompt, completion, text in zip(prompts, completions, texts):
        kept = completion.token_ids[:len(completion.token_ids) // 2]
        expected = finish_slowly(policy, prompt, kept, layers)
        assert [text] == hide.finish_without_audio(policy, [prompt], [completion], layers, 0.5,
                                                   LONGEST), "alone, without padding"
        assert text == policy.tokenizer.decode(expected, skip_special_tokens=True)


def test_nothing_hidden_gives_the_completion_again(greedy):
    policy, prompts, completions = greedy
    texts = hide.finish_without_audio(policy, prompts, completions, [], 0.5, LONGEST)
    assert texts == [policy.decode(completion) for completion in completions]


def test_hidden_audio_changes_something_and_is_visible_again_afterwards(greedy):
    policy, prompts, completions = greedy
    everywhere = list(range(policy.num_layers))
    texts = hide.finish_without_audio(policy, prompts, completions, everywhere, 0, LONGEST)
    assert texts != [policy.decode(completion) for completion in completions]
    again = sample(policy, prompts, 1, Sampling(temperature=0, max_new_tokens=LONGEST), seed=0)
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]


def test_the_command(tmp_path, capsys):
    """A table with one row per model and one column per set of layers."""
    world = tiny.write_world(tmp_path / "world", tiny.qwen3_omni_that_ends(0.3))
    assert evaluate.main(["hide", "--model", f"a={world / 'model'}", "--model",
                          f"b={world / 'model'}", "--data", str(world / "train.jsonl"),
                          "--max_new_tokens", "8", "--target_layers", "1", "2",
                          "--batch_size", "4", "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "hide.md").read_text().splitlines()
    assert lines[0] == ("| model | none | L_tgt | all layers | all but L_tgt | layer 0 | layer 1 | "
                        "layer 2 |")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["a", "b"]
    assert capsys.readouterr().out.startswith(lines[0])


@pytest.mark.parametrize("after", ["-0.1", "1.5", "nan"])
def test_the_share_must_be_one(after, tmp_path, capsys):
    assert evaluate.main(["hide", "--model", "m", "--data", "d", "--after", after,
                          "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --after: give a share from 0 to 1")
