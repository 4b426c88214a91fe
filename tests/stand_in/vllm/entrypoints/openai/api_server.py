"""A stand-in for `python -m vllm.entrypoints.openai.api_server`, for tests without vLLM.

It answers the requests that server.Server makes with a policy of transformers in this repository's
own environment, and it fails on demand.

Prompt ids are made from the request, not taken from the trainer: its clips are padded to whole
frames of 10 ms, as vLLM does, and its messages go through the chat template. Like vLLM, the
stand-in by itself guards no path outside /v1, has the endpoints that run methods by name only if
VLLM_SERVER_DEV_MODE is 1, and sends log-probs of the unmodified distribution unless a flag says
otherwise. It imports and uses the middleware and the worker extension that the flags name.

STAND_IN names a json file of faults. It is read again on every request, and a change resets all
counts:
    fail, drop, html: n      the next n chat completions get HTTP 500, then n no answer, then n an
                             answer that is not json
    refuse: true             chat completions get HTTP 400
    delay: s or [s, ...]     seconds that each chat completion takes, or the first, the second, ...
    wrong_prompt, short_group, nan, null, no_ids, no_tokens, no_logps, few_logps, cut, abort: true
                             chat completions have this defect
    hang: true or "chat"     chat completions are no longer answered; with true, nor is /metrics
    blind: true              connections to /metrics are closed without an answer
    die_after: n             the process dies at the chat completion after n answered ones
    die_on_push: true        the process dies at /collective_rpc; "late": it answers HTTP 500 and
                             dies a moment later
    die_at_start: text       the process dies with this error before it listens
    light: true              starts immediately and without a model, for tests that sample nothing
    refuse_push: true        /collective_rpc gets HTTP 500
    ignore_push: true        /collective_rpc gets HTTP 200, but the weights stay the same
    open: true or "rpc"      no path needs a key; "rpc": no path outside /v1 does
    say: text                the answer to a question without a clip, as a checker asks it
    once: true               the file is emptied when a process dies or hangs, so that the next
                             process has no faults

STAND_IN_LOG names a file that gets one line of json per request.
"""

import argparse
import asyncio
import base64
import importlib
import io
import json
import math
import os
import shutil
import socket
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

GUARDED = ("/v1",)  # the paths for which vLLM itself checks the key
DEVELOPMENT = ("/pause", "/resume", "/is_paused", "/collective_rpc", "/reset_prefix_cache",
               "/update_weight_version", "/weight_info")  # only with VLLM_SERVER_DEV_MODE=1


class Faults:
    """The faults in the file that STAND_IN names, and how often each was counted."""

    def __init__(self):
        self.lock, self.text, self.wanted, self.used = threading.Lock(), "", {}, {}
        self.path = Path(os.environ["STAND_IN"]) if "STAND_IN" in os.environ else None

    def read(self):
        text = self.path.read_text() if self.path and self.path.is_file() else ""
        with self.lock:
            if text != self.text:
                self.text, self.wanted, self.used = text, json.loads(text or "{}"), {}
            return self.wanted

    def count(self, name):
        """Counts `name`. → how often it was counted before, since the file last changed"""
        with self.lock:
            self.used[name] = self.used.get(name, 0) + 1
            return self.used[name] - 1

    def clear_if_once(self):
        """Called before the process dies or hangs."""
        if self.wanted.get("once"):
            self.path.write_text("")

    def die(self):
        self.clear_if_once()
        os._exit(1)

    def hang(self):
        self.clear_if_once()
        threading.Event().wait()


class Engine:
    """The policy, with what the worker extension uses of a vLLM worker.

    That is `device`, `model_runner.get_model()` and `reload_weights`.
    """

    def __init__(self, options):
        import torch

        from checkpoint import load_policy
        torch.set_num_threads(1)
        self.options, self.device, self.model_runner = options, torch.device("cpu"), self
        self.policy, self.lock = load_policy(options.model), threading.Lock()
        self.version, self.tokens, self.resumed = "default", 0, threading.Event()
        self.resumed.set()

    def get_model(self):
        return self.policy.base

    def reload_weights(self, weights_iterator):
        from safetensors.torch import save_file

        from checkpoint import load_policy
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(self.options.model, folder, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("*.safetensors*"))
            save_file(dict(weights_iterator), Path(folder) / "model.safetensors",
                      metadata={"format": "pt"})
            self.policy = load_policy(folder)

    def call(self, method, args=(), kwargs=None, timeout=None):
        """Runs a method of the worker extension by its name, like /collective_rpc."""
        if not self.options.worker_extension_cls:
            raise AttributeError(f"no method {method} on the workers")
        extension = named(self.options.worker_extension_cls)()
        extension.model_runner, extension.device = self.model_runner, self.device
        extension.reload_weights = self.reload_weights  # vLLM's worker inherits from the extension
        with self.lock:
            getattr(extension, method)(*args, **(kwargs or {}))

    def prompt(self, content):
        """The content of a message → data.Prompt, made of the text and samples in it."""
        import numpy as np
        import soundfile

        from data import Prompt, log_mel
        policy, features, parts = self.policy, [], []
        family, hop = policy.family, policy.feature_extractor.hop_length
        for part in content:
            if part["type"] == "input_audio":
                data = io.BytesIO(base64.b64decode(part["input_audio"]["data"]))
                samples, rate = soundfile.read(data, dtype="float32")
                if rate != 16000 or samples.ndim != 1 or part["input_audio"]["format"] != "wav":
                    raise ValueError("a clip must be a wav file with one channel of 16 kHz")
                samples = np.pad(samples, (0, -len(samples) % hop))
                features.append(log_mel(samples, policy.feature_extractor, family))
                part = {"type": "audio"}
            parts.append(part)
        limit = self.options.limit_mm_per_prompt
        if len(features) > json.loads(limit).get("audio", math.inf):
            raise ValueError(f"At most {limit} may be provided in one prompt.")
        rendered = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=True, add_generation_prompt=True,
            return_dict=False)
        ids, count = [], iter([family.tokens(frames) for _, frames in features])
        for token in rendered:
            ids += [token] * (next(count) if token == policy.audio_token_id else 1)
        return Prompt(SimpleNamespace(id="a request"), ids, [], *zip(*features))

    def complete(self, body):
        """The body of a chat completion → prompt ids, completions, and the log-probs of each"""
        from rollout import Sampling, sample
        with self.lock:
            policy, prompt = self.policy, self.prompt(body["messages"][0]["content"])
            bias = body.get("logit_bias", {})
            policy.placeholder_ids = [int(i) for i, value in bias.items() if value == -100]
            stop_ids = body.get("stop_token_ids", [])
            policy.eos_ids = sorted({policy.tokenizer.eos_token_id, *stop_ids})
            fields = ("temperature", "top_k", "top_p", "repetition_penalty")
            sampling = Sampling(
                max_new_tokens=body["max_tokens"],
                **{"temperature": 1.0, **{name: body[name] for name in fields if name in body}})
            completions = sample(policy, [prompt], body.get("n", 1), sampling, seed=body["seed"])
            self.tokens += sum(len(c.token_ids) for c in completions)
            logps = [c.logps for c in completions]
            if self.options.logprobs_mode != "processed_logprobs":
                batch = policy.collate([prompt] * len(completions),
                                       [c.token_ids for c in completions])
                logps = [row[:len(c.token_ids)]
                         for row, c in zip(policy(batch).logp.tolist(), completions)]
        return prompt.ids, completions, logps


class NoEngine:
    """Takes the place of Engine for the fault `light`."""

    def __init__(self, options):
        self.options, self.version, self.tokens = options, "default", 0
        self.resumed = threading.Event()
        self.resumed.set()

    def call(self, **_):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine = faults = guard = None  # set by main()
    in_flight, counting = 0, threading.Lock()

    def do_GET(self):
        # Not self.path: it turns two leading slashes into one.
        url = urlsplit("http://host" + self.requestline.split()[1])
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or "null") or {}
        wanted, chat = self.faults.read(), url.path == "/v1/chat/completions"
        record = {"path": url.path, "query": url.query, "pid": os.getpid()}
        with self.counting:
            Handler.in_flight += chat
            self.counted = chat
            if chat:
                record |= {"seed": body.get("seed"), "n": body.get("n"),
                           "in_flight": self.in_flight}
            if "STAND_IN_LOG" in os.environ:
                with open(os.environ["STAND_IN_LOG"], "a") as log:
                    log.write(json.dumps(record) + "\n")
        try:
            if not self.allowed(url.path, wanted):
                self.answer(401, {"error": "the key is missing or wrong"})
            elif url.path in DEVELOPMENT and os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
                self.answer(404, {"detail": "Not Found"})
            else:
                getattr(self, url.path.rpartition("/")[2], self.nothing)(body, wanted)
        except Exception as error:  # vLLM also answers with an error
            self.answer(400 if isinstance(error, ValueError) else 500, {"error": repr(error)})
        finally:
            self.ended()

    do_POST = do_GET

    def allowed(self, path, wanted):
        """Asks the middleware if there is one, then applies vLLM's own rule."""
        key, given = os.environ.get("VLLM_API_KEY"), self.headers.get("Authorization", "")
        if wanted.get("open") is True:
            return True
        if self.guard and not wanted.get("open"):
            sent, passed = [], []

            async def application(scope, receive, send):
                passed.append(True)

            async def send(message):
                sent.append(message)

            headers = [(b"authorization", given.encode())] if given else []
            scope = {"type": "http", "path": path, "headers": headers}
            asyncio.run(self.guard(application)(scope, None, send))
            if not passed:
                return False
        return not key or not path.startswith(GUARDED) or given == f"Bearer {key}"

    def ended(self):
        with self.counting:
            Handler.in_flight -= self.counted
            self.counted = False

    def answer(self, status, body):
        self.ended()  # before the client gets the answer
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drop(self):
        self.ended()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def nothing(self, body, wanted):
        self.answer(404, {"detail": "Not Found"})

    # ── the endpoints ──

    def health(self, body, wanted):
        self.answer(200, "")

    def models(self, body, wanted):
        self.answer(200, {"data": [{"id": self.engine.options.served_model_name}]})

    def metrics(self, body, wanted):
        if wanted.get("hang") is True:
            self.faults.hang()
        if wanted.get("blind"):
            self.drop()
            return
        name = "vllm:generation_tokens_total"
        self.answer(200, f"# TYPE {name} counter\n"
                         f'{name}{{engine="0"}} {float(self.engine.tokens)}\n')

    def weight_info(self, body, wanted):
        self.answer(200, {"weight_version": self.engine.version})

    def update_weight_version(self, body, wanted):
        self.engine.version = body["new_version"]
        self.answer(200, {"success": True})

    def is_paused(self, body, wanted):
        self.answer(200, {"is_paused": not self.engine.resumed.is_set()})

    def pause(self, body, wanted):
        self.engine.resumed.clear()
        self.answer(200, {"status": "paused"})

    def resume(self, body, wanted):
        self.engine.resumed.set()
        self.answer(200, {"status": "resumed"})

    def reset_prefix_cache(self, body, wanted):
        self.answer(200, "")

    def collective_rpc(self, body, wanted):
        if wanted.get("die_on_push") == "late":
            threading.Timer(0.3, self.faults.die).start()
            self.answer(500, {"error": "the engine is dead"})
            return
        if wanted.get("die_on_push"):
            self.faults.die()
        if wanted.get("refuse_push"):
            self.answer(500, {"error": "the weights do not fit"})
            return
        if not wanted.get("ignore_push"):
            self.engine.call(**body)
        self.answer(200, {"results": [None]})

    def completions(self, body, wanted):
        faults, arrived = self.faults, self.faults.count("arrived")
        self.engine.resumed.wait()
        if body.get("model") != self.engine.options.served_model_name:
            self.answer(404, {"error": f"The model {body.get('model')} does not exist."})
            return
        if isinstance(body["messages"][0]["content"], str):
            if faults.count("answered") >= wanted.get("die_after", math.inf):
                faults.die()
            reply = wanted.get("say", "YES")
            self.answer(200, {"choices": [{"message": {"content": reply}}]})
            return
        delay = wanted.get("delay", 0)
        if isinstance(delay, list):
            delay = delay[arrived] if arrived < len(delay) else 0
        time.sleep(delay)
        temporary = [name for name in ("fail", "drop", "html") for _ in range(wanted.get(name, 0))]
        fault = temporary[arrived] if arrived < len(temporary) else None
        if wanted.get("refuse"):
            self.answer(400, {"error": "The prompt is longer than the maximum model length"})
        elif fault == "fail":
            self.answer(500, {"error": "a temporary fault"})
        elif fault == "drop":
            self.drop()
        elif fault == "html":
            self.answer(200, "<html>a proxy</html>")
        elif wanted.get("hang"):
            faults.hang()
        else:
            if faults.count("answered") >= wanted.get("die_after", math.inf):
                faults.die()
            self.answer(200, self.chat_completion(body, wanted))

    def chat_completion(self, body, wanted):
        ids, completions, logps = self.engine.complete(body)
        choices = []
        for i, (completion, values) in enumerate(zip(completions, logps)):
            tokens, reason = completion.token_ids, completion.finish_reason
            if wanted.get("cut"):
                tokens, values, reason = [*tokens, 0], [*values, -1.0], "stop"
            if wanted.get("abort"):
                reason = "abort"
            if wanted.get("few_logps"):
                values = values[:-1]
            if wanted.get("nan") or wanted.get("null"):
                values = [math.nan if wanted.get("nan") else None, *values[1:]]
            choice = {"index": i, "finish_reason": reason, "message": {"role": "assistant"},
                      "logprobs": None}
            if body.get("return_token_ids") and not wanted.get("no_tokens"):
                choice["token_ids"] = tokens
            if body.get("logprobs") and not wanted.get("no_logps"):
                choice["logprobs"] = {"content": [{"logprob": value} for value in values]}
            choices.append(choice)
        choices.reverse()  # the client must sort them by index
        if wanted.get("short_group"):
            choices = choices[1:]
        answer = {"object": "chat.completion", "choices": choices}
        if body.get("return_token_ids") and not wanted.get("no_ids"):
            if wanted.get("wrong_prompt"):
                ids = [ids[0] + 1, *ids[1:]]
            answer["prompt_token_ids"] = ids
        return answer


class Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


def named(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("model", "host", "served-model-name", "middleware", "worker-extension-cls"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    parser.add_argument("--limit-mm-per-prompt", default="{}")
    options, _ = parser.parse_known_args()
    faults = Handler.faults = Faults()
    if "die_at_start" in faults.read():
        faults.clear_if_once()
        raise RuntimeError(faults.wanted["die_at_start"])
    if not list(Path(options.model).glob("*.safetensors")):
        raise FileNotFoundError(f"{options.model}: no weights")
    Handler.engine = (NoEngine if faults.wanted.get("light") else Engine)(options)
    Handler.guard = named(options.middleware) if options.middleware else None
    Listener((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
