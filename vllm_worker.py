"""What the vLLM server loads from us, in its own interpreter: exact weight reloading, and a key on every endpoint.

rollout.py starts the server with `--worker-extension-cls vllm_worker.WeightReload --middleware vllm_worker.RequireKey`.
"""

import hmac
import os
from pathlib import Path

from safetensors import safe_open


class WeightReload:
    """Mixed into every vLLM worker; `POST /collective_rpc {"method": "load_folder", …}` calls it there."""

    def load_folder(self, folder):
        """Replaces the weights by those of the *.safetensors in `folder`, in the layout of the original checkpoint.

        On a CPU vLLM repacks the expert weights at loading, and skips that while a layer's `moe_kernel` from the last
        loading stands: reloading would then corrupt every expert without an error (measured with 0.32.0).
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
    """ASGI middleware: 401 for every request without the key, but for /health. vLLM's own check leaves the paths
    outside /v1 open, among them those that run methods by name."""

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
