"""
Samples of a bank of prompts, as Markdown: what eval.py's verb `prompts` writes.
"""

import re
from pathlib import Path

from files import read_lines

ROOT = Path(__file__).resolve().parents[1]


def read_prompts(prompts):
    """The lines of a file that are not blank. Its path may be relative to the project's folder. Raises ValueError."""
    path = Path(prompts) if Path(prompts).exists() else ROOT / prompts
    try:
        lines = [line for line in read_lines(path) if line.strip()]
    except (OSError, ValueError) as e:
        raise ValueError(f"--prompts={prompts} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not lines:
        raise ValueError(f"--prompts={prompts} has no line")
    return lines


def draw_samples(engine, prompts, sampling, count):
    """`count` samples of each prompt, with the seeds of `sampling` and the next ones, drawn together.

    -> ([(prompt, its texts), ...], {prompt that was skipped: why}). A prompt is skipped if the tokenizer lacks one of
    its characters, or if the context has no room for it. Where the context cannot slide, samples end with it.
    """
    samples = []
    skipped = {}
    for prompt in prompts:
        try:
            ids = engine.tokenizer.encode(prompt)
            room = sampling.max_new_tokens
            if not engine.slide:
                room = min(room, engine.model.config.block_size + 1 - len(ids))
            requests = [engine.submit(ids, sampling, max_new_tokens=max(room, 1), seed=sampling.seed + i)
                        for i in range(count)]
        except ValueError as error:
            skipped[prompt] = str(error).partition(": this tokenizer knows")[0]
            continue
        while not all(request.finish for request in requests):
            engine.step()
        samples.append((prompt, [prompt + request.text for request in requests]))
    return samples, skipped


def markdown(title, facts, samples):
    """A Markdown file: a title, a list of facts, and the samples under their prompts."""
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts)]
    for prompt, texts in samples:
        parts.append(f"## {code(prompt)}")
        parts += [code_block(text) for text in texts]
    return "\n\n".join(parts) + "\n"


def code(text):
    """`text` as Markdown code within a line, whatever backticks it has (CommonMark 0.31, 6.1)."""
    marks = "`" * (longest_run_of_backticks(text) + 1)
    pad = " " if text[:1] in "` " or text[-1:] in "` " else ""
    return f"{marks}{pad}{text}{pad}{marks}"


def code_block(text):
    """`text` as a block of Markdown code, whatever backticks it has (CommonMark 0.31, 4.5)."""
    marks = "`" * max(3, longest_run_of_backticks(text) + 1)
    return f"{marks}text\n{text}\n{marks}"


def longest_run_of_backticks(text):
    return max(map(len, re.findall("`+", text)), default=0)
