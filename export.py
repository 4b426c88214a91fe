"""The weights of a policy as the safetensors files of a checkpoint folder, written by all ranks.

    write_weights(policy, shell, "thinker.", folder, team)      # checkpoint.save_policy calls it

The tensors are divided among the ranks. Each rank converts and writes its own, so the time and the
memory of a push or an export shrink with the number of ranks. All ranks must see the folder. Skip
this file on a first reading.
"""

import contextlib
import errno
import json
import re

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from data import InputError

FILE_BYTES = 2 * 10**9  # of the largest file, unless a single tensor is larger


def write_weights(policy, shell, prefix, folder, team):
    """Writes the weights, LoRA merged, in saved_dtype and in the original layout.

    All ranks call it; `folder` exists. shell: the model that the folder is for, on the meta device,
    which knows the names on disk. In memory its names are the policy's after `prefix`. Beside its
    shard, a rank keeps one file at a time, and the tensor that is being gathered or converted.
    Raises OSError, or InputError where the ranks do not see the same folder, on all ranks.
    """
    state = policy.base.state_dict()
    sources = {prefix + name.replace(".base_layer.", "."): name for name in state
               if ".lora_" not in name}
    sizes = {name: state[source].numel() * policy.saved_dtype.itemsize  # bytes
             for name, source in sources.items() if name not in shell.all_tied_weights_keys}
    files = files_of_ranks(sizes, team.size)
    count, number = sum(map(len, files)), sum(map(len, files[:team.rank]))
    written = {}  # file → names of its tensors on disk
    with together(team):
        if not folder.is_dir():
            raise InputError(f"{folder}: rank {team.rank} does not see this folder, which rank 0 "
                             "made; output_dir must be on a disk that all ranks share")
    for turn in range(max(map(len, files))):  # every rank writes one file
        own = {}
        for rank, theirs in enumerate(files):
            for name in theirs[turn] if turn < len(theirs) else ():
                tensor = whole_tensor(policy, state, sources[name])
                if rank == team.rank:
                    own[name] = tensor  # still on its device: the others would wait for a copy
                del tensor  # before the next one is gathered
        with together(team):
            if own:
                number += 1
                file = f"model-{number:05}-of-{count:05}" if count > 1 else "model"
                converted = in_original_layout(own, shell)
                written[f"{file}.safetensors"] = list(converted)
                save_file(converted, folder / f"{file}.safetensors", metadata={"format": "pt"})
                del converted
    write_index(folder, team.gather(written), sum(sizes.values()), team)


def files_of_ranks(sizes, ranks):
    """{name: bytes} → for each rank its files, which are lists of names.

    The model is cut into equal parts, one per rank. A tensor belongs to the part that its middle is
    in, so a rank gets at most Σ/ranks bytes plus the largest tensor. The order of the model stays:
    vLLM loads a layer when it has all its tensors.
    """
    files, before, total = [[] for _ in range(ranks)], 0, sum(sizes.values())
    for name, size in sizes.items():
        own = files[(2 * before + size) * ranks // (2 * total + 1)]
        if not own or sum(sizes[other] for other in own[-1]) + size > FILE_BYTES:
            own.append([])
        own[-1].append(name)
        before += size
    return files


def whole_tensor(policy, state, name):
    """A tensor of the transformers model, in saved_dtype, on its device. All ranks call it.

    Where LoRA adapts it: W + (α/r)·B·A, computed in the dtype of training.
    """
    module, _, leaf = name.partition(".base_layer.")
    if leaf != "weight":
        return gathered(state[name].to(policy.saved_dtype))  # cast first: bf16 is half the traffic
    w, b, a = (gathered(state[each]) for each in (
        name, f"{module}.lora_B.default.weight", f"{module}.lora_A.default.weight"))
    scaling = policy.base.get_submodule(module).scaling["default"]  # α/r
    return (w + b @ a * scaling).to(policy.saved_dtype)


def gathered(tensor):
    """A tensor, sharded or not → the whole one, on its device. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_original_layout(tensors, shell):
    """Names and tensors of the model → those on disk, on the CPU. Empties `tensors` on the way.

    transformers fuses the experts of a layer into one tensor; on disk each expert has its own.
    """
    converted = {}
    # As in save_pretrained. Otherwise each call would look them up again: 0.1 s in the 30B's model.
    shell._weight_conversions = [each for each in get_model_conversion_mapping(
        shell, add_legacy=False) if not isinstance(each, PrefixChange)]
    for name in list(tensors):  # one by one, because fused tensors are copied
        pieces = revert_weight_conversion(shell, {name: tensors.pop(name)})
        converted |= {piece: tensor.cpu().contiguous() for piece, tensor in pieces.items()}
    return converted


def write_index(folder, reports, total, team):
    """Rank 0 checks that it sees all files, and writes which tensor is in which of them.

    reports: of each rank, {file: names of its tensors}. One file alone needs no index.
    """
    files = {file: (rank, names) for rank, report in enumerate(reports)
             for file, names in report.items()}
    with together(team):
        if team.leads:
            for file, (rank, _) in files.items():
                if not (folder / file).is_file():
                    raise InputError(f"{folder}: rank 0 does not see {file}, which rank {rank} "
                                     "wrote; output_dir must be on a disk that all ranks share")
            if len(files) > 1:
                place = {name: file for file, (_, names) in files.items() for name in names}
                index = {"metadata": {"total_size": total}, "weight_map": place}
                (folder / "model.safetensors.index.json").write_text(
                    json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ──────── faults ────────


@contextlib.contextmanager
def together(team):
    """All ranks run the block, and leave it together: an OSError or InputError of one is raised on
    all. Otherwise the others would wait for that rank in the next collective."""
    error = None
    try:
        with disk_faults():
            yield
    except (OSError, InputError) as caught:
        error = caught
    for failure in team.gather(error):
        if failure is not None:
            raise failure


@contextlib.contextmanager
def disk_faults():
    """Turns what libraries raise when they cannot write, as on a full disk, into an OSError."""
    try:
        yield
    except (CheckpointException, SafetensorError, RuntimeError) as error:
        causes = [error]
        if isinstance(error, CheckpointException):  # torch.distributed.checkpoint: one per rank
            causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError):
                raise cause from error
            if re.search(r"os error \d|inline_container|PytorchStreamWriter", str(cause)):
                reason = " ".join(str(cause).split())[:200]
                raise OSError(errno.EIO, f"cannot be written ({reason})") from error
        raise
