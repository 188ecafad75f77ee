"""
What training takes on a device: the memory of a model, part by part, before anything is allocated.
"""

import torch


def training_memory(model, batch_size, dtype=torch.float32, T=0):
    """Bytes of a training step on `batch_size` sequences of T tokens (0: block_size), by part.

    Weights, gradients and optimizer state are counted from the parameters (AdamW keeps two moments; Muon's one makes
    that an upper bound). Activations are what the backward pass reads, layer by layer, as in Korthikanti et al.
    2022 (arXiv:2205.05198), section 4, for attention that does not store its weights.
    -> {"weights", "gradients", "optimizer", "activations", "logits", "total"}
    """
    c = model.config
    T = T or c.block_size
    tokens = batch_size * T
    weights = model.param_bytes()
    width, kv = c.n_embd, c.kv_heads * c.head_dim
    small = 4 if dtype == torch.float32 else 2  # bytes of a matmul's input; the residual stream and norms stay in fp32
    norms = 2 * (4 + small) * width  # a norm's input and its output, twice a layer
    qk = (width + kv) * small
    attention = (2 * width + 2 * kv) * small + qk * ((c.qk_norm != "none") + (c.pos == "rope"))  # q k v and the output
    mlp = c.mlp_dim * small * {"relu2": 3, "swiglu": 4}.get(c.activation, 2)
    dropped = 2 * width if c.dropout else 0  # two masks of one byte
    activations = tokens * (c.n_layer * (norms + attention + mlp + dropped) + 2 * 4 * width)
    rows = min(tokens, max(1, 2**25 // c.vocab_size))
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": activations,
        "logits": 3 * 4 * rows * c.vocab_size,  # logits, their softmax and its gradient, at the loss's peak
    }
    return {**parts, "total": sum(parts.values())}
