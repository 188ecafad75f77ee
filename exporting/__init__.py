"""
Under export.py, what goes along with a model to other projects:

    chat_template      how conversations are written, as Jinja
    tokenizer_files    a tokenizer as the files of transformers, and as the fields of a GGUF
"""
