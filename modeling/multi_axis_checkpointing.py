"""What people switch on: transformers' gradient checkpointing, along two axes."""

from typing import Any

from transformers.utils import logging

from .checkpoint_plan import CheckpointOptions, plan_checkpoints

logger = logging.get_logger(__name__)


class MultiAxisCheckpointing:
    """Overrides of `PreTrainedModel` that make its gradient checkpointing Multi-Axis; see `checkpointing.py` for how.

    The options and the plans chosen so far live on the base model, so that model and head agree.
    """

    config: Any  # of `PreTrainedModel`, as the next
    base_model_prefix: str

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs=None,
        axes=("layer", "sequence"),
        layer_interval=None,
        sequence_interval=None,
        order=None,
        offload=False,
        memory_budget_bytes=None,
        host_memory_budget_bytes=None,
        gradient_horizon=None,
        every_n_layers=1,
    ):
        """Train with Multi-Axis Gradient Checkpointing: keep little, compute it again in the backward pass.

        Args:
            gradient_checkpointing_kwargs: dict that may carry every argument below, as `TrainingArguments` passes it.
            axes: any non-empty subset of "layer" and "sequence"; ("layer",) is the ordinary kind.
            layer_interval, sequence_interval: layers and tokens of a cell; None lets the planner decide.
            order: "layer_major" (the paper's grid) or "sequence_major"; None lets the planner decide.
            offload: what crosses a chunk border waits in host memory.
            memory_budget_bytes: None for the least memory at one recompute; a number for the fastest plan that fits.
            host_memory_budget_bytes: bounds what `offload` may hold.
            gradient_horizon: gradients flow through the last so many tokens of a row, and each window of as many before
                that has a supervised token, counted from the row's own end; None: through all. States are carried
                over every border, so the loss is that of the whole. What no window holds runs once, also the frames,
                and keeps nothing: compute and memory are those of watching. In data-parallel training a batch may so
                leave the tower without a gradient: `VideoMa2mbaTrainer` gives it zeros, with the stock Trainer set
                ddp_find_unused_parameters.
            every_n_layers: transformers' name for `layer_interval`; 1 leaves it alone.

        Raises:
            ValueError, TypeError: nonsense or unknown arguments. `InfeasibleMemoryBudget`, at the first forward pass of
            a shape: no plan fits.
        """
        options = {
            "axes": axes, "layer_interval": layer_interval, "sequence_interval": sequence_interval, "order": order,
            "offload": offload, "memory_budget_bytes": memory_budget_bytes,
            "host_memory_budget_bytes": host_memory_budget_bytes, "gradient_horizon": gradient_horizon,
        }  # fmt: skip
        for name, value in (gradient_checkpointing_kwargs or {}).items():
            if name == "use_reentrant":
                continue  # speaks of torch's checkpoint function, which is not used here
            if name == "every_n_layers":
                every_n_layers = value
            elif name not in options:
                raise ValueError(f"unknown gradient_checkpointing_kwargs key {name!r}; known are {', '.join(options)}")
            else:
                options[name] = value
        if every_n_layers != 1 and options["layer_interval"] is None:
            options["layer_interval"] = every_n_layers
        options["axes"] = tuple(options["axes"])
        asked = CheckpointOptions(**options)
        asked.check(self.config.text_config.num_hidden_layers)
        base = self._base()
        base.checkpoint_options, base.gradient_checkpointing, base._plans = asked, True, {}

    def gradient_checkpointing_disable(self):
        """Back to keeping everything."""
        self._base().gradient_checkpointing = False

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **options):
        """`gradient_checkpointing_enable` under Transformers' newer name.

        Args:
            activation_checkpointing_kwargs: its `gradient_checkpointing_kwargs`.
            options: its other arguments.
        """
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self):
        """`gradient_checkpointing_disable` under Transformers' newer name."""
        self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self):
        """Whether it is switched on."""
        return self._base().gradient_checkpointing

    def enable_input_require_grads(self):
        """Nothing to do: no checkpoint of this model needs a gradient at its inputs. A frozen tower builds no graph."""

    def disable_input_require_grads(self):
        """As `enable_input_require_grads`."""

    def is_checkpointing(self):
        """Whether a forward pass now would be checkpointed."""
        base = self._base()
        return base.gradient_checkpointing and base.training

    def checkpoint_plan(self, batch_size, sequence_length, num_gradient_tokens=None):
        """The `CheckpointPlan` for a batch of `batch_size` rows of `sequence_length` tokens, as padded.

        It is chosen once per shape, and said in one line. Raises what `plan_checkpoints` does, which see for
        `num_gradient_tokens`.
        """
        base = self._base()
        if num_gradient_tokens is None:
            num_gradient_tokens = min(sequence_length, base.checkpoint_options.gradient_horizon or sequence_length)
        key = batch_size, sequence_length, num_gradient_tokens
        if key not in base._plans:
            options = vars(base.checkpoint_options).copy()
            if options["sequence_interval"] is not None:  # a batch shorter than that is one time block
                options["sequence_interval"] = min(options["sequence_interval"], sequence_length)
            weight = next(param for param in base.language_model.parameters() if param.is_floating_point())
            backends = base.language_model.layers[0].mixer.backends(weight.device, weight.dtype)
            base._plans[key] = plan_checkpoints(
                self.config, batch_size, sequence_length, dtype_bytes=weight.element_size(),
                scan_backend=backends.scan, num_gradient_tokens=num_gradient_tokens, **options,
            )  # fmt: skip
            logger.info(f"MA-GC, batch {batch_size} x {sequence_length} tokens: {base._plans[key]}")
        return base._plans[key]

    def _base(self):
        return getattr(self, self.base_model_prefix, self)
