"""A vLLM server: start it, watch it, restart it, ask it. Skip this file on first reading.

    command = Command(python=".venv-vllm/bin/python", log="vllm.log")
    with Server("Qwen3-Omni-30B-A3B-Thinking", command) as server:
        ...                              # rollout.sample and rollout.push_weights take the server

The paper samples on vLLM. This file is our engineering around that: vLLM runs as a process of its
own, in its own Python environment. We restart it when it dies or hangs, without losing or repeating
a group of completions, and we end it when the trainer ends.
"""

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import tenacity
from tqdm import tqdm

from data import InputError
from rewards import PassingFault, passing_status

ATTEMPTS = 5  # for one request, when the connection or the server has a fault that may pass
START_SECONDS = 1800  # longest start; the 30B takes minutes to load
STALL_SECONDS = 300  # a server with questions to answer that makes no token for so long is dead
PUSH_SECONDS = 600  # longest reload of the weights
DEATHS = 3  # deaths in a row that end the run
TORCHRUN = ("((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
            "|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING)")  # variables that it sets


class RolloutError(RuntimeError):
    """The server cannot go on, or its answer must not be used for training.

    The message is one line, followed by the last lines of the server's log.
    """


@dataclass(frozen=True)
class Command:
    """How to start vLLM as a subprocess."""

    python: Path  # interpreter of vLLM's environment
    log: Path  # file for vLLM's output
    flags: str = ""  # further flags for vLLM, in one string
    clips: int = 1  # most audio clips in one question
    sequences: int = 0  # completions that vLLM samples at the same time; 0: its default
    fp32_head: bool = True  # logits leave the head's product in fp32, see model.logit_block
    host: str = "127.0.0.1"  # address to listen on; the port is a free one


class Server:
    """A vLLM server for the checkpoint `folder`. Exactly one of `command` and `url` is given.

    command: start vLLM as a subprocess. It starts when the `with` block is entered and loads while
        other work goes on; the first request waits for it. Its whole process group ends with the
        block, and also when this process ends, no matter how.
    url: use a server that is already running. With `restart`, another process keeps it for us:
        restart(folder) starts it again on a checkpoint and returns its new url.
    key: every endpoint except /health needs it. Default: random bytes for a subprocess, the
        environment's VLLM_API_KEY for a url.
    weights_change: False for a server that never gets new weights (the checker).
    name: the model name in requests.
    in_flight: most questions that are asked at the same time, a generation batch in training. Their
        bodies are in memory, as text and as bytes: about 500 MB for 96 clips of 30 s (fp32,
        base64). An evaluation asks thousands of questions, hence a bound.

    Raises InputError when there is no key for an address other than this machine's loopback, and
    RolloutError when the server does not start.
    """

    def __init__(self, folder, command=None, *, url=None, key=None, restart=None,
                 weights_change=True, name="policy", in_flight=64):
        self.folder, self.command, self.restart = folder, command, restart
        self.url = url and url.rstrip("/")
        self.weights_change, self.name, self.in_flight = weights_change, name, in_flight
        if key is None:
            key = os.environ.get("VLLM_API_KEY", "") if url else secrets.token_hex(32)
        if not key and not (url and _is_loopback(urlsplit(url).hostname)):
            raise InputError(f"the vLLM server at {url or command.host} has no key, but its "
                             "endpoints run methods by name; set VLLM_API_KEY, there and here")
        self.key = key
        self.ours = command is not None or restart is not None  # we may restart it
        self.trust_env = not self.ours  # our own servers bypass http_proxy, which would see the key
        # The version of its weights. We do not know what somebody else's server holds: None.
        self.version = 0 if self.ours else None
        self.deaths, self.process, self.ready, self.closed = 0, None, False, False

    def __enter__(self):
        if self.command:
            # Every start uses the dtype of the first folder: pushed checkpoints may be wider.
            self.dtype = _dtype(self.folder)
            Path(self.command.log).unlink(missing_ok=True)
            self._start()
        return self

    def __exit__(self, *_):
        self.closed = True
        self._stop()

    # ──────── requests ────────

    def complete(self, requests, read, progress):
        """Asks for chat completions → one flat list of the answers, in the order of `requests`.

        A request is (question id, function that makes the body); read(i, answer) turns the i-th
        answer into a list. A request is answered as a whole or not at all. If the server dies, the
        restarted one gets the requests that are still open, so no group is lost or repeated.
        """
        groups = {}
        with tqdm(desc="generate", unit=" tokens", leave=False, disable=not progress) as bar:
            while len(groups) < len(requests):
                try:
                    self.wait()
                    if self.weights_change:
                        self._check_version()
                    asyncio.run(self._ask(requests, read, groups, bar))
                except (_Died, httpx.TransportError) as fault:
                    self.recover(str(fault))
        self.deaths = 0
        return [completion for i in range(len(requests)) for completion in groups[i]]

    def load(self, folder, version):
        """Replaces the weights by those of a checkpoint folder.

        The server pauses meanwhile, and resumes even if this fails.
        """
        self.folder, self.version = folder, version
        try:
            self.wait()
            self._post("/pause", params={"mode": "wait"})
            try:
                self._post("/collective_rpc", json=reload_call(folder), timeout=PUSH_SECONDS)
                self._post("/reset_prefix_cache")
                self._post("/update_weight_version", json={"new_version": str(version)})
            finally:
                self._post("/resume")
        except (_Died, httpx.TransportError) as fault:
            self.recover(f"died or hung during a push ({fault!r})")

    async def _ask(self, requests, read, groups, bar):
        """Sends the requests that are not yet in `groups`, and watches the server meanwhile."""
        slots = asyncio.Semaphore(self.in_flight)
        async with httpx.AsyncClient(base_url=self.url, headers=self._headers(),
                                     limits=httpx.Limits(max_connections=self.in_flight + 1),
                                     timeout=httpx.Timeout(60, read=None),
                                     trust_env=self.trust_env) as client:
            async def one(i):
                async with slots:  # the body holds audio: make it when it is sent
                    question, make_body = requests[i]
                    body = await asyncio.to_thread(make_body)
                    groups[i] = read(i, await self._chat(client, question, body))

            watch = asyncio.create_task(self._watch(client, bar))
            work = asyncio.gather(*(one(i) for i in range(len(requests)) if i not in groups))
            try:
                await asyncio.wait([watch, work], return_when=asyncio.FIRST_COMPLETED)
                (work if work.done() else watch).result()  # raises the first fault
            finally:
                watch.cancel()
                work.cancel()
                await asyncio.gather(watch, work, return_exceptions=True)

    async def _chat(self, client, question, body):
        """One chat completion → its json. Raises _Died after ATTEMPTS passing faults in a row."""
        # Shorter waits than rewards.retrying: a dead server should be found within seconds.
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(PassingFault), reraise=True,
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=10))
        try:
            return await retrying(self._chat_once, client, question, body)
        except PassingFault as fault:
            raise _Died(f"gave no answer in {ATTEMPTS} attempts ({fault})") from fault

    async def _chat_once(self, client, question, body):
        self._raise_if_dead()
        try:
            answer = await client.post("/v1/chat/completions", json={**body, "model": self.name})
        except httpx.TransportError as fault:
            raise PassingFault(f"{type(fault).__name__} {fault}") from fault
        if passing_status(answer.status_code):
            raise PassingFault(f"HTTP {answer.status_code}: {answer.text[:200]}")
        if answer.status_code != 200:
            raise self._failure(f"refused question {question}: HTTP {answer.status_code}: "
                                f"{answer.text[:300]}")
        try:
            return answer.json()
        except ValueError as fault:
            raise PassingFault(f"not json: {answer.text[:200]}") from fault

    async def _watch(self, client, bar):
        """Counts the tokens that the server makes. Raises _Died when it ends or stalls."""
        made, since = None, time.monotonic()
        while True:
            self._raise_if_dead()
            try:
                text = (await client.get("/metrics", timeout=5)).text
                counts = re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", text, re.M)
                now = sum(map(float, counts))
            except httpx.TransportError:
                now = made  # no answer counts as no progress
            if now != made:
                bar.update(int(now - made) if made is not None else 0)
                made, since = now, time.monotonic()
            elif time.monotonic() - since > STALL_SECONDS:
                raise _Died(f"made no token for {STALL_SECONDS} s")
            await asyncio.sleep(1)

    def _check_version(self):
        answer = self._request("GET", "/weight_info")
        held = (answer.json().get("weight_version") if answer.status_code == 200
                else f"HTTP {answer.status_code}")
        if str(held) != str(self.version):
            raise self._failure(f"holds weights of version {held}, but {self.version} was pushed; "
                                "was it restarted, or does another run push to it?")

    def _post(self, path, **options):
        answer = self._request("POST", path, **options)
        if answer.status_code >= 500 and self.process:
            # A server whose engine has died ends a moment later: a death, not a refusal.
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise _Died(f"ended with status {self.process.wait(5)}")
        if answer.status_code != 200:
            raise self._failure(
                f"refused {path}: HTTP {answer.status_code}: {answer.text[:300]}")

    def _request(self, method, path, send_key=True, timeout=60, **options):
        return httpx.request(method, self.url + path, headers=self._headers() if send_key else {},
                             timeout=timeout, trust_env=self.trust_env, **options)

    def _headers(self):
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    # ──────── waiting and restarting ────────

    def wait(self):
        """Returns when the server is healthy, and refuses requests that do not carry the key.

        A failed first start raises RolloutError; a failed restart counts as another death.
        """
        if self.ready:
            return
        until = time.monotonic() + START_SECONDS
        while True:
            if self.closed:
                raise self._failure("is closed")
            if self.process and self.process.poll() is not None:
                what = self._ended_early()
                if not self.deaths:
                    raise self._failure(what)
                self.recover(what)
            if self.answers():
                break
            if time.monotonic() > until:
                raise self._failure(f"was not healthy after {START_SECONDS} s")
            time.sleep(0.5)
        if self.key:
            path = "/is_paused" if self.weights_change else "/v1/models"
            status = self._request("GET", path, send_key=False, timeout=30).status_code
            if status != 401:
                raise self._failure(
                    f"answers {path} without the key (HTTP {status}); start it with --middleware "
                    "vllm_worker.RequireKey, and with VLLM_API_KEY and VLLM_SERVER_DEV_MODE=1 set")
        self.ready = True
        if self.ours and self.weights_change:
            self._post("/update_weight_version", json={"new_version": str(self.version)})

    def answers(self):
        """True if the server answers /health."""
        try:
            answer = self._request("GET", "/health", send_key=False, timeout=5)
            return answer.status_code == 200
        except httpx.TransportError:
            return False

    def raise_if_never_ready(self):
        """Raises RolloutError if the first start has failed. Returns at once in every other case.

        For a process that keeps the server for another one, and therefore never calls wait().
        """
        self.ready = self.ready or self.answers()
        if not self.ready and self.process.poll() is not None:
            raise self._failure(self._ended_early())

    def recover(self, fault):
        """Restarts the server after a death or a hang, with the weights that were pushed last.

        Raises RolloutError if it has died DEATHS times in a row, is not ours, or is being closed.
        """
        self.deaths += 1
        if self.closed or not self.ours or self.deaths >= DEATHS:
            raise self._failure(f"{fault}, {self.deaths} in a row" if self.ours else str(fault))
        print(f"the vLLM server {fault}: starting it again with weights of version {self.version}",
              flush=True)
        if self.restart:
            self.url, self.ready = self.restart(self.folder), False
        else:
            self.move_to(self.folder)

    def move_to(self, folder):
        """Ends the subprocess and starts a new one on another checkpoint folder."""
        self.folder = folder
        self._stop()
        self._start()

    # ──────── the subprocess ────────

    def _start(self):
        command, host = self.command, self.command.host
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        self.url, self.ready = f"http://{host}:{port}", False
        words = [command.python, "-m", "vllm.entrypoints.openai.api_server",
                 "--model", self.folder, "--host", host, "--port", port,
                 "--served-model-name", self.name, "--dtype", self.dtype,
                 "--generation-config", "vllm", "--middleware", "vllm_worker.RequireKey"]
        if self.weights_change:
            words += ["--logprobs-mode", "processed_logprobs",
                      "--worker-extension-cls", "vllm_worker.WeightReload",
                      "--limit-mm-per-prompt",
                      json.dumps({"image": 0, "video": 0, "audio": command.clips}),
                      "--mm-processor-cache-gb", "0",
                      "--chat-template-content-format", "openai"]
            if command.fp32_head:
                words += ["--hf-overrides", json.dumps({"head_dtype": "float32"})]
        words += _batch_flags(command)
        # Not this folder: vLLM's environment must not see modules named config, data or server.
        plugin = Path(__file__).resolve().parent / "vllm_plugin"
        path = [str(plugin), os.environ.get("PYTHONPATH", "")]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **_without_torchrun(os.environ),
            "VLLM_API_KEY": self.key,  # every user of the machine can read a command line
            "VLLM_SERVER_DEV_MODE": str(int(self.weights_change)),
            "PYTHONPATH": os.pathsep.join(filter(None, path))}
        read_end, self.lifeline = os.pipe()
        with open(command.log, "ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                ["sh", "-c", GUARD, "sh", *map(str, words), *shlex.split(command.flags)],
                stdin=read_end, stdout=log, stderr=log, env=environment, start_new_session=True)
        os.close(read_end)

    def _stop(self):
        """Ends the process group: SIGTERM to the server, which ends its workers; then SIGKILL."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        # As long as the guard lives, the group's number cannot be given to another group.
        with contextlib.suppress(ProcessLookupError):  # the whole group is gone, guard included
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.lifeline)
        self.process = None

    def _raise_if_dead(self):
        if self.closed:
            raise _Died("is closed")
        if self.process and self.process.poll() is not None:
            raise _Died(f"ended with status {self.process.returncode}")

    def _ended_early(self):
        return f"ended with status {self.process.returncode} before it was ready"

    def _failure(self, what):
        """RolloutError with what happened, the log's first exception, and its last ten lines."""
        lines = []
        if self.process:
            log = Path(self.command.log).read_bytes()[self.log_start:]
            lines = log.decode(errors="replace").splitlines()
            raised = [x for x in lines if re.search(r"(^|\] )[\w.]*(Error|Exception): ", x)]
            lines = raised[:1] + lines[-10:]
        return RolloutError("\n".join([f"the vLLM server at {self.url} {what}", *lines]))


# The shell becomes the server (exec). Beside it, in the same process group, a second shell reads
# from a pipe that nothing is ever written to. When the trainer ends, for whatever reason, the pipe
# closes, and the second shell ends the whole group.
GUARD = """exec 3<&0
(trap '' TERM; read _ <&3; kill -TERM 0; sleep 5; kill -KILL 0) &
exec "$@" </dev/null 3<&-"""


def reload_call(folder):
    """Body of the request that runs vllm_worker.WeightReload.load_folder on every worker."""
    return {"method": "load_folder", "args": [str(folder)], "timeout": PUSH_SECONDS}


def _batch_flags(command):
    """vLLM's flags for `command.sequences` completions at a time. command.flags come later and win.

    By itself vLLM makes CUDA graphs for up to 512. Above that, their sizes are multiples of 16.
    """
    size = min(command.sequences, 2048)  # the smallest default of --max-num-batched-tokens
    if size <= 512 or re.search("max.num.seqs|cudagraph", command.flags):
        return ["--max-num-seqs", size] if size else []
    size = -(-size // 16) * 16
    return ["--max-num-seqs", size, "--max-cudagraph-capture-size", size]


def _without_torchrun(environment):
    """An environment without what torchrun sets: vLLM would take it for its own processes."""
    kept = {name: x for name, x in environment.items() if not re.fullmatch(TORCHRUN, name)}
    # It sets one thread where the user has set no number.
    if "TORCHELASTIC_RUN_ID" in environment and kept.get("OMP_NUM_THREADS") == "1":
        del kept["OMP_NUM_THREADS"]
    return kept


def _dtype(folder):
    """The dtype that a checkpoint's config.json names, or "auto"."""
    config = json.loads((Path(folder) / "config.json").read_text())
    for part in (config, config.get("thinker_config", {})):
        for name in ("dtype", "torch_dtype"):
            if part.get(name):
                return part[name]
    return "auto"


def _is_loopback(host):
    with contextlib.suppress(ValueError):  # a name, not an address
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class _Died(Exception):
    """The server has ended or hangs."""
