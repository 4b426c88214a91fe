"""Qwen's real vocabulary: ids, the POS gate, rewards, prompts and instructions.

The ids are compared with the library tiktoken, the gate with NLTK's own word and sentence
splitters, prompts with ids that are put together by hand. completions.txt holds long completions
of our own, in the manner of a thinking model: prose, Markdown, LaTeX, Chinese, emoji, code.
"""

import json
import re
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import qwen_vocabulary
import real_models
import tiktoken
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize import NLTKWordTokenizer, PunktTokenizer
from test_model import audio_tokens, error_of, frame_count, samples_of
from test_pos_gate import substantive
from transformers import AutoTokenizer, WhisperFeatureExtractor

import evaluate
import pos_gate
import rollout
from benchmarks import Item, load_sentence_splitter
from checkpoint import load_policy, save_policy
from config import read_config
from pos_gate import FORMAT_TAG, load_tagger, pos_gate_batch
from rewards import (accuracy_reward, format_reward, rule_consistency_rewards, think_is_prefilled)
from run import check_policy
from train import main

HERE = Path(__file__).resolve().parent
COMPLETIONS = (HERE / "completions.txt").read_text(encoding="utf-8").split("%%%%\n")
# How Qwen cuts a text before the merges: its tokenizer for tiktoken, released with Qwen-7B in 2023.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = COMPLETIONS + [
    "", " ", "\n", "\r\n\r\n \t x", "a  b   c    ", "I'm, you'RE, they'LL'd; it’s it'Stop",
    "1234567890 3.14", "cafe\u0301 = café, A\u030a = Å, q\u0307\u0323",
    "\u1112\u1161\u11ab 한 ﬁ ² Ⅷ ｆｕｌｌ", "👩🏽\u200d🚀 🇧🇷 ❤\ufe0f", "ไทย हिन्दी العربية",
    "中文，没有空格。日本語です\u3000", "\u200b\u00a0\u2028x\u0000\ufeff",
    "def f(x):\n\treturn x**2\n",
    "# Title\n\n* **a**\n* _b_\n\n---\n| x | y |\n```py\n```",
    "<reasoning>a</reasoning>\n<answer>b</answer>", "<think", "< think>", "<|im_end |>",
    "$\\frac{1}{2}$", "-" * 300, "ha" * 200, "🎵" * 50]


@pytest.fixture(scope="module")
def oracle():
    """The library tiktoken with Qwen's ranks and pattern. Qwen normalises to NFC before it."""
    ranks = qwen_vocabulary.read_ranks()
    assert len(ranks) == 151_643
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder like Qwen3-Omni's: a small model with the real tokenizer's files."""
    parts, folder = (tmp_path_factory.mktemp(name) for name in ("parts", "checkpoint"))
    qwen_vocabulary.write_vocabulary(parts)
    qwen_vocabulary.write_config(parts, tiny.CHAT_TEMPLATE)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(parts)
    policy = tiny.qwen3_omni(layers=1, tokenizer=AutoTokenizer.from_pretrained(parts))
    policy.folder = parts
    save_policy(policy, folder)
    assert not (folder / "tokenizer.json").exists()  # Qwen3-Omni's has none
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    """<think> and </think> are added tokens that are not special, as on the hub."""
    return load_policy(folder)


@pytest.fixture(scope="module")
def special_policy(folder, tmp_path_factory):
    """The same with both flagged special, and a chat template that opens the thinking block."""
    other = shutil.copytree(folder, tmp_path_factory.mktemp("special") / "checkpoint")
    template = tiny.CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
    qwen_vocabulary.write_config(other, template, think_is_special=True)
    return load_policy(other, meta=True)


@pytest.fixture(scope="module", params=["plain", "special"])
def either(request):
    """Both policies, one after the other."""
    return request.getfixturevalue({"plain": "policy", "special": "special_policy"}[request.param])


@pytest.fixture
def questions(tmp_path):
    return tiny.questions(tmp_path)


def encode(policy, text):
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


def completed(policy, text, finish_reason="stop"):
    """The Completion that says `text`."""
    ids = encode(policy, text + "<|im_end|>" * (finish_reason == "stop"))
    return rollout.Completion(ids, [-1.0] * len(ids), finish_reason)


# ──────── ids ────────


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_equal_tiktokens(policy, oracle, text):
    text = FORMAT_TAG.sub("", text) if text in COMPLETIONS else text
    ids = encode(policy, text)
    assert ids == oracle.encode_ordinary(unicodedata.normalize("NFC", text))
    assert policy.tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.fixture(scope="module")
def any_text(oracle):
    """Texts of any characters, and of tokens of the vocabulary side by side."""
    tokens = [token.decode(errors="replace") for token in oracle.token_byte_values()]
    tokens = sorted(token for token in tokens if "\ufffd" not in token)
    assert len(tokens) > 149_000
    return st.lists(st.sampled_from(tokens) | st.text(max_size=8) | st.sampled_from("'  \n\n\r1é"),
                    max_size=20).map("".join)


def test_ids_of_any_text_equal_tiktokens(policy, oracle, any_text):
    @settings(max_examples=300, deadline=None)
    @given(text=any_text)
    def compare(text):
        text = unicodedata.normalize("NFC", text)
        if not policy.control_tokens.search(text):
            assert encode(policy, text) == oracle.encode_ordinary(text)

    compare()


def test_the_bytes_of_every_token(policy):
    """The gate's table of bytes, against the file."""
    table = pos_gate._piece_bytes(policy.tokenizer)
    ranks = qwen_vocabulary.read_ranks()
    assert all(table[number] == token for token, number in ranks.items())
    assert len(table) == len(ranks) + len(qwen_vocabulary.ADDED)


def test_every_added_token_is_one_id(policy):
    ids = policy.tokenizer.convert_tokens_to_ids(qwen_vocabulary.ADDED)
    assert ids == list(range(151_643, 151_676))
    assert encode(policy, "".join(qwen_vocabulary.ADDED)) == ids


def test_the_ids_that_the_config_of_the_real_model_names(policy, special_policy):
    thinker = real_models.omni_config().thinker_config
    ids = policy.tokenizer.convert_tokens_to_ids
    assert policy.audio_token_id == ids("<|audio_pad|>") == thinker.audio_token_id
    assert ids("<|audio_start|>") == thinker.audio_start_token_id
    assert ids("<|audio_end|>") == thinker.audio_end_token_id
    assert policy.placeholder_ids == sorted((thinker.audio_token_id, thinker.image_token_id,
                                             thinker.video_token_id))
    assert policy.eos_ids == [ids("<|im_end|>")]
    think = {ids("<think>"), ids("</think>")}
    assert not think & set(policy.tokenizer.all_special_ids)
    assert think < {i for i, token in special_policy.tokenizer.added_tokens_decoder.items()
                    if token.special}
    assert policy.hidden_ids == special_policy.hidden_ids and len(policy.hidden_ids) == 21


# ──────── the POS gate ────────


def nltk_gate(text, offsets):
    """The gate from NLTK's own sentence and word splitters and its tagger, on the decoded text.

    offsets: (start, end) of each token's characters, from the library tokenizers.
    """
    load_sentence_splitter()
    marked = [False] * len(text)
    for start, end in PunktTokenizer().span_tokenize(text):
        sentence = text[start:end]
        spans = NLTKWordTokenizer().span_tokenize(sentence)
        words = NLTKWordTokenizer().tokenize(sentence)
        for (first, last), (word, tag) in zip(spans, load_tagger().tag(words), strict=True):
            if substantive(tag) and re.search(r"[^\W_]", word):
                marked[start + first:start + last] = [True] * (last - first)
    return [int(any(marked[start:end])) for start, end in offsets]


def test_the_gate_agrees_with_nltk_on_long_completions(policy):
    """On 96.5 % of 3,451 tokens. Most of the others are marks that NLTK joins with a word.

    Of the tokens with a letter or digit, outside format tags and Chinese, 99.3 % agree.
    """
    agree, words, lengths = [], [], []
    for text in COMPLETIONS:
        encoding = policy.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        assert policy.tokenizer.decode(ids) == text
        (gate,), (fell_back,) = pos_gate_batch([ids], policy.tokenizer)
        assert not fell_back and len(gate) == len(ids) and set(gate) == {0, 1}
        assert 0.4 < sum(gate) / len(gate) < 0.7
        same = [a == b for a, b in zip(gate, nltk_gate(text, offsets), strict=True)]
        agree += same
        words += [value for value, (start, end) in zip(same, offsets)
                  if re.search(r"[^\W_]", piece := text[start:end]) and "think>" not in piece
                  and not re.search("[\u3000-\u9fff]", piece)]
        lengths.append(len(ids))
    assert min(lengths) > 300 and max(lengths) > 1200
    assert sum(agree) >= 0.96 * len(agree)
    assert sum(words) >= 0.99 * len(words)


def test_the_gate_does_not_depend_on_the_flags_of_the_tags(policy, special_policy):
    texts = [*COMPLETIONS, "<think>of a dog</think>dog of"]  # a tag ends a word
    batch = [encode(policy, text) for text in texts]
    assert batch == [encode(special_policy, text) for text in texts]
    assert pos_gate_batch(batch, policy.tokenizer) == pos_gate_batch(batch,
                                                                     special_policy.tokenizer)


@pytest.mark.parametrize("text, gates", [
    ("in 怨言", ["0", "00", "011", "0111"]),  # the space and 怨 are two tokens
    ("the ꦗꦮ", ["0", "00", "000", "0111", "01111"]),
    ("of 🫧 the", ["0", "00", "000", "0000", "00000"])])
def test_tokens_inside_a_character(policy, text, gates):
    """All parts of a character get its word's gate, unless the completion is cut between them."""
    ids = encode(policy, text)
    assert any("\ufffd" in policy.tokenizer.decode([i]) for i in ids)
    found, _ = pos_gate_batch([ids[:cut + 1] for cut in range(len(ids))], policy.tokenizer)
    assert ["".join(map(str, gate)) for gate in found] == gates


# ──────── rewards of decoded completions ────────

OPTIONS = ("a bell", "a dog", "C♯ – 3.5 kHz", "café")


@pytest.mark.parametrize("thinking", [text.split("</think>")[0].removeprefix("<think>")
                                      for text in COMPLETIONS])
@pytest.mark.parametrize("answer", range(len(OPTIONS)))
def test_rewards_of_a_right_completion(either, thinking, answer):
    option = OPTIONS[answer]
    prefilled = "<think>" in either.tokenizer.chat_template
    text = f"{thinking.rstrip()} So it is {option}.\n</think>\n\n{option}"
    text = text if prefilled else f"<think>{text}"
    decoded = either.decode(completed(either, text))
    assert decoded == text
    assert accuracy_reward(decoded, option, OPTIONS) == 1
    assert accuracy_reward(decoded, OPTIONS[answer - 1], OPTIONS) == 0
    assert format_reward(decoded, prefilled=prefilled) == 1
    assert rule_consistency_rewards([decoded]) == [1]


@pytest.mark.parametrize("said", [
    "a bell", "A bell.", "A", "(A)", "**A. a bell**", "The answer is A.", "Answer: A",
    "**Answer:** a bell", "\\boxed{A}", "$\\boxed{\\text{a bell}}$", "<answer>A. a bell</answer>",
    "“a bell”", "Ａ．a bell", "答案：A"])
def test_forms_of_the_right_answer(either, said):
    """All but the last, whose lead is Chinese."""
    decoded = either.decode(completed(either, f"<think>I hear a bell.</think>\n\n{said}"))
    assert accuracy_reward(decoded, "a bell", OPTIONS) == float(said != "答案：A")
    assert format_reward(decoded) == 1


@pytest.mark.parametrize("text, accuracy, form, rule", [
    ("<think>It is a bell.</think>a bell", 1, 1, 1),
    ("<think>\nIt is a bell.\n</think>\n\nA", 1, 1, 0),  # the rule compares words
    ("<think>It is a dog.</think>a bell", 1, 1, 0),
    ("<think>It is a bell</think>a bell", 1, 1, 0),  # without a full stop
    ("<think>It is a", 0, 0, 0),
    ("<think>It is a bell.</think>", 0, 0, 0),
    ("<think>It is a bell.</think>\n\n", 0, 0, 0),
    ("<think></think>a bell", 1, 0, 0),
    ("<think>It is a bell.</think>a bell</think>a dog", 0, 0, 0),  # the last one counts
    ("<think>It is a dog.</think>a dog</think>a bell", 1, 0, 0),
    ("<think>It<think> is a bell.</think>a bell", 1, 0, 1),
    ("Well. <think>It is a bell.</think>a bell", 1, 0, 1),
    ("a bell", 0, 0, 0), ("", 0, 0, 0)])
@pytest.mark.parametrize("path", ["here", "vllm", "evaluation"])
def test_rewards_of_other_completions(either, questions, monkeypatch, path, text, accuracy, form,
                                      rule):
    """Sampled in this process, read from a vLLM server's answer, and in evaluate.py."""
    finish_reason = "length" if text.endswith("It is a") else "stop"
    completion, question = completed(either, text, finish_reason), questions[0]
    prompt = either.encode(question)
    if path == "vllm":
        content = [{"logprob": -1.0} for _ in completion.token_ids]
        choice = {"index": 0, "finish_reason": finish_reason, "logprobs": {"content": content},
                  "token_ids": completion.token_ids}
        answer = {"prompt_token_ids": prompt.ids, "choices": [choice]}
        [completion] = rollout._read(answer, either, prompt, 1)
    decoded = either.decode(completion)
    if path == "evaluation":
        monkeypatch.setattr(evaluate, "sample", lambda *_, **__: [completion])
        options = SimpleNamespace(instruction="", temperature=0, max_new_tokens=4, seed=0)
        item = Item(question.id, question.audio, question.question, question.choices, "a bell",
                    {})
        [row], _ = evaluate.complete(either, None, [item], options)
        decoded = row["text"]
    assert decoded == text
    assert accuracy_reward(decoded, "a bell", OPTIONS) == accuracy
    assert format_reward(decoded) == form
    assert rule_consistency_rewards([decoded]) == [rule]


def test_a_template_that_opens_the_block(policy, special_policy, questions):
    """The completion then starts inside it, and must not open it again."""
    for each, opened in ((policy, False), (special_policy, True)):
        prompt = each.encode(questions[0], "Think inside <think></think>.")
        assert think_is_prefilled(each.tokenizer, prompt) is opened
        for text, good in (("It is a bell.\n</think>\n\na bell", opened),
                           ("<think>It is a bell.</think>a bell", not opened)):
            decoded = each.decode(completed(each, text))
            assert format_reward(decoded, prefilled=opened) == good
            assert accuracy_reward(decoded, "a bell", OPTIONS) == 1
            assert rule_consistency_rewards([decoded]) == [1]
        cut = each.decode(completed(each, "Is it a bell, or perhaps", "length"))
        assert format_reward(cut, prefilled=opened) == accuracy_reward(cut, "a bell", OPTIONS) == 0


# ──────── prompts ────────


def prompt_ids(oracle, policy, question, instruction="", with_audio=True, opened=False):
    """The prompt put together by hand: no system prompt, the clips, then the text."""
    added = dict(zip(qwen_vocabulary.ADDED, range(151_643, 151_676)))
    lines = [question.question, "Choose one of these options:",
             *(f"{letter}. {choice}" for letter, choice in zip("ABC", question.choices))]
    text = "\n".join([*lines, instruction] if instruction else lines)
    clips = []
    for path in question.audio if with_audio else ():
        frames = frame_count("qwen3_omni", samples_of("qwen3_omni", path))
        clips += [added["<|audio_start|>"], *[added["<|audio_pad|>"]]
                  * audio_tokens("qwen3_omni", frames), added["<|audio_end|>"]]
    plain = oracle.encode_ordinary
    return [added["<|im_start|>"], *plain("user\n"), *clips, *plain(text), added["<|im_end|>"],
            *plain("\n"), added["<|im_start|>"], *plain("assistant\n"),
            *([added["<think>"], *plain("\n")] if opened else [])]


def test_prompts_by_hand(policy, special_policy, questions, oracle):
    """For one clip and for two, with and without audio and an instruction."""
    for each, opened in ((policy, False), (special_policy, True)):
        for question in questions:
            for instruction in ("", "Answer with the option’s text, e.g. “a bell”."):
                prompt = each.encode(question, instruction)
                assert prompt.ids == prompt_ids(oracle, each, question, instruction, True, opened)
                assert prompt.text_ids == prompt_ids(oracle, each, question, instruction, False,
                                                     opened)


@pytest.mark.parametrize("token", qwen_vocabulary.ADDED)
def test_control_tokens_in_a_question_are_refused(either, questions, token):
    """By encode, which every command uses. An instruction may hold the tags of the format."""
    for changed in ({"question": f"What is {token}?"}, {"choices": ("a", f"{token} b", "c")}):
        question = SimpleNamespace(**vars(questions[0]) | changed)
        assert f"contains {token}, a control token" in error_of(either.encode, question)
    if FORMAT_TAG.fullmatch(token):
        assert either.tokenizer.convert_tokens_to_ids(token) in either.encode(
            questions[0], f"Write {token}.").ids
    else:
        assert f"'instruction' contains {token}" in error_of(either.encode, questions[0], token)


def test_the_template_beside_a_text_only_one(folder, policy, questions, tmp_path):
    """chat_template.json is used, not the template of tokenizer_config.json."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ '<|im_start|>' + messages[0].content }}"
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    other = load_policy(copy, meta=True)
    assert other.encode(questions[0]).ids == policy.encode(questions[0]).ids


# ──────── the recipes' instructions ────────

RECIPES = sorted((HERE.parent / "recipes").glob("*.yaml"))


def literal_answer(instruction, option):
    """The answer that an instruction asks for, word for word.

    Its empty blocks are filled in their order: the first ends with the option and a full stop, and
    the second is the option. Where there is no second one, the option follows the first.
    """
    first, *rest = re.findall(r"<(\w+)></\1>", instruction)
    assert "end with the option that you choose and a full stop" in instruction
    answer = "\n".join(f"<{block}>{option}</{block}>" for block in rest) or option
    return f"<{first}>I hear it from the start. It is {option}.</{first}>\n{answer}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_an_answer_that_follows_the_instruction_earns_every_reward(policy, questions, oracle,
                                                                   recipe):
    """Recipes for models that do not think by themselves have one; the others have none."""
    config = read_config([str(recipe)])
    assert bool(config.instruction) == (config.format_style == "reasoning")
    if not config.instruction:
        return
    assert config.instruction == " ".join(config.instruction.split())  # one line of the prompt
    question = questions[0]
    prompt = policy.encode(question, config.instruction)
    assert prompt.ids == prompt_ids(oracle, policy, question, config.instruction)
    check_policy(policy, questions, (0,), config.instruction)
    other = {"think": "reasoning", "reasoning": "think"}[config.format_style]
    for option in (question.answer, f"B. {question.answer}"):  # options are shown with letters
        text = literal_answer(config.instruction, option)
        decoded = policy.decode(completed(policy, text))
        assert decoded == text
        for style, earned in ((config.format_style, 1), (other, 0)):
            assert format_reward(decoded, style) == earned
            assert accuracy_reward(decoded, question.answer, question.choices, style) == earned
            assert rule_consistency_rewards([decoded], style) == [earned]


# ──────── a run ────────


def test_a_run_says_that_no_completion_has_the_format(folder, questions, tmp_path, capsys):
    """One step with the real vocabulary and random weights."""
    rows = [{"id": q.id, "audio": [clip.name for clip in q.audio], "question": q.question,
             "choices": list(q.choices), "answer": q.answer} for q in questions]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = tiny.arguments(tmp_path, tmp_path / "out", "--model", folder, "--target_layers", "0",
                           "--max_steps", "1", "--generation_batch_size", "8",
                           "--steps_per_generation", "1", "--max_new_tokens", "6")
    assert main(flags) == 0
    assert "only 0 of the first 8 completions earned the format" in capsys.readouterr().err
    rows = tiny.lines(tmp_path / "out" / "completions.jsonl")
    assert len(rows) == 8 and {row["reward_total"] for row in rows} == {0}
    ids = {i for row in rows for i in row["token_ids"]}
    assert max(ids) > 100_000 and not ids & {151_675, 151_655, 151_656}
    assert (tmp_path / "out" / "checkpoint" / "merges.txt").is_file()
