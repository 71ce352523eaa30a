"""The model as vLLM runs it: its mixer, and around it the numerics of ours; tower and projector are ours."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator, MambaStateShapeCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsMultiModal,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..modeling.visual_features import VideoMa2mbaProjector, VisualFeatures, build_tower
from .vllm_frames import frame_folder, placed
from .vllm_videos import DummyInputs, Info, Processor


class RMSNorm(nn.Module):
    """Computed in float32, given out in the dtype of the weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class Block(nn.Module):
    """Pre-norm residual around a mixer; the residual stream and the three parameters of the decay are float32."""

    def __init__(self, config: Any, vllm_config: Any, prefix: str):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MambaMixer2(
            hidden_size=config.hidden_size, ssm_state_size=config.state_size, conv_kernel_size=config.conv_kernel,
            intermediate_size=config.num_heads * config.head_dim, use_conv_bias=config.use_conv_bias,
            use_bias=config.use_bias, n_groups=config.n_groups, num_heads=config.num_heads, head_dim=config.head_dim,
            rms_norm_eps=config.layer_norm_epsilon, activation=config.hidden_act,
            model_config=vllm_config.model_config, cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config, prefix=f"{prefix}.mixer",
        )  # fmt: skip
        for name in ("D", "dt_bias"):  # made in the dtype of the model
            parameter = getattr(self.mixer, name)
            parameter.data = parameter.data.float()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.residual_in_fp32:
            hidden_states = hidden_states.float()
        return hidden_states + self.mixer(self.norm(hidden_states))


class Backbone(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: Any, vllm_config: Any, prefix: str):
        super().__init__()
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [Block(config, vllm_config, f"{prefix}.layers.{layer}") for layer in range(config.num_hidden_layers)]
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings(input_ids)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm_f(hidden_states)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class VideoMa2mbaServed(
    nn.Module, SupportsMultiModal, SupportsLoRA, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
):
    """`VideoMa2mbaForConditionalGeneration` in vLLM: the released folder as it is."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.", "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
        orig_to_new_substr={".A_log": ".A"},
    )  # fmt: skip

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return {"video": "<video>", "image": "<image>"}[modality]

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, torch.dtype]:
        return vllm_config.model_config.dtype, torch.float32

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        text = vllm_config.model_config.hf_config.text_config
        return MambaStateShapeCalculator.mamba2_state_shape(
            intermediate_size=text.num_heads * text.head_dim,
            tp_world_size=vllm_config.parallel_config.tensor_parallel_size, n_groups=text.n_groups,
            num_heads=text.num_heads, head_dim=text.head_dim, state_size=text.state_size, conv_kernel=text.conv_kernel,
            num_spec=vllm_config.num_speculative_tokens,
        )  # fmt: skip

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("pipeline_parallel_size: this model's layers run on one stage; use tensor_parallel_size")
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.vision_tower = build_tower(config)
            self.multi_modal_projector = VideoMa2mbaProjector(config)
        with self._mark_language_model(vllm_config):
            self.language_model = Backbone(config.text_config, vllm_config, maybe_prefix(prefix, "language_model"))
        text = config.text_config
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if text.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.language_model.embeddings)
        self.logits_processor = LogitsProcessor(text.vocab_size)

    # tower and projector are ours, and so is what is done with them
    _mark_tower_model: Any  # of vLLM's base classes, as the next
    _mark_language_model: Any
    vision_tower: Any
    language_model: Any
    lm_head: Any
    multi_modal_projector: Any
    _see, _pool, _pooled_features = VisualFeatures._see, VisualFeatures._pool, VisualFeatures._pooled_features

    def embed_multimodal(self, **items: Any) -> list[torch.Tensor]:
        """(frames * tokens_per_frame, hidden) of each item."""
        size, device = self.config.vision_chunk_size, self.lm_head.weight.device

        def embedded(frames: torch.Tensor) -> torch.Tensor:
            parts = [self.multi_modal_projector(self._pooled_features(part)) for part in frames.to(device).split(size)]
            return torch.cat(parts).flatten(0, 1)

        of_videos = [embedded(frame_folder().read(*placed(where))) for where in items.get("frames_at", ())]
        return of_videos + [embedded(image) for image in items.get("pixel_values", ())]

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_input_ids(input_ids)
        return self.language_model(inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:  # a placeholder is never a word of an answer
            logits[:, [self.config.image_token_id, self.config.video_token_id]] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
