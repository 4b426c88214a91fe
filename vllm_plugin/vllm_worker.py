"""What vLLM loads from this repository, in its own interpreter: two small classes.

server.py starts vLLM with these two flags:

    --worker-extension-cls vllm_worker.WeightReload      reloads weights exactly
    --middleware vllm_worker.RequireKey                  asks for a key on every endpoint
"""

import hmac
import os
from pathlib import Path

from safetensors import safe_open


class WeightReload:
    """vLLM mixes this class into each of its workers.

    `POST /collective_rpc {"method": "load_folder", …}` calls the method on all of them.
    """

    def load_folder(self, folder):
        """Replaces the weights by those in the *.safetensors files of a checkpoint folder.

        On a CPU vLLM repacks the expert weights after loading them, but skips this for a layer that
        still has the `moe_kernel` of the previous loading. Every expert would then be wrong, and
        vLLM would not notice (measured with 0.32.0). So we remove the kernel first.
        Raises FileNotFoundError if the folder has no such file.
        """
        for layer in self.model_runner.get_model().modules():
            method = getattr(layer, "quant_method", None)
            if self.device.type == "cpu" and getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        self.reload_weights(weights_iterator=_tensors(Path(folder)))


def _tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors to load")
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


class RequireKey:
    """ASGI middleware: answers 401 to every request without the key, except for /health.

    vLLM's own check covers only the paths under /v1. The paths that run methods by name lie outside
    of it.
    """

    def __init__(self, app):
        self.app, self.expected = app, f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope, receive, send):
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        open_to_all = scope["type"] == "lifespan" or scope["path"] == "/health"
        if open_to_all or hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"a key is needed"})
        else:
            await send({"type": "websocket.close", "code": 1008})
