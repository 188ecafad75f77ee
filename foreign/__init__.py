"""
Models of other projects, in and out. What comes in, for train.py and export.py:

    pretrained       read a model: of a run, nanoGPT, a Hugging Face folder, a .gguf, the Hub; rows for new tokens
    hugging_face     a folder's weights, tokenizer and chat template
    gguf_files       the same of a .gguf
    byte_level       byte-level BPE from elsewhere, held against ours
    templates        chat templates from elsewhere, recognised and never executed
    names            what the readers and writers share

What goes out beside the weights, for export.py:

    chat_template    how conversations are written, as Jinja
    tokenizer_files  a tokenizer as the files of transformers, and as the fields of a GGUF
"""
