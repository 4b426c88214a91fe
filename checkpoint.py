"""Checkpoint folders: load and check a model, save it, add LoRA, and states to resume from.

    policy = load_policy(folder)
    save_checkpoint(policy, output_dir / "checkpoint", team)     # transformers, vLLM and we read it
    save_state(output_dir / "state", step, run, batch)           # resume reads it

Folders are written beside their final place and renamed when whole, so an interrupted run leaves
no half checkpoint.
"""

import contextlib
import copy
import dataclasses
import json
import os
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_state_dict,
                                                     set_state_dict)
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, WhisperFeatureExtractor

from config import MAY_CHANGE
from data import InputError, json_object, parse_json
from distributed import Team
from export import disk_faults, gathered, together, write_weights
from families import family_of
from model import Policy


# ──────── loading ────────


def load_policy(folder, dtype=torch.float32, meta=False):
    """A checkpoint folder → Policy. A whole Omni checkpoint (keys `thinker.*`) gives its thinker.

    meta: on the meta device, i.e. shapes without weights. Reads config.json, the safetensors, the
    tokenizer, the chat template and preprocessor_config.json; uses no network. Dropout is set to 0
    everywhere: old_logp, the update's logp and the sampler must be the same distribution.
    Raises InputError naming the folder or file when a part is missing or broken, when the model is
    of no supported family (families.py), or when the weights do not cover the model.
    """
    folder = Path(folder)
    check_folder(folder)
    try:
        return _load(folder, dtype, meta)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # from transformers
        # A RuntimeError is a broken folder only when shapes do not match. Others are ours, or
        # memory that ran out.
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: cannot be loaded ({reason}); the folder must hold a whole "
                         "transformers checkpoint") from error


def check_folder(folder):
    """Raises InputError for a folder without a config.json."""
    if not os.path.isfile(Path(folder) / "config.json"):
        raise InputError(f"{folder}: no config.json; give the folder of a transformers checkpoint")


def _check_files(folder):
    """Raises InputError for a folder that lacks a file of the processor or the tokenizer."""
    names = {name for name in ("preprocessor_config.json", "tokenizer_config.json",
                               "tokenizer.json", "vocab.json", "tekken.json")
             if (folder / name).is_file()}
    if "tekken.json" in names and "tokenizer.json" not in names:
        raise InputError(
            f"{folder}: tekken.json is for the package mistral-common, which is not used here; "
            "convert it with transformers.integrations.mistral.convert_tekken_tokenizer(tekken), "
            "and save_pretrained into this folder, with a chat template for audio: docs/scale.md")
    for wanted in (("preprocessor_config.json",), ("tokenizer_config.json",),
                   ("tokenizer.json", "vocab.json")):
        if not names.intersection(wanted):
            raise InputError(f"{folder}: no {' or '.join(wanted)}; copy it from the original "
                             "checkpoint")


def _load(folder, dtype, meta):
    full_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config = getattr(full_config, "thinker_config", full_config)
    model_class = getattr(transformers, family_of(config, folder / "config.json").model_class)
    _check_files(folder)
    for part in (config, config.get_text_config(), getattr(config, "audio_config", config)):
        for name in ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"):
            if hasattr(part, name):
                setattr(part, name, 0.0)
    saved_dtype = (getattr(full_config, "dtype", None) or getattr(config, "dtype", None)
                   or torch.float32)
    if meta:
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=dtype)
        missing = []
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder,
                                                                       local_files_only=True)
    else:
        model, info = model_class.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True)
        missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{folder}: the weights lack {len(missing)} tensors, the first is "
                         f"{missing[0]}; the checkpoint is incomplete")
    # Not mistral-common's tokenizer, which transformers prefers where that package is installed.
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, mistral_format=False)
    # Older checkpoints keep it in a file of the processor, which AutoProcessor and vLLM prefer. The
    # tokenizer's own may be for text alone.
    file = folder / "chat_template.json"
    if file.is_file():
        content = json_object(parse_json(file.read_bytes(), file, "copy the original"), file)
        tokenizer.chat_template = content.get("chat_template")
    if not isinstance(tokenizer.chat_template, str):
        raise InputError(f"{folder}: no chat template (chat_template.jinja or .json); copy it from "
                         "the original checkpoint")
    extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    return make_policy(model, tokenizer, extractor, folder,
                       full_config if config is not full_config else None, saved_dtype)


def make_policy(model, tokenizer, feature_extractor, folder=None, full_config=None,
                saved_dtype=None):
    """A Policy around a transformers model, in eval mode.

    Its text decoder gets our attention function; the audio encoder keeps its own. cuDNN's attention
    is turned off for the process: its backward makes NaN on Hopper GPUs with torch 2.13
    (pytorch#196678, for rows whose keys are all masked).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.set_attn_implementation({"text_config": "audio_mass"})
    return Policy(model, tokenizer, feature_extractor, folder, full_config, saved_dtype).eval()


def add_lora(policy, rank, alpha):
    """LoRA adapters (peft) on the linear layers of the text decoder. → policy, changed in place

    Those are the attention, and the MLP where it is dense. All other parameters are frozen. The
    30B's experts are fused tensors and get no adapters. (ours: the paper does not say which layers)
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and only LoRA runs need it

    # Full names: peft reduces patterns to bare suffixes, which would adapt the audio encoder too.
    decoder = set(policy.base.model.language_model.modules())
    names = [name for name, module in policy.base.named_modules()
             if isinstance(module, torch.nn.Linear) and module in decoder]
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    policy.model = get_peft_model(policy.base, lora)
    return policy


# ──────── saving ────────


def save_checkpoint(policy, folder, team):
    """Writes a folder that transformers, vLLM and load_policy read. All ranks call it.

    Under LoRA the adapter alone is written beside it, as adapter…/ in place of checkpoint…/.
    """
    if policy.model is not policy.base:
        adapter = folder.with_name(folder.name.replace("checkpoint", "adapter"))
        with replacing(adapter, team) as building:
            save_adapter(policy, building, team)
    with replacing(folder, team) as building:
        save_policy(policy, building, team)


@contextlib.contextmanager
def replacing(folder, team):
    """→ a folder beside `folder`, which takes its place when it is whole. A link is followed."""
    folder = folder.resolve()
    building = folder.with_name(f".{folder.name}.writing")
    if team.leads:
        shutil.rmtree(building, ignore_errors=True)
    yield building
    with together(team):
        if team.leads:
            shutil.rmtree(folder, ignore_errors=True)
            building.rename(folder)


def save_policy(policy, folder, team=Team()):
    """Writes a checkpoint folder in the original layout, LoRA merged. All ranks call it.

    A thinker is written as the whole Omni model without its talker: keys `thinker.*`, audio output
    off. Tokenizer, chat template and processor files are copied from the folder that the policy
    was loaded from. The weights are one file, or several and an index: see export.py. team: the
    ranks that share the policy; without it, this process alone.
    Raises OSError, or InputError where the ranks do not see the same folder, on all ranks.
    """
    folder, prefix = Path(folder), ""
    whole = policy.family.whole_class and getattr(transformers, policy.family.whole_class)
    config = copy.deepcopy(policy.base.config)
    config.dtype = policy.saved_dtype
    if whole is not None:
        thinker, config = config, copy.deepcopy(policy.full_config) or whole.config_class()
        config.thinker_config, config.enable_audio_output = thinker, False
        config.dtype, prefix = policy.saved_dtype, "thinker."
    with torch.device("meta"):
        shell = (whole or type(policy.base))(config)  # names and configuration, no weights
    with together(team):
        if team.leads:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("model*.safetensors*"):  # vLLM would read it as well
                old.unlink()
    write_weights(policy, shell, prefix, folder, team)
    with together(team):
        if team.leads:
            _write_about(policy, shell, folder)


def _write_about(policy, shell, folder):
    """Everything in a checkpoint folder but the weights."""
    shell.config.architectures = [type(shell).__name__]
    shell.config.save_pretrained(folder)
    policy.base.generation_config.save_pretrained(folder)
    if policy.folder is None:
        policy.tokenizer.save_pretrained(folder)
        policy.feature_extractor.save_pretrained(folder)
        return
    written = ("config.json", "generation_config.json", "model.safetensors.index.json")
    for file in policy.folder.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name not in written:
            shutil.copyfile(file, folder / file.name)


def save_adapter(policy, folder, team):
    """Writes the LoRA adapter alone, as peft reads it, and its card. All ranks call it.

    Its names are those of the class that the model folder names, which is the whole Omni model if
    the folder holds one. The card says how to load the adapter, there and on the thinker.
    """
    adapter = {}
    for name, tensor in policy.model.state_dict().items():
        if ".lora_" in name:
            tensor = gathered(tensor)
            if team.leads:  # it is small enough for rank 0 to write it alone
                adapter[name] = tensor.cpu()
    with together(team):
        if team.leads:
            _write_adapter(policy, folder, adapter)


def _write_adapter(policy, folder, adapter):
    policy.model.save_pretrained(folder, state_dict=adapter)
    base, card = type(policy.base).__name__, ADAPTER_CARD
    if policy.full_config is not None:
        base, card = policy.family.whole_class, card + ON_THE_THINKER
        file = folder / "adapter_model.safetensors"  # peft itself writes only names that it knows
        save_file({name.replace("base_model.model.", "base_model.model.thinker.", 1): tensor
                   for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_mapping"]["base_model_class"] = base  # peft wrote the thinker's
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(card.replace("BASE", base), encoding="utf-8")


ADAPTER_CARD = """---
library_name: peft
---
A LoRA adapter, trained with MAPO. `base_model_name_or_path` in adapter_config.json names the model
that it belongs to. Do not load it on top of the folder `checkpoint`: that already contains it.

    from peft import PeftModel
    from transformers import BASE
    model = PeftModel.from_pretrained(BASE.from_pretrained(MODEL), ADAPTER)
"""
ON_THE_THINKER = r"""
On the thinker alone, remove `thinker.` from the names:

    model = PeftModel.from_pretrained(thinker, ADAPTER, key_mapping={r"^thinker\.": ""})
"""


# ──────── states to resume from ────────


@disk_faults()
def save_state(folder, step, run, batch):
    """Writes folder/step-<step>, from which a run continues as if it had never stopped.

    Every rank writes its shard of weights and optimizer (torch.distributed.checkpoint). Rank 0
    adds the schedule, the step, the config, hashes of the questions, and the generation batch that
    is not used up (or None). The last two states are kept. All ranks call it.
    """
    team, folder = run.team, folder.resolve()
    building, final = folder / f".step-{step}.writing", folder / f"step-{step}"
    if team.leads:
        for leftover in folder.glob(".step-*.writing"):
            shutil.rmtree(leftover, ignore_errors=True)
        building.mkdir(parents=True)
    team.gather(None)  # no rank writes before the folder exists
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(run.policy, run.optimizer, options=options)
    with _without_warning():
        dcp.save({"weights": weights, "optimizer": moments}, checkpoint_id=building,
                 process_group=team.group, no_dist=team.mesh is None)
    torch.save(torch.get_rng_state(), building / f"rng-{team.rank}.pt")
    if team.leads:
        torch.save({"step": step, "schedule": run.schedule.state_dict(),
                    "config": dataclasses.asdict(run.config), "rows": run.rows,
                    "batch": vars(batch) if batch else None}, building / "run.pt")
    team.gather(None)  # every rank has written
    if team.leads:
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        states = states_in(folder)
        for old in sorted(number for number in states if number <= step)[:-2]:
            shutil.rmtree(states[old])
    team.gather(None)


def resume(run):
    """Loads the newest whole state of output_dir, written by any number of ranks, into `run`.

    → (steps done, the fields of the generation batch that is not used up, or None). Raises
    InputError when there is no state, or when a field that matters or the questions have changed.
    """
    policy, optimizer, config, team = run.policy, run.optimizer, run.config, run.team
    folder = newest_state(Path(config.output_dir) / "state", team)
    if folder is None:
        raise InputError(f"{config.output_dir}/state: no whole state to resume from (a run that "
                         "has ended keeps none); --overwrite true in place of --resume starts anew")
    saved = torch.load(folder / "run.pt", weights_only=False)  # our own file, of plain objects
    for name, value in saved["config"].items():
        if name not in MAY_CHANGE and getattr(config, name, value) != value:
            raise InputError(f"{name} is {getattr(config, name)!r} and was {value!r} when {folder} "
                             "was saved; resume with the same value, or start a new run")
    for name, digest in run.rows.items():
        if saved.get("rows", {}).get(name) != digest:
            raise InputError(f"{name} {getattr(config, name)}: its rows or clips are not those of "
                             f"{folder}; resume with the same file, or start a new run")
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, moments = get_state_dict(policy, optimizer, options=options)
    with _without_warning():
        dcp.load({"weights": weights, "optimizer": moments}, checkpoint_id=folder,
                 process_group=team.group, no_dist=team.mesh is None)
    fused = [group["fused"] for group in optimizer.param_groups]
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments,
                   options=options)
    for group, own in zip(optimizer.param_groups, fused):  # the state has that of the saved run
        group["fused"] = own
    run.schedule.load_state_dict(saved["schedule"])
    generator = folder / f"rng-{team.rank}.pt"
    if generator.is_file():
        torch.set_rng_state(torch.load(generator))
    return saved["step"], saved["batch"]


def newest_state(folder, team):
    """The newest whole state under `folder`, or None. A warning names each one that it skips."""
    states, newest = states_in(folder), None
    for number in sorted(states, reverse=True) if team.leads else ():
        if is_whole(states[number]):
            newest = states[number]
            break
        print(f"warning: {states[number]} is not whole and was skipped", file=sys.stderr)
    return team.broadcast(newest)


def states_in(folder, name="step"):
    """{number: folder} of the folders <name>-<digits> there. A run owns no links or other names."""
    found = {path: re.fullmatch(f"{name}-([0-9]+)", path.name) for path in folder.glob(f"{name}-*")}
    return {int(match[1]): path for path, match in found.items()
            if match and path.is_dir() and not path.is_symlink()}


def is_whole(state):
    """Does the folder of a state hold all files, each as long as it was written?"""
    try:
        metadata = dcp.FileSystemReader(state).read_metadata()
    except Exception:  # pickle raises errors of any class on broken bytes
        return False
    files = {name: (state / name).stat().st_size for name in os.listdir(state)}
    return (isinstance(metadata, dcp.metadata.Metadata)
            and all(files.get(part.relative_path, 0) >= part.offset + part.length
                    for part in metadata.storage_data.values())
            and all(zipfile.is_zipfile(state / name) for name in ("run.pt", "rng-0.pt")))


def remove_numbered(folder, name):
    """Deletes the folders <name>-<digits> of a run, and `folder` if nothing else is in it."""
    for part in (*states_in(folder, name).values(), *folder.glob(f".{name}-*.writing")):
        shutil.rmtree(part)
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


@contextlib.contextmanager
def _without_warning():
    """Hides torch's warning that torch.distributed is not in use: one process is fine here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
