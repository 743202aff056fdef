"""Random checkpoints in the original layout: names and shapes from the networks stated again, nothing from the importer."""

import torch
from original_network import VAE, ControlModel, UNet
from transformers import CLIPTextConfig, CLIPTextModel

TINY = {"width": 32, "mults": (1, 2), "blocks": 1, "attention": (True, False), "context": 32, "heads": 4}
TINY_VAE = {"widths": (32, 32, 32, 64), "blocks": 1}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 24}
VOCABULARY = 69  # what the tiny tokenizer below learns from its one sentence
PREFIXES = {
    "control": "control_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
}
HEADS = {"num_heads": 4, "num_text_heads": 2}
_STEMS = ("input_hint_block", "input_cond_block")
_POOL = 1 << 22


def build_networks(unet=TINY, vae=TINY_VAE, text=TINY_TEXT, vocabulary=VOCABULARY):
    """The networks of a checkpoint on the meta device: names and shapes alone."""
    with torch.device("meta"):
        return {
            "control": ControlModel(**unet),
            "unet": UNet(**unet),
            "vae": VAE(**vae),
            "text": CLIPTextModel(
                CLIPTextConfig(vocab_size=vocabulary, num_attention_heads=2, hidden_act="quick_gelu", **text)
            ),
        }


def draw_weights(networks, seed=0):
    """Random values for every weight, also where training starts from zero; scaled so that activations stay of order 1.

    Slices of one pool of normal numbers: drawing a billion of them would take most of a test's time.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator)
    weights = {}
    for part, network in networks.items():
        for name, value in network.state_dict().items():
            start = int(torch.randint(_POOL, (), generator=generator))
            pieces = [pool[start : start + value.numel()]]
            while (rest := value.numel() - sum(map(len, pieces))) > 0:
                pieces.append(pool[:rest])
            drawn = torch.cat(pieces).view(value.shape)
            if "embedding" in name:
                pass
            elif value.ndim > 1:
                gain = 2.0 if name.startswith(_STEMS) else 1.0  # or the stems' signal would vanish
                drawn *= gain * value[0].numel() ** -0.5
            else:
                drawn = drawn.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
            weights[PREFIXES[part] + name] = drawn
    return weights


def fill(networks, weights):
    """Give the networks their weights, shared."""
    for part, network in networks.items():
        prefix = PREFIXES[part]
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        network.load_state_dict(state, strict=True, assign=True)
        network.eval()
    return networks


def draw_inputs(size, context, tokens, latent_stride=8, seed=1):
    """Latents, text, a timestep, an example pair and a query in [-1, 1]: one sample."""
    generator = torch.Generator().manual_seed(seed)
    pixels = size * latent_stride
    return {
        "latents": torch.randn(1, 4, size, size, generator=generator),
        "text": torch.randn(1, tokens, context, generator=generator),
        "timesteps": torch.randint(1000, (1,), generator=generator),
        "pair": torch.rand(1, 6, pixels, pixels, generator=generator) * 2 - 1,
        "query": torch.rand(1, 3, pixels, pixels, generator=generator) * 2 - 1,
    }


def schedule_buffers():
    """Some of what the original code keeps beside its weights, by its published configuration."""
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    cumulated = (1 - betas).cumprod(0)
    values = {"betas": betas, "alphas_cumprod": cumulated, "sqrt_alphas_cumprod": cumulated.sqrt()}
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(24)[None]}
    return {name: value.float() for name, value in values.items()} | {"logvar": torch.zeros(1000)} | positions


def save_tokenizer(folder):
    """A tokenizer of the tiny text encoder's vocabulary; returns it."""
    from prompt_diffusion.pretraining import train as pretrain
    from prompt_diffusion.pretraining.config import PretrainConfig

    config = PretrainConfig(text_length=24, vocabulary_size=80)
    tokenizer = pretrain.train_tokenizer(["a red cube on a green floor under a clear sky"], config)
    tokenizer.save_pretrained(folder)
    return tokenizer
