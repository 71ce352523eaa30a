"""The same weights give the same numbers as transformers' own Mamba2ForCausalLM, CLIP and SigLIP."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Mamba2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from video_ma2mba.modeling import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration

from ..tiny import tiny_config, tiny_model

# float32 sums in another order, a few layers deep, on values of order one
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
STATE_SPACES = {"hidden_size": 64, "num_heads": 2, "head_dim": 64, "state_size": 128, "chunk_size": 16}


def theirs_with_our_weights(model):
    """transformers' causal model holding the weights of ours; every name must find its place."""
    theirs = Mamba2ForCausalLM(model.config.text_config).eval()
    state = {
        name.replace("model.language_model.", "backbone."): value
        for name, value in model.state_dict().items()
        if "vision_tower" not in name and "multi_modal_projector" not in name
    }
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 67])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_logits_are_those_of_mamba2(residual_in_fp32, tokens):
    model = tiny_model(text={**STATE_SPACES, "residual_in_fp32": residual_in_fp32})
    theirs = theirs_with_our_weights(model)
    ids = torch.randint(0, 46, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, other = model(ids).logits, theirs(ids).logits
    assert other.std() > 0.1
    torch.testing.assert_close(mine, other, **CLOSE)


def test_bfloat16_logits_are_near_those_of_mamba2():
    """Both round at every operation, in different places: they differ by no more than either does from float32."""
    model = tiny_model(text=STATE_SPACES)
    theirs = theirs_with_our_weights(model)
    ids = torch.randint(0, 46, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(ids).logits
        other = theirs.bfloat16()(ids).logits.float()
        mine = model.bfloat16()(ids).logits
    assert (mine - exact).abs().mean() <= 1.5 * (other - exact).abs().mean()


@pytest.mark.parametrize("cut", [1, 5, 16])
def test_continuation_is_that_of_mamba2(cut):
    model = tiny_model(text=STATE_SPACES)
    theirs = theirs_with_our_weights(model)
    ids = torch.randint(0, 46, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = theirs(ids).logits
        first, their_first = model(ids[:, :cut]), theirs(ids[:, :cut], use_cache=True)
        their_cache = their_first["cache" if "cache" in their_first else "cache_params"]  # its name before 5.24
        for mine, layer in zip(first.cache.layers, their_cache.layers, strict=True):
            theirs_now = layer.recurrent_states[0].float()
            # small entries are differences of large ones: the scale of the whole state bounds the error
            assert (mine.ssm_state - theirs_now).abs().max() <= 1e-5 * theirs_now.abs().max()
        second = model(ids[:, cut:], cache=first.cache).logits
    torch.testing.assert_close(torch.cat([first.logits, second], dim=1), whole, **CLOSE)


def test_checkpoint_of_mamba2_loads_into_the_backbone():
    """Parameter names are transformers': nothing is missing and nothing is left over."""
    config = tiny_config(text=STATE_SPACES)
    theirs = Mamba2ForCausalLM(config.text_config)
    mine = VideoMa2mbaForConditionalGeneration(config)
    result = mine.model.language_model.load_state_dict(theirs.backbone.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys


def features_of(model, pixels):
    """What goes into the projector."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.get_video_features(pixels)
    hook.remove()
    return torch.cat(seen)


def pooled_by_hand(hidden, side):
    """Bilinear from `side` to half of it, rounded up."""
    grid = hidden.transpose(1, 2).unflatten(2, (side, side))
    size = (side + 1) // 2
    return F.interpolate(grid, size=(size, size), mode="bilinear").flatten(2).transpose(1, 2)


def test_features_are_those_of_clip():
    model = tiny_model(vision={"image_size": 32}, vision_chunk_size=2)
    tower = CLIPVisionModel(model.config.vision_config).eval()
    result = tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert not result.unexpected_keys
    # theirs has the last layer and the final norm besides
    assert result.missing_keys
    assert all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in result.missing_keys)
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert hidden.shape[1] == 65  # 8 x 8 patches and the class token
    torch.testing.assert_close(features_of(model, pixels), pooled_by_hand(hidden[:, 1:], 8), **CLOSE)


def siglip(side):
    return SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side * 4,
        patch_size=4,
    )


@pytest.mark.parametrize("side", [4, 5])
def test_features_are_those_of_siglip(side):
    model = tiny_model(vision=siglip(side))
    tower = SiglipVisionModel(model.config.vision_config).eval()
    result = tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert not result.unexpected_keys
    pixels = torch.randn(3, 3, side * 4, side * 4)
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    found = features_of(model, pixels)
    assert hidden.shape[1] == side**2  # no class token
    assert found.shape[1] == model.config.tokens_per_frame == ((side + 1) // 2) ** 2
    torch.testing.assert_close(found, pooled_by_hand(hidden, side), **CLOSE)


@pytest.mark.parametrize("layer", [-1, -3, 1, 2])
def test_any_layer_of_the_tower(layer):
    model = tiny_model(vision_feature_layer=layer)
    tower = CLIPVisionModel(model.config.vision_config).eval()
    tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(features_of(model, pixels), pooled_by_hand(hidden[:, 1:], 4), **CLOSE)


@pytest.mark.parametrize(
    ("size", "total", "backbone"),
    [("0.7b", 0.7e9, 368_346_624), ("1.8b", 1.8e9, 1_343_757_312), ("3.1b", 3.1e9, 2_702_599_680)],
)
def test_presets_are_the_papers(size, total, backbone):
    """The backbones are exactly state-spaces' 370M, 1.3B and 2.7B.

    The paper adds 0.4 B for CLIP, the size of CLIP with its text half. Here 0.29 B are built: the 23 layers that are
    used of the vision half. Hence the wide margin.
    """
    config = VideoMa2mbaConfig.from_preset(size)
    assert config.tokens_per_frame == 144
    with torch.device("meta"):
        model = VideoMa2mbaForConditionalGeneration(config)
    assert sum(p.numel() for p in model.model.language_model.parameters()) == backbone
    assert abs(sum(p.numel() for p in model.parameters()) / total - 1) < 0.1
    assert len(model.model.vision_tower.encoder.layers) == 23


def test_siglip_so400m_has_196_tokens_per_frame():
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    config = VideoMa2mbaConfig.from_preset("3.1b", vision_config=vision)
    assert config.tokens_per_frame == 196
    with torch.device("meta"):
        model = VideoMa2mbaForConditionalGeneration(config)
        frames = torch.empty(2, 3, 384, 384)
        assert model.get_video_features(frames).pooler_output.shape == (2, 196, 2560)


def test_clip_l_14_336_has_144_tokens_per_frame():
    config = VideoMa2mbaConfig.from_preset("0.7b")
    assert isinstance(config.vision_config, CLIPVisionConfig)
    with torch.device("meta"):
        model = VideoMa2mbaForConditionalGeneration(config)
        assert model.get_video_features(torch.empty(2, 3, 336, 336)).pooler_output.shape == (2, 144, 1024)
