"""Qwen's real vocabulary, as the tokenizer files of a Qwen3-Omni checkpoint folder.

The package dashscope ships the 151,643 tokens with their ranks in a file of the library tiktoken.
transformers' converter turns the ranks into merges. It lists every pair of tokens that makes up a
token, where the original merges.txt has one pair per token; the ids are the same.
"""

import importlib.util
import json
import os
from pathlib import Path
from unittest.mock import patch

import tiktoken.load
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

# The tokens that Qwen3-Omni adds, from id 151643 on, and those that are not flagged special.
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
    "<think> </think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> "
    "<tts_text_bos_single> <|audio_pad|>").split()
NOT_SPECIAL = set(ADDED[ADDED.index("<tool_call>"):ADDED.index("<|audio_start|>")])


def tiktoken_file():
    """Path of the vocabulary in the installed package dashscope, which is not imported."""
    package = importlib.util.find_spec("dashscope")
    if package is None:
        raise LookupError("Qwen's vocabulary is missing; install it with `pip install --no-deps "
                          "dashscope==2.0.2`")
    return Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


def read_ranks():
    """→ {bytes of a token: its id}."""
    with patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):  # else it keeps a copy in /tmp, by path
        return tiktoken.load.load_tiktoken_bpe(str(tiktoken_file()))


def write_vocabulary(folder):
    """Writes vocab.json and merges.txt into an existing folder. Takes about three seconds."""
    with patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):
        vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(
            str(tiktoken_file()))
    Qwen2Tokenizer(vocab=vocabulary, merges=merges).backend_tokenizer.model.save(str(folder))


def write_config(folder, template, think_is_special=False):
    """Writes tokenizer_config.json and chat_template.json, with the flags of Qwen3-Omni's."""
    def is_special(token):
        return token not in NOT_SPECIAL or think_is_special and "think>" in token

    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "errors": "replace",
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "bos_token": None,
        "unk_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": [t for t in ADDED[1:] if is_special(t)],
        "extra_special_tokens": {
            "audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>", "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>"},
        "added_tokens_decoder": {151643 + i: {"content": token, **plain,
                                              "special": is_special(token)}
                                 for i, token in enumerate(ADDED)}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
