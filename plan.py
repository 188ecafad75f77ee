"""
What training takes on a device: the memory of a model, part by part, before anything is allocated.
"""

import torch


def training_memory(model, batch_size, dtype=torch.float32, T=0):
    """Bytes of a training step on `batch_size` sequences of T tokens (0: block_size), by part.

    Weights, gradients and optimizer state are counted from the parameters (AdamW keeps two moments; Muon's one makes
    that an upper bound); casts are the matrices in `dtype`, which autocast keeps for the backward pass. Activations are
    what the backward pass reads, layer by layer, as in Korthikanti et al. 2022 (arXiv:2205.05198), section 4. Attention
    stores its weights with attn="math", and off the GPU with dropout or in half precision.
    -> {"weights", "gradients", "optimizer", "casts", "activations", "logits", "total"}
    """
    c = model.config
    T = T or c.block_size
    tokens = batch_size * T
    weights = model.param_bytes()
    width, kv = c.n_embd, c.kv_heads * c.head_dim
    small = 4 if dtype == torch.float32 else 2  # bytes of a matmul's input; the residual stream and norms stay in fp32
    cuda = next(model.parameters()).is_cuda
    mask = (1 if cuda else small) if c.dropout else 0  # bytes of one dropout decision

    norms = 2 * (4 + small) * width  # a norm's input and its output, twice a layer
    qkv = width + 2 * kv
    qk_copies = (c.qk_norm != "none" or c.pos == "rope") + (c.qk_norm == "rms_gain")  # besides those in qkv
    attention = (qkv + qk_copies * (width + kv) + width) * small  # and the output
    half_on_cpu = c.attn == "auto" and small == 2 and not cuda  # where model.attend spells it out
    if c.attn == "math" or half_on_cpu or (c.dropout and not cuda):
        kept = mask + small if c.dropout else 0  # the mask and what was not dropped
        attention += c.n_head * T * ((4 if cuda else small) + kept)
    mlp = c.mlp_dim * small * (4 if c.activation == "swiglu" else 2)
    layer = norms + attention + mlp + 2 * mask * width
    ends = (4 * c.norm_embed + mask + 4 + small) * width  # after the embedding; ln_f's input and output
    rows = min(tokens, max(1, 2**25 // c.vocab_size))
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "casts": 0 if dtype == torch.float32 else small * matrices,
        "activations": tokens * (c.n_layer * layer + ends),
        "logits": 3 * 4 * rows * c.vocab_size,  # logits, their softmax and its gradient, at the loss's peak
    }
    return {**parts, "total": sum(parts.values())}
