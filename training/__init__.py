"""
The parts of a run around train.py's loop, in the order of their use:

    start              the machine, the data, settings that follow from others, what the run leaves behind
    origin             where the run begins: from scratch, at its checkpoint, or at another model
    warmup             passes before the first step: compile, and let DDP settle its buckets
    measure            validation, samples, probes, communication, the record of a step
    guard              judge steps, rewind, skip batches, warn of trouble ahead
    saver              checkpoints while the run trains
    sharded_checkpoint each rank writes and reads the tensors that lie on it
    monitor            the run folder, its logs, step timing, the screen
    profiler           traces, and communication that no computation hides
    probe              what happens inside the model, layer by layer
    track              wandb, trackio, TensorBoard

and under parallel.py: ranks (the processes), tensor_parallel, pipeline_parallel.
"""
