"""What a run is told: one dataclass of fields, a recipe file, and flags that override it.

    config = read_config(["recipes/toy_late.yaml", "--eta", "0.5"])

The defaults are the paper's Table 5 where it has the value. Every help text gives the source of
the default: paper, release (the authors' code), or ours.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_origin

import yaml
from transformers import HfArgumentParser

from data import InputError
from mapo import MapoConfig, described


@dataclass(frozen=True)
class TrainConfig(MapoConfig):
    """All fields of a run. MapoConfig holds those of the equations; this class adds the rest.

    Raises ValueError naming the field when a value is out of range.
    """

    # ── what to train, on what ──
    model: str = described(
        "", "folder of the checkpoint that π_θ starts from, or `toy` for the built-in toy "
        "(paper: Qwen3-Omni-30B-A3B-Thinking)")
    data: str = described(
        "", "jsonl file of training questions, see data.py; with the model `toy`, `caption` or "
        "`late` (paper: AVQA, then a 29k mixture)")
    data_format: str = described(
        "jsonl", "format of data: `jsonl`, our own, or `avqa`, AVQA as R1-AQA writes it (ours)")
    audio_root: str = described(
        "", "folder that the audio paths of AVQA rows start from; empty: the folder of the data "
        "file (ours)")
    instruction: str = described(
        "", "text after the options in the prompt, for a model that must be told the format of "
        "its answer (ours; Appendix G)")
    eval_data: str = described(
        "", "jsonl file for greedy accuracy before and after training; empty: none (ours)")
    output_dir: str = described("runs/run", "folder for everything that the run writes (ours)")
    seed: int = described(0, "seed of the data order, the sampling and new weights (ours)")

    # ── the optimizer ──
    max_steps: int = described(800, "optimizer steps (release)")
    learning_rate: float = described(1e-6, "peak learning rate of AdamW (release)")
    warmup_ratio: float = described(
        0.05, "fraction of the steps in the linear warm-up from 0; a cosine to 0 follows (release)")
    adam_beta1: float = described(0.9, "AdamW β1 (release)")
    adam_beta2: float = described(0.95, "AdamW β2 (release)")
    weight_decay: float = described(0.1, "AdamW weight decay, on matrices only (release)")
    max_grad_norm: float = described(1.0, "gradient-norm clip (release)")
    generation_batch_size: int = described(
        768, "completions per generation batch (paper, Table 5)")
    steps_per_generation: int = described(
        4, "optimizer steps per generation batch (paper, Table 5)")
    micro_batch_size: int = described(
        0, "most completions of a forward; 0: no limit; changes memory, not the gradient (ours)")
    micro_batch_tokens: int = described(
        8192, "most tokens of a forward, prompts and completions with their padding, but at least "
        "one completion; 0: no limit; changes memory, not the gradient (ours)")

    # ── sampling ──
    temperature: float = described(
        1.2, "sampling temperature; π_θ, π_ref and π_text-ref are also taken at it (paper, "
        "Table 5)")
    top_k: int = described(50, "top-k of the sampler; 0 is off (paper, Table 5)")
    top_p: float = described(0.99, "top-p of the sampler (paper, Table 5)")
    repetition_penalty: float = described(
        1.0, "repetition penalty of the sampler (paper, Table 5)")
    max_new_tokens: int = described(1200, "longest completion, in tokens (release)")
    mask_truncated: bool = described(
        False, "leave completions that were cut at max_new_tokens out of every mean (ours; "
        "release: on)")

    # ── the attention mass a_t ──
    target_layers: list[int] = field(
        default_factory=lambda: [43, 44, 45, 46, 47],
        metadata={"help": "L_tgt, the decoder layers of a_t, 0-based (paper, Table 5)"})
    mass_interval: int = described(
        10, "with eta 0, measure a_t (without gradient) every this many steps (ours)")

    # ── rewards ──
    reward_weights: list[float] = field(
        default_factory=lambda: [2.0, 1.0, 1.0],
        metadata={"help": "λ_acc λ_format λ_cons of Eq. 6 (paper)"})
    format_style: str = described(
        "think", "`think`: <think>…</think> answer; `reasoning`: <reasoning>…</reasoning>"
        "<answer>…</answer> (paper, Appendix G)")
    checker: str = described(
        "", "the consistency checker: base URL of an OpenAI-compatible server (key in "
        "CHECKER_API_KEY), the folder of a model to start vLLM on, or `rule` for a rule without "
        "a model (paper: vLLM)")
    checker_model: str = described(
        "Qwen3-30B-A3B-Instruct", "name of the checker's model on its server (paper)")
    checker_flags: str = described(
        "", "extra vLLM flags for the checker's server, in one string (ours)")

    # ── what is trained, and how ──
    lora_rank: int = described(
        0, "LoRA rank; 0 trains all parameters of the decoder (release: 128)")
    lora_alpha: int = described(512, "LoRA α (release)")
    freeze_audio_tower: bool = described(
        True, "do not train the audio encoder and its projection (ours)")
    fp32_head: bool = described(
        True, "compute the logits' product in fp32 when the model is in bf16, here and on the vLLM "
        "server (ours)")
    gradient_checkpointing: bool = described(
        True, "recompute activations in the backward pass (ours)")
    offload_reference: bool = described(
        False, "keep the sharded π_ref on the CPU between its forwards (ours)")

    # ── rollouts ──
    rollout: str = described(
        "local", "where completions are sampled: `local`, in this process, or `vllm`, on a vLLM "
        "server (paper)")
    vllm_python: str = described(
        ".venv-vllm/bin/python", "Python interpreter of the vLLM environment that `make vllm` "
        "builds; relative to train.py (ours)")
    vllm_url: str = described(
        "", "a vLLM server that is already running, used in place of one of our own; key in "
        "VLLM_API_KEY (ours)")
    vllm_flags: str = described(
        "", "extra vLLM flags for the rollout server, in one string: --vllm_flags=\"…\" (ours)")
    async_rollouts: bool = described(
        False, "sample the next generation batch while this one trains; its weights are then one "
        "push old (ours)")
    check_push_every: int = described(
        10, "compare the server's log-probs with the trainer's at the start, after the first "
        "push, and then every this many iterations (ours)")
    max_push_gap: float = described(
        0.1, "mean difference of those log-probs that stops the run, nats per token (ours)")
    rollout_nodes: int = described(
        -1, "how many of torchrun's nodes serve vLLM and do not train: 0, or 1 (the last); -1: 1 "
        "if there are several nodes (paper: 1 of 4)")

    # ── saving and logging ──
    save_every: int = described(
        50, "optimizer steps between the states that a run can resume from; 0: none (ours)")
    export_every: int = described(
        0, "optimizer steps between checkpoints; 0 writes only the last one (ours)")
    resume: bool = described(False, "continue from the newest state in output_dir (ours)")
    overwrite: bool = described(
        False, "before the first step, remove the run in output_dir; without it, and "
        "without resume, such a folder is refused (ours)")
    report_to: str = described(
        "none", "`tensorboard` or `wandb` through accelerate's trackers, or `none` (ours)")

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_steps", "generation_batch_size", "steps_per_generation",
                     "max_new_tokens", "learning_rate", "temperature", "mass_interval",
                     "max_grad_norm", "repetition_penalty", "lora_alpha", "check_push_every",
                     "max_push_gap"):
            self._check(name, self._number(name) > 0, "a finite number above 0")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            self._check(name, 0 <= self._number(name) < 1, "at least 0 and below 1")
        for name in ("top_k", "lora_rank", "weight_decay", "save_every", "export_every",
                     "micro_batch_size", "micro_batch_tokens"):
            self._check(name, self._number(name) >= 0, "at least 0")
        if not self.micro_batch_size and not self.micro_batch_tokens:
            raise ValueError("micro_batch_size and micro_batch_tokens are both 0, i.e. without a "
                             "limit: give one of them")
        self._check("top_p", 0 < self._number("top_p") <= 1, "above 0 and at most 1")
        self._check("seed", 0 <= self.seed < 2**31, "from 0 to 2³¹ − 1")
        self._check("output_dir", bool(self.output_dir), "a folder")
        self._check("reward_weights",
                    len(self.reward_weights) == 3 and all(map(math.isfinite, self.reward_weights)),
                    "three finite numbers, λ_acc λ_format λ_cons")
        for divisor in ("group_size", "steps_per_generation"):
            if self.generation_batch_size % getattr(self, divisor):
                raise ValueError(f"generation_batch_size {self.generation_batch_size} is not a "
                                 f"multiple of {divisor} {getattr(self, divisor)}")
        for name, allowed in (("data_format", ("jsonl", "avqa")),
                              ("format_style", ("think", "reasoning")),
                              ("rollout", ("local", "vllm")),
                              ("report_to", ("none", "tensorboard", "wandb"))):
            self._check(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        self._check("rollout_nodes", self.rollout_nodes in (-1, 0, 1), "-1, 0 or 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both true: choose one")
        if self.async_rollouts and self.rollout != "vllm":
            raise ValueError("async_rollouts needs rollout vllm: a single process cannot sample "
                             "and train at the same time")

    @property
    def step_size(self):
        """Completions of one optimizer step."""
        return self.generation_batch_size // self.steps_per_generation

    @property
    def iterations(self):
        """Iterations of Algorithm 1, i.e. generation batches; the last one may be cut short."""
        return math.ceil(self.max_steps / self.steps_per_generation)

    @property
    def audio_tower_is_frozen(self):
        """LoRA trains its adapters alone, and those are in the text decoder."""
        return self.freeze_audio_tower or self.lora_rank > 0


# Fields that a resumed run may change: where and how it runs, not what it computes. The rows behind
# `data` and `eval_data` must be the same, see checkpoint.resume.
MAY_CHANGE = {"data", "eval_data", "audio_root", "output_dir", "resume", "overwrite", "report_to",
              "micro_batch_size", "micro_batch_tokens", "gradient_checkpointing", "save_every",
              "export_every", "rollout_nodes", "offload_reference", "rollout", "vllm_python",
              "vllm_url", "vllm_flags", "checker_flags", "check_push_every", "max_push_gap"}


def vllm_python(config):
    """Path of the interpreter that runs vLLM."""
    return Path(__file__).resolve().parent / config.vllm_python


def read_config(arguments, description=None):
    """Command line → TrainConfig: an optional recipe (yaml) first, then flags, which override it.

    Raises InputError for an unknown field or a bad value.
    """
    parser = HfArgumentParser(TrainConfig, usage="train.py [RECIPE.yaml] [--FIELD VALUE ...]",
                              description=description)

    def refuse(message):
        raise InputError(f"{message}; see python train.py --help")

    parser.error = refuse
    flags = []
    if arguments and not arguments[0].startswith("-"):
        recipe, arguments = Path(arguments[0]), arguments[1:]
        for name, value in read_recipe(recipe).items():
            flags += ([f"--{name}", *map(str, value)] if isinstance(value, list)
                      else [f"--{name}={value}"])
    try:
        return parser.parse_args_into_dataclasses([*flags, *arguments],
                                                  look_for_args_file=False)[0]
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config: {error}") from error


def ask_as_in_training(options):
    """Fills options.instruction and options.format_style, where they are None.

    They are those of the run that wrote the checkpoint options.model, if its config.yaml is beside
    the checkpoint, else "" and "think". Prints a value that is not one of these two. Several
    models (a dict) are asked alike. Raises InputError if their runs differ.
    """
    fields = {"instruction": "", "format_style": "think"}
    missing = [name for name in fields if getattr(options, name) is None]
    models = options.model.values() if isinstance(options.model, dict) else [options.model]
    files = [Path(os.path.abspath(folder)).parent / "config.yaml" for folder in models
             if re.fullmatch(r"checkpoint(-\d+)?", Path(os.path.abspath(folder)).name)]
    told = {file: fields | read_recipe(file) for file in files if missing and file.is_file()}
    for name in missing:
        values = {run[name] for run in told.values()} or {fields[name]}
        if len(values) > 1:
            raise InputError(f"--model: the runs of these checkpoints have {len(values)} values of "
                             f"{name}; give --{name}")
        setattr(options, name, values.pop())
        if getattr(options, name) != fields[name]:
            print(f"{next(iter(told))}: {name} {getattr(options, name)!r}, as in training")


def read_recipe(path):
    """Yaml file of fields → dict. Raises InputError naming the file and the unknown key."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such recipe; the folder recipes/ has some")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    # Bad dates, numbers and tags raise Python's own errors. RecursionError: too many brackets.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not valid yaml ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a {type(recipe).__name__}; write one `field: value` per line")
    one = (bool, int, float, str)
    allowed = {f.name: (list, *one) if get_origin(f.type) is list else one
               for f in dataclasses.fields(TrainConfig)}
    for key, value in recipe.items():
        if key not in allowed:
            raise InputError(f"{path}: unknown field {key!r}; python train.py --help lists the "
                             "fields")
        if value is None:
            raise InputError(f"{path}: field {key!r} has no value; give one or remove the line")
        if not isinstance(value, allowed[key]) or re.search("[\ud800-\udfff]", str(value)):
            raise InputError(f"{path}: field {key!r} is {value!r}; give a number or a text of "
                             "whole characters in quotes, or a list where the field takes one")
    return recipe
