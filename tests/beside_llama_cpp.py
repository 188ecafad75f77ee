"""
A chat model beside llama.cpp: 32 greedy tokens of 50 questions, from the same GGUF.

    python data/smollm2/fetch.py
    python tests/beside_llama_cpp.py SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2

It needs llama-cpp-python. llama.cpp rounds activations to 8 bits where weights are quantised, so its logits differ a
little from those of the dequantised weights. Where the two first draw different tokens, the table has how far apart
these are in our logits (gap), and how much the logits of the two differ there (noise, the largest difference of any two
of our 100 likeliest tokens' distances to the first). A gap below the noise is a tie that rounding decides.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conversation import Template  # noqa: E402
from infer import Engine, load  # noqa: E402

COUNT, QUESTIONS = 32, 50
SUBJECTS = ("the moon", "bread", "a bicycle", "Paris", "gravity", "the number seven", "a good book", "rain", "music",
            "honey")
ASKED = ("What is {}?", "Tell me a fact about {}.", "Write one sentence about {}.", "Why do people like {}?",
         "Say something about {} in the style of a poem.")


def questions():
    return [asked.format(subject) for subject in SUBJECTS for asked in ASKED][:QUESTIONS]


def main(gguf, run):
    import llama_cpp

    model, tokenizer, _, _ = load(run)
    template = Template(tokenizer)
    engine = Engine(model, tokenizer)
    peer = llama_cpp.Llama(gguf, n_ctx=1024, n_batch=512, logits_all=True, use_mmap=True, verbose=False)
    same = 0
    differences = []
    for question in questions():
        ids, _ = template.encode([{"role": "user", "content": question}], reply=True)
        ours = engine.generate(ids, max_new_tokens=COUNT, temperature=0, stop_tokens=template.stops).tokens
        theirs = []
        peer.reset()
        for token in peer.generate(ids, temp=0.0, repeat_penalty=1.0):
            if token in template.stops or len(theirs) == COUNT:
                break
            theirs.append(token)
        at = next((i for i in range(COUNT) if ours[i : i + 1] != theirs[i : i + 1]), None)
        if at is None:
            same += 1
            continue
        figures = compare(model, peer, ids + ours[:at], ours, theirs, at)
        differences.append({"question": question, "token": at, **figures})
    print(f"{same} of {QUESTIONS} answers are the same {COUNT} tokens; the others differ first at")
    for row in differences:
        print(f"  token {row['token']:>2}: gap {row['gap']:.3f}, noise {row['noise']:.3f}, logit {row['logit']:.1f}  "
              f"{row['question']}")
    ties = sum(row["gap"] <= row["noise"] for row in differences)
    print(f"{ties} of these {len(differences)} are ties within the noise")
    print(json.dumps({"same": same, "questions": QUESTIONS, "tokens": COUNT, "ties": ties, "differences": differences}))


@torch.no_grad()
def compare(model, peer, ids, ours, theirs, at):
    """How far apart the two tokens are in our logits, and how much the two programs' logits differ here."""
    logits = model(torch.tensor([ids]), last_only=True)[0][0, -1]
    peer.reset()
    peer.eval(ids)
    other = torch.from_numpy(np.array(peer.scores[len(ids) - 1], dtype=np.float32))
    best = logits[: len(other)].topk(100).indices
    distance = (logits[best] - logits[best[0]]) - (other[best] - other[best[0]])
    end = model.config.vocab_size  # an answer that ended has no token here
    tokens = [row[at] if at < len(row) else None for row in (ours, theirs)]
    values = [logits[token].item() if token is not None else None for token in tokens]
    if None in values:
        values = logits[:end].topk(2).values.tolist()
    return {"gap": abs(values[0] - values[1]), "noise": distance.abs().max().item(), "logit": logits.max().item()}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tests/beside_llama_cpp.py FILE.gguf RUN_FOLDER")
    main(*sys.argv[1:])
