"""Rollouts: G completions y⁽¹⁾..y⁽ᴳ⁾ ~ π_θ(· | x) for every prompt (Algorithm 1, line 3), behind one call.

    completions = sample(policy, prompts, G, temperature=1.2, max_new_tokens=1200, seed=0)                  # here
    with Server("Qwen3-Omni-30B-A3B-Thinking", python=".venv-vllm/bin/python", log="vllm.log") as server:   # on vLLM
        completions = sample(policy, prompts, G, temperature=1.2, max_new_tokens=1200, seed=0, server=server)
        push_weights(server, policy, "runs/weights", version=4)

In this process the prompt of a group, audio encoder included, runs once; its keys and values are then repeated for the
G samples. A vLLM server (the paper's way) is a process of its own: it gets the audio with each question, and the
policy's weights after each update. What it answers is checked: its prompt's token ids must be ours, and after a push
the log-probs of what it samples.
"""

import asyncio
import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import soundfile
import tenacity
import torch
from tqdm import tqdm
from transformers import (LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

from data import SAMPLE_RATE, InputError, conversation
from model import positions

SEQUENCES = 256  # completions decoded at a time in this process; bounds the KV cache
IN_FLIGHT = 64  # questions at a time on a server
ATTEMPTS = 5  # of one request, when the connection or the server has a passing fault
START_SECONDS = 1800  # a server that is not healthy by then has failed: the 30B takes minutes to load
STALL_SECONDS = 300  # a server that makes no token for so long, with questions in flight, counts as dead
PUSH_SECONDS = 600  # longest reload of the weights
DEATHS = 3  # in a row, that end the run
CHECK_TOKENS = 32  # length of the completions that check_push compares


@dataclass(frozen=True)
class Completion:
    """One sampled completion. EOS, where the policy wrote it, is its last token."""

    token_ids: list[int]
    logps: list[float]  # the sampler's own log-probs, after temperature, top-k and top-p, renormalised; nats
    finish_reason: str  # "stop" (an EOS was sampled) or "length" (max_new_tokens reached)


class RolloutError(RuntimeError):
    """The server cannot go on, or answers what training must not use. One line, then the server's last log lines."""


def sample(policy, prompts, group_size, *, temperature, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens,
           seed, progress=False, server=None):
    """`group_size` completions of every prompt → list[Completion], the completions of a prompt contiguous.

    temperature 0 is greedy decoding; top_k 0 and top_p 1 leave the distribution whole. Placeholder ids are banned. On a
    `server` (see Server) the weights are those that were pushed last; without one the policy samples in this process,
    where the same seed gives the same completions. Raises RolloutError.
    """
    if server is not None:
        body = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
                "max_tokens": max_new_tokens, "n": group_size}
        return server.complete([(prompt.question.id, _request(policy, prompt, body, f"{seed} {i}"))
                                for i, prompt in enumerate(prompts)],
                               lambda i, answer: _read(answer, policy, prompts[i], group_size), progress)
    with torch.no_grad():
        return _sample_here(policy, prompts, group_size, temperature, top_k, top_p, repetition_penalty, max_new_tokens,
                            seed, progress)


# ───────────────────────────────────────────────────── in this process ────────────────────────────────────────────────


def _sample_here(policy, prompts, group_size, temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed,
                 progress):
    # In training mode with checkpointing transformers drops the cache, and would sample from nothing.
    policy.eval()
    generator = torch.Generator(policy.device).manual_seed(seed)
    chain = [SuppressTokensLogitsProcessor(policy.placeholder_ids, device=policy.device)]
    if repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature not in (0, 1):
        chain.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    prompts_at_once = max(1, SEQUENCES // group_size)
    completions = []
    for start in tqdm(range(0, len(prompts), prompts_at_once), desc="generate", leave=False, disable=not progress):
        completions += policy.run(_sample_chunk, policy, prompts[start:start + prompts_at_once], group_size,
                                  LogitsProcessorList(chain), temperature == 0, max_new_tokens, generator)
    return completions


def _sample_chunk(policy, prompts, group_size, processors, greedy, max_new_tokens, generator):
    base, device = policy.base, policy.device
    batch = policy.collate(prompts, [[]] * len(prompts)).to(device)  # with no completion T is 1, a column of padding
    ids, attention_mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]  # [P, prompt length]
    output = base.model(input_ids=ids, attention_mask=attention_mask, position_ids=positions(attention_mask),
                        use_cache=True, **batch.audio)  # every prompt once
    cache = output.past_key_values
    cache.batch_repeat_interleave(group_size)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(group_size, dim=0)  # [B, D], B = P·G
    # The repetition penalty reads `ids`: padding must name no new token, so it repeats the row's first.
    first = ids.gather(1, attention_mask.argmax(dim=1, keepdim=True))
    ids = torch.where(attention_mask.bool(), ids, first).repeat_interleave(group_size, dim=0)
    attention_mask = attention_mask.repeat_interleave(group_size, dim=0)
    eos = torch.tensor(policy.eos_ids, device=device)

    rows = torch.arange(len(ids), device=device)  # rows: the completions still being written
    tokens = torch.zeros(len(ids), max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(len(ids), max_new_tokens, device=device)
    lengths = torch.full((len(ids),), max_new_tokens, device=device)
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        scores = processors(ids, base.lm_head(hidden).float())  # [rows, V]
        log_probs = scores.log_softmax(dim=-1)
        token = scores.argmax(-1) if greedy else torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
        tokens[rows, t], logps[rows, t] = token, log_probs.gather(1, token[:, None])[:, 0]
        done = torch.isin(token, eos)
        lengths[rows[done]], stopped[rows[done]] = t + 1, True
        if done.all() or t + 1 == max_new_tokens:
            break
        ids = torch.cat([ids, token[:, None]], dim=1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(ids), 1)], dim=1)
        if done.any():  # finished rows leave the batch, and the cache
            keep = (~done).nonzero()[:, 0]
            rows, ids, attention_mask = rows[keep], ids[keep], attention_mask[keep]
            cache.batch_select_indices(keep)
        output = base.model(input_ids=ids[:, -1:], attention_mask=attention_mask, use_cache=True, past_key_values=cache,
                            position_ids=positions(attention_mask)[:, -1:])
        hidden = output.last_hidden_state[:, -1]
    tokens, logps, lengths, stopped = tokens.tolist(), logps.tolist(), lengths.tolist(), stopped.tolist()
    return [Completion(tokens[i][:n], logps[i][:n], "stop" if stopped[i] else "length") for i, n in enumerate(lengths)]


# ──────────────────────────────────────────────────── on a vLLM server ────────────────────────────────────────────────


def _request(policy, prompt, body, seed):
    """→ a function that makes the body of the chat completion: the clips are read when their turn comes."""
    def make():
        content = []
        for part in conversation(prompt.question, True, prompt.instruction)[0]["content"]:
            if part["type"] == "audio":
                wav = io.BytesIO()  # the very samples of our encoder; as floats, for they are no 16-bit numbers
                soundfile.write(wav, policy.clip(part["audio"]), SAMPLE_RATE, format="WAV", subtype="FLOAT")
                part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav.getvalue()).decode(),
                                                               "format": "wav"}}
            content.append(part)
        # vLLM gives the G samples seed, seed + 1, …: a hash keeps those of different questions apart.
        return {**body, "messages": [{"role": "user", "content": content}],
                "seed": int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6]), "logprobs": True,
                "return_token_ids": True, "stop_token_ids": policy.eos_ids,
                "logit_bias": {str(i): -100 for i in policy.placeholder_ids}}
    return make


def _read(answer, policy, prompt, group_size):
    try:
        return _group(answer, policy, prompt, group_size)
    except (LookupError, TypeError) as error:
        raise RolloutError(f"question {prompt.question.id}: the server's answer lacks token ids or log-probs "
                           f"({error!r}); vLLM 0.32 sends them") from error


def _group(answer, policy, prompt, group_size):
    """The answer to a chat completion → the G Completions of its prompt. Raises RolloutError unless it is whole."""
    question, ids = prompt.question.id, answer["prompt_token_ids"]
    if ids != prompt.ids:
        at = next((i for i, (there, here) in enumerate(zip(ids, prompt.ids)) if there != here), "the end of one")
        raise RolloutError(f"question {question}: the server's prompt has {len(ids)} tokens and the trainer's "
                           f"{len(prompt.ids)}, different from {at} on; both must have the same tokenizer, chat "
                           "template and processor files")
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != group_size:
        raise RolloutError(f"question {question}: the server sent {len(choices)} completions, {group_size} were asked "
                           "for")
    group = []
    for choice in choices:
        logps = [token["logprob"] for token in choice["logprobs"]["content"]]
        completion = Completion(choice["token_ids"], logps, choice["finish_reason"])
        whole = {"stop": completion.token_ids[-1] in policy.eos_ids, "length": True}.get(completion.finish_reason)
        if not whole or len(logps) != len(completion.token_ids) or not all(map(math.isfinite, logps)):
            raise RolloutError(f"question {question}: the server sent {len(completion.token_ids)} tokens, {len(logps)} "
                               f"log-probs and finish reason {completion.finish_reason!r}; not a whole completion")
        group.append(completion)
    return group


def push_weights(server, policy, folder, version):
    """Gives the server the policy's weights (LoRA merged) as `version`, a number that the server repeats on demand.

    Written under `folder` as a checkpoint of the original layout, renamed when whole, loaded while the server is
    paused. A server that dies or hangs meanwhile starts again on the new weights. Of a sharded policy every rank calls
    it; on ranks other than 0 `server` is None. Raises RolloutError.
    """
    folder = Path(folder).resolve()
    building, final = folder / f".version-{version}.writing", folder / f"version-{version}"
    if server is None:
        policy.weights()
        return
    for leftover in (*folder.glob(".version-*.writing"), final):
        shutil.rmtree(leftover, ignore_errors=True)
    policy.save(building)
    building.rename(final)
    server.load(final, version)
    for older in folder.glob("version-*"):
        if older != final:
            shutil.rmtree(older)


@torch.no_grad()
def check_push(server, policy, prompts, *, temperature, max_gap, seed, share=lambda value: value):
    """→ mean |log π_server(y_t) − log π_θ(y_t)|, nats a token, on a short completion of each prompt.

    The server samples them from its whole distribution, the policy scores the same tokens. A server that answers 200 to
    a push proves nothing: vLLM has reloaded wrong numbers without an error. Raises RolloutError above `max_gap`. Of a
    sharded policy every rank calls it: `server` is None on the others, and `share` gives them rank 0's completions.
    """
    completions = share(None if server is None else
                        sample(policy, prompts, 1, temperature=temperature, max_new_tokens=CHECK_TOKENS, seed=seed,
                               server=server))
    policy.eval()
    batch = policy.collate(prompts, [c.token_ids for c in completions])
    trainer = policy(batch, temperature).logp.cpu()[batch.completion_mask]
    there = torch.tensor([logp for c in completions for logp in c.logps])
    gap = (there - trainer).abs().mean().item()
    if not gap <= max_gap:  # NaN stops as well
        raise RolloutError(f"weights of version {getattr(server, 'version', '?')}: the server's log-probs are "
                           f"{gap:.3g} nats a token from the trainer's, more than {max_gap} (means: server "
                           f"{there.mean():.4f}, trainer {trainer.mean():.4f}); it does not hold the policy's "
                           "weights, or computes otherwise")
    return gap


# `sh` becomes the server. Beside it, in the same process group, a shell reads from a pipe that nobody writes to: when
# the trainer is gone, however it went, the pipe ends, and the shell ends the group.
GUARD = """exec 3<&0
(trap '' TERM; read _ <&3; kill -TERM 0; sleep 5; kill -KILL 0) &
exec "$@" </dev/null 3<&-"""


class Server:
    """A vLLM server: a subprocess (`python`: the interpreter of vLLM's environment), or one that runs at `url`.

    folder: the checkpoint to serve; log: file of its output; flags: more of vLLM's, one string; clips: most clips in a
    question; weights_change: False for a server that nobody pushes to (the checker); name: what requests call the
    model. Used as a context manager, it starts on entry, loads while other work goes on, and is awaited by the first
    request. Its process group ends with the block, and with this process, whatever ends it.

    Every endpoint but /health needs the key: random bytes for a subprocess, VLLM_API_KEY for a url. Raises InputError
    for an address other than loopback without a key; RolloutError when the server does not come up.
    """

    def __init__(self, folder, *, python=None, url=None, log=None, flags="", clips=1, weights_change=True,
                 name="policy", host="127.0.0.1", key=None, restart=None):
        self.folder, self.python, self.log, self.flags = folder, python, log, flags
        self.url = url and url.rstrip("/")
        self.clips, self.weights_change, self.name, self.host = clips, weights_change, name, host
        self.key = key if key is not None else os.environ.get("VLLM_API_KEY", "") if url else secrets.token_hex(32)
        self.restart = restart  # folder → url, of a server that another process keeps for us
        if python and not log:
            raise InputError("a vLLM server needs a log file: Server(…, log=PATH)")
        if not self.key and not (url and _is_loopback(urlsplit(url).hostname)):
            raise InputError(f"the vLLM server at {url or host} has no key, and its endpoints run methods by name: set "
                             "VLLM_API_KEY, there and here")
        self.ours = python is not None or restart is not None
        self.trust_env = not self.ours  # http_proxy is for the servers of others; ours would get the key as well
        self.version = 0 if self.ours else None  # of the weights: None until the first push to a server of others
        self.deaths, self.process, self.ready, self.closed = 0, None, False, False

    def __enter__(self):
        if self.python:
            config = json.loads((Path(self.folder) / "config.json").read_text())
            dtypes = [c[name] for c in (config, config.get("thinker_config", {})) for name in ("dtype", "torch_dtype")
                      if c.get(name)]
            self.dtype = dtypes[0] if dtypes else "auto"  # that of the first folder: pushed weights may be wider
            Path(self.log).unlink(missing_ok=True)
            self._start()
        return self

    def __exit__(self, *_):
        self.closed = True
        self._stop()

    # ── the process ──

    def _start(self):
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            port = probe.getsockname()[1]
        self.url, self.ready = f"http://{self.host}:{port}", False
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder, "--host", self.host,
                   "--port", port, "--served-model-name", self.name, "--dtype", self.dtype,
                   "--generation-config", "vllm", "--middleware", "vllm_worker.RequireKey"]
        if self.weights_change:
            command += ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "vllm_worker.WeightReload",
                        "--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0, "audio": self.clips}),
                        "--mm-processor-cache-gb", "0", "--chat-template-content-format", "openai"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
                       "VLLM_NO_USAGE_STATS": "1", **os.environ, "VLLM_API_KEY": self.key,  # not on the command line
                       "VLLM_SERVER_DEV_MODE": str(int(self.weights_change)),
                       "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent),
                                                      *filter(None, [os.environ.get("PYTHONPATH")])])}
        read_end, self.lifeline = os.pipe()
        with open(self.log, "ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                ["sh", "-c", GUARD, "sh", *map(str, command), *shlex.split(self.flags)], stdin=read_end, stdout=log,
                stderr=log, env=environment, start_new_session=True)
        os.close(read_end)

    def _stop(self):
        """Ends the process group: SIGTERM to the server, which ends its own processes, then SIGKILL to all of them."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):  # somebody has killed all of it, the guard as well
            os.killpg(self.process.pid, signal.SIGKILL)  # while the guard lives, the number is not another group's
        self.process.wait()
        os.close(self.lifeline)
        self.process = None

    def wait(self):
        """Until the server is healthy, and refuses who has no key. A first start that fails is an error; a later one
        counts as a death."""
        if self.ready:
            return
        until = time.monotonic() + START_SECONDS
        while True:
            if self.closed:
                raise self._failure("is closed")
            if self.process and self.process.poll() is not None:
                what = f"ended with status {self.process.returncode} before it was ready"
                if not self.deaths:
                    raise self._failure(what)
                self.recover(what)
            if self.answers():
                break
            if time.monotonic() > until:
                raise self._failure(f"was not healthy after {START_SECONDS} s")
            time.sleep(0.5)
        path = "/is_paused" if self.weights_change else "/v1/models"
        if self.key and (status := httpx.get(self.url + path, timeout=30,
                                           trust_env=self.trust_env).status_code) != 401:
            raise self._failure(f"answers {path} without the key (HTTP {status}); start it with --middleware "
                                "vllm_worker.RequireKey, VLLM_API_KEY and VLLM_SERVER_DEV_MODE=1")
        self.ready = True
        if self.ours and self.weights_change:
            self._post("/update_weight_version", {"new_version": str(self.version)})

    def raise_if_never_ready(self):
        """For who keeps the server for another process, which awaits it: RolloutError when the first start fails."""
        self.ready = self.ready or self.answers()
        if not self.ready and self.process.poll() is not None:
            raise self._failure(f"ended with status {self.process.returncode} before it was ready")

    def answers(self):
        """Is there somebody at the address?"""
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=self.trust_env).status_code == 200
        except httpx.TransportError:
            return False

    def _failure(self, what):
        """The error that ends the run: what happened, the first exception in the server's log, the log's last lines."""
        lines = []
        if self.log and self.process:
            lines = Path(self.log).read_bytes()[self.log_start:].decode(errors="replace").splitlines()
            raised = [line for line in lines if re.search(r"(^|\] )[\w.]*(Error|Exception): ", line)]
            lines = raised[:1] + lines[-10:]
        return RolloutError("\n".join([f"the vLLM server at {self.url} {what}", *lines]))

    def recover(self, fault):
        """After a death or a hang: the server again, with the weights of the last push. Raises RolloutError when it has
        died DEATHS times in a row, was not started here, or is being closed."""
        self.deaths += 1
        if self.closed or not self.ours or self.deaths >= DEATHS:
            raise self._failure(f"{fault}, {self.deaths} in a row" if self.ours else str(fault))
        print(f"the vLLM server {fault}: starting it again with weights of version {self.version}", flush=True)
        if self.restart:
            self.url, self.ready = self.restart(self.folder), False
        else:
            self.move_to(self.folder)

    def move_to(self, folder):
        """Ends the process, and starts another on `folder`."""
        self.folder = folder
        self._stop()
        self._start()

    # ── requests ──

    def _headers(self):
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def _post(self, path, body=None, timeout=60, **parameters):
        answer = httpx.post(self.url + path, json=body, params=parameters, headers=self._headers(), timeout=timeout,
                            trust_env=self.trust_env)
        if answer.status_code >= 500 and self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a server whose engine is dead ends of itself
                raise _Died(f"ended with status {self.process.wait(5)}")
        if answer.status_code != 200:
            raise self._failure(f"refused {path}: HTTP {answer.status_code}: {answer.text[:300]}")

    def load(self, folder, version):
        """Reloads the weights from a checkpoint folder; the server is paused meanwhile, and resumed if that fails."""
        self.folder, self.version = folder, version
        try:
            self.wait()
            self._post("/pause", mode="wait")
            try:
                self._post("/collective_rpc", reload_call(folder), timeout=PUSH_SECONDS)
                self._post("/reset_prefix_cache")
                self._post("/update_weight_version", {"new_version": str(version)})
            finally:
                self._post("/resume")
        except (_Died, httpx.TransportError) as fault:
            self.recover(f"died or hung during a push ({fault!r})")

    def complete(self, requests, read, progress):
        """The answers of chat completions, read(i, answer) → list each, in the order of `requests`, in one list. A
        request: (id of the question, function that makes the body).

        A request's answer counts whole or not at all, so that a group is never lost or doubled: what is missing when
        the server dies is asked again of its successor.
        """
        groups = {}
        with tqdm(desc="generate", unit=" tokens", leave=False, disable=not progress) as bar:
            while len(groups) < len(requests):
                try:
                    self.wait()
                    if self.weights_change:
                        self._check_version()
                    asyncio.run(self._ask([i for i in range(len(requests)) if i not in groups], requests, read, groups,
                                          bar))
                except (_Died, httpx.TransportError) as fault:
                    self.recover(str(fault))
        self.deaths = 0
        return [completion for i in range(len(requests)) for completion in groups[i]]

    def _check_version(self):
        answer = httpx.get(f"{self.url}/weight_info", headers=self._headers(), timeout=60,
                           trust_env=self.trust_env)
        held = answer.json().get("weight_version") if answer.status_code == 200 else f"HTTP {answer.status_code}"
        if str(held) != str(self.version):
            raise self._failure(f"holds weights of version {held}, and {self.version} was pushed: was it started "
                                "again, or does another run push to it?")

    async def _ask(self, missing, requests, read, groups, bar):
        slots, limits = asyncio.Semaphore(IN_FLIGHT), httpx.Limits(max_connections=IN_FLIGHT + 1)
        async with httpx.AsyncClient(base_url=self.url, headers=self._headers(), limits=limits,
                                     timeout=httpx.Timeout(60, read=None), trust_env=self.trust_env) as client:
            async def one(i):
                async with slots:
                    question, body = requests[i]
                    groups[i] = read(i, await self._chat(client, question, await asyncio.to_thread(body)))

            watch, work = asyncio.create_task(self._watch(client, bar)), asyncio.gather(*map(one, missing))
            try:
                await asyncio.wait([watch, work], return_when=asyncio.FIRST_COMPLETED)
                (work if work.done() else watch).result()  # raises the first fault
            finally:
                watch.cancel()
                work.cancel()
                await asyncio.gather(watch, work, return_exceptions=True)

    async def _chat(self, client, question, body):
        """One chat completion. Faults that may pass are tried again; ATTEMPTS of them in a row count as a death."""
        attempts = tenacity.AsyncRetrying(retry=tenacity.retry_if_exception_type(_PassingFault), reraise=True,
                                          stop=tenacity.stop_after_attempt(ATTEMPTS),
                                          wait=tenacity.wait_random_exponential(multiplier=0.5, max=10))
        try:
            async for attempt in attempts:
                with attempt:
                    self._raise_if_dead()
                    try:
                        answer = await client.post("/v1/chat/completions", json={**body, "model": self.name})
                    except httpx.TransportError as fault:
                        raise _PassingFault(f"{type(fault).__name__} {fault}") from fault
                    if answer.status_code in (408, 409, 429) or answer.status_code >= 500:
                        raise _PassingFault(f"HTTP {answer.status_code}: {answer.text[:200]}")
                    if answer.status_code != 200:
                        raise self._failure(f"refused question {question}: HTTP {answer.status_code}: "
                                            f"{answer.text[:300]}")
                    try:
                        return answer.json()
                    except ValueError as fault:
                        raise _PassingFault(f"no json: {answer.text[:200]}") from fault
        except _PassingFault as fault:
            raise _Died(f"gave no answer in {ATTEMPTS} attempts ({fault})") from fault

    async def _watch(self, client, bar):
        """Shows the tokens that the server makes; raises _Died when its process ends, or when it makes none."""
        made, since = None, time.monotonic()
        while True:
            self._raise_if_dead()
            try:
                text = (await client.get("/metrics", timeout=5)).text
                now = sum(map(float, re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", text, re.M)))
            except httpx.TransportError:
                now = made  # no answer, no progress
            if now != made:
                bar.update(int(now - made) if made is not None else 0)
                made, since = now, time.monotonic()
            elif time.monotonic() - since > STALL_SECONDS:
                raise _Died(f"made no token for {STALL_SECONDS} s")
            await asyncio.sleep(1)

    def _raise_if_dead(self):
        process = self.process
        if self.closed or process and process.poll() is not None:
            raise _Died("is closed" if self.closed else f"ended with status {process.returncode}")


def reload_call(folder):
    """The body of the call that reloads the weights: vllm_worker.WeightReload.load_folder on every worker."""
    return {"method": "load_folder", "args": [str(folder)], "timeout": PUSH_SECONDS}


def _is_loopback(host):
    with contextlib.suppress(ValueError):  # a name, no address
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class _Died(Exception):
    """The server has ended, or hangs."""


class _PassingFault(Exception):
    """A fault that may pass: worth another attempt."""
