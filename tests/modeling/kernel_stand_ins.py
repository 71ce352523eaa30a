"""What the kernels' packages give, in shapes alone: mamba_ssm 2.3 and causal_conv1d 1.7 on the meta device.

`LAUNCHES` says how many kernels each call launches on a GPU, with those that its Python wrapper adds: sums over blocks,
fills with zeros, casts. `tests/kernels/test_launches.py` holds the mamba_ssm part against the package itself.
"""

import types

import torch

LAUNCHES = {
    "steps": 1,
    "_chunk_state_fwd": 1,
    "_state_passing_fwd": 1,
    "_bmm_chunk_fwd": 1,
    "_chunk_scan_fwd": 1,
    "_chunk_scan_bwd_dstates": 1,
    "_state_passing_bwd": 2,
    "_chunk_scan_chunk_state_bwd_dx": 5,
    "_chunk_state_bwd_db": 4,
    "_chunk_scan_bwd_dC": 3,
    "_chunk_scan_bwd_dcb": 2,
    "_bmm_chunk_bwd": 1,
    "_chunk_scan_bwd_ddAcs_stable": 2,
    "steps_backward": 1,
    "selective_state_update": 1,
    "_layer_norm_fwd": 1,
    "_layer_norm_bwd": 3,
    "causal_conv1d_fn": 1,
    "_causal_conv1d_bwd_cpp": 1,
    "causal_conv1d_update": 1,
}


def new(like, *shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=like.device)


def stand_ins(launch):
    """The modules `scan_kernels()` and `conv_kernel()` give; `launch(name, *tensors)` is called for each call."""

    def steps(dt, mask, A_log, dt_bias, shape):
        b, t, h = dt.shape
        out = [new(dt, b, h, -(-t // shape.chunk_size), shape.chunk_size) for _ in range(2)]
        launch("steps", dt, *out)
        return out

    def steps_backward(grads, dt, mask, A_log, dt_bias, shape, grad_dt):
        launch("steps_backward", *grads, dt, grad_dt)
        return torch.empty_like(A_log), torch.empty_like(dt_bias)

    def state_forward(B, x, dt, *args, **kwargs):
        out = new(x, x.shape[0], dt.shape[2], *x.shape[2:], B.shape[-1])
        launch("_chunk_state_fwd", B, x, dt, dt, out)
        return out

    def passing_forward(states, *args, out_dtype=torch.float32, **kwargs):
        out = torch.empty_like(states, dtype=out_dtype)
        launch("_state_passing_fwd", states, out)
        return out, torch.empty_like(states[:, 0])

    def bmm_forward(a, b, chunk_size, output_dtype=None):
        out = new(a, a.shape[0], -(-a.shape[1] // chunk_size), a.shape[2], chunk_size, chunk_size)
        launch("_bmm_chunk_fwd", a, b, out)
        return out

    def scan_forward(scores, x, dt, log_decay, C, states, D=None):
        launch("_chunk_scan_fwd", scores, x, x, dt, log_decay, C, states)
        return torch.empty_like(x), None

    def states_backward(C, log_decay, grad_y, dtype=None):
        launch("_chunk_scan_bwd_dstates", C, grad_y)
        return new(C, C.shape[0], log_decay.shape[2], *grad_y.shape[2:], C.shape[-1])

    def passing_backward(states, of_chunk, grad, **kwargs):
        launch("_state_passing_bwd", states, grad, grad)
        return torch.empty_like(grad), torch.empty_like(of_chunk), torch.empty_like(grad[:, 0])

    def dx(x, dt, log_decay, B, scores, grad_y, grad_states, D=None, dx=None):
        launch("_chunk_scan_chunk_state_bwd_dx", x, grad_y, dx)
        return dx, torch.empty_like(dt), torch.empty_like(D)

    def by_group(name):
        def run(*args, B=None, C=None, ngroups=1):
            like = B if C is None else C
            launch(name, like)
            log_decay = args[2] if C is None else args[1]
            return new(like, *like.shape), torch.empty_like(log_decay)

        return run

    def dcb(x, dt, log_decay, grad_y, ngroups=1):
        launch("_chunk_scan_bwd_dcb", x, grad_y)
        return new(x, x.shape[0], dt.shape[2], ngroups, dt.shape[3], dt.shape[3])

    def bmm_backward(a, grad, residual=None, out=None):
        launch("_bmm_chunk_bwd", a, grad)
        return out

    def stable(x, dt, *args):
        launch("_chunk_scan_bwd_ddAcs_stable", x)
        return torch.empty_like(dt)

    def norm_forward(x, weight, bias, eps, z=None, out=None, group_size=None, **kwargs):
        out = torch.empty_like(x) if out is None else out
        launch("_layer_norm_fwd", x, z, out)
        return out, None, new(x, len(x) * (x.shape[1] // (group_size or x.shape[1])))

    def norm_backward(grad, x, weight, *args, z=None, dz=None, **kwargs):
        launch("_layer_norm_bwd", grad, x, z, dz, x)
        return torch.empty_like(x), torch.empty_like(weight), None, dz

    def update(state, x, *args, **kwargs):
        launch("selective_state_update", state, state, x)
        return torch.empty_like(x)

    scan = types.SimpleNamespace(
        _chunk_state_fwd=state_forward, _state_passing_fwd=passing_forward, _bmm_chunk_fwd=bmm_forward,
        _chunk_scan_fwd=scan_forward, _chunk_scan_bwd_dstates=states_backward, _state_passing_bwd=passing_backward,
        _chunk_scan_chunk_state_bwd_dx=dx, _chunk_state_bwd_db=by_group("_chunk_state_bwd_db"),
        _chunk_scan_bwd_dC=by_group("_chunk_scan_bwd_dC"), _chunk_scan_bwd_dcb=dcb, _bmm_chunk_bwd=bmm_backward,
        _chunk_scan_bwd_ddAcs_stable=stable,
    )  # fmt: skip
    kernels = types.SimpleNamespace(
        scan=scan,
        norm=types.SimpleNamespace(_layer_norm_fwd=norm_forward, _layer_norm_bwd=norm_backward),
        update=types.SimpleNamespace(selective_state_update=update),
        steps=types.SimpleNamespace(steps=steps, steps_backward=steps_backward),
    )

    def conv_forward(x, weight, bias, initial_states, activation):
        assert x.dtype == initial_states.dtype
        launch("causal_conv1d_fn", x, x)
        return torch.empty_like(x)

    def conv_backward(x, weight, bias, dout, dx, dweight, dbias, initial_states, dinitial_states, **kwargs):
        assert x.dtype == dx.dtype == initial_states.dtype == dinitial_states.dtype
        assert dweight.dtype == torch.float32
        assert dweight.shape == weight.shape
        launch("_causal_conv1d_bwd_cpp", x, dout, dx)

    def conv_update(x, conv_state, weight, bias, activation):
        assert x.dtype == conv_state.dtype
        launch("causal_conv1d_update", x, conv_state, conv_state, x)
        return torch.empty_like(x)

    conv = types.SimpleNamespace(
        causal_conv1d_fn=conv_forward,
        causal_conv1d_update=conv_update,
        cpp_functions=types.SimpleNamespace(_causal_conv1d_bwd_cpp=conv_backward),
    )
    return kernels, conv
