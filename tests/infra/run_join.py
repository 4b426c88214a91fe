"""A rank that joins a job and does nothing else. test_distributed.py forks it.

The test hosts the rendezvous store, as torchrun's agent does.
"""

import json
import os
import signal
import traceback
from types import SimpleNamespace

import torch
import torch.distributed as dist

import distributed


def forked(rank, world, port, output, here, serve=0, gpus=False, **seconds):
    """Joins as `rank`; `here` ranks make a node. The output ends with a line of json.

    serve: how many nodes serve. gpus: pretend that there are some. seconds: limits of distributed.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {name: str(value) for name, value in {
        "RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here,
        "GROUP_RANK": rank // here, "GROUP_WORLD_SIZE": world // here, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}.items()}
    os.sched_getaffinity = lambda _: range(12)
    for name, value in seconds.items():
        setattr(distributed, name, value)
    calls = record_calls() if gpus else []
    config = SimpleNamespace(rollout="vllm", rollout_nodes=serve, step_size=world)
    try:
        with distributed.join(config) as team:
            found = {"threads": torch.get_num_threads(), "calls": calls}
            found["WORLD"] = timeout(dist.group.WORLD)
            if not team.serves:
                mine = torch.tensor([float(rank)])
                dist.all_reduce(mine, group=team.mesh.get_group())
                found |= {"gathered": team.gather(rank), "sum": mine.item(),
                          "group": timeout(team.group), "mesh": timeout(team.mesh.get_group()),
                          "device": team.mesh.device_type, "dtype": str(team.dtype),
                          "one group": team.group is team.mesh.get_group()}
            elif team.mesh is not None:
                raise AssertionError("a rank that serves is in the mesh")
        print(json.dumps(found), flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def record_calls():
    """Pretends that there are GPUs, makes gloo groups in place of NCCL's, and records both."""
    calls, new_group, barrier = [], dist.new_group, dist.barrier

    def recorded(ranks, backend=None, timeout=None, device_id=None):
        calls.append([backend, ranks, timeout.total_seconds(), device_id and str(device_id)])
        return new_group(ranks, backend="gloo", timeout=timeout)

    def without_device_ids(*arguments, device_ids=None, **named):
        assert device_ids is None, "such a barrier would connect NCCL on every rank"
        return barrier(*arguments, **named)

    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = lambda device: calls.append(["set_device", str(device)])
    dist.new_group, dist.barrier = recorded, without_device_ids
    return calls


def timeout(group):
    """Seconds after which a collective of this group of gloo's gives up."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
