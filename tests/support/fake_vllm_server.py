"""A stand-in for a vLLM server: a small HTTP server that answers as vLLM does, from a model of its own, and errs as told.

Not vLLM: tests/vllm_server has the real one. It samples with the same few lines as the engine in process.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from drift.engines.hf import draw


class StandIn:
    """Serves `model` at `url` while it is entered.

    faults   one for each completion from now on, first come first served: an HTTP status, "drop" (no answer), "abort" (one
             sample is cut off), "restart" (the process dies: other start, first weights, no answer), seconds to wait, an event
             to wait for, "die" (as `die` does), "drip" and "drip headers" (a byte at a time), a function of a completion's
             choices that returns others, or None
    lacks    parts of "ids", "prompt ids", "same prompt", "logprobs", "n", "completions", "rpc", "extension", "adapters"
    raw      log-probs before temperature
    keys     the Authorization header of each request
    deaf     loads nothing and says it did; "head": everything but the tied head, as vLLM on a CPU
    """

    def __init__(self, model, lacks=(), raw=False, deaf=None, vocabulary=None):
        self.model, self.lacks, self.raw, self.deaf = model, set(lacks), raw, deaf
        self.first = {name: value.clone() for name, value in model.state_dict().items()}
        self.vocabulary = vocabulary or model.config.vocab_size
        self.faults, self.bodies, self.calls, self.adapters, self.keys = [], [], [], {}, []
        self.delay, self.in_flight, self.most_in_flight = 0.0, 0, 0
        self.lock, self.computing = threading.Lock(), threading.Lock()
        self.boot()

    def boot(self):
        """A new process with the weights it was started with."""
        self.dead = False
        self.start, self.version, self.adapters = uuid.uuid4().hex, None, {}
        self.model.load_state_dict(self.first)

    def die(self):
        """No request is answered until `boot`, those in flight included."""
        self.dead = True

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"standing": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = False  # joined when it closes
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, path, body):
        """(status, content), or None for no answer."""
        found = None if self.dead else self.living(path, body)
        return None if self.dead else found

    def living(self, path, body):
        name = path.partition("?")[0]
        if name.startswith("/v1/") and name.endswith("completions"):
            return self.count(name, body)
        self.calls.append((name, body))
        if name == "/v1/models":
            return 200, {"data": [{"id": "served"}]}
        if name == "/reset_prefix_cache":
            return 200, {"success": True}
        if name == "/abort_requests":
            return 200, {}
        if name == "/collective_rpc" and "rpc" not in self.lacks:
            if "extension" in self.lacks:
                return 500, {"error": {"message": f"'CPUWorker' object has no attribute {body['method']!r}"}}
            return 200, {"results": [getattr(self, body["method"])(*body.get("args", []))]}
        if name == "/v1/load_lora_adapter" and "adapters" not in self.lacks:
            if body["lora_name"] in self.adapters:
                return 400, {"error": {"message": "The lora adapter has already been loaded."}}
            self.adapters[body["lora_name"]] = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if name == "/v1/unload_lora_adapter":
            found = self.adapters.pop(body["lora_name"], None)
            return (200, "Success") if found else (404, {"error": {"message": "The lora adapter cannot be found."}})
        return 404, {"detail": "Not Found"}

    def drift_state(self):
        return {"start": self.start, "version": self.version, "vocabulary": self.vocabulary}

    def drift_mark(self, version):
        self.version = version

    def drift_load(self, folder, version):
        new = load_file(Path(folder) / "model.safetensors")
        if self.deaf == "head":  # tied: the head that was started with
            head = self.model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        if self.deaf is not True:
            self.model.load_state_dict(new, strict=False)
        self.version = version if self.version == version else None

    def count(self, name, body):
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.bodies.append((self.version, body))
            fault = self.faults.pop(0) if self.faults else None
        try:
            time.sleep(self.delay)
            return self.complete(name, body, fault)
        finally:
            with self.lock:
                self.in_flight -= 1

    def complete(self, name, body, fault):
        if "completions" in self.lacks:
            return 422, {"detail": "Unexpected fields in the request: {'return_token_ids'}"}
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            return fault, {"error": {"message": "made up"}}
        elif isinstance(fault, threading.Event):
            fault.wait(30)
        elif fault in ("drip", "drip headers"):
            return fault, None
        elif fault == "drop":
            return None
        elif fault == "die":
            self.die()
        elif fault == "restart":
            with self.computing:
                self.boot()
            return None
        if body["model"] != "served" and body["model"] not in self.adapters:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        prompt = body.get("prompt") or [7, 8, 9]  # what its chat template makes of messages
        if len(prompt) > 60:
            return 400, {"error": {"message": "This model's maximum context length is 60 tokens."}}
        n = 1 if "n" in self.lacks else body["n"]
        with self.computing:
            samples = [self.sample(prompt, body, body["seed"] + i) for i in range(n)]
        choices = [self.choice(i, body, *sample) for i, sample in enumerate(samples)]
        if fault == "abort":
            choices[-1] |= {"finish_reason": "abort", "token_ids": choices[-1]["token_ids"][:1]}
        top = {}
        if "same prompt" in self.lacks:
            prompt = [1, *prompt]
        if "prompt ids" not in self.lacks:
            if "messages" in body:
                top = {"prompt_token_ids": prompt}
            else:
                choices = [{**choice, "prompt_token_ids": prompt} for choice in choices]
        choices = fault(choices[::-1]) if callable(fault) else choices[::-1]
        return 200, {"choices": choices, **top}

    def choice(self, index, body, ids, logprobs):
        found = {"index": index, "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length"}
        if "ids" not in self.lacks:
            found["token_ids"] = ids
        if "logprobs" not in self.lacks:
            listed = {"content": [{"logprob": value} for value in logprobs]}
            found["logprobs"] = listed if "messages" in body else {"token_logprobs": logprobs}
        return found

    @torch.inference_mode()
    def sample(self, prompt, body, seed):
        generator, ids, logprobs = torch.Generator().manual_seed(seed), list(prompt), []
        while len(logprobs) < body["max_tokens"]:
            logits = self.logits(torch.tensor([ids]), body["model"])
            chance = torch.rand(1, generator=generator, dtype=torch.float64)
            token, logprob = draw(logits, body["temperature"], body["top_p"], chance)
            if self.raw:
                logprob = torch.log_softmax(logits, -1)[0, token]
            ids.append(int(token))
            logprobs.append(float(logprob))
            if int(token) in body["stop_token_ids"]:
                break
        return ids[len(prompt) :], logprobs

    def logits(self, ids, name):
        adapters = self.adapters.get(name)
        if adapters is not None:
            self.model.load_state_dict(self.first)
            for key, a in adapters.items():
                if key.endswith("lora_A.weight"):
                    weight = self.model.get_parameter(key.removeprefix("base_model.model.").replace("lora_A.", ""))
                    weight += 2.0 * adapters[key.replace("lora_A", "lora_B")] @ a  # alpha / r of `small.LORA`
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float()


class _Handler(BaseHTTPRequestHandler):
    standing: StandIn
    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body):
        self.standing.keys.append(self.headers.get("Authorization"))
        answer = self.standing.answer(self.path, body)
        self.close_connection = True  # so that no thread waits for a second request
        if answer is None:
            return
        if isinstance(answer[0], str):
            return self.drip(answer[0])
        content = (answer[1] if isinstance(answer[1], str) else json.dumps(answer[1])).encode()
        try:
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # the other side did not wait so long
            pass

    def drip(self, what):
        """A byte at a time, of the headers or of the content."""
        start = "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n" + ("X-Long: " if what == "drip headers" else "\r\n")
        with suppress(OSError):  # the other side did not wait so long
            self.wfile.write(start.encode())
            for _ in range(500):
                self.wfile.write(b"7")
                time.sleep(0.02)

    def log_message(self, *_):
        pass
