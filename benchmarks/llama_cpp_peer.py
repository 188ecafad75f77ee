"""
llama.cpp beside the engine (benchmarks/inference.py), in a process and a Python of its own: a crash of it does not end
the benchmark, and it need not be installed beside torch.

    PYTHON benchmarks/llama_cpp_peer.py MODEL.gguf THREADS NEW_TOKENS

Each line of standard input is a prompt, a JSON list of ids. The answer is a line with two numbers: seconds to the first
token, and seconds of each token after it.
"""

import json
import sys
import time
from itertools import islice


def main(path, threads, new_tokens):
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False)
    for line in sys.stdin:
        model.reset()
        tokens = model.generate(json.loads(line), temp=0.0, repeat_penalty=1.0)
        began = time.perf_counter()
        next(tokens)
        first_s = time.perf_counter() - began
        began = time.perf_counter()
        count = len(list(islice(tokens, new_tokens)))
        print(json.dumps([first_s, (time.perf_counter() - began) / count]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
