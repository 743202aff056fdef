import torch

from prompt_diffusion.engine.noise import compute_min_snr_weights


def test_min_snr_weights_by_hand():
    alphas = torch.tensor([0.9, 0.5, 0.0])  # signal-to-noise ratios 9, 1, 0
    steps = torch.tensor([0, 1, 2])
    torch.testing.assert_close(compute_min_snr_weights(alphas, steps, 5.0, "epsilon"), torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(
        compute_min_snr_weights(alphas, steps, 5.0, "v_prediction"), torch.tensor([0.5, 0.5, 0.0])
    )
