"""A strict local image server that answers as SGLang and vLLM-Omni do, and misbehaves on demand."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from ernie_accel.batch.engines import Request
from tests.stub_engine import picture_of

SGLANG_FIELDS = {
    "prompt": str,
    "n": int,
    "size": str,
    "response_format": str,
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "seed": int,
    "negative_prompt": str,
    "use_pe": bool,
    "output_format": str,
    "model": str,
}
OMNI_FIELDS = {**{k: v for k, v in SGLANG_FIELDS.items() if k not in ("use_pe", "output_format")}, "extra_params": dict}


class ImageServer:
    """Serves pictures that depend on the seed only; `misbehave` maps a prompt to what to do with its first requests.

    What can be done: "429", "500", "refuse", "reset" (drop the connection), "truncate" (half an answer), "no json",
    "half picture" (well-formed, cut PNG), "empty", "slow", "wrong size".
    """

    def __init__(self, kind: str = "sglang", misbehave: dict[str, list[str]] | None = None) -> None:
        self.kind = kind
        self.misbehave = {prompt: list(deeds) for prompt, deeds in (misbehave or {}).items()}
        self.requests: list[dict] = []
        self.chats: list[dict] = []
        self.authorizations: set[str | None] = set()  # of every request
        self.revises = False  # whether it says that it changes prompts
        self.most_at_once = 0
        self._at_once = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> ImageServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def enter(self) -> None:
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)

    def leave(self) -> None:
        with self.lock:
            self._at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    owner: ImageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.owner.authorizations.add(self.headers.get("Authorization"))
        self.answer(200, {"object": "list", "data": [{"id": "ernie-pe"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        self.owner.authorizations.add(self.headers.get("Authorization"))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.owner.enter()
        try:
            if self.path == "/v1/chat/completions":
                self.chat(body)
            elif self.path == "/v1/images/generations":
                self.images(body)
            else:
                self.answer(404, {"detail": "Not Found"})
        finally:
            self.owner.leave()

    def chat(self, body: dict) -> None:
        content = json.loads(body["messages"][0]["content"])
        if set(content) != {"prompt", "width", "height"} or not 0 < body["top_p"] <= 1 or body["model"] != "ernie-pe":
            self.answer(400, {"error": {"message": f"unexpected {body}"}})
            return
        self.owner.chats.append(body)
        text = f"{content['prompt']}, enhanced {body['seed']}"
        self.answer(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def images(self, body: dict) -> None:
        if problem := self.problem(body):
            self.answer(422 if self.owner.kind == "sglang" else 400, {"detail": problem})
            return
        with self.owner.lock:
            self.owner.requests.append(body)
            deeds = self.owner.misbehave.get(body["prompt"], [])
            deed = deeds.pop(0) if deeds else ""
        if deed in ("429", "500"):
            self.answer(int(deed), {"error": {"message": "busy"}}, {"Retry-After": "0.01"} if deed == "429" else {})
        elif deed == "refuse":
            self.answer(400, {"error": {"message": "prompt was refused by the safety checker", "code": 400}})
        elif deed == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif deed == "slow":
            time.sleep(1.5)
            self.close_connection = True
        elif deed == "no json":
            self.send_whole(b"<html>502</html>")
        else:
            self.send_picture(body, deed)

    def send_picture(self, body: dict, deed: str) -> None:
        width, height = map(int, body["size"].split("x"))
        if deed == "wrong size":
            width //= 2
        file = io.BytesIO()
        picture: Image.Image = picture_of(Request(prompt="", seed=body["seed"], width=width, height=height))
        # As SGLang chooses its format; vLLM-Omni makes PNG only.
        lossless = self.owner.kind != "sglang" or body.get("output_format") == "png"
        picture.save(file, "PNG" if lossless else "JPEG")
        png = file.getvalue()[: len(file.getvalue()) // 2 if deed == "half picture" else None]
        revised = f"{body['prompt']}, revised" if self.owner.revises else body["prompt"]
        answer = {"created": 1, "data": [{"b64_json": base64.b64encode(png).decode(), "revised_prompt": revised}]}
        if deed == "empty":
            answer["data"] = []
        content = json.dumps(answer).encode()
        if deed == "truncate":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.send_whole(content)

    def problem(self, body: dict) -> str | None:
        fields = SGLANG_FIELDS if self.owner.kind == "sglang" else OMNI_FIELDS
        for name, value in body.items():
            if name not in fields:
                return f"extra field {name}"
            if not isinstance(value, fields[name]) or (isinstance(value, bool) and fields[name] is not bool):
                return f"{name} has type {type(value).__name__}"
        if not 1 <= body.get("n", 1) <= 10:
            return "n is out of range"
        if body.get("response_format") != "b64_json":
            return "this server stores no files: ask for b64_json"
        if self.owner.kind == "vllm-omni":
            if body.get("num_inference_steps", 50) > 200:
                return "num_inference_steps must be at most 200"
            if set(body.get("extra_params", {})) - {"apply_pe"}:
                return "unknown extra_params"
        return None

    def answer(self, status: int, content: dict, headers: dict[str, str] | None = None) -> None:
        self.send_whole(json.dumps(content).encode(), status, headers)

    def send_whole(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
