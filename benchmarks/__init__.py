"""
Under bench.py. Each file can be read alone:

    training   train.py over several seeds; by batch, length and number of processes; with and without logging
    data       preparing a corpus beside nanoGPT's recipe; reading batches
    inference  decoding beside the plain way, transformers and llama.cpp
    llama_cpp_peer  llama.cpp beside inference, in a process of its own
    chat       the second turn of a talk; fine-tuning beside TRL
    memory     activation checkpointing, and ZeRO's stages
    step       one training update: its parts, its operators, its memory, beside nanoGPT's
    gpu        GPT-2's sizes beside the ceilings of one GPU
    serving    a model behind HTTP: speed, latency, overload, beside the servers of others
    endurance  what a server must survive: 10,000 calls of all kinds, clients that leave, kill -9
    servers    the processes that these two measure: serve.py, other servers, the engine alone
    traffic    calls drawn by a seed, a light client, and what came back
    common     what they share: running our scripts, processes, memory, tables
"""
