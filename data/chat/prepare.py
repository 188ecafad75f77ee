"""
Conversations of your own, or of the Hugging Face Hub, as rows for chat training.

    python data/chat/prepare.py --input=FILE_OR_FOLDER --tokenizer=out/my_run --out_dir=data/my_chat
    python data/chat/prepare.py --hub=HuggingFaceTB/smol-smoltalk --out_dir=data/smoltalk

A file is .jsonl (also .gz, .zst) or .parquet, a conversation a line or row, in any form that data/chats.py lists. Each
is encoded by a template; the assistant's words, and the token that ends an answer, are what is learned. Conversations
are packed whole into rows of block_size tokens. One that is longer is cut at the end of a turn, or dropped where its
first answer does not fit. A conversation that cannot be used is dropped, and counted by reason in manifest.json; exact
duplicates are too. A hash of each conversation decides whether it is held out.

The tokenizer must be that of the model which is to be trained. Memory: 3 bytes a token and about 300 a conversation.
"""

import contextlib
import json
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the project and data/

import chats  # noqa: E402, I001
import common  # noqa: E402
from configurator import Settings, configure, fail  # noqa: E402
from conversation import Template  # noqa: E402
from files import file_sha256  # noqa: E402
from reading import hub_files, list_files  # noqa: E402
from scan import write_result  # noqa: E402
from texts import listing_sha256, pick_tokenizer  # noqa: E402

# -----------------------------------------------------------------------------
# the conversations
input = ""          # a .jsonl (also .gz, .zst) or .parquet, or a folder of such files
hub = ""            # or a dataset of the Hub
hub_name = ""       # its configuration, where it has several
hub_revision = ""   # its branch or commit; empty: the latest commit, which is recorded
hub_split = "train"  # which of its splits
max_chars = 1000000  # characters that a conversation has at most

# the dataset
out_dir = ""        # where the dataset goes; empty: the folder of this script
tokenizer = "gpt2"  # gpt2 | the folder of the run that will be trained, or a file or folder of its tokenizer
template = ""       # minichat | chatml | smollm2 | nanochat; empty: the tokenizer's own, or else minichat
block_size = 1024   # tokens of a row: the context that the model is trained with
val_fraction = 0.05  # share of the conversations that is held out, chosen by their hashes
# -----------------------------------------------------------------------------


def main(c):
    if bool(c.input) == bool(c.hub):
        fail("give --input, a .jsonl or .parquet of conversations or a folder of such files, or else --hub, a dataset "
             "of the Hub")
    if not 16 <= c.block_size <= chats.LARGEST_ROW:
        fail(f"block_size={c.block_size}: a row has from 16 to {chats.LARGEST_ROW:,} tokens")
    if c.tokenizer == "char":
        fail("tokenizer=char: name the folder of the run that will be trained, or of its dataset: that has the "
             "characters")
    folder = Path(c.out_dir) if c.out_dir else HERE
    if c.input:
        refuse_lists(Path(c.input))
        files = list_files(c.input, chats.ENDINGS)
    tokenizer = chats.chat_tokenizer(pick_tokenizer(c.tokenizer), c.tokenizer, c.template)

    plan = folder / "scan" / "plan.json"
    if c.input:
        source = source_of(Path(c.input), files)
    else:
        files, source = hub_files(c.hub, c.hub_name, c.hub_revision, plan, c.hub_split)
        source |= {"split": c.hub_split}
        pin(plan, source)
    conversations = chats.Conversations(Template(tokenizer), c.block_size, c.max_chars)
    documents, examples = chats.read_conversations(files, conversations)
    chats.check_enough(c.input or c.hub, documents, examples)
    held_out = conversations.held_out(c.val_fraction)
    preprocessing = {"version": 1, "tokens": "conversations", "block_size": c.block_size, "max_chars": c.max_chars,
                     "val_fraction": c.val_fraction}
    changed, counts = chats.write_rows(folder, conversations, held_out, source, preprocessing, documents)
    forget(plan)
    chats.print_documents(documents, examples)
    chats.print_rows(folder, conversations, counts, changed)
    print(f"next: {next_command(c, folder)}")


def refuse_lists(path):
    """End the script for a .json, which often holds all conversations in one list, with a command that splits it."""
    if path.suffix.lower() == ".json":
        file = f'open({json.dumps(str(path), ensure_ascii=False)}, encoding="utf-8-sig")'
        code = f"import json; [print(json.dumps(conversation)) for conversation in json.load({file})]"
        target = shlex.quote(str(path.with_suffix(".jsonl")))
        fail(f"--input={path}: make a .jsonl of it, a conversation a line: python -c {shlex.quote(code)} > {target}")


def source_of(path, files):
    """The manifest's source: name, number of files, bytes and sha256 of a file, or of the listing of a folder."""
    paths = [file.path for file in files]
    digests = [file_sha256(file) for file in paths]
    digest = listing_sha256(path, paths, digests) if path.is_dir() else digests[0]
    size = sum(file.size for file in files)
    return {"name": path.resolve().name, "files": len(files), "bytes": size, "sha256": digest}


def pin(plan, source):
    """Keep which commit of the Hub is read: a run that is killed and started again reads the same."""
    plan.parent.mkdir(parents=True, exist_ok=True)
    with write_result(plan) as file:
        file.write((json.dumps({"source": source}) + "\n").encode())


def forget(plan):
    plan.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or holds what others wrote
        plan.parent.rmdir()


def next_command(c, folder):
    """What to type next."""
    is_run = (Path(c.tokenizer) / "ckpt").is_dir()
    start = c.tokenizer if is_run or c.tokenizer == "gpt2" else "RUN"
    command = shlex.join(["python", "train.py", f"--init_from={start}", common.dataset_key(folder)])
    return command if start != "RUN" else f"{command} (RUN: the folder of a model with this tokenizer)"


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
