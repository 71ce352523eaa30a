"""The one seam to engines that shard parameters over processes: FSDP2, and ZeRO-3 of DeepSpeed.

Such an engine gathers the parameters of a module before each use of it and, once the backward pass has left it, reduces
their gradients and lets go of them again. That fits modules that are used once per pass. Here some are used many times,
and not equally often by all processes: the blocks (cells of the grid, chunks of a prefill) and the vision tower (micro-
batches of frames). As gathering and reducing are work of all processes at once, other counts would hang them.

So for these modules the engine's part is done once per pass, whatever happens inside:

    1. Its hooks on them are set aside. All other hooks, those of users, stay and run at each use.
    2. Before the first use all their parameters are gathered, after the last one they are let go of.
    3. When the backward pass comes to what was computed from them, they are gathered again. Their gradients are whole
       tensors then, one per parameter, which the engine reduces and shards when the backward pass has left them, by its
       own rules: mixed precision, averages, groups of groups (HSDP), and no reduction while gradients accumulate.

All parameters of these modules are resident while they are at work; between, and outside, they are sharded.
"""

import sys
from contextlib import contextmanager

import torch
from torch.autograd import Variable

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
ENGINES = ("torch.distributed.fsdp.", "deepspeed.")


def run_gathered(modules, run, *tensors):
    """`run(*tensors)`, with the parameters of `modules` gathered once for all that `run` does with them.

    Args:
        modules: those that `run` calls; what is not sharded is left alone.
        run: gives out a tuple of tensors, through which alone gradients flow back.
        tensors: what enters, and may ask for a gradient.

    Returns:
        What `run` gives.

    Raises:
        ValueError: a kind of sharding under which the results could not be exact.
    """
    if not several_processes():
        return run(*tensors)
    modules = list(modules)
    units = [*_fsdp_units(modules), *_zero3_units(modules)]
    for unit in units:
        tensors = unit.enter(tensors)
    with engine_hooks_aside(modules):
        _refuse_what_is_still_sharded(modules)
        outputs = run(*tensors)
    for unit in reversed(units):
        outputs = unit.leave(outputs)
    return outputs


def several_processes():
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def others_wait_for(modules):
    """Whether `modules` must be used in each pass, as other processes may: for their gradients, or to gather them."""
    if not several_processes() or torch.distributed.get_world_size() == 1:
        return False
    trains = torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters())
    return trains or bool(_fsdp_units(modules) or _zero3_units(modules))


def is_partitioned(module):
    """Whether ZeRO-3 shards any parameter of a module."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def refuse_narrow_policies(model):
    """Refuse FSDP2 of a model, or of parts of it, that casts A_log, D and dt_bias to 16 bits, checkpointed or not.

    Raises:
        ValueError: a `MixedPrecisionPolicy` does so.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp") if several_processes() else None
    if fsdp is None:
        return
    for part in model.modules():
        if not isinstance(part, fsdp.FSDPModule):
            continue
        dtype = part._get_fsdp_state()._mp_policy.param_dtype
        if dtype is not None and torch.finfo(dtype).bits < 32 and _holds_decays(part, fsdp.FSDPModule):
            raise ValueError(
                f"MixedPrecisionPolicy(param_dtype={dtype}) turns the float32 parameters of {type(part).__name__} into "
                f"{dtype}, also A_log, D and dt_bias, which decide how fast the states decay: leave param_dtype out "
                "and compute in torch.autocast, which leaves them alone"
            )


def _holds_decays(module, unit):
    """Whether A_log is a parameter of a module or of what it holds, but for what is a unit of its own."""
    if "A_log" in module._parameters:
        return True
    return any(_holds_decays(child, unit) for child in module.children() if not isinstance(child, unit))


@contextmanager
def engine_hooks_aside(modules):
    """Inside, the hooks of an engine on `modules` and on what they hold are not called; those of users are."""
    kept = []
    try:
        for module in modules:
            for part in module.modules():
                for hooks in (getattr(part, name) for name in HOOKS):
                    engine = [key for key, hook in hooks.items() if _is_of_engine(hook)]
                    if engine:
                        kept.append((hooks, list(hooks.items())))
                        for key in engine:
                            del hooks[key]
        yield
    finally:
        for hooks, items in kept:  # in their places again, without those that were removed meanwhile
            left = dict(hooks)
            hooks.clear()
            hooks.update((key, hook) for key, hook in items if key in left or _is_of_engine(hook))
            hooks.update(left)


@contextmanager
def as_unsharded_class(module):
    """Inside, `module` is of the class it was before FSDP2 gave it one of its own, whose file would be saved as its."""
    kept = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        module.__class__ = next(cls for cls in kept.__mro__ if not issubclass(cls, fsdp.FSDPModule))
    try:
        yield
    finally:
        module.__class__ = kept


def _is_of_engine(hook):
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(ENGINES)


class _FSDPUnit:
    """What one `fully_shard` made: it does all by itself, where it is told that its module is used once."""

    def __init__(self, state, module):
        self.state, self.module = state, module

    def enter(self, tensors):
        return self.state._pre_forward(self.module, tensors, {})[0]

    def leave(self, outputs):
        return self.state._post_forward(self.module, None, outputs)


def _fsdp_units(modules):
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has sharded nothing
    if fsdp is None:
        return []
    found: dict = {}
    for module in modules:
        for part in module.modules():
            if isinstance(part, fsdp.FullyShardedDataParallel):
                raise ValueError(
                    f"{type(module).__name__} is wrapped by the first version of FSDP, which knows one use of a module "
                    "per pass: take the second, `fully_shard` or fsdp_config with fsdp_version: 2"
                )
            if isinstance(part, fsdp.FSDPModule):
                found.setdefault(part._get_fsdp_state(), part)
    # what is at work is gathered already, by who calls this one
    return [_FSDPUnit(state, part) for state, part in found.items() if state._training_state.name != "FORWARD"]


class _Zero3Unit:
    """Parameters partitioned by DeepSpeed's ZeRO-3; gathered in one call for all of them."""

    def __init__(self, parameters):
        self.parameters, self.gathered = parameters, []

    def gather(self):
        if not self.gathered:  # what is whole already is the engine's to let go of
            if any(p.ds_status.name == "INFLIGHT" for p in self.parameters):
                raise RuntimeError(
                    "DeepSpeed is fetching parameters ahead that are gathered here in one call, and may be half there: "
                    "let stage3_prefetch_bucket_size be 0"
                )
            self.gathered = [p for p in self.parameters if p.ds_status.name == "NOT_AVAILABLE"]
            if self.gathered:
                self.gathered[0].all_gather(param_list=self.gathered)

    def let_go(self):
        # a shared one may be in use elsewhere by now: it goes with that
        free = [p for p in self.gathered if not p.ds_active_sub_modules and p.ds_status.name == "AVAILABLE"]
        if free:
            free[0].partition(param_list=free)
        self.gathered = []

    def enter(self, tensors):
        self.gather()
        return tensors

    def leave(self, outputs):
        self.let_go()
        return _GatheredInBackward.apply(self, *outputs) if torch.is_grad_enabled() else outputs


class _GatheredInBackward(torch.autograd.Function):
    """The identity; on its way back it gathers a unit, until the whole backward pass is over."""

    @staticmethod
    def forward(ctx, unit, *tensors):
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx, *grads):
        ctx.unit.gather()
        Variable._execution_engine.queue_callback(ctx.unit.let_go)
        return None, *grads


def _zero3_units(modules):
    parameters = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    return [_Zero3Unit(list(dict.fromkeys(parameters)))] if parameters else []


def _refuse_what_is_still_sharded(modules):
    for module in modules:
        for name, parameter in module.named_parameters():
            if hasattr(parameter, "placements"):
                raise ValueError(
                    f"{name} of {type(module).__name__} is a DTensor that FSDP2 does not gather, as in tensor parallel "
                    "training: shard it by `fully_shard` instead"
                )
