"""The forward passes of the published formats, by their own key names, plainly and in float64.

Nothing of the library is imported here. Weights are a dict with the names that the files have.
"""

import torch
from torch.nn import functional as F

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def tower(weights, prefix, pixels, *, num_layers, num_heads, activation, eps):
    """CLIP's or SigLIP's first `num_layers` layers: (frames, 3, s, s) -> (frames, patches, width), no class token."""
    w = {name.removeprefix(prefix): value.double() for name, value in weights.items() if name.startswith(prefix)}
    patch = w["embeddings.patch_embedding.weight"]
    size = patch.shape[-1]
    # a convolution whose stride is its kernel: each patch, flattened, times a matrix
    patches = pixels.double().unfold(2, size, size).unfold(3, size, size)  # (f, 3, rows, columns, size, size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    x = patches @ patch.flatten(1).T
    if "embeddings.patch_embedding.bias" in w:
        x = x + w["embeddings.patch_embedding.bias"]
    has_class = "embeddings.class_embedding" in w
    if has_class:
        x = torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + w["embeddings.position_embedding.weight"]
    if has_class:
        x = layer_norm(x, w, "pre_layrnorm", eps)
    for layer in range(num_layers):
        name = f"encoder.layers.{layer}."
        normed = layer_norm(x, w, name + "layer_norm1", eps)
        q, k, v = (
            linear(normed, w, f"{name}self_attn.{p}_proj").unflatten(-1, (num_heads, -1)).transpose(1, 2) for p in "qkv"
        )
        attention = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), w, name + "self_attn.out_proj")
        normed = layer_norm(x, w, name + "layer_norm2", eps)
        x = x + linear(ACTIVATIONS[activation](linear(normed, w, name + "mlp.fc1")), w, name + "mlp.fc2")
    return x[:, 1:] if has_class else x


def pool(features):
    """Bilinear from an n x n grid to ceil(n / 2), each target pixel from the two nearest sources per axis."""
    side = round(features.shape[1] ** 0.5)
    pooled = -(-side // 2)
    matrix = torch.zeros(pooled, side, dtype=torch.float64)
    for i in range(pooled):
        centre = min(max((i + 0.5) * side / pooled - 0.5, 0), side - 1)
        low = int(centre)
        high = min(low + 1, side - 1)
        matrix[i, low] += 1 - (centre - low)
        matrix[i, high] += centre - low
    grid = features.unflatten(1, (side, side))
    return torch.einsum("ri,cj,fijd->frcd", matrix, matrix, grid).flatten(1, 2)


def projector(weights, first, second, features):
    """Linear, exact GELU, linear."""
    w = {name: value.double() for name, value in weights.items() if name.startswith((first, second))}
    hidden = linear(features, w, first)
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), w, second)


def mamba2(weights, embeds, *, num_layers, n_groups=1, eps=1e-5):
    """mamba_ssm's Mamba-2, token by token: (tokens, hidden) -> outputs of every layer, and logits (tokens, vocab)."""
    w = {name: value.double() for name, value in weights.items() if name.startswith("backbone.")}
    table = w.get("backbone.embedding.weight", w.get("backbone.embeddings.weight"))
    head = weights["lm_head.weight"].double() if "lm_head.weight" in weights else table
    x, outputs = embeds.double(), []
    for layer in range(num_layers):
        name = f"backbone.layers.{layer}."
        x = x + mixer(w, name + "mixer.", rms_norm(x, w[name + "norm.weight"], eps), n_groups, eps)
        outputs.append(x)
    return outputs, rms_norm(x, w["backbone.norm_f.weight"], eps) @ head.T


def mixer(w, name, x, n_groups, eps):
    heads, inner = len(w[name + "A_log"]), w[name + "out_proj.weight"].shape[1]
    channels, _, kernel = w[name + "conv1d.weight"].shape
    state_size = (channels - inner) // (2 * n_groups)
    z, xbc, dt = (x @ w[name + "in_proj.weight"].T).split([inner, channels, heads], dim=-1)
    past = torch.cat([xbc.new_zeros(kernel - 1, channels), xbc])
    xbc = sum(past[k : k + len(xbc)] * w[name + "conv1d.weight"][:, 0, k] for k in range(kernel))
    xbc = F.silu(xbc + w[name + "conv1d.bias"])
    u, b, c = xbc.split([inner, n_groups * state_size, n_groups * state_size], dim=-1)
    u = u.unflatten(-1, (heads, -1))
    b, c = (m.unflatten(-1, (n_groups, -1)).repeat_interleave(heads // n_groups, dim=1) for m in (b, c))
    dt = torch.log1p(torch.exp(dt + w[name + "dt_bias"]))
    decay = torch.exp(-dt * torch.exp(w[name + "A_log"]))
    state, ys = u.new_zeros(heads, inner // heads, state_size), []
    for t in range(len(x)):
        state = decay[t, :, None, None] * state + dt[t, :, None, None] * u[t, :, :, None] * b[t, :, None, :]
        ys.append((state @ c[t, :, :, None])[..., 0] + w[name + "D"][:, None] * u[t])
    y = (torch.stack(ys).flatten(1) * F.silu(z)).unflatten(-1, (n_groups, -1))
    y = (y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(1) * w[name + "norm.weight"]
    return y @ w[name + "out_proj.weight"].T


def linear(x, w, name):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def layer_norm(x, w, name, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * w[name + ".weight"] + w[name + ".bias"]


def rms_norm(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight
