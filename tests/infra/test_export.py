"""export.py: a policy's weights as files that all ranks write. Two and three ranks, each a process
on gloo, against one process."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
from types import SimpleNamespace

import pytest
import tiny
import torch
import vllm_worker
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from test_checkpoint import FAMILIES, same_weights, train_adapters
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3OmniMoeForConditionalGeneration

import checkpoint
import distributed
import export
from data import InputError
from distributed import Team
from processes import free_port
from rollout import push_weights


def read(folder):
    """name → tensor, of all files of a folder"""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():
                assert name not in found
                found[name] = opened.get_tensor(name)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])
        for name in one)


def size_of(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


# ──────── who writes what ────────


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=60).filter(any),
       ranks=st.integers(1, 9), most=st.integers(1, 9000))
def test_files_of_ranks(sizes, ranks, most):
    """Every tensor is in one file, in the model's order. A rank gets at most its part and a tensor,
    and a file at most FILE_BYTES, or one tensor."""
    sizes = {f"layer.{i}": size for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "FILE_BYTES", most)
        files = export.files_of_ranks(sizes, ranks)
    assert len(files) == ranks
    assert [name for own in files for names in own for name in names] == list(sizes)
    for own in files:
        loads = [sum(sizes[name] for name in names) for names in own]
        assert sum(loads) <= sum(sizes.values()) / ranks + max(sizes.values())
        assert all(load <= most or len(names) == 1 for load, names in zip(loads, own))
        assert all(before + after > most for before, after in itertools.pairwise(loads))


# ──────── one process ────────


def test_one_process_writes_several_files(tmp_path, monkeypatch):
    """None is larger than FILE_BYTES. Readers of one file, of several, and of a folder that held
    the other kind before, find the same tensors."""
    policy = tiny.qwen3_omni(seed=3)
    checkpoint.save_policy(policy, tmp_path / "one")
    assert sorted(file.name for file in (tmp_path / "one").glob("model*")) == ["model.safetensors"]
    monkeypatch.setattr(export, "FILE_BYTES", 120_000)
    checkpoint.save_policy(policy, tmp_path / "several")
    files = sorted((tmp_path / "several").glob("model-*"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    one, several = read(tmp_path / "one"), read(tmp_path / "several")
    assert len(files) > 3 and same(one, several)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": size_of(one)}
    assert index["weight_map"].keys() == one.keys()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        assert size_of(tensors) <= 120_000
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert same_weights(checkpoint.load_policy(tmp_path / "several").base, policy.base)
    checkpoint.save_policy(policy, tmp_path / "one")  # over a single file
    assert same(read(tmp_path / "one"), one)
    monkeypatch.undo()
    checkpoint.save_policy(policy, tmp_path / "several")  # over several
    assert [file.name for file in (tmp_path / "several").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3_omni", "qwen2_5_omni"])
def test_a_tied_head_is_left_out(tmp_path, kind, dtype):
    """As in save_pretrained: readers take the embeddings."""
    policy = getattr(tiny, kind)()
    for config in (policy.base.config, policy.base.config.get_text_config()):
        config.tie_word_embeddings = True
    policy.base.lm_head.weight = policy.base.model.language_model.embed_tokens.weight
    policy.saved_dtype = dtype
    checkpoint.save_policy(policy, tmp_path)
    written = read(tmp_path)
    assert "thinker.model.embed_tokens.weight" in written
    assert "thinker.lm_head.weight" not in written
    assert same_weights(checkpoint.load_policy(tmp_path).base, policy.to(dtype).float().base)


# ──────── several ranks ────────


# family, rank of LoRA (0: all weights are trained), dtype of the folder. The policy is in fp32.
CASES = [("qwen3_omni", 0, torch.bfloat16), ("qwen3_omni", 2, torch.bfloat16),
         ("qwen2_audio", 0, torch.float32), ("qwen2_5_omni", 2, torch.float32)]
SMALL = 80_000  # FILE_BYTES of the second case: each rank writes several files
CONFIG = SimpleNamespace(rollout_nodes=0, rollout="local", step_size=8)


def names_of(case):
    kind, lora_rank, dtype = case
    return f"{kind}-{lora_rank}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of each family, and the exports of one process, by names_of(case)."""
    folder = tmp_path_factory.mktemp("models")
    for kind in FAMILIES:
        more = {"layers": 12} if kind == "qwen3_omni" else {}
        checkpoint.save_policy(getattr(tiny, kind)(seed=1, **more), folder / kind)
    for case in CASES:
        checkpoint.save_policy(policy_of(folder, case, Team()), folder / names_of(case))
    return folder


def policy_of(models, case, team):
    """The policy of a case, sharded over the team."""
    kind, lora_rank, dtype = case

    def load(meta):
        policy = checkpoint.load_policy(models / kind, meta=meta)
        policy.saved_dtype = dtype
        return checkpoint.add_lora(policy, lora_rank, 8) if lora_rank else policy

    torch.manual_seed(0)  # of the adapters
    whole = load(meta=False)
    train_adapters(whole)
    if team.size == 1:
        return whole
    return distributed.fill(distributed.shard(load(meta=True), team),
                            whole if team.leads else None, team)


def on_ranks(size, folder, function):
    """function(team) in `size` processes that form a team → its results, by rank."""
    folder.mkdir(exist_ok=True)
    port = str(free_port())

    def child(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                          LOCAL_WORLD_SIZE=str(size), GROUP_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with distributed.join(CONFIG) as team:
            (folder / f"result-{rank}.json").write_text(json.dumps(function(team)))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(size)]


def test_adapters_are_merged_before_the_cast(models):
    """W + (α/r)·B·A in fp32, then bf16. B and A in bf16 would give other weights."""
    policy, written = policy_of(models, CASES[1], Team()), read(models / names_of(CASES[1]))
    for layer, projection in itertools.product((0, 11), "qkvo"):
        place = f"layers.{layer}.self_attn.{projection}_proj"
        module = policy.base.model.language_model.get_submodule(place)
        w, b, a = (part.weight for part in (module.base_layer, module.lora_B.default,
                                            module.lora_A.default))
        saved = written[f"thinker.model.{place}.weight"]
        assert torch.equal(saved, (w + 8 / 2 * (b @ a)).bfloat16())
        assert not torch.equal(saved, w.bfloat16() + 8 / 2 * (b.bfloat16() @ a.bfloat16()))


@contextlib.contextmanager
def memory(found):
    """found["peak"]: the most bytes that torch's tensors on the CPU had on top of those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield
    events = [event for event in profiled.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    found["peak"] = max(itertools.accumulate(changes))


def pushed_by(team, models, folder):
    """Pushes the policy of every case → for each what this rank wrote, and its peak."""
    results, written, usual = [], {}, export.FILE_BYTES

    def recorded(tensors, file, metadata, original=export.save_file):
        written[file.name] = size_of(tensors)
        original(tensors, file, metadata)

    export.save_file = recorded
    for case in CASES:
        written.clear()
        export.FILE_BYTES = SMALL if case == CASES[1] else usual
        policy, asked, found = policy_of(models, case, team), [], {}

        def load(folder, version):
            asked.append([version, str(folder), len(list(folder.glob("*.safetensors")))])

        server = SimpleNamespace(load=load) if team.leads else None
        (folder / ".version-6.writing").mkdir(parents=True, exist_ok=True)  # of a killed run
        with memory(found):
            push_weights(server, policy, folder / names_of(case), 7, team)
        results.append({"written": dict(written), "asked": asked, **found})
    return results


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def pushes(request, models, tmp_path_factory):
    """→ ranks, the folder with the push of every case, and what each rank reported."""
    folder = tmp_path_factory.mktemp("pushes")
    return request.param, folder, on_ranks(request.param, folder / "job",
                                           lambda team: pushed_by(team, models, folder))


@pytest.mark.parametrize("case", CASES, ids=names_of)
def test_ranks_push_what_one_process_exports(pushes, models, case):
    """Tensor by tensor, bit for bit; every rank writes its part, and the server is asked once."""
    ranks, folder, reports = pushes
    pushed = folder / names_of(case) / "version-7"
    assert [path.name for path in pushed.parent.iterdir()] == ["version-7"]
    alone = models / names_of(case)
    assert same(read(pushed), read(alone))
    assert dict(vllm_worker._tensors(pushed)).keys() == read(alone).keys()
    others = {path.name for path in alone.iterdir()} - {"model.safetensors"}
    assert others == {path.name for path in pushed.iterdir() if not path.name.startswith("model")}
    index = json.loads((pushed / "model.safetensors.index.json").read_text())
    reports = [report[CASES.index(case)] for report in reports]
    files = [file for report in reports for file in report["written"]]
    count = len(files)
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert set(index["weight_map"].values()) == set(files)
    for report in reports:
        assert len(report["written"]) > 1 if case == CASES[1] else len(report["written"]) == 1
    assert reports[0]["asked"] == [[7, str(pushed), count]]
    assert not any(report["asked"] for report in reports[1:])


@pytest.mark.parametrize("case", CASES, ids=names_of)
def test_a_rank_keeps_its_part_alone(pushes, models, case):
    """It writes at most export ÷ ranks plus the largest tensor.

    At its peak it holds one file, and four copies of a tensor that is gathered or converted.
    """
    ranks, _, reports = pushes
    kind, _, dtype = case
    exported = size_of(read(models / names_of(case)))
    shapes = checkpoint.load_policy(models / kind, meta=True).base.state_dict().values()
    largest = max(tensor.numel() for tensor in shapes) * dtype.itemsize
    reports = [report[CASES.index(case)] for report in reports]
    kept = [sum(report["written"].values()) for report in reports]
    print(f"{names_of(case)} on {ranks}: export {exported}, largest tensor {largest}, "
          f"kept {kept}, peaks {[report['peak'] for report in reports]}")
    assert sum(kept) == exported and max(kept) <= exported / ranks + largest
    for report in reports:
        assert report["peak"] <= max(report["written"].values()) + 4 * largest


def test_transformers_and_load_policy_read_a_push(pushes, models):
    _, folder, _ = pushes
    case = names_of(CASES[1])
    pushed = folder / case / "version-7"
    loaded, alone = (checkpoint.load_policy(f) for f in (pushed, models / case))
    whole = Qwen3OmniMoeForConditionalGeneration.from_pretrained(pushed, dtype=torch.float32)
    assert same_weights(loaded.base, alone.base) and same_weights(whole.thinker, alone.base)


# ──────── faults on two ranks ────────


FAULTS = ("file of rank 0", "file of rank 1", "copied file", "unseen folder", "unseen file")


def faulty(team, models, folder):
    """Pushes with each of the FAULTS, then without → the error or None of each push."""
    policy, found = policy_of(models, CASES[0], team), []
    server = SimpleNamespace(load=lambda *_: None) if team.leads else None

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "the file")

    for fault in (*FAULTS, None):
        place = folder / f"disk-{team.rank}" if "unseen" in str(fault) else folder
        if fault == "unseen file" and not team.leads:
            (place / ".version-1.writing").mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            if fault == f"file of rank {team.rank}":
                patch.setattr(export, "save_file", full)
            if fault == "copied file" and team.leads:
                patch.setattr(checkpoint.shutil, "copyfile", full)
            try:
                push_weights(server, policy, place, 1, team)
                found.append(None)
            except (OSError, InputError) as error:
                found.append([type(error).__name__, str(error)])
    return found


def test_a_fault_of_one_rank_is_raised_on_all(models, tmp_path):
    """And it leaves them in step: the next push succeeds."""
    first, second = on_ranks(2, tmp_path / "job", lambda team: faulty(team, models, tmp_path))
    assert first == second
    *disk, unseen_folder, unseen_file, healthy = first
    no_space = "[Errno 28] No space left on device: 'the file'"
    assert disk == [["OSError", no_space]] * 3 and healthy is None
    shared = "output_dir must be on a disk that all ranks share"
    assert unseen_folder == ["InputError", f"{tmp_path}/disk-1/.version-1.writing: rank 1 does not "
                             f"see this folder, which rank 0 made; {shared}"]
    assert unseen_file == ["InputError", f"{tmp_path}/disk-0/.version-1.writing: rank 0 does not "
                           f"see model-00002-of-00002.safetensors, which rank 1 wrote; {shared}"]
    assert len(list((tmp_path / "version-1").glob("*.safetensors"))) == 2
