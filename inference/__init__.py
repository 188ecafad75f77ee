"""
Under infer.py, sample.py, chat.py and eval.py:

    prompts       what a prompt may be
    sampling      logits to a token; where a text ends
    draws         the next tokens of many requests at once, on the device
    requests      a request: its tokens, its text, its log-probabilities
    kvcache       keys and values in blocks of one pool, and attention over them
    speculation   who proposes tokens that the model then reads at once, and how many
    batch         a pass over one new token of each request, in fixed shapes
    paged         the same for one token of each request, as a Triton kernel
    kernels       kernels.cpp: fast products and attention on a CPU, compiled once
    compiled      a step of one token for each request, compiled and kept on disk
    quantize      weights as inference reads them: packed for the CPU, half precision, int8, int4, fp8
    rounding      weights as integers of 4 or 8 bits with a scale for each group
    tiled         a linear layer in the order in which the CPU's kernel reads it
    int4          a linear layer with 4-bit weights over PyTorch's kernels
    gptq          4-bit codes that make up for each other's errors, from windows of text
    calibration   what windows of text teach fp8 (static scales) and int4 (codes), and where that lies
    tasks         multiple choice and last words, by log-likelihood
    samples       samples of a bank of prompts, as Markdown
    terminal      what chat.py reads and prints; how scripts end whose output is their product
    long_context  loss by position, a key hidden in a long text
    chat_tasks    answers of a chat model: do they end by themselves, are they right
    letters       multiple choice of chat models, by letter
    puzzles       generated questions with answers that can be checked
"""
