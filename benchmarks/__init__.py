"""
Under bench.py. Each file can be read alone:

    training   train.py over several seeds; by batch, length and number of processes; with and without logging
    data       preparing a corpus beside nanoGPT's recipe; reading batches
    inference  decoding beside the plain way, transformers and llama.cpp
    chat       the second turn of a talk; fine-tuning beside TRL
    memory     activation checkpointing, and ZeRO's stages
    gpu        GPT-2's sizes beside the ceilings of one GPU
    common     what they share: running our scripts, processes, memory, tables
"""
