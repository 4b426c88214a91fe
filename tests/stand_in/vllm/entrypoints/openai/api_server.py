"""A stand-in for `python -m vllm.entrypoints.openai.api_server`: the requests that rollout.Server makes, answered by a
policy of transformers in this repository's own environment, and faults on demand.

Its prompt ids come from what was sent, not from the trainer: the clips of the request padded to whole frames of 10 ms,
as vLLM does it, and its messages through the chat template. As vLLM it guards no path outside /v1 by itself, knows the
endpoints that run methods by name only under VLLM_SERVER_DEV_MODE, and sends log-probs of the untouched distribution
unless told otherwise. The middleware and the worker extension that the flags name are imported and used.

STAND_IN names a json file of faults, read again on each request; counts start anew when it changes:
    fail, drop, html: n      HTTP 500 to the next n chat completions, then n times no answer, then n times no json
    refuse: true             HTTP 400 to chat completions
    delay: s or [s, ...]     seconds of a chat completion, of the first, second, ... one
    wrong_prompt, short_group, nan, null, no_ids, no_tokens, no_logps, few_logps, cut, abort: true
                             a spoilt chat completion
    hang: true or "chat"     chat completions, and unless "chat" /metrics, are not answered any more
    blind: true              /metrics is not answered, and its connections are closed
    die_after: n             the process ends at the chat completion that follows n answered ones
    die_on_push: true        ... on /collective_rpc; "late": a moment after it has answered HTTP 500
    die_at_start: text       ... with this error before it listens
    light: true              starts at once and without a model, for tests that sample nothing
    refuse_push, ignore_push: true    HTTP 500 on /collective_rpc; HTTP 200 and the old weights
    open: true or "rpc"      no key needed; none outside /v1
    say: text                the answer to a question without a clip, as a checker gets it
    once: true               the file is emptied when a process dies or hangs, so that its successor is sound

STAND_IN_LOG names a file that gets a line of json for each request.
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

GUARDED = ("/v1",)  # what vLLM's own check covers
DEVELOPMENT = ("/pause", "/resume", "/is_paused", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
               "/weight_info")


class Faults:
    """The file named by STAND_IN, and what was used up of its counts."""

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
        """How often `name` was counted before, since the file changed."""
        with self.lock:
            self.used[name] = self.used.get(name, 0) + 1
            return self.used[name] - 1

    def last(self):
        """Before a death or a hang: with `once` the next process is a sound one."""
        if self.wanted.get("once"):
            self.path.write_text("")

    def die(self):
        self.last()
        os._exit(1)

    def hang(self):
        self.last()
        threading.Event().wait()


class Engine:
    """The policy, and what vLLM's workers have: a model runner that takes weights by name."""

    def __init__(self, options):
        import torch

        from model import load_policy
        torch.set_num_threads(1)
        self.options, self.policy, self.device = options, load_policy(options.model), torch.device("cpu")
        self.lock, self.resumed, self.version, self.tokens = threading.Lock(), threading.Event(), "default", 0
        self.resumed.set()
        self.model_runner = self

    def get_model(self):
        return self.policy.base

    def reload_weights(self, weights_iterator):
        from safetensors.torch import save_file

        from model import load_policy
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(self.options.model, folder, ignore=shutil.ignore_patterns("*.safetensors*"),
                            dirs_exist_ok=True)
            save_file(dict(weights_iterator), Path(folder) / "model.safetensors", metadata={"format": "pt"})
            self.policy = load_policy(folder)

    def call(self, method, args=(), kwargs=None, timeout=None):
        """A method of the worker extension, by name."""
        if not self.options.worker_extension_cls:
            raise AttributeError(f"no method {method} on the workers")
        extension = named(self.options.worker_extension_cls)()
        extension.model_runner, extension.device = self.model_runner, self.device
        extension.reload_weights = self.reload_weights  # vLLM mixes the extension into its worker class
        with self.lock:
            getattr(extension, method)(*args, **(kwargs or {}))

    def prompt(self, content):
        """The content of a message → model.Prompt, from the samples and the text that were sent."""
        import numpy as np
        import soundfile

        from model import Prompt, audio_token_count
        policy, features, parts = self.policy, [], []
        hop = policy.feature_extractor.hop_length
        for part in content:
            if part["type"] == "input_audio":
                data = io.BytesIO(base64.b64decode(part["input_audio"]["data"]))
                samples, rate = soundfile.read(data, dtype="float32")
                if rate != 16000 or samples.ndim != 1 or part["input_audio"]["format"] != "wav":
                    raise ValueError("one channel of 16 kHz in a wav file, please")
                features.append(policy._log_mel(np.pad(samples, (0, -len(samples) % hop)), "the clip that was sent"))
                part = {"type": "audio"}
            parts.append(part)
        if len(features) > json.loads(self.options.limit_mm_per_prompt).get("audio", math.inf):
            raise ValueError(f"At most {self.options.limit_mm_per_prompt} may be provided in one prompt.")
        rendered = policy.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=True,
                                                        add_generation_prompt=True, return_dict=False)
        counts = iter([audio_token_count(frames, policy.base.config) for _, frames in features])
        ids = [i for token in rendered for i in [token] * (next(counts) if token == policy.audio_token_id else 1)]
        return Prompt(SimpleNamespace(id="a request"), ids, [], *zip(*features))

    def complete(self, body):
        """→ prompt ids, completions, log-probs of each."""
        from rollout import sample
        with self.lock:
            policy, prompt = self.policy, self.prompt(body["messages"][0]["content"])
            policy.placeholder_ids = [int(i) for i, bias in body.get("logit_bias", {}).items() if bias == -100]
            policy.eos_ids = sorted({policy.tokenizer.eos_token_id, *body.get("stop_token_ids", [])})
            completions = sample(policy, [prompt], body.get("n", 1), temperature=body.get("temperature", 1.0),
                                 top_k=body.get("top_k", 0), top_p=body.get("top_p", 1.0), seed=body["seed"],
                                 repetition_penalty=body.get("repetition_penalty", 1.0),
                                 max_new_tokens=body["max_tokens"])
            self.tokens += sum(len(c.token_ids) for c in completions)
            logps = [c.logps for c in completions]
            if self.options.logprobs_mode != "processed_logprobs":
                batch = policy.collate([prompt] * len(completions), [c.token_ids for c in completions])
                logps = [row[:len(c.token_ids)] for row, c in zip(policy(batch).logp.tolist(), completions)]
        return prompt.ids, completions, logps


class NoEngine:
    """In the place of the Engine when `light` is wanted."""

    def __init__(self, options):
        self.options, self.resumed, self.version, self.tokens = options, threading.Event(), "default", 0
        self.resumed.set()

    def call(self, **_):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine = faults = guard = None  # set by main()
    in_flight, counting = 0, threading.Lock()

    def do_GET(self):
        url = urlsplit("http://host" + self.requestline.split()[1])  # self.path has lost a second slash
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null") or {}
        wanted, chat = self.faults.read(), url.path == "/v1/chat/completions"
        record = {"path": url.path, "query": url.query, "pid": os.getpid()}
        with self.counting:
            Handler.in_flight += chat
            self.counted = chat
            if chat:
                record |= {"seed": body.get("seed"), "n": body.get("n"), "in_flight": self.in_flight}
            if "STAND_IN_LOG" in os.environ:
                with open(os.environ["STAND_IN_LOG"], "a") as log:
                    log.write(json.dumps(record) + "\n")
        try:
            if not self.allowed(url.path, wanted):
                self.answer(401, {"error": "a key is needed"})
            elif url.path in DEVELOPMENT and os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
                self.answer(404, {"detail": "Not Found"})
            else:
                getattr(self, url.path.rpartition("/")[2], self.nothing)(body, wanted)
        except Exception as error:  # as vLLM: an answer, and a traceback in the log
            self.answer(400 if isinstance(error, ValueError) else 500, {"error": repr(error)})
        finally:
            self.ended()

    do_POST = do_GET

    def allowed(self, path, wanted):
        """Asks the middleware, where there is one, then vLLM's own rule."""
        key, given = os.environ.get("VLLM_API_KEY"), self.headers.get("Authorization", "")
        if wanted.get("open") is True:
            return True
        if self.guard and not wanted.get("open"):
            sent, passed = [], []

            async def application(scope, receive, send):
                passed.append(True)

            async def send(message):
                sent.append(message)

            scope = {"type": "http", "path": path, "headers": [(b"authorization", given.encode())] if given else []}
            asyncio.run(self.guard(application)(scope, None, send))
            if not passed:
                return False
        return not key or not path.startswith(GUARDED) or given == f"Bearer {key}"

    def ended(self):
        with self.counting:
            Handler.in_flight -= self.counted
            self.counted = False

    def answer(self, status, body):
        self.ended()  # before the client can know
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
        self.answer(200, "# TYPE vllm:generation_tokens_total counter\n"
                         f'vllm:generation_tokens_total{{engine="0"}} {float(self.engine.tokens)}\n')

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
            self.answer(200, {"choices": [{"message": {"content": wanted.get("say", "YES")}}]})
            return
        delay = wanted.get("delay", 0)
        time.sleep(delay if not isinstance(delay, list) else delay[arrived] if arrived < len(delay) else 0)
        passing = [name for name in ("fail", "drop", "html") for _ in range(wanted.get(name, 0))][arrived:arrived + 1]
        if wanted.get("refuse"):
            self.answer(400, {"error": "The prompt is longer than the maximum model length"})
        elif passing == ["fail"]:
            self.answer(500, {"error": "out of luck"})
        elif passing == ["drop"]:
            self.drop()
        elif passing == ["html"]:
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
            choice = {"index": i, "finish_reason": reason, "message": {"role": "assistant"}, "logprobs": None}
            if body.get("return_token_ids") and not wanted.get("no_tokens"):
                choice["token_ids"] = tokens
            if body.get("logprobs") and not wanted.get("no_logps"):
                choice["logprobs"] = {"content": [{"logprob": value} for value in values]}
            choices.append(choice)
        answer = {"object": "chat.completion", "choices": choices[::-1][bool(wanted.get("short_group")):]}
        if body.get("return_token_ids") and not wanted.get("no_ids"):
            answer["prompt_token_ids"] = [ids[0] + 1, *ids[1:]] if wanted.get("wrong_prompt") else ids
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
        faults.last()
        raise RuntimeError(faults.wanted["die_at_start"])
    if not list(Path(options.model).glob("*.safetensors")):
        raise FileNotFoundError(f"{options.model}: no weights")
    Handler.engine = (NoEngine if faults.wanted.get("light") else Engine)(options)
    Handler.guard = named(options.middleware) if options.middleware else None
    Listener((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
