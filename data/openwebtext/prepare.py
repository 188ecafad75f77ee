"""
OpenWebText, or any corpus of documents, as GPT-2's tokens: cleaned, without duplicates, in shards.

    python data/openwebtext/prepare.py                                      # from the Hugging Face Hub
    python data/openwebtext/prepare.py --input=FOLDER --out_dir=data/mine   # .jsonl, .txt (.gz, .zst) or .parquet

Killed at any point, the same command resumes. To share the work between machines that see one folder, run
`--part=0/4` ... `--part=3/4` and then `--merge`. The script first prints how much disk and memory it needs.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the project and data/

import common  # noqa: E402, I001
from configurator import Settings, configure  # noqa: E402
from pipeline import prepare_corpus  # noqa: E402

# -----------------------------------------------------------------------------
# the corpus
input = ""            # a file or folder of .jsonl, .txt (each also .gz, .zst) or .parquet; empty: the Hub's dataset
hub = "Skylion007/openwebtext"  # the Hub's dataset
hub_name = ""         # its configuration, where it has several
hub_revision = ""     # its branch or commit; empty: the latest commit, which is recorded
text_key = "text"     # key or column that holds the text of a document

# the dataset
out_dir = ""          # where the dataset goes; empty: the folder of this script
tokenizer = "gpt2"    # gpt2 | a file or folder of another dataset's or run's tokenizer
val_fraction = 0.0005  # share of the documents that is held out, chosen by their hashes

# which documents
min_chars = 100       # characters that a document has at least
max_chars = 5000000   # characters that a document has at most
dedup = "near"        # near (and exact) | exact | none
threshold = 0.8       # near: documents that share at least this part of their 5-word shingles are duplicates
permutations = 128    # near: values of a MinHash signature, 4 bytes each; more estimate the share closer

# the work
workers = 0           # processes; 0: one for each core
part = ""             # scan only this share of the corpus: 0/4, 1/4, ...
merge = False         # make the dataset from the parts, once all are scanned
fresh = False         # discard an unfinished run, or make a finished dataset again
# -----------------------------------------------------------------------------


def main(c):
    prepare_corpus(c, HERE)


if __name__ == "__main__":
    c = Settings(configure(globals()))
    common.run(main, c)
