"""
The GPT: one decoder-only transformer in one file. Every architecture choice is one field of GPTConfig and one branch.

With the defaults it is GPT-2 (Radford et al. 2019). The options and their sources:
- `pos="rope"`: attention sees the distance between tokens (Su et al. 2021, arXiv:2104.09864). Llama's form: it rotates
  the two halves of a head. `rope_scaling` stretches it over a longer context (rope_frequencies)
- `n_kv_head`: query heads share keys and values, so the cache is smaller (multi-query, Shazeer 2019, arXiv:1911.02150;
  grouped-query, Ainslie et al. 2023, arXiv:2305.13245)
- `norm`: RMSNorm, with or without gain, is cheaper than LayerNorm (Zhang & Sennrich 2019, arXiv:1910.07467)
- `norm_embed`, `zero_init`: a norm after the embedding, blocks that start as the identity (modded-nanogpt)
- `qk_norm`: keeps the attention logits small (Henry et al. 2020, arXiv:2010.04245), with a gain as in Qwen3
- `activation`: GELU, squared ReLU (So et al. 2021, arXiv:2109.08668), SwiGLU (Shazeer 2020, arXiv:2002.05202)
- `logit_softcap`: bounds the logits (Gemma 2, arXiv:2408.00118)
- `attn`: PyTorch's SDPA, flash-attn where it is installed, or plain matrix products

A row can hold several documents that do not see each other (`docs` of GPT.forward).

Start at GPT.forward. Which kernel computes attention says attention.py; the loss never holds all logits
(cross_entropy.py); a CPU trains with some operations fused (fused.py). The model knows no device, rank, file or
dataset: it imports torch and these three files alone.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import attention
import fused
from attention import attend, keep_apart, positions_within
from cross_entropy import linear_cross_entropy, rows_at_once


@dataclass
class GPTConfig:
    block_size: int = 1024        # tokens of context the model sees
    vocab_size: int = 50257       # token ids the model knows; the tables are padded to a multiple of 64 rows
    n_layer: int = 12             # transformer blocks
    n_head: int = 12              # query heads
    n_kv_head: int = 0            # key and value heads; 0: as many as n_head, 1: multi-query attention
    n_embd: int = 768             # width of the residual stream
    dropout: float = 0.0          # probability to drop, after embedding, attention and MLP
    bias: bool = True             # biases in linear layers and LayerNorms
    pos: str = "learned"          # positions: learned | rope
    rope_theta: float = 10000.0   # base of the rotary frequencies
    rope_scaling: str = "none"    # stretches rope over a longer context than trained at: none | linear | ntk | yarn
    rope_factor: float = 1.0      # by how much: the model was first trained at block_size / rope_factor tokens
    norm: str = "layernorm"       # layernorm | rmsnorm | rmsnorm_nogain
    norm_eps: float = 1e-5        # added to the variance in every norm
    norm_embed: bool = False      # a norm right after the embedding
    qk_norm: str = "none"         # normalise queries and keys per head: none | rms | rms_gain
    activation: str = "gelu_tanh"  # gelu (erf, nanoGPT) | gelu_tanh (GPT-2) | relu2 | swiglu
    mlp_width: int = 0            # hidden width of the MLP; 0: 4 n_embd, for swiglu two thirds of that
    tie_weights: bool = True      # the head is the embedding table
    logit_softcap: float = 0.0    # logits = cap * tanh(logits / cap); 0: off
    init_std: float = 0.02        # standard deviation of the blocks' weights at first; 0: 1 / sqrt(inputs)
    zero_init: bool = False       # residual projections (and an untied head) start at zero
    attn: str = "auto"            # auto | sdpa | flash | math
    parts: str = ""               # candidates of an ablation, separated by "+"

    def part(self, name):
        """The value of a candidate such as qk1.4, or None."""
        for part in self.parts.split("+"):
            if part.rstrip("0123456789.-") == name:
                return float(part[len(name):] or 1)

    def __post_init__(self):
        """Raises ValueError, naming the fields, for values without a meaning."""
        choices = {
            "pos": ("learned", "rope"),
            "rope_scaling": ("none", "linear", "ntk", "yarn"),
            "norm": ("layernorm", "rmsnorm", "rmsnorm_nogain"),
            "qk_norm": ("none", "rms", "rms_gain"),
            "activation": ("gelu", "gelu_tanh", "relu2", "swiglu"),
            "attn": ("auto", "sdpa", "flash", "math"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be finite")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "rope_theta", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.logit_softcap < 0.0:
            raise ValueError(f"logit_softcap={self.logit_softcap} must not be negative; 0 turns it off")
        if self.init_std < 0.0:
            raise ValueError(f"init_std={self.init_std} must not be negative; 0: 1 / sqrt(inputs)")
        if self.mlp_width < 0:
            raise ValueError(f"mlp_width={self.mlp_width} must not be negative; 0: 4 n_embd")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_kv_head < 0 or self.n_head % self.kv_heads != 0:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2 != 0:
            raise ValueError(f"pos='rope' rotates pairs, but n_embd={self.n_embd} / n_head={self.n_head} "
                             f"gives an odd head of {self.head_dim}")
        if self.rope_factor < 1.0:
            raise ValueError(f"rope_factor={self.rope_factor} must be at least 1")
        if self.rope_scaling == "none" and self.rope_factor != 1.0:
            raise ValueError(f"rope_factor={self.rope_factor} needs rope_scaling, one of linear, ntk, yarn")
        if self.rope_scaling != "none" and self.pos != "rope":
            raise ValueError(f"rope_scaling={self.rope_scaling!r} needs pos='rope': learned positions do not stretch")
        if self.rope_scaling in ("ntk", "yarn") and (self.head_dim < 4 or self.rope_theta <= 1.0):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} needs heads of at least 4 and a rope_theta above 1")
        if self.attn == "flash" and attention.flash_attn_func is None:
            raise ValueError("attn='flash' needs the flash-attn package; attn='auto' uses it where it is installed")

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self):
        return -(-self.vocab_size // 64) * 64

    @property
    def mlp_dim(self):
        """Hidden width: mlp_width, or 4 n_embd. SwiGLU has three matrices, so two thirds of that cost the same."""
        if self.mlp_width:
            return self.mlp_width
        if self.activation == "swiglu":
            return -(-(8 * self.n_embd) // (3 * 16)) * 16
        return 4 * self.n_embd


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as config.norm says. (..., dim) -> (..., dim)."""

    def __init__(self, config, dim):
        super().__init__()
        self.kind = config.norm
        self.eps = config.norm_eps
        self.shape = (dim,)
        self.weight = nn.Parameter(torch.ones(dim)) if self.kind != "rmsnorm_nogain" else None
        self.bias = nn.Parameter(torch.zeros(dim)) if self.kind == "layernorm" and config.bias else None

    def forward(self, x, keep_dtype=False):
        """x / its size -> in the dtype of the next product, or with `keep_dtype` in that of x, at least."""
        if self.kind == "layernorm":
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        if self.kind == "rmsnorm_nogain" and fused.serves(x):
            return fused.rms_norm(x, self.eps, x.dtype if keep_dtype else None)
        return F.rms_norm(x, self.shape, self.weight, self.eps)


def rope_base(config):
    """rope_theta, or for "ntk" the larger base that makes the slowest pair turn rope_factor times as slowly."""
    if config.rope_scaling != "ntk":
        return config.rope_theta
    return config.rope_theta * config.rope_factor ** (config.head_dim / (config.head_dim - 2))


def rope_frequencies(config):
    """-> (angle by which each pair of a head's dimensions turns per position, fp64 (head_dim / 2,); factor for q and k)

    A context s = rope_factor times as long as the first one has distances that the model never saw:
    - linear: all pairs turn s times as slowly (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    - ntk: a larger base slows the slowest pair by s and leaves the fastest as it was (NTK-aware, bloc97 2023)
    - yarn: pairs that turn seldom are slowed (yarn_frequencies), and attention is sharper by (0.1 ln s + 1)^2
    """
    D = config.head_dim
    frequency = rope_base(config) ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor, 1.0
    if config.rope_scaling == "yarn":
        return yarn_frequencies(config, frequency), 0.1 * math.log(config.rope_factor) + 1
    return frequency, 1.0


def yarn_frequencies(config, frequency):
    """YaRN (Peng et al. 2023, arXiv:2309.00071), as in their code: pairs that turned at least 32 times within the first
    context keep their frequency, pairs that turned less than once are s times as slow. In between the share of the slow
    frequency grows linearly with the index of the pair. fp64 (head_dim / 2,) -> the same shape."""
    D, s = config.head_dim, config.rope_factor
    trained = config.block_size / s  # tokens of the first context

    def pair_turning(times):
        """Index of the pair that turns this many times within the first context, as a real number."""
        return D * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    last_fast = max(math.floor(pair_turning(32)), 0)
    first_slow = min(math.ceil(pair_turning(1)), D - 1)
    index = torch.arange(D // 2)
    slow_share = ((index - last_fast) / max(first_slow - last_fast, 0.001)).clamp(0, 1).double()
    return frequency * (1 - slow_share) + frequency / s * slow_share


def rope_tables(config, positions=None):
    """For apply_rope at `positions` (T,), by default the whole context -> cosine and signed sine, fp32 (T, head_dim)"""
    frequency, scale = rope_frequencies(config)
    if positions is None:
        positions = torch.arange(config.block_size)
    angle = torch.outer(positions.double(), frequency)
    cos = (angle.cos() * scale).float()  # (T, head_dim / 2)
    sin = (angle.sin() * scale).float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) of each head. x (B, T, H, D), cos and sin (T, 1, D) -> (B, T, H, D)."""
    return x * cos.to(x.dtype) + x.roll(x.size(-1) // 2, -1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention. (B, T, n_embd) -> (B, T, n_embd). The number of heads follows from the width of c_attn, so
    a tensor-parallel shard, which holds some of the heads, is this same module."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.n_head // config.kv_heads  # query heads that share one key/value head
        width = (config.n_head + 2 * config.kv_heads) * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, width, config.bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, config.bias)
        self.attn = config.attn
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.norm_eps = config.norm_eps
        self.qk_scale = config.part("qk")
        if config.qk_norm == "rms_gain":
            self.q_gain = nn.Parameter(torch.ones(config.head_dim))
            self.k_gain = nn.Parameter(torch.ones(config.head_dim))

    def forward(self, x, rope=None, other_attend=None, ve=None):
        """`other_attend(q, k, v)` takes the place of `attend`: that of a cache, or one with documents."""
        B, T, _ = x.shape
        qkv = self.c_attn(x)  # (B, T, (n_q + 2 n_kv) * head_dim)
        heads = qkv.size(-1) // self.head_dim
        n_kv = max(1, heads // (self.group + 2))  # a shard may have fewer query heads than a group has
        n_q = heads - 2 * n_kv

        if fused.serves(qkv) and self.qk_norm != "rms_gain" and self.head_dim <= fused.MOST_CHANNELS:
            q, k, v = fused.split_heads(qkv, n_q, n_kv, rope, self.norm_eps, self.qk_norm == "rms")
        else:
            q, k, v = self.split_heads(qkv, n_q, n_kv, rope)

        if ve is not None:
            v = v + ve.view_as(v).to(v.dtype)
        if self.qk_scale:
            q, k = q * self.qk_scale, k * self.qk_scale
        if other_attend is not None:
            y = other_attend(q, k, v)
        else:
            y = attend(q, k, v, self.attn, self.dropout if self.training else 0.0)
        y = self.c_proj(y.reshape(B, T, n_q * self.head_dim))  # (B, T, n_embd)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def split_heads(self, qkv, n_q, n_kv, rope):
        """qkv (B, T, (n_q + 2 n_kv) * head_dim) -> q (B, T, n_q, head_dim), k and v (B, T, n_kv, head_dim); queries and
        keys are normalised and rotated, together: half as many kernels."""
        qk, v = qkv.view(*qkv.shape[:2], -1, self.head_dim).split((n_q + n_kv, n_kv), dim=2)
        if self.qk_norm != "none":
            qk = F.rms_norm(qk, (self.head_dim,), eps=self.norm_eps).to(v.dtype)  # autocast returns fp32
        if self.qk_norm == "rms_gain":
            gain = torch.cat((self.q_gain.expand(n_q, -1), self.k_gain.expand(n_kv, -1)))
            qk = qk * gain.to(qk.dtype)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        return *qk.split((n_q, n_kv), dim=2), v


class MLP(nn.Module):
    """Position-wise feed-forward. (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, config.mlp_dim, config.bias)
        if self.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.mlp_dim, config.bias)
        self.c_proj = nn.Linear(config.mlp_dim, config.n_embd, config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        h = self.c_fc(x)  # (B, T, mlp_dim)
        if self.activation == "relu2" and fused.serves(h):
            h = fused.relu_squared(h)
        elif self.activation == "relu2":
            h = F.relu(h)
            if h.dtype == torch.float16:
                h = h.clamp(max=255.0)  # float16 still holds the square of 255
            h = h * h  # not square(): its backward pass takes several times as long on a CPU
        elif self.activation == "swiglu":
            h = F.silu(self.c_gate(x)) * h
        elif self.activation == "gelu_tanh":
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.gelu(h)
        h = self.c_proj(h)
        return F.dropout(h, self.dropout, self.training) if self.dropout else h


class Block(nn.Module):
    """Pre-norm transformer block. (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = Norm(config, config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = Norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, other_attend=None, ve=None):
        x = x + self.attn(self.ln_1(x), rope, other_attend, ve)
        return x + self.mlp(self.ln_2(x))


class Head(nn.Linear):
    """The last layer: hidden states (..., n_embd) -> logits (..., padded vocabulary). With targets (N,) and hidden
    states (N, n_embd) -> the summed loss; `options` are linear_cross_entropy's."""

    def forward(self, x, targets=None, **options):
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, **options)


class GPT(nn.Module):
    """Embedding, blocks, head. A pipeline stage holds some of these under the same names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": Norm(config, config.n_embd),
        })
        if config.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        else:
            cos, sin = rope_tables(config)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        if config.part("skip"):
            self.x_scale = nn.Parameter(torch.ones(config.n_layer))
            self.x0_scale = nn.Parameter(torch.zeros(config.n_layer))
        if config.part("ve"):
            kind = int(config.part("ve"))  # 1: every other layer from the last; 2: all
            layers = {1: range(config.n_layer - 1, -1, -2), 2: range(config.n_layer)}[kind]
            self.ve = nn.ModuleDict({str(i): nn.Embedding(config.padded_vocab_size, config.kv_heads * config.head_dim)
                                     for i in layers})
        if config.norm_embed:
            self.transformer["ln_e"] = Norm(config, config.n_embd)
        self.lm_head = Head(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """GPT-2's initialisation (Radford et al. 2019, section 2.3): N(0, 0.02), residual projections, two a layer,
        scaled by 1/sqrt(2 n_layer); biases 0, gains 1. init_std=0 keeps the size of what passes a block's matrix
        instead: 1/sqrt(inputs). With zero_init residual projections and an untied head are 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear) and not (name == "lm_head" and self.config.tie_weights):
                residual = name.endswith("c_proj")
                if self.config.zero_init and (residual or name == "lm_head"):
                    nn.init.zeros_(module.weight)
                else:
                    std = 0.02 if name == "lm_head" else self.config.init_std or module.in_features**-0.5
                    nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.part("ve"):
            for table in self.ve.values():
                nn.init.zeros_(table.weight)

    def embed(self, idx, positions=None, docs=None):
        """Token ids (B, T), int32 or int64, at `positions` (T,) or 0, 1, ... -> residual stream (B, T, n_embd).
        With docs (B, T) learned positions begin at 0 in each document. Raises ValueError for more than block_size
        tokens."""
        T = idx.size(1)
        if positions is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, n_embd)
        if self.config.pos == "learned":
            if docs is not None:
                positions = positions_within(docs)
            table = self.transformer.wpe.weight
            x = x + (table[:T] if positions is None else F.embedding(positions, table))
        if self.config.norm_embed:
            x = self.transformer.ln_e(x, keep_dtype=True)  # the residual stream stays fp32 under autocast
        return F.dropout(x, self.config.dropout, self.training)

    def rope(self, T):
        """Cosines and sines (T, 1, head_dim) of the positions 0 .. T-1, or None with learned positions."""
        if self.config.pos != "rope":
            return None
        return self.rope_cos[:T, None], self.rope_sin[:T, None]

    def attend_apart(self, docs, dtype, compiling=None):
        """-> an attend(q, k, v) that keeps the documents docs (B, T) apart, or None without docs.

        `dtype` is that of the residual stream. compiling: whether attention is compiled; None: whether this call is.
        """
        if docs is None:
            return None
        if compiling is None:
            compiling = torch.compiler.is_compiling()
        if torch.is_autocast_enabled(docs.device.type):
            dtype = torch.get_autocast_dtype(docs.device.type)
        config = self.config
        dropout = config.dropout if self.training else 0.0
        apart = keep_apart(docs, config.attn, dtype, config.head_dim, dropout, compiling)
        return partial(attend, dropout=dropout, apart=apart)

    def head(self, x):
        """Residual stream (..., n_embd) -> logits (..., vocab_size). The padding of the table has none."""
        logits = self.lm_head(self.transformer.ln_f(x))[..., : self.config.vocab_size]
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def forward(self, idx, targets=None, *, docs=None, divisor=None, loss_only=False, last_only=False, cache=None):
        """Token ids idx (B, T) and targets (B, T), -1 where there is nothing to predict -> (logits, loss).

        logits (B, T, vocab_size), or (B, 1, vocab_size) with last_only; loss is the mean in nats per target, or None
        without targets. With loss_only the logits are None and never held whole in fp32. With `divisor`, a 0-dim fp32
        tensor, the loss is the sum divided by it. If all targets are -1, the loss is 0.

        docs (B, T), int64, rising in a row: the number of the document that each token belongs to. A token then
        attends only to earlier tokens of its own document, and learned positions begin at 0 in each document. RoPE
        needs no such restart, because attention sees only the distance between two tokens. So documents packed in a
        row compute what each computes alone.

        cache (inference/kvcache.py): the keys and values of earlier tokens. It has `positions` (T,) of idx, their
        `rope`, attend(layer, q, k, v) in place of `attend` above, and `rows`, the places in T whose logits are wanted.
        """
        if cache is not None:
            x = self.embed(idx, cache.positions)
            for i, block in enumerate(self.transformer.h):
                x = block(x, cache.rope, partial(cache.attend, i))
            return self.head(x[:, cache.rows]), None
        x = self.embed(idx, docs=docs)
        rope = self.rope(idx.size(1))
        other_attend = self.attend_apart(docs, x.dtype)
        x0 = x
        for i, block in enumerate(self.transformer.h):
            if self.config.part("skip"):
                x = self.x_scale[i].to(x.dtype) * x + self.x0_scale[i].to(x.dtype) * x0
            ve = self.ve[str(i)](idx) if self.config.part("ve") and str(i) in self.ve else None
            x = block(x, rope, other_attend, ve)
        if loss_only:
            return None, self.loss(x, targets, divisor)
        logits = self.head(x[:, -1:] if last_only else x)
        if targets is None:
            return logits, None
        cross_entropy = partial(F.cross_entropy, logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        if divisor is not None:
            return logits, cross_entropy(reduction="sum") / divisor
        return logits, torch.where((targets != -1).any(), cross_entropy(), 0.0)  # the mean of no loss is not a number

    def loss(self, x, targets, divisor=None, fuse=None):
        """Residual stream (B, T, n_embd), targets (B, T) -> mean cross-entropy in nats per target, or the sum divided
        by `divisor`, without ever holding all logits. `fuse` is linear_cross_entropy's."""
        x = x.flatten(0, 1)  # (B * T, n_embd)
        targets = targets.flatten()  # (B * T,)
        if isinstance(self.lm_head, Head):
            total = self.lm_head(self.transformer.ln_f(x), targets, vocab_size=self.config.vocab_size,
                                 softcap=self.config.logit_softcap, fuse=fuse)
        else:  # packed or quantized for inference (inference/quantize.py): no gradient is needed
            rows = rows_at_once(self.config.padded_vocab_size, x.device.type)
            pieces = zip(x.split(rows), targets.split(rows), strict=True)
            total = 0
            for xs, ts in pieces:
                total += F.cross_entropy(self.head(xs).float(), ts, ignore_index=-1, reduction="sum")
        if divisor is None:
            divisor = (targets != -1).sum().clamp(min=1)
        return total / divisor

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue token ids (B, T) by max_new_tokens each -> (B, T + max_new_tokens). Call eval() first.

        The plain way: it reads the last block_size tokens again for every new one (infer.py keeps a cache).
        temperature 0 takes the most likely token; top_k=None or 0 draws among all.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :], last_only=True)
            logits = logits[:, -1].float()  # (B, vocab_size), without the rows that only pad the table
            if temperature == 0:
                next_ids = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                if top_k:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, float("-inf"))
                probs = F.softmax(logits / temperature, dim=-1)
                next_ids = torch.multinomial(probs, 1, generator=generator)
            idx = torch.cat((idx, next_ids), dim=1)
        return idx

    # -------------------------------------------------------------------------
    # Costs, counted from the layers

    def num_params(self, padding=False):
        """Number of parameters, a tied head counted once; with `padding` also the rows that only pad the vocabulary."""
        n = sum(p.numel() for p in self.parameters())
        tables = 1 if self.config.tie_weights else 2
        pad = tables * (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return n if padding else n - pad

    def forward_flops(self, context, head=True):
        """FLOPs of one token that attends to `context` tokens, itself included (Kaplan et al. 2020, arXiv:2001.08361,
        table 1): 2 for each weight of a matrix, 4 for each context token and attention channel (q.k and weight.v)."""
        layers = [m for m in self.modules() if isinstance(m, nn.Linear) and (head or m is not self.lm_head)]
        attention = 4 * context * self.config.n_layer * self.config.n_head * self.config.head_dim
        return 2 * sum(m.in_features * m.out_features for m in layers) + attention

    def train_flops(self, T):
        """FLOPs per token of a training step on sequences of T: forward, and twice that backward. Causal attention
        sees (T + 1) / 2 tokens on average. Recomputed activations do not count, as in the definition of MFU."""
        return 3 * self.forward_flops((T + 1) / 2)

    def param_bytes(self):
        """Bytes of all parameters in their dtypes, padding included."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def kv_cache_bytes(self, tokens, dtype=torch.float32):
        """Bytes of the keys and values of `tokens` tokens."""
        per_token = 2 * self.config.n_layer * self.config.kv_heads * self.config.head_dim
        return per_token * tokens * dtype.itemsize
