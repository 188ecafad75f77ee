"""
Chat templates from elsewhere: recognised by their text, and never executed.

Other projects keep a template as code in Jinja. A text that is known here has a name among conversation.TEMPLATES. What
export.py wrote carries the template as data as well (foreign.OWN_KEY), and that comes first.
"""

from dataclasses import asdict

from conversation import TEMPLATES, Template, add_template, read_format, special_names
from files import sha256

# SHA-256 of the text of known templates, their white space normalised
FINGERPRINTS = {
    "chatml": {
        "2e7c58464a1c5792298a99422f45e85cfcf02d637ceb38315d53150aa5bebbc2",  # OpenHermes 2.5 and many others
        "af2e5a0a5e15dddc3f11ae3602412e9c0d75e4c3b3a175c0925b0f47a587c2e9",  # with a default of the last turn
        "fc41f15adee1bf5daa0e427b022c7d80945f9f5630d2fbd35419b13708070798",  # transformers' documentation
        "d571d57670dd405a898a8bb80355771cf6b838dcf87af10e2f7de7e343212201",  # without the beginning of an answer
        "012e787a63ad563d4cc95c265e14686d7bb65e8d9a834ce009b547d182c696da",  # with blanks in the braces
        "ea0335dcce784f441f34eda894e8cf153006acac44663957f32bb4c31ea26fa8",  # Qwen's first, without a system message
    },
    "smollm2": {"6e76f0d0a1bfb2ef34f110bc376575127fca30189268db50eb63b9b7c352ac45"},  # SmolLM2-Instruct
    "nanochat": {  # in the folders that forks of nanochat export
        "335dae500ce1f417cac76accca59444588341dd4dd597e394f47cedf4c9b67a9",
        "9cd37a01144621a9e25b212541cda15392651244ecf8704db8d63b357deca19d",  # the system's text in the first turn
    },
}


def fingerprint(jinja):
    """The SHA-256 of a template's text. A newline is the same as \\n, which a file may spell either way or a blank,
    so that another layout of the same code is the same template."""
    return sha256(" ".join(jinja.replace("\\n", "\n").split()).encode())


def name_of(jinja):
    """The name of a known template, or None."""
    digest = fingerprint(jinja)
    return next((name for name, known in FINGERPRINTS.items() if digest in known), None)


def with_template(tokenizer, found, name, warn):
    """`tokenizer` with the chat template called `name`, or else with the one that was `found` (Found or None).

    A template that is not known, or has special tokens that the tokenizer lacks, is skipped with a warning: the model
    is good without it. `warn` takes the message. Raises ValueError for a name that is not known.
    """
    if name:
        return add_template(tokenizer, name)
    if found is None:
        return tokenizer
    try:
        if found.fields is not None:
            changed = tokenizer.changed(template=asdict(read_format(found.fields)))
            Template(changed)
            return changed
        known = name_of(found.jinja)
        if known is None:
            raise ValueError("is none that is known here")
        changed = add_template(tokenizer, known)
        if changed.vocab_size != tokenizer.vocab_size:
            lacks = [token for token in special_names(changed.template) if token not in tokenizer.special_tokens]
            raise ValueError(f"is {known}, and the tokenizer lacks {lacks[0]}")
        return changed
    except ValueError as error:
        warn(f"the model comes without its chat template ({found.place}: the template {error}): --template=NAME names "
             f"one of {', '.join(TEMPLATES)}")
        return tokenizer
