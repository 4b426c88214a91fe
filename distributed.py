"""Many processes: which train and which serve, and the policy sharded over those that train.

    torchrun --nnodes 4 --nproc-per-node 8 train.py …      # nodes 0 to 2 train, node 3 serves vLLM

All trainers run the same program, each on its part of the completions of a step. Rank 0 leads: it
asks the servers, computes the rewards and writes the logs. One process is a team of one: nothing is
sent, and only on a GPU is the policy sharded, for its gathering in bf16. Skip this file on a first
reading.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor

from data import InputError
from server import Command, Server

BEAT_SECONDS = 2  # how often a process shows that it is alive
SILENCE_SECONDS = 40  # a process that was silent for so long counts as dead
JOIN_SECONDS = 1800  # how long the ranks wait for the last one to start: a slow disk takes minutes
TELL_SECONDS = 60  # after so long, rank 0 names the missing ranks
CONNECT_SECONDS, CONNECT_ATTEMPTS = 30, 4
COLLECTIVE_SECONDS = 7200  # of gloo: how long the other ranks wait for rank 0 while it samples
NCCL_SECONDS = 600  # of NCCL: while rank 0 samples or writes, the others wait in gloo


# ──────── who does what ────────


@dataclass
class Team:
    """The processes that train, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    serves: bool = False  # this process is on the node that serves, and does not train
    node_serves: bool = False  # there is a node that serves
    mesh: DeviceMesh | None = None  # None: one process without a GPU, where nothing is sharded
    dtype: torch.dtype | None = None  # parameters are gathered in it; None: as they are
    group: dist.ProcessGroup | None = None  # gloo, for Python objects
    store: dist.Store | None = None  # the rendezvous store, shared by all nodes

    @property
    def leads(self):
        return self.rank == 0 and not self.serves

    def broadcast(self, value):
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
    """How many of torchrun's nodes serve. Default: the last one if there are several."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if config.rollout_nodes >= 0:
        return config.rollout_nodes
    return int(nodes > 1 and config.rollout == "vllm")


# ──────── sharding ────────


def shard(policy, team, dtype=None):
    """fully_shard over the trainers, in place.

    Parameters keep their dtype (fp32: the master weights) and are gathered as `dtype` (None: as
    they are). Gradients are reduced in fp32.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in units(policy):
        fully_shard(module, mesh=team.mesh, mp_policy=precision)
    register_fsdp_forward_method(policy, "call_gathered")
    return policy


def units(policy):
    """The modules that fully_shard gathers one at a time, inner ones first.

    They are the decoder layers, the audio encoder's layers and the rest of it, the vision tower
    (frozen, never run), and the policy, which keeps the embeddings and lm_head.
    """
    body = policy.base.model
    tower = getattr(body, "audio_tower", None)
    found = [*body.language_model.layers, *(tower.layers if tower is not None else ()), tower,
             getattr(body, "visual", None), policy]
    return [module for module in found if module is not None]


def fill(policy, whole, team):
    """Fills a sharded policy on the meta device with the values of `whole`. All ranks call it.

    Only rank 0 has `whole`, on its CPU. It sends one tensor at a time; each rank keeps its shard.
    """
    values = {}
    if whole is not None:
        values = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    policy.to_empty(device=team.device)
    group = team.mesh.get_group()
    with torch.no_grad():
        # Buffers too: the frequencies of RoPE.
        for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]:
            sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=team.device)
            if whole is not None:
                sent.copy_(values[name])
            dist.broadcast(sent, group_src=0, group=group)
            if isinstance(tensor, DTensor):
                sent = distribute_tensor(sent, tensor.device_mesh, tensor.placements,
                                         src_data_rank=None).to_local()
                tensor = tensor.to_local()
            tensor.copy_(sent)
    return policy


# ──────── joining torchrun's job ────────


@contextlib.contextmanager
def join(config):
    """Finds this process's role in torchrun's job → Team.

    Meanwhile a thread watches the other processes: when one fails or falls silent, all end within
    a minute. Raises InputError when the number of nodes and processes does not fit the config.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        one = team_of_one(device, "nccl") if device.type == "cuda" else None
        with one or contextlib.nullcontext(Team()) as team:
            yield team
        return
    nodes, here = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    trainers = (nodes - rollout_nodes(config)) * here
    _check_world(config, world, nodes, here, trainers)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's own choice, not the user's
        # Casts and splits of whole weights run on the CPU.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    store, rank, _ = next(dist.rendezvous("env://"))
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(store.clone(), rank, world, over), daemon=True)
    watch.start()
    try:
        _wait_for_all(store, rank, world, here)
        group = _connect(store, rank, world, trainers)
        mesh, dtype = None, None
        if device.type == "cuda":
            mesh, dtype = _mesh(device, "nccl", list(range(trainers))), torch.bfloat16
        elif rank < trainers:
            mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",))
        yield Team(rank, trainers, device, rank >= trainers, trainers < world, mesh, dtype, group,
                   store)
        if rank == 0:
            store.set("over", "well")
        dist.barrier()  # gloo aborts a process whose peer tears the connection down first
        store.set(f"left/{rank}", "well")
    except BaseException as error:  # also KeyboardInterrupt: the other ranks must learn of it
        if isinstance(error, RuntimeError):
            # A collective breaks when another rank fails: give the watch time to say which one.
            time.sleep(2 * BEAT_SECONDS)
        with contextlib.suppress(RuntimeError):  # the store itself may be gone
            store.set("failed", f"rank {rank}: {type(error).__name__}: {str(error)[:500]}")
        raise
    finally:
        over.set()
        watch.join(10)  # a thread inside the store's C++ at interpreter exit aborts the process
    dist.destroy_process_group()


@contextlib.contextmanager
def team_of_one(device, backend):
    """A Team of one process that shards like many: fp32 master weights, gathered in bf16."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # no port
    try:
        mesh = _mesh(device, backend, [0])
        yield Team(device=device, mesh=mesh, dtype=torch.bfloat16, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _mesh(device, backend, trainers):
    """A mesh of the ranks `trainers` with a process group of its own; None on the other ranks.

    The group is theirs alone: NCCL takes no memory on the node that serves, and notices a stuck
    collective long before gloo's time-out. Every rank makes this call.
    """
    bound = {}
    if device.type == "cuda" and dist.get_rank() in trainers:
        torch.cuda.set_device(device)
        bound = {"device_id": device}  # connects now, not in the first collective
    group = dist.new_group(trainers, backend=backend, **bound,
                           timeout=datetime.timedelta(seconds=NCCL_SECONDS))
    if dist.get_rank() not in trainers:
        return None
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=("shard",))


def _wait_for_all(store, rank, world, here):
    """Announces this rank, and returns when all have: they may start minutes apart.

    Raises InputError, which names the missing ranks, after JOIN_SECONDS.
    """
    names = [f"here/{r}" for r in range(world)]
    store.set(names[rank], socket.gethostname())
    started, told = time.monotonic(), rank > 0
    while not store.check(names):
        waited = time.monotonic() - started
        if waited > JOIN_SECONDS:
            raise InputError(f"after {JOIN_SECONDS} s, these processes have not started: "
                             f"{_missing(store, world, here)}; look at the output of their nodes")
        if waited > TELL_SECONDS and not told:
            told = True
            print(f"still waiting for {_missing(store, world, here)}", flush=True)
        time.sleep(0.2)


def _missing(store, world, here):
    """The ranks that have not announced themselves, node by node. `here`: processes of a node."""
    nodes = []
    for first in range(0, world, here):
        came = {r: store.check([f"here/{r}"]) for r in range(first, first + here)}
        host = next((f" ({store.get(f'here/{r}').decode()})" for r in came if came[r]), "")
        if absent := ", ".join(str(r) for r in came if not came[r]):
            nodes.append(f"rank {absent} of node {first // here}{host}")
    return "; ".join(nodes)


def _connect(store, rank, world, trainers):
    """Connects all ranks with gloo → the trainers' group.

    All ranks repeat the first handshake together if it fails: gloo's hangs now and then (seen on
    loopback) and would otherwise wait as long as a collective may.
    """
    patience = datetime.timedelta(seconds=CONNECT_SECONDS)
    for attempt in range(CONNECT_ATTEMPTS):
        ready = [f"ready/{attempt}/{r}" for r in range(world)]
        failed = f"no-connection/{attempt}"
        try:
            dist.init_process_group("gloo", rank=rank, world_size=world, timeout=patience,
                                    store=dist.PrefixStore(f"attempt-{attempt}", store))
            group = dist.group.WORLD
            if trainers < world:
                group = dist.new_group(list(range(trainers)), timeout=patience)
            dist.barrier()
            store.set(ready[rank], "yes")
        except RuntimeError as error:
            store.set(failed, f"rank {rank}: {str(error)[:200]}")
        # Every rank sets one of the two keys, so all ranks reach the same conclusion.
        while not store.check(ready):
            if store.check([failed]):
                break
            time.sleep(0.05)
        else:
            for each in (dist.group.WORLD, *([group] if rank < trainers else [])):
                each.set_timeout(datetime.timedelta(seconds=COLLECTIVE_SECONDS))
            return group
        if dist.is_initialized():
            dist.destroy_process_group()
    raise RuntimeError(f"no connection in {CONNECT_ATTEMPTS} attempts; "
                       f"{store.get(failed).decode()}")


def _check_world(config, world, nodes, here, trainers):
    if world != nodes * here:
        raise InputError(f"WORLD_SIZE is {world}, but {nodes} nodes with {here} processes each "
                         f"make {nodes * here}; start the same number of processes on every node")
    if trainers < 1:
        raise InputError(f"rollout_nodes is {rollout_nodes(config)}, but there are only {nodes} "
                         "nodes; none would be left to train")
    if trainers < world and config.rollout != "vllm":
        raise InputError(f"rollout_nodes is {rollout_nodes(config)} and rollout is "
                         f"{config.rollout!r}; a node that serves needs rollout vllm")
    if trainers > config.step_size:
        raise InputError(f"{trainers} processes train, but an optimizer step has only "
                         f"{config.step_size} completions; start fewer processes, or raise "
                         "generation_batch_size")


def _watch(store, rank, world, over):
    """Ends this process when another one has failed or fallen silent, or took the store with it."""
    beat, seen = 0, {}
    others = [r for r in range(world) if r != rank]
    try:
        while not over.wait(BEAT_SECONDS):
            beat += 1
            store.set(f"beat/{rank}", str(beat))
            if store.check(["failed"]):
                _end(f"{store.get('failed').decode()}: rank {rank} ends as well")
            for other in others:
                if store.check([f"beat/{other}"]) and not store.check([f"left/{other}"]):
                    value = store.get(f"beat/{other}")
                    if seen.get(other, (None,))[0] != value:
                        seen[other] = (value, time.monotonic())
                    elif time.monotonic() - seen[other][1] > SILENCE_SECONDS:
                        _end(f"rank {other} has been silent for {SILENCE_SECONDS} s: "
                             f"rank {rank} ends as well")
    except RuntimeError as error:  # from torch.distributed
        if not over.wait(5):
            _end(f"the rendezvous store is gone ({str(error)[:100]}): rank {rank} ends as well")


def _end(message):
    print(f"error: {message}", flush=True)
    os._exit(1)


# ──────── the node that serves ────────


def launch(stack, team, which, folder, command, **options):
    """Server(folder, command, **options) → the Server, closed with `stack`.

    It is a subprocess of rank 0, or, where a node serves, of that node, which reads the arguments
    from the rendezvous store. Addresses and keys travel the same way.
    """
    if not team.node_serves:
        return stack.enter_context(Server(folder, command, **options))
    asked = itertools.count()

    def ask(folder):
        number = next(asked)
        what = {"folder": folder, "command": dataclasses.asdict(command), "options": options}
        team.store.set(f"ask/{which}/{number}", json.dumps(what, default=str))
        return json.loads(team.store.get(f"at/{which}/{number}"))  # waits for the answer

    url, key = ask(folder)
    return stack.enter_context(Server(folder, url=url, key=key,
                                      restart=lambda folder: ask(folder)[0], **options))


def serve(team):
    """What the processes of the serving node do until the run is over.

    The first of them starts the servers that rank 0 asks for, and restarts them on request.
    """
    address = _own_address()
    # On SIGTERM the trainers save their state, for which they may still need the server.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.ExitStack() as stack:
        servers, asked = {}, {"rollout": 0, "checker": 0}
        while not team.store.check(["over"]):
            for name, count in asked.items():
                if count == 1:  # later the trainers notice a death themselves, and ask again
                    servers[name].raise_if_never_ready()
                first_here = os.environ["LOCAL_RANK"] == "0"
                if not first_here or not team.store.check([f"ask/{name}/{count}"]):
                    continue
                asks = json.loads(team.store.get(f"ask/{name}/{count}"))
                folder, log_folder = Path(asks["folder"]), Path(asks["command"]["log"]).parent
                if not folder.is_dir() or not log_folder.is_dir():
                    raise InputError(f"the serving node cannot see {folder} or {log_folder}; give "
                                     "folders that all nodes share")
                if count:
                    servers[name].move_to(asks["folder"])
                else:
                    command = Command(**{**asks["command"], "host": address})
                    servers[name] = stack.enter_context(
                        Server(asks["folder"], command, **asks["options"]))
                answer = json.dumps([servers[name].url, servers[name].key])
                team.store.set(f"at/{name}/{count}", answer)
                asked[name] += 1
            time.sleep(0.5)


def _own_address():
    """This machine's address as the rendezvous host sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing
        return probe.getsockname()[0]
