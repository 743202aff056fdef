import numpy as np
import torch

from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.objectives import standardise_latents
from prompt_diffusion.pretraining.train import build_vae, encode_pictures, train_tokenizer


def test_standardised_latents_are_standard_and_decode_to_the_same_pictures():
    torch.manual_seed(0)
    vae = build_vae(PretrainConfig(vae_channels=(8, 16))).eval().requires_grad_(False)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    latents = encode_pictures(vae, images)
    posterior = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist
    before, scale = vae.decode(latents).sample, latents.std(dim=(0, 2, 3))
    standardise_latents(vae, latents)
    after = encode_pictures(vae, images)
    torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(after).sample, before, atol=1e-4, rtol=1e-4)
    # the posterior's width shrinks with its channel
    width = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.std / posterior.std
    torch.testing.assert_close(width.mean(dim=(0, 2, 3)), 1 / scale, rtol=1e-3, atol=0)


def test_the_tokenizer_tells_captions_apart_and_survives_saving(tmp_path):
    captions = [
        "a red cube left of a blue sphere on a green floor",
        "a blue cube left of a red sphere on a sandy floor",
    ]
    tokenizer = train_tokenizer(captions, PretrainConfig(vocabulary_size=120))
    tokens = [tokenizer(caption).input_ids for caption in captions]
    assert tokens[0] != tokens[1]
    assert all(ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id for ids in tokens)
    assert all(len(ids) <= 14 for ids in tokens), "common words should be one token each"
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert [again(caption).input_ids for caption in captions] == tokens
    assert again.model_max_length == 32
