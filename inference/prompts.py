"""
What a prompt may be: a string, or one row of token ids of any kind. infer.py calls these.
"""

import operator


def is_id(value):
    """Whether a value is a whole number, of Python, numpy or torch."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def plain_lists(prompts):
    """Arrays and tensors as lists; everything else as it is."""
    return prompts.tolist() if hasattr(prompts, "tolist") else prompts


def token_ids(prompt):
    """A list, tuple, numpy array or tensor of token ids (T,) -> list of int. Raises ValueError for anything else."""
    prompt = plain_lists(prompt)
    if not isinstance(prompt, (list, tuple)) or not all(map(is_id, prompt)):
        raise ValueError(f"a prompt is a string or one row of token ids, which are whole numbers, not {prompt!r:.80}")
    return [operator.index(i) for i in prompt]


def is_one_prompt(prompts):
    """Whether this is one prompt, a string or a row of ids, rather than a list of prompts."""
    if getattr(prompts, "ndim", 2) < 2:  # an array or tensor of one row, even an empty one
        return True
    prompts = plain_lists(prompts)
    if not isinstance(prompts, (list, tuple)):
        return True
    return len(prompts) > 0 and is_id(prompts[0])


def encode_prompt(tokenizer, text, special=False):
    """Ids of a prompt; an empty one becomes the tokenizer's bos. `special`: read names of special tokens as tokens."""
    if text:
        return tokenizer.encode(text, special=special)
    if tokenizer.bos is None:
        raise ValueError("the prompt is empty, and the tokenizer has no token for the beginning of a text")
    return [tokenizer.bos]


def check_prompt(prompt, config):
    """Raises ValueError for a prompt that is empty or has a token outside the model's vocabulary."""
    if not prompt:
        raise ValueError("the prompt is empty: it needs at least one token, such as the tokenizer's bos")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise ValueError(f"the prompt has a token outside the model's vocabulary of {config.vocab_size}")
