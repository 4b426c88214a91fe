"""Many processes: which of them train and which serve, and the policy sharded over those that train (FSDP2).

    torchrun --nnodes 4 --nproc-per-node 8 train.py …      # nodes 0 to 2 train, node 3 serves vLLM

Every trainer runs the same program on its share of the completions of a step. Rank 0 leads: it samples, scores and
writes. One process without torchrun is a team of one: nothing is sharded, nothing is sent.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
import socket
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from data import InputError
from rollout import Server

BEAT_SECONDS = 2  # a process shows that it lives this often
SILENCE_SECONDS = 40  # and counts as dead after so long without
CONNECT_SECONDS, CONNECT_ATTEMPTS = 30, 4
COLLECTIVE_SECONDS = 7200  # the others wait that long for rank 0, which samples


# ─────────────────────────────────────────────────────── who does what ────────────────────────────────────────────────


@dataclass
class Team:
    """This process among those that train."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    serves: bool = False  # this process is on the node that serves, and does not train
    node_serves: bool = False  # there is such a node
    mesh: DeviceMesh | None = None  # None: one process
    group: dist.ProcessGroup | None = None  # gloo, for Python objects
    store: dist.Store | None = None  # the rendezvous store, over all nodes

    @property
    def leads(self):
        return self.rank == 0 and not self.serves

    def share(self, value):
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        return box[0]

    def gather(self, value):
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def rollout_nodes(config):
    """How many of torchrun's nodes serve: the field; by default none on one node, the last on several."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return config.rollout_nodes if config.rollout_nodes >= 0 else int(nodes > 1 and config.rollout == "vllm")


@contextlib.contextmanager
def join(config):
    """Finds this process's place in torchrun's job → Team. The last node serves (rollout_nodes), the others train.

    While it lasts, a thread watches the others: where a process fails or falls silent, all of them end within a minute.
    Raises InputError for a world that does not fit.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else \
        torch.device("cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Team(device=device)
        return
    nodes, here = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    trainers = (nodes - rollout_nodes(config)) * here
    _check_world(config, world, nodes, here, trainers)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, _ = next(dist.rendezvous("env://"))
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(store.clone(), rank, world, over), daemon=True)
    watch.start()
    try:
        group = _connect(device, store, rank, world, trainers)
        mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("shard",)) if rank < trainers else None
        yield Team(rank, trainers, device, rank >= trainers, trainers < world, mesh, group, store)
        if rank == 0:
            store.set("over", "well")
        dist.barrier()  # gloo aborts a process whose connection another tears down first
        store.set(f"left/{rank}", "well")
    except BaseException as error:  # of any kind, also KeyboardInterrupt: the others are told, and it is raised again
        if isinstance(error, RuntimeError):  # a collective breaks where another rank fails: let the watch tell which
            time.sleep(2 * BEAT_SECONDS)
        with contextlib.suppress(RuntimeError):  # the store itself may be gone
            store.set("failed", f"rank {rank}: {type(error).__name__}: {str(error)[:500]}")
        raise
    finally:
        over.set()
        watch.join(10)  # a thread that is inside the store's C++ when the interpreter ends aborts the process
    dist.destroy_process_group()


def _connect(device, store, rank, world, trainers):
    """The group of the trainers: NCCL for tensors on GPUs, gloo for the rest. Its first handshake is tried again, by
    all ranks together: gloo's hangs now and then (seen on loopback), and would wait for as long as a collective may."""
    patience = datetime.timedelta(seconds=CONNECT_SECONDS)
    for attempt in range(CONNECT_ATTEMPTS):
        ready, failed = [f"ready/{attempt}/{r}" for r in range(world)], f"no-connection/{attempt}"
        try:
            dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", rank=rank,
                                    world_size=world, store=dist.PrefixStore(f"attempt-{attempt}", store),
                                    timeout=patience)
            group = dist.group.WORLD if trainers == world else dist.new_group(list(range(trainers)), timeout=patience)
            dist.barrier(device_ids=None if device.type == "cpu" else [device.index])
            store.set(ready[rank], "yes")
        except RuntimeError as error:
            store.set(failed, f"rank {rank}: {str(error)[:200]}")
        while not store.check(ready):  # a rank says one of the two, so that all of them read the same
            if store.check([failed]):
                break
            time.sleep(0.05)
        else:
            for each in (dist.group.WORLD, *([group] if rank < trainers else [])):  # all wait for rank 0 at the end
                each.set_timeout(datetime.timedelta(seconds=COLLECTIVE_SECONDS))
            return group
        if dist.is_initialized():
            dist.destroy_process_group()
    raise RuntimeError(f"no connection in {CONNECT_ATTEMPTS} attempts; {store.get(failed).decode()}")


def _check_world(config, world, nodes, here, trainers):
    if world != nodes * here:
        raise InputError(f"WORLD_SIZE is {world} on {nodes} nodes with {here} processes here; start as many on every "
                         "node")
    if trainers < 1:
        raise InputError(f"rollout_nodes is {rollout_nodes(config)} and there are {nodes} nodes; none is left to train")
    if trainers < world and config.rollout != "vllm":
        raise InputError(f"rollout_nodes is {rollout_nodes(config)} and rollout is {config.rollout!r}; a node that "
                         "serves needs rollout vllm")
    rows = config.generation_batch_size // config.steps_per_generation
    if trainers > rows:
        raise InputError(f"{trainers} processes train and an optimizer step has {rows} completions; start fewer, or "
                         "raise generation_batch_size")


def _watch(store, rank, world, over):
    """Ends this process when another has failed, has fallen silent, or took the store with it."""
    beat, seen = 0, {}
    others = [r for r in range(world) if r != rank]
    try:
        while not over.wait(BEAT_SECONDS):
            beat += 1
            store.set(f"beat/{rank}", str(beat))
            if store.check(["failed"]):
                _end(f"{store.get('failed').decode()}: this rank {rank} ends as well")
            for other in others:
                if store.check([f"beat/{other}"]) and not store.check([f"left/{other}"]):
                    value = store.get(f"beat/{other}")
                    if seen.get(other, (None,))[0] != value:
                        seen[other] = (value, time.monotonic())
                    elif time.monotonic() - seen[other][1] > SILENCE_SECONDS:
                        _end(f"rank {other} has been silent for {SILENCE_SECONDS} s: rank {rank} ends as well")
    except RuntimeError as error:  # torch's distributed errors
        if not over.wait(5):
            _end(f"the rendezvous store is gone ({str(error)[:100]}): rank {rank} ends as well")


def _end(message):
    print(f"error: {message}", flush=True)
    os._exit(1)


# ─────────────────────────────────────────────────── the node that serves ─────────────────────────────────────────────


def launch(stack, team, which, **arguments):
    """A Server of these arguments: a process of rank 0's own, or, where a node serves, one that this node starts when
    it reads of it in the rendezvous store. No address is typed by hand."""
    if not team.node_serves:
        return stack.enter_context(Server(**arguments))
    asked = [0]

    def again(folder):
        asked[0] += 1
        return ask({**arguments, "folder": str(folder)})[0]

    def ask(what):
        team.store.set(f"ask/{which}/{asked[0]}", json.dumps(what, default=str))
        return json.loads(team.store.get(f"at/{which}/{asked[0]}"))  # waits for it

    url, key = ask(arguments)
    arguments.pop("python")
    return stack.enter_context(Server(**arguments, url=url, key=key, restart=again))


def serve(team):
    """What the first process of the serving node does: starts the servers that rank 0 asks for, and starts them again
    on the folder that it names, until the run is over."""
    address = _own_address()
    # A SIGTERM to the whole job is the trainers' affair: they save their state, for which they may need the server.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.ExitStack() as stack:
        servers, asked = {}, {"rollout": 0, "checker": 0}
        while not team.store.check(["over"]):
            for name, count in asked.items():
                if count == 1:  # later the trainers notice a death themselves, and ask again
                    servers[name].raise_if_never_ready()
                if os.environ["LOCAL_RANK"] != "0" or not team.store.check([f"ask/{name}/{count}"]):
                    continue
                arguments = json.loads(team.store.get(f"ask/{name}/{count}"))
                if not Path(arguments["folder"]).is_dir() or not Path(arguments["log"]).parent.is_dir():
                    raise InputError(f"{arguments['folder']} or {Path(arguments['log']).parent} is not to be seen on "
                                     "the node that serves; give folders that all nodes share")
                if count:
                    servers[name].move_to(arguments["folder"])
                else:
                    servers[name] = stack.enter_context(Server(**arguments, host=address))
                team.store.set(f"at/{name}/{count}", json.dumps([servers[name].url, servers[name].key]))
                asked[name] += 1
            time.sleep(0.5)


def _own_address():
    """This machine's address as the rendezvous host sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing
        return probe.getsockname()[0]


# ──────────────────────────────────────────────────────── sharding ────────────────────────────────────────────────────


def units(policy):
    """The modules that fully_shard gathers one at a time, inner ones first: decoder layers, the audio encoder's layers
    and its rest, the vision tower (frozen and never run), and the policy, which keeps embeddings and lm_head."""
    body = policy.base.model
    tower = getattr(body, "audio_tower", None)
    found = [*body.language_model.layers, *(tower.layers if tower is not None else ()), tower,
             getattr(body, "visual", None), policy]
    return [module for module in found if module is not None]


def shard(policy, team, dtype=None):
    """fully_shard over the trainers, in place. Parameters stay what they are (fp32: the master weights) and are
    gathered as `dtype` (None: as they are); gradients are reduced in fp32."""
    for module in units(policy):
        fully_shard(module, mesh=team.mesh,
                    mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    register_fsdp_forward_method(policy, "run")
    return policy


def fill(policy, whole, team):
    """Gives a sharded policy that stands on the meta device the values of `whole`, which rank 0 alone has, on its CPU.
    A tensor is sent at a time, and each rank keeps its shard."""
    values = {} if whole is None else {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    policy.to_empty(device=team.device)
    group = team.mesh.get_group()
    with torch.no_grad():
        for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]:  # buffers: RoPE's frequencies
            sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=team.device)
            if whole is not None:
                sent.copy_(values[name])
            dist.broadcast(sent, group_src=0, group=group)
            if isinstance(tensor, DTensor):
                sent = distribute_tensor(sent, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
                tensor = tensor.to_local()
            tensor.copy_(sent)
    return policy


def portion(rows, size_of, team):
    """The rows of an optimizer step that this rank computes: [(row, is it real)], as many on every rank.

    Rows of like length go to the ranks in turn, there and back, so that all have as much to do, and as much at a time.
    A rank that comes out short repeats a row, which then counts nothing.
    """
    if team.size == 1:
        return [(row, True) for row in rows]
    order, own = sorted(rows, key=lambda row: (-size_of[row], row)), []
    for number, start in enumerate(range(0, len(order), team.size)):
        place = start + (team.rank if number % 2 == 0 else team.size - 1 - team.rank)
        own.append((order[place], True) if place < len(order) else (order[-1], False))
    return own


# ──────────────────────────────────────────────── states to resume from ───────────────────────────────────────────────


def save_state(folder, step, policy, optimizer, schedule, batch, config, team):
    """Writes folder/step-<step>, from which a run goes on as if it had not ended: weights and optimizer, a shard a rank
    (torch.distributed.checkpoint), and from rank 0 the schedule, the step, the config and the generation batch that is
    not used up. Written in a sibling and renamed when whole; the last two are kept."""
    building, final = folder / f".step-{step}.writing", folder / f"step-{step}"
    if team.leads:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    team.gather(None)  # nobody writes before the folder stands
    weights, moments = get_state_dict(policy, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    with _one_process_is_meant():
        dcp.save({"weights": weights, "optimizer": moments}, checkpoint_id=building, process_group=team.group,
                 no_dist=team.size == 1)
    torch.save(torch.get_rng_state(), building / f"rng-{team.rank}.pt")
    if team.leads:
        torch.save({"step": step, "schedule": schedule.state_dict(), "config": dataclasses.asdict(config),
                    "batch": batch}, building / "run.pt")
    team.gather(None)  # everybody has written
    if team.leads:
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        for old in sorted(folder.glob("step-*"), key=_step_of)[:-2]:
            shutil.rmtree(old)
    team.gather(None)


def newest_state(folder, team):
    """The newest whole state under `folder`, or None. What was not renamed is not whole."""
    states = sorted(folder.glob("step-*"), key=_step_of)
    return team.share(states[-1] if states else None)


def _step_of(folder):
    return int(folder.name.removeprefix("step-"))


def read_state(folder):
    """What save_state's rank 0 wrote: {"step", "schedule", "config", "batch"}."""
    return torch.load(folder / "run.pt", weights_only=False)  # our own file, of plain objects


def load_state(folder, saved, policy, optimizer, schedule, team):
    """Loads weights, optimizer, schedule and random state of a folder, on as many ranks as now train."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, moments = get_state_dict(policy, optimizer, options=options)
    with _one_process_is_meant():
        dcp.load({"weights": weights, "optimizer": moments}, checkpoint_id=folder, process_group=team.group,
                 no_dist=team.size == 1)
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    schedule.load_state_dict(saved["schedule"])
    generator = folder / f"rng-{team.rank}.pt"
    if generator.is_file():
        torch.set_rng_state(torch.load(generator))


@contextlib.contextmanager
def _one_process_is_meant():
    """Without the warning that torch.distributed is not in use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
