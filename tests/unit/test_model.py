"""The transformer: shapes, what its output depends on, and numbers checked against other implementations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit.model import transformer as model_file
from dit.model.norm import layer_norm
from dit.model.positions import apply_rotary_emb, rope_freqs, sincos_pos_embed
from dit.model.transformer import Block, CrossAttention, DiT, SelfAttention, forward_flops, modulate
from helpers.small_models import rename_as_version_0_1


def make(patch_size: int = 2, random: bool = True, **changes) -> DiT:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "cross_attention_dim": 32,
        "pooled_projection_dim": 16,
    } | changes
    model = DiT(patch_size=patch_size, **settings).eval()
    if random:  # adaLN-Zero starts as nothing at all, which would hide what depends on what
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(height: int = 8, width: int = 8, count: int = 2):
    torch.manual_seed(1)
    mask = torch.ones(count, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return torch.randn(count, 4, height, width), torch.rand(count), torch.randn(count, 6, 32), mask, torch.randn(count, 16)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(8, 8), (16, 8)])
@pytest.mark.parametrize("conv_channels", [0, 8])
def test_dit_output_has_shape_of_latents(patch_size, size, conv_channels):
    assert make(patch_size, conv_channels=conv_channels)(*inputs(*size)).shape == (2, 4, *size)


def test_dit_refuses_latents_that_patches_do_not_divide():
    with pytest.raises(ValueError, match="6 x 8"):
        make(4)(*inputs(6, 8))


@pytest.mark.parametrize("conv_channels", [0, 8])
def test_dit_new_model_predicts_zero_and_learns(conv_channels):
    model = make(random=False, conv_channels=conv_channels)
    out = model(*inputs())
    assert not out.any()
    (out - 1).square().mean().backward()
    last = model.head.conv_out if conv_channels else model.final_layer.linear
    assert last.weight.grad.any()


def test_dit_whose_output_is_the_image_returns_the_velocity():
    velocity, image = make(), make(output="image")
    image.load_state_dict(velocity.state_dict())
    latents, _, *text = inputs(count=2)
    timesteps = torch.tensor([0.1, 0.8])
    with torch.no_grad():
        out, found = velocity(latents, timesteps, *text), image(latents, timesteps, *text)
    assert torch.allclose(found[1], (latents[1] - out[1]) / 0.8, atol=1e-5)
    assert torch.allclose(found[0], (latents[0] - out[0]) / 0.25, atol=1e-5)  # not by less, however little noise there is


@pytest.mark.parametrize("conv_channels", [0, 8])
def test_dit_depends_on_conditions_but_not_on_padding(conv_channels):
    model, (latents, timesteps, text, mask, pooled) = make(conv_channels=conv_channels), inputs()
    with torch.no_grad():
        base = model(latents, timesteps, text, mask, pooled)
        assert not torch.allclose(base, model(latents, timesteps * 0.5, text, mask, pooled), atol=1e-3)
        assert not torch.allclose(base, model(latents, timesteps, text.flip(1), mask, pooled), atol=1e-3)
        assert not torch.allclose(base, model(latents, timesteps, text, mask, pooled * 0.5), atol=1e-3)
        noisy = torch.where(mask[:, :, None], text, 100.0)
        assert torch.allclose(base, model(latents, timesteps, noisy, mask, pooled), atol=1e-5)


def test_text_statistics_standardise_and_are_saved(tmp_path):
    model, (latents, timesteps, text, mask, pooled) = make(), inputs()
    with torch.no_grad():
        plain = model(latents, timesteps, text, mask, pooled)
        model.set_text_statistics(torch.full((32,), 2.0), torch.full((32,), 3.0), torch.full((16,), 4.0), torch.full((16,), 5.0))
        model.save_pretrained(tmp_path)
        again = DiT.from_pretrained(tmp_path)
        assert torch.allclose(plain, again(latents, timesteps, 3 * text + 2, mask, 5 * pooled + 4), atol=1e-4)


def test_text_statistics_stay_fp32_in_bf16_model(tmp_path):
    model = make()
    model.tokens_mean.fill_(30.01)
    model.save_pretrained(tmp_path)
    half = DiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.x_embedder.weight.dtype == torch.bfloat16
    assert half.tokens_mean.dtype == torch.float32 and torch.equal(half.tokens_mean, model.tokens_mean)
    with torch.no_grad():
        assert torch.isfinite(half(*inputs())).all()


def test_pos_embed_tells_corners_apart():
    """Rotary positions alone cannot tell the corners of an image that is the same everywhere apart."""
    model, (_, timesteps, text, mask, pooled) = make(), inputs()
    with torch.no_grad():
        out = model(torch.ones(2, 4, 8, 8), timesteps, text, mask, pooled).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    corners = [out[:, :, i, :, j] for i in (0, 3) for j in (0, 3)]
    assert all(not torch.allclose(corners[0], other, atol=1e-3) for other in corners[1:])
    assert torch.allclose(sincos_pos_embed(3, 5)[7, [0, 8]], torch.zeros(2), atol=1e-6)  # sin of the middle patch of both sides


def test_text_keys_values_can_be_reused():
    model, (latents, timesteps, text, mask, pooled) = make(), inputs()
    with torch.no_grad():
        kept = model.text_keys_values(text)
        assert torch.equal(model(latents, timesteps, text, mask, pooled), model(latents, timesteps, None, mask, pooled, kept))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_self_attention_equals_torch():
    """At positions that do not turn and with norms that only rescale, it is torch's multi-head attention of normed q and k."""
    torch.manual_seed(0)
    ours = SelfAttention(32, 4)
    x = torch.randn(2, 9, 32)
    still = torch.stack([torch.ones(9, 4), torch.zeros(9, 4)])
    q, k, v = ours.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    q, k = (F.layer_norm(t, (8,), eps=1e-6) for t in (q, k))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
    expected = ours.out((weights @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(ours(x, still), expected, atol=1e-5)


def test_mlp_recomputed_activation_changes_no_gradient(monkeypatch):
    gradients, kept = [], []
    for recomputed in (False, True):
        monkeypatch.setattr(model_file, "should_checkpoint_activations", lambda x, recomputed=recomputed: recomputed)
        sizes: list[int] = []
        model = make().train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model(*inputs()).square().mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] <= kept[0] - 2 * (2 * 16 * 4 * 64)  # two blocks, two images of 16 tokens, four times the width


def as_diffusers(ours: SelfAttention | CrossAttention, q, k, v, cross_attention_dim: int | None) -> Attention:
    """diffusers' attention with the weights of ours."""
    theirs = Attention(
        query_dim=32, cross_attention_dim=cross_attention_dim, heads=4, dim_head=8, qk_norm="layer_norm", eps=1e-6, bias=False
    ).eval()
    with torch.no_grad():
        for mine, other in ((ours.norm_q, theirs.norm_q), (ours.norm_k, theirs.norm_k)):
            other.weight.copy_(torch.nn.init.uniform_(mine.weight, 0.5, 2))
        for weight, layer in ((q, theirs.to_q), (k, theirs.to_k), (v, theirs.to_v), (ours.out.weight, theirs.to_out[0])):
            layer.weight.copy_(weight)
        theirs.to_out[0].bias.copy_(torch.nn.init.normal_(ours.out.bias))
    return theirs


def test_self_attention_equals_diffusers_without_rotary():
    torch.manual_seed(0)
    ours, x = SelfAttention(32, 4), torch.randn(2, 9, 32)
    still = torch.stack([torch.ones(9, 4), torch.zeros(9, 4)])
    theirs = as_diffusers(ours, *ours.qkv.weight.chunk(3), cross_attention_dim=None)
    assert torch.allclose(ours(x, still), theirs(x), atol=1e-5)


def test_cross_attention_equals_diffusers():
    torch.manual_seed(0)
    ours, x, text = CrossAttention(32, 4, 24), torch.randn(2, 9, 32), torch.randn(2, 6, 24)
    mask = torch.arange(6)[None] < torch.tensor([[4], [6]])
    theirs = as_diffusers(ours, ours.q.weight, *ours.kv.weight.chunk(2), cross_attention_dim=24)
    expected = theirs(x, encoder_hidden_states=text, attention_mask=mask[:, None])
    assert torch.allclose(ours(x, ours.keys_values(text), mask), expected, atol=1e-5)
    assert not torch.allclose(ours(x, ours.keys_values(text), torch.ones_like(mask)), expected, atol=1e-3)


def test_adaln_and_mlp_equal_diffusers():
    """Theirs has six parts, for self-attention and MLP; ours nine, for cross-attention as well."""
    torch.manual_seed(0)
    block, x, condition = Block(32, 4, 24), torch.randn(2, 9, 32), torch.randn(2, 32)
    torch.nn.init.normal_(block.adaLN_modulation.weight)
    torch.nn.init.normal_(block.adaLN_modulation.bias)
    norm, mlp = AdaLayerNormZero(32), FeedForward(32, activation_fn="gelu-approximate")
    parts = block.adaLN_modulation(F.silu(condition)).chunk(9, dim=-1)
    with torch.no_grad():
        for theirs, ours in (
            (norm.linear.weight, block.adaLN_modulation.weight),
            (norm.linear.bias, block.adaLN_modulation.bias),
        ):
            theirs.copy_(torch.cat([ours[:96], ours[192:]]))
        for theirs, ours in ((mlp.net[0].proj, block.mlp[0]), (mlp.net[2], block.mlp[2])):
            theirs.load_state_dict(ours.state_dict())
    modulated, gate1, shift3, scale3, gate3 = norm(x, emb=condition)
    assert torch.allclose(modulate(layer_norm(x), parts[0], parts[1]), modulated, atol=1e-5)
    for ours, theirs in zip((parts[2], *parts[6:]), (gate1, shift3, scale3, gate3), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(block.mlp(x), mlp(x), atol=1e-6)


def test_rotary_depends_on_relative_positions():
    torch.manual_seed(0)
    table = rope_freqs(5, 5, 16)
    q, k = torch.randn(16), torch.randn(16)
    turned_q = apply_rotary_emb(q.expand(1, 1, 25, 16), table)[0, 0].view(5, 5, 16)
    turned_k = apply_rotary_emb(k.expand(1, 1, 25, 16), table)[0, 0].view(5, 5, 16)
    assert torch.allclose((turned_q[0, 1] * turned_k[2, 2]).sum(), (turned_q[2, 3] * turned_k[4, 4]).sum(), atol=1e-5)
    assert not torch.allclose((turned_q[0, 1] * turned_k[2, 2]).sum(), (turned_q[0, 1] * turned_k[1, 2]).sum(), atol=1e-3)


@pytest.mark.parametrize("conv_channels", [0, 8])
def test_forward_flops_equals_torch_counter(conv_channels):
    model = make(conv_channels=conv_channels)
    # torch's counter does not know the fused attention of CPUs, so it is shown the plain one
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs(count=1))
    assert forward_flops(model, (8, 8), 6) == counter.get_total_flops()


@pytest.mark.parametrize("conv_channels", [0, 8])
def test_dit_save_and_load(tmp_path, conv_channels):
    model = make(conv_channels=conv_channels)
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    with torch.no_grad():
        assert torch.equal(model(*inputs()), DiT.from_pretrained(tmp_path)(*inputs()))


def test_dit_loads_weights_and_config_of_version_0_1(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    rename_as_version_0_1(tmp_path)
    old = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {"patch.weight", "unpatch.bias", "blocks.0.modulation.weight", "modulation.bias"} <= set(old)
    loaded, loading = DiT.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
