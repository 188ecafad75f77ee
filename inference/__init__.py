"""
Under infer.py, sample.py, chat.py and eval.py:

    prompts       what a prompt may be
    sampling      logits to a token; where a text ends
    kvcache       keys and values in blocks of one pool, and attention over them
    speculation   who proposes tokens that the model then reads at once, and how many
    quantize      weights as inference reads them: packed for the CPU, half precision, int8
    tasks         multiple choice and last words, by log-likelihood
    samples       samples of a bank of prompts, as Markdown
    terminal      what chat.py reads and prints; how scripts end whose output is their product
    long_context  loss by position, a key hidden in a long text
    chat_tasks    answers of a chat model: do they end by themselves, are they right
    letters       multiple choice of chat models, by letter
    puzzles       generated questions with answers that can be checked
"""
