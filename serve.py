"""
Serve a model over HTTP: a page to talk to, and endpoints that every OpenAI client knows.

    python serve.py --out_dir=out/chat_shakespeare        # then open the address that it prints
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Who is there?"}]}'

Also a Hugging Face folder, a .gguf or nanoGPT's ckpt.pt. Needs: pip install -e ".[serve]" -c constraints.txt. The
routes are in serving/app.py, the engine's thread in serving/worker.py. SIGTERM and Ctrl-C let running answers finish,
for at most `drain` seconds.
"""

import os
import sys
import time
from pathlib import Path

import torch

from configurator import Settings, configure, fail
from conversation import TEMPLATES, template_of
from device import memory_is_full, pick_device, pick_dtype
from foreign.pretrained import read_model
from infer import Engine
from inference.calibration import convert_run
from inference.quantize import computes_bfloat16
from inference.terminal import note
from serving.worker import default_chunk

# -----------------------------------------------------------------------------
out_dir = "out"             # run folder, one checkpoint's folder, Hugging Face folder, .gguf, or a name on the Hub
ckpt = "latest"             # which checkpoint of a run: latest | best | a step
template = ""               # for a model without a chat template: minichat | chatml | smollm2 | nanochat
tokenizer = ""              # folder with the tokenizer of a model from elsewhere; empty: the one that comes with it
name = ""                   # the model's name in answers; empty: that of its folder
host = "127.0.0.1"          # address to listen at; 0.0.0.0: all, so that other machines reach it
port = 8000                 # 0: a free one
api_key = ""                # asked of every client; empty: the variable MINICHAT_API_KEY, or none
cors_origins = ()           # origins of other web pages that may use it, such as https://chat.example; *: all
allowed_hosts = ()          # more names in Host headers to answer to, besides localhost
max_requests = 16           # answers that are generated at once
max_queue = 64              # answers that may wait for a place; more are refused with 429
kv_memory = 0               # MiB for keys and values; 0: what max_requests whole contexts take, up to 1024
reply_tokens = 512          # most tokens of a chat's answer that does not say how many
max_body = 1024             # KiB of a request
timeout = 600.0             # seconds from a request to the end of its answer
drain = 30.0                # seconds in which running answers may finish when the server is stopped
chunk = 0                   # most tokens in one step; 0: 128 on a CPU, else 512
access_log = False          # a line on stderr for each request, without its text
device = "auto"             # auto | cpu | cuda | cuda:N | mps
dtype = "auto"              # auto | float32 | bfloat16 | float16
quantize = ""               # int8 | int4 | int4_64 | int4_128 | fp8: weights in fewer bits; empty: as dtype says
speculate = ""              # read ahead what is proposed: lookup (from the text), or a draft run's folder; empty: no
compile: bool | None = None  # torch.compile the step of a token; none: where that pays
# -----------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parent / "serving" / "chat.html"
MIB = 2**20
STEPS = 10**6  # of a server's life, roughly: compiling them pays
MOST_CHOICES = 128  # in one answer, as OpenAI has it


# -----------------------------------------------------------------------------
# The model


def load_all(c):
    """-> (Engine, serving.api.Served). Prints the device on stderr. Raises ValueError and OSError."""
    from serving.api import Served

    device, device_why = pick_device(c.device)
    dtype, dtype_why = pick_dtype(c.dtype, device)
    model, tokenizer, state = read_model(c.out_dir, c.ckpt, c.tokenizer)
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only "
                         f"{model.config.vocab_size:,}: it is another model's")
    template = template_of(tokenizer, c.template, c.out_dir)
    if template:
        tokenizer = template.tokenizer
    model = convert_run(model.to(device).eval(), dtype, c.quantize, c.out_dir, state)
    note(f"{device} ({device_why}), {str(dtype).removeprefix('torch.')} ({dtype_why})")
    chunk = c.chunk or default_chunk(device.type)
    engine = Engine(model, tokenizer, max_tokens=cache_tokens(c, model.config, device, dtype), chunk=chunk,
                    max_requests=c.max_requests, speculate=c.speculate)
    engine.try_to_compile(c.compile, STEPS, c.max_requests > 1, note)
    served = Served(name=model_name(c), created=int(time.time()), tokenizer=tokenizer, template=template,
                    context=model.config.block_size, vocab_size=model.config.vocab_size, reply_tokens=c.reply_tokens,
                    most_choices=min(MOST_CHOICES, c.max_requests + c.max_queue))
    return engine, served


def cache_tokens(c, config, device, dtype):
    """Tokens whose keys and values fit into kv_memory. Raises ValueError if one context does not."""
    size = dtype.itemsize
    if dtype == torch.bfloat16 and device.type == "cpu" and not computes_bfloat16():
        size = 4  # the engine keeps them in fp32 there
    token_bytes = 2 * config.n_layer * config.kv_heads * config.head_dim * size  # a key and a value
    contexts = c.max_requests * config.block_size
    if not c.kv_memory:
        return max(config.block_size, min(contexts, 1024 * MIB // token_bytes))
    tokens = c.kv_memory * MIB // token_bytes
    if tokens < config.block_size:
        least = -(-config.block_size * token_bytes // MIB)
        raise ValueError(f"--kv_memory={c.kv_memory} holds {tokens:,} tokens, and one context has "
                         f"{config.block_size:,}: at least {least}")
    return tokens


def model_name(c):
    """The name under which clients ask for the model."""
    path = Path(c.out_dir)
    if c.name or not path.exists():
        return c.name or c.out_dir
    path = path.resolve()
    return path.stem if path.is_file() else path.name


# -----------------------------------------------------------------------------
# The program


def check(c):
    """The settings, with the API key of the environment. Raises ValueError for what cannot be, before anything is
    loaded."""
    if c.template and c.template not in TEMPLATES:
        raise ValueError(f"--template={c.template} is not one of {', '.join(TEMPLATES)}")
    key = c.api_key or os.environ.get("MINICHAT_API_KEY", "")
    if not key.isascii() or any(not " " < letter <= "~" for letter in key):
        raise ValueError("--api_key must be plain characters of ASCII without spaces: it is sent in a header")
    for origin in c.cors_origins:
        if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
            raise ValueError(f"--cors_origins: {origin} is not an origin such as https://chat.example, without a path")
    pick_device(c.device)
    return c.changed(api_key=key)


def make_server(c, load=None, announce=None):
    """The server of checked settings, which listens already. load() -> (Engine, Served); announce(server) is called
    when that is done. Raises OSError."""
    from serving.app import Service
    from serving.server import Server, listen

    page = PAGE.read_bytes()
    service = Service(c, load or (lambda: load_all(c)), page)
    return Server(service, listen(c.host, c.port), announce or print_ready)


def print_ready(server):
    """The one line on stdout: programs that start the server wait for it."""
    engine = server.worker.engine
    served = server.service.served
    chats = "chats and completions" if served.template else "completions only: no chat template"
    print(f"{server.url} serves {served.name} ({chats}, context {served.context:,} tokens, "
          f"{engine.max_requests} at once)", flush=True)


def main(c):
    """-> exit code"""
    try:
        c = check(c)
        server = make_server(c)
    except ImportError as e:
        fail(f"{e.name} is not installed: pip install -c constraints.txt -e '.[serve]'")
    except (ValueError, OSError) as e:
        fail(e)
    if not server.is_loopback and not c.api_key:
        note(f"anyone who reaches {c.host} may use this server: --api_key= asks for a key")
    try:
        return server.serve_until_end()
    except (ValueError, OSError) as e:  # of the load; CheckpointError is a ValueError
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if full := memory_is_full(e):
            fail(f"{full}: --quantize=int8 or a smaller --kv_memory takes less")
        raise


if __name__ == "__main__":
    c = Settings(configure(globals()))
    try:
        code = main(c)
    except KeyboardInterrupt:  # before it served
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread may still be loading a model
