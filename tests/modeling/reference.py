"""What the tests compare with: Mamba-2 token by token, written from the recurrence, in whatever dtype it is given.

And what they measure with: the largest tensor that operations make, and what is still held of all that they made.
Nothing of the library is imported here.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def scan_loop(x, dt, A, B, C, D, state):
    """x (b, t, h, p), dt (b, t, h), A and D (h,), B and C (b, t, g, n), state (b, h, p, n) -> y (b, t, h, p), state."""
    heads_per_group = x.shape[2] // B.shape[2]
    outputs = []
    for t in range(x.shape[1]):
        b_t, c_t = (m[:, t].repeat_interleave(heads_per_group, dim=1)[:, :, None] for m in (B, C))  # (b, h, 1, n)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + dt[:, t, :, None, None] * x[:, t, :, :, None] * b_t
        outputs.append((state * c_t).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def mixer_loop(weights, hidden_states, conv_state, ssm_state, mask=None, *, n_groups, eps, time_step_limit):
    """A whole mixer, row by row and token by token. A padding token is skipped, and its output left zero.

    weights: dict with the names of transformers' Mamba2Mixer. hidden_states (b, t, hidden), conv_state (b, w - 1, d),
    ssm_state (b, h, p, n), mask (b, t) bool.
    """
    heads, state_size = weights["A_log"].shape[0], ssm_state.shape[-1]
    inner = weights["out_proj.weight"].shape[1]
    conv_weight = weights["conv1d.weight"][:, 0]  # (d, w)
    rows, conv_states, ssm_states = [], [], []
    for row in range(hidden_states.shape[0]):
        window, state, outputs = conv_state[row], ssm_state[row : row + 1], []
        for t in range(hidden_states.shape[1]):
            if mask is not None and not mask[row, t]:
                outputs.append(hidden_states.new_zeros(weights["out_proj.weight"].shape[0]))
                continue
            projected = weights["in_proj.weight"] @ hidden_states[row, t]
            if "in_proj.bias" in weights:
                projected = projected + weights["in_proj.bias"]
            gate, x_b_c, dt = projected.split([inner, conv_weight.shape[0], heads])
            full = torch.cat([window, x_b_c[None]])  # (w, d)
            window = full[1:]
            x_b_c = (full * conv_weight.T).sum(0)
            if "conv1d.bias" in weights:
                x_b_c = x_b_c + weights["conv1d.bias"]
            x, b, c = F.silu(x_b_c).split([inner, n_groups * state_size, n_groups * state_size])
            dt = F.softplus(dt + weights["dt_bias"]).clamp(*time_step_limit)
            y, state = scan_loop(
                x.view(1, 1, heads, -1),
                dt.view(1, 1, heads),
                -weights["A_log"].exp(),
                b.view(1, 1, n_groups, -1),
                c.view(1, 1, n_groups, -1),
                weights["D"],
                state,
            )
            y = (y.flatten() * F.silu(gate)).view(n_groups, -1)
            y = (y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)).flatten() * weights["norm.weight"]
            y = weights["out_proj.weight"] @ y
            outputs.append(y + weights["out_proj.bias"] if "out_proj.bias" in weights else y)
        rows.append(torch.stack(outputs))
        conv_states.append(window)
        ssm_states.append(state[0])
    return torch.stack(rows), torch.stack(conv_states), torch.stack(ssm_states)


def leaves(*tensors, dtype=None):
    """Copies that collect gradients."""
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def assert_gradients_match(found, expected, names, *, rtol):
    """Each pair exists, is not zero, and differs by at most `rtol` of the expected one's largest element."""
    assert len(found) == len(expected) == len(names)
    for mine, theirs, name in zip(found, expected, names, strict=True):
        assert mine is not None, f"no gradient of {name}"
        assert theirs is not None, f"the reference has no gradient of {name}"
        scale = theirs.abs().max()
        assert scale > 0, f"the gradient of {name} is zero everywhere: nothing is compared"
        error = (mine.to(theirs.dtype) - theirs).abs().max()
        assert error <= rtol * scale, f"the gradient of {name} is off by {error / scale:.2e} of its largest element"


class Largest(TorchDispatchMode):
    """Records the number of elements and the shape of the largest tensor that any operation gives out.

    Views of `but` are not counted.
    """

    def __init__(self, but=None):
        super().__init__()
        self.numel, self.shape = 0, None
        self.but = None if but is None else but.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # an expanded view holds no memory of its own: count what lies behind it
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() != self.but:
                held = min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
                if held > self.numel:
                    self.numel, self.shape = held, (func, tuple(leaf.shape))
        return out


class Made(TorchDispatchMode):
    """Notes the storage of every tensor that an operation gives out, but those of the tensors in `known`."""

    def __init__(self, known=()):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                self.storages.append((StorageWeakRef(leaf.untyped_storage()), leaf.untyped_storage().nbytes()))
        return out

    def held_bytes(self, but=()):
        """The sizes of what is still alive, smallest first, less the tensors in `but`."""
        given_out = {tensor.untyped_storage()._cdata for tensor in but}
        held = {ref.cdata: size for ref, size in self.storages if not ref.expired() and ref.cdata not in given_out}
        return sorted(held.values())
